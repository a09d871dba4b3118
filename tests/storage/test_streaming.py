"""Shards are written in place, by several threads, and are what safetensors would have written."""

# Shapes: F neurons, D width

from __future__ import annotations

import errno
import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from modmoe.errors import CheckpointError, PlanError
from modmoe.storage import shards
from modmoe.storage.checkpoint import MANIFEST, SINGLE, Checkpoint, CheckpointWriter, tensor_sha256
from modmoe.storage.plan import Const, Copy, Plan, Stack, Take
from modmoe.storage.seal import MARK
from modmoe.storage.shards import DTYPES, Made, is_finite
from modmoe.storage.staging import open_output

NEURONS, WIDTH = 96, 40
DRAW = torch.Generator().manual_seed(0)
ORDER_F = torch.randperm(NEURONS, generator=DRAW)
SOME_F = ORDER_F[:37]


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Make every matrix here many pieces, of a size that divides nothing evenly."""
    monkeypatch.setattr(shards, "PIECE_BYTES", 776)
    monkeypatch.setattr("modmoe.storage.plan.PIECE_BYTES", 776)


def _random(*shape, dtype=torch.float32):
    return torch.randint(-100, 100, shape, generator=DRAW).to(dtype)


def _save(directory, tensors):
    directory.mkdir()
    save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    (directory / "config.json").write_text("{}")
    return Checkpoint(directory)


def _run(plan, source, directory, dtype=None, **options):
    directory.mkdir()
    writer = CheckpointWriter(directory, **options)
    plan.run(source, writer, dtype)
    writer.finish({})
    return Checkpoint(directory)


TENSORS = {
    "gate": _random(NEURONS, WIDTH, dtype=torch.bfloat16),
    "down": _random(WIDTH, NEURONS, dtype=torch.bfloat16),
    "cube": _random(NEURONS, 3, 5, dtype=torch.float16),
    "bias": _random(NEURONS),
    "wide": _random(3, 1000, dtype=torch.float64),
    "long": _random(NEURONS, WIDTH, dtype=torch.int64),
    "flags": _random(5, 7) > 0,
    "scalar": torch.tensor(2.5),
    "nothing": torch.empty(0, 4),
}
OPS = {
    "copy": Copy("gate"),
    "copy of a scalar": Copy("scalar"),
    "copy of nothing": Copy("nothing"),
    "copy of flags": Copy("flags"),
    "copy of rows longer than a piece": Copy("wide"),
    "rows": Take("gate", ORDER_F),
    "rows, some": Take("gate", SOME_F),
    "rows, one of them twice": Take("gate", torch.tensor([3, 3, 0])),
    "rows, none": Take("gate", ORDER_F[:0]),
    "rows of whole numbers": Take("long", SOME_F),
    "rows of a cube": Take("cube", SOME_F),
    "rows longer than a piece": Take("wide", torch.tensor([2, 0])),
    "rows, transposed": Take("gate", SOME_F, transpose=True),
    "columns": Take("down", ORDER_F, dim=1),
    "columns, some": Take("down", SOME_F, dim=1),
    "columns of few rows": Take("wide", torch.arange(999, -1, -2), dim=1),
    "columns, transposed": Take("down", SOME_F, dim=1, transpose=True),
    "columns of a cube": Take("cube", torch.tensor([2, 1]), dim=1),
    "entries": Take("bias", SOME_F),
    "stack": Stack((Take("gate", SOME_F), Copy("gate"), Const(_random(2, WIDTH, dtype=torch.bfloat16)))),
    "stack of two types": Stack((Take("gate", SOME_F), Const(_random(1, WIDTH)))),
    "const": Const(_random(4, 3)),
    "const, a view": Const(_random(4, 30)[:, ::3]),
}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_each_op_streams_what_it_makes(tmp_path, name, dtype):
    source = _save(tmp_path / "in", TENSORS)
    made = _run(Plan({}, {name: OPS[name]}), source, tmp_path / "out", dtype)
    wanted = OPS[name].make(source)
    wanted = wanted.to(dtype) if dtype is not None and wanted.is_floating_point() else wanted
    assert made.dtype(name) == wanted.dtype
    assert torch.equal(made[name], wanted)


@pytest.mark.parametrize("read", [dict, lambda source: source], ids=["in memory", "on disk"])
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("dtype", [None, torch.float16], ids=str)
def test_the_file_is_what_safetensors_writes(tmp_path, monkeypatch, workers, dtype, read):
    monkeypatch.setattr(shards, "WORKERS", workers)
    source = _save(tmp_path / "in", TENSORS)
    _run(Plan({}, OPS), read(source), tmp_path / "out", dtype)
    made = {name: op.make(source).contiguous() for name, op in OPS.items()}
    if dtype is not None:
        made = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in made.items()}
    save_file(made, tmp_path / SINGLE, metadata={"format": "pt"})
    assert (tmp_path / "out" / SINGLE).read_bytes() == (tmp_path / SINGLE).read_bytes()
    sums = {
        name: entry["sha256"]
        for name, entry in json.loads((tmp_path / "out" / MANIFEST).read_text())["tensors"].items()
    }
    assert sums == {name: tensor_sha256(tensor) for name, tensor in made.items()}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_files_are_laid_out_as_safetensors_does(tmp_path, dtype):
    tensors = {
        "z": torch.zeros(3, dtype=dtype),
        'an \u00e9, a " and a \\': torch.ones(2, 2, dtype=dtype),
        "other": torch.zeros(5, dtype=torch.float32),
        "bytes": torch.zeros(3, dtype=torch.uint8),
    }
    shards.write_shards(
        {tmp_path / "ours": {name: Made(t.dtype, tuple(t.shape), lambda t=t: [t]) for name, t in tensors.items()}}
    )
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("max_shard_bytes", [1, 5000, 20_000, 10**9])
def test_one_at_a_time_equals_streamed(tmp_path, max_shard_bytes):
    source = _save(tmp_path / "in", TENSORS)
    _run(Plan({}, OPS), source, tmp_path / "streamed", max_shard_bytes=max_shard_bytes)
    (tmp_path / "single").mkdir()
    writer = CheckpointWriter(tmp_path / "single", max_shard_bytes=max_shard_bytes)
    for name, op in OPS.items():
        writer.write(name, op.make(source))
    writer.finish({})
    files = {file.name: file.read_bytes() for file in (tmp_path / "streamed").iterdir()}
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "single").iterdir()}
    assert (len(files) == 3) == (max_shard_bytes == 10**9)


def test_streams_follow_what_was_written_before(tmp_path):
    (tmp_path / "out").mkdir()
    writer = CheckpointWriter(tmp_path / "out")
    writer.write("a", torch.ones(3))
    writer.stream({"b": Made(torch.float32, (2,), lambda: [torch.zeros(1), torch.ones(1)])})
    writer.write("c", torch.ones(2))
    with pytest.raises(CheckpointError, match="'b' was written twice"):
        writer.write("b", torch.ones(1))
    writer.stream({})
    writer.finish({})
    found = Checkpoint(tmp_path / "out")
    assert {name: found[name].tolist() for name in found} == {"a": [1, 1, 1], "b": [0, 1], "c": [1, 1]}


def test_files_are_as_readable_as_others(tmp_path):
    _run(Plan({}, {"a": Const(torch.ones(1))}), {}, tmp_path / "out")
    modes = {file.stat().st_mode for file in (tmp_path / "out").iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("index", [[NEURONS], [0, -1]])
def test_rows_that_are_not_there_are_refused_before_anything_is_read(tmp_path, index):
    source = _save(tmp_path / "in", TENSORS)
    plan = Plan({}, {"a": Take("gate", torch.tensor(index))}, frozenset(TENSORS) - {"gate"})
    with pytest.raises(PlanError, match="'gate' has"):
        plan.check(source)


class Broken(dict):
    """A source one of whose tensors cannot be read."""

    def __getitem__(self, name):
        if name == "long":
            raise CheckpointError("in/model.safetensors: 'long' cannot be read; fetch it again.")
        return super().__getitem__(name)


def _full_disk(monkeypatch):
    pwrite, written = os.pwrite, []

    def refuse(handle, data, offset):
        written.append(len(data))
        if sum(written) > 20_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", refuse)
    return TENSORS, "No space left on device"


def _broken_source(monkeypatch):
    return Broken({**TENSORS}), "'long' cannot be read"


def _short_make(monkeypatch):
    monkeypatch.setattr(Const, "make", lambda self, source: self.value[:1])
    return TENSORS, "was made with .* bytes, not"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("fail", [_full_disk, _broken_source, _short_make])
def test_a_failing_worker_leaves_nothing(tmp_path, monkeypatch, fail, workers):
    monkeypatch.setattr(shards, "WORKERS", workers)
    source, said = fail(monkeypatch)
    plan = Plan({}, OPS)
    threads = threading.active_count()
    with pytest.raises(CheckpointError, match=said) as caught, open_output(tmp_path / "out") as partial:
        writer = CheckpointWriter(partial, max_shard_bytes=5000)
        try:
            plan.run(source, writer)
        finally:
            assert [path.name for path in partial.iterdir()] == [MARK]
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads


def test_a_write_that_stops_short_goes_on(tmp_path, monkeypatch):
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda handle, data, offset: pwrite(handle, data[:100], offset))
    source = _save(tmp_path / "in", TENSORS)
    made = _run(Plan({}, {name: Copy(name) for name in TENSORS}), source, tmp_path / "out")
    assert all(torch.equal(made[name], tensor) for name, tensor in TENSORS.items())


def test_workers_work_at_the_same_time(tmp_path):
    both = threading.Barrier(shards.WORKERS, timeout=20)

    def pieces():
        both.wait()
        yield torch.ones(2)

    shards.write_shards({tmp_path / "file": {name: Made(torch.float32, (2,), pieces) for name in "ab"}})
    assert set(load_file(tmp_path / "file")) == {"a", "b"}


def test_memory_does_not_grow_with_the_tensor(tmp_path, monkeypatch):
    """The largest array that a Take makes is a few pieces, whatever the tensor's size and the direction."""
    monkeypatch.setattr("modmoe.storage.plan.PIECE_BYTES", 1 << 12)
    source = {"a": torch.zeros(512, 300), "b": torch.zeros(300, 512)}
    index = torch.randperm(512)
    for op in (Take("a", index), Take("a", index, transpose=True), Take("b", index, 1), Take("b", index, 1, True)):
        sizes = [piece.nbytes for piece in op.pieces(source)]
        assert sum(sizes) == source["a"].nbytes
        assert max(sizes) <= 2 * (1 << 12)


