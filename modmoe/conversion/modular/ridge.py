"""A router for modules by ridge regression on every token of the text, in memory that does not grow with it.

    target      s_tj = sqrt(sum_{i in module j} (h_ti |down_i|)^2)        how much module j puts out for token t
    router      W = (X^T X + r I)^-1 X^T S,  r = RIDGE * the mean of the diagonal of X^T X

X^T X and X^T S are sums over tokens, so that any number of them fits into D (D + M) numbers, and the sums of several
processes add up.
"""

# Shapes: T tokens, D model width, F neurons, M modules, E experts

from __future__ import annotations

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.models.ffn_layout import FFNWeights
from modmoe.runtime import ranks

RIDGE = 1e-2
"""How much the router is held to zero, as a share of the mean squared input."""


class RidgeSums:
    """The sums of one layer."""

    def __init__(self, partition: Partition, weights: FFNWeights) -> None:
        """Begin with no token."""
        width, modules = len(weights.down_DF), partition.num_modules
        self.norm_F = weights.down_DF.detach().float().norm(dim=0)
        self.member_FM = torch.nn.functional.one_hot(partition.module_F, modules).float()
        self.gram_DD = torch.zeros(width, width, dtype=torch.float64)
        self.cross_DM = torch.zeros(width, modules, dtype=torch.float64)
        self.value_M = torch.zeros(modules, dtype=torch.float64)
        self.tokens = torch.zeros((), dtype=torch.float64)

    def add(self, x_TD: Tensor, hidden_TF: Tensor) -> None:
        """Add some tokens: the FFN's inputs and activations, float32."""
        value_TM = ((hidden_TF * self.norm_F).square() @ self.member_FM).sqrt()
        self.gram_DD += x_TD.T @ x_TD
        self.cross_DM += x_TD.T @ value_TM
        self.value_M += value_TM.sum(0)
        self.tokens += len(x_TD)

    def router_of(self, modules_E: Tensor) -> Tensor:
        """Return weight_ED, float32: a row for each expert, which stands for one module; every process calls it."""
        gram_DD, cross_DE = ranks.add_up(self.gram_DD), ranks.add_up(self.cross_DM)[:, modules_E]
        ridge = RIDGE * gram_DD.diagonal().mean().clamp_min(1e-12)
        regular_DD = gram_DD + ridge * torch.eye(len(gram_DD), dtype=torch.float64)
        weight_DE: Tensor = torch.linalg.solve(regular_DD, cross_DE)
        # so that a module's logit is about 1, whatever the size of the layer's output
        mean = ranks.add_up(self.value_M)[modules_E].mean() / ranks.add_up(self.tokens)
        return (weight_DE.T / mean.clamp_min(1e-30)).float()
