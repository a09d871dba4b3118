"""What ``modmoe doctor`` prints, and what it exits with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modmoe.cli.main import run
from tests.support.planned import write_tied


@pytest.fixture
def moe(tmp_path: Path) -> Path:
    return write_tied(tmp_path)[1]


def spoil(moe: Path) -> None:
    path = moe / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "default_expert": "\x1b[31mmaths"}))
    (moe / "merges.tmp").touch()


def test_what_is_healthy(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", str(moe)]) == 0
    out, err = capsys.readouterr()
    assert "healthy" in out and "yes" in out and "sums" in out
    assert all("reading" in line for line in err.splitlines())


def test_each_fault_is_a_line(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spoil(moe)
    assert run(["doctor", str(moe), "-q"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "\x1b" not in err
    left, default = err.splitlines()
    assert left == f"modmoe: {moe / 'merges.tmp'}: was left by an interrupted run or download; delete it."
    assert default.startswith(f"modmoe: {moe / 'config.json'}: default_expert: is ")
    assert default.endswith("; restore config.json from the run that wrote it, or convert again.")


def test_one_object_of_json(moe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", str(moe), "--json", "-q"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["healthy"], found["faults"], found["kind"]) == (True, [], "modmoe_llama")
    spoil(moe)
    assert run(["doctor", str(moe), "--json", "-q"]) == 2
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert not found["healthy"] and err == ""
    assert [sorted(fault) for fault in found["faults"]] == [["place", "remedy", "wrong"]] * 2


def test_no_directory(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "gone.replaced").mkdir()
    assert run(["doctor", str(tmp_path / "gone")]) == 2
    assert "an interrupted run left what was there as" in capsys.readouterr().err
