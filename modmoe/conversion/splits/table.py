"""The published ways of splitting a dense FFN into experts: peers of ModularMoE, written as the same checkpoint.

Each makes every module an expert of its own, as assignment ``modules`` does, so that ``active_fraction`` means the same
for all of them and for ModularMoE. What each keeps of its paper, and what differs, is said at the top of its file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from modmoe.conversion.modular.layerwise import SplitLayer
from modmoe.conversion.splits.cmoe import share_half, split_cmoe
from modmoe.conversion.splits.emoe import split_emoe
from modmoe.conversion.splits.llama_moe import split_llama_moe
from modmoe.conversion.splits.moefication import split_moefication
from modmoe.errors import RecipeError
from modmoe.recipe.schema import Recipe


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
    """Return the recipe of a published way with all that follows from it.

    Raises RecipeError for what the way does not have.
    """
    name, split = recipe.method, SPLITS[recipe.method]
    wanted, router = recipe.assignment, recipe.router
    if wanted.method not in ("top_score", "modules"):
        raise RecipeError(f"assignment.method: {name} makes every module an expert; leave out '{wanted.method}'.")
    if wanted.num_experts is not None:
        raise RecipeError(f"assignment.num_experts: {name} has an expert for each module; give num_modules instead.")
    if router.routing != "token":
        raise RecipeError(f"router.routing: {name} chooses by token; leave out '{router.routing}'.")
    if router.kind not in split.kinds:
        raise RecipeError(f"router.kind: the router of {name} is {split.kinds[0]}, not {router.kind}.")
    if router.combine != split.combine:
        raise RecipeError(f"router.combine: {name} adds experts up by {split.combine}, not {router.combine}.")
    if wanted.shared_modules and not split.has_shared:
        raise RecipeError(f"assignment.shared_modules: {name} shares none; set it to 0.")
    if (router.compensation or wanted.refit) and not split.has_repairs:
        raise RecipeError(f"router.compensation, assignment.refit: {name} has neither; set both to false.")
    if split.cuts and wanted.score == "output_norm":
        raise RecipeError(
            f"assignment.score: {name} makes modules that output_norm was not measured for; leave it out."
        )
    if split.cuts:
        # the cheapest, for it is cut anew
        recipe = replace(recipe, partition=replace(recipe.partition, method="contiguous"))
    return split.complete(replace(recipe, assignment=replace(wanted, method="modules")))
