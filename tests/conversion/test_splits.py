"""Published splits against plain loops on an FFN whose answer is known, and whole conversions with them."""

# Shapes: N rows, D model width, F neurons, M modules, E experts

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from modmoe import api
from modmoe.analysis.modules import Partition
from modmoe.conversion.driver import convert
from modmoe.conversion.modular.layerwise import Rows
from modmoe.conversion.modular.routers import route
from modmoe.conversion.modular.settled import settle
from modmoe.conversion.modular.steps import fit_options
from modmoe.conversion.options import check_recipe
from modmoe.conversion.splits.cmoe import MARKED, carve, markers
from modmoe.conversion.splits.moefication import active_mass, begin_mlp, train_mlp
from modmoe.conversion.splits.table import SPLITS
from modmoe.errors import ModmoeError
from modmoe.models.ffn_layout import FFNWeights
from modmoe.models.inspection import inspect
from modmoe.models.loading import load
from modmoe.recipe.schema import Recipe, load_recipe, make_recipe
from modmoe.storage.checkpoint import Checkpoint
from tests.support.tiny import save_dense, token_ids, write_tasks

MODULES, NEURONS, WIDTH, ROWS = 4, 24, 12, 200


def planted(count: int = ROWS) -> tuple[Rows, FFNWeights, Tensor]:
    """Return a ReLU FFN whose neurons are of four kinds, each on for its own rows, and the kind of each neuron."""
    draw = torch.Generator().manual_seed(0)
    kind_F = torch.randperm(NEURONS, generator=draw) % MODULES
    centre_MD = 4 * torch.linalg.qr(torch.randn(WIDTH, MODULES, generator=draw))[0].T
    up_FD = centre_MD[kind_F] + 0.1 * torch.randn(NEURONS, WIDTH, generator=draw)
    topic_N = torch.randint(0, MODULES, (count,), generator=draw)
    x_ND = centre_MD[topic_N] + 0.3 * torch.randn(count, WIDTH, generator=draw)
    hidden_NF = (x_ND @ up_FD.T).relu()
    down_DF = torch.randn(WIDTH, NEURONS, generator=draw)
    rows = Rows(x_ND, hidden_NF, torch.zeros(count, dtype=torch.int64), torch.arange(count) // 10)
    return rows, FFNWeights(None, up_FD, down_DF), kind_F


def recipe_of(method: str, **more: Any) -> Recipe:
    values = {"method": method, "partition.num_modules": MODULES, "assignment.active_fraction": 0.5, **more}
    return settle(make_recipe(values))


def test_markers_are_the_largest_of_each_row() -> None:
    hidden_NF = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    for hidden_F, marker_F in zip(hidden_NF, markers(hidden_NF), strict=True):
        ranked = sorted(range(30), key=lambda i: -abs(float(hidden_F[i])))
        assert sorted(marker_F.nonzero().flatten().tolist()) == sorted(ranked[:MARKED])


@pytest.mark.parametrize("seed", range(3))
def test_cmoe_is_its_plain_loop(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    # rates that all differ, so that there is one order
    hidden_NF = torch.randn(300, 60, generator=draw) * torch.linspace(0.5, 2, 60)
    marker = markers(hidden_NF).tolist()
    rate = [sum(row[i] for row in marker) for i in range(60)]
    ranked = sorted(range(60), key=lambda i: (-rate[i], i))
    partition, neuron_E = carve(hidden_NF, 6, 2, steps=1)
    assert {i for i in range(60) if partition.module_F[i] < 2} == set(ranked[:20])
    own = ranked[20:]
    cost = [[sum(abs(row[i] - row[first]) for row in marker) for first in own[:4]] for i in own]
    given = [int(partition.module_F[i]) - 2 for i in own]
    # no cycle of exchanges makes the total less: the assignment is the best of equal sizes
    for length in (2, 3):
        for points in torch.combinations(torch.arange(len(own)), length).tolist():
            moved = [given[p] for p in points[1:] + points[:1]]
            stay = sum(cost[p][given[p]] for p in points)
            assert sum(cost[p][e] for p, e in zip(points, moved, strict=True)) >= stay - 1e-9
    for expert in range(4):
        members = [i for i in own if int(partition.module_F[i]) == expert + 2]
        centre = [sum(row[i] for i in members) / len(members) for row in marker]
        apart = {i: sum(abs(row[i] - c) for row, c in zip(marker, centre, strict=True)) for i in members}
        assert apart[int(neuron_E[expert])] <= min(apart.values()) + 1e-3


def test_cmoe_shares_what_is_always_on_and_finds_the_experts_of_each_row() -> None:
    rows, weights, kind_F = planted()
    hidden_NF = rows.hidden_NF.clone()
    always = (kind_F == 0).nonzero().flatten()
    hidden_NF[:, always] = 100.0
    rows = Rows(rows.x_ND, hidden_NF, rows.task_N, rows.sequence_N)
    recipe = recipe_of("cmoe", **{"assignment.active_fraction": 0.5})
    fit = SPLITS["cmoe"].split(rows, Partition(torch.arange(NEURONS) % MODULES, MODULES), weights, fit_options(recipe))
    assert fit.partition is not None
    assert fit.assignment.shared_M.nonzero().flatten().tolist() == [0]
    assert set(fit.partition.module_F[always].tolist()) == {0}
    chosen_N = route(fit.start, rows.x_ND).argmax(1)
    busiest_N = active_mass(hidden_NF, fit.partition)[:, 1:].argmax(1)
    # rows of the shared kind have no expert of their own
    clear_N = active_mass(hidden_NF, fit.partition)[:, 1:].max(1).values > 20
    assert clear_N.sum() > 100
    assert float((chosen_N == busiest_N)[clear_N].float().mean()) > 0.95


@pytest.mark.parametrize("method", ["emoe", "moefication"])
def test_routers_of_keys_are_mean_rows(method: str) -> None:
    rows, weights, kind_F = planted()
    partition = Partition(kind_F, MODULES)
    fit = SPLITS[method].split(rows, partition, weights, recipe_of(method, **{"router.kind": "linear"}))
    assert fit.partition is None and fit.start.weight_ED is not None
    for expert in range(MODULES):
        keys = [weights.up_FD[i] for i in range(NEURONS) if int(kind_F[i]) == expert]
        if method == "moefication":
            keys = [key / key.norm() for key in keys]
        torch.testing.assert_close(fit.start.weight_ED[expert], sum(keys) / len(keys))
    gated = FFNWeights(torch.randn(NEURONS, WIDTH), weights.up_FD, weights.down_DF)
    other = SPLITS[method].split(rows, partition, gated, recipe_of(method, **{"router.kind": "linear"}))
    assert other.start.weight_ED is not None and not torch.allclose(other.start.weight_ED, fit.start.weight_ED)


def test_moefication_begins_as_similarity_and_learns_what_that_cannot_tell() -> None:
    rows, _, kind_F = planted(2000)
    partition = Partition(kind_F, MODULES)
    mass_NE = active_mass(rows.hidden_NF, partition)
    loop = [[sum(abs(float(h)) for h in row[kind_F == e]) for e in range(MODULES)] for row in rows.hidden_NF[:50] - 1]
    torch.testing.assert_close(active_mass(rows.hidden_NF[:50] - 1, partition), torch.tensor(loop))
    centre_ED = torch.randn(MODULES, WIDTH, generator=torch.Generator().manual_seed(3))
    start = begin_mlp(centre_ED)
    torch.testing.assert_close(route(start, rows.x_ND), rows.x_ND @ centre_ED.T, rtol=1e-4, atol=1e-4)
    trained = train_mlp(rows.x_ND, mass_NE, centre_ED, 1, 0)
    right = [
        float((route(router, rows.x_ND).argmax(1) == mass_NE.argmax(1)).float().mean()) for router in (start, trained)
    ]
    assert right[1] > 0.95 > right[0]
    # lengths of rows change no choice
    scaled_NE = route(trained, 7 * rows.x_ND)
    assert torch.equal(scaled_NE.argmax(1), route(trained, F.normalize(rows.x_ND, dim=1)).argmax(1))


def test_llama_moe_scales_what_experts_add_up_to() -> None:
    rows, weights, kind_F = planted()
    fit = SPLITS["llama_moe"].split(rows, Partition(kind_F, MODULES), weights, recipe_of("llama_moe"))
    assert fit.down_DF is not None
    torch.testing.assert_close(fit.down_DF, weights.down_DF * (4 / 2))
    again = SPLITS["llama_moe"].split(rows, Partition(kind_F, MODULES), weights, recipe_of("llama_moe", seed=1))
    assert fit.start.hidden_HD is not None and fit.start.hidden_HD.shape == (MODULES, WIDTH)
    assert again.start.hidden_HD is not None and not torch.equal(again.start.hidden_HD, fit.start.hidden_HD)
    assert recipe_of("llama_moe").partition.method == "random"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("splits")
    return {name: save_dense(home / name, name) for name in ("llama", "gpt2")}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
@pytest.mark.parametrize("method", SPLITS)
def test_a_split_is_a_checkpoint_like_any_other(
    tmp_path: Path, sources: dict[str, Path], method: str, model_type: str
) -> None:
    recipe = make_recipe(
        {
            "source": str(sources[model_type]),
            "method": method,
            "tasks": write_tasks(tmp_path / "tasks", rows=8),
            "partition.num_modules": 8,
            "calibration.tokens": 200,
            "calibration.sequence_length": 32,
        }
    )
    check_recipe(recipe)
    out = tmp_path / "out"
    result = convert(recipe, str(out))
    assert result["verified"]["max_abs_logit_diff_all_on"] <= 1e-8
    assert result["verified"]["modules_left_out"] == 0
    config = json.loads((out / "config.json").read_text())
    shared = 2 if method == "cmoe" else 0
    assert (config["shared_modules"], config["num_experts_per_tok"], config["num_experts"]) == (
        shared,
        4 - shared,
        8 - shared,
    )
    assert inspect(str(out))["method"] == method
    # half of the neurons, whatever the method
    dense, active = (inspect(str(out))["parameters"][name] for name in ("dense", "active"))
    checkpoint = Checkpoint(out)
    routers = sum(checkpoint[name].numel() for name in checkpoint if ".router." in name)
    gated, biased = (3, 48 * 2) if model_type == "llama" else (2, 48)
    assert dense - active + routers == 2 * (gated * 48 * 32 + biased) // 2
    model = load(str(out), device="cpu")
    assert torch.isfinite(model(token_ids()).logits).all()


def test_cmoe_keeps_the_modules_that_it_made(tmp_path: Path, sources: dict[str, Path]) -> None:
    from modmoe.analysis.modules import load_partitions

    recipe = make_recipe(
        {
            "source": str(sources["llama"]),
            "method": "cmoe",
            "tasks": write_tasks(tmp_path / "tasks", rows=8),
            "partition.num_modules": 8,
            "calibration.tokens": 200,
        }
    )
    convert(recipe, str(tmp_path / "out"))
    dense, made = Checkpoint(sources["llama"]), Checkpoint(tmp_path / "out")
    for layer, partition in enumerate(load_partitions(tmp_path / "out" / "analysis" / "partition.safetensors")):
        assert not torch.equal(partition.module_F, torch.arange(48) // 6)
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        assert torch.equal(made[name], dense[name][partition.permutation_F])


REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("cmoe", {"router.routing": "task"}, "router.routing: cmoe chooses by token"),
    ("cmoe", {"router.combine": "sum"}, "router.combine: cmoe adds experts up by union"),
    ("cmoe", {"assignment.score": "output_norm"}, "assignment.score: cmoe makes modules"),
    ("cmoe", {"assignment.shared_modules": 4}, "leave nothing to choose of 4 active modules"),
    ("emoe", {"router.kind": "mlp"}, "router.kind: the router of emoe is linear"),
    ("emoe", {"assignment.method": "greedy"}, "assignment.method: emoe makes every module an expert"),
    ("moefication", {"assignment.shared_modules": 1}, "assignment.shared_modules: moefication shares none"),
    ("moefication", {"assignment.num_experts": 3}, "assignment.num_experts: moefication has an expert for each"),
    ("llama_moe", {"router.combine": "union"}, "router.combine: llama_moe adds experts up by sum"),
    ("llama_moe", {"assignment.refit": True}, "llama_moe has neither"),
]


@pytest.mark.parametrize(("method", "more", "message"), REFUSALS)
def test_what_a_split_has_not_is_refused(method: str, more: dict[str, Any], message: str) -> None:
    recipe = make_recipe({"method": method, "partition.num_modules": 8, **more})
    with pytest.raises(ModmoeError, match=message):
        check_recipe(recipe)


def test_fit_bytes_is_refused() -> None:
    with pytest.raises(ModmoeError, match="--fit-bytes: emoe keeps every module"):
        api.convert("dense", "out", method="emoe", tasks={"sums": "sums.jsonl"}, fit_bytes=1000)


@pytest.mark.parametrize("method", SPLITS)
def test_each_has_a_recipe(repository: Path, method: str) -> None:
    recipe = load_recipe(repository / "recipes" / f"{method.replace('_', '-')}.yaml")
    assert recipe.method == method
    check_recipe(recipe)


def test_what_is_given_wins_over_the_defaults_of_a_method() -> None:
    assert make_recipe({"method": "cmoe"}).router.kind == "mlp"
    assert make_recipe({"method": "cmoe", "router.kind": "linear"}).router.kind == "linear"
    assert make_recipe({"method": "modular"}).router.kind == "linear"
    # half of the active modules are shared, but for those that are asked for
    assert recipe_of("cmoe", **{"partition.num_modules": 12}).assignment.shared_modules == 3
    asked = recipe_of("cmoe", **{"partition.num_modules": 12, "assignment.shared_modules": 2})
    assert (asked.assignment.shared_modules, asked.router.top_k) == (2, 4)
