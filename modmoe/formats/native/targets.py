"""The MoE architectures that a tied model can be written out as: one row each, and nothing but data.

What a row says of other clients than transformers was tried with llama.cpp, and read in the sources of vLLM and SGLang.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    FlexOlmoConfig,
    Glm4MoeConfig,
    GraniteMoeSharedConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from modmoe.formats.names import CLIENTS
from modmoe.models.ffn_layout import plain_layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Projections:
    """Names on disk, in a decoder layer; ``{expert}`` stands for an expert's number. Equal names are one tensor."""

    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An MoE architecture: what it computes, what it is called on disk, and who reads it."""

    config: Any
    """Its configuration class."""
    architecture: str
    """Its causal LM."""
    sources: tuple[str, ...]
    """The dense ``model_type`` that it continues."""
    clients: tuple[str, ...] = CLIENTS
    """Those that can run it."""
    ties: tuple[str, ...] = ("transformers",)
    """Clients known to use the embeddings as the output matrix; for others it is written out."""
    scaled_rope: tuple[str, ...] = ("transformers", "vllm", "sglang")
    """Clients that keep scaled rotary positions (``rope_type`` other than default)."""

    probs: str = "softmax"
    """softmax over all experts; ``chosen``, softmax over the top k's logits; or ``sigmoid`` of each."""
    renormalises: bool | None = True
    """Whether the top k's probabilities are made to sum to 1; None where ``norm_topk_prob`` says."""
    whatever_config: Mapping[str, bool] = field(default_factory=dict)
    """Clients that renormalise, or do not, whatever ``norm_topk_prob`` says."""

    experts: Projections
    """Where the experts lie; in one name without ``{expert}``, all of them in one tensor of three dimensions."""
    router: str
    """Where the router lies."""
    selection_bias: str | None = None
    """Where the bias lies that counts for the choice alone; it is zero here."""
    shared: Projections | None = None
    """Where the expert lies that always runs; None where there is none."""
    shared_gate: str | None = None
    """Where a gate of one row lies, whose sigmoid multiplies the shared expert."""
    is_shared_optional: bool = False
    """Whether the shared expert may be left out."""
    shared_in_experts: bool = False
    """Whether the shared expert is as wide as a whole number of experts."""

    num_experts: str
    """Configuration key of the number of experts."""
    width: str = "moe_intermediate_size"
    """Configuration key of an expert's neurons."""
    shared_width: str = ""
    """Configuration key of the shared expert's neurons, or of how many experts wide it is."""
    carried: tuple[str, ...] = ()
    """Configuration keys taken over from the source beside the common ones."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Configuration that is always the same."""

    biases: str = ""
    """Which attention projections can have a bias, of ``qkvo``."""
    bias_clients: tuple[str, ...] = CLIENTS
    """Clients that read those biases."""
    bias_key: str = ""
    """Configuration key that says whether they have."""
    always_biased: bool = False
    """Whether biases are written even where the source has none, as zeros: some clients always read them."""
    qk_norm_key: str = ""
    """Configuration key that says whether queries and keys are normed, where that can be chosen."""
    any_head_dim: tuple[str, ...] = CLIENTS
    """Clients for which ``head_dim`` may differ from ``hidden_size / num_attention_heads``."""
    slides: bool = False
    """Whether it has sliding-window attention as its sources have."""
    input_norm: str | None = "post_attention_layernorm"
    """The norm in front of the experts, in a decoder layer; None where there is none."""
    tolerance: float = 5e-3
    """Bound of the mean difference of logits in float32, as a share of the largest, where gates are not exact."""


def _plain(prefix: str) -> Projections:
    layout = plain_layout(f"{prefix}.")
    return Projections(gate=layout.name("gate"), up=layout.name("up"), down=layout.name("down"))


