"""Tied checkpoints straight from a dense model, experts drawn at random, without running a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modmoe.formats.tied_code import write_code
from modmoe.modeling import configuration_modmoe, modeling_modmoe
from modmoe.storage.checkpoint import CheckpointWriter, copy_companions, read_config

NAMES = ("sums", "words", "code")


def tied_model(dense: Any, *, routing: str = "token", num_modules: int = 8, **changes: Any) -> Any:
    """Return the tied model of a dense one in which every expert has the first two modules and others at random."""
    neurons = dense.config.intermediate_size
    config = getattr(configuration_modmoe, f"ModMoE{type(dense.config).__name__}")(
        **{
            **dense.config.to_dict(),
            "num_modules": num_modules,
            "module_size": neurons // num_modules,
            "stored_modules": [num_modules] * dense.config.num_hidden_layers,
            "num_experts": len(NAMES),
            "num_experts_per_tok": 1,
            "expert_names": list(NAMES),
            "modules_per_expert": num_modules // 2,
            "routing": routing,
            "ffn_biases": ["gate", "up", "down"] if dense.config.mlp_bias else [],
            "architectures": [f"ModMoE{type(dense).__name__}"],
            "dense_config": {"model_type": dense.config.model_type, "architectures": [type(dense).__name__]},
            **changes,
        }
    )
    model = getattr(modeling_modmoe, config.architectures[0])(config)
    model.load_state_dict(dense.state_dict(), strict=False)
    draw = torch.Generator().manual_seed(0)
    for layer in model.model.layers:
        layer.mlp.membership.zero_()
        layer.mlp.membership[:, :2] = True
        for expert in range(len(NAMES)):
            others = 2 + torch.randperm(num_modules - 2, generator=draw)[: num_modules // 2 - 2]
            layer.mlp.membership[expert, others] = True
        layer.mlp.check_ranking()
        if layer.mlp.router is not None:
            for weight in layer.mlp.router.parameters():
                torch.nn.init.normal_(weight, std=0.3, generator=draw)
    return model.eval()


def save_tied(directory: Path, dense: Any, companions: Path, dtype: torch.dtype | None = None, **changes: Any) -> Path:
    """Write such a model as a checkpoint, with the tokenizer that lies in ``companions``, and return the directory."""
    directory.mkdir(parents=True)
    model = tied_model(dense, **changes)
    writer = CheckpointWriter(directory)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and dense.config.tie_word_embeddings:
            continue
        writer.write(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)
    config = model.config.to_dict()
    stem = type(dense).__name__.removesuffix("ForCausalLM")
    config["model_type"] = f"modmoe_{dense.config.model_type}"
    config["auto_map"] = {
        "AutoConfig": f"configuration_modmoe.ModMoE{stem}Config",
        "AutoModel": f"modeling_modmoe.ModMoE{stem}Model",
        "AutoModelForCausalLM": f"modeling_modmoe.ModMoE{stem}ForCausalLM",
    }
    config["dtype"] = str(dtype or torch.float32).removeprefix("torch.")
    writer.finish(config)
    copy_companions(companions, directory)
    write_code(directory, read_config(directory), companions)
    return directory
