"""What a recipe names by its dotted path: a function or a row of one's own, in a file that is imported for it."""

from __future__ import annotations

import importlib
from typing import Any

from modmoe.errors import RecipeError, reason_of


def object_at(path: str, place: str) -> Any:
    """Return what ``package.file.name`` names, and import its file; RecipeError at ``place`` where that fails."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # the file is a program, and may end as it likes
        problem = f"'{path}' cannot be imported: {reason_of(error)}"
        raise RecipeError(place, problem, "name package.file.function") from error
