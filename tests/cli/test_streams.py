"""What reaches stdout and stderr is text, whatever files, encodings and closed or full outputs make of it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from modmoe import api
from modmoe.cli import main
from modmoe.cli.console import Console
from modmoe.cli.streams import PlainStream, StdoutError, json_text, plain_streams, show_steering

ESCAPES = ("\x1b]0;title\x07", "\x1b[2Jevil", "\x9b31m", "a\x00b", "\x7f", "\u202egnp", "a\rb", "\x08\x08")
COMMAND = [sys.executable, "-m", "modmoe.cli.main"]


@pytest.mark.parametrize("text", ESCAPES)
def test_what_steers_a_terminal_is_shown(text: str) -> None:
    inner = io.StringIO()
    stream = PlainStream(inner, is_result=True)
    stream.write(f"x{text}\n")
    assert inner.getvalue().isascii() and inner.getvalue() != f"x{text}\n"
    assert not set(inner.getvalue()) & set("\x1b\x9b\x07\x00\x7f\u202e\x08\r")
    assert show_steering("a\tb\nü😀") == "a\tb\nü😀"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("text", ESCAPES)
@pytest.mark.parametrize("flag", [[], ["-v"], ["--json"]])
def test_names_from_files_are_shown_in_every_output(
    text: str, flag: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    result = {"model_type": text, "experts": [{"name": text, "modules_used": 1}], "parameters": {text: 1}}

    def inspect(_: str) -> dict[str, Any]:
        import logging
        import warnings

        logging.getLogger("modmoe").warning("tensor %s", text)
        logging.getLogger("modmoe").debug("tensor %s", text)
        warnings.warn(f"a library says {text}", stacklevel=1)
        print(f"a library prints {text}", file=sys.stderr)
        print(f"a library prints {text}")
        return result

    monkeypatch.setattr(api, "inspect", inspect)
    assert main.run(["inspect", "x", *flag]) == 0
    out, err = capfd.readouterr()
    assert not set(out + err) & set("\x1b\x9b\x07\x00\x7f\u202e\x08")
    if flag == ["--json"]:
        assert json.loads(out) == result


def test_an_error_that_quotes_a_file_is_one_plain_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main.run(["inspect", "no/\x1b[2J\nsuch"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "\x1b" not in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_encoding_that_lacks_a_letter_ends_nothing(encoding: str) -> None:
    raw = io.BytesIO()
    stream = PlainStream(io.TextIOWrapper(raw, encoding=encoding), is_result=True)
    stream.write("sortié 😀 \ud800\n")
    stream.flush()
    assert raw.getvalue().decode(encoding).startswith("sorti")
    value = {"file": "é😀\ud800", "bad": "\x9b"}
    text = json_text(value, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
    text.encode(encoding)
    assert json.loads(text) == value


def test_a_full_stdout_is_told_and_a_closed_stderr_is_not() -> None:
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(28, "No space left on device")

    with pytest.raises(StdoutError, match="No space left on device"):
        PlainStream(Full(), is_result=True).write("x")
    PlainStream(Full(), is_result=False).write("x")
    PlainStream(None, is_result=True).write("x")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("words", [["recipes", "show", "cmoe"], ["recipes", "ls", "--json"], ["--help"], ["--version"]])
def test_commands_on_outputs_that_do_not_take_it(words: list[str]) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, *words], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.startswith("modmoe: ") and done.stderr.count("\n") == 1
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([*COMMAND, *words], stdout=write, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_outputs_that_are_closed(closed: str, tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    line = f"'{sys.executable}' -m modmoe.cli.main recipes cp cmoe '{file}' {closed}"
    assert subprocess.run(["bash", "-c", line]).returncode == 0
    # a file that is written does not get the number of an output, and so not its lines
    assert file.read_text(encoding="utf-8").startswith("#")


def test_quiet_silences_what_libraries_print(capfd: pytest.CaptureFixture[str]) -> None:
    with plain_streams(), Console(quiet=True):
        print("a library on stdout")
        print("a library on stderr", file=sys.stderr)
        os.write(2, b"a library in C\n")
    assert capfd.readouterr() == ("", "")
    assert main.run(["inspect", "no/such/place", "-q"]) == 2
    assert capfd.readouterr().err.startswith("modmoe: no/such/place: ")
