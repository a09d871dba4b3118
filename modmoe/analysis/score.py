"""How much a neuron or a module matters for a task.

    magnitude     |gate_i| + |up_i| + |down_i|              LLM-Pruner's L2 control, https://arxiv.org/abs/2305.11627
    activation    mean |h|                                  Minitron, https://arxiv.org/abs/2407.14679
    wanda         mean_o |down_oi| * sqrt(mean h^2)         Wanda-sp in FLAP, https://arxiv.org/abs/2312.11983
    wifv          var(h) * |down_i|^2                       FLAP, https://arxiv.org/abs/2312.11983
    taylor        mean |h dL/dh|                            LLM-Pruner, https://arxiv.org/abs/2305.11627, on activations
    output_norm   mean |F_j(x)|                             a module's own: the norm of its output

|x_i| is a Euclidean norm: of a row of gate and up, of a column of down. ``magnitude`` looks at no text and is the same
for every task. A module's score is the sum over its neurons, but for ``output_norm``.
"""

# Shapes: P tasks, D model width, F neurons, M modules

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.analysis.profile import ActivationProfile, with_gradients
from modmoe.errors import CalibrationError, PartitionError, RecipeError, did_you_mean
from modmoe.models.ffn_layout import FFNWeights


def _tokens(profile: ActivationProfile) -> Tensor:
    return profile.tokens_P.clamp_min(1).double().unsqueeze(1)


def _sum_rows(down_DF: Tensor, size: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the sum of each column's sizes in float64, some rows at a time: a copy of a large matrix is many GB."""
    total_F = torch.zeros(down_DF.shape[1], dtype=torch.float64)
    for rows_DF in torch.split(down_DF.detach(), 256):
        total_F += size(rows_DF.cpu().double()).sum(0)
    return total_F


def _magnitude(profile: ActivationProfile, weights: FFNWeights) -> Tensor:
    score_F = _sum_rows(weights.down_DF, Tensor.square).sqrt()
    for rows_FD in (weights.gate_FD, weights.up_FD):
        if rows_FD is not None:
            score_F += _sum_rows(rows_FD.T, Tensor.square).sqrt()
    return score_F.repeat(len(profile.tokens_P), 1)


def _activation(profile: ActivationProfile, weights: FFNWeights) -> Tensor:
    return profile.abs_PF / _tokens(profile)


def _wanda(profile: ActivationProfile, weights: FFNWeights) -> Tensor:
    size_F = _sum_rows(weights.down_DF, Tensor.abs) / len(weights.down_DF)
    return size_F * (profile.square_PF / _tokens(profile)).sqrt()


def _wifv(profile: ActivationProfile, weights: FFNWeights) -> Tensor:
    mean_PF = profile.sum_PF / _tokens(profile)
    variance_PF = (profile.square_PF / _tokens(profile) - mean_PF.square()).clamp_min(0)
    return variance_PF * _sum_rows(weights.down_DF, Tensor.square)


@with_gradients
def _taylor(profile: ActivationProfile, weights: FFNWeights) -> Tensor:
    if profile.taylor_PF is None:
        raise CalibrationError(
            "score 'taylor' needs gradients, which the profile lacks; profile again with gradients=True."
        )
    return profile.taylor_PF / _tokens(profile)


NEURON_SCORES: dict[str, Callable[[ActivationProfile, FFNWeights], Tensor]] = {
    "magnitude": _magnitude,
    "activation": _activation,
    "wanda": _wanda,
    "wifv": _wifv,
    "taylor": _taylor,
}
"""Name to the scores of neurons, [P, F] float64."""


def _output_norm(profile: ActivationProfile, weights: FFNWeights, partition: Partition) -> Tensor:
    if profile.norm_PM is None:
        raise CalibrationError(
            "score 'output_norm'",
            "needs the norms of modules, which the profile lacks",
            "profile again with partitions=",
        )
    if profile.norm_PM.shape[1] != partition.num_modules:
        raise PartitionError(
            "score 'output_norm'",
            f"the profile is of {profile.norm_PM.shape[1]} modules, the partition of {partition.num_modules}",
            "profile again with this partition",
        )
    return profile.norm_PM / _tokens(profile)


def _summed(method: str) -> Callable[[ActivationProfile, FFNWeights, Partition], Tensor]:
    def score(profile: ActivationProfile, weights: FFNWeights, partition: Partition) -> Tensor:
        score_PF = NEURON_SCORES[method](profile, weights)
        return score_PF[:, partition.permutation_F].view(len(score_PF), partition.num_modules, -1).sum(2)

    return score


SCORES: dict[str, Callable[[ActivationProfile, FFNWeights, Partition], Tensor]] = {
    **{method: _summed(method) for method in NEURON_SCORES},
    "output_norm": _output_norm,
}
"""Name to the scores of modules, [P, M] float64."""


def neuron_scores(method: str, profile: ActivationProfile, weights: FFNWeights) -> Tensor:
    """Return how much each neuron matters for each task, [P, F] float64, at least 0.

    Raises:
        RecipeError: no such score of neurons.
        CalibrationError: the profile lacks what the score needs.
    """
    if method not in NEURON_SCORES:
        raise RecipeError("score", f"no score of neurons '{method}'", did_you_mean(method, NEURON_SCORES))
    return NEURON_SCORES[method](profile, weights)


def module_scores(method: str, profile: ActivationProfile, weights: FFNWeights, partition: Partition) -> Tensor:
    """Return how much each module matters for each task, [P, M] float64, at least 0.

    Raises:
        RecipeError: no such score.
        CalibrationError: the profile lacks what the score needs.
        PartitionError: the partition is of another number of neurons, or not the one whose norms the profile holds.
    """
    if method not in SCORES:
        raise RecipeError("assignment.score", f"no score '{method}'", did_you_mean(method, SCORES))
    if len(partition.module_F) != profile.num_neurons:
        raise PartitionError(
            f"a partition of {len(partition.module_F)} neurons for a profile of {profile.num_neurons}."
        )
    return SCORES[method](profile, weights, partition)
