"""Gram matrices of module outputs, backward elimination and the experts chosen from them, against plain loops."""

# Shapes: N rows, D model width, F neurons, M modules, E experts, P tasks

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.conversion.modular.assignments import ASSIGNMENTS
from modmoe.conversion.modular.from_outputs import assign_greedy, assign_tokens
from modmoe.conversion.modular.module_outputs import ModuleOutputs, eliminate, module_outputs

ROWS, WIDTH, MODULES, SIZE, TASKS = 60, 6, 8, 3, 3
NAMES = ("a", "b", "c")
FIXED: dict[str, Any] = {"num_experts": 5, "modules_per_expert": 4, "seed": 1}


BY_OUTPUTS = {name: row.by_outputs for name, row in ASSIGNMENTS.items() if row.by_outputs is not None}


def planted() -> tuple[Tensor, Tensor, Partition, Tensor]:
    """Return hidden_NF, down_DF, a partition and task_N: each task has modules of its own that are louder."""
    draw = torch.Generator().manual_seed(0)
    module_F = torch.randperm(MODULES * SIZE, generator=draw) % MODULES
    task_N = torch.arange(ROWS) % TASKS
    loud_PM = torch.ones(TASKS, MODULES)
    for task in range(TASKS):
        loud_PM[task, 2 * task : 2 * task + 2] = 4
    hidden_NF = torch.randn(ROWS, MODULES * SIZE, generator=draw) * loud_PM[task_N][:, module_F] + 0.3
    down_DF = torch.randn(WIDTH, MODULES * SIZE, generator=draw)
    return hidden_NF, down_DF, Partition(module_F, MODULES), task_N


def outputs(is_centred: bool = True) -> ModuleOutputs:
    hidden_NF, down_DF, partition, task_N = planted()
    return module_outputs(hidden_NF, down_DF, partition, task_N, is_centred=is_centred)


@pytest.mark.parametrize("is_centred", [False, True])
def test_errors_are_those_of_leaving_modules_out(monkeypatch: pytest.MonkeyPatch, is_centred: bool) -> None:
    monkeypatch.setattr(
        "modmoe.conversion.modular.module_outputs._AT_ONCE", 7 * MODULES * WIDTH
    )  # pieces that do not divide the rows
    hidden_NF, down_DF, partition, _ = planted()
    member_EM = torch.rand(4, MODULES, generator=torch.Generator().manual_seed(2)) < 0.5
    found_NE = outputs(is_centred).errors_NE(member_EM)
    mean_F = hidden_NF.mean(0) if is_centred else torch.zeros(len(partition.module_F))
    for row, expert in itertools.product(range(ROWS), range(4)):
        skipped_F = ~member_EM[expert][partition.module_F]
        missing_D = down_DF[:, skipped_F] @ (hidden_NF[row] - mean_F)[skipped_F]
        torch.testing.assert_close(found_NE[row, expert], missing_D.square().sum(), rtol=1e-4, atol=1e-4)


def test_each_module_that_goes_adds_the_least_error() -> None:
    gram_MM = outputs().gram_PMM()[0]
    order = eliminate(gram_MM).tolist()
    assert sorted(order) == list(range(MODULES))

    def error(kept: list[int]) -> float:
        gone = [module for module in range(MODULES) if module not in kept]
        return float(gram_MM[gone][:, gone].sum())

    for size in range(MODULES, 0, -1):
        costs = {module: error([m for m in order[:size] if m != module]) for module in order[:size]}
        assert costs[order[size - 1]] <= min(costs.values()) + 1e-12
    first = torch.tensor([order[-1], order[-2]])
    assert eliminate(gram_MM, first)[:2].tolist() == first.tolist()


def test_elimination_sees_what_makes_up_for_what() -> None:
    # the first two cancel each other: once one of them is gone, the other, though largest, costs more kept than gone
    row_MD = torch.tensor([[2.0, 0.0], [-2.2, 0.0], [0.0, 2.1]])
    assert eliminate(row_MD @ row_MD.T).tolist() == [2, 1, 0]


@pytest.mark.parametrize("method", BY_OUTPUTS)
def test_experts_have_their_sizes_shared_modules_and_repeat(method: str) -> None:
    made = [BY_OUTPUTS[method](outputs(), NAMES, shared_modules=2, coverage=False, **FIXED) for _ in range(2)]
    experts, size = {"greedy": (3, 4), "tokens": (5, 4), "modules": (6, 3)}[method]
    assert made[0].membership_EM.shape == (experts, MODULES)
    assert made[0].modules_per_expert == size
    assert int(made[0].shared_M.sum()) >= 2
    assert torch.equal(made[0].membership_EM, made[1].membership_EM)
    shared = made[0].ranking_ER[:, :2]
    assert bool((shared == shared[0]).all())


def test_tasks_get_the_modules_that_are_loud_in_them() -> None:
    made = assign_greedy(outputs(), NAMES, shared_modules=0, coverage=False, **FIXED)
    assert made.expert_names == NAMES
    for task in range(TASKS):
        assert made.membership_EM[task, 2 * task : 2 * task + 2].all()
        assert set(made.ranking_ER[task, :2].tolist()) == {2 * task, 2 * task + 1}


def test_coverage_leaves_no_module_out() -> None:
    plain, made = (
        assign_greedy(outputs(), NAMES, shared_modules=1, coverage=coverage, **FIXED) for coverage in (False, True)
    )
    assert bool(made.used_M.all())
    assert made.modules_per_expert == plain.modules_per_expert == 4
    assert torch.equal(made.ranking_ER[:, 0], plain.ranking_ER[:, 0])


def test_experts_for_tokens_cost_less_than_one_for_all_and_than_one_a_task() -> None:
    known = outputs()
    options: dict[str, Any] = {**FIXED, "shared_modules": 0, "coverage": False}
    tokens = assign_tokens(known, NAMES, **{**options, "num_experts": 12})
    tasks = assign_greedy(known, NAMES, **options)
    one = eliminate(known.gram_PMM().mean(0))[:4]
    one_1M = torch.zeros(1, MODULES, dtype=torch.bool).index_fill_(1, one, True)
    of_tokens, of_tasks, of_one = (
        float(known.errors_NE(member_EM).min(1).values.sum())
        for member_EM in (tokens.membership_EM, tasks.membership_EM, one_1M)
    )
    assert of_tokens < 0.9 * of_tasks < 0.9 * of_one
