"""Modules of neurons with like keys: balanced k-means on the rows that decide when a neuron is active.

Keys as features: EMoE, https://arxiv.org/abs/2310.10908. Every Lloyd step assigns with the exact optimum of the
balanced problem, so the objective never rises.
"""

# Shapes: F neurons, X features, M modules

from __future__ import annotations

import torch
from torch import Tensor

from modmoe.analyze.balance import assign_balanced
from modmoe.analyze.modules import Partition, check_num_modules
from modmoe.analyze.profile import ActivationProfile
from modmoe.ffn import FFNWeights


def cut_by_keys(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return balanced k-means modules of the L2-normalised key rows.

    Raises PartitionError where ``num_modules`` does not divide the neurons.
    """
    check_num_modules(len(weights.key_FD), num_modules)
    key_FD = weights.key_FD.detach().float().cpu()
    key_FD = key_FD / key_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return Partition(balanced_kmeans(key_FD, num_modules, seed), num_modules)


def balanced_kmeans(features_FX: Tensor, num_modules: int, seed: int, iterations: int = 10) -> Tensor:
    """Return module_F, int64: k-means with modules of exactly equal size.

    Starts from k-means++ centres drawn with ``seed``; stops when no neuron moves or after ``iterations`` steps.
    """
    from sklearn.cluster import kmeans_plusplus

    check_num_modules(len(features_FX), num_modules)
    neurons = len(features_FX)
    if num_modules in (1, neurons):
        return torch.arange(neurons) if num_modules > 1 else torch.zeros(neurons, dtype=torch.int64)
    features_FX = features_FX.detach().float().cpu()
    centres, _ = kmeans_plusplus(features_FX.numpy(), num_modules, random_state=seed)
    centre_MX = torch.as_tensor(centres)
    module_F, price_M = None, None
    for _ in range(iterations):
        # |x - c|^2 without |x|^2, which is the same for every module
        cost_FM = centre_MX.double().square().sum(1) - 2 * (features_FX @ centre_MX.T).double()
        moved_F, price_M = assign_balanced(cost_FM, price_M)
        if module_F is not None and torch.equal(moved_F, module_F):
            break
        module_F = moved_F
        order_F = torch.argsort(module_F, stable=True)
        centre_MX = features_FX[order_F].view(num_modules, -1, features_FX.shape[1]).mean(1)
    assert module_F is not None
    return module_F
