"""Experts chosen by what leaving modules out does to a layer's output on text.

greedy    an expert a task: backward elimination on the task's mean Gram matrix of module outputs
tokens    experts for kinds of tokens rather than tasks: rows go to the expert that costs them least, and each
          expert is eliminated anew on its rows, in turn until nothing moves (k-means whose centres are sets)
modules   every module that is not shared is an expert of its own, with the shared ones: the router chooses modules
"""

# Shapes: N rows, M modules, E experts, R modules of an expert

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from modmoe.conversion.modular.assignment import Assignment, cover
from modmoe.conversion.modular.module_outputs import ModuleOutputs, eliminate

_TURNS = 10
_FEWEST_ROWS = 8


class OutputAssigner(Protocol):
    """A way of choosing experts by what modules put out."""

    def __call__(
        self,
        outputs: ModuleOutputs,
        task_names: tuple[str, ...],
        *,
        num_experts: int,
        modules_per_expert: int,
        shared_modules: int,
        core_modules: int,
        coverage: bool,
        seed: int,
    ) -> Assignment:
        """Return the assignment; the same for the same arguments."""
        ...


def assign_greedy(
    outputs: ModuleOutputs,
    task_names: tuple[str, ...],
    *,
    num_experts: int,
    modules_per_expert: int,
    shared_modules: int = 0,
    core_modules: int = 0,
    coverage: bool = False,
    seed: int = 0,
) -> Assignment:
    """Return one expert a task, nested in size; the shared modules are those that are best for all tasks together."""
    gram_PMM = outputs.gram_PMM()
    shared = eliminate(gram_PMM.mean(0), torch.arange(core_modules))[:shared_modules]
    order_PM = torch.stack([eliminate(gram_MM, shared) for gram_MM in gram_PMM])
    if not coverage:
        return _of_ranking(order_PM[:, :modules_per_expert], order_PM.shape[1], task_names)
    experts, modules = order_PM.shape
    place_PM = torch.empty_like(order_PM).scatter_(1, order_PM, torch.arange(modules).expand(experts, -1))
    own = torch.nonzero(~torch.isin(torch.arange(modules), shared)).flatten()
    own_EQ = cover(-place_PM[:, own].double(), place_PM[:, own] < modules_per_expert)
    ranked = []
    for expert in range(experts):
        held = own[own_EQ[expert]]
        ranked.append(torch.cat([shared, held[place_PM[expert, held].argsort()]]))
    return _of_ranking(torch.stack(ranked), modules, task_names)


def assign_tokens(
    outputs: ModuleOutputs,
    task_names: tuple[str, ...],
    *,
    num_experts: int,
    modules_per_expert: int,
    shared_modules: int = 0,
    core_modules: int = 0,
    coverage: bool = False,
    seed: int = 0,
) -> Assignment:
    """Return experts for the kinds of rows there are, found in turn with the rows of each."""
    from sklearn.cluster import KMeans

    gram_NMM = outputs.gram_NMM
    shared = eliminate(outputs.gram_PMM().mean(0), torch.arange(core_modules))[:shared_modules]
    size_NM = outputs.value_NM().sqrt()
    unit_NM = size_NM / size_NM.norm(dim=1, keepdim=True).clamp_min(1e-30)
    count = min(num_experts, len(unit_NM))
    found = KMeans(count, n_init=1, random_state=seed, max_iter=30).fit(unit_NM.numpy())
    expert_N = torch.as_tensor(found.labels_, dtype=torch.int64)
    draw = torch.Generator().manual_seed(seed)
    order_ER = torch.zeros(num_experts, modules_per_expert, dtype=torch.int64)
    for _ in range(_TURNS):
        for expert in range(num_experts):
            rows = torch.nonzero(expert_N == expert).flatten()
            if len(rows) < _FEWEST_ROWS:  # an expert that nothing needs begins anew somewhere else
                rows = torch.randint(len(expert_N), (_FEWEST_ROWS,), generator=draw)
            order_ER[expert] = eliminate(gram_NMM[rows].mean(0, dtype=torch.float64), shared)[:modules_per_expert]
        member_EM = torch.zeros(num_experts, gram_NMM.shape[1], dtype=torch.bool).scatter_(1, order_ER, True)
        nearest_N = outputs.errors_NE(member_EM).argmin(1)
        if torch.equal(nearest_N, expert_N):
            break
        expert_N = nearest_N
    return _of_ranking(order_ER, gram_NMM.shape[1], number_names(num_experts))


def assign_modules(
    outputs: ModuleOutputs,
    task_names: tuple[str, ...],
    *,
    num_experts: int,
    modules_per_expert: int,
    shared_modules: int = 0,
    core_modules: int = 0,
    coverage: bool = False,
    seed: int = 0,
) -> Assignment:
    """Return an expert for each module that is not shared."""
    return single_modules(eliminate(outputs.gram_PMM().mean(0), torch.arange(core_modules)), shared_modules)


def single_modules(order_M: Tensor, shared_modules: int) -> Assignment:
    """Return an expert for each module but the first of ``order_M``, which all of them have."""
    shared, own = order_M[:shared_modules], order_M[shared_modules:].sort().values
    order_ER = torch.cat([shared.expand(len(own), -1), own.unsqueeze(1)], 1)
    return _of_ranking(order_ER, len(order_M), number_names(len(own)))


def number_names(count: int) -> tuple[str, ...]:
    """Return names for experts that are no tasks."""
    return tuple(f"e{number:0{len(str(count - 1))}d}" for number in range(count))


def _of_ranking(order_ER: Tensor, modules: int, names: tuple[str, ...]) -> Assignment:
    membership_EM = torch.zeros(len(order_ER), modules, dtype=torch.bool).scatter_(1, order_ER, True)
    return Assignment(membership_EM, names, order_ER)
