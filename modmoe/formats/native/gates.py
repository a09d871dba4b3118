"""A tied model's gates as the weights of an MoE that another program runs.

Where a tied model multiplies each chosen expert by exactly 1 (a union, or a single expert) and the target has a softmax
instead, the router is made cold: its rows times a power of two so small that all weights become 1/k, and k goes into
``down``. A colder router has more even weights, and more ties between experts in float32: 2^-10 of a usual logit is
between the two. Such a router does not learn; exports are for use.
"""

# Shapes: E experts, D model width, N neurons of an expert

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from modmoe.formats.native.targets import Target
from modmoe.storage.plan import Op, Shape, pieces_of

COLD = -10
"""Exponent of two of what a usual logit is multiplied by where weights shall be even."""
COLDEST = -40
"""The same where experts are chosen by their logits: the weights are then equal exactly, and ties no likelier."""
SIGMOID_WARM = -4
"""The same for a single expert by its sigmoid, whose value does not count: only saturation must be kept away."""
SHARED_GATE = 2.0**-22
"""What a shared expert's gate is made of, with either sign; its sigmoid is 1/2 to float32's rounding. Zeros would do
but for llama.cpp, which computes it as silu(x) / x."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gate:
    """How a target computes a tied model's coefficients."""

    own: float = 1.0
    """What an expert's own neurons are multiplied by."""
    core: float = 1.0
    """What the core is multiplied by where every expert has a copy."""
    exponent: int | None = None
    """Exponent of two that the router is multiplied by; None leaves it as it is."""
    is_relative: bool = False
    """Whether the exponent is that of a usual logit, so that a router with large logits is made colder."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Configuration."""
    note: str = "exact"
    """What is done, in words."""

    def rounds_in(self, dtype: torch.dtype) -> bool:
        """Return whether weights of a type are rounded once more where these factors are folded in."""
        folds = all(_is_power_of_two(factor) for factor in (self.own, self.core))
        return not folds and dtype.itemsize <= 2


def choose_gate(
    target: Target, client: str, *, num_experts: int, top_k: int, weighted: bool, copied: bool = False
) -> Gate | str:
    """Return how the target gets the tied model's coefficients, or why it cannot.

    Args:
        target: its row.
        client: who will run it; some do not read ``norm_topk_prob``.
        num_experts: experts of a layer.
        top_k: experts chosen at once.
        weighted: whether the coefficients are the softmax over the chosen; otherwise they are 1.
        copied: whether every expert has a copy of the core, so that weights should sum to 1 exactly.
    """
    renormalises = target.whatever_config.get(client, target.renormalises)
    if target.probs == "sigmoid":
        if weighted:
            return "a weighted sum of experts (its weights are sigmoids)"
        # a factor that is a setting costs no rounding
        settings = {"norm_topk_prob": True, "routed_scaling_factor": float(top_k)}
        if top_k == 1:
            return Gate(exponent=SIGMOID_WARM, settings=settings)
        return Gate(
            exponent=COLD,
            is_relative=True,
            settings=settings,
            note=f"nearly equal weights, their inverse {top_k} is a setting",
        )
    if weighted and renormalises is False:
        return f"a weighted sum of experts for {client} (it does not renormalise the weights)"
    if (weighted or top_k == 1) and renormalises is not False:
        return Gate(settings=_settings(target, True))
    if target.probs == "chosen" and client == "transformers":
        return Gate(own=top_k, exponent=COLDEST, note=f"equal weights, their inverse {top_k} is folded into down")
    by_all = renormalises is False
    if renormalises is None and not copied and not _is_power_of_two(top_k) and _is_power_of_two(num_experts):
        by_all = True  # 1/E for 1/k: multiplying by a power of two rounds nothing
    factor = num_experts if by_all else top_k
    return Gate(
        own=factor,
        core=factor / top_k if copied else 1.0,
        exponent=COLD,
        is_relative=True,
        settings=_settings(target, not by_all),
        note=f"nearly equal weights, their inverse {factor} is folded into down",
    )


def _settings(target: Target, renormalises: bool) -> dict[str, Any]:
    return {"norm_topk_prob": renormalises} if target.renormalises is None else {}


def _is_power_of_two(number: float) -> bool:
    return math.frexp(number)[0] == 0.5


def router_factor(gate: Gate, router_ED: Tensor, norm_D: Tensor | None) -> float:
    """Return the power of two that a router is multiplied by.

    A usual logit is the largest norm of a row, seen through the norm's weights: what comes in has about the root mean
    square of 1 before those.
    """
    if gate.exponent is None:
        return 1.0
    if not gate.is_relative:
        return 2.0**gate.exponent
    rows_ED = router_ED.float() if norm_D is None else router_ED.float() * norm_D.float()
    usual = float(rows_ED.norm(dim=-1).max())
    return 2.0 ** (gate.exponent - (math.floor(math.log2(usual)) if usual > 0 and math.isfinite(usual) else 0))


def shared_gate(width: int, seed: int) -> Tensor:
    """Return the row [1, D] of a shared expert's gate whose sigmoid is 1/2, never exactly zero."""
    draw = torch.Generator().manual_seed(seed)
    return SHARED_GATE * (2 * torch.randint(0, 2, (1, width), generator=draw) - 1).float()


@dataclass(frozen=True, slots=True, eq=False)
class Scaled:
    """Another op's output times a number, or its last dimension times one number each; made in float32 at least."""

    op: Op
    factor: float | Tensor
    dtype: torch.dtype | None = None
    """The type to round to, once; None for the op's."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return self.op.inputs

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the op's shape."""
        return self.op.shape(shapes)

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the type asked for, or the op's."""
        return self.dtype or self.op.dtype_of(dtypes)

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the product."""
        tensor = self.op.make(source)
        high = torch.promote_types(tensor.dtype, torch.float32)
        return (tensor.to(high) * self.factor).to(self.dtype or tensor.dtype)


@dataclass(frozen=True, slots=True)
class Pile:
    """Matrices of equal shape one on another: a tensor of three dimensions, made matrix by matrix."""

    parts: tuple[Op, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return tuple(name for part in self.parts for name in part.inputs)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return [parts, rows, columns]."""
        found = {part.shape(shapes) for part in self.parts}
        if len(found) != 1:
            raise ValueError(f"cannot pile {sorted(found)}")
        return (len(self.parts), *found.pop())

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the first part's type."""
        return self.parts[0].dtype_of(dtypes)

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the whole."""
        return torch.stack([part.make(source) for part in self.parts])

    def pieces(self, source: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield what ``make`` returns, piece by piece."""
        for part in self.parts:
            yield from pieces_of(part, source)
