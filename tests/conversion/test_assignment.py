"""Experts of equal size, the best coverage there is, and orders with few runs."""

# Shapes: P tasks, M modules, E experts

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from modmoe.conversion.modular.assignment import Assignment, assign_at_random, assign_top_score, seriate
from modmoe.conversion.modular.assignments import ASSIGNMENTS
from modmoe.errors import PartitionError

BY_SCORES = {name: row.by_scores for name, row in ASSIGNMENTS.items() if row.by_scores is not None}


def scores(tasks: int, modules: int, seed: int = 0) -> Tensor:
    return torch.rand(tasks, modules, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def names(count: int) -> tuple[str, ...]:
    return tuple(f"e{expert}" for expert in range(count))


def standard(scores_PM: Tensor) -> Tensor:
    return (scores_PM - scores_PM.mean(1, keepdim=True)) / scores_PM.std(1, keepdim=True, correction=0)


def runs(membership_EM: Tensor) -> list[int]:
    padded = torch.nn.functional.pad(membership_EM.long(), (1, 0))
    return [int(count) for count in (padded.diff(dim=1) == 1).sum(1)]


@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("method", BY_SCORES)
@pytest.mark.parametrize(
    ("experts", "modules", "size", "shared"), [(3, 16, 8, 2), (1, 4, 4, 0), (4, 16, 6, 2), (5, 9, 9, 9)]
)
def test_experts_have_their_modules_and_the_shared_ones(
    method: str, coverage: bool, experts: int, modules: int, size: int, shared: int
) -> None:
    options = {"modules_per_expert": size, "shared_modules": shared, "coverage": coverage, "seed": 3}
    assign = BY_SCORES[method]
    one, two = (assign(scores(experts, modules), names(experts), **options) for _ in range(2))
    assert torch.equal(one.membership_EM, two.membership_EM)
    assert one.membership_EM.sum(1).tolist() == [size] * experts
    assert one.modules_per_expert == size
    assert int(one.shared_M.sum()) >= shared
    if coverage:
        assert bool(one.used_M.all())


def test_top_score_takes_the_common_core_and_then_each_ones_best() -> None:
    scores_PM = torch.tensor([[9.0, 1, 5, 4, 0, 0], [800, 100, 0, 0, 500, 400]], dtype=torch.float64)
    made = assign_top_score(scores_PM, ("a", "b"), modules_per_expert=3, shared_modules=1, coverage=False, seed=0)
    assert made.membership_EM.long().tolist() == [[1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 1, 1]]
    torch.testing.assert_close(made.overlap_EE(), torch.tensor([[1, 1 / 3], [1 / 3, 1]], dtype=torch.float64))
    # of modules that score alike the first is taken
    level = assign_top_score(
        torch.ones(2, 5), ("a", "b"), modules_per_expert=2, shared_modules=1, coverage=False, seed=0
    )
    assert level.membership_EM.long().tolist() == [[1, 1, 0, 0, 0]] * 2


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("experts", "modules", "size"), [(2, 6, 3), (3, 6, 2), (3, 5, 2), (2, 6, 4)])
def test_coverage_costs_the_least_score_there_is(seed: int, experts: int, modules: int, size: int) -> None:
    # tasks that agree leave many modules to nobody, so that there is much to mend
    scores_PM = scores(1, modules, seed) + 0.3 * scores(experts, modules, seed + 50)
    made = assign_top_score(scores_PM, names(experts), modules_per_expert=size, shared_modules=0, coverage=True, seed=0)
    value_PM = standard(scores_PM)
    best = max(
        sum(float(value_PM[e, list(chosen)].sum()) for e, chosen in enumerate(choice))
        for choice in itertools.product(itertools.combinations(range(modules), size), repeat=experts)
        if len(set(itertools.chain(*choice))) == modules
    )
    assert float(value_PM[made.membership_EM].sum()) == pytest.approx(best)


def test_random_draws_differ_with_the_seed_and_know_no_scores() -> None:
    def draw(seed: int, scores_PM: Tensor) -> Tensor:
        options = {"modules_per_expert": 8, "shared_modules": 2, "coverage": False, "seed": seed}
        return assign_at_random(scores_PM, names(3), **options).membership_EM

    assert torch.equal(draw(0, scores(3, 32)), draw(0, scores(3, 32, seed=9)))
    assert not torch.equal(draw(0, scores(3, 32)), draw(1, scores(3, 32)))
    hits_M = torch.stack([draw(seed, scores(3, 32)) for seed in range(100)]).double().mean((0, 1))
    assert float(hits_M.min()) > 0.1
    assert float(hits_M.max()) < 0.45


@pytest.mark.parametrize(
    ("size", "shared", "coverage", "said"),
    [
        (0, 0, False, r"modules_per_expert: 0 is not between 1 and num_modules, 16"),
        (17, 0, False, r"modules_per_expert: 17 is not between"),
        (4, 5, False, r"shared_modules: 5 is not between 0 and the 4 of an expert"),
        (4, -1, False, r"shared_modules: -1 is not between"),
        (5, 2, True, r"cannot cover 16 modules; the least modules_per_expert that does is 7"),
    ],
)
@pytest.mark.parametrize("method", BY_SCORES)
def test_numbers_that_do_not_fit_are_said(method: str, size: int, shared: int, coverage: bool, said: str) -> None:
    def assign(size: int) -> Assignment:
        options = {"modules_per_expert": size, "shared_modules": shared, "coverage": coverage, "seed": 0}
        return BY_SCORES[method](scores(3, 16), names(3), **options)

    with pytest.raises(PartitionError, match=said) as error:
        assign(size)
    assert "\n" not in str(error.value)
    if coverage:
        assert bool(assign(7).used_M.all())


