"""The files of a checkpoint: which exist, which can be opened, and leftovers of interrupted runs."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.diagnosis.findings import Findings
from modmoe.errors import CheckpointError
from modmoe.storage.checkpoint import INDEX, MANIFEST, SINGLE
from modmoe.storage.documents import MOST_HEADER_BYTES, check_links, is_plain_name, open_tensors, read_object
from modmoe.storage.kinds.forms import find_lack, wrong_with
from modmoe.storage.kinds.headers import Header
from modmoe.storage.seal import MARK, is_marked
from modmoe.storage.shards import DTYPES

FETCH = "fetch it again, or write the checkpoint anew"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")
_UNFINISHED = ("*.partial", "*.incomplete", "*.tmp")
_BESIDE = {
    ".partial": ("was left by an interrupted run", "delete it, or run the command again"),
    ".states": ("was left by interrupted training", "go on with `modmoe finetune ... --resume`, or delete it"),
    ".replaced": ("is an older output that an interrupted run left", "delete it"),
}
"""Endings of names that lie beside an output only while a run writes it."""
_TEMPORARY = "shard-?????.safetensors"
"""The name of a shard until all shards are written."""


@dataclass(slots=True)
class Weights:
    """The tensors of those files that can be opened."""

    files: dict[str, Any] = field(default_factory=dict)
    where: dict[str, str] = field(default_factory=dict)
    """Name to file."""
    lost: set[str] = field(default_factory=set)
    """Names that the index gives to files that cannot be opened."""
    is_whole: bool = True
    """False where a file cannot be opened and nothing says which tensors it has."""

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        tensor: Tensor = self.files[self.where[name]].get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        return tuple(self._slice(name).get_shape())

    def headers(self) -> dict[str, Header]:
        """Return the header of each tensor."""
        return {
            name: Header(file, self._slice(name).get_dtype(), self.shape(name)) for name, file in self.where.items()
        }

    def _slice(self, name: str) -> Any:
        return self.files[self.where[name]].get_slice(name)

    def dtype(self, name: str) -> torch.dtype | None:
        """Return a tensor's type from the header; None for one that torch or modmoe has no name for."""
        return DTYPES.get(self._slice(name).get_dtype())


def read_json(path: Path, findings: Findings) -> dict[str, Any] | None:
    """Return a JSON file's object; None, and a fault, where there is none."""
    wrong = wrong_with(path)
    if wrong is not None:
        findings.fault(path, *wrong)
        return None
    try:
        return read_object(path)
    except CheckpointError as error:
        findings.fault_of_error(path, error, FETCH)
        return None


def open_weights(directory: Path, findings: Findings) -> Weights:
    """Open the headers of all weight files and check them against the index."""
    weights = Weights()
    index, single = directory / INDEX, directory / SINGLE
    if index.is_file():
        known = _open_shards(directory, weights, findings)
    elif single.is_file():
        weights.is_whole = open_file(single, weights, findings)
        known = {SINGLE}
    else:
        weights.is_whole = False
        known = {file.name for file in directory.glob("*.safetensors")}
        findings.fault(*find_lack(directory))
    for file in sorted(directory.glob("*.safetensors")):
        if file.name not in known | weights.files.keys() and not file.match(_TEMPORARY):
            findings.fault(file, "belongs to no part of the checkpoint", "delete it if nothing else needs it")
    findings.checked["files"] = len(weights.files)
    findings.checked["tensors"] = len(weights.where)
    return weights


def _open_shards(directory: Path, weights: Weights, findings: Findings) -> set[str]:
    """Open the files that the index names; return their names."""
    index = directory / INDEX
    value = read_json(index, findings)
    weight_map = (value or {}).get("weight_map")
    if value is not None and (not isinstance(weight_map, dict) or not weight_map):
        findings.fault(index, "weight_map is missing or empty", FETCH)
    if not isinstance(weight_map, dict) or not weight_map:
        weights.is_whole = False
        present = sorted(directory.glob("*.safetensors"))
        for path in present:
            open_file(path, weights, findings)
        return {path.name for path in present}
    shards: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if not is_plain_name(file):
            wrong = f"lies in {str(file)[:80]!r}, which is no plain file name"
            findings.fault(f"{index}: '{name[:99]}'", wrong, "fetch the checkpoint from where you trust it")
            weights.lost.add(name)
        else:
            shards.setdefault(file, []).append(name)
    for file, names in sorted(shards.items()):
        if not (directory / file).is_file():
            wrong = f"is missing, with {len(names)} tensors that {INDEX} gives to it"
            findings.fault(directory / file, wrong, "fetch it")
        if not (directory / file).is_file() or not open_file(directory / file, weights, findings):
            weights.lost.update(names)
            continue
        own = set(weights.files[file].keys())
        missing = [name for name in names if name not in own]
        weights.lost.update(missing)
        findings.fault_of_each(index, missing, f"is not in {file}", FETCH)
        unknown = sorted(own - set(names))
        findings.fault_of_each(directory / file, unknown, f"is not in {INDEX}", FETCH)
        for name in unknown:
            weights.where.pop(name, None)
    return set(shards)


