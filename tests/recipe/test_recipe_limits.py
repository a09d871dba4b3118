"""A recipe file makes no code run and takes no memory: dotted paths need a flag, and sizes have bounds."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

import modmoe
from modmoe.adapters.budget import make_config
from modmoe.analysis.partitions.table import find_partitioner
from modmoe.cli import main
from modmoe.errors import AdapterError, ModmoeError, RecipeError
from modmoe.recipe.schema import load_recipe, make_recipe
from tests.support import tiny

NAME = "modmoe_test_of_imports"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that leaves a file behind when it is imported."""
    (tmp_path / "lib").mkdir()
    trace = tmp_path / "imported"
    (tmp_path / "lib" / f"{NAME}.py").write_text(
        f"open({str(trace)!r}, 'w').close()\nfrom modmoe.analysis.partitions.random import cut_in_order as cut\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    return trace


def write(tmp_path: Path, method: str = f"{NAME}.cut") -> str:
    (tmp_path / "r.yaml").write_text(f"partition: {{method: {method}, num_modules: 8}}\n")
    return str(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["validate", "RECIPE"],
        ["convert", "DENSE", "OUT", "-c", "RECIPE", "--dry-run"],
        ["convert", "DENSE", "OUT", "-c", "RECIPE"],
        ["convert", "DENSE", "OUT", "-c", "RECIPE", "--method", "prune"],
        ["analyze", "DENSE", "-o", "OUT", "-c", "RECIPE"],
        ["finetune", "DENSE", "OUT", "-c", "RECIPE"],
    ],
)
def test_a_file_alone_has_nothing_imported(
    tmp_path: Path, module: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"RECIPE": write(tmp_path), "DENSE": str(tmp_path / "dense"), "OUT": str(tmp_path / "out")}
    (tmp_path / "dense").mkdir()
    assert main.run([places.get(word, word) for word in words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "r.yaml: partition.method" in line and NAME in line and "--allow-code" in line
    assert not module.exists()


def test_with_the_flag_it_is_imported(tmp_path: Path, module: Path) -> None:
    recipe = write(tmp_path)
    assert main.run(["validate", recipe, "--allow-code"]) == 0
    assert module.exists()
    source, tasks = tiny.save_dense(tmp_path / "dense"), tiny.write_tasks(tmp_path / "tasks")
    options: dict[str, Any] = {"tasks": tasks, "dry_run": True}
    with pytest.raises(RecipeError, match="--allow-code"):
        modmoe.convert(str(source), tmp_path / "out", recipe, **options)
    assert modmoe.convert(str(source), tmp_path / "out", recipe, allow_code=True, **options)["num_modules"] == 8


def test_what_the_user_types_needs_no_flag(tmp_path: Path, module: Path) -> None:
    assert load_recipe(write(tmp_path), {"partition.method": "random"}).partition.method == "random"
    assert load_recipe(write(tmp_path), {"partition.method": f"{NAME}.cut"}).partition.method == f"{NAME}.cut"
    assert not module.exists()


@pytest.mark.parametrize("key", ["allow_code: true", "partition: {allow_code: true}", "'--allow-code': true"])
def test_the_flag_is_no_key(tmp_path: Path, key: str) -> None:
    (tmp_path / "r.yaml").write_text(f"{key}\n")
    with pytest.raises(RecipeError, match="no such key"):
        load_recipe(tmp_path / "r.yaml")


@pytest.mark.parametrize(
    ("text", "words"),
    [("raise SystemExit(3)", "cannot be imported"), ("1/0", "division by zero"), ("cut = 3", "not a function"),
     ("def other(): pass", "cannot be imported"), ("def (", "invalid syntax")],
)  # fmt: skip
def test_a_module_that_is_not_right_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, words: str
) -> None:
    (tmp_path / f"{NAME}.py").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    with pytest.raises(RecipeError, match=words) as caught:
        find_partitioner(f"{NAME}.cut")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "place",
    [
        "calibration.tokens",
        "calibration.sequence_length",
        "calibration.batch_size",
        "partition.num_modules",
        "assignment.num_experts",
        "assignment.modules_per_expert",
        "router.top_k",
        "router.routing_chunk",
        "experts.num_experts",
        "finetune.max_steps",
        "finetune.batch_size",
        "finetune.sequence_length",
        "finetune.lora_rank",
        "finetune.save_steps",
    ],
)
def test_sizes_have_bounds(place: str) -> None:
    with pytest.raises(RecipeError, match=rf"^{place}: .* is more than the"):
        make_recipe({place: 10**12})


def test_a_batch_has_a_bound() -> None:
    with pytest.raises(RecipeError, match=r"^finetune.batch_size: 10,000 sequences of 10,000 tokens"):
        make_recipe({"finetune.batch_size": 10_000, "finetune.sequence_length": 10_000})


@pytest.mark.parametrize(
    "settings", [{"r": 10**9}, {"num_experts": 10**9, "r": 4}, {"r": 60_000, "num_experts": 60_000}]
)
def test_an_adapter_is_no_larger_than_its_model_bears(tmp_path: Path, settings: dict[str, int]) -> None:
    source = tiny.save_dense(tmp_path / "dense")
    with pytest.raises(AdapterError, match=r"^adapter.settings.*; choose"):
        modmoe.convert(
            str(source), tmp_path / "out", method="adapters", adapter="molora", adapter_settings=settings, dry_run=True
        )
    make_config("molora", {"r": 4})


def test_lora_is_no_wider_than_the_model(tmp_path: Path) -> None:
    source, tasks = tiny.save_dense(tmp_path / "dense"), tiny.write_tasks(tmp_path / "tasks")
    with pytest.raises(ModmoeError, match=r"finetune.lora_rank: 10000 is more than the model's width"):
        modmoe.finetune(str(source), tmp_path / "out", tasks=tasks, train="lora", lora_rank=10_000, device="cpu")