def test_an_assignment_refuses_what_is_no_set_of_experts() -> None:
    with pytest.raises(PartitionError, match="expert 'b' has no modules"):
        Assignment(torch.tensor([[True], [False]]), ("a", "b"))
    with pytest.raises(PartitionError, match="experts have 1 to 2 modules"):
        Assignment(torch.tensor([[True, True], [False, True]]), ("a", "b"))
    with pytest.raises(PartitionError, match="1 names for 2 experts"):
        Assignment(torch.ones(2, 2, dtype=torch.bool), ("a",))
    with pytest.raises(PartitionError, match="a name appears twice"):
        Assignment(torch.ones(2, 2, dtype=torch.bool), ("a", "a"))
    with pytest.raises(PartitionError, match="it is a bool tensor"):
        Assignment(torch.ones(2, 2), ("a", "b"))
    with pytest.raises(PartitionError, match="one expert a task"):
        assign_at_random(scores(2, 4), ("a",), modules_per_expert=2, shared_modules=0, coverage=False, seed=0)


@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize(("experts", "modules", "size"), [(2, 8, 4), (3, 16, 8), (8, 32, 10), (6, 24, 6), (4, 12, 12)])
def test_seriation_keeps_every_used_module_once_and_never_adds_runs(
    experts: int, modules: int, size: int, shared: int
) -> None:
    for seed in range(4):
        made = assign_at_random(
            scores(experts, modules),
            names(experts),
            modules_per_expert=size,
            shared_modules=shared,
            coverage=False,
            seed=seed,
        )
        order_M = seriate(made.membership_EM)
        assert order_M.dtype == torch.int64
        assert sorted(order_M.tolist()) == torch.nonzero(made.used_M).flatten().tolist()
        core = int(made.shared_M.sum())
        assert bool(made.shared_M[order_M[:core]].all())
        plain = torch.cat(
            [torch.nonzero(made.shared_M).flatten(), torch.nonzero(made.used_M & ~made.shared_M).flatten()]
        )
        assert sum(runs(made.membership_EM[:, order_M])) <= sum(runs(made.membership_EM[:, plain]))
        assert torch.equal(order_M, seriate(made.membership_EM))


def test_seriation_of_many_patterns_tries_a_few_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    made = assign_at_random(scores(7, 90), names(7), modules_per_expert=40, shared_modules=0, coverage=False, seed=0)
    all_starts = sum(runs(made.membership_EM[:, seriate(made.membership_EM)]))
    monkeypatch.setattr("modmoe.conversion.modular.assignment._PATH_STEPS", 1)
    order_M = seriate(made.membership_EM)
    assert sorted(order_M.tolist()) == torch.nonzero(made.used_M).flatten().tolist()
    assert sum(runs(made.membership_EM[:, order_M])) < 1.1 * all_starts < 0.5 * sum(runs(made.membership_EM))


@pytest.mark.parametrize("core", [0, 2])
def test_seriation_finds_one_run_an_expert_where_there_is_such_an_order(core: int) -> None:
    for seed in range(5):
        windows_EM = torch.zeros(5, 20, dtype=torch.bool)
        for expert in range(5):
            windows_EM[expert, 3 * expert : 3 * expert + 7] = True
        whole = torch.cat([torch.ones(5, core, dtype=torch.bool), windows_EM], 1)
        shuffled = whole[:, torch.randperm(20 + core, generator=torch.Generator().manual_seed(seed))]
        order_M = seriate(shuffled)
        assert len(order_M) == 19 + core
        found = runs(shuffled[:, order_M])
        # a core in front is a run of its own for all experts but one
        assert sum(found) == (5 if core == 0 else 9)


def test_seriation_of_a_ring_splits_only_what_must_be_split() -> None:
    ring_EM = torch.zeros(8, 8, dtype=torch.bool)
    for expert in range(8):
        ring_EM[expert, [(expert + step) % 8 for step in range(3)]] = True
    found = runs(ring_EM[:, seriate(ring_EM)])
    assert sum(found) == 8 + 2
    assert max(found) == 2


def test_seriation_of_one_expert_is_its_modules() -> None:
    assert seriate(torch.tensor([[True, False, True]])).tolist() == [0, 2]


@pytest.mark.parametrize("coverage", [False, True])
@pytest.mark.parametrize("method", BY_SCORES)
def test_modules_are_ranked_and_the_first_are_the_expert_that_a_smaller_size_gives(method: str, coverage: bool) -> None:
    options = {"shared_modules": 2, "coverage": coverage, "seed": 3}
    made = BY_SCORES[method](scores(3, 16), names(3), modules_per_expert=7, **options)
    assert [sorted(row) for row in made.ranking_ER.tolist()] == [
        row.nonzero()[:, 0].tolist() for row in made.membership_EM
    ]
    assert made.ranking_ER.tolist() != made.ranking_ER.sort(1).values.tolist()
    assert bool((made.ranking_ER[:, :2] == made.ranking_ER[0, :2]).all()), "shared modules come first"
    if method == "top_score" and not coverage:
        for size in range(2, 7):
            smaller = BY_SCORES[method](scores(3, 16), names(3), modules_per_expert=size, **options)
            assert torch.equal(smaller.ranking_ER, made.ranking_ER[:, :size])
    with pytest.raises(PartitionError, match="ranked that are not those"):
        Assignment(made.membership_EM, made.expert_names, (made.ranking_ER + 1) % 16)
