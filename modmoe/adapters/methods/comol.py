"""CoMoL: one LoRA whose small core is mixed from experts, token by token.

    CoMoL, https://arxiv.org/abs/2603.00573

    z = A x                      the token in core space
    p = softmax(W z)             core-space routing: the router reads z and costs E R weights
    p = softmax(W x)             without it: E D weights
    delta(x) = alpha / R  B (sum_e p_e C_e) z

A layer costs R (D + O) as one LoRA does, E R R for the cores and E R (or E D) for the router. Everything behind z is
linear, so mixing cores equals mixing outputs. The mix depends on the token: it folds into the weights only with one
core. B is zero at the start; the published code begins the cores and A as ``nn.Linear`` does, and so does this.
"""

# Shapes: T tokens, D input width, O output width, E experts, R rank, S = R (a core's input side)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.losses import soft_route
from ..mechanism.passes import Frame
from ..mechanism.routing import (
    down_and_logits,
    dropped,
    kaiming_,
    mix_up,
    narrow_linear,
    router_logits,
    softmax_experts,
)


@dataclass(kw_only=True)
class CoMoLSettings:
    """The choices of CoMoL; the defaults are the paper's."""

    r: int = 16
    """Rank of the one pair (A, B) and width of the cores."""
    lora_alpha: float = 16
    """The delta is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.1
    """Dropout on the input, on the mixed core and in front of B."""
    num_experts: int = 8
    """Cores."""
    core_routing: bool = True
    """Whether the router reads the token in core space rather than the layer's input."""


class CoMoL(RoutedAdapter):
    """A LoRA with a core mixed for each token."""

    method = "comol"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    fold: ClassVar[Fold] = "approximate"
    down_RD: Tensor
    up_OR: Tensor
    cores_ERS: Tensor
    router_EX: Tensor

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return A, B, the cores and the router."""
        experts, rank = settings.num_experts, settings.r
        return {
            "down_RD": (rank, shape.inputs),
            "up_OR": (shape.outputs, rank),
            "cores_ERS": (experts, rank, rank),
            "router_EX": (experts, rank if settings.core_routing else shape.inputs),
        }

    def reset_parameters(self) -> None:
        """B zero, the rest as ``nn.Linear``."""
        for weight in (self.down_RD, self.cores_ERS, self.router_EX):
            kaiming_(weight)
        self.up_OR.zero_()

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return alpha / R  B (sum_e p_e C_e) A x."""
        dropout = self.settings.lora_dropout if self.training else 0.0
        if self.settings.core_routing:
            z_TS = narrow_linear(dropped(x_TD, dropout, True), self.down_RD)
            logits_TE = router_logits(z_TS, self.router_EX)
        else:
            z_TS, logits_TE = down_and_logits(x_TD, self.down_RD, self.router_EX, dropout)
        probs_TE = softmax_experts(logits_TE, z_TS.dtype)
        frame.record(soft_route(self.site, probs_TE, logits_TE))
        experts, rank, _ = self.cores_ERS.shape
        scaled_TE = self.settings.lora_alpha / rank * probs_TE
        if dropout:
            # it falls on each token's own core, which so has to be made: T R R numbers
            core_TRS = F.dropout(scaled_TE.to(z_TS.dtype) @ self.cores_ERS.flatten(1), dropout).view(-1, rank, rank)
            y_TR = F.dropout(torch.bmm(core_TRS, z_TS.unsqueeze(-1)).squeeze(-1), dropout)
        else:
            y_TR = mix_up(z_TS.repeat(1, experts), self.cores_ERS.transpose(0, 1), scaled_TE)
        return narrow_linear(y_TR, self.up_OR)

    @property
    def fold_kind(self) -> Fold:
        """``exact`` with one core."""
        return "exact" if self.settings.num_experts == 1 else "approximate"

    def fixed_weight(self, weights_E: Tensor | None = None) -> Tensor:
        """Return alpha / R  B (sum_e w_e C_e) A."""
        core_RS = self.cores_ERS[0] if weights_E is None else torch.einsum("e,ers->rs", weights_E, self.cores_ERS)
        scale: float = self.settings.lora_alpha / self.settings.r
        return scale * self.up_OR @ core_RS @ self.down_RD
