"""The ways of cutting neurons into modules, by name, and the cut of all layers at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from threading import Lock

import torch

from modmoe.analysis.modules import Partition, check_num_modules, load_partitions, save_partitions
from modmoe.analysis.partitions.activations import cut_by_activations
from modmoe.analysis.partitions.coactivation import cut_by_coactivation
from modmoe.analysis.partitions.gradient import cut_by_gradients
from modmoe.analysis.partitions.importance import cut_by_importance
from modmoe.analysis.partitions.kmeans import cut_by_keys
from modmoe.analysis.partitions.protocol import Partitioner
from modmoe.analysis.partitions.random import cut_at_random, cut_in_order
from modmoe.analysis.profile import ActivationProfile
from modmoe.errors import RecipeError, did_you_mean
from modmoe.models.ffn_layout import FFNWeights
from modmoe.recipe.dotted import object_at

__all__ = [
    "PARTITIONERS",
    "Partition",
    "Partitioner",
    "check_num_modules",
    "cut_layers",
    "find_partitioner",
    "load_partitions",
    "save_partitions",
]


PARTITIONERS: dict[str, Partitioner] = {
    "kmeans": cut_by_keys,
    "activations": cut_by_activations,
    "coactivation": cut_by_coactivation,
    "gradient": cut_by_gradients,
    "importance": cut_by_importance,
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
        raise RecipeError("partition.method", f"no method '{name}'", did_you_mean(name, PARTITIONERS))
    attribute = object_at(name, "partition.method")
    if not callable(attribute):
        raise RecipeError("partition.method", f"'{name}' is a {type(attribute).__name__}, not a function")
    partitioner: Partitioner = attribute
    return partitioner


def cut_layers(
    partitioner: Partitioner,
    read_layer: Callable[[int], tuple[ActivationProfile, FFNWeights]],
    layers: Sequence[int],
    num_modules: int,
    seed: int,
    *,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Partition]:
    """Return the partitions of the layers, several layers at a time; the same whatever the number of threads.

    torch runs on one thread meanwhile, in every thread of the process: sums on several threads differ in their last
    bits, and a cut turns on them now and then. What a partitioner does, must not depend on other layers.

    Args:
        partitioner: called from several threads at once.
        read_layer: returns a layer's profile and weights. Called for one layer at a time, when its turn comes, and what
            it returns is let go when the layer is cut; so as many layers are in memory as there are threads.
        layers: the numbers of the layers to cut.
        num_modules: modules of each layer.
        seed: the same for every layer.
        threads: layers at a time; torch's number of threads where it is None.
        progress: called from this thread with the layers done and all of them.

    Raises:
        Whatever the partitioner or ``read_layer`` raises, as soon as the layers under way are done.
    """
    reading = Lock()

    def cut(layer: int) -> Partition:
        with reading:
            profile, weights = read_layer(layer)
        return partitioner(profile, weights, num_modules, seed)

    report = progress or (lambda done, total: None)
    report(0, len(layers))
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads or before, initializer=torch.set_num_threads, initargs=(1,))
    torch.set_num_threads(1)
    try:
        futures = [pool.submit(cut, layer) for layer in layers]
        for done, future in enumerate(as_completed(futures), 1):
            future.result()
            report(done, len(layers))
        return [future.result() for future in futures]
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)
