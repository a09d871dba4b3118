"""The seal of an output: the list of all files that modmoe wrote into a directory, which lies among them.

Only what a seal lists, unchanged, is ever replaced. A directory that is being written, or that an interrupted run left,
has a mark instead: it holds no more than names that modmoe writes, and a file of any other name is somebody else's.
"""

from __future__ import annotations

import contextlib
import fnmatch
import hashlib
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modmoe.errors import CheckpointError
from modmoe.storage.documents import read_index, read_object

SEAL = ".modmoe.json"
"""The list: ``{"files": {PATH: {"bytes", "sha256"}}}``. The sum of a weight file is that of its header, since the sums
of its tensors stand in the manifest. A directory's path ends in ``/``."""
MARK = ".modmoe.unfinished"
"""Lies in a directory while modmoe writes it or changes its name; the run that does so holds a lock on it."""
MANIFEST = "modmoe_manifest.json"
"""The SHA-256 of every tensor of a checkpoint."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a checkpoint of one file, and the list of the files of a larger one."""
_CHUNK_BYTES = 1 << 20
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*")
_WRITTEN = (
    "*.json",
    "adapter_model.safetensors",
    "model*.safetensors",
    "shard-*.safetensors",
    "modmoe*.yaml",
    *_TOKENIZER,
    "*.model",
    "*.py",
    "README.md",
    "LICENSE*",
    "*.gguf",
    "*.svg",
    "*.png",
    "mixlora*",
    "profile.safetensors",
    "partition.safetensors",
    ".*.tmp",
    "analysis/.*.tmp",
    "analysis/*",
    ".hidden-*",
    "train/*.jsonl",
    "held_out/*.jsonl",
)
_REPORTS = "report*.html"
_STATES = (
    "run.json",
    "curves.json",
    *(
        f"{place}/{name}"
        for place in ("checkpoint-*", "unfinished/checkpoint-*")
        for name in (
            "*model*",
            "config.json",
            "generation_config.json",
            "adapter_config.json",
            "optimizer*",
            "scheduler.pt",
            "scaler.pt",
            "rng_state*.pth",
            "trainer_state.json",
            "training_args.bin",
            "zero_to_fp32.py",
            "latest",
            "global_step*/*",
            "*_fsdp*/*",
            "README.md",
            "*.model",
            "*.py",
            *_TOKENIZER,
        )
    ),
)


def seal(directory: Path) -> None:
    """Write the list of all that lies in ``directory``; the older list is replaced."""
    weights = _weight_files(directory)
    files: dict[str, dict[str, Any] | None] = {}
    for name, status in _walk(directory):
        if stat.S_ISDIR(status.st_mode):
            files[f"{name}/"] = None
        elif name not in (SEAL, MARK):
            path = directory / name
            files[name] = {"bytes": status.st_size, "sha256": _sum_header(path) if name in weights else _sum(path)}
    text = json.dumps({"files": dict(sorted(files.items()))}, indent=1)
    (directory / SEAL).write_text(text + "\n", encoding="utf-8")


def find_unknown(directory: Path) -> str | None:
    """Return the first file of an output whose name would be somebody else's were the output not finished; else None.

    What modmoe writes has only known names; a test holds that of every output that is made.
    """
    return next((name for name, status in _walk(directory) if not _is_written(name, status, ())), None)


def is_marked(directory: Path) -> bool:
    """Return whether a run of modmoe writes a directory, or was stopped while it did."""
    return _is_regular(directory / MARK)


def find_foreign(directory: Path) -> str | None:
    """Return what of a directory modmoe did not write or is no longer as it wrote it, in words; None if it is sealed.

    All files are read. What a seal lists and is not there does not matter.

    Raises:
        OSError: something cannot be read.
    """
    if not _is_regular(directory / SEAL):
        first = next((name for name, _ in _walk(directory)), None)
        return None if first is None else f"'{first}', which modmoe did not write"
    try:
        files = read_object(directory / SEAL).get("files")
        weights = _weight_files(directory)
        sums = read_object(directory / MANIFEST).get("tensors") if weights else {}
    except CheckpointError as error:
        return f"a file that cannot be read ({error})"
    if not isinstance(files, dict) or not isinstance(sums, dict):
        return f"'{SEAL}', which is damaged"
    for name, status in _walk(directory):
        path = directory / name
        if name in (SEAL, MARK) and stat.S_ISREG(status.st_mode):
            continue
        is_directory = stat.S_ISDIR(status.st_mode)
        listed = files.get(f"{name}/" if is_directory else name, False)
        if listed is False or not (is_directory or stat.S_ISREG(status.st_mode)):
            return f"'{name}', which modmoe did not write"
        if not is_directory and not _is_unchanged(path, status.st_size, listed, sums if name in weights else None):
            return f"'{name}', which was changed since modmoe wrote it"
    return None


