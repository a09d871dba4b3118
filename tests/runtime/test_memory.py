"""Where memory runs out a step says what to lower, and to what."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from modmoe import api
from modmoe.analysis.source import needs_gradients
from modmoe.errors import CheckpointError, RecipeError, is_out_of_memory
from modmoe.recipe.schema import make_recipe
from modmoe.runtime.memory import advice, names_what_to_lower
from modmoe.training.trainer import ModularTrainer
from tests.support import tiny

# peft 0.21 asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
OF_A_GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1 MiB is free."
)


def raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(BaseException) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("call", "lacking"),
    [
        (lambda: torch.empty(2**50), "4503599627370496 bytes more"),
        (lambda: np.empty(2**52, np.float32), "16.0 PiB more"),
        (lambda: bytearray(2**60), ""),
    ],
    ids=["torch", "numpy", "python"],
)
def test_real_errors_of_memory_are_known(call: Callable[[], Any], lacking: str) -> None:
    error = raised(call)
    assert is_out_of_memory(error)

    def fail() -> None:
        with names_what_to_lower(make_recipe({}), "calibration"):
            raise error

    told = raised(fail)
    assert isinstance(told, RecipeError) and str(told).startswith("calibration: memory is full")
    assert not lacking or lacking in str(told)


@pytest.mark.parametrize("error", [ValueError("x"), RuntimeError("shapes"), CheckpointError("out of memory")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    def fail() -> None:
        with names_what_to_lower(make_recipe({}), "calibration"):
            raise error

    assert raised(fail) is error


@pytest.mark.parametrize(
    ("values", "part", "ranks", "words"),
    [
        (
            {"calibration.batch_size": 8, "calibration.sequence_length": 512},
            "calibration",
            1,
            "set calibration.by_layer to true, or lower calibration.batch_size from 8 to 4, or lower "
            "calibration.sequence_length from 512 to 256",
        ),
        (
            {"calibration.batch_size": 1, "calibration.sequence_length": 63, "calibration.by_layer": True},
            "calibration",
            1,
            "take a machine with more of it",
        ),
        (
            {"calibration.batch_size": 2, "calibration.sequence_length": 16, "assignment.score": "taylor"},
            "calibration",
            1,
            "lower calibration.batch_size from 2 to 1",
        ),
        (
            {"finetune.batch_size": 6, "finetune.sequence_length": 64, "finetune.train": "full"},
            "finetune",
            2,
            "lower finetune.batch_size from 6 to 2, or lower finetune.sequence_length from 64 to 32, or set "
            "finetune.train to lora",
        ),
        (
            {"finetune.batch_size": 2, "finetune.sequence_length": 33, "finetune.train": "lora"},
            "finetune",
            2,
            "take a machine with more of it",
        ),
    ],
)
def test_advice_names_values(values: dict[str, Any], part: str, ranks: int, words: str) -> None:
    recipe = make_recipe(values)
    assert advice(recipe, part, ranks, needs_whole_model=needs_gradients(recipe)) == words


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("memory")
    tiny.save_dense(base / "dense")
    tiny.write_tasks(base / "tasks", rows=8)
    return base


@pytest.mark.parametrize("step", ["analyze", "convert"])
def test_a_gpu_that_is_full_while_text_runs(
    room: Path, tmp_path: Path, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError(OF_A_GPU)

    monkeypatch.setattr("modmoe.analysis.run.profile_model", full)
    with pytest.raises(RecipeError) as caught:
        tasks = {"words": str(room / "tasks" / "words.jsonl")}
        getattr(api, step)(str(room / "dense"), str(tmp_path / "out"), tasks=tasks, device="cpu", batch_size=4)
    assert str(caught.value).startswith(
        "calibration: memory is full, 2.50 GiB more were asked for; set calibration.by_layer to true, or lower "
        "calibration.batch_size from 4 to 2, or lower calibration.sequence_length from "
    )
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_full_in_a_step_of_training(room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values: dict[str, Any] = {"train": "lora", "batch_size": 4, "sequence_length": 32, "max_steps": 3, "save_steps": 1}
    values |= {"tasks": {"words": str(room / "tasks" / "words.jsonl")}, "device": "cpu", "lora_rank": 2}
    real = ModularTrainer.compute_loss

    def full(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2:
            torch.empty(2**50)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(ModularTrainer, "compute_loss", full)
        with pytest.raises(
            RecipeError, match=r"^finetune: memory is full, .* lower finetune\.batch_size from 4 to 2\."
        ) as caught:
            api.finetune(str(room / "dense"), str(tmp_path / "out"), **values)
    states = tmp_path / "out.states"
    assert caught.value.__notes__ == [
        f"Training up to step 2 is kept in {states}; go on with --resume where there is more memory."
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["out.states"]
    assert api.finetune(str(room / "dense"), str(tmp_path / "out"), resume=True, **values)["steps"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
