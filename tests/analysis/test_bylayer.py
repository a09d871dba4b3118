"""One layer in memory at a time gives what the whole model gives, to the bit."""

# Shapes: P tasks, B sequences of a batch, T tokens, D model width, F neurons

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.analysis.partitions.table import Partition
from modmoe.analysis.passes.by_layer import ByLayer, model_bytes
from modmoe.analysis.passes.clusters import cluster_sequences
from modmoe.analysis.passes.stream import Runner, Turn, WholeModel
from modmoe.analysis.profile import profile_model
from modmoe.analysis.run import open_runner
from modmoe.analysis.source import open_source
from modmoe.analysis.text.calibration import Batch
from modmoe.conversion.driver import convert
from modmoe.conversion.modular.assignment import Assignment
from modmoe.conversion.modular.routers import start_routers
from modmoe.errors import CalibrationError, CheckpointError, RecipeError
from modmoe.models.families import FAMILIES
from modmoe.models.ffn_layout import LazyFFNs
from modmoe.models.loading import load
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import RouterRecipe, make_recipe
from modmoe.runtime.progress import silent
from modmoe.storage.checkpoint import Checkpoint
from tests.support.tiny import NEURONS, save_dense, write_tasks

FIELDS = ("tokens_P", "sum_PF", "abs_PF", "square_PF", "norm_PM", "rows_SF")
PARTITION = Partition(torch.arange(NEURONS) % 8, 8)


def batches() -> dict[str, list[Batch]]:
    """Return two tasks, with padding; sequences are longer than the sliding windows there are."""
    generator = torch.Generator().manual_seed(0)
    made: dict[str, list[Batch]] = {}
    for name, shapes in {"a": ((3, 21), (2, 24)), "b": ((4, 30),)}.items():
        made[name] = []
        for batch, tokens in shapes:
            mask_BT = torch.ones(batch, tokens, dtype=torch.int64)
            mask_BT[-1, tokens - 5 :] = 0
            made[name].append(Batch(torch.randint(0, 256, (batch, tokens), generator=generator), mask_BT))
    return made


