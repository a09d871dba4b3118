"""Ctrl-C, SIGTERM and SIGHUP end a command as an error does: what it began is put away, what it started ends too."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

INTERRUPTED = 128 + signal.SIGINT
"""The exit code of Ctrl-C."""
_AGAIN_S = 0.5
"""Within this time a second signal is the first, sent to the process and to its group, as `timeout` does."""


class Stops:
    """The signals that end a command: the first raises KeyboardInterrupt, the second ends the process at once."""

    def __init__(self) -> None:
        """Know of none yet."""
        self.code = INTERRUPTED
        self._first_s: float | None = None

    @property
    def is_asked(self) -> bool:
        """Whether a signal came: libraries make other errors of it, as those do that are loaded when it comes."""
        return self._first_s is not None

    def take(self, number: int, _: Any) -> None:
        """Handle a signal."""
        now_s = time.monotonic()
        if self._first_s is None:
            self._first_s, self.code = now_s, 128 + number
            raise KeyboardInterrupt
        if now_s - self._first_s > _AGAIN_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


@contextlib.contextmanager
def stoppable() -> Iterator[Stops]:
    """Handle the signals that end a command, but for those that are someone else's, or ignored, as under nohup.

    SIGINT is handled even where it is ignored: a shell without job control starts what runs in its background so, and
    a training that nobody can stop keeps no state.
    """
    stops, before = Stops(), {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            handler = signal.getsignal(number)
            is_free = handler in (signal.SIG_DFL, signal.default_int_handler)
            if is_free or (number == signal.SIGINT and handler == signal.SIG_IGN):
                before[number] = signal.signal(number, stops.take)
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
