"""Hostile checkpoints through what the commands call: refused in one line, or taken and right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modmoe import api
from modmoe.models.loading import load, load_tokenizer
from modmoe.storage.checkpoint import Checkpoint
from tests.fuzz import oracle, spoil
from tests.fuzz.judge import judge, often
from tests.support.export_models import write_tied
from tests.support.tiny import save_dense, write_tasks


class Room:
    """A directory that is laid out anew for every input, and what a whole checkpoint has in it."""

    def __init__(self, home: Path, whole: Path) -> None:
        self.directory, self.outside, self.files = home / "it", home / "outside", spoil.read_files(whole)
        self.output = home / "out"
        self.directory.mkdir()
        self.tasks = write_tasks(home / "tasks", rows=4)

    def lay_out(self, changed: spoil.Files) -> Path:
        spoil.lay_out(self.directory, self.files, changed)
        return self.directory

    def plan(self) -> Any:
        tasks = {"words": self.tasks["words"]}
        return api.convert(self.directory, self.output, tasks=tasks, num_modules=8, dry_run=True)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Room:
    home = tmp_path_factory.mktemp("dense")
    return Room(home, save_dense(home / "whole", num_hidden_layers=1))


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Room:
    home = tmp_path_factory.mktemp("tied")
    return Room(home, write_tied(home / "whole"))


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = Checkpoint(directory)
    return {name: checkpoint[name] for name in checkpoint}


@often("weights")
@given(st.data())
def test_weights(room: Room, data: st.DataObject) -> None:
    directory = room.lay_out(data.draw(spoil.weights(room.files[spoil.WEIGHTS])))
    found, _, _, model = judge(
        "weights",
        directory,
        lambda: read_all(directory),
        lambda: api.inspect(directory),
        room.plan,
        lambda: load(directory),
    )
    real = oracle.read((directory / spoil.WEIGHTS).read_bytes())
    assert found is None or real is not None, "the format does not allow it"
    for name, tensor in (found or {}).items():
        _, shape, values = real[name]
        assert tuple(tensor.shape) == shape and tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == values
    check_model(model, found)


def check_model(model: Any, found: dict[str, torch.Tensor] | None) -> None:
    """Assert that every weight of a model is the checkpoint's, and none made up."""
    if model is None:
        return
    assert found is not None
    own = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    assert set(own) <= set(found)
    for name, value in own.items():
        assert torch.equal(value, found[name].to(value.dtype)) or not torch.isfinite(value).all()


@often("index")
@given(st.data())
def test_index(room: Room, data: st.DataObject) -> None:
    directory = room.lay_out(data.draw(spoil.indexes(room.files[spoil.WEIGHTS], room.outside)))
    found, _, _, model = judge(
        "index",
        directory,
        lambda: read_all(directory),
        lambda: api.inspect(directory),
        room.plan,
        lambda: load(directory),
    )
    links = [file for file in directory.iterdir() if file.is_symlink()]
    assert found is None or all(file.resolve().parent == directory for file in links), "it went outside"
    check_model(model, found)


@often("config")
@given(st.data())
def test_config(room: Room, data: st.DataObject) -> None:
    directory = room.lay_out(data.draw(spoil.configs(room.files["config.json"])))
    found, _, _, model, _ = judge(
        "config",
        directory,
        lambda: read_all(directory),
        lambda: api.inspect(directory),
        room.plan,
        lambda: load(directory),
        lambda: load_tokenizer(directory),
    )
    check_model(model, found)


@often("tied")
@given(st.data())
def test_tied_config(tied: Room, data: st.DataObject) -> None:
    directory = tied.lay_out(data.draw(spoil.configs(tied.files["config.json"])))
    found, _, model, _ = judge(
        "tied",
        directory,
        lambda: read_all(directory),
        lambda: api.inspect(directory),
        lambda: load(directory),
        lambda: load_tokenizer(directory),
    )
    check_model(model, found)
