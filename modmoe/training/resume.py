"""Resuming a run: which of its states is whole, and whether it belongs to the same run."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from modmoe.errors import RecipeError
from modmoe.recipe.schema import Recipe
from modmoe.runtime.preflight import STATES
from modmoe.storage.checkpoint import write_json
from modmoe.storage.documents import read_object
from modmoe.storage.files import target_of
from modmoe.storage.seal import MARK, clear, empty, is_marked
from modmoe.storage.staging import put_in_place

if TYPE_CHECKING:
    from datasets import Dataset

LOG = logging.getLogger(__name__)
KEPT_STATES = 2
"""The number of states that are kept; older ones are removed."""
RECORD = "run.json"
"""The file beside the states that describes the run."""
_FREE = frozenset({"finetune.save_steps", "finetune.report_to"})
"""Recipe keys that may differ, since no weight depends on them."""


def states_of(output: str | Path) -> Path:
    """Return the directory of a run's states: ``<output>.states``, until the output is whole."""
    path = target_of(output)
    return path.with_name(path.name + STATES)


def describe_run(recipe: Recipe, source: str, dataset: Dataset) -> dict[str, Any]:
    """Return what must be the same in a resumed run: the recipe by dotted keys, the source, the tokens of the text."""
    digest = hashlib.sha256()
    for batch in dataset.with_format("numpy").iter(1000):
        for column in sorted(batch):
            for values in batch[column]:
                digest.update(values.tobytes())
    return {**_flat(dataclasses.asdict(recipe)), "source": str(source), "tokens_sha256": digest.hexdigest()}


def start_run(states: Path, run: dict[str, Any]) -> None:
    """Write the description of a new run where its states will lie; older states are removed."""
    if is_marked(states):
        clear(states)
    states.mkdir(exist_ok=True)
    (states / MARK).touch()
    write_json(states / RECORD, run)


def check_run(states: Path, run: dict[str, Any]) -> None:
    """Raise RecipeError that names the first key in which ``run`` differs from the run that left ``states``."""
    try:
        before = read_object(states / RECORD)
    except (OSError, ValueError) as error:
        raise RecipeError(str(states / RECORD), "cannot be read", "start anew without --resume") from error
    # through JSON, so that tuples become lists and floats compare as they were written
    now = json.loads(json.dumps(run))
    for key in dict.fromkeys([*now, *before]):
        if key in _FREE or now.get(key) == before.get(key):
            continue
        if key == "tokens_sha256":
            raise RecipeError("tasks", "the text is not that of the run to go on with", "start anew without --resume")
        raise RecipeError(
            str(key),
            f"is {now.get(key)!r}, but {before.get(key)!r} in the run to go on with",
            "give the same, or start anew without --resume",
        )


def find_state(states: Path, run: dict[str, Any], resume: bool) -> Path | None:
    """Return the state of the same run to resume from; None where training begins anew, after writing its description.

    Raises RecipeError that names the first difference from the run that left the states.
    """
    # without its record a state belongs to a run whose states were being removed
    state = last_state(states) if resume and (states / RECORD).is_file() else None
    if state is None:
        if resume:
            LOG.info("there is no state to go on from; training begins anew")
        start_run(states, run)
        return None
    check_run(states, run)
    LOG.info("going on from %s", state.name)
    return state


def all_states(states: Path) -> list[Path]:
    """Return the states there are, the oldest first."""
    found = (path for path in states.glob("checkpoint-*") if path.name.rpartition("-")[2].isdigit())
    return sorted(found, key=step_of)


def step_of(state: Path) -> int:
    """Return the step after which a state was saved."""
    return int(state.name.rpartition("-")[2])


def last_state(states: Path) -> Path | None:
    """Return the newest state that is whole, None where there is none; removes later ones that were cut short."""
    for state in reversed(all_states(states)):
        if _is_whole(state):
            return state
        empty(states, f"{state.name}/")
    return None


def publish_state(partial: Path, states: Path) -> None:
    """Put a state that is written among the others once all of it is on the disk, and remove the oldest."""
    put_in_place(partial, states / partial.name)
    for old in all_states(states)[:-KEPT_STATES]:
        empty(states, f"{old.name}/")


def disk_bytes(model: torch.nn.Module, recipe: Recipe, is_whole: bool, num_found: int) -> int:
    """Return the most bytes that the states to come take at a time.

    Args:
        model: what is trained, in float32.
        recipe: the steps and how often a state is saved.
        is_whole: whether a state holds all weights, rather than those that learn.
        num_found: states that are there already.
    """
    learning = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    saved = sum(weight.numel() for weight in model.parameters()) if is_whole else learning
    wanted = recipe.finetune
    # the oldest state is removed once the newest is whole
    count = min(KEPT_STATES + 1, -(-wanted.max_steps // wanted.save_steps)) - num_found
    return 4 * (saved + 2 * learning) * max(count, 0)  # the optimiser has two numbers a weight


def _is_whole(state: Path) -> bool:
    try:
        step = read_object(state / "trainer_state.json")["global_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return bool(step == step_of(state))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and f"{prefix}{key}" != "tasks":
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
