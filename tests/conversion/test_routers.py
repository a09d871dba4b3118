"""Routers that start above chance, errors and means against naive loops, and what the model will read."""

# Shapes: T tokens, N rows, D model width, F neurons, M modules, E experts, K top_k

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.analysis.partitions.table import Partition
from modmoe.analysis.passes.stream import Turn, WholeModel, watched
from modmoe.analysis.text.calibration import Batch
from modmoe.conversion.modular import least_squares, routers
from modmoe.conversion.modular.assignment import Assignment, assign_at_random
from modmoe.conversion.modular.routers import RouterStart, route, start_routers
from modmoe.models.families import FAMILIES
from modmoe.models.ffn_layout import FFNWeights, LazyFFNs
from modmoe.recipe.schema import RouterRecipe
from tests.support.tiny import NEURONS, dense_model

MODULES, EXPERTS = 8, 3
STARTS = ("logistic", "least_squares", "centroid", "average_key", "zero")


def batches() -> dict[str, list[Batch]]:
    generator = torch.Generator().manual_seed(0)
    made: dict[str, list[Batch]] = {}
    for task, (low, high) in enumerate(((0, 60), (60, 160), (160, 250))):
        ids_BT = torch.randint(low, high, (6, 20), generator=generator)
        mask_BT = torch.ones_like(ids_BT)
        for row in range(6):
            mask_BT[row, 20 - row - task :] = 0
        made[f"t{task}"] = [Batch(ids_BT[:4], mask_BT[:4]), Batch(ids_BT[4:], mask_BT[4:])]
    return made


def setting(model_type: str = "llama") -> tuple[Any, ...]:
    runner = WholeModel(dense_model(model_type), FAMILIES[model_type])
    ffns = LazyFFNs(runner.model.state_dict(), runner.family, 2)
    generator = torch.Generator().manual_seed(1)
    partitions = [Partition(torch.randperm(NEURONS, generator=generator) % MODULES, MODULES) for _ in range(2)]
    scores_PM = torch.zeros(EXPERTS, MODULES)
    assignments = [
        assign_at_random(
            scores_PM, ("t0", "t1", "t2"), modules_per_expert=4, shared_modules=1, coverage=False, seed=layer
        )
        for layer in range(2)
    ]
    return runner, batches(), ffns, partitions, assignments


def seen(runner: WholeModel, made: dict[str, list[Batch]]) -> list[list[list[tuple[Tensor, Tensor]]]]:
    """Return x and h of each layer, task and sequence, one sequence at a time and without padding."""
    found: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in made] for _ in range(2)]
    for task, parts in enumerate(made.values()):
        for batch in parts:
            for ids_T, mask_T in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True):
                kept: dict[tuple[int, str], Tensor] = {}

                def keep(layer: int, tensor: Tensor, what: str, kept: dict[tuple[int, str], Tensor]) -> None:
                    kept[layer, what] = tensor.detach().reshape(-1, tensor.shape[-1])

                on_input = lambda layer, x, _, kept=kept: keep(layer, x, "x", kept)  # noqa: E731
                on_hidden = lambda layer, h, _, kept=kept: keep(layer, h, "h", kept)  # noqa: E731
                with torch.no_grad(), watched(runner.model, runner.family, Turn(0, 0, batch), on_input, on_hidden):
                    runner.model(input_ids=ids_T[mask_T.bool()].unsqueeze(0))
                for layer in range(2):
                    found[layer][task].append((kept[layer, "x"], kept[layer, "h"]))
    return found


def collect(*args: Any) -> list[tuple[Tensor, ...]]:
    found: list[tuple[Tensor, ...]] = []
    routers._collect(*args, 0, None, lambda layer, *rows: found.append(rows))
    return found


def error(h_F: Tensor, down_DF: Tensor, assignment: Assignment, partition: Partition, expert: int) -> float:
    skipped_F = ~assignment.membership_EM[expert][partition.module_F]
    return float((down_DF[:, skipped_F] @ h_F[skipped_F]).square().sum())


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "phi3", "gemma2"])
def test_rows_and_errors_are_those_of_a_naive_loop(model_type: str) -> None:
    runner, made, ffns, partitions, assignments = setting(model_type)
    masks_EF = [a.membership_EM[:, p.module_F] for a, p in zip(assignments, partitions, strict=True)]
    found = collect(runner, made, ffns, masks_EF, RouterRecipe())
    for layer, sequences in enumerate(seen(runner, made)):
        x_ND, error_NE, sequence_N = found[layer]
        tokens = [(x, h, n) for n, (x, h) in enumerate(s for task in sequences for s in task)]
        torch.testing.assert_close(x_ND, torch.cat([x for x, _, _ in tokens]), rtol=1e-3, atol=1e-4)
        assert sequence_N.tolist() == [n for x, _, n in tokens for _ in x]
        wanted = [
            [error(h, ffns[layer].down_DF, assignments[layer], partitions[layer], e) for e in range(EXPERTS)]
            for _, h_TF, _ in tokens
            for h in h_TF
        ]
        torch.testing.assert_close(error_NE, torch.tensor(wanted), rtol=1e-3, atol=1e-3)


