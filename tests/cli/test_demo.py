"""``modmoe demo`` from start to end, with little of everything."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from modmoe.cli.main import run as run_cli
from modmoe.demo import main_job as demo
from modmoe.demo.corpus import DOMAINS

LITTLE = demo.Effort(
    train_rows=12,
    held_out_rows=4,
    calibration_tokens=300,
    eval_tokens=200,
    max_steps=2,
    batch_size=2,
    sequence_length=64,
    new_tokens=3,
)
MODELS = ["dense", "converted", "fine-tuned"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    output = tmp_path_factory.mktemp("demo") / "out"
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        # reloading in fresh processes is slow, and what the tests of export are for
        proof = {"reloaded_without_modmoe": True, "max_abs_logit_diff": 0.0, "greedy_tokens_equal": True}
        patch.setattr("modmoe.exports.converted.verify_export", lambda *_, **__: proof)
        patch.setenv("HF_HUB_OFFLINE", "0")
        result = demo.run(str(output), progress=lambda message, *_: said.append(message), effort=LITTLE)
        assert os.environ["HF_HUB_OFFLINE"] == "0"
    return output, result, said


def test_it_measures_three_models_on_three_tasks(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, result, _ = done
    assert list(result["models"]) == MODELS
    for about in result["models"].values():
        assert list(about["loss"]) == list(DOMAINS)
        assert all(0 < loss < 20 for loss in about["loss"].values())
        assert about["decode_tokens_per_second"] > 0
    dense, tuned = result["models"]["dense"], result["models"]["fine-tuned"]
    assert tuned["active"] < dense["active"] == dense["stored"]
    assert tuned["active"] < tuned["stored"]
    assert result["conversion"]["sparsity"]["ffn"] == 0.5
    assert [expert["name"] for expert in result["conversion"]["experts"]] == list(DOMAINS)


def test_it_leaves_what_it_says(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    output, result, _ = done
    names = {"tasks", "converted", "tuned", "export-tied", "export-dense", "export-native", "report.html"}
    assert {path.name for path in output.iterdir()} == names
    assert json.loads((output / "export-native" / "config.json").read_text())["model_type"] == "mixtral"
    assert json.loads((output / "export-dense" / "config.json").read_text())["model_type"] == "llama"
    page = Path(result["report"]).read_text(encoding="utf-8")
    for words in ("Quality", "Layer 4:", "as converted → fine-tuned", str(output / "tuned"), demo.PROMPTS["docs"]):
        assert words in page
    for about in result["models"].values():
        assert all(f"<td>{loss:.3f}</td>" in page for loss in about["loss"].values())
    for task in result["tasks"].values():
        assert all(Path(file).is_file() for file in task.values())


def test_it_says_what_it_does_and_how_long_it_took(done: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, result, said = done
    stages = [stage for stage in result["seconds"] if stage != "total"]
    assert set(stages) <= set(said)
    assert result["seconds"]["total"] >= max(result["seconds"][stage] for stage in stages)
    json.dumps(result)


def test_people_read_tables(
    done: tuple[Path, dict[str, Any], list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, result, _ = done
    monkeypatch.setattr(demo, "run", lambda *_, **__: result)
    assert run_cli(["demo"]) == 0
    out, err = capsys.readouterr()
    for words in (*MODELS, "loss arithmetic", "decode tokens/s", "export-native", "report.html", "def __repr__"):
        assert words in out
    assert "next: open " in err and "modmoe inspect" in err
    assert run_cli(["demo", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["models"]) == MODELS


def test_a_directory_in_use_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert run_cli(["demo", str(tmp_path)]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
