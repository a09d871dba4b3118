"""One call for every conversion that is written as a ModularMoE or as a dense model: which one, the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modmoe.analysis.run import Progress
from modmoe.conversion.modular.run import convert_modular
from modmoe.conversion.prune import prune
from modmoe.conversion.splits.table import SPLITS
from modmoe.errors import RecipeError, did_you_mean
from modmoe.recipe.schema import Recipe

METHODS = ("modular", *SPLITS, "prune", "upcycle", "experts", "adapters")
"""Every conversion by its name."""


def convert(
    recipe: Recipe,
    output: str,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    report: str | None = None,
    write_report: Callable[..., None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert a dense checkpoint as the recipe says; see ``convert_modular`` and ``prune``.

    ``write_report`` writes ``report``, which is not written without it. Raises RecipeError for an unknown method.
    """
    if recipe.method not in METHODS:
        raise RecipeError(f"method: no method '{recipe.method}'.{did_you_mean(recipe.method, METHODS)}")
    if recipe.method == "prune":
        return prune(recipe, output, overwrite=overwrite, dry_run=dry_run, revision=revision, progress=progress)
    return convert_modular(
        recipe,
        output,
        overwrite=overwrite,
        dry_run=dry_run,
        revision=revision,
        report=report,
        write_report=write_report,
        progress=progress,
    )
