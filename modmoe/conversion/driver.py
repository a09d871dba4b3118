"""One call for every conversion: which one, the recipe says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modmoe.analysis.run import Progress
from modmoe.conversion.table import find_conversion, function_at
from modmoe.recipe.schema import Recipe


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
    """Convert a checkpoint as the recipe says; see what the row of its method in ``CONVERSIONS`` runs.

    ``write_report`` writes ``report``, which is not written without it. Raises RecipeError for an unknown method.
    """
    conversion = find_conversion(recipe.method)
    options: dict[str, Any] = {"overwrite": overwrite, "dry_run": dry_run, "revision": revision, "progress": progress}
    if conversion.is_modular:
        options |= {"report": report, "write_report": write_report}
    result: dict[str, Any] = function_at(conversion.run)(recipe, output, **options)
    return result
