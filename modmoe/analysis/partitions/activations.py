"""Modules of neurons that are active together: balanced k-means on what each neuron does over the sketch's tokens.

The features follow the co-activation clustering of MoEfication (https://arxiv.org/abs/2110.01786), with
centred profiles instead of counts, so that activations of either sign and dense ones are of use.
"""

# Shapes: F neurons, S rows of the sketch

from __future__ import annotations

from torch import Tensor

from modmoe.analysis.modules import Partition, check_num_modules
from modmoe.analysis.partitions.kmeans import balanced_kmeans
from modmoe.analysis.profile import ActivationProfile
from modmoe.models.ffn_layout import FFNWeights


def cut_by_activations(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return balanced k-means modules of the neurons' columns of the profile's sketch.

    Raises PartitionError where ``num_modules`` does not divide the neurons.
    """
    check_num_modules(profile.num_neurons, num_modules)
    return Partition(balanced_kmeans(activation_features(profile), num_modules, seed), num_modules)


def activation_features(profile: ActivationProfile) -> Tensor:
    """Return column_FS, float32: the sketch's columns, centred and normalised; their distances are correlations."""
    column_FS = profile.rows_SF.T.double()
    column_FS = column_FS - column_FS.mean(1, keepdim=True)
    # a neuron that never moves stays at the origin rather than becoming noise of unit length
    unit_FS: Tensor = column_FS / column_FS.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return unit_FS.float()
