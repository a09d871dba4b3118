"""What the user can mend is one line and exit code 2; a bug has a traceback and 1; Ctrl-C is 130."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

from modmoe import steps
from modmoe.cli.main import run
from modmoe.errors import PartitionError

SHARED_START = "modmoe: "


def fail(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must fail with one line; return the line without its start."""
    code = run(list(arguments))
    out, err = capsys.readouterr()
    assert code == 2, err
    assert out == ""
    assert err.startswith(SHARED_START)
    assert err.count("\n") == 1, err
    return err.removeprefix(SHARED_START).rstrip("\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("convrt", "Did you mean 'convert'"),
        ("convert a b --num-module 3", "--num-modules"),
        ("convert a", "Missing argument 'OUT'"),
        ("convert a b --num-modules x", "--num-modules"),
        ("convert a b c", "extra argument"),
        ("convert a b --task maths", "--task: 'maths' is not of the form NAME=FILE."),
        ("convert a b --task my/maths.jsonl", "NAME=FILE. Name it: maths=my/maths.jsonl."),
        ("convert a b --task =x", "not of the form NAME=FILE"),
        ("convert a b --task m=", "not of the form NAME=FILE"),
        ("convert a b --task m=1 --task m=2", "--task: the name 'm' is given twice"),
        ("convert a b --task m/n=1", "tasks: 'm/n' is no usable name"),
        ("convert a b", "no task is given; add --task NAME=FILE"),
        ("convert a b --task m=1 --num-modules 0", "partition.num_modules: 0 is not above 0."),
        ("convert a b --task m=1 --active-fraction 1.5", "assignment.active_fraction: 1.5"),
        ("convert a b --task m=1 --routing tokn", "router.routing: no such value 'tokn'. Did you mean 'token'?"),
        ("convert a b --task m=1 --device gpu", "device: no such value 'gpu'"),
        ("convert a b --task m=1 --active-fraction 0.5 --fit-bytes 4GB", "--active-fraction and --fit-bytes: give one"),
        ("convert a b --task m=1 --modules-per-expert 5 --active-fraction 0.5", "give one of them"),
        ("convert a b --task m=1 --fit-bytes 4XB", "--fit-bytes: '4XB' is no size; write 5GB"),
        ("convert a b --task m=1 --fit-bytes 0", "--fit-bytes: '0' is no size"),
        ("convert a b --task m=1 --adapter comol", "--adapter: belongs to --method adapters"),
        ("convert a b -c no-such.yaml", "no-such.yaml: No such file"),
        ("analyze a --task m=1", "Missing option '-o'"),
        ("finetune a b --task m=1 --train ful", "finetune.train: no such value 'ful'. Did you mean 'full'?"),
        ("finetune a b --task m=1 --eval m", "--eval: 'm' is not of the form NAME=FILE."),
        ("export a b --format gguf", "--format: no such value 'gguf'; choose safetensors."),
        ("export a b --form tide", "choose tied, packed, native, dense or adapter. Did you mean 'tied'?"),
        ("export a b --dtype bf16", "--dtype: no such value 'bf16'; choose bfloat16, float16 or float32."),
        ("export a b --max-shard-size big", "--max-shard-size: 'big' is no size"),
        ("eval a", "--task: no task is given"),
        ("eval a --task m=1 --tokens 0", "--tokens: 0 is not above 0."),
        ("eval a --task m=1 --device tpu", "--device: no such value 'tpu'; choose auto, cpu or cuda."),
        ("inspect no-such-directory", "no-such-directory: no such directory."),
        ("recipes show three-task", "recipes: no recipe 'three-task'. Did you mean 'three-tasks'?"),
        ("recipes cpy three-tasks x", "Did you mean 'cp'"),
        ("validate no-such.yaml", "no-such.yaml: No such file"),
    ],
    ids=lambda value: value if " " in value else None,
)
def test_one_line_that_says_what_to_mend(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in fail(capsys, *arguments.split())
    assert list(tmp_path.iterdir()) == []


def test_a_method_that_is_not_there_is_refused_with_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    line = fail(capsys, "convert", "a", "b", "--task", "m=1", "--method", "modulr")
    assert "no method 'modulr'" in line
    assert "modular" in line.replace("modulr", "")


def raise_from(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    def broken(*_: Any, **__: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(steps, "inspect", broken)
    return ["inspect", "x"]


def test_an_error_of_many_lines_becomes_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert fail(capsys, *raise_from(monkeypatch, PartitionError("one\n  two"))) == "one two"


def test_a_full_disk_is_no_bug(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")
    said = fail(capsys, *raise_from(monkeypatch, error))
    assert said == "out/model.safetensors: No space left on device; free some space there or name another directory."


def test_what_is_kept_is_said_in_the_same_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = PartitionError("x: is wrong.")
    error.add_note("Step 3 is kept.")
    assert fail(capsys, *raise_from(monkeypatch, error)) == "x: is wrong. Step 3 is kept."


def test_a_bug_has_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(raise_from(monkeypatch, ZeroDivisionError("oh"))) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "Traceback" in err
    assert "ZeroDivisionError: oh" in err
    assert "this is a bug" in err.splitlines()[-1]


def test_control_c_is_130(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(raise_from(monkeypatch, KeyboardInterrupt())) == 130
    assert capsys.readouterr() == ("", "modmoe: stopped.\n")
    stopped = KeyboardInterrupt()
    stopped.add_note("Nothing of out was written.")
    assert run(raise_from(monkeypatch, stopped)) == 130
    assert capsys.readouterr() == ("", "modmoe: stopped. Nothing of out was written.\n")
