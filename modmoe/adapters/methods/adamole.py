"""AdaMoLE: LoRAs mixed over a threshold that a small net sets for each token.

    AdaMoLE, https://arxiv.org/abs/2405.00361

    g = softmax(W x)
    tau = tau_max sigmoid(v x + b)            tau_max = 1 / E: the largest g passes, unless all are equal
    w = (g - tau)+ / sum (g - tau)+           how many experts run is the token's own
    delta(x) = alpha / R  sum_e w_e B_e A_e x

The balance loss takes g - tau for the probabilities. It counts choices as their share of all choices; the published
code counts them per token, which is as much larger as a token has experts.

Where no expert passes (all equal, or tau_max above 1 / E) the published code adds nothing; here the largest g takes
all, so that the weights always sum to 1. A layer costs E R (D + O) for the experts, E D for the router and D + 1 for
the threshold. It folds into the weights only with one expert. B is zero at the start, the rest is as ``nn.Linear``.
"""

# Shapes: T tokens, D input width, O output width, E experts, R rank, X = E R

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.losses import Route
from ..mechanism.passes import Frame
from ..mechanism.routing import down_and_logits, kaiming_, mix_up, mixed_weight, normalised


@dataclass(kw_only=True)
class AdaMoLESettings:
    """The choices of AdaMoLE; the defaults are those of the published code, a rank of 32 in all."""

    r: int = 4
    """Rank of each expert."""
    lora_alpha: float = 16
    """The delta is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.05
    """Dropout on the experts' input; router and threshold read it whole."""
    num_experts: int = 8
    """LoRAs."""
    tau_max: float | None = None
    """The threshold's upper end; None for 1 / num_experts, under which at least one expert passes."""
    balance_weight: float = 1e-2
    """Factor of the Switch load balance loss; the published training script passes 1e-3."""


class AdaMoLE(RoutedAdapter):
    """LoRAs of which each token uses as many as pass its threshold."""

    method = "adamole"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj")
    fold: ClassVar[Fold] = "approximate"
    down_ERD: Tensor
    up_OER: Tensor
    router_ED: Tensor
    threshold_1D: Tensor
    threshold_1: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Raise ValueError for a threshold outside of what a probability can be."""
        super().check(settings, shape)
        if settings.tau_max is not None and not 0.0 < settings.tau_max <= 1.0:
            raise ValueError(
                f"tau_max: {settings.tau_max!r} is not above 0 and at most 1; leave it out for 1 / experts."
            )

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return the experts' A and B, the router, and the threshold's weight and bias."""
        experts, rank = settings.num_experts, settings.r
        return {
            "down_ERD": (experts, rank, shape.inputs),
            "up_OER": (shape.outputs, experts, rank),
            "router_ED": (experts, shape.inputs),
            "threshold_1D": (1, shape.inputs),
            "threshold_1": (1,),
        }

    def reset_parameters(self) -> None:
        """B zero, the rest as ``nn.Linear``."""
        for weight in (self.down_ERD, self.router_ED, self.threshold_1D):
            kaiming_(weight)
        bound = 1 / math.sqrt(self.shape.inputs)
        nn.init.uniform_(self.threshold_1, -bound, bound)
        self.up_OER.zero_()

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return alpha / R  sum_e w_e B_e A_e x."""
        experts = self.settings.num_experts
        dropout = self.settings.lora_dropout if self.training else 0.0
        # the threshold is one more row of the router
        rows_QD = torch.cat((self.router_ED, self.threshold_1D))
        z_TX, out_TQ = down_and_logits(x_TD, self.down_ERD.flatten(0, 1), rows_QD, dropout)
        logits_TE, raw_T1 = out_TQ[:, :-1], out_TQ[:, -1:]
        probs_TE = logits_TE.softmax(-1)
        tau_max = 1 / experts if self.settings.tau_max is None else self.settings.tau_max
        tau_T1 = tau_max * (raw_T1 + self.threshold_1.to(raw_T1.dtype)).sigmoid()
        chosen_TE: Tensor = frame.decide(f"{self.site} passed", lambda: passed(probs_TE, tau_T1))
        weights_TE = threshold_weights(probs_TE, tau_T1, chosen_TE)
        frame.record(
            Route(
                site=self.site,
                probs_TE=probs_TE - tau_T1,
                weights_TE=weights_TE,
                chosen_TE=chosen_TE,
                logits_TE=logits_TE,
                loss_weights={"switch": self.settings.balance_weight},
            )
        )
        scale: float = self.settings.lora_alpha / self.settings.r
        return mix_up(z_TX, self.up_OER, scale * weights_TE)

    @property
    def fold_kind(self) -> Fold:
        """``exact`` with one expert."""
        return "exact" if self.settings.num_experts == 1 else "approximate"

    def fixed_weight(self, weights_E: Tensor | None = None) -> Tensor:
        """Return alpha / R  sum_e w_e B_e A_e."""
        scale: float = self.settings.lora_alpha / self.settings.r
        return scale * mixed_weight(self.down_ERD, self.up_OER, weights_E)


def passed(probs_TE: Tensor, tau_T1: Tensor) -> Tensor:
    """Return True where an expert's probability is above the threshold; at the largest where none is. No gradient."""
    probs_TE = probs_TE.detach()  # so that the first run under checkpointing saves no more than the second
    above_TE = probs_TE > tau_T1
    largest_TE = probs_TE >= probs_TE.amax(-1, keepdim=True)
    return torch.where(above_TE.any(-1, keepdim=True), above_TE, largest_TE)


def threshold_weights(probs_TE: Tensor, tau_T1: Tensor, chosen_TE: Tensor) -> Tensor:
    """Return the weights of the chosen experts, which sum to 1: by what exceeds the threshold, if anything does."""
    excess_TE = ((probs_TE - tau_T1) * chosen_TE).relu()
    exceeds_T1 = excess_TE.sum(-1, keepdim=True) > 0
    return normalised(torch.where(exceeds_T1, excess_TE, probs_TE * chosen_TE))
