"""Modules of neurons that are active together: the graph of co-activations, cut into equal parts.

    MoEfication, https://arxiv.org/abs/2110.01786, section 3.2

    A = sum_b min(|H_b|^T |H_b|, 1)         over batches H_b of tokens' activations: two neurons meet once in each
    edges: A / t, rounded down              t the first of A's 10th, 20th, ... 100th percentile above 0, times 0.99
    the least weight of edges between modules of equal size

What differs    published                           here
h               after ReLU                          over its root mean square: the 1 needs a scale; |h|, as gated FFNs
                                                    have either sign
batches         8 sequences, of 200,000 at most     8 tokens of the profile's sketch
the cut         METIS, then random neurons moved    k-means of activations, then exchanges of two neurons, each the
                until parts are equal               best for its first, while any lowers the cut (after Kernighan, Lin)

On a ReLU model of 384 neurons the exchanges cut less than METIS with its parts made equal, from whatever start.
"""

# Shapes: F neurons, M modules, S rows of the sketch

from __future__ import annotations

from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modmoe.analysis.modules import Partition, check_num_modules
from modmoe.analysis.partitions.activations import activation_features
from modmoe.analysis.partitions.kmeans import balanced_kmeans
from modmoe.analysis.profile import ActivationProfile
from modmoe.models.ffn_layout import FFNWeights

_BATCH = 8
_SAMPLED = 1 << 22
# F F numbers: several layers at a time could fill the memory
_ONE_GRAPH = Lock()


def cut_by_coactivation(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return modules of neurons that the sketch's tokens activate together; F F float32 numbers are held meanwhile.

    Raises PartitionError where ``num_modules`` does not divide the neurons.
    """
    check_num_modules(profile.num_neurons, num_modules)
    module_F = balanced_kmeans(activation_features(profile), num_modules, seed)
    with _ONE_GRAPH:
        return Partition(exchange(coactivation_graph(profile.rows_SF), module_F), num_modules)


def coactivation_graph(rows_SF: Tensor) -> Tensor:
    """Return weight_FF, float32: whole numbers, the same both ways, and 0 on the diagonal."""
    size_SF = rows_SF.detach().float().abs()
    size_SF = size_SF / size_SF.square().mean().sqrt().clamp_min(1e-30)
    neurons = size_SF.shape[1]
    meet_FF = torch.zeros(neurons, neurons)
    for part_NF in torch.split(size_SF, _BATCH):
        meet_FF += (part_NF.T @ part_NF).clamp_(max=1)
    meet_FF.fill_diagonal_(0)
    # of the pairs of some neurons, for there may be hundreds of millions
    sampled = meet_FF[:: -(-(neurons**2) // _SAMPLED)].numpy()
    levels = [level for level in np.percentile(sampled, range(10, 101, 10)) if level > 0]
    return meet_FF.div_(0.99 * levels[0]).floor_() if levels else meet_FF


def exchange(weight_FF: Tensor, module_F: Tensor) -> Tensor:
    """Return module_F, int64, after exchanges of two neurons that raise the weight of edges within modules.

    Every neuron in turn is exchanged with the one that raises it most, until no exchange raises it. Sizes stay.

    Args:
        weight_FF: whole numbers, so that sums are exact; the same both ways, and 0 on the diagonal.
        module_F: what to begin with.
    """
    weight_FF_, module = weight_FF.numpy(), module_F.numpy().copy()
    places = np.arange(len(module))
    # the weight of the edges from each neuron into each module
    into_MF: NDArray[np.float32] = np.zeros((int(module.max()) + 1, len(module)), dtype=np.float32)
    for number, into_F in enumerate(into_MF):
        into_F[:] = weight_FF_[module == number].sum(0)
    own_F, is_better = into_MF[module, places], True
    while is_better:
        is_better = False
        for one in range(len(module)):
            here = module[one]
            gain_F = into_MF[:, one][module] - own_F[one] + into_MF[here] - own_F - 2 * weight_FF_[one]
            two = int(gain_F.argmax())
            if gain_F[two] <= 0:
                continue
            there = module[two]
            module[one], module[two] = there, here
            change_F = weight_FF_[two] - weight_FF_[one]
            into_MF[here] += change_F
            into_MF[there] -= change_F
            own_F, is_better = into_MF[module, places], True
    return torch.from_numpy(module)