NOT_FINITE = [float("nan"), -float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_values_that_are_not_finite_are_found_anywhere(dtype):
    extremes = torch.finfo(dtype)
    values = torch.tensor(
        [0.0, -0.0, extremes.max, extremes.min, extremes.tiny, -extremes.smallest_normal], dtype=dtype
    )
    tensor = values.repeat(300)
    assert is_finite(tensor)
    for place in (0, 777, len(tensor) - 1):
        for value in NOT_FINITE:
            bad = tensor.clone()
            bad[place] = value
            assert not is_finite(bad)


def test_every_bfloat16_is_told_apart():
    bits = torch.from_numpy(np.arange(-(2**15), 2**15).astype(np.int16))
    values = bits.view(torch.bfloat16)
    found = [is_finite(value) for value in values[::61]]
    assert found == torch.isfinite(values[::61]).tolist()


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_tensor_is_named(tmp_path, monkeypatch, workers):
    monkeypatch.setattr(shards, "WORKERS", workers)
    bad = torch.tensor([float("nan")])
    tensors = {"a": torch.ones(9), "b": torch.arange(3), "c": bad, "d": bad.clone(), "e": torch.tensor([True])}
    found = _save(tmp_path / "in", tensors)
    with pytest.raises(CheckpointError, match=f"{Path(SINGLE)}: 'c' has values that are not finite"):
        found.check_finite()