def test_sequence_rows_are_what_the_model_will_read() -> None:
    runner, made, ffns, partitions, assignments = setting()
    masks_EF = [a.membership_EM[:, p.module_F] for a, p in zip(assignments, partitions, strict=True)]
    recipe = RouterRecipe(routing="sequence", routing_chunk=8)
    x_ND, error_NE, sequence_N = collect(runner, made, ffns, masks_EF, recipe)[0]
    number = 0
    for task in seen(runner, made)[0]:
        for x_TD, h_TF in task:
            wanted = []
            for start in range(0, len(x_TD), 8):
                read = x_TD[0] if start == 0 else x_TD[:start].mean(0)
                wanted.append((read, h_TF[start : start + 8]))
            wanted.append((x_TD.mean(0), h_TF))
            mine = torch.nonzero(sequence_N == number).flatten()
            assert len(mine) == len(wanted)
            for row, (read_D, part_TF) in zip(mine.tolist(), wanted, strict=True):
                torch.testing.assert_close(x_ND[row], read_D, rtol=1e-3, atol=1e-4)
                total = [
                    sum(error(h, ffns[0].down_DF, assignments[0], partitions[0], e) for h in part_TF)
                    for e in range(EXPERTS)
                ]
                torch.testing.assert_close(error_NE[row], torch.tensor(total), rtol=1e-3, atol=1e-3)
            number += 1


@pytest.mark.parametrize("routing", ["token", "sequence", "task"])
@pytest.mark.parametrize(
    ("start", "kind"), [*((start, "linear") for start in STARTS), ("logistic", "mlp"), ("zero", "mlp")]
)
def test_every_start_has_its_shapes_and_repeats(
    monkeypatch: pytest.MonkeyPatch, start: Any, kind: Any, routing: Any
) -> None:
    monkeypatch.setattr(least_squares, "_MLP_STEPS", 20)
    args = setting()
    recipe = RouterRecipe(start=start, kind=kind, routing=routing, routing_chunk=8)
    first, again = (start_routers(*args, recipe, seed=3) for _ in range(2))
    for one, two in zip(first, again, strict=True):
        assert one.means_MD is None
        assert 0 <= one.agreement <= 1
        weights = [one.weight_ED, one.hidden_HD, one.output_EH]
        shapes = [None if weight is None else tuple(weight.shape) for weight in weights]
        if routing == "task":
            assert shapes == [None, None, None]
            continue
        assert shapes == ([(EXPERTS, 32), None, None] if kind == "linear" else [None, (16, 32), (EXPERTS, 16)])
        for weight, other in zip(weights, [two.weight_ED, two.hidden_HD, two.output_EH], strict=True):
            if weight is not None and other is not None:
                assert weight.dtype == torch.float32
                assert bool(torch.isfinite(weight).all())
                assert torch.equal(weight, other)


