"""Errors that a user can mend: one line with the place, the value and the remedy.

The command line prints such an error without a traceback and exits with 2. Each kind is also the built-in error
that plain Python code would expect, so callers need not import this module to catch one.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EACCES, errno.EPERM, errno.EROFS}
_BROKEN = {errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV}
# libraries written in Rust, and torch, raise errors of their own where a file cannot be written
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_STREAM = ("PytorchStreamWriter", "inline_container", "iostream error")


TOKEN_NAMES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables of the environment that hold a token of the Hub."""
_SECRETS = re.compile(r"hf_[A-Za-z0-9]{16,}|(?<=[Bb]earer )[^\s'\"]+|(?<=://)[^\s/@'\"]+(?=@)")
MOST_CHARACTERS = 700
"""Of an error; what is longer quotes too much."""


class ModmoeError(Exception):
    """The root of all errors that a user can mend.

    Its message is one printable line of at most MOST_CHARACTERS, whatever names and values of a file it quotes: they
    could break lines, steer a terminal or fill it. Tokens are taken out.
    """

    place: str
    """Where the fault lies: a key of a recipe, a flag, a file, or a file and a key; empty where the line names none."""

    def __init__(self, place: str = "", problem: str = "", remedy: str = "") -> None:
        """Take a place, the problem and its remedy; or the whole line as the one argument.

        The remedy is a clause without a full stop, which a semicolon joins to the problem, or a sentence of its own
        that ends with a mark. What cannot be printed is shown by its number.
        """
        self.place, self.problem, self.remedy = (str(place), problem, remedy) if problem else ("", str(place), "")
        super().__init__(_one_line(self._text()))

    def _text(self) -> str:
        if not self.place:
            return self.problem
        is_sentence = self.remedy.rstrip().endswith((".", "?"))
        problem = self.problem if self.problem.endswith((".", "?")) else f"{self.problem}."
        if not self.remedy or is_sentence:
            return f"{self.place}: {problem} {self.remedy.strip()}".rstrip()
        return f"{self.place}: {self.problem}; {self.remedy}."

    def __reduce__(self) -> tuple[Any, ...]:
        """Give the parts to another process, not the line that they make."""
        return type(self), (self.place, self.problem, self.remedy) if self.place else (self.problem,)

    def at(self, place: str) -> Self:
        """Return the same error at another place, such as that of the file in front of the key."""
        return type(self)(place, self.problem, self.remedy)


class RecipeError(ModmoeError, ValueError):
    """A recipe, a flag or a value in one of them is wrong."""


class CheckpointError(ModmoeError, ValueError):
    """A checkpoint is missing, damaged, unsafe or of an unknown kind."""


class CalibrationError(ModmoeError, ValueError):
    """The text of a task cannot be read or is too little."""


class PartitionError(ModmoeError, ValueError):
    """Neurons cannot be cut into modules as asked, or modules not made into experts."""


class PlanError(ModmoeError, ValueError):
    """A planned checkpoint does not fit its source."""


class ExportError(ModmoeError, ValueError):
    """A form or target cannot hold this model, or what was written does not reload."""


class AdapterError(ModmoeError, ValueError):
    """A routed adapter does not fit its model, or its file is damaged or belongs to another."""


class RankError(ModmoeError, RuntimeError):
    """Another process of the same run is gone."""


def _one_line(text: str) -> str:
    line = visible(" ".join(hide_secrets(text).split()))
    if len(line) <= MOST_CHARACTERS:
        return line
    half = MOST_CHARACTERS // 2 - 5
    return f"{line[:half]} [...] {line[-half:]}"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to ``name``, or a list of what is known.

    The answer starts with a space, so that it can be appended to a sentence.
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(options)}." if options else ""


def disk_error(error: BaseException, place: str | Path) -> RecipeError | None:
    """Return what a disk that is full, failing or closed to us did to ``place``, in a line; None of any other error.

    What libraries raise is looked into: safetensors and tokenizers quote the number of the system's error, and torch
    says no more than that it could not write.
    """
    quoted = _OS_ERROR.search(str(error))
    code = error.errno if isinstance(error, OSError) else int(quoted[1]) if quoted else None
    if code is None and isinstance(error, RuntimeError) and any(word in str(error) for word in _STREAM):
        return RecipeError(f"{place}: could not be written; free some space there or name another directory.")
    named = getattr(error, "filename", None) or place
    if code in _FULL:
        remedy = "free some space there or name another directory"
    elif code in _CLOSED:
        remedy = "change who may use it or name another directory"
    elif code in _BROKEN:
        remedy = "look after that disk or name a directory on another one"
    elif code == errno.EFBIG:
        remedy = "raise the limit on the size of files (ulimit -f) or name a directory on another disk"
    else:
        return None
    return RecipeError(f"{named}: {os.strerror(code)}; {remedy}.")


def visible(text: str) -> str:
    r"""Return a text on one line in which what cannot be printed, or would steer a terminal, is shown as in ``\x1b``.

    Names and values of a stranger's file may hold such characters: escape sequences, and marks that turn a line around.
    """
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(character: str) -> str:
    if character.isprintable():
        return character
    return " " if character.isspace() and character > "\x9f" else ascii(character)[1:-1]


def input_error(error: BaseException) -> CheckpointError | None:
    """Return what a file of strangers made of a library, in a line; None of any other error.

    It is the last net, where the file is not known any more. What reads files says more than this.
    """
    remedy = "`modmoe doctor DIR` looks at the files of a checkpoint"
    if is_panic(error):
        return CheckpointError(f"input: a library broke down on what it read ({reason_of(error)}); {remedy}.")
    if isinstance(error, RecursionError):
        return CheckpointError(f"input: what was read is nested too deep, or goes round in a circle; {remedy}.")
    if isinstance(error, UnicodeError):
        return CheckpointError(f"input: a text cannot be written as UTF-8 ({reason_of(error)}); {remedy}.")
    if is_out_of_memory(error):
        return CheckpointError("memory is full; lower the batch size or the sequence length, or end other programs.")
    return None


def hide_secrets(text: str) -> str:
    """Return a text without the Hub's token of the environment, what looks like one, or a password in an address."""
    for name in TOKEN_NAMES:
        token = os.environ.get(name, "").strip()
        if len(token) > 3:
            text = text.replace(token, "***")
    return _SECRETS.sub("***", text)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory is full: Python's, numpy's, or torch's for a CPU or a GPU."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _NO_MEMORY)


def is_panic(error: BaseException) -> bool:
    """Return whether a library written in Rust broke down; such an error is no Exception, and passes most handlers."""
    return type(error).__name__ == "PanicException" and not isinstance(error, Exception)


def is_failure(error: BaseException) -> bool:
    """Return whether something failed, in Python or by a panic, and nobody asked to stop."""
    return isinstance(error, Exception) or is_panic(error)


def reason_of(error: BaseException, most: int = 200) -> str:
    """Return what a library says of an error, its lines joined and cut to ``most`` characters, without a full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= most else f"{text[:most]}...").rstrip(".")
