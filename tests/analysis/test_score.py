"""Scores against their formulas, written out token by token."""

# Shapes: P tasks, T tokens, D model width, F neurons, M modules

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modmoe.analysis.partitions.table import Partition
from modmoe.analysis.profile import ActivationProfile
from modmoe.analysis.score import NEURON_SCORES, SCORES, module_scores, neuron_scores
from modmoe.errors import CalibrationError, PartitionError, RecipeError
from modmoe.models.ffn_layout import FFNWeights

NEURONS, MODULES = 12, 4
GENERATOR = torch.Generator().manual_seed(0)
TASKS = [torch.randn(tokens, NEURONS, generator=GENERATOR, dtype=torch.float64) for tokens in (5, 9)]
SLOPES = [torch.randn(h_TF.shape, generator=GENERATOR, dtype=torch.float64) for h_TF in TASKS]
DOWN_DF = torch.randn(6, NEURONS, generator=GENERATOR, dtype=torch.float64)
UP_FD = torch.randn(NEURONS, 6, generator=GENERATOR, dtype=torch.float64)
WEIGHTS = FFNWeights(None, UP_FD, DOWN_DF)
PARTITION = Partition(torch.randperm(NEURONS, generator=GENERATOR) % MODULES, MODULES)


def module_norm(h_F: Tensor, module: int) -> float:
    members = PARTITION.module_F == module
    return float((DOWN_DF[:, members] @ h_F[members]).norm())


def profile(gradients: bool = True, norms: bool = True) -> ActivationProfile:
    def total(values: list[Tensor]) -> Tensor:
        return torch.stack([value_TF.sum(0) for value_TF in values])

    norm_PM = torch.tensor([[sum(module_norm(h, m) for h in h_TF) for m in range(MODULES)] for h_TF in TASKS])
    return ActivationProfile(
        task_names=("a", "b"),
        tokens_P=torch.tensor([5, 9]),
        sum_PF=total(TASKS),
        abs_PF=total([h.abs() for h in TASKS]),
        square_PF=total([h.square() for h in TASKS]),
        taylor_PF=total([(h * g).abs() for h, g in zip(TASKS, SLOPES, strict=True)]) if gradients else None,
        rows_SF=torch.zeros(1, NEURONS),
        rows_seen=14,
        norm_PM=norm_PM.double() if norms else None,
    )


def by_hand(method: str, task: int, neuron: int) -> float:
    h_T = TASKS[task][:, neuron]
    if method == "magnitude":
        return float(UP_FD[neuron].norm() + DOWN_DF[:, neuron].norm())
    if method == "activation":
        return float(h_T.abs().mean())
    if method == "wanda":
        return float(DOWN_DF[:, neuron].abs().mean() * h_T.square().mean().sqrt())
    if method == "wifv":
        return float(h_T.var(correction=0) * DOWN_DF[:, neuron].norm().square())
    return float((h_T * SLOPES[task][:, neuron]).abs().mean())


@pytest.mark.parametrize("method", NEURON_SCORES)
def test_scores_of_neurons_follow_their_formula_and_modules_sum_them(method: str) -> None:
    wanted_PF = torch.tensor([[by_hand(method, task, neuron) for neuron in range(NEURONS)] for task in range(2)])
    found_PF = neuron_scores(method, profile(), WEIGHTS)
    torch.testing.assert_close(found_PF, wanted_PF.double(), rtol=1e-6, atol=1e-7)
    found_PM = module_scores(method, profile(), WEIGHTS, PARTITION)
    for module in range(MODULES):
        torch.testing.assert_close(found_PM[:, module], found_PF[:, PARTITION.module_F == module].sum(1))


def test_output_norm_is_the_mean_over_the_tasks_own_tokens() -> None:
    found_PM = module_scores("output_norm", profile(), WEIGHTS, PARTITION)
    wanted = [[sum(module_norm(h, m) for h in h_TF) / len(h_TF) for m in range(MODULES)] for h_TF in TASKS]
    torch.testing.assert_close(found_PM, torch.tensor(wanted).double(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", SCORES)
def test_every_score_is_float64_of_tasks_by_modules(method: str) -> None:
    score_PM = module_scores(method, profile(), WEIGHTS, PARTITION)
    assert score_PM.shape == (2, MODULES)
    assert score_PM.dtype == torch.float64
    assert bool((score_PM >= 0).all())


def test_what_a_score_lacks_is_said() -> None:
    with pytest.raises(CalibrationError, match="score 'taylor' needs gradients"):
        module_scores("taylor", profile(gradients=False), WEIGHTS, PARTITION)
    with pytest.raises(CalibrationError, match="score 'output_norm': needs the norms of modules"):
        module_scores("output_norm", profile(norms=False), WEIGHTS, PARTITION)
    with pytest.raises(PartitionError, match="is of 4 modules, the partition of 2"):
        module_scores("output_norm", profile(), WEIGHTS, Partition(torch.arange(NEURONS) % 2, 2))
    with pytest.raises(PartitionError, match="a partition of 4 neurons for a profile of 12"):
        module_scores("wanda", profile(), WEIGHTS, Partition(torch.arange(4), 4))
    with pytest.raises(RecipeError, match=r"assignment\.score: no score 'wandas'\. Did you mean 'wanda'\?"):
        module_scores("wandas", profile(), WEIGHTS, PARTITION)
