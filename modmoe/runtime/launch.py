"""The environment variables in which a launcher such as torchrun describes the processes of a run."""

from __future__ import annotations

import os

from modmoe.errors import RankError, RecipeError

_PRECISIONS = ("no", "fp16", "bf16", "fp8")
"""Values of ACCELERATE_MIXED_PRECISION that accelerate knows."""


def number_of(name: str, default: int) -> int:
    """Return the whole number in an environment variable, or ``default`` where it is empty or not set.

    Raises RankError where it is not a whole number.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit()):
        raise RankError(name, f"is {text!r:.40}, no whole number", "unset it, or start the processes with torchrun")
    return int(text)


def is_first_of_many() -> bool | None:
    """Return whether this is the first of several processes; None where it is alone."""
    return number_of("RANK", 0) == 0 if number_of("WORLD_SIZE", 1) > 1 else None


def check_precision() -> None:
    """Raise RecipeError where ACCELERATE_MIXED_PRECISION is set to what accelerate does not know."""
    value = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if value not in _PRECISIONS:
        known = ", ".join(_PRECISIONS)
        raise RecipeError("ACCELERATE_MIXED_PRECISION", f"is {value!r:.40}, none of {known}", "set one, or unset it")
