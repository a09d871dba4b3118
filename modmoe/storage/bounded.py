"""Work on what a stranger wrote, in a child process that may use so much memory and time and no more.

A chat template and a tokenizer are programs: ten characters of one ask for all the memory there is, or for all time, or
break down inside of a library. The child is a fork of this process, so what is loaded need not be loaded again. It has
a limit on its memory and on its processor time, sends what it makes as JSON, and ends when this process closes its end
of a pipe, or ends itself.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import logging
import math
import os
import select
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

from modmoe import errors
from modmoe.errors import CheckpointError, ModmoeError, is_out_of_memory, is_panic, reason_of

T = TypeVar("T")

MEMORY_BYTES = 2 << 30
"""What the work may take beside what is loaded: a text of 20 MB takes about as much to be tokenized."""
ITEM_SECONDS = 60.0
"""Processor time of one item: a text of 20 MB takes about half as much."""
MOST_ITEM_BYTES = 128 << 20
"""Of one item as JSON, which takes several times as much in memory."""
_MOST_WAITS = 10
"""Waiting time of one item, in units of its processor time: a child that waits for a lock uses no processor."""
_NO_MEMORY = 77
"""The child's exit code where Python's own memory ran out."""
_HEAD_BYTES = 9
"""A letter, which says what comes, and the number of bytes."""
# only where the limits hold and a process with threads may fork
HAS_CHILDREN = sys.platform == "linux"


def in_bounds(
    work: Callable[[], Iterator[T]],
    *,
    place: str,
    remedy: str,
    memory_bytes: int | None = None,
    item_seconds: float | None = None,
) -> Iterator[T]:
    """Yield what ``work()`` yields, run in a child process whose memory and processor time are limited.

    It is lazy: the child works ahead by what a pipe holds. What it logs is logged here. Closing the iterator ends the
    child at once, and so does the end of this process. The child has this process' memory as it was at the first item,
    but must not use torch.

    On other systems than Linux a process with threads cannot fork safely. There the work is done in this process, and
    of the bounds are left those on what is raised and on the size of an item.

    Args:
        work: called in the child; its items are what JSON can hold, and tuples come back as lists.
        place: of what is read, the beginning of an error.
        remedy: the end of an error, without a full stop.
        memory_bytes: that the child may take beside what is loaded; None is MEMORY_BYTES.
        item_seconds: of processor time for one item; None is ITEM_SECONDS.

    Raises:
        ModmoeError: the work raised it: the same kind with the same words.
        CheckpointError: the work took too much memory or time, raised anything else, broke down, or yielded too much.
    """
    words = _Words(
        place,
        remedy,
        MEMORY_BYTES if memory_bytes is None else memory_bytes,
        ITEM_SECONDS if item_seconds is None else item_seconds,
    )
    return (_from_child if HAS_CHILDREN else _in_process)(work, words)


def call_in_bounds(work: Callable[[], T], **bounds: Any) -> T:
    """Return what ``work()`` returns, run as ``in_bounds`` runs it and with its keywords."""
    items = in_bounds(lambda: iter((work(),)), **bounds)
    with contextlib.closing(items):  # type: ignore[type-var]
        return next(items)


@contextlib.contextmanager
def ask_in_bounds(answer: Callable[[Any], T], **bounds: Any) -> Iterator[Callable[[Any], T]]:
    """Yield a function that returns as ``answer`` does, which is called in one child process for all questions.

    Questions and answers are what JSON can hold; the keywords and what is raised are those of ``in_bounds``.
    """
    if not HAS_CHILDREN:
        yield lambda question: call_in_bounds(lambda: answer(question), **bounds)
        return
    read, write = os.pipe()

    def work() -> Iterator[Any]:
        os.close(write)
        yield None  # it is there, and reads what is written
        with open(read, encoding="ascii") as questions:
            for question in questions:
                yield answer(json.loads(question))

    items: Any = in_bounds(work, **bounds)

    def ask(question: Any) -> T:
        view = memoryview(json.dumps(question).encode() + b"\n")
        with contextlib.suppress(BrokenPipeError):  # what the child died of is told in its place
            while view:
                view = view[os.write(write, view) :]
        answered: T = next(items)
        return answered

    try:
        try:
            next(items)
        finally:
            os.close(read)
        yield ask
    finally:
        items.close()
        os.close(write)


class _Words:
    """The errors of one piece of work."""

    def __init__(self, place: str, remedy: str, memory_bytes: int, item_seconds: float) -> None:
        self.place, self.remedy = place, remedy
        self.memory_bytes, self.item_seconds = memory_bytes, item_seconds

    def error(self, problem: str) -> CheckpointError:
        return CheckpointError(self.place, problem, self.remedy)

    def too_large(self) -> CheckpointError:
        return self.error(f"needs more than the {self.memory_bytes / 1e9:.2g} GB that it may use")

    def too_long(self) -> CheckpointError:
        return self.error(f"takes over {self.item_seconds:g} s")

    def too_much(self) -> CheckpointError:
        return self.error(f"makes over {MOST_ITEM_BYTES:,} bytes of one item")

    def of(self, error: BaseException) -> ModmoeError:
        """Return what is raised here for what the work raised."""
        if isinstance(error, ModmoeError):
            return error
        if is_out_of_memory(error):
            return self.too_large()
        # what a Rust library says of itself where it breaks down is for its authors
        return self.error(f"cannot be used ({'broke down: ' if is_panic(error) else ''}{reason_of(error)})")

    def of_end(self, status: int) -> CheckpointError:
        """Return what is raised of a child that ended before it was done, by its status as of ``waitpid``."""
        if not os.WIFSIGNALED(status):
            return self.too_large() if os.WEXITSTATUS(status) == _NO_MEMORY else self.error("cannot be used")
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU:
            return self.too_long()
        # Rust and C++ abort where no memory is left, and the system kills the process that has most of it
        if number in (signal.SIGABRT, signal.SIGKILL):
            return self.too_large()
        return self.error(f"broke down ({signal.Signals(number).name})")


def _in_process(work: Callable[[], Iterator[T]], words: _Words) -> Iterator[T]:
    try:
        for item in work():
            text = json.dumps(item)
            if len(text) > MOST_ITEM_BYTES:
                raise words.too_much()
            yield json.loads(text)
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        made = words.of(error)
        if made is error:
            raise
        raise made from error


def _from_child(work: Callable[[], Iterator[T]], words: _Words) -> Iterator[T]:
    read, write = os.pipe()
    alive, held = os.pipe()
    try:
        child = _fork()
    except OSError as error:
        for handle in (read, write, alive, held):
            os.close(handle)
        raise words.error(f"no process could be started for it ({reason_of(error)})") from error
    if child == 0:
        os.close(read)
        os.close(held)
        _work_and_exit(work, words, write, alive)
    owner = os.getpid()
    os.close(write)
    os.close(alive)
    status: int | None = None
    try:
        receiver = _Receiver(read, words)
        while True:
            kind, data = receiver.receive()
            if kind == b"":
                status = os.waitpid(child, 0)[1]
                raise words.of_end(status)
            if kind == b".":
                return
            if kind == b"l":
                record = logging.makeLogRecord(json.loads(data))
                logging.getLogger(record.name).handle(record)
            elif kind == b"e":
                raise _error_of(data)
            else:
                yield json.loads(data)
    finally:
        # a process that was forked meanwhile may drop its copy of this iterator
        if os.getpid() == owner:
            os.close(read)
            os.close(held)
            if status is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(child, 0)


def _fork() -> int:
    """Return as ``os.fork`` does, which Python warns of where there are threads, and tokenizers prints of."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"  # the threads of its pool are not in the child
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
    if child == 0:
        os.environ[name] = "false"
    return child


