"""Temporary directories that go, whatever ends the run: those of a run that was killed go with the next one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "modmoe-"
_LOCK = ".in-use"


@contextlib.contextmanager
def scratch_directory(purpose: str) -> Iterator[Path]:
    """Yield an empty temporary directory, removed at the end, and remove those that killed runs left."""
    _sweep()
    with tempfile.TemporaryDirectory(prefix=f"{_PREFIX}{purpose}-", ignore_cleanup_errors=True) as name:
        lock = os.open(Path(name) / f"{_LOCK}.new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # the operating system gives it back with the end of this process, however that comes
            with contextlib.suppress(OSError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # only a file that is locked bears the name: without it nobody may say that the directory is left over
                (Path(name) / f"{_LOCK}.new").rename(Path(name) / _LOCK)
            yield Path(name)
        finally:
            os.close(lock)


def _sweep() -> None:
    """Remove this user's directories whose run is gone."""
    with contextlib.suppress(OSError):
        for entry in list(os.scandir(tempfile.gettempdir())):
            if entry.name.startswith(_PREFIX) and _is_ours(entry):
                _remove_if_left(Path(entry.path))


def _is_ours(entry: os.DirEntry[str]) -> bool:
    with contextlib.suppress(OSError):
        found = entry.stat(follow_symlinks=False)
        return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    return False


def _remove_if_left(directory: Path) -> None:
    try:
        lock = os.open(directory / _LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # its run goes on, or the file system cannot tell
        return
    else:
        shutil.rmtree(directory, ignore_errors=True)
    finally:
        os.close(lock)