TARGETS: dict[str, Target] = {
    "mixtral": Target(
        config=MixtralConfig,
        architecture="MixtralForCausalLM",
        sources=("llama", "mistral"),
        ties=("transformers", "vllm", "llama.cpp"),
        scaled_rope=("transformers", "vllm", "llama.cpp"),
        any_head_dim=("transformers", "vllm", "llama.cpp"),
        experts=Projections(
            gate="block_sparse_moe.experts.{expert}.w1.weight",
            up="block_sparse_moe.experts.{expert}.w3.weight",
            down="block_sparse_moe.experts.{expert}.w2.weight",
        ),
        router="block_sparse_moe.gate.weight",
        num_experts="num_local_experts",
        width="intermediate_size",
        carried=("sliding_window",),
        slides=True,
    ),
    "qwen3_moe": Target(
        config=Qwen3MoeConfig,
        architecture="Qwen3MoeForCausalLM",
        sources=("qwen3",),
        ties=("transformers", "vllm", "llama.cpp"),
        renormalises=None,
        whatever_config={"llama.cpp": True},
        experts=_plain("mlp.experts.{expert}"),
        router="mlp.gate.weight",
        num_experts="num_experts",
        settings={"decoder_sparse_step": 1, "mlp_only_layers": []},
        biases="qkvo",
        bias_clients=("transformers",),
        bias_key="attention_bias",
    ),
    "granitemoeshared": Target(
        config=GraniteMoeSharedConfig,
        architecture="GraniteMoeSharedForCausalLM",
        sources=("granite", "llama", "mistral"),
        ties=("transformers", "vllm", "llama.cpp"),
        probs="chosen",
        experts=Projections(
            gate="block_sparse_moe.input_linear.weight",
            up="block_sparse_moe.input_linear.weight",
            down="block_sparse_moe.output_linear.weight",
        ),
        router="block_sparse_moe.router.layer.weight",
        shared=Projections(
            gate="shared_mlp.input_linear.weight",
            up="shared_mlp.input_linear.weight",
            down="shared_mlp.output_linear.weight",
        ),
        is_shared_optional=True,
        num_experts="num_local_experts",
        width="intermediate_size",
        shared_width="shared_intermediate_size",
        carried=("attention_multiplier", "embedding_multiplier", "logits_scaling", "residual_multiplier"),
        biases="qkvo",
        bias_clients=("transformers",),
        bias_key="attention_bias",
        any_head_dim=(),
    ),
    "qwen2_moe": Target(
        config=Qwen2MoeConfig,
        architecture="Qwen2MoeForCausalLM",
        sources=("qwen2", "llama", "mistral"),
        renormalises=None,
        whatever_config={"llama.cpp": False},
        experts=_plain("mlp.experts.{expert}"),
        router="mlp.gate.weight",
        shared=_plain("mlp.shared_expert"),
        shared_gate="mlp.shared_expert_gate.weight",
        num_experts="num_experts",
        shared_width="shared_expert_intermediate_size",
        settings={"decoder_sparse_step": 1, "mlp_only_layers": []},
        biases="qkv",
        bias_key="qkv_bias",
        always_biased=True,
        any_head_dim=(),
    ),
    "glm4_moe": Target(
        config=Glm4MoeConfig,
        architecture="Glm4MoeForCausalLM",
        sources=("qwen3", "qwen2", "llama", "mistral"),
        clients=("transformers", "vllm", "sglang"),  # llama.cpp's converter asks for GLM's own tokenizer
        probs="sigmoid",
        experts=_plain("mlp.experts.{expert}"),
        router="mlp.gate.weight",
        selection_bias="mlp.gate.e_score_correction_bias",
        shared=_plain("mlp.shared_experts"),
        shared_in_experts=True,
        num_experts="n_routed_experts",
        shared_width="n_shared_experts",
        settings={
            "first_k_dense_replace": 0,
            "n_group": 1,
            "topk_group": 1,
            "num_mtp_layers": 0,
            "partial_rotary_factor": 1.0,
        },
        biases="qkv",
        bias_key="attention_bias",
        qk_norm_key="use_qk_norm",
    ),
    "flex_olmo": Target(
        config=FlexOlmoConfig,
        architecture="FlexOlmoForCausalLM",
        sources=("olmo2",),
        clients=("transformers", "vllm"),
        renormalises=None,
        whatever_config={"vllm": False},
        experts=_plain("mlp.experts.{expert}"),
        router="mlp.gate.weight",
        num_experts="num_experts",
        width="intermediate_size",
        biases="qkvo",
        bias_clients=("transformers",),
        bias_key="attention_bias",
        any_head_dim=(),
        input_norm=None,
    ),
}
"""Architectures by ``model_type``, for each source in the order in which ``auto`` tries them."""
