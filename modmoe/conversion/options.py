"""Whether a recipe can be run, as far as it can be told before anything is read."""

from __future__ import annotations

from modmoe.analysis.partitions.table import find_partitioner
from modmoe.analysis.score import SCORES
from modmoe.conversion.modular.assignment import ASSIGNMENTS
from modmoe.conversion.modular.from_outputs import OUTPUT_ASSIGNMENTS
from modmoe.conversion.prune import SCORES as NEURON_SCORES
from modmoe.conversion.reduce_experts.reduction import SCORES as EXPERT_SCORES
from modmoe.conversion.table import CONVERSIONS, function_at
from modmoe.errors import RecipeError, did_you_mean
from modmoe.models.families import family_of
from modmoe.recipe.schema import Recipe


def check_recipe(recipe: Recipe) -> None:
    """Check what a recipe names against the tables of methods, and its numbers against each other.

    Raises RecipeError or PartitionError as a conversion would, before anything is read.
    """
    find_partitioner(recipe.partition.method)
    for place, name, known in (
        ("method", recipe.method, tuple(CONVERSIONS)),
        ("assignment.method", recipe.assignment.method, (*ASSIGNMENTS, *OUTPUT_ASSIGNMENTS)),
        ("assignment.score", recipe.assignment.score, _scores_of(recipe.method)),
        ("experts.score", recipe.experts.score, tuple(EXPERT_SCORES)),
    ):
        if name not in known:
            raise RecipeError(f"{place}: there is no '{name}'.{did_you_mean(name, known)}")
    if recipe.family is not None:
        family_of({}, recipe.family)
    if recipe.adapter.method is not None:
        from modmoe.adapters.budget import make_config

        make_config(recipe.adapter.method, recipe.adapter.settings)
    check = CONVERSIONS[recipe.method].check
    if check:
        function_at(check)(recipe)


def _scores_of(method: str) -> tuple[str, ...]:
    conversion = CONVERSIONS.get(method)
    return tuple(NEURON_SCORES) if conversion is not None and conversion.scores == "neurons" else tuple(SCORES)