def planted(rows: int = 1000, experts: int = 4, width: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Return rows whose best expert is the nearest of some directions, with an error that says so."""
    generator = torch.Generator().manual_seed(0)
    direction_ED = torch.nn.functional.normalize(torch.randn(experts, width, generator=generator), dim=1)
    x_ND = torch.randn(rows, width, generator=generator)
    error_NE = 5 - x_ND @ direction_ED.T
    return x_ND, error_NE.clamp_min(0.01), torch.arange(rows) // 5


def fit(x_ND: Tensor, error_NE: Tensor, sequence_N: Tensor, **settings: Any) -> RouterStart:
    experts = error_NE.shape[1]
    weights = FFNWeights(None, torch.randn(2 * experts, x_ND.shape[1]), torch.randn(3, 2 * experts))
    partition = Partition(torch.arange(2 * experts) // 2, experts)
    assignment = Assignment(torch.eye(experts, dtype=torch.bool), tuple(f"e{e}" for e in range(experts)))
    return routers._fit(x_ND, error_NE, sequence_N, weights, assignment, partition, RouterRecipe(**settings), 0)


@pytest.mark.parametrize(
    ("start", "kind", "least"),
    [
        ("logistic", "linear", 0.9),
        ("least_squares", "linear", 0.85),
        ("centroid", "linear", 0.8),
        ("logistic", "mlp", 0.75),
    ],
)
def test_a_planted_router_is_found(start: str, kind: str, least: float) -> None:
    made = fit(*planted(), start=start, kind=kind)
    assert made.chance < 0.4
    assert made.agreement > least
    assert made.recovered > least
    # the softmax has room, or the router could not learn at top_k 1
    probs_NE = route(made, planted()[0]).softmax(1)
    assert float(probs_NE.max(1).values.mean()) < 0.9
    assert float(probs_NE.max(1).values.mean()) > 0.3


def test_a_router_of_noise_recovers_nothing() -> None:
    x_ND, error_NE, sequence_N = planted()
    shuffled = error_NE[torch.randperm(len(error_NE), generator=torch.Generator().manual_seed(1))]
    made = fit(x_ND, shuffled, sequence_N)
    assert made.recovered < 0.2
    assert abs(made.agreement - made.chance) < 0.15


@pytest.mark.parametrize(("start", "kind"), [*((start, "linear") for start in STARTS[:3]), ("logistic", "mlp")])
def test_experts_that_are_never_best_are_not_chosen(start: str, kind: str) -> None:
    x_ND, error_NE, sequence_N = planted()
    # what the rows have in common is what an intercept would hold
    x_ND = x_ND + 2
    for never in ([3], [1, 3], [1, 2, 3]):
        worse_NE = error_NE.clone()
        worse_NE[:, never] += 100
        made = fit(x_ND, worse_NE, sequence_N, start=start, kind=kind)
        chosen_N = route(made, x_ND).argmax(1)
        assert float(torch.isin(chosen_N, torch.tensor(never)).float().mean()) < 0.02
        assert bool(torch.isfinite(route(made, x_ND)).all())


def test_one_expert_and_experts_all_alike_are_no_trouble() -> None:
    x_ND, error_NE, sequence_N = planted()
    for errors_NE in (error_NE[:, :1], error_NE[:, :1].expand(-1, 3)):
        for start in STARTS[:3]:
            made = fit(x_ND, errors_NE, sequence_N, start=start)
            assert made.recovered == 1.0
            assert bool(torch.isfinite(route(made, x_ND)).all())


def chosen_experts(start: RouterStart, x_D: Tensor, task: int, recipe: RouterRecipe) -> list[int]:
    if recipe.routing == "task":
        return [task]
    return [int(e) for e in route(start, x_D.unsqueeze(0))[0].topk(recipe.top_k).indices]


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("routing", ["token", "sequence", "task"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_compensation_is_the_mean_of_what_is_skipped(model_type: str, routing: Any, top_k: int) -> None:
    args = setting(model_type)
    runner, made, ffns, partitions, assignments = args
    recipe = RouterRecipe(routing=routing, top_k=top_k, compensation=True, routing_chunk=8)
    starts = start_routers(*args, recipe, seed=0)
    for layer, sequences in enumerate(seen(runner, made)):
        total_MD, count_M = torch.zeros(MODULES, 32), torch.zeros(MODULES)
        for task, parts in enumerate(sequences):
            for x_TD, h_TF in parts:
                for t, h_F in enumerate(h_TF):
                    begin = t - t % 8
                    read_D = x_TD[t] if routing == "token" else (x_TD[:begin].mean(0) if begin else x_TD[0])
                    chosen = chosen_experts(starts[layer], read_D, task, recipe)
                    active_M = assignments[layer].membership_EM[chosen].any(0)
                    for module in torch.nonzero(~active_M).flatten().tolist():
                        members = partitions[layer].module_F == module
                        total_MD[module] += ffns[layer].down_DF[:, members] @ h_F[members]
                        count_M[module] += 1
        means_MD = starts[layer].means_MD
        assert means_MD is not None
        torch.testing.assert_close(means_MD, total_MD / count_M.clamp_min(1).unsqueeze(1), rtol=2e-3, atol=2e-3)
        assert bool((means_MD[assignments[layer].shared_M] == 0).all())


def test_kept_rows_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routers, "KEPT_ROWS", 17)
    runner, made, ffns, partitions, assignments = setting()
    masks_EF = [a.membership_EM[:, p.module_F] for a, p in zip(assignments, partitions, strict=True)]
    for routing in ("token", "sequence"):
        recipe = RouterRecipe(routing=routing, routing_chunk=8)  # type: ignore[arg-type]
        for rows in collect(runner, made, ffns, masks_EF, recipe):
            assert [len(part) for part in rows] == [17, 17, 17]
