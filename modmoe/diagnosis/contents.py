"""The values of the tensors: their checksums against the manifest, and values that are not finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from modmoe.diagnosis.files import FETCH, Weights
from modmoe.diagnosis.findings import Findings
from modmoe.storage.checkpoint import MANIFEST, tensor_sha256
from modmoe.storage.shards import adder, is_finite, run_all


class _Read(NamedTuple):
    sha256: str
    finite: bool
    why_not: str


def check_manifest(directory: Path, weights: Weights, manifest: Mapping[str, Any], findings: Findings) -> set[str]:
    """Compare names, shapes and types with the manifest's; return the tensors whose checksums can be compared."""
    place, fit = directory / MANIFEST, set()
    missing = [name for name in manifest if name not in weights.where and name not in weights.lost]
    if weights.is_whole:
        findings.fault_of_each(place, missing, "is in the manifest and in no file", FETCH)
        findings.told.update(missing)
    unknown = [name for name in weights.where if name not in manifest]
    findings.fault_of_each(place, unknown, "is in a file and not in the manifest", FETCH)
    findings.told.update(unknown)
    for name in weights.where:
        entry = manifest.get(name)
        if name not in manifest:
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("sha256"), str):
            findings.fault(f"{place}: '{name}'", "has no sum", FETCH)
            continue
        found: dict[str, Any] = {"shape": list(weights.shape(name)), "dtype": _word(weights, name)}
        differ = [key for key in found if entry.get(key) != found[key]]
        for key in differ:
            wrong = f"has {key} {found[key]}, and {entry.get(key)} in the manifest"
            findings.fault(f"{directory / weights.where[name]}: '{name}'", wrong, FETCH)
        if differ:
            findings.told.add(name)
        else:
            fit.add(name)
    return fit


def _word(weights: Weights, name: str) -> str:
    return str(weights.dtype(name)).removeprefix("torch.")


def check_values(
    directory: Path,
    weights: Weights,
    manifest: Mapping[str, Any] | None,
    findings: Findings,
    report: Callable[[int, int], None] | None = None,
) -> None:
    """Read every tensor once: compare its checksum, and look for NaN and infinities.

    ``report`` is called with the bytes read and the bytes in all.
    """
    known = {name: weights.dtype(name) for name in weights.where}
    unknown = [name for name, dtype in known.items() if dtype is None]
    for file in sorted({weights.where[name] for name in unknown}):
        names = [name for name in unknown if weights.where[name] == file]
        findings.fault_of_each(directory / file, names, "has a type that modmoe does not know", "cast it to bfloat16")
    sizes = {name: math.prod(weights.shape(name)) * dtype.itemsize for name, dtype in known.items() if dtype}
    summed = set() if manifest is None else check_manifest(directory, weights, manifest, findings) & sizes.keys()
    add = adder(report, sum(sizes.values()))

    def read(name: str) -> _Read:
        try:
            tensor = weights[name]
        except Exception as error:  # any kind of error: the file may have gone, or its header may lie
            return _Read("", True, str(error)[:200] or type(error).__name__)
        found = _Read(tensor_sha256(tensor) if name in summed else "", is_finite(tensor), "")
        add(sizes[name])
        return found

    results = dict(zip(sizes, run_all(read, sizes), strict=True))
    for file in sorted(set(weights.where.values())):
        own = {name: found for name, found in results.items() if weights.where[name] == file}
        for name, found in own.items():
            if found.why_not:
                findings.fault(f"{directory / file}: '{name}'", f"cannot be read ({found.why_not})", FETCH)
        changed = [
            name
            for name, found in own.items()
            if name in summed and manifest is not None and not found.why_not
            if found.sha256 != manifest[name]["sha256"]
        ]
        remedy = "the bytes were changed after they were written: fetch it again, or write the checkpoint anew"
        findings.fault_of_each(directory / file, changed, f"has another SHA-256 than {MANIFEST} says", remedy)
        infinite = [name for name, found in own.items() if not found.finite]
        remedy = "fetch it again; if it was so from the start, its training diverged or its type is too narrow"
        findings.fault_of_each(directory / file, infinite, "has values that are not finite", remedy)
    findings.checked["bytes"] = sum(sizes.values())
    findings.checked["finite"] = len(sizes)
    if manifest is not None:
        findings.checked["sums"] = len(summed)
