"""What to lower where memory runs out, and by how much."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from modmoe.errors import ModmoeError, RecipeError, is_out_of_memory
from modmoe.recipe.schema import Recipe

# how torch's allocators for the CPU and for GPUs, and numpy's, say how much was asked for
_ASKED = re.compile(r"allocate ([\d.]+) ?(bytes|[KMGTP]iB)")
_SHORTEST = 32
"""Tokens; shorter sequences hold too little text to learn from."""


@contextlib.contextmanager
def names_what_to_lower(
    recipe: Recipe,
    part: str,
    kind: type[ModmoeError] = RecipeError,
    num_sharing: int = 1,
    *,
    needs_whole_model: bool = False,
) -> Iterator[None]:
    """Turn a lack of memory into one line that names keys of the recipe's ``part`` and the values to set them to.

    Args:
        recipe: what is run.
        part: ``calibration`` or ``finetune``.
        kind: the error that is raised.
        num_sharing: processes that share a batch, and among which it has to divide.
        needs_whole_model: whether the model cannot be run a decoder layer at a time.

    Raises:
        ModmoeError: memory is full; of ``kind``.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, ModmoeError) or not is_out_of_memory(error):
            raise
        asked = _ASKED.search(str(error))
        lacking = f", {asked[1]} {asked[2]} more were asked for" if asked else ""
        remedy = advice(recipe, part, num_sharing, needs_whole_model=needs_whole_model)
        line = kind(part, f"memory is full{lacking}", remedy)
        for note in getattr(error, "__notes__", ()):
            line.add_note(note)
        raise line from error


def advice(recipe: Recipe, part: str, num_sharing: int = 1, *, needs_whole_model: bool = False) -> str:
    """Return the remedy: halve the batch or the sequences, or hold less of the model."""
    values = recipe.finetune if part == "finetune" else recipe.calibration
    remedies = []
    if part == "calibration" and not recipe.calibration.by_layer and not needs_whole_model:
        remedies.append("set calibration.by_layer to true")
    batch = values.batch_size // 2 // num_sharing * num_sharing
    if batch:
        remedies.append(f"lower {part}.batch_size from {values.batch_size} to {batch}")
    if values.sequence_length >= 2 * _SHORTEST:
        remedies.append(f"lower {part}.sequence_length from {values.sequence_length} to {values.sequence_length // 2}")
    if part == "finetune" and recipe.finetune.train == "full":
        remedies.append("set finetune.train to lora")
    return ", or ".join(remedies) if remedies else "take a machine with more of it"
