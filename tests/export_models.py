"""Tied checkpoints of every family to export: the real plan with random modules, experts and routers."""

# Shapes: D model width, F neurons, M modules, H hidden width of a router, E experts

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

import torch

from modmoe.analyze.partition import Partition
from modmoe.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from modmoe.convert.assignment import Assignment
from modmoe.convert.code import write_code
from modmoe.convert.modular import modular_plan
from modmoe.convert.routers import RouterStart
from modmoe.families import FAMILIES
from modmoe.loading import dense_classes
from modmoe.recipe import make_recipe
from tests.tiny import NEURONS, dense_config, save_dense

MODULES, WIDTH, HIDDEN = 8, 32, 16
EXPERTS = ("sums", "words", "code")

OWN_CODE = {
    "configuration_own.py": """
        from transformers import LlamaConfig

        class OwnConfig(LlamaConfig):
            model_type = "own"
    """,
    "layers_own.py": """
        import torch
        from transformers.models.llama.modeling_llama import LlamaRMSNorm

        class OwnNorm(LlamaRMSNorm):
            def forward(self, x):
                return torch.relu(super().forward(x) - 0.5)
    """,
    # transformers asks for config_class of the causal LM; the model without a head may leave it to its parent
    "modeling_own.py": """
        from transformers import LlamaForCausalLM, LlamaModel
        from .configuration_own import OwnConfig
        from .layers_own import OwnNorm

        class OwnModel(LlamaModel):
            def __init__(self, config):
                super().__init__(config)
                for layer in self.layers:
                    layer.post_attention_layernorm = OwnNorm(config.hidden_size, config.rms_norm_eps)
                self.post_init()

        class OwnForCausalLM(LlamaForCausalLM):
            config_class = OwnConfig

            def __init__(self, config):
                super().__init__(config)
                self.model = OwnModel(config)
                self.post_init()
    """,
}


def write_tied(
    directory: Path, model_type: str = "llama", *, changes: dict[str, Any] | None = None, **router: Any
) -> Path:
    """Write ``dense`` and ``tied`` into a directory and return the latter; no expert has the last module.

    ``changes`` go to the dense configuration, ``router`` to the recipe: ``routing``, ``top_k``, ``compensation``...
    """
    dense = save_dense(directory / "dense", model_type, **(changes or {}))
    source, family = Checkpoint(dense), FAMILIES[model_type]
    settings = {**dense_config(model_type, **(changes or {})).to_dict(), **source.config}
    source.add_prefix(family.layers)
    recipe = make_recipe(
        {"partition.num_modules": MODULES, **{f"router.{key}": value for key, value in router.items()}}
    )
    draw = torch.Generator().manual_seed(0)
    partitions, assignments, starts = [], [], []
    for _ in range(2):
        module_F = (torch.arange(NEURONS) % MODULES)[torch.randperm(NEURONS, generator=draw)]
        membership_EM = torch.zeros(len(EXPERTS), MODULES, dtype=torch.bool)
        for expert in range(len(EXPERTS)):
            membership_EM[expert, torch.randperm(MODULES - 1, generator=draw)[: MODULES // 2]] = True
        partitions.append(Partition(module_F, MODULES))
        assignments.append(Assignment(membership_EM, EXPERTS))
        starts.append(_start(recipe.router, draw))
    classes = dense_classes(dense, trust_remote_code=False)
    plan = modular_plan(source, family, recipe, partitions, assignments, starts, classes, settings)
    plan.check(source)
    tied = directory / "tied"
    tied.mkdir()
    writer = CheckpointWriter(tied)
    plan.run(source, writer)
    writer.finish(plan.config)
    copy_companions(dense, tied)
    write_code(tied, plan.config, dense)
    return tied


def write_own(directory: Path) -> Path:
    """Write a tied model over an architecture that transformers does not know: a Llama with norms of its own."""
    tied = write_tied(directory)
    config = Checkpoint(tied).config
    for name, text in OWN_CODE.items():
        (tied / name).write_text(textwrap.dedent(text), encoding="utf-8")
    config["model_type"], config["architectures"] = "modmoe_own", ["ModMoEOwnForCausalLM"]
    config["auto_map"] = {key: value.replace("ModMoELlama", "ModMoEOwn") for key, value in config["auto_map"].items()}
    config["dense_config"].update(
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModel": "modeling_own.OwnModel",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    )
    write_code(tied, config, tied)
    write_config(tied, config)
    return tied


def write_config(directory: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def _start(router: Any, draw: torch.Generator) -> RouterStart:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    has_router = router.routing != "task"
    is_linear = router.kind == "linear"
    return RouterStart(
        weight_ED=normal(len(EXPERTS), WIDTH) if has_router and is_linear else None,
        hidden_HD=normal(HIDDEN, WIDTH) if has_router and not is_linear else None,
        output_EH=normal(len(EXPERTS), HIDDEN) if has_router and not is_linear else None,
        means_MD=normal(MODULES, WIDTH) if router.compensation else None,
        agreement=1.0,
        chance=0.5,
    )
