"""Tied checkpoints to export, also over an architecture that transformers does not know."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from modmoe.formats.tied_code import write_code
from modmoe.storage.checkpoint import Checkpoint
from tests.support import planned
from tests.support.planned import EXPERTS

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
    means = router.pop("compensation", False)
    return planned.write_tied(directory, model_type, means=means, leave_out=True, changes=changes, **router)[1]


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


__all__ = ["EXPERTS", "OWN_CODE", "write_config", "write_own", "write_tied"]
