"""Whole conversions of every family, from text to a checkpoint that plain transformers could load."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from modmoe.analysis.score import SCORES
from modmoe.conversion.driver import convert
from modmoe.models.families import FAMILIES
from modmoe.models.loading import load
from modmoe.recipe.schema import load_recipe, make_recipe
from modmoe.storage.checkpoint import MANIFEST, Checkpoint, tensor_sha256
from tests.support.tiny import save_dense, token_ids, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"))


def recipe(source, tasks, **changes):
    return make_recipe(
        {
            "source": str(source),
            "tasks": tasks,
            "partition.num_modules": 8,
            "calibration.tokens": 400,
            "calibration.sequence_length": 64,
            **changes,
        }
    )


@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_converts(tmp_path, tasks, model_type):
    source = save_dense(tmp_path / "dense", model_type)
    found = convert(recipe(source, tasks, **{"assignment.coverage": True}), str(tmp_path / "out"))
    assert found["verified"]["modules_left_out"] == 0
    assert found["verified"]["dtype"] == "float64"
    assert found["verified"]["max_abs_logit_diff_all_on"] <= 1e-10
    assert found["model_type"] == f"modmoe_{model_type}"
    assert [expert["name"] for expert in found["experts"]] == list(tasks)
    model = load(tmp_path / "out")
    assert torch.isfinite(model(token_ids()).logits).all()
    assert load_recipe(tmp_path / "out" / "modmoe.yaml") == recipe(source, tasks, **{"assignment.coverage": True})


@pytest.mark.parametrize("score", sorted(SCORES))
def test_every_score(tmp_path, tasks, score):
    source = save_dense(tmp_path / "dense")
    convert(recipe(source, tasks, **{"assignment.score": score}), str(tmp_path / "out"))
    scores = json.loads((tmp_path / "out" / "analysis" / "scores.json").read_text())["layers"]
    config = Checkpoint(tmp_path / "out").config
    assert len(scores) == config["num_hidden_layers"]
    assert all(len(values) == 8 and max(values) > 0 for layer in scores for values in layer.values())


def test_the_same_seed_gives_the_same_bytes(tmp_path, tasks):
    source = save_dense(tmp_path / "dense")
    for name in ("one", "two"):
        convert(recipe(source, tasks), str(tmp_path / name))
    one, two = (Checkpoint(tmp_path / name) for name in ("one", "two"))
    assert {name: tensor_sha256(one[name]) for name in one} == {name: tensor_sha256(two[name]) for name in two}
    assert (tmp_path / "one" / MANIFEST).read_bytes() == (tmp_path / "two" / MANIFEST).read_bytes()


def test_one_corpus_is_clustered_into_experts(tmp_path, tasks):
    source = save_dense(tmp_path / "dense")
    found = convert(recipe(source, {"words": tasks["words"]}, **{"assignment.num_experts": 2}), str(tmp_path / "out"))
    assert [expert["name"] for expert in found["experts"]] == ["cluster0", "cluster1"]


def test_shared_modules_come_first_and_belong_to_all(tmp_path, tasks):
    source = save_dense(tmp_path / "dense")
    convert(recipe(source, tasks, **{"assignment.shared_modules": 2}), str(tmp_path / "out"))
    made = Checkpoint(tmp_path / "out")
    for layer in range(2):
        membership_ES = made[f"model.layers.{layer}.mlp.membership"]
        assert membership_ES.dtype == torch.bool
        assert membership_ES[:, :2].all()
        assert (membership_ES.sum(1) == 4).all()
        assert membership_ES.any(0).all()


@pytest.mark.parametrize("routing", ["token", "sequence", "task"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_routing_and_type(tmp_path, tasks, routing, dtype):
    source = save_dense(tmp_path / "dense", "qwen2", dtype=dtype)
    found = convert(
        recipe(source, tasks, **{"router.routing": routing, "router.compensation": True}), str(tmp_path / "out")
    )
    made = Checkpoint(tmp_path / "out")
    assert {made.dtype(name) for name in made} == {dtype, torch.bool, torch.int32}
    assert any("router" in name for name in made) == (routing != "task")
    assert found["routing"] == routing


def test_a_dry_run_writes_nothing_and_bounds_what_comes(tmp_path, tasks):
    source = save_dense(tmp_path / "dense")
    plan = convert(recipe(source, tasks), str(tmp_path / "out"), dry_run=True)
    assert not (tmp_path / "out").exists()
    found = convert(recipe(source, tasks), str(tmp_path / "out"))
    router = found["parameters"]["stored"] - sum(
        Checkpoint(source)[name].numel() for name in Checkpoint(source) if ".mlp." not in name
    )
    assert router > 0
    assert plan["parameters"]["dense"] == found["parameters"]["dense"]
    slack = 3 * 32 * 2 + 1000
    assert plan["parameters"]["stored_at_least"] - slack <= found["parameters"]["stored"]
    assert found["parameters"]["stored"] <= plan["parameters"]["stored_at_most"] + slack


def test_the_source_is_left_alone(tmp_path, tasks):
    source = save_dense(tmp_path / "dense")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    convert(recipe(source, tasks), str(tmp_path / "out"))
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before


@torch.no_grad()
def test_a_model_cut_at_run_time_is_the_one_converted_with_fewer_modules(tmp_path, tasks):
    """Every prefix of an expert is an expert; the ranking goes with the checkpoint, and an older one has none."""
    source = save_dense(tmp_path / "dense")
    models = {}
    for size in (2, 4):
        asked = {"router.routing": "task", "assignment.modules_per_expert": size, "assignment.shared_modules": 1}
        convert(recipe(source, tasks, **asked), str(tmp_path / str(size)))
        models[size] = load(tmp_path / str(size), dtype=torch.float64)
    ids = token_ids()
    models[4].save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again", dtype=torch.float64)
    for name in tasks:
        for model in (*models.values(), again):
            model.set_expert(name)
        wanted, whole = models[2](ids).logits, models[4](ids).logits
        for model in (models[4], again):
            for way in ("masked", "runs"):
                model.set_ffn_way(way)
                model.set_active_modules(2)
                torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-9, atol=1e-9)
                model.set_active_modules(None)
                torch.testing.assert_close(model(ids).logits, whole, rtol=1e-9, atol=1e-9)
        assert (whole - wanted).abs().max() > 1e-3
    with pytest.raises(ValueError, match="5 is not between 1 and 4"):
        again.set_active_modules(5)

    weights = load_file(tmp_path / "again" / "model.safetensors")
    older = {name: weight for name, weight in weights.items() if not name.endswith("ranking")}
    assert len(older) == len(weights) - 2
    save_file(older, tmp_path / "again" / "model.safetensors", metadata={"format": "pt"})
    without = load(tmp_path / "again", dtype=torch.float64)
    for ffn in (layer.mlp for layer in without.model.layers):
        assert [row.nonzero()[:, 0].tolist() for row in ffn.membership] == ffn.ranking.tolist()
    without.set_expert(next(iter(tasks)))
    without.set_active_modules(2)
    assert torch.isfinite(without(ids).logits).all()
