"""The record that a run leaves of its recipe, beside what it wrote."""

from __future__ import annotations

from pathlib import Path

from modmoe.recipe.schema import Recipe, dump_recipe
from modmoe.version import __version__


def save_recipe(directory: Path, recipe: Recipe) -> None:
    """Write the resolved recipe, with the versions that it ran with, as modmoe.yaml."""
    import torch
    import transformers

    versions = {"modmoe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (directory / "modmoe.yaml").write_text(dump_recipe(recipe, versions), encoding="utf-8")
