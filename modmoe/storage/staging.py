"""Outputs that are whole or absent: written beside as ``<out>.partial``, renamed when complete.

Everything is on the disk before the rename. Where an output is replaced, the old and the new one exchange their names
in one step of the file system (Linux's renameat2, https://man7.org/linux/man-pages/man2/rename.2.html). On file systems
without that step the old output is called ``<out>.replaced`` for a moment; after a crash the next run restores it.
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
from collections.abc import Iterator, Mapping
from pathlib import Path

from modmoe.errors import ModmoeError, RecipeError, disk_error
from modmoe.storage.files import UNSUPPORTED, check_name, kind_of, sync, target_of
from modmoe.storage.seal import MARK, SEAL, clear, empty, find_foreign, find_stranger, is_marked, seal, snapshot

LOG = logging.getLogger(__name__)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


def check_output(out: str | Path, *, overwrite: bool) -> Path:
    """Return ``out`` as a path if a run may write a directory there; nothing is changed.

    Raises:
        RecipeError: no directory can be there; it, or ``<out>.partial`` beside it, holds what modmoe did not write or
            is no longer as modmoe wrote it; or it holds an output and ``overwrite`` is False.
    """
    path = Path(out)
    check_name(out)
    _check_directory(out, overwrite=overwrite)
    _check_partial(partial_of(out))
    return path


def _check_directory(out: str | Path, *, overwrite: bool) -> None:
    """Raise RecipeError unless ``out`` is not there, an empty directory, or an output that is to be replaced."""
    path = target_of(out)
    if not path.exists():
        return
    if not path.is_dir():
        raise RecipeError(str(out), f"is {kind_of(path)}", "name a directory that does not exist yet")
    try:
        is_empty = not any(path.iterdir())
        # a container's volume is a mount point, which cannot be renamed, so no output there appears in one step
        if path.is_mount():
            raise RecipeError(
                str(out),
                "is a mounted disk, whose name cannot be changed when all is written",
                f"name a directory in it, such as {Path(out) / 'model'}",
            )
        if is_empty:
            return
        if not overwrite:
            remedy = "name another directory" + (" or pass --overwrite" if (path / SEAL).is_file() else "")
            raise RecipeError(str(out), "is not empty", remedy)
        foreign = find_foreign(path)
    except OSError as error:
        place = error.filename or out
        raise RecipeError(str(place), os.strerror(error.errno or 0), "name another directory") from None
    if foreign is not None:
        raise RecipeError(
            str(out),
            f"holds {foreign}, and --overwrite replaces only what modmoe wrote",
            "name another directory, or remove this one yourself",
        )


def _check_partial(partial: Path) -> None:
    """Raise RecipeError unless ``<out>.partial`` is not there, empty, or left by a run that was stopped."""
    if not os.path.lexists(partial):
        return
    remedy = "move it away, or name another output"
    if partial.is_symlink() or not partial.is_dir():
        raise RecipeError(str(partial), "is in the way and not of modmoe", remedy)
    try:
        if not any(partial.iterdir()):
            return
        stranger = find_stranger(partial)
    except OSError as error:
        raise RecipeError(str(partial), os.strerror(error.errno or 0), remedy) from None
    if not is_marked(partial):
        raise RecipeError(str(partial), "is in the way, and no run of modmoe left it", remedy)
    if stranger is not None:
        raise RecipeError(str(partial), f"holds '{stranger}', which modmoe did not write", remedy)


def check_space(out: str | Path, size_bytes: int) -> None:
    """Raise RecipeError unless ``size_bytes`` are free where ``out`` is to be written."""
    place = Path(out).absolute()
    while not place.exists():
        place = place.parent
    free_bytes = shutil.disk_usage(place).free
    if size_bytes > free_bytes:
        raise RecipeError(
            str(out),
            f"needs {size_bytes:,} bytes, and {free_bytes:,} are free there",
            "free some space or name another directory",
        )


def partial_of(out: str | Path) -> Path:
    """Return the directory in which ``out`` is written until it is whole; beside what a symbolic link names."""
    path = target_of(out)
    return path.with_name(path.name + ".partial")


@contextlib.contextmanager
def open_output(
    out: str | Path, *, overwrite: bool = False, size_bytes: int = 0, spent: Path | None = None
) -> Iterator[Path]:
    """Yield ``<out>.partial`` to write into; seal it and rename it to ``out`` on success.

    On an error the partial directory is removed. What was there before stays until the new output is whole. A lock of
    the operating system, which ends with its process, keeps two runs apart. Nothing that modmoe did not write is
    removed or renamed.

    Args:
        out: a directory.
        overwrite: replace what modmoe wrote there.
        size_bytes: what will be written, as far as it is known; it has to be free.
        spent: a directory of states, removed once the output is whole, when it is of no further use.

    Raises:
        RecipeError: ``out`` is not free, its parent cannot be written, another run is writing there, there is too
            little room, or the disk failed.
    """
    path, partial = target_of(out), partial_of(out)
    check_output(out, overwrite=overwrite)
    if path.is_dir() and path.samefile(Path.cwd()):
        raise RecipeError(str(out), "is the working directory, which cannot be replaced", "name a directory in it")
    check_space(path, size_bytes)
    made: list[Path] = []
    try:
        made = _make_parents(path)
        with _claimed(partial, str(out)):
            try:
                recover(path)
                # again, since another run may have finished in between
                _check_directory(out, overwrite=overwrite)
                before = snapshot(path) if path.exists() else {}
                yield partial
                _publish(partial, path, before, spent=spent, name=str(out))
            except BaseException as error:
                _remove(partial)
                _name_output(error, partial, out)
                if isinstance(error, KeyboardInterrupt) and not hasattr(error, "__notes__"):
                    error.add_note(f"Nothing of {out} was written.")
                raise
    except Exception as error:
        failed = None if isinstance(error, ModmoeError) else disk_error(error, out)
        if failed is None:
            raise
        _name_output(failed, partial, out)
        for note in getattr(error, "__notes__", ()):
            failed.add_note(note)
        raise failed from error
    finally:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # another run has put an output there by now
                parent.rmdir()


def _name_output(error: BaseException, partial: Path, out: str | Path) -> None:
    """Replace ``partial`` by ``out`` in an error's message: the partial directory is gone by the time it is read."""
    if isinstance(error, ModmoeError) and str(partial) in str(error):
        error.args = (str(error).replace(str(partial), str(out)), *error.args[1:])


