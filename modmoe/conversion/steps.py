"""What a conversion consists of: the functions that it gives to the driver, and the draft that it hands back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from modmoe.analysis.text.reading import Reading
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import Recipe
from modmoe.runtime.progress import Progress
from modmoe.storage.plan import Plan

__all__ = ["Draft", "Opened", "Steps"]


class Opened(Protocol):
    """A source that passed every check that needs no calibration."""

    @property
    def model(self) -> OpenedModel:
        """The model that is converted."""
        ...

    @property
    def size_bytes(self) -> int:
        """What the output takes on the disk, at its most."""
        ...


def nothing(*_: Any) -> None:
    """Do nothing: most conversions leave a hook of theirs empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A new model before it is written, and what belongs beside its weights."""

    plan: Plan | None
    """The tensors of the new checkpoint; None where ``write`` writes all there is, as it does for an adapter."""
    write: Callable[[Path], None] = nothing
    """Writes the other files of the output, such as code and statistics."""
    prove: Callable[[Path], dict[str, Any] | None]
    """Compares what was written with what it was made from; raises a ModmoeError where they differ."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What the result says beside the inspection of the output."""
    readings: Mapping[str, Reading] | None = None
    """What was read of each task."""
    finish: Callable[[Path, dict[str, Any]], None] = nothing
    """Writes what needs the whole result, such as a card."""
    report: Callable[[Path], Mapping[str, Any]] | None = None
    """Returns what the report shows beside the recipe and the result; None where a conversion has no report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The functions of one conversion, in the order in which the driver calls them."""

    settle: Callable[[Recipe], Recipe]
    """Returns the recipe with what follows from it; raises RecipeError or PartitionError for what cannot be."""
    open: Callable[..., Any]
    """Called with the recipe, ``revision``, ``progress`` and ``headers_only``, it returns an ``Opened``. All checks
    that need no calibration are made here; with ``headers_only``, which is a dry run, no weight is read."""
    describe: Callable[[Recipe, Any], dict[str, Any]]
    """Returns what a run would make and cost, from headers alone."""
    make: Callable[[Recipe, Any, Path, Progress], Draft | None]
    """Reads the text where there is any and decides what the new model is. Every process of a run calls it, with the
    directory of the output for hidden states that do not fit into memory; all but the first return None."""
