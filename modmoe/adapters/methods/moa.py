"""MoA: adapters of different kinds in one decoder layer, weighted by one router of the layer.

    MoA, https://arxiv.org/abs/2506.05928

    q, k, v, o, down_proj   y += w alpha / R  B A x                  a LoRA each
    parallel                y += w (U silu(V x + v) + u)             beside the FFN block: its input, its output
    prompt                  see moa_prefix.py                        ten vectors that attention reads through gates

    l = W2 (silu(W1 x + b1) * (W3 x + b3)) + b2                      one number a type, from the layer's input
    soft     w = sigmoid(l)
    sparse   w = sigmoid(l) where sigmoid(l) >= t, else 0;   t = sigmoid(c x + c0) / 2

There is no normalisation over types and no auxiliary loss. A layer costs R (D + O) a LoRA, 2 D W + W + D for the
parallel adapter, P D + H for the prompt, 2 X (D + 1) + E X + E with X = 4 E for the router and D + 1 for the threshold.
The weights depend on the token and the parallel adapter is not linear, so nothing folds into the base weights.

Every type is exactly zero at the start: B and the prompt's gates are, as published, and U, where the release has
xavier_uniform with gain 1e-4 as it has for V, so that its adapter begins near zero and not at it.

The released sparse form uses t in the comparison alone, which has no gradient: its threshold keeps its random start.
``threshold_weight`` says what is done instead. The released router reads the layer's input before the norm in the
Llama code, after it in the Qwen3 code: ``router_input``.
"""

# Shapes: B batch, T tokens, D model width, O output width, R rank, W bottleneck width, P prompt vectors, H query heads,
# E adapter types, which are the experts here, X hidden width of the router

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmoe.modeling.sequences_modmoe import sequence_features

from ..mechanism.attach import Site
from ..mechanism.base import Kind, RoutedAdapter, SiteShape
from ..mechanism.losses import Route
from ..mechanism.passes import Frame
from ..mechanism.routing import kaiming_, router_logits
from .moa_hooks import ATTENTION, TYPES, block_of, layer_hooks, type_path

TEMPERATURE = 0.1
"""Width of the sigmoid through which ``straight_through`` sees the threshold."""


@dataclass(kw_only=True)
class MoASettings:
    """The choices that both forms of MoA have; the defaults are the paper's."""

    r: int = 8
    """Rank of each LoRA."""
    lora_alpha: float = 8
    """A LoRA's delta is multiplied by lora_alpha / r."""
    adapters: tuple[str, ...] | None = None
    """Types of adapters: q_proj, k_proj, v_proj, o_proj, down_proj, parallel, prompt. None for those that the layer has
    a place for: an MoE block with fused experts has no down_proj."""
    bottleneck_size: int = 16
    """Width of the parallel adapter."""
    num_virtual_tokens: int = 10
    """Prompt vectors of a layer."""
    router_width: int = 4
    """Hidden width of the router, in types; 0 for one linear layer."""
    router_input: Literal["layer", "norm"] = "layer"
    """What the router reads: the layer's input as it is (the published Llama code) or after input_layernorm (Qwen3)."""


@dataclass(kw_only=True)
class SoftMoASettings(MoASettings):
    """The choices of Soft MoA."""

    routing: Literal["token", "instance"] = "token"
    """token: weights of each token's own. instance: the router reads the mean over the prompt of a generation, which is
    kept with the cache; elsewhere the mean of what came before, never anything that comes later."""
    routing_chunk: int = 64
    """Tokens after which an instance without a marked prompt is weighted anew."""


@dataclass(kw_only=True)
class SparseMoASettings(MoASettings):
    """The choices of Sparse MoA; the prompt is left out unless ``adapters`` names it, as in the release for Qwen3."""

    const_threshold: float | None = None
    """The threshold of every token; None for a learned one."""
    threshold_weight: Literal["raw", "minus_tau", "straight_through"] = "straight_through"
    """What a type that reaches the threshold t counts with. raw: s, its sigmoid; as released, t does not learn.
    minus_tau: s - t, as in AdaMoLE. straight_through: s, with the gradient of s sigmoid((s - t) / 0.1) for t; the
    default, since it computes what was released and lets a type that was cut off come back."""