def open_file(path: Path, weights: Weights, findings: Findings) -> bool:
    """Add a file's tensors to ``weights``; False, and a fault, where it cannot be opened."""
    wrong = wrong_with(path)
    if wrong is not None:
        findings.fault(path, *wrong)
        return False
    try:
        opened = open_tensors(path)
    except CheckpointError as error:
        cut = _how_cut(path)
        if cut:
            findings.fault(path, cut, FETCH)
        else:
            findings.fault_of_error(path, error, FETCH)
        return False
    names: list[str] = list(opened.keys())
    weights.files[path.name] = opened
    for name in names:
        if name in weights.where:
            findings.fault(f"{path}: '{name}'", f"is in {weights.where[name]} too", FETCH)
        weights.where[name] = path.name
    return True


def _how_cut(path: Path) -> str:
    """Return in words that a safetensors file is shorter than its header says; empty where it is not."""
    try:
        with path.open("rb") as handle:
            size_bytes = os.fstat(handle.fileno()).st_size
            header_bytes = int.from_bytes(handle.read(8), "little")
            if size_bytes < 8 or header_bytes > size_bytes - 8:
                return f"is cut short: it has {size_bytes:,} bytes, fewer than its header"
            if header_bytes > MOST_HEADER_BYTES:
                return ""
            header = json.loads(handle.read(header_bytes))
        ends = [one["data_offsets"][1] for name, one in header.items() if name != "__metadata__"]
        wanted_bytes = 8 + header_bytes + max(ends, default=0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
        return ""
    return f"is cut short: it has {size_bytes:,} of {wanted_bytes:,} bytes" if size_bytes < wanted_bytes else ""


def check_leftovers(directory: Path, findings: Findings) -> None:
    """Report what interrupted runs left in the directory and beside it, and links that lead out of it."""
    path = directory.absolute()
    if path.name.endswith(tuple(_BESIDE)):
        wrong = "is what a run writes into, or an older output that it was about to replace"
        findings.fault(path, wrong, "run the command again; it writes whole outputs under another name")
    if _is_held(path.with_name(f"{path.name}.partial") / MARK):
        findings.note(f"{path}: a run is writing it anew now")
    else:
        for end, (wrong, remedy) in _BESIDE.items():
            # a directory without the mark is the user's, whatever its name
            if is_marked(path.with_name(path.name + end)):
                findings.fault(path.with_name(path.name + end), wrong, remedy)
    for file in itertools.chain(*(sorted(directory.glob(pattern)) for pattern in (*_UNFINISHED, _TEMPORARY))):
        findings.fault(file, "was left by an interrupted run or download", "delete it")
    pickles = sorted({file.name for pattern in _PICKLES for file in directory.glob(pattern)})
    if pickles and any(directory.glob("*.safetensors")):
        findings.note(f"{directory}: {', '.join(pickles)}: may be pickles; modmoe never reads them, others may")
    try:
        check_links(directory)
    except CheckpointError as error:
        findings.fault_of_error(directory, error, "put the files themselves there")


def _is_held(lock: Path) -> bool:
    """Return whether a running process holds the lock on the mark."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(handle)
    return False


def read_manifest(directory: Path, findings: Findings) -> dict[str, Any] | None:
    """Return the manifest's entries by tensor; None where there is none, which is a note, or a damaged one."""
    path = directory / MANIFEST
    if not path.is_file():
        findings.checked["sums"] = "no: there is no manifest"
        findings.note(f"{directory}: has no {MANIFEST}, so sums could not be checked; what modmoe writes has one")
        return None
    value = read_json(path, findings)
    tensors = None if value is None else value.get("tensors")
    if value is not None and not isinstance(tensors, dict):
        findings.fault(path, "has no mapping 'tensors'", FETCH)
    if not isinstance(tensors, dict):
        findings.checked["sums"] = "no: the manifest is damaged"
        return None
    return tensors
