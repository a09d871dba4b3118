"""SparMoE: each expert scales the FFN's output by one vector and shifts it by another; all experts are always on.

    SparMoE, Specialization without Sparsity, Findings of ACL 2026, paper 975

    p = softmax(W h)                                      h the output of the FFN, before it is added to the residual
    z_e = dropout(h * l_e) + (h + b_e)                    the scaling path and the bias path of expert e
    h' = sum_e p_e z_e = h + h * (sum_e p_e l_e) + sum_e p_e b_e

so a token has its own IA3 scale and its own bias. A block costs 3 E D: the paper's counts of 0.11 M for RoBERTa-base,
0.29 M for RoBERTa-large and 1.6 M for LLaMA2-7B come out with E = 4 and a linear gate without bias.

No code was published, and the paper could not be read in full. Not known from it are: whether h is the FFN's output or
the residual stream behind it; the gate's form, but for the counts above; the start. Here the vectors begin at zero, the
identity, and the gate at random: with both at zero all experts would stay alike. Dropout has one mask for all experts.

With the experts' weights held at p it folds, where the FFN's last layer can have a bias: its weight's rows multiplied
by 1 + sum_e p_e l_e, a bias that it has too, and sum_e p_e b_e added to that. The gate of more than one expert depends
on the token, so that this is an approximation.
"""

# Shapes: T tokens, D width, E experts

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.losses import soft_route
from ..mechanism.passes import Frame
from ..mechanism.routing import dropped, router_logits


@dataclass(kw_only=True)
class SparMoESettings:
    """The choices of SparMoE."""

    num_experts: int = 4
    """Experts; 4 gives the paper's parameter counts, and its ablation goes from 2 to 8."""
    dropout: float = 0.1
    """Dropout on the scaling path; the paper's share is not known."""


class SparMoE(RoutedAdapter):
    """Experts that scale and shift the FFN's output."""

    method = "sparmoe"
    kind = "output"
    targets = ("mlp", "block_sparse_moe", "feed_forward", "ffn")
    fold: ClassVar[Fold] = "approximate"
    scales_ED: Tensor
    biases_ED: Tensor
    router_ED: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Refuse a share of dropout that is none."""
        super().check(settings, shape)
        if not 0.0 <= settings.dropout < 1.0:
            raise ValueError(f"dropout: {settings.dropout!r} is not at least 0 and below 1.")

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return both vectors of all experts, and the gate."""
        size = (settings.num_experts, shape.outputs)
        return {"scales_ED": size, "biases_ED": size, "router_ED": size}

    def reset_parameters(self) -> None:
        """The vectors zero, the gate as the base model's weights began."""
        self.scales_ED.zero_()
        self.biases_ED.zero_()
        nn.init.normal_(self.router_ED, std=self.shape.init_range)

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return h * (sum_e p_e l_e) + sum_e p_e b_e for the FFN's output h."""
        logits_TE = router_logits(x_TD, self.router_ED)
        probs_TE = logits_TE.softmax(-1)
        frame.record(soft_route(self.site, probs_TE, logits_TE))
        scaled_TD = dropped(x_TD * (probs_TE @ self.scales_ED), self.settings.dropout, self.training)
        return scaled_TD + probs_TE @ self.biases_ED
