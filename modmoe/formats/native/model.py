"""What a tied model asks of an architecture that it is to be written out as, and what of it an architecture lacks."""

# Shapes: S modules stored, M modules taken, E experts

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING

from modmoe.formats.dense import dense_config
from modmoe.formats.native.gates import COLD, Gate, choose_gate
from modmoe.formats.native.targets import Target
from modmoe.models.families import layers_of
from modmoe.models.ffn_layout import plain_layout, prefix_of
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Op, Take


class TiedModel:
    """What is asked of a tied checkpoint before it is planned."""

    def __init__(
        self, tied: Checkpoint, dtype: torch.dtype | None, take: Callable[[str, Tensor, int], Op] = Take
    ) -> None:
        """Read headers and memberships.

        ``dtype`` is the type to be written, None for the weights' own; ``take`` as for ``native_export``.
        """
        self.tied, self.config, self.take = tied, tied.config, take
        self.model_type = str((self.config.get("dense_config") or {}).get("model_type"))
        self.num_experts = int(self.config["num_experts"])
        self.top_k = int(self.config.get("num_experts_per_tok", 1))
        self.weighted = self.top_k > 1 and self.config.get("combine", "union") == "sum"
        self.module_size = int(self.config["module_size"])
        self.dtype = dtype or tied.dtype(plain_layout(prefix_of(self.config, 0)).name("up"))
        self.members_ES = [
            tied[f"{prefix_of(self.config, layer)}membership"].bool() for layer in range(layers_of(self.config))
        ]
        self.cores = [member_ES.all(0) & (self.num_experts > 1) for member_ES in self.members_ES]
        counts = [int(core_S.sum()) for core_S in self.cores]
        # what all layers have in common is shared; where a module more would count twice, all must agree
        self.shared_modules = min(counts)
        self.is_even = len(set(counts)) == 1

    @cached_property
    def resolved(self) -> Any:
        """The dense configuration with its defaults filled in."""
        return CONFIG_MAPPING[self.model_type].from_dict(dense_config(self.config))

    @cached_property
    def biases(self) -> str:
        """Which of the attention's projections have a bias, of ``qkvo``."""
        first = f"{self.config.get('ffn_layers', 'model.layers')}.0"
        return "".join(role for role in "qkvo" if f"{first}.self_attn.{role}_proj.bias" in self.tied)

    @cached_property
    def head_dim(self) -> int:
        """Width of an attention head."""
        found = getattr(self.resolved, "head_dim", None)
        return int(found or self.resolved.hidden_size // self.resolved.num_attention_heads)

    @cached_property
    def slides(self) -> bool:
        """Whether some layer's attention is cut off within the positions that the model has."""
        window = getattr(self.resolved, "sliding_window", None)
        types = getattr(self.resolved, "layer_types", None)
        if types:
            return "sliding_attention" in types
        return bool(window) and window < self.resolved.max_position_embeddings

    def neurons(self, modules_S: Tensor) -> Tensor:
        """Return the stored neurons of the modules that are True."""
        first_M = modules_S.nonzero().squeeze(-1)[:, None] * self.module_size
        return (first_M + torch.arange(self.module_size)).flatten()


def why_not(model: TiedModel, target: Target, client: str) -> str:
    """Return what about the model the target, or the client, has no place for; or nothing."""
    config = model.config
    if model.model_type not in target.sources:
        return f"a '{model.model_type}' model (only {', '.join(sorted(target.sources))})"
    if client not in target.clients:
        return f"anything for {client} (only for {', '.join(target.clients)})"
    if config.get("routing", "token") != "token":
        return f"routing by {config['routing']} (only by token)"
    if config.get("router_kind", "linear") != "linear":
        return "a two-layer router (only a linear one)"
    if config.get("compensation", False):
        return "the compensation of skipped modules"
    if config.get("ffn_biases"):
        return f"biases in the FFN ({', '.join(config['ffn_biases'])})"
    if config.get("default_expert") is not None:
        return f"a default expert ('{config['default_expert']}')"
    return _why_not_attention(model, target, client) or _why_not_experts(model, target, client)


def _why_not_attention(model: TiedModel, target: Target, client: str) -> str:
    held = target.biases if client in target.bias_clients else ""
    if set(model.biases) - set(held):
        return f"biases in the attention ({', '.join(sorted(set(model.biases) - set(held)))})"
    heads = int(model.resolved.num_attention_heads)
    if client not in target.any_head_dim and model.head_dim * heads != model.resolved.hidden_size:
        return (
            f"{heads} heads of {model.head_dim} in a width of {model.resolved.hidden_size} (only hidden_size / heads)"
        )
    if model.slides and not target.slides:
        return "sliding-window attention"
    kind = (getattr(model.resolved, "rope_parameters", None) or {}).get("rope_type", "default")
    if kind != "default" and client not in target.scaled_rope:
        return f"rotary positions of type '{kind}' for {client}, which drops them there"
    if client != "transformers" and model.config.get("ffn_activation", "silu") not in ("silu", "swish"):
        return f"the activation '{model.config['ffn_activation']}' for {client} (only silu)"
    return ""


def _why_not_experts(model: TiedModel, target: Target, client: str) -> str:
    widths = {int(count) for member_ES in model.members_ES for count in member_ES.sum(1)}
    if len(widths) != 1:
        return f"experts of {', '.join(map(str, sorted(widths)))} modules; all must have as many"
    if model.top_k > 1 and not model.weighted:
        for layer, (member_ES, core_S) in enumerate(zip(model.members_ES, model.cores, strict=True)):
            if bool((member_ES[:, ~core_S].sum(0) > 1).any()):
                return (
                    f"a union of {model.top_k} experts that overlap (layer {layer}), in which a module counts once "
                    "(only disjoint experts beside the shared modules, top_k 1, or combine: sum)"
                )
        if target.shared is not None and not model.is_even:
            return "layers with more shared modules than others, in a union (its shared expert has one width)"
    if target.shared is not None and model.shared_modules == widths.pop():
        return "experts that have no module of their own"
    gate = gate_of(model, target, client)
    if isinstance(gate, str):
        return gate
    if gate.exponent is not None and gate.exponent <= COLD and model.dtype == torch.float16:
        return "the constant weights of its experts in float16, in which a cold router has no bits left (use bfloat16)"
    return ""


def gate_of(model: TiedModel, target: Target, client: str) -> Gate | str:
    """Return how the target gets the model's coefficients, or why it cannot."""
    return choose_gate(
        target,
        client,
        num_experts=model.num_experts,
        top_k=model.top_k,
        weighted=model.weighted,
        copied=target.shared is None and any(bool(core_S.any()) for core_S in model.cores),
    )