class _Receiver:
    """The parent's end of the pipe."""

    def __init__(self, handle: int, words: _Words) -> None:
        self._handle, self._words = handle, words
        self._poll = select.poll()
        self._poll.register(handle, select.POLLIN)

    def receive(self) -> tuple[bytes, bytearray]:
        """Return the letter and the bytes of what comes next; the letter is empty where the child has ended."""
        head = self._read(_HEAD_BYTES)
        if len(head) < _HEAD_BYTES:
            return b"", head
        size = int.from_bytes(head[1:], "little")
        if size > MOST_ITEM_BYTES:
            raise self._words.too_much()
        data = self._read(size)
        return (bytes(head[:1]) if len(data) == size else b""), data

    def _read(self, size: int) -> bytearray:
        data = bytearray()
        while len(data) < size:
            # counted second by second: a process that was stopped for an hour has waited for one
            for _ in range(math.ceil(self._words.item_seconds * _MOST_WAITS)):
                if self._poll.poll(1000):
                    break
            else:
                raise self._words.too_long()
            part = os.read(self._handle, min(size - len(data), 1 << 20))
            if not part:
                break
            data += part
        return data


def _error_of(data: bytearray) -> ModmoeError:
    """Return the error that the child described, with its parts."""
    described = json.loads(data)
    kind: Any = getattr(errors, described["kind"], None)
    is_ours = isinstance(kind, type) and issubclass(kind, ModmoeError)
    error: ModmoeError = (kind if is_ours else CheckpointError)(*described["parts"])
    for note in described["notes"]:
        error.add_note(note)
    return error


