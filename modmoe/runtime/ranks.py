"""Several processes started by torchrun or accelerate launch: who does what, and how what they found is put together.

Each process, a rank, runs its share of the batches. Only the first writes. Every time that ranks meet they first tell
each other whether one of them has failed, so that an error on one ends all, and none waits for one that is gone.

Sums over batches are made of whole steps of four fixed sizes. Such numbers add without rounding, so their order does
not matter, and any number of ranks finds the same bits as one (after Demmel and Nguyen, "Parallel Reproducible
Summation", https://doi.org/10.1109/TC.2014.2345391).
"""

# Shapes: G the sizes of a step, X whatever is summed

from __future__ import annotations

import atexit
import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from modmoe.errors import ModmoeError, RankError
from modmoe.runtime.launch import number_of
from modmoe.storage.staging import open_output, partial_of

T = TypeVar("T", bound=Any)
STEPS = (2.0**20, 2.0**-20, 2.0**-60, 2.0**-100)
"""Sizes of the steps: what each batch adds is kept to the nearest 2^-101, and 8,000 batches add up without rounding."""
_PATIENCE = timedelta(hours=12)
"""How long a rank waits for the others. One that fails or dies is noticed at once: its connections are closed."""
_WORDS_BYTES = 2048
_LOST = ("onnection closed", "onnection reset", "gloo", "NCCL", "ncclRemoteError")
"""What an exchange says where another rank is gone."""

_group: Any = None
_is_mute = False


def rank() -> int:
    """Return this process's number, from 0; 0 where there is only one."""
    return int(dist.get_rank()) if _group is not None else 0


def num_ranks() -> int:
    """Return the number of processes that have joined."""
    return int(dist.get_world_size()) if _group is not None else 1


def num_ranks_here() -> int:
    """Return how many of them run on this machine."""
    return number_of("LOCAL_WORLD_SIZE", 1) if _group is not None else 1


def is_first() -> bool:
    """Return whether this is the process that writes."""
    return rank() == 0


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Join the processes that a launcher started beside this one; nothing where it is alone, or has joined already.

    All ranks leave together: with the error of the first that failed, or when the slowest is done. A process group that
    is there already is used.

    Raises:
        ModmoeError: another rank failed, in its words.
        RankError: another rank is gone without a word.
    """
    global _group, _is_mute
    if _group is not None or not (dist.is_initialized() or number_of("WORLD_SIZE", 1) > 1):
        yield
        return
    with _unwinding():
        if not dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.set_device(number_of("LOCAL_RANK", 0) % torch.cuda.device_count())
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
            # it stays for what comes next: a launcher's store has room for one group in a process's life
            atexit.register(_close)
        _group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        try:
            yield
            meet()
        except _PeerError as error:
            _leave()
            raise error.told from None
        except Exception as error:
            if not isinstance(error, RankError) and not _is_mute:
                kind = "" if isinstance(error, ModmoeError) else f"rank {rank()} failed: {type(error).__name__}: "
                with contextlib.suppress(RankError):
                    _tell(f"{kind}{error}")
                _leave()
            raise
        finally:
            if _is_mute:
                _close()  # the others wait within a library, and are to hear that this rank is gone
            _group, _is_mute = None, False


def meet() -> None:
    """Wait for all ranks; raise where one of them has failed."""
    if _group is not None:
        _tell("")


@contextlib.contextmanager
def in_step() -> Iterator[None]:
    """Hold what ranks do in step with a library that exchanges much by itself, as training does.

    A ModmoeError there is one that all ranks come to alike. Any other cannot be told, since the others wait within the
    library: it ends this rank, its connections with it, and so the others.

    Raises:
        RankError: another rank is gone.
    """
    global _is_mute
    try:
        yield
    except ModmoeError:
        raise
    except Exception as error:
        _is_mute = _group is not None
        if _is_mute and isinstance(error, RuntimeError) and any(word in str(error) for word in _LOST):
            raise _lost(error) from error
        raise


def is_mine(number: int) -> bool:
    """Return whether a piece of work is this rank's: pieces are dealt out one by one, so that shares are alike."""
    return number % num_ranks() == rank()


