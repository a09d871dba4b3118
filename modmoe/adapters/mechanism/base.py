"""What every routed adapter is: named parameters of known shapes, and a delta that is zero at the start."""

# Shapes: T tokens, D input width, O output width

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .passes import Frame

Kind = Literal["linear", "block", "output", "experts", "layer"]
"""Where an adapter is attached.

linear   a linear layer: its output grows by delta(input)
block    an FFN or MoE block: its output grows by delta(input), the input as it was before the block changed it
output   any layer: its output grows by delta(output)
experts  the fused experts of an MoE block: ``mix`` computes their output in their place
layer    a decoder layer: the adapter reaches into its attention and its FFN
"""
Fold = Literal["exact", "to_moe", "approximate", "none"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteShape:
    """The sizes of a layer that an adapter is attached to."""

    inputs: int
    """Input width, D."""
    outputs: int
    """Output width, O."""
    num_experts: int = 0
    """Experts of the base model's MoE block; 0 where it is dense."""
    base_top_k: int = 0
    """Experts that its router chooses for a token; 0 where it is dense."""
    renormalises: bool = True
    """Whether its router divides the chosen probabilities by their sum; True where it is dense."""
    expert_form: str = ""
    """How the fused experts differ from [E, 2 I, D] and [E, D, I] without bias, in words; for the kind ``layer``, that
    its FFN is one whose experts share modules; empty where there is nothing to say."""
    parts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Input and output width of the linear layers inside, by path from the site, where the kind needs them; with the
    FFN or MoE block itself for the kind ``layer``."""
    num_heads: int = 0
    """Query heads of the decoder layer's attention, for the kind ``layer``."""
    head_dim: int = 0
    """Width of a head."""
    init_range: float = 0.02
    """Standard deviation that the base model's own weights began with."""


class RoutedAdapter(nn.Module):
    """A mixture of adapters at one layer of a frozen model. Its output is exactly zero at the start.

    A method overrides ``shapes``, ``reset_parameters`` and ``delta`` (or ``mix``, for the kinds that replace). All
    parameters are float32, lie directly in the module, and are stacked over experts: one tensor of all experts' A and
    so on, so that every rank of a distributed run touches every parameter.
    """

    method: ClassVar[str]
    """Name in METHODS."""
    kind: ClassVar[Kind] = "linear"
    targets: ClassVar[tuple[str, ...]] = ()
    """Names of the layers it is attached to by default, of those that the model has; empty: as the kind finds them."""
    fold: ClassVar[Fold] = "none"
    needs_base_router: ClassVar[bool | Literal["maybe"]] = False
    """Whether it reuses the routing of the base model's MoE block; maybe: where its settings say so."""
    merges_into: ClassVar[str | None] = None
    """The method of which several of these at once are one adapter; None where they are none."""

    def __init__(self, settings: Any, shape: SiteShape, site: str = "") -> None:
        """Make the parameters for a layer of ``shape`` and initialise them.

        Args:
            settings: the method's dataclass.
            shape: the layer's sizes.
            site: the layer's path, for reports and errors.

        Raises:
            ValueError: the settings contradict each other or the layer.
        """
        super().__init__()
        self.check(settings, shape)
        self.settings, self.shape, self.site = settings, shape, site
        self.shared: list[nn.Module] = []  # one module; in a list, since it hangs below the model and not below this
        for name, size in self.shapes(settings, shape).items():
            self.register_parameter(name, nn.Parameter(torch.empty(size, dtype=torch.float32)))
        with torch.no_grad():
            self.reset_parameters()

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Raise ValueError where the settings contradict each other or the layer."""
        check_settings(settings)

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return each parameter's shape; they are counted without building anything."""
        raise NotImplementedError

    @classmethod
    def shared_shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return the shapes of parameters that all sites with the same names share, such as a net for each width."""
        return {}

    @classmethod
    def reset_shared(cls, settings: Any, name: str, parameter: Tensor) -> None:
        """Initialise one shared parameter."""
        raise NotImplementedError

    def reset_parameters(self) -> None:
        """Initialise as the paper does, such that ``delta`` is zero."""
        raise NotImplementedError

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return what is added to the layer's output, [T, O].

        Args:
            x_TD: the layer's input (for the kind ``output`` its output) in the parameters' type.
            frame: the decoder layer's run, for decisions, routes and the base router's choice.
        """
        raise NotImplementedError

    @property
    def reads_sequences(self) -> bool:
        """Whether its router reads what a sequence said before, which is kept with the cache."""
        return False

    @property
    def fold_kind(self) -> Fold:
        """How this adapter, as it is set up, folds into the base weights."""
        return self.fold

    def fixed_weight(self, weights_E: Tensor | None = None) -> Tensor:
        """Return the change of the linear layer's weight, [O, D], with the experts' weights held at ``weights_E``.

        None is for adapters that fold exactly. NotImplementedError where the method is no linear map.
        """
        raise NotImplementedError(f"{self.method} is not a linear map of its input, so it has no weight.")

    def extra_repr(self) -> str:
        """Name the method and its parameters' shapes."""
        return ", ".join(f"{name}={tuple(value.shape)}" for name, value in self.named_parameters(recurse=False))


def check_settings(settings: Any) -> None:
    """Raise ValueError for numbers that no method can have: r, num_experts, top_k, lora_alpha, lora_dropout."""
    for name in ("r", "num_experts", "top_k"):
        value = getattr(settings, name, None)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}: {value!r} is no whole number of at least 1.")
    top_k, experts = getattr(settings, "top_k", None), getattr(settings, "num_experts", None)
    if top_k is not None and experts is not None and top_k > experts:
        raise ValueError(f"top_k: {top_k} is more than the {experts} experts there are; lower it.")
    dropout = getattr(settings, "lora_dropout", 0.0)
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"lora_dropout: {dropout!r} is not at least 0 and below 1.")