def _work_and_exit(work: Callable[[], Iterator[Any]], words: _Words, handle: int, alive: int) -> NoReturn:
    """Do the work in the child, and never return: nothing of this process but the work may run here."""
    code = 1
    try:
        _limit(words.memory_bytes, alive)

        def log(_: logging.Logger, record: logging.LogRecord) -> None:
            names = {"name": record.name, "levelno": record.levelno, "levelname": record.levelname}
            _send(handle, b"l", {**names, "msg": record.getMessage()})

        logging.Logger.callHandlers = log  # type: ignore[method-assign,assignment]
        _allow(words.item_seconds)
        for item in work():
            if not _send(handle, b"i", item):
                raise words.too_much()
            _allow(words.item_seconds)
        _send(handle, b".", None)
        code = 0
    except MemoryError:
        code = _NO_MEMORY
    except BaseException as error:
        with contextlib.suppress(BaseException):
            made = words.of(error)
            notes = [str(note) for note in getattr(made, "__notes__", ())]
            _send(handle, b"e", {"kind": type(made).__name__, "parts": made.__reduce__()[1], "notes": notes})
    finally:
        os._exit(code)


def _send(handle: int, kind: bytes, value: Any) -> bool:
    """Send one value; False, and nothing is sent, where it is larger than what is received."""
    data = json.dumps(value).encode()
    if len(data) > MOST_ITEM_BYTES:
        return False
    view = memoryview(kind + len(data).to_bytes(_HEAD_BYTES - 1, "little") + data)
    while view:
        view = view[os.write(handle, view) :]
    return True


def _limit(memory_bytes: int, alive: int) -> None:
    """Give the child its bounds, and have it end with its parent."""
    import fcntl
    import resource

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the parent, which ends the child
    for number in (signal.SIGTERM, signal.SIGXCPU, signal.SIGIO, signal.SIGPIPE):
        signal.signal(number, signal.SIG_DFL)
    # the system sends SIGIO when the last one who could write there is gone
    fcntl.fcntl(alive, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(alive, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
    with contextlib.suppress(BlockingIOError):
        os.read(alive, 1)
        os._exit(1)  # it was gone before that
    # libraries and Python print what they die of; the parent says it in a line
    faulthandler.disable()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    gc.freeze()  # what the parent has, tensors of a GPU among it, is not the child's to free
    mapped = int(_first_line("/proc/self/statm").split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bounds = [bound for bound in (mapped + memory_bytes, soft, hard) if bound != resource.RLIM_INFINITY]
    resource.setrlimit(resource.RLIMIT_AS, (min(bounds), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))


def _allow(seconds: float) -> None:
    """Let the child run for so many seconds more of processor time."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    ends = math.ceil(time.process_time() + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (ends if hard == resource.RLIM_INFINITY else min(ends, hard), hard))


def _first_line(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.readline()
