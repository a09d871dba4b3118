"""What the user can mend is one line and exit code 2; a bug has a traceback and 1; Ctrl-C is 130."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modmoe import api
from modmoe.cli.main import run
from modmoe.errors import CheckpointError, PartitionError

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
        ("convert a b --task m/n=1", "tasks (--task): 'm/n' is no usable name"),
        ("convert a b", "no task is given; add --task NAME=FILE"),
        ("convert a b --task m=1 --num-modules 0", "partition.num_modules (--num-modules): 0 is not above 0."),
        ("convert a b --task m=1 --active-fraction 1.5", "assignment.active_fraction (--active-fraction): 1.5"),
        (
            "convert a b --task m=1 --routing tokn",
            "router.routing (--routing): no such value 'tokn'. Did you mean 'token'?",
        ),
        ("convert a b --task m=1 --device gpu", "device (--device): no such value 'gpu'"),
        ("convert a b --task m=1 --active-fraction 0.5 --fit-bytes 4GB", "--active-fraction and --fit-bytes: give one"),
        ("convert a b --task m=1 --modules-per-expert 5 --active-fraction 0.5", "give one of them"),
        ("convert a b --task m=1 --fit-bytes 4XB", "--fit-bytes: '4XB' is no size; write 5GB"),
        ("convert a b --task m=1 --fit-bytes 0", "--fit-bytes: '0' is no size"),
        ("convert a b --task m=1 --adapter comol", "--adapter: belongs to --method adapters"),
        ("convert a b -c no-such.yaml", "no-such.yaml: No such file"),
        ("analyze a --task m=1", "Missing option '-o'"),
        ("finetune a b --task m=1 --train ful", "finetune.train (--train): no such value 'ful'. Did you mean 'full'?"),
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


def test_a_method_that_is_not_there_is_refused_with_those_that_are(
    capsys: pytest.CaptureFixture[str], there: Path
) -> None:
    line = fail(capsys, "convert", "dense", "b", "--task", "m=m.txt", "--method", "modulr")
    assert "method (--method): no method 'modulr'" in line
    assert "modular" in line.replace("modulr", "")


ABSENT = {
    "convert ./no out --task m=m.txt": "./no: no such directory, and not of the form OWNER/NAME of a Hub id.",
    "convert m.txt out --task m=m.txt": "m.txt: is a file; name the directory that holds config.json",
    "convert dense out --task m=no.jsonl": "tasks.m (--task): no.jsonl: no such file; name a file",
    "convert dense out -c no.yaml": "no.yaml: No such file",
    "convert dense out -c tasks.yaml": "tasks.m: no.txt: no such file; name a file",
    "finetune no out --task m=m.txt": "no: no such directory",
    "finetune dense out --task m=m.txt --distill-from no": "no: no such directory",
    "finetune dense out --task m=dense": "tasks.m (--task): dense: unknown extension ''",
    "finetune dense out --task m=m.txt --eval n=no.txt": "tasks.n (--eval): no.txt: no such file; name a file",
    "finetune dense out -c dense": "dense: Is a directory.",
    "eval no --task m=m.txt": "no: no such directory",
    "eval dense --task m=m.txt --baseline no": "no: no such directory",
    "eval dense --task m=no.csv": "tasks.m (--task): no.csv: unknown extension '.csv'",
    "analyze no -o out --task m=m.txt": "no: no such directory",
    "analyze dense -o out --task m=dense.txt": "tasks.m (--task): dense.txt: is a directory; name a file",
    "analyze dense -o out -c broken.yaml": "broken.yaml:2: not valid YAML",
}


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("dense", "dense.txt"):
        (tmp_path / name).mkdir()
    texts = {
        "m.txt": "one",
        "broken.yaml": "tasks: [\n",
        "tasks.yaml": "tasks: {m: no.txt}\n",
        "routed.yaml": "tasks: {m: no.txt}\nrouter: {routing: tokn}\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def test_what_is_not_there_is_told_before_anything_heavy_is_loaded(there: Path) -> None:
    program = (
        "import sys\n"
        "from modmoe.cli.main import run\n"
        f"codes = {{run(line.split()) for line in {list(ABSENT)!r}}}\n"
        "print(codes, 'torch' in sys.modules, 'transformers' in sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    *lines, last = done.stderr.splitlines()
    assert last == "{2} False False"
    assert len(lines) == len(ABSENT)
    for line, words in zip(lines, ABSENT.values(), strict=True):
        assert line.startswith(SHARED_START + words)


def test_of_several_processes_none_ends_before_it_has_joined_the_others(
    there: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        api.check_there(["no"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    api.check_there(["no"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "routed.yaml: router.routing: no such value 'tokn'"),
        ("--routing sentence", "router.routing (--routing): no such value 'sentence'"),
        ("--routing token --seed -1", "seed (--seed): -1 is not between"),
        ("--routing=token --top-k 0", "router.top_k (--top-k): 0 is not above 0."),
        ("--routing token --task a+b=m.txt", "tasks (--task): 'a+b' is no usable name"),
        ("--routing token --device cpu", "tasks.m: no.txt: no such file"),
    ],
)
def test_an_error_names_the_flag_where_the_value_came_from_one(
    flags: str, words: str, there: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fail(capsys, *f"convert dense out -c routed.yaml {flags}".split()).startswith(words)


@pytest.mark.parametrize(
    ("flags", "message", "words"),
    [
        ("--no-coverage", "assignment.coverage: none.", "assignment.coverage (--no-coverage): none."),
        ("--coverage", "assignment.coverage: none.", "assignment.coverage (--coverage): none."),
        ("--score wanda", "experts.score: none.", "experts.score (--score): none."),
        ("--partition x", "partition.num_modules: none.", "partition.num_modules: none."),
        ("--partition x", "partition.methods: none.", "partition.methods: none."),
        ("--partition x", "r: partition.method: none.", "r: partition.method: none."),
        ("--task a=x", "tasks.b: none.", "tasks.b: none."),
    ],
)
def test_which_flag_is_named(
    flags: str, message: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def convert(*_: Any, **__: Any) -> None:
        place, _, problem = message.rpartition(": ")
        raise PartitionError(place, problem)

    monkeypatch.setattr(api, "convert", convert)
    assert fail(capsys, *f"convert a b {flags}".split()) == words


def raise_from(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> list[str]:
    def broken(*_: Any, **__: Any) -> dict[str, Any]:
        raise error

    monkeypatch.setattr(api, "inspect", broken)
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
