"""Layers fitted one after the other: each to what the converted model really gives it, and repaired where it is."""

# Shapes: T tokens, N rows, D model width, F neurons, M modules

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.analysis.passes.stream import Turn, WholeModel, watched
from modmoe.conversion.driver import convert
from modmoe.conversion.modular import layerwise
from modmoe.conversion.modular.layerwise import LayerFit, Rows, coefficients_TM
from modmoe.conversion.modular.ridge import RidgeSums
from modmoe.errors import ModmoeError, PartitionError, RecipeError
from modmoe.models.families import FAMILIES
from modmoe.models.ffn_layout import FFNWeights
from modmoe.models.loading import load
from modmoe.recipe.schema import Recipe, load_recipe, make_recipe
from modmoe.storage.checkpoint import Checkpoint
from tests.support.tiny import save_dense, write_tasks

METHODS = ("top_score", "greedy", "tokens", "modules")


def settings(tmp_path: Path, model_type: str, **more: Any) -> Recipe:
    return make_recipe(
        {
            "source": str(save_dense(tmp_path / "dense", model_type)),
            "tasks": write_tasks(tmp_path / "tasks"),
            "partition.num_modules": 8,
            "assignment.method": "greedy",
            "assignment.refit": True,
            "assignment.shared_modules": 1,
            "router.compensation": True,
            "calibration.tokens": 300,
            "calibration.sequence_length": 16,
            **({"assignment.num_experts": 5} if more.get("assignment.method") == "tokens" else {}),
            **more,
        }
    )


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return what a conversion read: the rows of each layer, its batches, its weights and what it fitted."""
    found: dict[str, Any] = {"rows": []}
    collect, fit = layerwise.collect_rows, layerwise.fit_layers

    def collecting(*args: Any) -> Rows:
        found["rows"].append(collect(*args))
        return found["rows"][-1]

    def fitting(runner: Any, batches: Any, ffns: Any, partitions: Any, *args: Any) -> list[LayerFit]:
        found.update(batches=batches, ffns=ffns, partitions=partitions)
        found["fits"] = fit(runner, batches, ffns, partitions, *args)
        return found["fits"]

    monkeypatch.setattr(layerwise, "collect_rows", collecting)
    monkeypatch.setattr("modmoe.conversion.modular.steps.fit_layers", fitting)
    return found


CASES = [
    *(("llama", {"assignment.method": method}) for method in METHODS),
    *((model_type, {"assignment.method": "modules"}) for model_type in ("gpt2", "opt", "gemma2", "phi3")),
    ("llama", {"router.routing": "task"}),
    ("llama", {"router.top_k": 2, "router.combine": "sum"}),
    ("qwen2", {"router.kind": "mlp", "assignment.refit": False}),
    ("llama", {"router.compensation": False}),
    ("llama", {"method": "cmoe", "assignment.method": "modules"}),
]


@pytest.mark.parametrize(("model_type", "more"), CASES)
def test_a_layer_is_fitted_to_what_the_converted_model_gives_it(
    tmp_path: Path, seen: dict[str, Any], model_type: str, more: dict[str, Any]
) -> None:
    result = convert(settings(tmp_path, model_type, **more), str(tmp_path / "out"))
    assert result["verified"]["max_abs_logit_diff_all_on"] <= 1e-8
    model = load(str(tmp_path / "out"), device="cpu")
    family, found = FAMILIES[model_type], []
    for task, batches in enumerate(seen["batches"].values()):
        if more.get("router.routing") == "task":
            model.set_expert(task)
        for batch in batches:

            def keep(_: int, x: Tensor, turn: Turn) -> None:
                found.append(turn.real_rows(x.detach()))

            with torch.no_grad(), watched(model, family, Turn(0, task, batch), keep, layers=[1]):
                model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT)
    torch.testing.assert_close(seen["rows"][1].x_ND, torch.cat(found), rtol=2e-3, atol=2e-3)
    dense = WholeModel(load(str(tmp_path / "dense"), device="cpu"), family)
    apart: list[Tensor] = []
    dense.run(seen["batches"], on_input=lambda layer, x, turn: apart.append(turn.real_rows(x)) if layer == 1 else None)
    assert float((torch.cat(apart) - torch.cat(found)).abs().max()) > 0.05


def hidden_and_missing(recipe: Recipe, seen: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first layer's kept activations, what is missing of its output, and what each row skips and has."""
    rows, fit, module_F = seen["rows"][0], seen["fits"][0], seen["partitions"][0].module_F
    coefficient_NM = torch.cat(
        [
            coefficients_TM(fit, x_D.unsqueeze(0), int(task), recipe.router)
            for x_D, task in zip(rows.x_ND, rows.task_N, strict=True)
        ]
    )
    kept_NF = rows.hidden_NF * coefficient_NM[:, module_F]
    missing_ND = (rows.hidden_NF - kept_NF) @ seen["ffns"][0].down_DF.float().T
    return kept_NF, missing_ND, (coefficient_NM == 0).float(), rows.hidden_NF


