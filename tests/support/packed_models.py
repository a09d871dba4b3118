"""Packed exports of tiny tied models, written without the proof."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modmoe.formats.packed import packed_plan
from modmoe.models.loading import load
from modmoe.storage.checkpoint import Checkpoint, CheckpointWriter
from tests.support import planned

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"mlp_bias": False},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "phi3": {},
}
ROUTERS: dict[str, dict[str, Any]] = {
    "top1": {},
    "union2": {"top_k": 2},
    "sum2": {"top_k": 2, "combine": "sum"},
    "union-of-all": {"top_k": 3},
    "mlp": {"kind": "mlp"},
    "means": {"means": True, "top_k": 2, "combine": "sum"},
    "means-mlp": {"means": True, "kind": "mlp", "leave_out": True},
    "task": {"routing": "task"},
}


def write_packed(directory: Path, model_type: str = "mistral", **router: Any) -> tuple[Path, Path]:
    """Write a tied model and its packed form, without the proof; one routed by task begins with ``words``."""
    changes = {**FAMILIES[model_type], **router.pop("changes", {})}
    _, tied = planned.write_tied(directory, model_type, changes=changes, **router)
    source = Checkpoint(tied)
    plan = packed_plan(source, "words" if router.get("routing") == "task" else None)
    plan.check(source)
    packed = directory / "packed"
    packed.mkdir()
    writer = CheckpointWriter(packed)
    plan.run(source, writer)
    writer.finish(plan.config)
    return tied, packed


def load_both(tied: Path, packed: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    model = load(tied, dtype=dtype)
    if model.config.routing == "task":
        model.set_expert("words")
    return model, load(packed, dtype=dtype)