def snapshot(directory: Path) -> dict[str, tuple[int, ...]]:
    """Return what tells whether anything in a directory was touched: each file's inode, size and time."""
    return {
        name: (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else (status.st_ino,)
        for name, status in _walk(directory)
        if name != MARK
    }


def find_stranger(directory: Path) -> str | None:
    """Return the first name in an unfinished output, or among states of training, that modmoe does not write."""
    names = _listed(directory)
    return next((name for name, status in _walk(directory) if not _is_written(name, status, names)), None)


def empty(directory: Path, inner: str = "") -> list[str]:
    """Delete what modmoe wrote of an unfinished or replaced output, or of states; return the names of what stays.

    Links are never followed, and what cannot be deleted stays. The mark stays too.

    Args:
        directory: an output or the directory of states, whose names decide.
        inner: a directory in it, ending in ``/``, of which alone something is deleted; it goes itself if it can.
    """
    names, left = _listed(directory), []
    root = directory / inner
    entries = list(_walk(directory, inner)) if root.is_dir() and not root.is_symlink() else []
    # what is in a directory goes before it, and the list last, so that a run that is killed leaves what the next knows
    for name, status in sorted(entries, key=lambda entry: (entry[0] != SEAL, entry[0]), reverse=True):
        try:
            if stat.S_ISDIR(status.st_mode):
                with contextlib.suppress(OSError):
                    (directory / name).rmdir()
            elif not _is_written(name, status, names):
                left.append(name)
            elif name != MARK:
                (directory / name).unlink()
        except FileNotFoundError:
            continue
        except OSError:
            left.append(name)
    if inner:
        with contextlib.suppress(OSError):
            root.rmdir()
    return left


def clear(directory: Path) -> list[str]:
    """Do as ``empty``, and delete the mark and the directory itself where nothing stays.

    Where anything stays, be it an empty directory that the disk would not let go, the mark stays, so that a later run
    knows whose it is.
    """
    left = empty(directory)
    if not left:
        with contextlib.suppress(OSError):
            if {entry.name for entry in os.scandir(directory)} <= {MARK}:
                (directory / MARK).unlink(missing_ok=True)
                directory.rmdir()
    return left


def _listed(directory: Path) -> frozenset[str]:
    """Return the names in a directory's seal; none where there is no readable one."""
    try:
        files = read_object(directory / SEAL).get("files") if _is_regular(directory / SEAL) else None
    except CheckpointError:
        files = None
    return frozenset(name.rstrip("/") for name in files) if isinstance(files, dict) else frozenset()


def _is_written(name: str, status: os.stat_result, listed: Iterable[str]) -> bool:
    if stat.S_ISDIR(status.st_mode):
        return True  # an empty one holds nothing, and what is in one is asked about by itself
    if not stat.S_ISREG(status.st_mode):
        return False
    patterns = (*_WRITTEN, _REPORTS, *_STATES)
    return name in (SEAL, MARK) or name in listed or any(_fits(name, pattern) for pattern in patterns)


def is_taken(name: str) -> bool:
    """Return whether an output may have files of its own where another file is to lie in it, or on the way there."""
    parts = name.split("/")
    ways = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    is_file = any(way in (SEAL, MARK) or _fits(way, pattern) for way in ways for pattern in _WRITTEN)
    return is_file or any(pattern.startswith(f"{name}/") for pattern in _WRITTEN)


def _fits(name: str, pattern: str) -> bool:
    """Return whether a path is of a pattern, in which a star stands for no slash."""
    return name.count("/") == pattern.count("/") and fnmatch.fnmatchcase(name, pattern)


def _walk(directory: Path, inner: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Yield the path in ``directory`` and the status of all that lies in it, a directory before what is in it."""
    with os.scandir(directory / inner) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        name = f"{inner}{entry.name}"
        status = entry.stat(follow_symlinks=False)
        yield name, status
        if stat.S_ISDIR(status.st_mode):
            yield from _walk(directory, f"{name}/")


def _is_regular(path: Path) -> bool:
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _weight_files(directory: Path) -> frozenset[str]:
    """Return the names of the files whose tensors' sums stand in the manifest."""
    if not _is_regular(directory / MANIFEST):
        return frozenset()
    if _is_regular(directory / INDEX):
        return frozenset(read_index(directory / INDEX).values())
    return frozenset({SINGLE})


def _is_unchanged(path: Path, size_bytes: int, listed: Any, sums: Mapping[str, Any] | None) -> bool:
    if not isinstance(listed, dict) or listed.get("bytes") != size_bytes:
        return False
    if sums is None:
        return bool(listed.get("sha256") == _sum(path))
    if listed.get("sha256") != _sum_header(path):
        return False
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_bytes))  # as it was written, since its sum is that of the list
        for name, about in header.items():
            if name == "__metadata__":
                continue
            begin, end = about["data_offsets"]
            digest = hashlib.sha256()
            file.seek(8 + header_bytes + begin)
            for start in range(begin, end, _CHUNK_BYTES):
                digest.update(file.read(min(_CHUNK_BYTES, end - start)))
            if not isinstance(sums.get(name), dict) or sums[name].get("sha256") != digest.hexdigest():
                return False
    return True


def _sum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sum_header(path: Path) -> str:
    with path.open("rb") as file:
        size = file.read(8)
        return hashlib.sha256(size + file.read(int.from_bytes(size, "little"))).hexdigest()
