"""Whether a recipe can be run, as far as it can be told before anything is read."""

from __future__ import annotations

from modmoe.analysis.partitions.table import find_partitioner
from modmoe.analysis.score import SCORES
from modmoe.conversion.driver import steps_of
from modmoe.conversion.modular.assignments import find_assignment
from modmoe.conversion.prune import SCORES as NEURON_SCORES
from modmoe.conversion.reduce_experts.reduction import SCORES as EXPERT_SCORES
from modmoe.conversion.table import find_conversion
from modmoe.errors import RecipeError, did_you_mean
from modmoe.models.families import family_of
from modmoe.recipe.schema import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Check what a recipe names against the tables of methods, and its numbers against each other.

    Raises RecipeError or PartitionError as a conversion would, before anything is read.
    """
    conversion = find_conversion(recipe.method)
    find_partitioner(recipe.partition.method)
    find_assignment(recipe.assignment.method)
    for place, name, names in (
        ("assignment.score", recipe.assignment.score, NEURON_SCORES if conversion.scores == "neurons" else SCORES),
        ("experts.score", recipe.experts.score, EXPERT_SCORES),
    ):
        if name not in names:
            raise RecipeError(place, f"no score '{name}'", did_you_mean(name, names))
    if recipe.family is not None:
        family_of({}, recipe.family)
    if recipe.adapter.method is not None:
        from modmoe.adapters.budget import make_config

        make_config(recipe.adapter.method, recipe.adapter.settings)
    steps_of(recipe.method).settle(recipe)
