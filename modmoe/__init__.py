"""modmoe: dense language models become parameter-sharing mixtures of experts.

What is named here is public; everything else may move. Nothing heavy is imported until it is used, so that
``import modmoe`` and the command line's ``--help`` answer at once.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modmoe.diagnosis.run import doctor
    from modmoe.errors import ModmoeError
    from modmoe.loading import load
    from modmoe.recipe import Recipe, load_recipe, make_recipe
    from modmoe.steps import analyze, convert, evaluate, export, finetune, inspect

__version__ = "0.1.0"

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
    "Recipe": "modmoe.recipe",
    "doctor": "modmoe.diagnosis.run",
    "evaluate": "modmoe.steps",
    "inspect": "modmoe.steps",
    "load": "modmoe.loading",
    "load_recipe": "modmoe.recipe",
    "make_recipe": "modmoe.recipe",
}
# Each of these is a step and the package that holds its parts. Python binds a package to its parent's name whenever a
# part is imported, so the step cannot be a plain function: the package itself is made callable.
_STEPS = frozenset({"analyze", "convert", "export", "finetune"})


class _Step(types.ModuleType):
    """A package that runs the step of its name when called."""

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        return getattr(importlib.import_module("modmoe.steps"), self.__name__.rpartition(".")[2])(*args, **keywords)

    @property
    def __signature__(self) -> Any:  # what help() and editors show
        step = getattr(importlib.import_module("modmoe.steps"), self.__name__.rpartition(".")[2])
        return importlib.import_module("inspect").signature(step)


class _Root(types.ModuleType):
    """This package; it makes the steps callable when Python binds them."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _STEPS and isinstance(value, types.ModuleType):
            value.__class__ = _Step
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Root


def __getattr__(name: str) -> Any:
    """Import what is public when it is first used."""
    if name in _STEPS:
        return importlib.import_module(f"modmoe.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'modmoe' has no attribute '{name}'")


def __dir__() -> list[str]:
    """List what is public, imported or not."""
    return sorted({*globals(), *__all__})
