"""What the environment says of processes is read once, and in one line where it says nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest

from modmoe.cli import main
from modmoe.errors import RankError, RecipeError
from modmoe.runtime.launch import check_precision, is_first_of_many, number_of
from tests.support import tiny


@pytest.mark.parametrize(
    ("size", "rank", "found"),
    [(None, None, None), ("", "", None), ("1", "0", None), ("2", "0", True), (" 2 ", "1", False), ("4", None, True)],
)
def test_the_first_of_many(
    monkeypatch: pytest.MonkeyPatch, size: str | None, rank: str | None, found: bool | None
) -> None:
    for name, value in (("WORLD_SIZE", size), ("RANK", rank)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert is_first_of_many() is found


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "²", "1 2", "\x1b[31m"])
@pytest.mark.parametrize("command", ["convert", "finetune"])
def test_no_number_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], value: str, command: str
) -> None:
    (tmp_path / "t.txt").write_text("some words")
    dense = str(tiny.save_dense(tmp_path / "dense"))
    capsys.readouterr()
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(RankError, match=r"WORLD_SIZE: is .*, no whole number; unset it"):
        number_of("WORLD_SIZE", 1)
    assert main.run([command, dense, str(tmp_path / "out"), "--task", f"t={tmp_path / 't.txt'}"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("modmoe: WORLD_SIZE: is ") and err.count("\n") == 1 and "\x1b" not in err


def test_a_precision_that_accelerate_does_not_know(monkeypatch: pytest.MonkeyPatch) -> None:
    check_precision()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "zz")
    with pytest.raises(RecipeError, match="ACCELERATE_MIXED_PRECISION: is 'zz', none of no, fp16, bf16, fp8; set one"):
        check_precision()
