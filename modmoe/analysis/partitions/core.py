"""A core before the modules: the neurons that matter most over all tasks, in modules of their own.

    importance of neuron i = sqrt(mean over tokens of h_i^2) * |down_i|

The first modules hold the most important neurons, in that order; any partitioner cuts the rest. Experts that share
the core compute it for every token, so that the router chooses among neurons that matter to some tokens only. Shared
experts of CMoE (https://arxiv.org/abs/2502.04416) and DeepSeekMoE (https://arxiv.org/abs/2401.06066) have the same
aim. The measure of importance is Wanda's (https://arxiv.org/abs/2306.11695) for the columns of ``down``.
"""

# Shapes: F neurons, P tasks

from __future__ import annotations

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition, check_num_modules
from modmoe.analysis.partitions.protocol import Partitioner
from modmoe.analysis.profile import ActivationProfile, reads_gradients, with_gradients
from modmoe.models.ffn_layout import FFNWeights


def importance(profile: ActivationProfile, weights: FFNWeights) -> Tensor:
    """Return importance_F, float64, over the tokens of all tasks together."""
    square_F = profile.square_PF.sum(0) / profile.tokens_P.sum().clamp_min(1)
    importance_F: Tensor = square_F.sqrt() * weights.down_DF.detach().double().norm(dim=0)
    return importance_F


def with_core(partitioner: Partitioner, core_modules: int) -> Partitioner:
    """Return a partitioner whose first modules are the core, and whose other modules ``partitioner`` cuts.

    Args:
        partitioner: cuts the neurons that are not in the core.
        core_modules: how many modules are the core, fewer than there are; 0 returns ``partitioner`` itself.
    """
    if not core_modules:
        return partitioner

    def cut(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
        check_num_modules(profile.num_neurons, num_modules)
        size = profile.num_neurons // num_modules
        order_F = importance(profile, weights).sort(descending=True, stable=True).indices
        rest = order_F[core_modules * size :].sort().values
        module_F = torch.empty(profile.num_neurons, dtype=torch.int64)
        module_F[order_F[: core_modules * size]] = torch.arange(core_modules * size) // size
        others = partitioner(profile.take(rest), weights.take(rest), num_modules - core_modules, seed)
        module_F[rest] = core_modules + others.module_F
        return Partition(module_F, num_modules)

    return with_gradients(cut) if reads_gradients(partitioner) else cut