def _make_parents(path: Path) -> list[Path]:
    """Make the directories that ``path`` is to lie in; return those that were not there, the outermost first."""
    missing = [parent for parent in path.parents if not parent.exists()][::-1]
    path.parent.mkdir(parents=True, exist_ok=True)
    return missing


def _remove(directory: Path) -> None:
    left = clear(directory)
    if left:
        LOG.warning("%s: stays, since it holds '%s', which modmoe did not write", directory, left[0])


@contextlib.contextmanager
def _claimed(partial: Path, name: str) -> Iterator[None]:
    """Make ``partial``, or empty what an interrupted run left of it, and hold the lock on its mark meanwhile."""
    while True:
        is_new = not partial.exists()
        with contextlib.suppress(FileExistsError):
            partial.mkdir()
        _check_partial(partial)
        try:
            handle = os.open(partial / MARK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except FileNotFoundError:
            continue  # another run that ends has removed the directory meanwhile
        except BaseException:
            # Ctrl-C may come here too, and without its mark no later run would know that the directory is modmoe's
            if is_new:
                with contextlib.suppress(OSError):
                    partial.rmdir()
            raise
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the run that held the lock may have removed or renamed the directory meanwhile
            if os.path.samestat(os.fstat(handle), os.stat(partial / MARK)):
                break
        except BlockingIOError as error:
            os.close(handle)
            raise RecipeError(
                str(name), "another run is writing there", "wait for it or name another directory"
            ) from error
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno in UNSUPPORTED:
                LOG.warning("%s: its file system has no locks; let no other run write there", name)
                break
            os.close(handle)
            raise
        os.close(handle)
    try:
        empty(partial)
        yield
    finally:
        os.close(handle)


def recover(path: Path) -> None:
    """Restore an old output, or remove it, where a run was killed while it exchanged names."""
    old = _replaced(path)
    if not old.is_dir() or old.is_symlink() or not is_marked(old) or find_foreign(old) is not None:
        return
    if path.exists():
        _remove(old)
    else:
        old.rename(path)
        _unmark(path)


def _unmark(directory: Path) -> None:
    with contextlib.suppress(OSError):
        (directory / MARK).unlink()


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


def _publish(partial: Path, path: Path, before: Mapping[str, object], *, spent: Path | None, name: str) -> None:
    """Give what is in ``partial`` the name ``path``, all of it or, where an error is raised, nothing."""
    seal(partial)
    sync_tree(partial)
    with _undisturbed(name):
        is_old = path.exists() and bool(before)
        if is_old:
            if snapshot(path) != before:
                raise RecipeError(str(name), "was changed by somebody while modmoe worked", "name another directory")
            # the old output is marked too, so that a run that finds it under another name knows whose it is
            (path / MARK).touch()
        change = _exchange if is_old else Path.rename
        try:
            change(partial, path)
        except OSError as error:
            if is_old:
                _unmark(path)
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise RecipeError(
                    str(name), "somebody wrote there while modmoe worked", "name another directory"
                ) from error
            raise
        try:
            sync(path.parent)
        except OSError as error:
            error.filename = name  # the error is about the output, not about the directory that holds it
            if is_old:
                _exchange(partial, path)
                _unmark(path)
            else:
                path.rename(partial)
            raise
        for old in (partial, spent):
            if old is not None and is_marked(old):
                _remove(old)
        _unmark(path)


def _exchange(first: Path, second: Path) -> None:
    """Exchange the names of two directories, in one step where the file system can."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    code = errno.ENOSYS
    if rename is not None:
        if rename(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
            return
        code = ctypes.get_errno()
    if code not in UNSUPPORTED:
        raise OSError(code, os.strerror(code), str(second))
    old = _replaced(second)
    if os.path.lexists(old):
        raise RecipeError(str(old), "is in the way, and not of modmoe", "move it away, or name another output")
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
    """Hold Ctrl-C back until the names are exchanged and the old output is gone."""
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
