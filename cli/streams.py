"""What reaches the terminal: text alone, whatever a stranger's file, a library or an encoding makes of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator
from typing import IO, Any

from modmoe.errors import ModmoeError, disk_error

# control characters but for tabs and line ends, and the marks that turn a line around or break it where it is shown
_STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
_UNUSUAL = re.compile(f"{_STEERING.pattern[:-1]}\ud800-\udfff]")


class StdoutError(ModmoeError, OSError):
    """What was to be printed could not be, since stdout is a file on a full or failing disk."""


class ReaderGoneError(Exception):
    """Nobody reads stdout any more, as when `head` has seen enough: no failure, which click would make of it."""


class PlainStream:
    """Stands for stdout or stderr, and passes on text: an escape sequence is shown, as in ``\\x1b[2J``, and not sent.

    It says that it is no terminal, so that libraries send none; what modmoe draws itself asks ``terminal``. What the
    encoding lacks is shown by its number. A stderr that cannot be written to is passed over, since the work matters
    more; of stdout a StdoutError tells.
    """

    def __init__(self, stream: IO[str] | None, *, is_result: bool) -> None:
        """Stand for ``stream``; None, where it was closed, takes everything. ``is_result`` says that it is stdout."""
        self.stream: IO[str] = io.StringIO() if stream is None else stream
        self._is_result, self._is_closed = is_result, stream is None
        self.is_silent = False
        # where lines go while a bar is drawn below them
        self.above: Any = None
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write text that cannot steer a terminal."""
        # click writes nothing, of both kinds, to see what it can write, and passes over errors
        if not isinstance(text, str):
            raise TypeError(f"write() takes text, not {type(text).__name__}")
        if text and not (self.is_silent or self._is_closed):
            # a bar of a library begins its line anew
            start = "\r" if text.startswith("\r") else ""
            self._try((self.above or self.stream).write, start + show_steering(text[len(start) :]))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush what it stands for."""
        if not self._is_closed:
            self._try(self.stream.flush)

    def isatty(self) -> bool:
        """Return False: nothing but text is to be sent here."""
        return False

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except BrokenPipeError as error:
            self._is_closed = True
            if self._is_result:
                raise ReaderGoneError from error
        except (OSError, ValueError) as error:  # a ValueError of a stream that somebody closed
            self._is_closed = True
            if self._is_result:
                reason = disk_error(error, "stdout") or f"stdout: cannot be written to: {error}."
                raise StdoutError(f"{reason} What was to be printed is lost.") from error

    def __getattr__(self, name: str) -> Any:
        """Return what else the stream has; its bytes are not offered, since they would pass by."""
        if name in ("buffer", "detach"):
            raise AttributeError(name)
        return getattr(self.stream, name)


def show_steering(text: str) -> str:
    r"""Return a text in which what steers a terminal is shown, as in ``\x1b``; line ends and tabs stay."""
    return _STEERING.sub(lambda match: ascii(match[0])[1:-1], text)


def json_text(value: Any, stream: Any) -> str:
    """Return a value as JSON in which neither a terminal nor the stream's encoding finds what it does not bear."""
    is_wide = str(getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
    text = json.dumps(value, ensure_ascii=not is_wide, allow_nan=False)
    return _UNUSUAL.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def terminal(stream: Any) -> IO[str] | None:
    """Return the terminal behind a stream, to be drawn on by modmoe itself; None where there is none."""
    inner: IO[str] = stream.stream if isinstance(stream, PlainStream) else stream
    is_open = not isinstance(stream, PlainStream) or not (stream.is_silent or stream._is_closed)
    return inner if is_open and inner.isatty() else None


@contextlib.contextmanager
def plain_streams() -> Iterator[None]:
    """Let stdout and stderr be plain, unless they are so already."""
    before = sys.stdout, sys.stderr
    if not isinstance(sys.stdout, PlainStream):
        sys.stdout = PlainStream(sys.stdout, is_result=True)
    if not isinstance(sys.stderr, PlainStream):
        sys.stderr = PlainStream(sys.stderr, is_result=False)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


@contextlib.contextmanager
def silence(stream: Any) -> Iterator[None]:
    """Drop what is written to stderr, by Python and by libraries that write to its number themselves."""
    stream.is_silent, kept = True, None
    with contextlib.suppress(OSError):
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)
        os.close(nowhere)
    try:
        yield
    finally:
        stream.is_silent = False
        if kept is not None:
            os.dup2(kept, 2)
            os.close(kept)


def open_missing() -> None:
    """Open what of stdin, stdout and stderr was closed, before a file that is written gets its number."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            found = os.open(os.devnull, os.O_RDWR)
            if found != number:
                os.dup2(found, number)
                os.close(found)
            os.set_inheritable(number, True)


def end_streams() -> None:
    """Flush stdout and stderr; what can no longer be written goes nowhere, or Python would complain once more."""
    for number, stream in ((1, sys.__stdout__), (2, sys.__stderr__)):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)
