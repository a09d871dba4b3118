"""Reading and writing checkpoints: lazily, whole or not at all, and nothing unsafe."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import save_file

from modmoe.errors import CheckpointError, ModmoeError, PlanError, RecipeError
from modmoe.storage.checkpoint import (
    INDEX,
    MANIFEST,
    Checkpoint,
    CheckpointWriter,
    parse_bytes,
    resolve_source,
    tensor_sha256,
)
from modmoe.storage.documents import open_tensors
from modmoe.storage.plan import Const, Copy, Plan, Stack, Take
from modmoe.storage.seal import SEAL
from modmoe.storage.staging import open_output
from tests.support.tiny import save_dense


def _write(directory, tensors, shard_bytes=10**9, config=None):
    directory.mkdir(exist_ok=True)
    writer = CheckpointWriter(directory, max_shard_bytes=shard_bytes)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish(config or {"model_type": "llama"})
    return Checkpoint(directory)


@pytest.fixture
def tensors():
    draw = torch.Generator().manual_seed(0)
    return {
        "a": torch.randn(7, 5, generator=draw),
        "b": torch.randn(3, generator=draw).to(torch.bfloat16),
        "c": torch.tensor([[True, False]]),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
    }


@pytest.mark.parametrize("shard_bytes", [1, 100, 10**9])
def test_one_shard_equals_many_shards(tmp_path, tensors, shard_bytes):
    found = _write(tmp_path / "out", tensors, shard_bytes)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert found.shape(name) == tuple(tensor.shape)
        assert found.dtype(name) == tensor.dtype
    assert (tmp_path / "out" / INDEX).exists() == (shard_bytes < 10**9)


def test_manifest_has_the_sum_of_every_tensor(tmp_path, tensors):
    found = _write(tmp_path / "out", tensors, 1)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"]
    assert {name: entry["sha256"] for name, entry in manifest.items()} == {n: tensor_sha256(found[n]) for n in found}


def test_views_are_written_alone(tmp_path):
    whole = torch.arange(1000.0).reshape(100, 10)
    found = _write(tmp_path / "out", {"row": whole[3], "column": whole[:, 2]})
    assert torch.equal(found["row"], whole[3])
    assert torch.equal(found["column"], whole[:, 2])


def test_a_plan_is_checked_from_headers_alone(tmp_path):
    class HeadersOnly(Checkpoint):
        def __getitem__(self, name):
            raise AssertionError(f"{name} was read")

    source = HeadersOnly(save_dense(tmp_path / "dense"))
    shapes = Plan({}, {name: Copy(name) for name in source}).check(source)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (48, 32)


def _damaged(directory, kind):
    """Make a damaged checkpoint of each kind that users meet, and return what the error must say."""
    save_dense(directory)
    weights = directory / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
        return "damaged or cut short"
    if kind == "header":
        weights.write_bytes((10**15).to_bytes(8, "little") + weights.read_bytes()[8:])
        return "damaged or cut short"
    if kind == "no config":
        (directory / "config.json").unlink()
        return "no config.json"
    if kind == "config no json":
        (directory / "config.json").write_text("{")
        return "cannot be read as JSON"
    if kind == "config a list":
        (directory / "config.json").write_text("[]")
        return "not an object"
    if kind == "pickle":
        weights.unlink()
        (directory / "pytorch_model.bin").write_bytes(b"\x80\x04.")
        return "save_pretrained"
    if kind == "nothing":
        weights.unlink()
        return "no model.safetensors"
    names = list(Checkpoint(directory))
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    if kind == "missing shard":
        index["weight_map"][names[0]] = "other.safetensors"
        said = "shard is missing"
    elif kind == "outside":
        index["weight_map"][names[0]] = "../model.safetensors"
        said = "not a plain file name"
    elif kind == "absolute":
        index["weight_map"][names[0]] = str(weights)
        said = "not a plain file name"
    elif kind == "lacking":
        index["weight_map"]["no.such.tensor"] = "model.safetensors"
        said = "is not in model.safetensors"
    else:
        index, said = {"weight_map": []}, "weight_map is missing"
    (directory / INDEX).write_text(json.dumps(index))
    return said


@pytest.mark.parametrize(
    "kind",
    [
        "truncated",
        "header",
        "no config",
        "config no json",
        "config a list",
        "pickle",
        "nothing",
        "missing shard",
        "outside",
        "absolute",
        "lacking",
        "empty index",
    ],
)
def test_damage_is_told_in_one_line(tmp_path, kind):
    said = _damaged(tmp_path / "bad", kind)
    with pytest.raises(CheckpointError, match=said) as caught:
        Checkpoint(tmp_path / "bad")
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_values_that_are_not_finite_are_named(tmp_path):
    found = _write(tmp_path / "out", {"good": torch.ones(3), "bad": torch.tensor([1.0, float("nan")])})
    with pytest.raises(CheckpointError, match="'bad' has values that are not finite"):
        found.check_finite()


def test_a_source_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        resolve_source(tmp_path / "a" / "b" / "c")
    with pytest.raises(CheckpointError, match="is a file"):
        file = tmp_path / "file"
        file.write_text("")
        resolve_source(file)
    with pytest.raises(CheckpointError, match="not to be had from the Hub"):
        resolve_source("nobody/nothing")


@pytest.mark.parametrize(
    ("text", "size_bytes"), [("5GB", 5 * 10**9), ("1.5 MB", 1_500_000), ("2GiB", 2 * 2**30), ("100", 100)]
)
def test_sizes(text, size_bytes):
    assert parse_bytes(text, "here") == size_bytes


@pytest.mark.parametrize("text", ["", "5 apples", "-1GB", "0", "GB"])
def test_sizes_that_are_none(text):
    with pytest.raises(RecipeError, match="is no size"):
        parse_bytes(text, "--max-shard-size")


def test_output_is_whole_or_absent(tmp_path):
    with pytest.raises(ModmoeError), open_output(tmp_path / "out") as partial:
        (partial / "config.json").write_text("x")
        assert partial.name == "out.partial"
        raise PlanError("stop")
    assert list(tmp_path.iterdir()) == []
    with open_output(tmp_path / "out") as partial:
        (partial / "config.json").write_text("x")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_output_in_use_is_refused(tmp_path):
    with open_output(tmp_path / "out") as partial:
        (partial / "README.md").write_text("old")
    with pytest.raises(RecipeError, match="is not empty"), open_output(tmp_path / "out"):
        pass
    with open_output(tmp_path / "out", overwrite=True) as partial:
        (partial / "config.json").write_text("x")
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [SEAL, "config.json"]


def test_a_failed_overwrite_keeps_the_old_output(tmp_path):
    with open_output(tmp_path / "out") as partial:
        (partial / "README.md").write_text("precious")
    with pytest.raises(PlanError), open_output(tmp_path / "out", overwrite=True):
        raise PlanError("stop")
    assert (tmp_path / "out" / "README.md").read_text() == "precious"


def test_two_runs_into_one_output(tmp_path):
    script = f"""
        from modmoe.storage.staging import open_output
        with open_output({str(tmp_path / "out")!r}) as partial:
            print("in", flush=True)
            input()
    """
    other = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdin is not None
    assert other.stdout.readline() == "in\n"
    with pytest.raises(RecipeError, match="another run is writing there"), open_output(tmp_path / "out"):
        pass
    other.kill()
    other.communicate()
    with open_output(tmp_path / "out") as partial:  # the lock went with its process
        (partial / "README.md").write_text("")


def test_plan_accounts_for_every_tensor(tmp_path):
    source = _write(tmp_path / "in", {"a": torch.ones(4, 2), "b": torch.ones(3)})
    with pytest.raises(PlanError, match="'b' is neither used nor left out"):
        Plan({}, {"a": Copy("a")}).check(source)
    with pytest.raises(PlanError, match="'c' is not in the checkpoint"):
        Plan({}, {"a": Copy("a"), "b": Copy("b"), "x": Copy("c")}).check(source)
    with pytest.raises(PlanError, match="has 4 entries where 9 are needed"):
        Plan({}, {"a": Take("a", torch.tensor([8]))}, frozenset({"b"})).check(source)


def test_plan_makes_what_it_says(tmp_path):
    a, index = torch.arange(8.0).reshape(4, 2), torch.tensor([2, 0])
    source = _write(tmp_path / "in", {"a": a})
    plan = Plan(
        {},
        {
            "rows": Take("a", index),
            "turned": Take("a", torch.tensor([1]), dim=1, transpose=True),
            "both": Stack((Take("a", index), Copy("a"))),
            "new": Const(torch.zeros(3)),
        },
    )
    shapes = plan.check(source)
    writer = CheckpointWriter(tmp_path / "out_weights")
    (tmp_path / "out_weights").mkdir()
    plan.run(source, writer)
    writer.finish({})
    made = Checkpoint(tmp_path / "out_weights")
    assert {name: made.shape(name) for name in made} == shapes
    assert torch.equal(made["rows"], a[index])
    assert torch.equal(made["turned"], a[:, [1]].T)
    assert torch.equal(made["both"], torch.cat([a[index], a]))


def test_gpt2_without_its_prefix(tmp_path):
    save_file({"h.0.mlp.c_fc.weight": torch.ones(2, 2), "wte.weight": torch.ones(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    found = Checkpoint(tmp_path)
    found.add_prefix("transformer.h")
    assert set(found) == {"transformer.h.0.mlp.c_fc.weight", "transformer.wte.weight"}
    assert found.shape("transformer.wte.weight") == (1,)


def test_a_file_that_cannot_be_mapped_is_to_be_cut_in_shards(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise RuntimeError("unable to mmap 61066786882 bytes from file <x>: Cannot allocate memory (12)")

    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    monkeypatch.setattr("modmoe.storage.documents.safe_open", refuse)
    with pytest.raises(CheckpointError, match=r"unable to mmap .* have it saved in shards"):
        open_tensors(tmp_path / "model.safetensors")
