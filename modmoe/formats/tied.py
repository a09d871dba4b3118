"""The tied export: a checkpoint that carries its own code (see ``modmoe.formats.tied_code``), every tensor as it is."""

from __future__ import annotations

import copy
from typing import Any

import torch

from modmoe.formats.tied_code import CODE_FILES, own_files, write_code
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Copy, Plan


def tied_plan(tied: Checkpoint) -> Plan:
    """Return the plan of a tied export: every tensor as it is."""
    return Plan(copy.deepcopy(tied.config), {name: Copy(name) for name in tied})


def with_dtype(config: dict[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Return a configuration that names ``dtype`` under the one key that transformers reads; None changes nothing."""
    changed = dict(config)
    if dtype is not None:
        changed.pop("torch_dtype", None)  # the old name, which would contradict the new one
        changed["dtype"] = str(dtype).removeprefix("torch.")
    return changed


# code travels with every tied checkpoint, so it lives with conversion; exports find it here too
__all__ = ["CODE_FILES", "own_files", "tied_plan", "with_dtype", "write_code"]
