"""What a person sees of a long step: a bar on a terminal, few lines in a log, nothing where nothing is wanted."""

from __future__ import annotations

import io
import re
import sys
import threading
import time
from typing import Any

import pytest

from modmoe.cli.console import Console
from modmoe.cli.progress import Progress, time_words


class Clock:
    """A clock that is set by hand."""

    now_s = 100.0

    def __call__(self) -> float:
        """Return the seconds."""
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_a_log_has_a_beginning_a_line_every_ten_seconds_and_an_end(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress(clock)
    shown.report("profiling, tokens", 0, 98304)
    for second in range(1, 25):
        clock.now_s = 100 + second
        shown.report("profiling, tokens", 4096 * second, 98304)
    assert capsys.readouterr().err.splitlines() == [
        "modmoe: profiling: 98,304 tokens",
        "modmoe: profiling: 40,960 of 98,304 tokens, 4,096 tokens/s, 14 s left",
        "modmoe: profiling: 81,920 of 98,304 tokens, 4,096 tokens/s, 4.0 s left",
        "modmoe: profiling: 98,304 tokens in 24 s, 4,096 tokens/s",
    ]


def test_bytes_and_slow_units_are_told_as_people_read_them(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(clock)
    shown.report("writing, bytes", 0, 4 * 10**9)
    clock.now_s += 10
    shown.report("writing, bytes", 10**9, 4 * 10**9)
    shown.report("partitioning, layers", 0, 80)
    clock.now_s += 100
    shown.report("partitioning, layers", 5, 80)
    shown.close()
    assert capsys.readouterr().err.splitlines() == [
        "modmoe: writing: 4.00 GB",
        "modmoe: writing: 1.00 GB of 4.00 GB, 100.00 MB/s, 30 s left",
        "modmoe: writing: 1.00 GB in 10 s, 100.00 MB/s",
        "modmoe: partitioning: 80 layers",
        "modmoe: partitioning: 5 of 80 layers, 0.05 layers/s, 25 min 00 s left",
        "modmoe: partitioning: 5 layers in 1 min 40 s",
    ]


def test_what_was_done_before_is_no_speed(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(clock)
    shown.report("training, steps", 900, 1000)
    clock.now_s += 10
    shown.report("training, steps", 950, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "modmoe: training: 900 of 1,000 steps",
        "modmoe: training: 950 of 1,000 steps, 5 steps/s, 10 s left",
    ]


def test_a_stage_without_a_count_tells_its_time_unless_it_was_short_or_failed(
    clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = Progress(clock)
    shown.report("verifying (2.2 GB, 12 GB free)")
    clock.now_s += 3.2
    shown.report("reading the tasks")
    clock.now_s += 0.5
    shown.report("loading")
    clock.now_s += 60
    shown.close(failed=True)
    assert capsys.readouterr().err.splitlines() == [
        "modmoe: verifying (2.2 GB, 12 GB free)",
        "modmoe: verifying (2.2 GB, 12 GB free): done in 3.2 s",
        "modmoe: reading the tasks",
        "modmoe: loading",
    ]


def test_the_same_stage_may_come_again(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(clock)
    for _ in range(2):
        for done in (0, 5, 10, 10):
            shown.report("measuring, tokens", done, 10)
            clock.now_s += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["modmoe: measuring: 10 tokens", "modmoe: measuring: 10 tokens in 2.0 s, 5 tokens/s"] * 2


def test_several_threads_may_report(capsys: pytest.CaptureFixture[str]) -> None:
    shown = Progress(Clock())
    threads = [
        threading.Thread(target=lambda: [shown.report("writing, bytes", i, 50) for i in range(50)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capsys.readouterr().err == "modmoe: writing: 50 B\n"


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True


def test_a_terminal_has_one_bar_and_keeps_the_ends(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    shown = Progress(clock)
    for second in range(5):
        clock.now_s = 100.0 + second
        shown.report("profiling, tokens", 1000 * second, 4000)
        if second == 2:
            time.sleep(0.3)  # the bar is drawn ten times a second
    shown.report("verifying")
    clock.now_s += 2
    shown.close()
    text = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", terminal.getvalue())
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert "✓ profiling: 4,000 tokens in 4.0 s, 1,000 tokens/s" in lines
    assert "✓ verifying: done in 2.0 s" in lines
    bars = [line for line in lines if "━" in line]
    assert any("2,000 of 4,000 tokens, 1,000 tokens/s, 2.0 s left" in line for line in bars)
    assert all(len(line) <= 80 for line in bars)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (59.4, "59 s"),
        (61, "1 min 01 s"),
        (3599.9, "1 h 00 min"),
        (90000, "25 h 00 min"),
    ],
)
def test_times_as_people_read_them(seconds: float, words: str) -> None:
    assert time_words(seconds) == words


def report_something(console: Any) -> None:
    console.progress("profiling, tokens", 0, 10)
    console.progress("profiling, tokens", 10, 10)
    console.say("a word")
    console.finish({"a": 1}, next_step="b")


def test_quiet_and_json_keep_stdout_for_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    with Console(quiet=True) as console:
        report_something(console)
    assert capsys.readouterr() == ("", "")
    with Console(as_json=True) as console:
        report_something(console)
    out, err = capsys.readouterr()
    assert out == '{"a": 1}\n'
    assert err == "modmoe: profiling: 10 tokens\na word\n"


def test_only_the_first_of_several_processes_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modmoe import api
    from modmoe.cli.main import run
    from modmoe.errors import CheckpointError, RankError

    monkeypatch.setenv("RANK", "1")
    for options in ({}, {"as_json": True}):
        with Console(**options) as console:
            report_something(console)
            console.write("text")
    assert run(["env", "--json"]) == 0
    assert run(["nonsense"]) == 2
    assert capsys.readouterr() == ("", "")
    for error, said in ((CheckpointError("told by the first"), ""), (RankError("gone"), "modmoe: gone\n")):

        def convert(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr(api, "convert", convert)
        assert run(["convert", "a", "b"]) == 2
        assert capsys.readouterr() == ("", said)
