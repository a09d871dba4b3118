"""Partitions that look at nothing: the controls for those that do."""

# Shapes: F neurons

from __future__ import annotations

import torch

from modmoe.analysis.modules import Partition, check_num_modules
from modmoe.analysis.profile import ActivationProfile
from modmoe.models.ffn_layout import FFNWeights


def cut_at_random(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return modules of neurons drawn at random; PartitionError where ``num_modules`` does not divide them."""
    neurons = weights.down_DF.shape[1]
    check_num_modules(neurons, num_modules)
    order_F = torch.randperm(neurons, generator=torch.Generator().manual_seed(seed))
    return Partition(order_F % num_modules, num_modules)


def cut_in_order(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return modules of neighbouring neurons, as stored; PartitionError where ``num_modules`` does not divide them."""
    neurons = weights.down_DF.shape[1]
    check_num_modules(neurons, num_modules)
    return Partition(torch.arange(neurons) // (neurons // num_modules), num_modules)
