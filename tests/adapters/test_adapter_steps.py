"""Adapters by the steps: attached, trained, gone on with, measured; and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import modmoe
from modmoe.errors import ModmoeError
from tests.support import tiny

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TRAINING = {"batch_size": 2, "sequence_length": 32, "learning_rate": 1e-2, "save_steps": 2, "device": "cpu"}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with a tiny dense model, an adapter on it and tasks."""
    base = tmp_path_factory.mktemp("steps")
    tiny.save_dense(base / "dense", "llama", initializer_range=0.05)
    tiny.write_tasks(base / "tasks", rows=32)
    modmoe.convert(base / "dense", base / "adapter", method="adapters", adapter="perft_r", num_experts=3, top_k=2)
    return base


@pytest.fixture(scope="module")
def tasks(room: Path) -> dict[str, str]:
    return {path.stem: str(path) for path in sorted((room / "tasks").iterdir())}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def settings(directory: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return read


def test_attaching_writes_an_adapter_that_changes_nothing_yet(room: Path, tmp_path: Path) -> None:
    result = modmoe.convert(
        room / "dense", tmp_path / "out", method="adapters", adapter="comol", budget=3000, adapter_settings={"r": 3}
    )
    written = settings(tmp_path / "out")
    assert result["verified"] == {"max_abs_logit_diff": 0.0}
    assert (result["method"], written["peft_type"], written["r"]) == ("comol", "MODMOE_COMOL", 3)
    assert result["parameters"]["adapter"] == sum(weight.numel() for weight in tensors(tmp_path / "out").values())
    assert result["parameters"]["adapter"] <= 3000
    assert Path(written["base_model_name_or_path"]) == (room / "dense").resolve()
    assert (tmp_path / "out" / "tokenizer.json").is_file() and (tmp_path / "out" / "modmoe.yaml").is_file()


def test_experts_and_top_k_are_the_adapters(room: Path) -> None:
    written = settings(room / "adapter")
    assert (written["num_experts"], written["top_k"]) == (3, 2)


def test_the_seed_decides_the_start(room: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        modmoe.convert(room / "dense", tmp_path / name, method="adapters", adapter="comol", seed=seed)
    first, same, other = (tensors(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[key], same[key]) for key in first)
    assert any(not torch.equal(first[key], other[key]) for key in first)


def test_training_moves_the_adapter_alone_and_is_measured(room: Path, tasks: dict[str, str], tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in (room / "dense").iterdir()}
    result = modmoe.finetune(room / "adapter", tmp_path / "out", tasks=tasks, eval_tasks=tasks, max_steps=6, **TRAINING)
    start, end = tensors(room / "adapter"), tensors(tmp_path / "out")
    assert all(not torch.equal(start[key], end[key]) for key in start)
    assert result["parameters"]["trainable"] == sum(weight.numel() for weight in start.values())
    assert {path.name: path.read_bytes() for path in (room / "dense").iterdir()} == before
    measured = modmoe.evaluate(tmp_path / "out", tasks, tokens=16384, sequence_length=32, batch_size=2, device="cpu")
    for name, losses in result["tasks"].items():
        assert losses["after"] < losses["before"]
        assert measured["tasks"][name]["loss"] == pytest.approx(losses["after"], rel=1e-5)


def test_a_model_without_an_adapter_gets_one_where_it_is_trained(
    room: Path, tasks: dict[str, str], tmp_path: Path
) -> None:
    result = modmoe.finetune(
        room / "dense", tmp_path / "out", tasks=tasks, train="adapters", adapter="sparmoe", max_steps=2, **TRAINING
    )
    assert settings(tmp_path / "out")["peft_type"] == "MODMOE_SPARMOE"
    assert result["parameters"]["trainable"] == sum(weight.numel() for weight in tensors(tmp_path / "out").values())


def stop_at(step: int) -> Callable[..., None]:
    def progress(message: str, done: int | None = None, total: int | None = None) -> None:
        if message.startswith("training") and done == step:
            raise KeyboardInterrupt

    return progress


def test_a_resumed_run_is_the_unbroken_one(room: Path, tasks: dict[str, str], tmp_path: Path) -> None:
    values: dict[str, Any] = {"tasks": tasks, "max_steps": 6, **TRAINING}
    whole = modmoe.finetune(room / "adapter", tmp_path / "whole", **values)
    with pytest.raises(KeyboardInterrupt):
        modmoe.finetune(room / "adapter", tmp_path / "out", progress=stop_at(3), **values)
    assert not (tmp_path / "out").exists()
    resumed = modmoe.finetune(room / "adapter", tmp_path / "out", resume=True, **values)
    expected, found = tensors(tmp_path / "whole"), tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert resumed["loss"] == whole["loss"]


def refused(room: Path, tmp_path: Path, tasks: dict[str, str]) -> dict[str, tuple[Callable[[], Any], str]]:
    def convert(**values: Any) -> Callable[[], Any]:
        return lambda: modmoe.convert(room / "dense", tmp_path / "out", **{"method": "adapters", **values})

    def finetune(source: str, **values: Any) -> Callable[[], Any]:
        return lambda: modmoe.finetune(room / source, tmp_path / "out", tasks=tasks, **{**TRAINING, **values})

    return {
        "unknown method": (convert(adapter="perft-r"), "adapter.method: no method 'perft-r'. Did you mean 'perft_r'?"),
        "no method": (convert(), "adapter.method: is not given; name one with --adapter METHOD."),
        "unknown setting": (
            convert(adapter="comol", adapter_settings={"rank": 3}),
            "adapter.settings.rank: comol has no",
        ),
        "other method": (convert(adapter="comol", method="modular"), "--adapter: belongs to --method adapters"),
        "too small": (convert(adapter="comol", budget=10), "budget: 10 parameters are too few for comol"),
        "no budget": (convert(adapter="comol", budget=0), "adapter.budget: 0 is not above 0."),
        "top_k": (convert(adapter="molora", top_k=9), "top_k: 9 is more than the 8 experts there are"),
        "no such layer": (
            convert(adapter="comol", adapter_settings={"target_modules": ["w1"]}),
            "'w1' names no layer that comol can be attached to; there are down_proj, gate_proj, k_proj",
        ),
        "needs an MoE": (convert(adapter="perft_e"), "this model has no layer that perft_e can be attached to"),
        "size in bytes": (convert(adapter="comol", fit_bytes=10), "adapters are sized by --budget"),
        "nothing to train": (finetune("dense", train="adapters"), "has no adapters; name one with --adapter METHOD"),
        "trained otherwise": (finetune("dense", adapter="comol"), "--adapter: belongs to --train adapters"),
        "not its weights": (finetune("adapter", train="lora"), "is an adapter, so its weights are not here"),
        "another adapter": (
            finetune("adapter", train="adapters", adapter="comol"),
            "has perft_r, not comol; leave it out.",
        ),
    }


NAMES = sorted(refused(Path(), Path(), {}))


@pytest.mark.parametrize("name", NAMES)
def test_what_cannot_be_is_refused_in_one_line(room: Path, tmp_path: Path, tasks: dict[str, str], name: str) -> None:
    call, message = refused(room, tmp_path, tasks)[name]
    with pytest.raises(ModmoeError, match=re.escape(message)) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
