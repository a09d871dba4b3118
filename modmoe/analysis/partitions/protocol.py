"""What a way of cutting neurons into modules is."""

from __future__ import annotations

from typing import Protocol

from modmoe.analysis.modules import Partition
from modmoe.analysis.profile import ActivationProfile
from modmoe.models.ffn_layout import FFNWeights


class Partitioner(Protocol):
    """A way of cutting the neurons of one layer into modules.

    One that reads the profile's gradients is marked by ``modmoe.analysis.profile.with_gradients``.
    """

    def __call__(self, profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
        """Return the partition; the same for the same arguments."""
        ...
