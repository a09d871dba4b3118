"""The published ways of splitting a dense FFN into experts: peers of ModularMoE, written as the same checkpoint.

Each makes every module an expert of its own, as assignment ``modules`` does, so that ``active_fraction`` means the same
for all of them and for ModularMoE. What each keeps of its paper, and what differs, is said at the top of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from modmoe.conversion.modular.assignments import find_assignment
from modmoe.conversion.modular.layerwise import SplitLayer
from modmoe.conversion.splits.cmoe import share_half, split_cmoe
from modmoe.conversion.splits.emoe import split_emoe
from modmoe.conversion.splits.llama_moe import split_llama_moe
from modmoe.conversion.splits.moefication import split_moefication
from modmoe.errors import RecipeError
from modmoe.recipe.schema import AssignmentRecipe, Recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """One published way, and what of a recipe it leaves open."""

    split: SplitLayer
    """Splits a layer."""
    kinds: tuple[Literal["linear", "mlp"], ...] = ("linear", "mlp")
    """The kinds of router it has."""
    combine: Literal["union", "sum"] = "union"
    """How its experts add up."""
    has_shared: bool = False
    """Whether some modules may be in every expert."""
    has_repairs: bool = True
    """Whether compensation and a refit go with it."""
    cuts: bool = False
    """Whether it makes its own modules, whatever ``partition.method`` says."""
    complete: Callable[[Recipe], Recipe] = lambda recipe: recipe
    """Fills in what it alone knows."""


SPLITS: dict[str, Split] = {
    "cmoe": Split(split=split_cmoe, has_shared=True, cuts=True, complete=share_half),
    "moefication": Split(split=split_moefication),
    "emoe": Split(split=split_emoe, kinds=("linear",)),
    "llama_moe": Split(split=split_llama_moe, kinds=("mlp",), combine="sum", has_repairs=False),
}
"""Name, the recipe's ``method``, to the way."""


def settle_split(recipe: Recipe) -> Recipe:
    """Return the recipe of a published way with all that follows from it, and any other as it is.

    Raises RecipeError for what the way does not have.
    """
    name, split = recipe.method, SPLITS.get(recipe.method)
    if split is None:
        return recipe
    assignment, router = recipe.assignment, recipe.router
    if assignment.method != AssignmentRecipe().method and not find_assignment(assignment.method).is_by_module:
        raise RecipeError(
            "assignment.method", f"{name} makes every module an expert", f"leave out '{assignment.method}'"
        )
    if assignment.num_experts is not None:
        raise RecipeError("assignment.num_experts", f"{name} has an expert for each module", "give num_modules instead")
    if router.routing != "token":
        raise RecipeError("router.routing", f"{name} chooses by token", f"leave out '{router.routing}'")
    if router.kind not in split.kinds:
        raise RecipeError("router.kind", f"the router of {name} is {split.kinds[0]}, not {router.kind}")
    if router.combine != split.combine:
        raise RecipeError("router.combine", f"{name} adds experts up by {split.combine}, not {router.combine}")
    if assignment.shared_modules and not split.has_shared:
        raise RecipeError("assignment.shared_modules", f"{name} shares none", "set it to 0")
    if (router.compensation or assignment.refit) and not split.has_repairs:
        raise RecipeError("router.compensation, assignment.refit", f"{name} has neither", "set both to false")
    if split.cuts and assignment.score == "output_norm":
        raise RecipeError(
            "assignment.score", f"{name} makes modules that output_norm was not measured for", "leave it out"
        )
    if split.cuts:
        # the cheapest, for it is cut anew
        recipe = replace(recipe, partition=replace(recipe.partition, method="contiguous"))
    return split.complete(replace(recipe, assignment=replace(assignment, method="modules")))
