"""The ways of cutting neurons into modules, by name."""

from __future__ import annotations

import importlib
from typing import Protocol

from modmoe.analyze.activations import cut_by_activations
from modmoe.analyze.kmeans import cut_by_keys
from modmoe.analyze.modules import Partition, check_num_modules, load_partitions, save_partitions
from modmoe.analyze.profile import ActivationProfile
from modmoe.analyze.random import cut_at_random, cut_in_order
from modmoe.errors import RecipeError, did_you_mean
from modmoe.ffn import FFNWeights

__all__ = [
    "PARTITIONERS",
    "Partition",
    "Partitioner",
    "check_num_modules",
    "find_partitioner",
    "load_partitions",
    "save_partitions",
]


class Partitioner(Protocol):
    """A way of cutting the neurons of one layer into modules."""

    def __call__(self, profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
        """Return the partition; the same for the same arguments."""
        ...


PARTITIONERS: dict[str, Partitioner] = {
    "kmeans": cut_by_keys,
    "activations": cut_by_activations,
    "random": cut_at_random,
    "contiguous": cut_in_order,
}
"""Name to partitioner; a user's own is named by its dotted path."""


def find_partitioner(name: str) -> Partitioner:
    """Return a partitioner by its name in the table, or by the dotted path of a function of one's own.

    Raises:
        RecipeError: no such name, a path that cannot be imported, or nothing there to call.
    """
    if name in PARTITIONERS:
        return PARTITIONERS[name]
    if "." not in name:
        raise RecipeError(f"partition.method: no method '{name}'.{did_you_mean(name, PARTITIONERS)}")
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise RecipeError(
            f"partition.method: '{name}' cannot be imported: {reason}; name package.file.function."
        ) from error
    if not callable(found):
        raise RecipeError(f"partition.method: '{name}' is a {type(found).__name__}, not a function.")
    partitioner: Partitioner = found
    return partitioner
