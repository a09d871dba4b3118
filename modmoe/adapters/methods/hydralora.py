"""HydraLoRA: one A and several heads B, mixed by a router that reads the layer's input.

    HydraLoRA, https://arxiv.org/abs/2404.19245

    p = softmax(W x)
    delta(x) = alpha / R  sum_e p_e B_e A x

A layer costs R D + E R O for A and the heads and E D for the router. The mix depends on the token: it folds into the
weights only with one head. B is zero at the start; A and the router begin as ``nn.Linear`` does. No loss of its own.
"""

# Shapes: T tokens, D input width, O output width, E experts (heads), R rank

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.losses import soft_route
from ..mechanism.passes import Frame
from ..mechanism.routing import down_and_logits, kaiming_, mix_up


@dataclass(kw_only=True)
class HydraLoRASettings:
    """The choices of HydraLoRA; the defaults are those of the published training script.

    But for the layers: there the FFN's, here those that its peers are compared on, which an MoE base has too.
    """

    r: int = 4
    """Rank of A and of each head."""
    lora_alpha: float = 32
    """The delta is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.05
    """Dropout on what A reads; the router reads it whole."""
    num_experts: int = 4
    """Heads; the paper finds their number by clustering the data."""


class HydraLoRA(RoutedAdapter):
    """A LoRA with a B mixed for each token."""

    method = "hydralora"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    fold: ClassVar[Fold] = "approximate"
    down_RD: Tensor
    up_OER: Tensor
    router_ED: Tensor

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return A, the heads and the router."""
        experts, rank = settings.num_experts, settings.r
        return {
            "down_RD": (rank, shape.inputs),
            "up_OER": (shape.outputs, experts, rank),
            "router_ED": (experts, shape.inputs),
        }

    def reset_parameters(self) -> None:
        """B zero, the rest as ``nn.Linear``."""
        kaiming_(self.down_RD)
        kaiming_(self.router_ED)
        self.up_OER.zero_()

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return alpha / R  sum_e p_e B_e A x."""
        dropout = self.settings.lora_dropout if self.training else 0.0
        z_TR, logits_TE = down_and_logits(x_TD, self.down_RD, self.router_ED, dropout)
        probs_TE = logits_TE.softmax(-1)
        frame.record(soft_route(self.site, probs_TE, logits_TE))
        scale: float = self.settings.lora_alpha / self.settings.r
        return mix_up(z_TR.repeat(1, self.settings.num_experts), self.up_OER, scale * probs_TE)

    @property
    def fold_kind(self) -> Fold:
        """``exact`` with one head."""
        return "exact" if self.settings.num_experts == 1 else "approximate"

    def fixed_weight(self, weights_E: Tensor | None = None) -> Tensor:
        """Return alpha / R  (sum_e w_e B_e) A."""
        up_OR = self.up_OER[:, 0] if weights_E is None else torch.einsum("e,oer->or", weights_E, self.up_OER)
        scale: float = self.settings.lora_alpha / self.settings.r
        return scale * up_OR @ self.down_RD
