"""Tiny native mixtures of experts, in both layouts that transformers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.support import tiny

EXPERTS, TOP_K = 6, 2
_COMMON: dict[str, Any] = {
    **tiny._GATED,
    "num_hidden_layers": 2,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": TOP_K,
}
# a dense layer in the middle, or behind each sparse one, and shared experts, where the architecture has them
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("MixtralConfig", {"num_local_experts": EXPERTS, "intermediate_size": 24}),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        {
            "num_experts": EXPERTS,
            "shared_expert_intermediate_size": 20,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": EXPERTS, "head_dim": 8, "decoder_sparse_step": 2, "norm_topk_prob": True},
    ),
    "olmoe": ("OlmoeConfig", {"num_experts": EXPERTS, "intermediate_size": 24}),
    "flex_olmo": ("FlexOlmoConfig", {"num_experts": EXPERTS, "intermediate_size": 24, "norm_topk_prob": True}),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": EXPERTS, "n_shared_experts": 1, "first_k_dense_replace": 1, "head_dim": 8},
    ),
}
SPARSE = {
    "mixtral": [0, 1],
    "qwen2_moe": [0, 2],
    "qwen3_moe": [1],
    "olmoe": [0, 1],
    "flex_olmo": [0, 1],
    "glm4_moe": [1],
}
"""The layers that have experts."""


def moe_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random mixture of experts in evaluation mode."""
    torch.manual_seed(seed)
    name, values = CONFIGS[model_type]
    config = getattr(transformers, name)(**{**_COMMON, **values, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager")
    with torch.no_grad():
        for own, buffer in model.named_buffers():
            if own.endswith("correction_bias"):
                buffer.normal_(std=0.2)
        for own, parameter in model.named_parameters():
            # experts of different strength, and a router that prefers some: scores must have something to tell apart
            if own.endswith(("experts.down_proj", "gate.weight")) and "shared" not in own:
                scale = torch.linspace(0.5, 2.0, len(parameter))[torch.randperm(len(parameter))]
                parameter *= scale.view(-1, *[1] * (parameter.dim() - 1))
    return model.eval()


def save_moe(
    directory: Path,
    model_type: str,
    *,
    fused: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_size: str = "5GB",
    **changes: Any,
) -> Path:
    """Save one with its tokenizer, experts one by one under the Hub's names or fused, and return the directory."""
    model = moe_model(model_type, **changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(directory, save_original_format=not fused, max_shard_size=max_shard_size)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def load_moe(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Load one with plain transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, experts_implementation="eager"
    ).eval()