def save(directory: Path, model_type: str) -> Path:
    """Save a model of three layers, the second with another mask than the others where the family has several."""
    changes: dict[str, Any] = {"num_hidden_layers": 3}
    if model_type in ("gemma2", "gemma3_text", "qwen2"):
        changes["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
        changes["sliding_window"] = 8
    if model_type == "qwen2":
        changes["use_sliding_window"] = True
    return save_dense(directory, model_type, **changes)


def both(directory: Path, model_type: str = "llama", dtype: torch.dtype = torch.float32) -> tuple[WholeModel, ByLayer]:
    """Return both runners of one saved model."""
    family, model = FAMILIES[model_type], OpenedModel(directory)
    model.checkpoint.add_prefix(family.layers)
    by_layer = ByLayer(model, family, scratch=directory, dtype=dtype)
    return WholeModel(load(directory, dtype=dtype), family), by_layer


def outputs(runner: Runner) -> dict[str, Tensor]:
    """Return all that a pass hands out, by what it is, layer and batch."""
    found: dict[str, Tensor] = {}

    def keep(what: str) -> Any:
        def watch(layer: int, tensor: Tensor, turn: Turn) -> None:
            found[f"{what} {layer} {turn.index} {turn.task}"] = tensor.clone()

        return watch

    runner.run(batches(), on_input=keep("x"), on_hidden=keep("h"), on_output=keep("y"))
    return found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_passes_and_profiles_are_the_same(tmp_path: Path, model_type: str) -> None:
    save(tmp_path, model_type)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        whole, by_layer = both(tmp_path, model_type, dtype)
        wanted, found = outputs(whole), outputs(by_layer)
        assert set(found) == set(wanted)
        assert len(found) == 3 * 3 * 3
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype == dtype
            assert torch.equal(found[name], tensor), name
        batch = batches()["b"][0]
        assert torch.equal(by_layer.logits(batch), whole.logits(batch))
        options: dict[str, Any] = {"partitions": [PARTITION] * 3, "sketch_rows": 40}
        profiles = [profile_model(runner, batches(), **options) for runner in (whole, by_layer)]
        assert [len(one) for one in profiles] == [3, 3]
        for one, two in zip(*profiles, strict=True):
            for field in FIELDS:
                assert torch.equal(getattr(one, field), getattr(two, field)), field
    # the file of hidden states is gone, though the runner is still there
    assert sorted(file.name for file in tmp_path.glob(".*")) == []


def test_clusters_and_routers_are_the_same(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    whole, by_layer = both(tmp_path)
    made = [cluster_sequences(runner, batches()["a"], 2, seed=0) for runner in (whole, by_layer)]
    assert list(made[0]) == list(made[1])
    for name in made[0]:
        for one, two in zip(made[0][name], made[1][name], strict=True):
            assert torch.equal(one.input_ids_BT, two.input_ids_BT)
    assignment = Assignment(torch.arange(8).view(1, 8) % 2 == torch.arange(2).view(2, 1), ("a", "b"))
    ffns = LazyFFNs(by_layer.checkpoint, by_layer.family, 3)
    for routing in ("token", "sequence"):
        recipe = RouterRecipe(routing=routing, compensation=True, routing_chunk=8)  # type: ignore[arg-type]
        starts = [
            start_routers(runner, batches(), ffns, [PARTITION] * 3, [assignment] * 3, recipe, 0)
            for runner in (whole, by_layer)
        ]
        for one, two in zip(*starts, strict=True):
            assert one.weight_ED is not None and two.weight_ED is not None
            assert one.means_MD is not None and two.means_MD is not None
            assert torch.equal(one.weight_ED, two.weight_ED)
            assert torch.equal(one.means_MD, two.means_MD)


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    _, by_layer = both(tmp_path)
    filled: list[list[bool]] = []

    def watch(layer: int, *_: Any) -> None:
        layers = by_layer.model.get_submodule("model.layers").children()
        filled.append([not any(weight.is_meta for weight in one.parameters()) for one in layers])

    seen: list[int] = []
    by_layer.run(batches(), on_hidden=watch, progress=seen.append)
    assert filled == [[layer == at for layer in range(3)] for at in range(3) for _ in range(3)]
    assert sum(seen) == sum(batch.num_tokens for task in batches().values() for batch in task)
    assert all(weight.is_meta for weight in by_layer.model.get_submodule("model.layers").parameters())
    # and what is wanted of the first layer alone takes no more than it
    filled.clear()
    by_layer.run(batches(), on_hidden=watch, layers=1)
    assert len(filled) == 3


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt"])
def test_conversions_are_the_same(tmp_path: Path, model_type: str) -> None:
    source, tasks = save_dense(tmp_path / "dense", model_type), write_tasks(tmp_path / "tasks")
    made = []
    for by_layer in (False, True):
        lines: list[str] = []
        recipe = make_recipe(
            {
                "source": str(source),
                "tasks": tasks,
                "partition.num_modules": 8,
                "calibration.tokens": 300,
                "calibration.by_layer": by_layer,
                "assignment.score": "output_norm",
                "assignment.active_fraction": 0.25,
            }
        )
        output = tmp_path / str(by_layer)
        made.append(convert(recipe, str(output), progress=lambda line, *_, lines=lines: lines.append(line)))
        assert any(line.startswith(f"opening the model {'layer by layer' if by_layer else 'whole'}") for line in lines)
        assert not list(output.glob(".hidden*"))
    whole, layers = (Checkpoint(tmp_path / str(by_layer)) for by_layer in (False, True))
    assert set(whole) == set(layers)
    assert all(torch.equal(whole[name], layers[name]) for name in whole)
    # the proof itself, of the tied and of the dense model, is the same too
    assert made[0]["verified"] == made[1]["verified"]
    assert made[1]["verified"]["modules_left_out"] > 0
    assert made[1]["verified"]["max_abs_logit_diff_all_on"] <= 1e-10


def test_a_model_that_does_not_fit_is_run_by_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, tasks = save_dense(tmp_path / "dense"), write_tasks(tmp_path / "tasks")
    values = {"source": str(source), "tasks": tasks, "partition.num_modules": 8, "device": "cpu"}
    size = model_bytes(Checkpoint(source))
    assert size == sum(weight.numel() * 4 for weight in load(source).parameters())
    for free, score, kind in (
        (2 * size, "wanda", WholeModel),
        (2 * size - 1, "wanda", ByLayer),
        (2 * size - 1, "taylor", WholeModel),
    ):
        monkeypatch.setattr("modmoe.analysis.passes.by_layer.free_bytes", lambda _, free=free: free)
        recipe = make_recipe({**values, "assignment.score": score})
        assert type(open_runner(recipe, open_source(recipe), None, silent)) is kind
    with pytest.raises(RecipeError, match=r"by_layer: score taylor needs the whole model; choose another"):
        open_source(make_recipe({**values, "assignment.score": "taylor", "calibration.by_layer": True}))


def test_what_cannot_be_run_by_layer_is_said_in_one_line(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    _, by_layer = both(tmp_path)
    with pytest.raises(CalibrationError, match="gradients need the whole model; choose another score"):
        profile_model(by_layer, batches(), gradients=True)
    by_layer.scratch = tmp_path / "nowhere"
    with pytest.raises(CalibrationError, match=r"nowhere: No such file.* the hidden states need"):
        profile_model(by_layer, batches())
    model = OpenedModel(tmp_path)
    del model.checkpoint._where["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(CheckpointError, match=r"'model.layers.1.mlp.up_proj.weight' is missing; .*by_layer"):
        profile_model(ByLayer(model, FAMILIES["llama"]), batches())
