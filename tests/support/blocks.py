"""Tiny models, shapes and random adapters for the tests of adapters at FFN and MoE blocks."""

from __future__ import annotations

import types
from typing import Any

import torch
import transformers
from torch import Tensor

from modmoe.adapters.mechanism.attach import Site
from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.passes import Frame, Pass
from modmoe.adapters.methods.expert_lora import ExpertLoRA, ExpertLoRASettings
from modmoe.adapters.methods.perft import (
    PerftD,
    PerftDSettings,
    PerftE,
    PerftESettings,
    PerftR,
    PerftRSettings,
    PerftS,
    PerftSSettings,
)
from modmoe.adapters.methods.sparmoe import SparMoE, SparMoESettings
from tests.support.tiny import dense_model

# Shapes: T tokens, D width, E experts, K top_k

T, D, N, K = 13, 20, 7, 3
SHAPE = SiteShape(inputs=D, outputs=D, num_experts=N, base_top_k=K, init_range=0.5)
EXPERTS = SiteShape(
    inputs=D, outputs=D, num_experts=N, parts={"gate_up_proj": (D, 22), "down_proj": (11, D)}, init_range=0.5
)

_MOE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "num_experts_per_tok": 3,
    "pad_token_id": 258,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("OlmoeConfig", {**_MOE, "num_experts": 8}),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_MOE, "num_experts": 6, "moe_intermediate_size": 20, "head_dim": 8, "norm_topk_prob": True},
    ),
}
ROUTED = [
    (PerftR, PerftRSettings(r=3, num_experts=5)),
    (PerftR, PerftRSettings(r=3, num_experts=5, top_k=1, expert="parallel")),
    (PerftD, PerftDSettings(r=3, num_experts=3)),
    (PerftS, PerftSSettings(r=3)),
    (SparMoE, SparMoESettings(num_experts=3)),
]
MOE_ONLY = [
    (PerftR, PerftRSettings(r=3, num_experts=5, weight_source="base")),
    (PerftE, PerftESettings(r=3)),
    (ExpertLoRA, ExpertLoRASettings(r=3)),
]


def moe_model(model_type: str, implementation: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random MoE model in evaluation mode."""
    name, values = CONFIGS[model_type]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**values, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()


def any_model(model_type: str) -> Any:
    return dense_model(model_type) if model_type == "llama" else moe_model(model_type)


def named(case: Any) -> str | None:
    return getattr(case, "method", None) if isinstance(case, type) else None


def made(adapter_class: Any, settings: Any, shape: SiteShape = SHAPE, seed: int = 3) -> Any:
    """Return an adapter in float64 and evaluation mode, every parameter random."""
    adapter = adapter_class(settings, shape, "layers.0.mlp").double().eval()
    fill([adapter], seed)
    return adapter


def fill(adapters: list[Any], seed: int = 3, std: float = 0.5) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))


def adapters_of(model: Any) -> list[Any]:
    return [adapter for site in model.modules() if isinstance(site, Site) for adapter in site.adapters.values()]


def tokens(width: int = D, count: int = T, seed: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routing(count: int = T, experts: int = N, top_k: int = K) -> tuple[Tensor, Tensor]:
    """Return the weights and ids of a base router, not in the order of their size."""
    draw = torch.Generator().manual_seed(7)
    logits_TE = torch.randn(count, experts, generator=draw, dtype=torch.float64)
    logits_TE[:, 2] = -100  # an expert without tokens
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(top_k)
    return weights_TK.flip(-1), ids_TK.flip(-1)


def frame_with(weights_TK: Tensor, ids_TK: Tensor) -> Frame:
    frame = Frame(0, Pass())
    frame.values["layers.0.mlp base router"] = (weights_TK, ids_TK)
    return frame


def plain_experts(implementation: str = "eager") -> Any:
    experts = torch.nn.Module()
    draw = torch.Generator().manual_seed(2)
    for name, size in {"gate_up_proj": (N, 22, D), "down_proj": (N, D, 11)}.items():
        weight = torch.randn(size, generator=draw, dtype=torch.float64)
        experts.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    experts.act_fn = torch.nn.SiLU()
    experts.config = types.SimpleNamespace(_experts_implementation=implementation)
    return experts


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **{**_MOE, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    )
    return transformers.AutoModelForCausalLM.from_config(config)