def add_up(tensor: Tensor) -> Tensor:
    """Return the sum of the ranks' tensors on every rank; ``tensor`` itself where there is one rank.

    Exact for integers, for what ``in_steps`` made, and where all ranks but one have zeros.
    """
    if _group is None:
        return tensor
    meet()
    total = tensor.detach().to("cpu", copy=True).contiguous()
    with _losing():
        dist.all_reduce(total, group=_group)
    return total.to(tensor.device)


def add_up_fields(value: T) -> T:
    """Return a dataclass like ``value`` whose tensors and numbers are the sums of the ranks'; None stays None."""
    if _group is None:
        return value
    found = {name: getattr(value, name) for name in value.__dataclass_fields__}
    tensors = {
        name: torch.as_tensor(item, dtype=None if isinstance(item, Tensor) else torch.float64)
        for name, item in found.items()
        if item is not None
    }
    sums = {name: add_up(tensor) for name, tensor in tensors.items()}
    return replace(
        value, **{name: total if isinstance(found[name], Tensor) else total.item() for name, total in sums.items()}
    )


def from_first(tensor: Tensor) -> Tensor:
    """Return the first rank's tensor on every rank; the others give one of its shape and type."""
    return add_up(tensor if is_first() else torch.zeros_like(tensor))


def in_steps(sums_X: Tensor) -> Tensor:
    """Return float64 numbers as steps_GX, which add in any order to the same bits; see ``from_steps``.

    Magnitudes are to be below 2^70. What is not finite stays so.
    """
    parts, rest_X = [], sums_X.double()
    for step in STEPS:
        # so large a number has no digits below the step, so that adding it rounds to whole steps
        large = 1.5 * 2.0**52 * step
        part_X = (rest_X + large) - large
        parts.append(part_X)
        rest_X = rest_X - part_X
    return torch.stack(parts)


def from_steps(steps_GX: Tensor) -> Tensor:
    """Return the float64 numbers that sums of ``in_steps`` come to."""
    total_X = torch.zeros_like(steps_GX[0])
    for part_X in steps_GX.flip(0):
        total_X = total_X + part_X  # the smallest first, so that little is lost
    return total_X


@contextlib.contextmanager
def open_first_output(output: str | Path, **options: Any) -> Iterator[Path]:
    """Yield ``<output>.partial`` as ``modmoe.storage.staging.open_output`` does; the first rank alone publishes it.

    The others know its name, and may read there what lies on a file system that all share.
    """
    if is_first():
        with open_output(output, **options) as partial:
            meet()
            yield partial
    else:
        meet()
        yield partial_of(output)


def _close() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


class _PeerError(Exception):
    """What another rank said when it failed."""

    def __init__(self, words: str) -> None:
        super().__init__(words)
        self.told = ModmoeError(words)


def _tell(words: str) -> None:
    """Exchange a failure's words, empty for none; raise where another rank has some and this one has none."""
    said = words.encode()[:_WORDS_BYTES]
    mine_N = torch.zeros(_WORDS_BYTES, dtype=torch.uint8)
    mine_N[: len(said)] = torch.frombuffer(bytearray(said or b"\0"), dtype=torch.uint8)[: len(said)]
    all_RN = [torch.zeros_like(mine_N) for _ in range(num_ranks())]
    with _losing():
        dist.all_gather(all_RN, mine_N, group=_group)
    for found_N in all_RN:
        if not words and bool(found_N.any()):
            raise _PeerError(bytes(found_N.tolist()).rstrip(b"\0").decode(errors="replace"))


def _leave() -> None:
    """Wait until every rank has put away what it had begun, before a launcher that sees one end kills the rest."""
    with contextlib.suppress(RankError), _losing():
        dist.barrier(group=_group)


@contextlib.contextmanager
def _losing() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise _lost(error) from error


def _lost(error: RuntimeError) -> RankError:
    reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
    reason = re.sub(r"^\[\S+\] ", "", reason).partition(". ")[0]  # what it is, without where in a library's source
    return RankError(
        f"rank {rank()} of {num_ranks()}: another rank is gone ({reason[:100]}); see what it said, and start anew."
    )


@contextlib.contextmanager
def _unwinding() -> Iterator[None]:
    """Let a launcher's SIGTERM end the process as an error does, so that no partial output stays."""

    def stop(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
