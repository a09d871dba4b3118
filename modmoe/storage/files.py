"""Single files and the names of outputs: whether one can be there, and how it is written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from modmoe.errors import RecipeError, disk_error

# The errors of file systems that lack locks, an exchange of names, or the syncing of directories.
UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.ENOLCK}
_MOST_NAME_BYTES = 255
_MOST_PAGE_BYTES = 1 << 30
_TEMPORARY = ".{}.tmp."
"""What stands around the name of a file until the file is whole; eight characters in it are random."""
_PAGE = re.compile(rb"\n<!-- written by modmoe, sha256 ([0-9a-f]{64}) -->\n\Z")


def place_of(path: str | Path) -> Path:
    """Return where a file or directory itself lies: all links on the way are followed, and the last part is not.

    This is how the operating system reads a path: ``..`` behind a link is the parent of the directory that it names.
    """
    head, tail = os.path.split(os.path.join(os.getcwd(), path).rstrip(os.sep) or os.sep)
    if tail in ("", os.curdir, os.pardir):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(head), tail)


def target_of(out: str | Path) -> Path:
    """Return the absolute path of an output; for a symbolic link the path of what it names."""
    path = place_of(out)
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def check_working_directory(start: str = "") -> None:
    """Raise RecipeError where the working directory was deleted; its message begins with ``start``."""
    try:
        os.getcwd()
    except OSError:
        raise RecipeError(f"{start}the working directory is gone; change to one that is there.") from None


def check_name(out: str | Path, longest: str = ".replaced") -> None:
    """Raise RecipeError unless ``out`` can be written, also with ``longest`` appended to its name."""
    text = str(out)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RecipeError(str(ascii(text)[1:-1]), "is not UTF-8", "choose a name that is") from None
    if "\0" in text:
        raise RecipeError(str(ascii(text)[1:-1]), "has a character that no file's name can have", "choose another name")
    if not text.strip():
        raise RecipeError(f"{text!r}", "is not a name", "choose one")
    check_working_directory(f"{text}: ")
    try:
        with contextlib.suppress(FileNotFoundError):
            os.stat(text)
        target = target_of(text)
        for parent in Path(text).absolute().parents:
            _is_there(parent)
        holder = target.parent
        while not _is_there(holder):
            holder = holder.parent
    except OSError as error:
        raise RecipeError(str(shorten(text)), os.strerror(error.errno or 0), "choose another name") from None
    if not target.name:
        raise RecipeError(str(text), "is the root of the file system", "name a directory in it")
    if not holder.is_dir():
        raise RecipeError(str(shorten(text)), f"{holder} is not a directory", "choose another name")
    if len(os.fsencode(target.name)) + len(longest) > _MOST_NAME_BYTES:
        raise RecipeError(str(shorten(text)), "File name too long", "choose another name")
    check_writable(holder, text)


def _is_there(path: Path) -> bool:
    """Return whether a path exists; OSError for a link that leads nowhere and for a path that cannot exist."""
    try:
        os.stat(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return False
    return True


def shorten(text: str) -> str:
    """Return a name of any length, with its middle left out where it is long."""
    return text if len(text) <= 120 else f"{text[:80]}...{text[-30:]}"


def check_writable(holder: Path, text: str) -> None:
    """Raise RecipeError unless a file can be created in ``holder``; the message calls the file ``text``."""
    try:
        with tempfile.TemporaryFile(dir=holder):
            pass
    except OSError as error:
        error.filename = str(holder)  # the message names the directory, since the temporary file has a random name
        failed = disk_error(error, holder)
        if failed is None:
            failed = RecipeError(f"{holder}: {os.strerror(error.errno or 0)}; choose another name.")
        raise RecipeError(shorten(text), f"cannot be written ({failed})") from None


def kind_of(path: Path) -> str:
    """Return in words what lies at a path that is no directory."""
    mode = path.stat().st_mode
    kinds = {stat.S_ISREG: "a file", stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket"}
    return next((words for is_kind, words in kinds.items() if is_kind(mode)), "a device")


def sync(path: Path) -> None:
    """Wait until a file, or a directory's list of names, is on the disk."""
    if not path.is_dir() and not path.is_file():  # a link to what is not there
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        error.filename = str(path)
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        os.close(handle)


def check_file(file: str | Path, *, overwrite: bool, is_ours: Callable[[Path], bool], flag: str = "") -> Path:
    """Return ``file`` as a path if a run may write it; nothing is changed.

    Args:
        file: a file that is not there, or one that ``is_ours`` and is to be replaced.
        overwrite: replace it.
        is_ours: whether modmoe wrote a file, and nobody changed it since.
        flag: what named the file, for errors.

    Raises:
        RecipeError: no file can be there; it is a directory, a link, a device or the like, not ours, or there and
            ``overwrite`` is False.
    """
    start = f"{flag}: " if flag else ""
    try:
        # this comes first: /dev/stdout of a pipe, for example, is a name that leads nowhere
        if os.path.exists(file) and not (os.path.isfile(file) or os.path.isdir(file)):
            raise RecipeError(str(file), f"is {kind_of(Path(file))}", "name a file that does not exist yet")
        check_name(file, longest=_TEMPORARY.format("." * 8))
    except RecipeError as error:
        raise RecipeError(f"{start}{error}") from None
    path = place_of(file)
    if not os.path.lexists(path):
        return path
    mode = os.lstat(path).st_mode
    if not stat.S_ISREG(mode):
        what = "a link" if stat.S_ISLNK(mode) else "a directory"
        raise RecipeError(f"{start}{file}", f"is {what}", "name a file that does not exist yet")
    if not is_ours(path):
        raise RecipeError(
            f"{start}{file}", "exists, and is not as modmoe wrote it", "name another file, or remove it yourself"
        )
    if not overwrite:
        raise RecipeError(f"{start}{file}", "exists", "name another file or pass --overwrite")
    return path


def write_file(
    file: str | Path, text: str, *, overwrite: bool, is_ours: Callable[[Path], bool], flag: str = ""
) -> None:
    """Write a text file, whole or not at all: beside, and then renamed. Directories that it is to lie in are made.

    Raises:
        RecipeError: as ``check_file``, which is asked again.
        OSError: the disk failed; an older file is unchanged.
    """
    path = check_file(file, overwrite=overwrite, is_ours=is_ours, flag=flag)
    with open_beside(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
        check_file(file, overwrite=overwrite, is_ours=is_ours, flag=flag)


@contextlib.contextmanager
def open_beside(path: Path) -> Iterator[Path]:
    """Yield an empty file beside ``path``, which gets that name once it is on the disk; on an error it is removed.

    Directories that it is to lie in are made. Its name is drawn, so that it is nobody else's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


def sign_page(text: str) -> str:
    """Return an HTML page with a last line by which ``is_page`` knows it."""
    text = text if text.endswith("\n") else f"{text}\n"
    return f"{text}<!-- written by modmoe, sha256 {hashlib.sha256(text.encode()).hexdigest()} -->\n"


def is_page(path: Path) -> bool:
    """Return whether a file is an HTML page that modmoe wrote and nobody changed."""
    if path.stat().st_size > _MOST_PAGE_BYTES:
        return False
    data = path.read_bytes()
    found = _PAGE.search(data)
    return found is not None and hashlib.sha256(data[: found.start() + 1]).hexdigest() == found[1].decode()
