"""Going on where a run stopped: which state is whole, and whether it belongs to the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modmoe.checkpoint import write_json
from modmoe.errors import RecipeError
from modmoe.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset

RECORD = "run.json"
"""Beside the states: what the run was asked for."""
_FREE = frozenset({"finetune.save_steps"})
"""Recipe keys that may differ, since no weight depends on them."""


def describe_run(recipe: Recipe, source: str, dataset: Dataset) -> dict[str, Any]:
    """Return what must be the same for a run to go on: the recipe by dotted keys, the source, the text as tokens."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("numpy").iter(1000):
        for column in sorted(batch):
            for values in batch[column]:
                digest.update(values.tobytes())
    return {**_flat(dataclasses.asdict(recipe)), "source": str(source), "tokens_sha256": digest.hexdigest()}


def start_run(states: Path, run: dict[str, Any]) -> None:
    """Write down what a new run was asked for, beside the states to come."""
    states.mkdir(parents=True, exist_ok=True)
    write_json(states / RECORD, run)


def check_run(states: Path, run: dict[str, Any]) -> None:
    """Raise RecipeError that names the first key in which ``run`` differs from the run that left ``states``."""
    try:
        before = json.loads((states / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"{states / RECORD}: cannot be read; start anew without --resume.") from error
    # as JSON has it, so that a tuple is a list and a float the float that was written
    now = json.loads(json.dumps(run))
    for key in dict.fromkeys([*now, *before]):
        if key in _FREE or now.get(key) == before.get(key):
            continue
        if key == "tokens_sha256":
            raise RecipeError("tasks: the text is not that of the run to go on with; start anew without --resume.")
        raise RecipeError(
            f"{key}: is {now.get(key)!r}, but {before.get(key)!r} in the run to go on with; give the same, or start "
            "anew without --resume."
        )


def last_state(states: Path) -> Path | None:
    """Return the newest state that is whole, None where there is none; removes what was cut short behind it."""
    found = sorted(
        (path for path in states.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit()),
        key=lambda path: int(path.name.rpartition("-")[2]),
    )
    while found:
        newest = found.pop()
        if _is_whole(newest):
            return newest
        shutil.rmtree(newest)
    return None


def _is_whole(state: Path) -> bool:
    # the trainer writes this file last
    try:
        step = json.loads((state / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(step == int(state.name.rpartition("-")[2]))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "tasks":
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
