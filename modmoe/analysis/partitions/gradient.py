"""Modules of neurons by what gradients say of them on each kind of text: LLaMA-MoE's independent split.

    LLaMA-MoE, https://arxiv.org/abs/2406.16554, section 3.1

    v_e[j] = mean |h_j dL/dh_j|                  over the tokens of text e
    of all modules that are not full and all neurons left, the pair of the highest v_e[j] is joined, until all are

The texts are the tasks. Where a method makes every module an expert and there is one task, they are as many clusters of
its sequences as there are modules, as published. Where there are more modules than texts, a text has every so many-th
module, and fills the first of them first.

v_e is a mean over tokens here, so that no text outweighs another by its length; published is a sum over samples.
"""

# Shapes: P tasks, F neurons, M modules

from __future__ import annotations

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition, check_num_modules
from modmoe.analysis.profile import ActivationProfile, with_gradients
from modmoe.analysis.score import neuron_scores
from modmoe.models.ffn_layout import FFNWeights


@with_gradients
def cut_by_gradients(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
    """Return modules of the neurons that matter most to the tasks, each in turn; nothing is drawn.

    Raises:
        PartitionError: ``num_modules`` does not divide the neurons.
        CalibrationError: the profile has no gradients.
    """
    check_num_modules(profile.num_neurons, num_modules)
    score_PF = neuron_scores("taylor", profile, weights)
    # each module has a text; where there are more texts, it has several
    pair = torch.arange(max(num_modules, len(score_PF)))
    score_MF = torch.zeros(num_modules, profile.num_neurons, dtype=torch.float64)
    score_MF.index_add_(0, pair % num_modules, score_PF[pair % len(score_PF)])
    return Partition(deal(score_MF), num_modules)


def deal(score_MF: Tensor) -> Tensor:
    """Return module_F, int64, of equal modules: again and again the best pair of a neuron and a module with room.

    Of pairs that score alike the first module, and in it the first neuron, comes first.
    """
    modules, neurons = score_MF.shape
    order = score_MF.flatten().sort(descending=True, stable=True).indices
    module_F, left_M = [-1] * neurons, [neurons // modules] * modules
    for pair in order.tolist():
        module, neuron = divmod(pair, neurons)
        if module_F[neuron] < 0 and left_M[module]:
            module_F[neuron] = module
            left_M[module] -= 1
    return torch.tensor(module_F)
