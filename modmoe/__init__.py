"""modmoe: dense language models become parameter-sharing mixtures of experts.

What is named here is public; everything else may move. Nothing heavy is imported until it is used, so that
``import modmoe`` and the command line's ``--help`` answer at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from modmoe.version import __version__

if TYPE_CHECKING:
    from modmoe.api import analyze, convert, evaluate, export, finetune, inspect
    from modmoe.diagnosis.doctor import doctor
    from modmoe.errors import ModmoeError
    from modmoe.models.loading import load
    from modmoe.recipe.schema import Recipe, load_recipe, make_recipe


__all__ = [
    "ModmoeError",
    "Recipe",
    "__version__",
    "analyze",
    "convert",
    "doctor",
    "evaluate",
    "export",
    "finetune",
    "inspect",
    "load",
    "load_recipe",
    "make_recipe",
]

_HOMES = {
    "ModmoeError": "modmoe.errors",
    "Recipe": "modmoe.recipe.schema",
    "analyze": "modmoe.api",
    "convert": "modmoe.api",
    "doctor": "modmoe.diagnosis.doctor",
    "evaluate": "modmoe.api",
    "export": "modmoe.api",
    "finetune": "modmoe.api",
    "inspect": "modmoe.api",
    "load": "modmoe.models.loading",
    "load_recipe": "modmoe.recipe.schema",
    "make_recipe": "modmoe.recipe.schema",
}


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used."""
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'modmoe' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List what is public, imported or not."""
    return sorted({*globals(), *__all__})
