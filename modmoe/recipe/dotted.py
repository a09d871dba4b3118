"""Code that a recipe names by its dotted path: a user's own function or row, whose file is imported."""

from __future__ import annotations

import importlib
from typing import Any

from modmoe.errors import RecipeError, reason_of


def object_at(path: str, place: str) -> Any:
    """Return what ``package.file.name`` names, and import its file; RecipeError at ``place`` where that fails."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # importing runs the file, which may raise anything or exit
        problem = f"'{path}' cannot be imported: {reason_of(error)}"
        raise RecipeError(place, problem, "name package.file.function") from error