class MoA(RoutedAdapter):
    """What both forms are: the adapters of one decoder layer, and their router."""

    kind: ClassVar[Kind] = "layer"
    default_types: ClassVar[tuple[str, ...]] = TYPES
    prompt_PD: Tensor
    prompt_gate_H: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Raise ValueError for sizes, names and types that cannot be."""
        super().check(settings, shape)
        for name, least in (("bottleneck_size", 1), ("num_virtual_tokens", 1), ("router_width", 0)):
            _check_whole(name, getattr(settings, name), least)
        _check_choice("router_input", settings.router_input, ("layer", "norm"))
        chosen_types(settings.adapters, shape, cls.default_types)

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return the adapters' parameters, type by type, and the router's."""
        types, width, block = (
            chosen_types(settings.adapters, shape, cls.default_types),
            shape.inputs,
            block_of(shape.parts),
        )
        sizes: dict[str, tuple[int, ...]] = {}
        for name in types:
            if name == "parallel":
                inner = settings.bottleneck_size
                sizes |= {"down_parallel_WD": (inner, width), "down_parallel_bias_W": (inner,)}
                sizes |= {"up_parallel_DW": (width, inner), "up_parallel_bias_D": (width,)}
            elif name == "prompt":
                sizes |= {"prompt_PD": (settings.num_virtual_tokens, width), "prompt_gate_H": (shape.num_heads,)}
            else:
                inputs, outputs = shape.parts[type_path(name, block)]
                sizes |= {f"down_{name}_RD": (settings.r, inputs), f"up_{name}_OR": (outputs, settings.r)}
        experts, hidden = len(types), settings.router_width * len(types)
        if not hidden:
            return sizes | {"router_ED": (experts, width), "router_bias_E": (experts,)}
        for part in ("gate", "up"):
            sizes |= {f"router_{part}_XD": (hidden, width), f"router_{part}_bias_X": (hidden,)}
        return sizes | {"router_down_EX": (experts, hidden), "router_down_bias_E": (experts,)}

    def reset_parameters(self) -> None:
        """Up weights, prompt gates and biases zero, A and the router as ``nn.Linear``, prompts standard normal."""
        for name, weight in self.named_parameters(recurse=False):
            if name.startswith("up_") or "bias" in name or name == "prompt_gate_H":
                weight.zero_()
            elif name == "down_parallel_WD":
                nn.init.xavier_uniform_(weight, gain=1e-4)
            elif name == "prompt_PD":
                weight.normal_()
            else:
                kaiming_(weight)

    @cached_property
    def types(self) -> tuple[str, ...]:
        """The types of adapters that there are, in the order of the router's outputs."""
        return chosen_types(self.settings.adapters, self.shape, self.default_types)

    def weight(self, name: str, frame: Frame) -> Tensor:
        """Return the weight of one type for each token, [T, 1]."""
        index = self.types.index(name)
        return self.weights(frame)[:, index : index + 1]

    def weights(self, frame: Frame, normed_BTD: Tensor | None = None) -> Tensor:
        """Return weights_TE, made once a run of the layer; ``normed_BTD`` is what input_layernorm returned."""
        weights_TE: Tensor = frame.share(self._key("weights"), partial(self._route, frame, normed_BTD))
        return weights_TE

    def lora(self, name: str, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return w alpha / R  B A x of one linear layer, [T, O]."""
        z_TR = F.linear(x_TD, getattr(self, f"down_{name}_RD"))
        weight_T1 = self.settings.lora_alpha / self.settings.r * self.weight(name, frame)
        return F.linear(z_TR * weight_T1.to(z_TR.dtype), getattr(self, f"up_{name}_OR"))

    def parallel(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return w (U silu(V x + v) + u), [T, D]."""
        parts: Any = self
        hidden_TW = F.silu(F.linear(x_TD, parts.down_parallel_WD, parts.down_parallel_bias_W))
        return self.weight("parallel", frame) * F.linear(hidden_TW, parts.up_parallel_DW, parts.up_parallel_bias_D)

    def select(self, probs_TE: Tensor, x_TD: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """Return weights_TE and chosen_TE for the router's sigmoids; x_TD is what the router read."""
        raise NotImplementedError

    def read(self, x_BTD: Tensor, frame: Frame) -> Tensor:
        """Return what the router reads for each token, [T, D]."""
        return x_BTD.reshape(-1, x_BTD.shape[-1])

    def _route(self, frame: Frame, normed_BTD: Tensor | None) -> Tensor:
        x_BTD = frame.input() if self.settings.router_input == "layer" else normed_BTD
        if x_BTD is None:
            raise RuntimeError(f"router_input: 'norm', but {self.site} has no input_layernorm first; use 'layer'.")
        x_TD = self.read(x_BTD, frame)
        logits_TE = self._logits(x_TD)
        probs_TE = logits_TE.sigmoid()
        weights_TE, chosen_TE = self.select(probs_TE, x_TD, frame)
        frame.record(
            Route(site=self.site, probs_TE=probs_TE, weights_TE=weights_TE, chosen_TE=chosen_TE, logits_TE=logits_TE)
        )
        return weights_TE

    def _logits(self, x_TD: Tensor) -> Tensor:
        parts: Any = self
        if not self.settings.router_width:
            return router_logits(x_TD, parts.router_ED) + cast(Tensor, parts.router_bias_E)
        gate_TX = router_logits(x_TD, parts.router_gate_XD) + parts.router_gate_bias_X
        up_TX = router_logits(x_TD, parts.router_up_XD) + parts.router_up_bias_X
        return router_logits(F.silu(gate_TX) * up_TX, parts.router_down_EX) + cast(Tensor, parts.router_down_bias_E)

    def _key(self, name: str) -> str:
        # several adapters of one site may run in one frame
        return f"{self.site} {self.method} {id(self)} {name}"

    @classmethod
    def install(cls, site: Site, layer: nn.Module) -> list[Any]:
        """Put the hooks of all types on a decoder layer's submodules and return their handles."""
        return layer_hooks(site, layer)


class SoftMoA(MoA):
    """Every type runs, each with a weight between 0 and 1."""

    method = "soft_moa"

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Raise ValueError also for routing that cannot be."""
        super().check(settings, shape)
        _check_choice("routing", settings.routing, ("token", "instance"))
        _check_whole("routing_chunk", settings.routing_chunk, 1)

    @property
    def reads_sequences(self) -> bool:
        """Whether weights are of an instance."""
        routing: str = self.settings.routing
        return routing == "instance"

    def read(self, x_BTD: Tensor, frame: Frame) -> Tensor:
        """Return each token, or the mean that its instance is weighted by."""
        if self.settings.routing == "token":
            return super().read(x_BTD, frame)
        # the pass has the names that sequence routing reads; what it remembers lies with the cache, by adapter
        return sequence_features(cast(Any, frame.run), cast(Any, self._key("")), x_BTD, self.settings.routing_chunk)

    def select(self, probs_TE: Tensor, x_TD: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """Return the sigmoids as they are; all types are chosen."""
        return probs_TE, torch.ones_like(probs_TE, dtype=torch.bool)


class SparseMoA(MoA):
    """The types run whose weight reaches a threshold that each token sets."""

    method = "sparse_moa"
    default_types: ClassVar[tuple[str, ...]] = tuple(name for name in TYPES if name != "prompt")
    threshold_1D: Tensor
    threshold_bias_1: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Raise ValueError also for thresholds that cannot be."""
        super().check(settings, shape)
        _check_choice("threshold_weight", settings.threshold_weight, ("raw", "minus_tau", "straight_through"))
        if settings.const_threshold is not None and not 0.0 <= settings.const_threshold < 1.0:
            raise ValueError(
                f"const_threshold: {settings.const_threshold!r} is not at least 0 and below 1, where the weights lie."
            )

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return what Soft MoA has, and the threshold's layer."""
        sizes = super().shapes(settings, shape)
        if settings.const_threshold is None:
            sizes |= {"threshold_1D": (1, shape.inputs), "threshold_bias_1": (1,)}
        return sizes

    def select(self, probs_TE: Tensor, x_TD: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """Return the sigmoids that reach the threshold, and which they are."""
        if self.settings.const_threshold is not None:
            tau_T1 = torch.full_like(probs_TE[:, :1], self.settings.const_threshold)
        else:
            tau_T1 = 0.5 * (router_logits(x_TD, self.threshold_1D) + self.threshold_bias_1).sigmoid()
        chosen_TE: Tensor = frame.decide(self._key("chosen"), lambda: (probs_TE >= tau_T1).detach())
        if self.settings.threshold_weight == "minus_tau":
            return (probs_TE - tau_T1) * chosen_TE, chosen_TE
        soft_TE = ((probs_TE - tau_T1) / TEMPERATURE).sigmoid()
        # of value zero; for raw its gradient is zero too, rather than none, which distributed training would refuse
        through_TE = (soft_TE - soft_TE.detach()) * float(self.settings.threshold_weight == "straight_through")
        return probs_TE * (chosen_TE + through_TE), chosen_TE


def chosen_types(asked: Iterable[str] | None, shape: SiteShape, default: tuple[str, ...]) -> tuple[str, ...]:
    """Return the types that a layer gets, in the router's order; ValueError where one is unknown or has no place."""
    there = tuple(name for name in TYPES if _has_place(name, shape))
    if asked is None:
        types = tuple(name for name in there if name in default)
        if not types:
            raise ValueError("adapters: the layer has a place for none of them; this method cannot be attached to it.")
        return types
    names = (asked,) if isinstance(asked, str) else tuple(asked)
    for name in names:
        if name not in TYPES:
            raise ValueError(f"adapters: no type {name!r}; there are {', '.join(TYPES)}.")
        if name not in there:
            raise ValueError(f"adapters: the layer has no place for {name!r}; it has for {', '.join(there)}.")
    if not names:
        raise ValueError("adapters: none named; name some, or give None for all that the layer has a place for.")
    return tuple(name for name in TYPES if name in names)


def _has_place(name: str, shape: SiteShape) -> bool:
    if name == "parallel":
        return bool(block_of(shape.parts))
    if name != "prompt":
        return type_path(name, block_of(shape.parts)) in shape.parts
    paths = [type_path(each, "") for each in ATTENTION]
    if not shape.head_dim or any(path not in shape.parts for path in paths):
        return False
    # a q_proj that is wider holds more than queries
    return shape.parts[paths[0]][1] == shape.num_heads * shape.head_dim


def _check_whole(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name}: {value!r} is no whole number of at least {least}.")


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: {value!r} is none of {', '.join(choices)}.")
