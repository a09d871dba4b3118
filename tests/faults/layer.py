"""What stands between a command and the disk in a test: it counts the calls that change files, and goes wrong at one.

Python's own calls are met one by one. Files that safetensors and torch write by themselves count as one call each.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

ACTIONS = ("kill", "interrupt", "ENOSPC", "EIO")
"""What a call can come to: SIGKILL or SIGINT to the process, or an error of the disk."""
_EVENTS = {"os.rename": 0, "os.remove": 0, "os.rmdir": 0, "os.mkdir": 0, "os.truncate": 0}
"""Python's audit events that change names, and which argument is the path."""


class Layer:
    """Counts the calls that change what lies under ``root``; at number ``at``, from 1, does ``action``."""

    def __init__(self, root: Path, action: str | None = None, at: int = 0) -> None:
        self.root, self.action, self.at = os.path.realpath(root), action, at
        self.calls: list[str] = []
        self._lock = threading.RLock()  # half a call may be made of others

    def install(self) -> None:
        """Meet all calls of this process from now on; there is no way back, so it is for a fork."""
        sys.addaudithook(self._hear)
        for name in ("fsync", "posix_fallocate"):
            self._wrap(os, name, lambda handle, *_: handle)
        self._wrap(os, "write", lambda handle, *_: handle, torn=_write_half)
        self._wrap(os, "pwrite", lambda handle, *_: handle, torn=_pwrite_half)
        self._wrap(os, "sendfile", lambda handle, *_: handle)
        layer = self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                layer.meet("write", self.name, lambda: super(Raw, self).write(bytes(data)[: len(data) // 2]))
                return super().write(data)

        opened = io.open

        def open_watched(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
            writes = any(letter in mode for letter in "wax+")
            if isinstance(file, int) or "opener" in kwargs or not writes or not self._is_ours(file):
                return opened(file, mode, *args, **kwargs)
            raw = Raw(file, mode.replace("b", "").replace("t", ""))
            buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            if "b" in mode:
                return buffered
            names = ("buffering", "encoding", "errors", "newline")
            options = {**dict(zip(names, args, strict=False)), **kwargs}
            options.pop("buffering", None)
            return io.TextIOWrapper(buffered, **options)

        io.open = builtins.open = open_watched  # type: ignore[assignment]
        self._wrap_libraries()

    def _wrap_libraries(self) -> None:
        import safetensors.torch
        import torch

        self._wrap(safetensors.torch, "serialize_file", lambda _, path, *__, **___: path, torn=_tear)
        self._wrap(torch, "save", lambda _, path, *__, **___: path, torn=_tear)

    def _wrap(self, home: Any, name: str, where: Callable[..., Any], torn: Callable[..., Any] | None = None) -> None:
        real = getattr(home, name)

        def met(*args: Any, **kwargs: Any) -> Any:
            half = None if torn is None else lambda: torn(real, *args, **kwargs)
            self.meet(name, where(*args, **kwargs), half)
            return real(*args, **kwargs)

        setattr(home, name, met)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event in _EVENTS:
            self.meet(event, args[_EVENTS[event]])
        elif event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            self.meet("open", args[0])

    def _is_ours(self, place: Any) -> bool:
        path = self._path(place)
        return path is not None and (path == self.root or path.startswith(self.root + os.sep))

    def _path(self, place: Any) -> str | None:
        try:
            if isinstance(place, int):
                return os.readlink(f"/proc/self/fd/{place}")
            return os.path.abspath(os.fsdecode(place))
        except (OSError, TypeError, ValueError):
            return None

    def meet(self, call: str, place: Any, torn: Callable[[], Any] | None = None) -> None:
        """Count a call, and go wrong where it is the one; ``torn`` does half of it first."""
        if not self._is_ours(place):
            return
        path = str(self._path(place))
        with self._lock:
            self.calls.append(f"{call} {os.path.relpath(path, self.root)}")
            if len(self.calls) != self.at or self.action is None:
                return
            # by turns, since a call may also fail before it has done anything
            if torn is not None and self.action != "interrupt" and self.at % 2:
                torn()
            if self.action == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "interrupt":
            os.kill(os.getpid(), signal.SIGINT)
            return
        code = getattr(errno, self.action)
        raise OSError(code, os.strerror(code), None if isinstance(place, int) else path)


def _write_half(real: Any, handle: int, data: Any) -> None:
    real(handle, bytes(data)[: len(data) // 2])


def _pwrite_half(real: Any, handle: int, data: Any, offset: int) -> None:
    real(handle, bytes(data)[: len(data) // 2], offset)


def _tear(real: Any, value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
    real(value, path, *args, **kwargs)
    os.truncate(path, os.path.getsize(path) // 2)