@pytest.mark.parametrize("method", ["greedy", "modules"])
def test_means_are_those_of_what_is_skipped(tmp_path: Path, seen: dict[str, Any], method: str) -> None:
    recipe = settings(tmp_path, "llama", **{"assignment.method": method, "assignment.refit": False})
    convert(recipe, str(tmp_path / "out"))
    from modmoe.conversion.modular.settled import settle

    _, _, skipped_NM, hidden_NF = hidden_and_missing(settle(recipe), seen)
    down_DF, module_F = seen["ffns"][0].down_DF, seen["partitions"][0].module_F
    for module in range(8):
        skipping = skipped_NM[:, module].bool()
        outputs_ND = hidden_NF[skipping][:, module_F == module] @ down_DF[:, module_F == module].T
        wanted_D = outputs_ND.mean(0) if bool(skipping.any()) else torch.zeros(len(down_DF))
        torch.testing.assert_close(seen["fits"][0].start.means_MD[module], wanted_D, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("compensation", [False, True])
def test_refit_is_the_least_squares_solution(tmp_path: Path, seen: dict[str, Any], compensation: bool) -> None:
    recipe = settings(tmp_path, "llama", **{"router.compensation": compensation})
    convert(recipe, str(tmp_path / "out"))
    kept_NF, missing_ND, skipped_NM, _ = hidden_and_missing(recipe, seen)
    fit, down_DF = seen["fits"][0], seen["ffns"][0].down_DF
    change_FD = (fit.down_DF - down_DF).T
    wide_NX, start_ND = kept_NF, torch.zeros_like(missing_ND)
    if compensation:
        plain = layerwise.LayerFit(fit.assignment, fit.start)
        assert plain.start.means_MD is not None
        wide_NX = torch.cat([kept_NF, skipped_NM], 1)
        change_FD = torch.cat([change_FD, plain.start.means_MD])
    # the error, with what holds ``down`` to what it was, has no slope at the solution
    left_ND = missing_ND - start_ND - wide_NX @ change_FD
    slope_XD = wide_NX.T @ left_ND
    ridge = layerwise._RIDGE * kept_NF.square().sum(0).mean()
    neurons = kept_NF.shape[1]
    torch.testing.assert_close(slope_XD[:neurons], ridge * change_FD[:neurons], rtol=2e-2, atol=2e-2)
    before = missing_ND.square().sum()
    assert float(left_ND.square().sum()) < 0.9 * float(before)
    stored_DF = Checkpoint(tmp_path / "out")["model.layers.0.mlp.down_proj.weight"]
    kinds = {tuple(column.tolist()) for column in fit.down_DF.T}
    assert all(tuple(column.tolist()) in kinds for column in stored_DF.T)


def test_a_router_that_picks_modules_starts_as_it_is_told(tmp_path: Path, seen: dict[str, Any]) -> None:
    weights = {}
    for start in ("logistic", "centroid", "zero"):
        more = {"assignment.method": "modules", "router.start": start}
        convert(settings(tmp_path / start, "llama", **more), str(tmp_path / start / "out"))
        weights[start] = seen["fits"][0].start.weight_ED
    assert not weights["zero"].any()
    assert weights["centroid"].any() and weights["logistic"].any()
    assert not torch.equal(weights["centroid"], weights["logistic"])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"router.routing": "sequence"}, "router.routing: sequence"),
        ({"assignment.method": "modules", "router.routing": "task"}, "experts are no tasks"),
        ({"assignment.method": "modules", "assignment.shared_modules": 4}, "leave nothing to choose"),
        ({"assignment.method": "greed"}, "Did you mean 'greedy'"),
        ({"assignment.method": "modules", "assignment.num_experts": 3}, "there is one a module that is not shared, 7"),
        ({"assignment.method": "modules", "router.top_k": 2}, "it follows from the active modules, 3"),
        ({"assignment.method": "tokens", "assignment.coverage": True}, "assignment 'tokens' has none"),
        ({"partition.num_modules": 60_000}, "choose fewer modules"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    recipe = settings(tmp_path, "llama", **more)
    (tmp_path / "dense" / "model.safetensors").unlink()
    with pytest.raises(ModmoeError, match=words):
        convert(recipe, str(tmp_path / "out"))


def test_a_ridge_router_is_fitted_to_every_token_that_is_not_judged_by() -> None:
    draw = torch.Generator().manual_seed(1)
    x_TD, hidden_TF = torch.randn(50, 6, generator=draw), torch.randn(50, 12, generator=draw)
    down_DF = torch.randn(6, 12, generator=draw)
    partition = Partition(torch.arange(12) % 4, 4)
    sums = RidgeSums(partition, FFNWeights(None, torch.randn(12, 6, generator=draw), down_DF))
    sums.add(x_TD[:20], hidden_TF[:20])
    sums.add(x_TD[20:], hidden_TF[20:])
    # the loop: what each module puts out for each token, and the normal equations of all of them
    value = torch.zeros(50, 4, dtype=torch.float64)
    for token in range(50):
        for neuron in range(12):
            value[token, neuron % 4] += float(hidden_TF[token, neuron] * down_DF[:, neuron].norm()) ** 2
    value = value.sqrt()
    gram = x_TD.double().T @ x_TD.double()
    weight = torch.linalg.solve(gram + 1e-2 * gram.diagonal().mean() * torch.eye(6), x_TD.double().T @ value)
    own = torch.tensor([3, 1])
    expected = (weight / value[:, own].mean()).T[own]
    torch.testing.assert_close(sums.router_of(own), expected.float(), rtol=1e-4, atol=1e-5)


def test_experts_share_the_core_and_a_ridge_router_chooses_the_others(tmp_path: Path, seen: dict[str, Any]) -> None:
    values = {"assignment.method": "modules", "assignment.shared_modules": 0, "router.start": "ridge"}
    recipe = settings(tmp_path, "llama", **values, **{"partition.core_fraction": 0.5})
    result = convert(recipe, str(tmp_path / "out"))
    assert result["verified"]["max_abs_logit_diff_all_on"] <= 1e-8
    for fit in seen["fits"]:
        assert fit.assignment.shared_M.nonzero().flatten().tolist() == [0, 1]
        assert fit.start.weight_ED.shape == (6, 32)


@pytest.mark.parametrize(
    "values",
    [
        {"assignment.method": "greedy"},
        {"assignment.method": "modules", "router.kind": "mlp"},
        {"assignment.method": "top_score", "assignment.refit": False},
    ],
)
def test_a_ridge_router_is_for_modules(tmp_path: Path, values: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"^router.start: ridge is for assignment 'modules' and a linear router"):
        convert(settings(tmp_path, "llama", **values, **{"router.start": "ridge"}), str(tmp_path / "out"))


def test_the_size_of_a_module_stands_for_their_number(tmp_path: Path) -> None:
    values = {"assignment.method": "modules", "assignment.shared_modules": 0, "router.compensation": False}
    by_number = convert(settings(tmp_path, "llama", **values, **{"partition.num_modules": 12}), str(tmp_path / "a"))
    recipe = settings(tmp_path, "llama", **values, **{"partition.module_size": by_number["module_size"]})
    by_size = convert(recipe, str(tmp_path / "b"))
    assert by_number["num_modules"] == by_size["num_modules"] == 12
    tensors = [Checkpoint(tmp_path / name) for name in "ab"]
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
    record = load_recipe(tmp_path / "b" / "modmoe.yaml")
    assert (record.partition.num_modules, record.partition.module_size) == (12, None)
    with pytest.raises(PartitionError, match=r"^partition.module_size: 7 does not divide the 48 neurons .*: 6, 8\.$"):
        convert(settings(tmp_path, "llama", **values, **{"partition.module_size": 7}), str(tmp_path / "c"))
