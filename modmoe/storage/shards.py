"""Safetensors files written in place: the header first, then each tensor's bytes at their offset, by two workers.

The format is https://github.com/huggingface/safetensors#format, tensors in the order in which ``save_file`` puts
them, so that files are the same to the byte. What is in memory at a time are a few pieces, whatever a tensor's size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from modmoe.errors import CheckpointError, disk_error

Item = TypeVar("Item")
Result = TypeVar("Result")

# in the order of safetensors' own list of types; files have the last of them first
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(DTYPES.values())}

# the bits of the least value that is not finite; a sign bit in front makes the same of the negative ones
_INFINITIES = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F80 << 16, torch.float64: 0x7FF << 52}

PIECE_BYTES = 1 << 19
"""Bytes that are made, hashed and written at a time: they stay in a core's second-level cache."""
WORKERS = 2
"""Threads; gathers, hashes and writes all release the interpreter."""


class Made(NamedTuple):
    """A tensor to be written: its type and shape, known beforehand, and what makes it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Tensor]]
    """Called once, in a worker; yields the elements in order, in tensors of any shape and of this type."""

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's elements."""
        return math.prod(self.shape) * self.dtype.itemsize


def lay_out(tensors: Mapping[str, Made]) -> tuple[bytes, dict[str, int]]:
    """Return the opening bytes of a safetensors file, and where in the file each tensor begins."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    end = 0
    for name in sorted(tensors, key=lambda name: (-_RANKS[tensors[name].dtype], name)):
        made = tensors[name]
        begins[name], end = end, end + made.size_bytes
        header[name] = {
            "dtype": _NAMES[made.dtype],
            "shape": list(made.shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    opening = len(text).to_bytes(8, "little") + text
    return opening, {name: len(opening) + begin for name, begin in begins.items()}


def run_all(work: Callable[[Item], Result], items: Iterable[Item]) -> list[Result]:
    """Return what ``work`` returns of each item, in order, by ``WORKERS`` threads.

    The first error is raised once the work under way has ended; what was not begun is not begun.
    """
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(work, items))


def adder(report: Callable[[int, int], None] | None, total: int) -> Callable[[int], None]:
    """Return what adds the bytes it is called with, from any thread, and reports the sum and ``total``."""
    done, lock = 0, threading.Lock()

    def add(size_bytes: int) -> None:
        nonlocal done
        with lock:
            done += size_bytes
            if report is not None:
                report(done, total)

    if report is not None:
        report(0, total)
    return add


def write_shards(
    shards: Mapping[Path, Mapping[str, Made]], report: Callable[[int, int], None] | None = None
) -> dict[str, str]:
    """Write safetensors files and return the SHA-256 of each tensor's bytes; on an error no file is left.

    ``report`` is called with the bytes written and the bytes in all.

    Raises:
        CheckpointError: a file cannot be written, as when the disk is full; a tensor has a type that safetensors files
            here do not hold, or is not made as was said.
    """
    jobs: list[tuple[Path, int, str, Made]] = []
    for path, tensors in shards.items():
        for name, made in tensors.items():
            if made.dtype not in _NAMES:
                raise CheckpointError(str(path.parent), f"'{name}' has type {made.dtype}, which is not supported")
    try:
        for path, tensors in shards.items():
            opening, begins = lay_out(tensors)
            _write_at(path, 0, [opening])
            jobs += [(path, begins[name], name, made) for name, made in tensors.items()]
        # the largest first, so that neither worker is left alone with one at the end
        jobs.sort(key=lambda job: -job[3].size_bytes)
        add = adder(report, sum(job[3].size_bytes for job in jobs))
        return dict(run_all(partial(_write_tensor, add), jobs))
    except BaseException:
        for path in shards:
            path.unlink(missing_ok=True)
        raise


def _write_tensor(add: Callable[[int], None], job: tuple[Path, int, str, Made]) -> tuple[str, str]:
    path, begin, name, made = job
    digest = hashlib.sha256()

    def hashed() -> Iterator[memoryview]:
        for piece in made.pieces():
            if piece.dtype != made.dtype:
                raise CheckpointError(str(path.parent), f"'{name}' was made as {piece.dtype}, not {made.dtype}")
            for chunk in chunks(piece):
                digest.update(chunk)
                yield chunk
                add(len(chunk))

    written = _write_at(path, begin, hashed())
    if written != made.size_bytes:
        raise CheckpointError(str(path.parent), f"'{name}' was made with {written} bytes, not {made.size_bytes}")
    return name, digest.hexdigest()


def _write_at(path: Path, begin: int, parts: Iterable[bytes | memoryview]) -> int:
    """Write bytes one after another from ``begin`` on; return how many."""
    written = 0
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    except OSError as error:
        raise _refusal(path, error) from error
    try:
        for part in parts:
            left, at = memoryview(part), begin + written
            while left:
                try:
                    done = os.pwrite(handle, left, begin + written)
                except OSError as error:
                    raise _refusal(path, error) from error
                left, written = left[done:], written + done
            if hasattr(os, "posix_fadvise"):
                # has the kernel begin to write to the disk, so that little is left to wait for when all is synced;
                # pages that are not on the disk yet stay in memory
                os.posix_fadvise(handle, at, begin + written - at, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
    return written


def _refusal(path: Path, error: OSError) -> CheckpointError:
    known = disk_error(OSError(error.errno, error.strerror), path.parent)
    return CheckpointError(str(known or f"{path.parent}: {error.strerror}; name another directory."))


def chunks(tensor: Tensor) -> Iterator[memoryview]:
    """Yield a tensor's bytes in memory order (little-endian, C order), at most ``PIECE_BYTES`` at a time."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    data: Any = memoryview(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    for begin in range(0, len(data), PIECE_BYTES):
        yield data[begin : begin + PIECE_BYTES]


def is_finite(tensor: Tensor) -> bool:
    """Return whether a tensor has neither a NaN nor an infinity; nothing of it is copied.

    As integers such values are the largest: as signed ones those without a sign bit, as unsigned ones those with it.
    """
    infinity = _INFINITIES.get(tensor.dtype)
    if infinity is None:
        return True
    size = tensor.element_size()
    negative = infinity | 1 << (8 * size - 1)
    for chunk in chunks(tensor):
        if np.frombuffer(chunk, f"<i{size}").max() >= infinity or np.frombuffer(chunk, f"<u{size}").max() >= negative:
            return False
    return True
