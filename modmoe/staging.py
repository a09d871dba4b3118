"""Outputs that are whole or absent: written beside as ``<out>.partial``, renamed when complete."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from modmoe.errors import RecipeError


def check_output(out: str | Path, *, overwrite: bool) -> Path:
    """Return ``out`` as a path if a run may write there.

    Raises:
        RecipeError: it exists and is not an empty directory, unless ``overwrite``; or it is a file.
    """
    path = Path(out)
    if path.exists() and not path.is_dir():
        raise RecipeError(f"{path}: is a file; name a directory that does not exist yet.")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise RecipeError(f"{path}: is not empty; name another directory or pass --overwrite.")
    return path


def check_space(out: str | Path, size_bytes: int) -> None:
    """Raise RecipeError unless ``size_bytes`` are free where ``out`` is to be written."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if size_bytes > free_bytes:
        raise RecipeError(
            f"{out}: needs {size_bytes:,} bytes, and {free_bytes:,} are free there; free some space or name another "
            "directory."
        )


@contextlib.contextmanager
def open_output(out: str | Path, *, overwrite: bool = False, resume: bool = False) -> Iterator[Path]:
    """Yield ``<out>.partial`` to write into; rename it to ``out`` on success.

    On an error the partial directory is removed, unless ``resume``: then it is kept, and found again by the next run
    that passes ``resume``. A lock held by the operating system, and so gone with its process, keeps two runs apart.

    Raises:
        RecipeError: ``out`` is not free, its parent cannot be written, or another run is writing there.
    """
    path = check_output(out, overwrite=overwrite)
    partial = path.with_name(path.name + ".partial")
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}; name a directory that can be written.") from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RecipeError(
                f"{path}: another run is writing there; wait for it or name another directory."
            ) from error
        if partial.exists() and not resume:
            shutil.rmtree(partial)
        partial.mkdir(exist_ok=True)
        try:
            yield partial
            _publish(partial, path)
        except BaseException:
            if not resume:
                shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(handle)


def _publish(partial: Path, path: Path) -> None:
    for file in partial.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    old = path.with_name(path.name + ".replaced")
    if old.exists():
        shutil.rmtree(old)
    if path.exists():
        path.rename(old)
    partial.rename(path)
    shutil.rmtree(old, ignore_errors=True)
