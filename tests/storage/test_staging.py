"""Outputs take their place whole: locks that race, names that are exchanged, disks that fail at the last moment."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from modmoe.errors import RecipeError, disk_error
from modmoe.storage import seal, staging
from modmoe.storage.seal import MARK, SEAL
from modmoe.storage.staging import open_output


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An output that is there."""
    write(tmp_path / "out", "README.md")
    return tmp_path / "out"


def files(directory: Path) -> list[str]:
    """Return all that lies in a directory but the lists of what modmoe wrote."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.name != SEAL)


def write(out: Path, name: str = "config.json", **options: Any) -> None:
    with open_output(out, **options) as partial:
        (partial / name).write_text(name)


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the file system have no exchange of names."""

    def refuse(*_: Any) -> int:
        ctypes.set_errno(errno.EINVAL)
        return -1

    monkeypatch.setattr(staging.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=refuse))


@pytest.mark.parametrize("has_exchange", [True, False])
def test_an_old_output_is_replaced(old: Path, has_exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not has_exchange:
        without_exchange(monkeypatch)
    write(old, overwrite=True)
    assert files(old.parent) == ["out", "out/config.json"]


def test_there_is_no_moment_without_an_output(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    renamed = []
    rename = Path.rename
    monkeypatch.setattr(Path, "rename", lambda *names: renamed.append(names) or rename(*names))
    write(old, overwrite=True)
    assert renamed == []  # the names were exchanged by the system


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_crash_between_renames_is_mended(old: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    without_exchange(monkeypatch)
    left, rename = step, Path.rename

    class Crash(BaseException):
        pass

    def count(path: Path, target: Path) -> Path:
        nonlocal left
        left -= 1
        if left == 0:
            raise Crash
        return rename(path, target)

    with monkeypatch.context() as patch:
        # as if the process was gone: nothing is cleared up
        patch.setattr(Path, "rename", count)
        patch.setattr(staging, "clear", lambda _: [])
        with pytest.raises(Crash):
            write(old, overwrite=True)
    with pytest.raises(RecipeError, match="is not empty"):
        write(old, "modmoe.yaml")
    assert [name for name in files(old) if name != MARK] == (["config.json"] if step == 3 else ["README.md"])
    write(old, "modmoe.yaml", overwrite=True)
    assert files(old.parent) == ["out", "out/modmoe.yaml"]


@pytest.mark.parametrize("has_exchange", [True, False])
@pytest.mark.parametrize("is_new", [True, False])
def test_a_disk_that_fails_at_the_last_moment_leaves_what_was_there(
    tmp_path: Path, has_exchange: bool, is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_new:
        write(tmp_path / "out", "README.md")
    if not has_exchange:
        without_exchange(monkeypatch)
    real = os.fsync

    def fail(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}") == str(tmp_path):
            raise OSError(errno.EIO, "Input/output error")
        real(handle)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RecipeError, match=rf"^{tmp_path}/out: Input/output error; look after that disk"):
        write(tmp_path / "out", overwrite=True)
    assert files(tmp_path) == ([] if is_new else ["out", "out/README.md"])


def test_what_is_written_is_on_the_disk_before_it_is_renamed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda handle: synced.append(os.readlink(f"/proc/self/fd/{handle}")) or real(handle)
    )
    with open_output(old, overwrite=True) as partial:
        (partial / "analysis").mkdir()
        (partial / "analysis" / "plan.json").touch()
    root, within = str(old.parent), f"{old.parent}/out.partial"
    assert sorted(synced[:-1]) == sorted(
        [f"{within}/{SEAL}", f"{within}/{MARK}", f"{within}/analysis/plan.json", f"{within}/analysis", within]
    )
    assert synced[-2:] == [within, root]


def test_a_lock_that_its_owner_removes_locks_nobody_out_of_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that opened the lock before its owner removed it must not hold a file that no one else can find."""
    lock = tmp_path / "out.partial" / MARK
    real, removed = fcntl.flock, []

    def remove_first(handle: int, how: int) -> None:
        if not removed:
            lock.unlink()  # the owner is done, between our open and our lock
            removed.append(handle)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with (
        open_output(tmp_path / "out"),
        pytest.raises(RecipeError, match="another run is writing there"),
        open_output(tmp_path / "out"),
    ):
        pass
    assert files(tmp_path) == ["out"]


def test_a_run_that_waited_behind_another_sees_its_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = fcntl.flock

    def finish_first(handle: int, how: int) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "theirs").touch()
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", finish_first)
    with pytest.raises(RecipeError, match="is not empty"):
        write(tmp_path / "out")
    assert files(tmp_path) == ["out", "out/theirs"]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    write(tmp_path / "out")
    assert "its file system has no locks" in caplog.text and files(tmp_path) == ["out", "out/config.json"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "there").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "there")
    write(tmp_path / "out")
    assert files(tmp_path) == ["disk", "disk/there", "disk/there/config.json", "out"]
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize("out", [".", "/proc"])
def test_what_cannot_be_replaced_is_refused_at_once(out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="name a directory in it"):
        write(Path(out), overwrite=True)


def test_too_little_room_is_told_before_the_first_byte(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"needs 1,125,899,906,842,624 bytes, and [\d,]+ are free there"):
        write(tmp_path / "out", size_bytes=2**50)
    assert files(tmp_path) == []


def test_control_c_waits_until_names_have_changed(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = staging._exchange

    def disturbed(*names: Path) -> None:
        real(*names)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(staging, "_exchange", disturbed)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            write(old, overwrite=True)
        assert files(old.parent) == ["out", "out/config.json"]
        assert caught.value.__notes__ == [f"{old} is whole."]
        # where a job in the background ignores it, so it is here
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        write(old, "modmoe.yaml", overwrite=True)
        assert files(old.parent) == ["out", "out/modmoe.yaml"]
    finally:
        signal.signal(signal.SIGINT, before)


def test_control_c_says_that_nothing_is_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as caught, open_output(tmp_path / "out"):
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [f"Nothing of {tmp_path / 'out'} was written."]
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "out: No space left on device; free some space there"),
        (OSError(errno.EDQUOT, "x", "out/file"), "out/file: Disk quota exceeded; free some space"),
        (OSError(errno.EIO, "x"), "out: Input/output error; look after that disk"),
        (OSError(errno.EROFS, "x"), "out: Read-only file system; change who may use it"),
        (OSError(errno.EFBIG, "x"), "out: File too large; raise the limit on the size of files"),
        (Exception("I/O error: No space left on device (os error 28)"), "out: No space left on device; free"),
        (RuntimeError("basic_ios::clear: iostream error"), "out: could not be written; free some space"),
        (OSError(errno.ENOENT, "No such file or directory"), None),
        (RuntimeError("shapes do not match"), None),
        (ValueError("(os error x)"), None),
    ],
)
def test_what_a_disk_does_is_told_in_a_line(error: Exception, words: str | None) -> None:
    found = disk_error(error, "out")
    assert (found is None) if words is None else str(found).startswith(words)


def test_errors_of_a_disk_keep_what_was_said_of_them(tmp_path: Path) -> None:
    def fail() -> None:
        error = OSError(errno.ENOSPC, "No space left on device")
        error.add_note("More is kept.")
        raise error

    work: Callable[[], None] = fail
    with pytest.raises(RecipeError) as caught, open_output(tmp_path / "out"):
        work()
    assert caught.value.__notes__ == ["More is kept."]


@pytest.mark.parametrize(
    ("error", "raised"),
    [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.EIO, "disk"), RecipeError)],
    ids=["interrupt", "disk"],
)
def test_a_directory_without_its_mark_is_not_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    """Nobody would know whose it is; one that was there before, and empty, stays."""
    right = os.open

    def open_badly(path: Any, *args: Any, **kwargs: Any) -> int:
        if Path(path).name == MARK:
            raise error
        return right(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", open_badly)
    with pytest.raises(raised), open_output(str(tmp_path / "out"), overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "out.partial").mkdir()
    with pytest.raises(raised), open_output(str(tmp_path / "out"), overwrite=False):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "out.partial"]


def test_the_mark_stays_where_anything_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty directory that the disk does not let go, too: a later run has to know whose it is."""
    states = tmp_path / "out.states"
    (states / "checkpoint-3").mkdir(parents=True)
    (states / "checkpoint-3" / "optimizer.pt").touch()
    (states / MARK).touch()
    right = Path.rmdir

    def rmdir_badly(path: Path) -> None:
        if path.name == "checkpoint-3":
            raise OSError(errno.ENOSPC, "full")
        right(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rmdir", rmdir_badly)
        seal.clear(states)
    assert seal.is_marked(states) and not list((states / "checkpoint-3").iterdir())
    seal.clear(states)
    assert not states.exists()
