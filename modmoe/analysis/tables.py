"""Statistics on disk: one safetensors file with a few facts beside the tensors, whole or absent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from modmoe.errors import CheckpointError, reason_of
from modmoe.storage.documents import open_tensors
from modmoe.storage.files import check_file, open_beside


def write_tensors(path: str | Path, file: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Path:
    """Write ``tensors`` beside, rename, and return the file; what modmoe wrote there before is replaced.

    ``path`` is the file, or a directory that gets ``file``. RecipeError where something else lies there.
    """
    target = check_file(_locate(path, file), overwrite=True, is_ours=_is_statistics)
    owned = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    with open_beside(target) as temporary:
        save_file(owned, temporary, metadata={"modmoe": json.dumps(facts)})
    return target


def _is_statistics(path: Path) -> bool:
    try:
        with open_tensors(path) as handle:
            return "modmoe" in (handle.metadata() or {})
    except CheckpointError:
        return False


def read_tensors(path: str | Path, file: str, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and facts of a file whose facts say that it is of ``kind``.

    Raises CheckpointError where it is missing, damaged or of another kind.
    """
    target = _locate(path, file)
    if not target.is_file():
        raise CheckpointError(str(target), "no such file", "run the analysis that writes it")
    try:
        with open_tensors(target, "run the analysis again") as handle:
            facts = json.loads((handle.metadata() or {}).get("modmoe", "{}"))
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(str(target), f"damaged ({reason_of(error)})", "run the analysis again") from error
    if not isinstance(facts, dict) or facts.get("kind") != kind:
        raise CheckpointError(str(target), f"is not a {kind}", "name the file that the analysis wrote")
    return tensors, facts


def _locate(path: str | Path, file: str) -> Path:
    target = Path(path)
    return target if target.suffix == ".safetensors" else target / file
