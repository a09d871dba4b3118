"""Outputs that are whole or absent: written beside as ``<out>.partial``, renamed when complete.

All that is written reaches the disk before the rename. An output that is replaced changes its name with the new one in
one step of the file system (Linux's renameat2, https://man7.org/linux/man-pages/man2/rename.2.html). Where it has none
the old one is called ``<out>.replaced`` for a moment, and the next run puts back what a crash left so.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

from modmoe.errors import ModmoeError, RecipeError, disk_error

LOG = logging.getLogger(__name__)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
# what file systems without locks, without an exchange of names, or without syncing of directories say
_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK}


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


def partial_of(out: str | Path) -> Path:
    """Return the directory in which ``out`` is written until it is whole; beside what a symbolic link names."""
    path = _target(out)
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def open_output(
    out: str | Path, *, overwrite: bool = False, size_bytes: int = 0, spent: Path | None = None
) -> Iterator[Path]:
    """Yield ``<out>.partial`` to write into; rename it to ``out`` on success.

    On an error the partial directory is removed. What was there before stays until the new output is whole. A lock held
    by the operating system, and so gone with its process, keeps two runs apart.

    Args:
        out: a directory.
        overwrite: replace what is there.
        size_bytes: what will be written, as far as it is known; it has to be free.
        spent: a directory that is of no use once the output is whole, and removed then.

    Raises:
        RecipeError: ``out`` is not free, its parent cannot be written, another run is writing there, there is too
            little room, or the disk failed.
    """
    check_output(out, overwrite=overwrite)
    path, partial = _target(out), partial_of(out)
    if path.is_dir() and (path.is_mount() or path.samefile(Path.cwd())):
        raise RecipeError(
            f"{out}: is a mounted disk or the working directory, which cannot be replaced when all is written; name a "
            "directory in it."
        )
    check_space(path, size_bytes)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            _recover(path)
            # again, since another run may have finished in between
            check_output(out, overwrite=overwrite)
            if partial.exists():
                shutil.rmtree(partial)
            partial.mkdir()
            try:
                yield partial
                _publish(partial, path, overwrite=overwrite, spent=spent, name=str(out))
            except BaseException as error:
                shutil.rmtree(partial, ignore_errors=True)
                if isinstance(error, KeyboardInterrupt) and not hasattr(error, "__notes__"):
                    error.add_note(f"Nothing of {out} was written.")
                raise
    except Exception as error:
        failed = None if isinstance(error, ModmoeError) else disk_error(error, out)
        if failed is None:
            raise
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error


def _target(out: str | Path) -> Path:
    path = Path(os.path.abspath(out))
    return path.resolve() if path.is_symlink() else path


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(f".{path.name}.lock")
    while True:
        handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the run that had it may have removed the file meanwhile; then another one is what the next run locks
            if os.path.samestat(os.fstat(handle), os.stat(lock)):
                break
        except BlockingIOError as error:
            os.close(handle)
            raise RecipeError(
                f"{path}: another run is writing there; wait for it or name another directory."
            ) from error
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                LOG.warning("%s: its file system has no locks; let no other run write there", path)
                break
            os.close(handle)
            raise
        os.close(handle)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()
        os.close(handle)


def _recover(path: Path) -> None:
    """Put back an old output, or remove it, where a run was killed while names changed."""
    old = _replaced(path)
    if old.exists() and not path.exists():
        old.rename(path)
    elif old.exists():
        shutil.rmtree(old)


def put_in_place(partial: Path, path: Path) -> None:
    """Give a directory the name ``path``, which is free, once all of it is on the disk."""
    sync_tree(partial)
    partial.rename(path)
    sync(path.parent)


def sync_tree(directory: Path) -> None:
    """Wait until all that lies in a directory is on the disk."""
    for place, _, files in os.walk(directory, topdown=False):
        for file in files:
            sync(Path(place, file))
        sync(Path(place))


def _publish(partial: Path, path: Path, *, overwrite: bool, spent: Path | None, name: str) -> None:
    """Give what is in ``partial`` the name ``path``, all of it or, where an error is raised, nothing."""
    sync_tree(partial)
    with _undisturbed(name):
        change = _exchange if overwrite and path.exists() else Path.rename
        change(partial, path)
        try:
            sync(path.parent)
        except OSError as error:
            error.filename = name  # what was to be there, and not the directory around it
            if change is _exchange:
                _exchange(partial, path)
            else:
                path.rename(partial)
            raise
        for old in (partial, spent):
            if old is not None:
                shutil.rmtree(old, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    if not path.is_dir() and not path.is_file():  # a link to what is not there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        if error.errno not in _UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def _exchange(first: Path, second: Path) -> None:
    """Exchange the names of two directories, in one step where the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
    if code not in _UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(second))
    old = _replaced(second)
    second.rename(old)
    try:
        first.rename(second)
    except OSError:
        old.rename(second)
        raise
    old.rename(first)


def _replaced(path: Path) -> Path:
    return path.with_name(path.name + ".replaced")


@contextlib.contextmanager
def _undisturbed(name: str) -> Iterator[None]:
    """Hold Ctrl-C back until names have changed and what is old is gone."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before or signal.SIG_DFL)
    if held:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as stop:
            stop.add_note(f"{name} is whole.")
            raise
