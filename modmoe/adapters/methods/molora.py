"""MoLoRA: several LoRAs at one linear layer, mixed by a router that reads the layer's input.

    MoLoRA, https://arxiv.org/abs/2309.05444; with top-k it is a layer of MoLA, https://arxiv.org/abs/2402.08562

    p = softmax(W x)
    w = p                                     soft: every expert runs
    w_e = p_e / sum_{top k} p, else 0         top-k
    delta(x) = alpha / R  sum_e w_e B_e A_e x

A layer costs E R (D + O) for the experts and E D for the router. The mix depends on the token: it folds into the
weights only with one expert. B is zero at the start; A and the router begin as ``nn.Linear`` does.
"""

# Shapes: T tokens, D input width, O output width, E experts, R rank, X = E R

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.losses import Route
from ..mechanism.passes import Frame
from ..mechanism.routing import down_and_logits, kaiming_, mix_up, mixed_weight, normalised, softmax_experts, top_k_mask


@dataclass(kw_only=True)
class MoLoRASettings:
    """The choices of MoLoRA."""

    r: int = 8
    """Rank of each expert."""
    lora_alpha: float = 16
    """The delta is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the experts' input; the router reads it whole."""
    num_experts: int = 8
    """LoRAs."""
    top_k: int | None = None
    """Experts a token uses, their weights summing to 1; None for all of them, by their probabilities."""
    balance_weight: float = 0.0
    """Factor of the Switch load balance loss, for top-k: with all experts in use it is 1 whatever the router does."""


class MoLoRA(RoutedAdapter):
    """LoRAs mixed for each token."""

    method = "molora"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
    fold: ClassVar[Fold] = "approximate"
    down_ERD: Tensor
    up_OER: Tensor
    router_ED: Tensor

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return the experts' A and B and the router."""
        experts, rank = settings.num_experts, settings.r
        return {
            "down_ERD": (experts, rank, shape.inputs),
            "up_OER": (shape.outputs, experts, rank),
            "router_ED": (experts, shape.inputs),
        }

    def reset_parameters(self) -> None:
        """B zero, the rest as ``nn.Linear``."""
        kaiming_(self.down_ERD)
        kaiming_(self.router_ED)
        self.up_OER.zero_()

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return alpha / R  sum_e w_e B_e A_e x."""
        dropout = self.settings.lora_dropout if self.training else 0.0
        z_TX, logits_TE = down_and_logits(x_TD, self.down_ERD.flatten(0, 1), self.router_ED, dropout)
        probs_TE = softmax_experts(logits_TE, z_TX.dtype)
        if self.settings.top_k is None:
            weights_TE, chosen_TE = probs_TE, torch.ones_like(probs_TE, dtype=torch.bool)
        else:
            chosen_TE = top_k_mask(probs_TE, self.settings.top_k, frame, f"{self.site} top_k")
            weights_TE = normalised(probs_TE * chosen_TE)
        frame.record(
            Route(
                site=self.site,
                probs_TE=probs_TE,
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
