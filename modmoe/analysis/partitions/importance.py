"""Modules of neurons that matter alike: sorted by importance, and cut where they lie."""

from __future__ import annotations

import torch

from modmoe.analysis.modules import Partition, check_num_modules
from modmoe.analysis.partitions.core import importance
from modmoe.analysis.profile import ActivationProfile
from modmoe.models.ffn_layout import FFNWeights


def cut_by_importance(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return modules of neighbours in the order of importance; PartitionError where they do not divide the neurons."""
    check_num_modules(profile.num_neurons, num_modules)
    order_F = importance(profile, weights).sort(descending=True, stable=True).indices
    module_F = torch.empty_like(order_F)
    module_F[order_F] = torch.arange(len(order_F)) // (len(order_F) // num_modules)
    return Partition(module_F, num_modules)
