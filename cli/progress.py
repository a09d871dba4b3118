"""How far a command is: a bar on a terminal, plain lines in a log, with a rate and the time left."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

from modmoe.cli.streams import PlainStream, terminal
from modmoe.errors import visible

PLAIN_INTERVAL_S = 10.0
"""Between two lines of one stage, where stderr is no terminal."""
_FEW = 10
"""Of so few things, such as layers or tasks, the rate is no news once they are done."""
SHORT_S = 1.0
"""A stage that takes less says nothing at its end, and how long it will take is not told before."""


@dataclass(slots=True)
class Stage:
    """What a command is doing, from the first word of it to the next stage's."""

    message: str
    """As reported: what is done, and behind the last comma the unit of what is counted, as in "profiling, tokens"."""
    started_s: float
    begun_at: int
    """What was done before: a run that goes on where another stopped has not done that now."""
    done: int | None = None
    total: int | None = None
    said_s: float = 0.0
    is_over: bool = False

    @property
    def name(self) -> str:
        """What is done."""
        return self.message.rpartition(", ")[0] if self.unit else self.message

    @property
    def unit(self) -> str:
        """What is counted, in the plural; empty where that is not said."""
        _, comma, unit = self.message.rpartition(", ")
        return unit if comma and unit.isalpha() else ""

    def count(self, number: int) -> str:
        """Return a number of the unit in words."""
        if self.unit == "bytes":
            return size_words(number)
        return f"{number:,} {self.unit.removesuffix('s') if number == 1 else self.unit}".rstrip()

    def rate(self, seconds: float) -> str:
        """Return what was done in a second, in words; empty while there is nothing to tell."""
        moved = (self.done or 0) - self.begun_at
        if not self.unit or moved <= 0 or seconds <= 0:
            return ""
        speed = moved / seconds
        if self.unit == "bytes":
            return f"{size_words(speed)}/s"
        return f"{speed:,.0f} {self.unit}/s" if speed >= 10 else f"{speed:.2g} {self.unit}/s"

    def now(self, seconds: float) -> str:
        """Return how far it is, how fast, and how long it will take from here."""
        if self.done is None or self.total is None:
            return ""
        done = size_words(self.done) if self.unit == "bytes" else f"{self.done:,}"
        words = [f"{done} of {self.count(self.total)}"]
        if rate := self.rate(seconds):
            words.append(rate)
        if (moved := self.done - self.begun_at) > 0 and self.done < self.total and seconds >= SHORT_S:
            words.append(f"{time_words(seconds * (self.total - self.done) / moved)} left")
        return ", ".join(words)

    def end(self, seconds: float) -> str:
        """Return what was done in how long."""
        taken = time_words(seconds)
        if self.done is None or self.total is None:
            return f"done in {taken}"
        rate = self.rate(seconds) if self.done - self.begun_at >= _FEW else ""
        return f"{self.count(self.done)} in {taken}" + (f", {rate}" if rate else "")


class Progress:
    """Shows one stage at a time on stderr. Reports may come from any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        """``clock`` tells the seconds."""
        self._clock = clock
        self._stage: Stage | None = None
        self._bar: Any = None
        self._lock = threading.Lock()

    def report(self, message: str, done: int | None = None, total: int | None = None) -> None:
        """Say how far a stage is; a new message, or one whose count begins again, is a new stage."""
        with self._lock:
            now_s, stage = self._clock(), self._stage
            is_new = stage is None or stage.message != message
            is_again = stage is not None and stage.is_over and done != stage.done
            if stage is None or is_new or is_again:
                self._end(now_s)
                stage = self._stage = Stage(message, now_s, done or 0)
            stage.done, stage.total = done, total
            if (screen := terminal(sys.stderr)) is not None:
                self._draw(stage, now_s, screen)
            elif not stage.said_s or now_s - stage.said_s >= PLAIN_INTERVAL_S:
                self._say(stage, now_s)
            if done is not None and done == total and stage.begun_at != done:
                self._end(now_s)

    def close(self, *, failed: bool = False) -> None:
        """Take the bar away and say how long the stage at hand took, unless it failed."""
        with self._lock:
            if self._stage is not None:
                self._stage.is_over |= failed
            self._end(self._clock())
            self._stage = None

    def _say(self, stage: Stage, now_s: float) -> None:
        is_first = not stage.said_s
        stage.said_s = now_s
        if stage.is_over or (not is_first and stage.done == stage.total):
            return
        words = stage.now(now_s - stage.started_s)
        if is_first and not stage.done and stage.total is not None:
            words = stage.count(stage.total)
        _print(f"{stage.name}: {words}" if words else stage.name)

    def _end(self, now_s: float) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            _lay_above(None)
        stage = self._stage
        if stage is not None and not stage.is_over:
            stage.is_over = True
            seconds = now_s - stage.started_s
            if seconds >= SHORT_S:
                _print(f"{stage.name}: {stage.end(seconds)}", is_done=True)

    def _draw(self, stage: Stage, now_s: float, screen: IO[str]) -> None:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        if stage.is_over:
            return
        if self._bar is None:
            # how far it is in words; where that is not known, how long it has taken
            last = TextColumn("{task.fields[now]}", markup=False) if stage.total is not None else TimeElapsedColumn()
            columns = (TextColumn("{task.description}", markup=False), BarColumn(None), last)
            console = RichConsole(file=screen)
            self._bar = Bar(
                *columns, console=console, transient=True, expand=True, redirect_stdout=False, redirect_stderr=False
            )
            name, now = visible(stage.name), stage.now(now_s - stage.started_s)
            self._bar.add_task(name, total=stage.total, now=now)
            self._bar.start()
            _lay_above(console)
        now = stage.now(now_s - stage.started_s)
        self._bar.update(self._bar.task_ids[0], completed=stage.done or 0, total=stage.total, now=now)


def _lay_above(console: Any) -> None:
    """Let what is printed to stderr land above a bar that ``console`` draws; None: there is no bar."""
    for stream in {sys.stderr, sys.stdout}:
        if not isinstance(stream, PlainStream):
            continue
        if stream.above is not None:
            stream.above.flush()
        stream.above = None
        if console is not None and stream.stream is console.file:
            from rich.file_proxy import FileProxy

            stream.above = FileProxy(console, console.file)


def _print(line: str, *, is_done: bool = False) -> None:
    screen = terminal(sys.stderr) if is_done else None
    if screen is not None:
        from rich.console import Console as RichConsole
        from rich.text import Text

        console = RichConsole(file=screen, soft_wrap=True)
        mark = "✓" if console.encoding.startswith("utf") else "*"
        console.print(Text.assemble((mark, "green"), f" {visible(line)}"))
    else:
        print(f"modmoe: {visible(line)}", file=sys.stderr, flush=True)


def size_words(size_bytes: float) -> str:
    """Return bytes as people read them, in powers of ten."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(size_bytes) < 1000:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.2f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} TB"


def time_words(seconds: float) -> str:
    """Return a time as people read it: 3.2 s, 45 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
