"""LD-MoLE: LoRAs mixed by a projection onto the simplex that a small net makes sharp or soft for each token.

    LD-MoLE, https://arxiv.org/abs/2509.25684; sparsegen, https://arxiv.org/abs/1810.11975

    u = W drop(x)
    lambda = logsigmoid(v relu(V drop(x) + a) + b) + 1 - eps       below 1; one net for each input width of the model
    p = (u - tau)+ / (1 - lambda),  tau such that sum p = 1         lambda -> 1: one expert; lambda -> -inf: all alike
    delta(x) = alpha / R  sum_e p_e B_e A_e drop(x)

    extra loss: relu(lambda_low(k) - lambda),  lambda_low(k) = 1 - (sum_{i<=k} u_(i) - k u_(k+1))
    asks for at most k experts; u_(1) >= u_(2) ... are the logits of a token

Exact zeros, and a gradient everywhere: the choice of experts is made by u and lambda alone, with no k. A layer costs
E R (D + O) for the experts and E D for the router, an input width H D + 2 H + 1 for its net. It folds into the weights
only with one expert. B is zero at the start; A, the router and the net begin as ``nn.Linear`` does, but for the net's
biases: zero, and -2.5 at its output, so that many experts take part at first.
"""

# Shapes: T tokens, D input width, O output width, E experts, R rank, X = E R, H width of the net

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.losses import Route
from ..mechanism.passes import Frame
from ..mechanism.routing import down_and_logits, dropped, kaiming_, mix_up, mixed_weight, router_logits

EPSILON = 1e-2
"""How far lambda stays below 1."""


