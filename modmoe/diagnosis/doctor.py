"""The doctor: checks for everything that can be wrong with a directory, one after another."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modmoe.diagnosis.companions import check_code, check_tokenizer
from modmoe.diagnosis.contents import check_values
from modmoe.diagnosis.expected import check_expected
from modmoe.diagnosis.files import check_leftovers, open_weights, read_json, read_manifest
from modmoe.diagnosis.findings import Findings
from modmoe.diagnosis.modular import check_modular
from modmoe.errors import CheckpointError
from modmoe.models.loading import is_tied_type
from modmoe.runtime.progress import Progress
from modmoe.storage.checkpoint import ADAPTER_CONFIG, is_adapter
from modmoe.storage.documents import check_files
from modmoe.storage.kinds.faults import find_problems
from modmoe.storage.kinds.forms import find_lack, find_pointers


def doctor(directory: str | Path, *, progress: Progress | None = None) -> dict[str, Any]:
    """Check a checkpoint or an adapter against its manifest and its configuration; all is read, nothing is changed.

    One tensor is in memory at a time for each thread, and no code of the checkpoint is executed, whatever it is.

    Args:
        directory: a checkpoint of any form, or an adapter.
        progress: called with a message, the bytes read and the bytes in all.

    Returns:
        ``healthy``; ``faults``, each with ``place``, ``wrong`` and ``remedy``; ``notes``, lines on matters that are not
        faults; ``kind`` of the directory; ``checked``, the checks and how much each of them covered.

    Raises:
        CheckpointError: there is no such directory, or nothing in it that belongs to a checkpoint.
    """
    path = Path(directory)
    if not os.path.isdir(path):
        old = path.with_name(path.name + ".replaced")
        more = f"an interrupted run left what was there as {old}" if os.path.isdir(old) else "name one on this disk"
        raise CheckpointError(str(directory), "no such directory", more)
    check_files(path)
    if not any((path / "config.json").is_file() or any(path.glob(end)) for end in ("adapter_*", "*.safetensors*")):
        raise CheckpointError(str(find_lack(path)))
    findings = Findings()

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress("reading, bytes", done, total)

    check_leftovers(path, findings)
    kind = "adapter"
    if is_adapter(path):
        from modmoe.diagnosis.adapters import check_adapter

        check_adapter(path, findings, report)
    else:
        kind = _check_checkpoint(path, findings, report)
    faults = [{"place": fault.place, "wrong": fault.wrong, "remedy": fault.remedy} for fault in findings.faults]
    return {
        "directory": str(directory),
        "kind": kind,
        "healthy": not faults,
        "checked": findings.checked,
        "faults": faults,
        "notes": findings.notes,
    }


def _check_checkpoint(path: Path, findings: Findings, report: Callable[[int, int], None]) -> str:
    config = None
    if not (path / "config.json").is_file():
        findings.fault(path / "config.json", "is missing", "fetch it, or write the checkpoint anew")
    else:
        config = read_json(path / "config.json", findings)
    if (path / ADAPTER_CONFIG).is_file():
        wrong = "lies beside a whole model; loaders disagree about which of the two is meant"
        findings.fault(path / ADAPTER_CONFIG, wrong, "move the adapter to a directory of its own")
    for problem in find_pointers(path):
        if Path(problem.place).suffix != ".safetensors" and problem.place != str(path / "config.json"):
            findings.fault(*problem)
    weights = open_weights(path, findings)
    check_values(path, weights, read_manifest(path, findings), findings, report)
    if config is None:
        return "unknown"
    for problem in find_problems(path, config, weights.headers()):
        findings.fault(*problem)
    if weights.where:
        if is_tied_type(config.get("model_type")) or isinstance(config.get("modular"), dict):
            check_modular(path, config, weights, findings)
        check_expected(path, config, weights, findings)
    check_code(path, config, findings)
    check_tokenizer(path, config, weights, findings)
    return str(config.get("model_type"))
