"""Modules of neurons with like keys: balanced k-means on the rows that decide when a neuron is active.

Keys as features: EMoE, https://arxiv.org/abs/2310.10908. The start is bisection: a set of neurons is cut in halves
along the direction in which it is widest, and each half again; it needs no restarts. Every later step assigns with the
exact optimum of the balanced problem, and the sum of squares never rises.
"""

# Shapes: F neurons, N neurons of a part, X features, M modules

from __future__ import annotations

import torch
from torch import Tensor

from modmoe.analysis.balance import assign_balanced
from modmoe.analysis.modules import Partition, check_num_modules
from modmoe.analysis.profile import ActivationProfile
from modmoe.models.ffn_layout import FFNWeights

# Wider features are projected for most steps; a few steps on all columns win back what that loses.
_WIDTH = 256
_LAST_STEPS = 2
# The start may be rougher still.
_START_WIDTH = 32
_POWER_STEPS = 8
_HALVING_STEPS = 8
# How much of the difference to Hartigan's distance counts, one after the other.
_FRACTIONS = (1.0, 0.7, 0.5, 0.35, 0.25)


def cut_by_keys(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return balanced k-means modules of the neurons' keys.

    Raises PartitionError where ``num_modules`` does not divide the neurons.
    """
    check_num_modules(len(weights.key_FD), num_modules)
    return Partition(balanced_kmeans(key_features(weights), num_modules, seed), num_modules)


def key_features(weights: FFNWeights) -> Tensor:
    """Return the key rows, float32, of unit length."""
    key_FD = weights.key_FD.detach().float().cpu()
    unit_FD: Tensor = key_FD / key_FD.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit_FD


def balanced_kmeans(features_FX: Tensor, num_modules: int, seed: int, iterations: int = 6) -> Tensor:
    """Return module_F, int64: k-means with modules of exactly equal size.

    Stops when the sum of squares falls no more, or after ``iterations`` steps. Another order of the same neurons gives
    the same modules under other numbers, unless rounding decides: between neurons that are alike, or where a neuron is
    as near to two modules as float32 can tell.

    Args:
        features_FX: more than 256 columns are projected at random to as many, and used in full by the last steps.
        num_modules: a divisor of F.
        seed: decides the projections, and where the search for the widest direction starts.
        iterations: steps that help at most, but for the last ones on all columns.
    """
    check_num_modules(len(features_FX), num_modules)
    neurons, width = features_FX.shape
    if num_modules in (1, neurons):
        return torch.arange(neurons) if num_modules > 1 else torch.zeros(neurons, dtype=torch.int64)
    features_FX = features_FX.detach().float().cpu()
    generator = torch.Generator().manual_seed(seed)
    narrow_FX = features_FX
    if width > _WIDTH:
        narrow_FX = features_FX @ (torch.randn(width, _WIDTH, generator=generator) / _WIDTH**0.5)
    # float64, so that neither the order of neurons nor that of a sum tips a choice
    narrow_FX = narrow_FX.double()
    module_F = torch.zeros(neurons, dtype=torch.int64)
    start_FX = narrow_FX @ torch.randn(narrow_FX.shape[1], _START_WIDTH, generator=generator, dtype=torch.float64)
    direction_X = torch.randn(_START_WIDTH, generator=generator, dtype=torch.float64)
    _bisect(start_FX, torch.arange(neurons), num_modules, 0, direction_X, module_F)
    module_F = improve(narrow_FX, module_F, num_modules, iterations)
    if width > _WIDTH:
        module_F = improve(features_FX, module_F, num_modules, _LAST_STEPS)
    return module_F


def improve(features_FX: Tensor, module_F: Tensor, num_modules: int, steps: int) -> Tensor:
    """Return module_F after at most so many steps that help; modules of equal size, and no larger sum of squares.

    A neuron draws its own module's centre towards itself, the more the smaller the modules, and so Lloyd's steps end
    early. Here the distance to its own module is the one to the centre of the others (Hartigan, Clustering Algorithms,
    1975, chapter 4). All neurons move at once, which may be too much: a step that does not help is taken back, and the
    next one counts less of that difference.
    """
    size = len(module_F) // num_modules
    square_F = features_FX.square().sum(1, dtype=torch.float64)
    total = float(square_F.sum())
    fractions = list(_FRACTIONS)
    best_F, least, price_M = module_F, float("inf"), None
    best_MX = features_FX.new_zeros(num_modules, features_FX.shape[1])
    # the first turn only measures where it starts from
    helpful = -1
    while True:
        centre_MX = torch.zeros_like(best_MX).index_add_(0, module_F, features_FX).div_(size)
        scatter = total - size * float(centre_MX.square().sum(dtype=torch.float64))
        if scatter < least * (1 - 1e-4):
            helpful += 1
        else:
            fractions.pop(0)
        if scatter < least:
            best_F, best_MX, least = module_F, centre_MX, scatter
        if helpful == steps or not fractions:
            return best_F
        # |x - c|^2 without |x|^2, which is the same for every module
        cost_FM = (features_FX @ best_MX.T).double().mul_(-2).add_(best_MX.double().square().sum(1))
        own_F1 = best_F.unsqueeze(1)
        more_F1 = (cost_FM.gather(1, own_F1) + square_F.unsqueeze(1)) * ((size / (size - 1)) ** 2 - 1)
        cost_FM.scatter_add_(1, own_F1, fractions[0] * more_F1)
        module_F, price_M = assign_balanced(cost_FM, price_M)


def _bisect(
    features_FX: Tensor, part_N: Tensor, num_modules: int, first: int, start_X: Tensor, module_F: Tensor
) -> None:
    """Number the modules of the neurons ``part_N`` from ``first`` on, in ``module_F``.

    The part is cut by balanced 2-means, whose steps are exact: neurons in order along the line between the two centres.
    """
    if num_modules == 1:
        module_F[part_N] = first
        return
    left = (num_modules + 1) // 2
    size = len(part_N) // num_modules * left
    part_NX = features_FX[part_N]
    part_NX = part_NX - part_NX.mean(0)
    direction_X = start_X
    for _ in range(_POWER_STEPS):
        direction_X = part_NX.T @ (part_NX @ direction_X)
        direction_X = direction_X / direction_X.norm().clamp_min(1e-300)
    order_N = torch.argsort(part_NX @ direction_X, descending=True, stable=True)
    for _ in range(_HALVING_STEPS):
        # the mean of all is 0, so the line between the centres goes through either
        before_N, direction_X = order_N, part_NX[order_N[:size]].mean(0)
        order_N = torch.argsort(part_NX @ direction_X, descending=True, stable=True)
        if torch.equal(order_N[:size].sort().values, before_N[:size].sort().values):
            break
    _bisect(features_FX, part_N[order_N[:size].sort().values], left, first, start_X, module_F)
    _bisect(features_FX, part_N[order_N[size:].sort().values], num_modules - left, first + left, start_X, module_F)