@dataclass(kw_only=True)
class LDMoLESettings:
    """The choices of LD-MoLE; the defaults are those of the published training scripts."""

    r: int = 8
    """Rank of each expert."""
    lora_alpha: float = 16
    """The delta is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.1
    """Dropout on what experts, router and net read."""
    num_experts: int = 8
    """LoRAs."""
    lambda_width: int = 256
    """Hidden width of the net that sets lambda; the published runs have 256 and 512."""
    balance_weight: float = 1.0
    """Factor of the Switch load balance loss."""
    sparsity_weight: float = 0.0
    """Factor of the loss that asks for at most ``sparsity_experts`` experts a token."""
    sparsity_experts: int = 2
    """Experts a token may use at no loss; fewer than there are."""


class LDMoLE(RoutedAdapter):
    """LoRAs of which each token uses as many as its lambda leaves."""

    method = "ldmole"
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    fold: ClassVar[Fold] = "approximate"
    down_ERD: Tensor
    up_OER: Tensor
    router_ED: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Raise ValueError where the net has no width, or the sparsity loss has no expert to leave out."""
        super().check(settings, shape)
        if settings.lambda_width < 1:
            raise ValueError(f"lambda_width: {settings.lambda_width!r} is no whole number of at least 1.")
        if settings.sparsity_weight and not 1 <= settings.sparsity_experts < settings.num_experts:
            raise ValueError(
                f"sparsity_experts: {settings.sparsity_experts!r} is not at least 1 and below num_experts, "
                f"{settings.num_experts}; lower it, or set sparsity_weight to 0."
            )

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return the experts' A and B and the router."""
        experts, rank = settings.num_experts, settings.r
        return {
            "down_ERD": (experts, rank, shape.inputs),
            "up_OER": (shape.outputs, experts, rank),
            "router_ED": (experts, shape.inputs),
        }

    @classmethod
    def shared_shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return the net of all layers with this input width."""
        width, prefix = settings.lambda_width, f"lambda{shape.inputs}"
        return {
            f"{prefix}_hidden_HD": (width, shape.inputs),
            f"{prefix}_hidden_H": (width,),
            f"{prefix}_out_1H": (1, width),
            f"{prefix}_out_1": (1,),
        }

    @classmethod
    def reset_shared(cls, settings: Any, name: str, parameter: Tensor) -> None:
        """Weights as ``nn.Linear``, the hidden bias zero, the output's -2.5."""
        if name.endswith(("_HD", "_1H")):
            kaiming_(parameter)
        else:
            parameter.fill_(-2.5 if name.endswith("_out_1") else 0.0)

    def reset_parameters(self) -> None:
        """B zero, the rest as ``nn.Linear``."""
        kaiming_(self.down_ERD)
        kaiming_(self.router_ED)
        self.up_OER.zero_()

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return alpha / R  sum_e p_e B_e A_e x."""
        settings = self.settings
        x_TD = dropped(x_TD, settings.lora_dropout, self.training)
        z_TX, logits_TE = down_and_logits(x_TD, self.down_ERD.flatten(0, 1), self.router_ED)
        lambda_T1 = self.sharpness(x_TD)
        chosen_TE: Tensor = frame.decide(f"{self.site} support", lambda: support(logits_TE, lambda_T1))
        probs_TE = sparsegen(logits_TE, lambda_T1, chosen_TE)
        extra = {}
        if settings.sparsity_weight:
            lacking_T = (lambda_low(logits_TE, settings.sparsity_experts) - lambda_T1).relu().squeeze(-1)
            extra["sparsity"] = settings.sparsity_weight * lacking_T
        frame.record(
            Route(
                site=self.site,
                probs_TE=probs_TE,
                weights_TE=probs_TE,
                chosen_TE=chosen_TE,
                logits_TE=logits_TE,
                loss_weights={"switch": settings.balance_weight},
                extra=extra,
            )
        )
        scale: float = settings.lora_alpha / settings.r
        return mix_up(z_TX, self.up_OER, scale * probs_TE)

    def sharpness(self, x_TD: Tensor) -> Tensor:
        """Return lambda of each token, [T, 1], below 1 - EPSILON, in float32."""
        net, prefix = self.shared[0], f"lambda{self.shape.inputs}"
        hidden_TH = router_logits(x_TD, getattr(net, f"{prefix}_hidden_HD"))
        hidden_TH = (hidden_TH + getattr(net, f"{prefix}_hidden_H")).relu()
        out_T1 = router_logits(hidden_TH, getattr(net, f"{prefix}_out_1H")) + getattr(net, f"{prefix}_out_1")
        return F.logsigmoid(out_T1) + (1 - EPSILON)

    @property
    def fold_kind(self) -> Fold:
        """``exact`` with one expert."""
        return "exact" if self.settings.num_experts == 1 else "approximate"

    def fixed_weight(self, weights_E: Tensor | None = None) -> Tensor:
        """Return alpha / R  sum_e w_e B_e A_e."""
        scale: float = self.settings.lora_alpha / self.settings.r
        return scale * mixed_weight(self.down_ERD, self.up_OER, weights_E)


def support(u_TE: Tensor, lambda_T1: Tensor) -> Tensor:
    """Return True at the experts that sparsegen leaves above zero; no gradient."""
    u_TE, room_T1 = u_TE.detach(), 1 - lambda_T1.detach()
    sorted_TE, order_TE = u_TE.sort(dim=-1, descending=True)
    rank_E = torch.arange(1, u_TE.shape[-1] + 1, device=u_TE.device, dtype=u_TE.dtype)
    # differences to the largest, so that nothing cancels where logits are large
    below_TE = sorted_TE - sorted_TE[:, :1]
    inside_TE = room_T1 + rank_E * below_TE > below_TE.cumsum(-1)
    return torch.zeros_like(inside_TE).scatter(-1, order_TE, inside_TE)


def sparsegen(u_TE: Tensor, lambda_T1: Tensor, chosen_TE: Tensor | None = None) -> Tensor:
    """Return the point of the simplex nearest to u / (1 - lambda), [T, E]; exact zeros outside of its support.

    Args:
        u_TE: the logits.
        lambda_T1: below 1; nearer to 1 is sparser.
        chosen_TE: the support, where it was decided before.
    """
    if chosen_TE is None:
        chosen_TE = support(u_TE, lambda_T1)
    # the closed form on the support, from the mean of what is chosen, and that from the largest: nothing cancels
    u_TE = u_TE - u_TE.detach().amax(-1, keepdim=True)
    count_T1 = chosen_TE.sum(-1, keepdim=True).to(u_TE.dtype)
    mean_T1 = (u_TE * chosen_TE).sum(-1, keepdim=True) / count_T1
    return ((u_TE - mean_T1) / (1 - lambda_T1) + 1 / count_T1).relu() * chosen_TE


def lambda_low(u_TE: Tensor, top_k: int) -> Tensor:
    """Return the least lambda that leaves at most ``top_k`` experts, [T, 1]."""
    first_TK = u_TE.topk(top_k + 1, dim=-1).values
    return 1 - (first_TK[:, :-1] - first_TK[:, -1:]).sum(-1, keepdim=True)
