"""What follows from a recipe for a ModularMoE: how many experts there are, of how many modules, and what cannot be."""

from __future__ import annotations

from dataclasses import replace

import torch

from modmoe.analysis.partitions.table import find_partitioner
from modmoe.analysis.passes.by_layer import fits
from modmoe.analysis.profile import reads_gradients
from modmoe.analysis.source import active_modules, core_modules
from modmoe.conversion.modular.assignments import find_assignment
from modmoe.conversion.modular.layerwise import KEPT_ROWS
from modmoe.conversion.splits.table import settle_split
from modmoe.errors import PartitionError, RecipeError
from modmoe.recipe.schema import Recipe


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe with what follows from it: experts share the core, and so many modules are chosen."""
    recipe = settle_split(recipe)
    core = core_modules(recipe)
    if core and not recipe.assignment.shared_modules:
        recipe = replace(recipe, assignment=replace(recipe.assignment, shared_modules=core))
    assignment = recipe.assignment
    if not find_assignment(assignment.method).is_by_module:
        return recipe
    active = active_modules(recipe)
    top_k = active - assignment.shared_modules
    if top_k < 1:
        raise PartitionError(
            "assignment.shared_modules",
            f"{assignment.shared_modules} leave nothing to choose of {active} active modules",
        )
    if recipe.router.top_k not in (1, top_k):
        raise RecipeError(
            "router.top_k", f"with assignment 'modules' it follows from the active modules, {top_k}", "leave it out"
        )
    return replace(recipe, router=replace(recipe.router, top_k=top_k))


def settle_and_check(recipe: Recipe) -> Recipe:
    """Return the settled recipe; raises where its experts cannot be, as far as that is known without tasks."""
    recipe = settle(recipe)
    if recipe.tasks or count_experts(recipe):
        check_experts(recipe)
    return recipe


def check_experts(recipe: Recipe) -> None:
    """Raise RecipeError or PartitionError for numbers of experts and modules that no assignment can have."""
    assignment, modules = recipe.assignment, recipe.partition.num_modules
    method, name = find_assignment(assignment.method), assignment.method
    tasks, experts, per_expert = len(recipe.tasks), count_experts(recipe), modules_per_expert(recipe)
    if fits_layerwise(recipe) and recipe.router.routing == "sequence":
        raise RecipeError("router.routing", "sequence does not go with this assignment or refit", "use token or task")
    if not method.is_by_task and recipe.router.routing == "task":
        raise RecipeError("router.routing", f"with assignment '{name}' experts are no tasks", "use token")
    if recipe.router.start == "ridge" and (not method.is_by_module or recipe.router.kind != "linear"):
        raise RecipeError(
            "router.start", "ridge is for assignment 'modules' and a linear router", "leave it out, or give both"
        )
    if assignment.coverage and not method.has_coverage:
        raise RecipeError("assignment.coverage", f"assignment '{name}' has none", "leave it out")
    if method.is_by_module and assignment.num_experts not in (None, experts):
        raise RecipeError(
            "assignment.num_experts",
            f"with assignment '{name}' there is one a module that is not shared, {experts}",
            "leave it out",
        )
    if fits_layerwise(recipe):
        grams_bytes = 4 * KEPT_ROWS * modules**2
        if not fits(grams_bytes, torch.device("cpu")):
            raise RecipeError(
                "partition.num_modules",
                f"what {modules} modules put out takes {grams_bytes / 1e9:.1f} GB with this assignment or refit",
                "choose fewer modules",
            )
    if method.is_by_task and tasks > 1 and experts != tasks:
        raise PartitionError(
            "assignment.num_experts",
            f"{experts} experts for {tasks} tasks",
            "leave it out (one a task), or name one task to have its sequences clustered",
        )
    if per_expert > modules:
        raise PartitionError(
            "assignment.modules_per_expert", f"{per_expert} is more than the {modules} modules there are"
        )
    if assignment.shared_modules > per_expert:
        raise PartitionError(
            "assignment.shared_modules",
            f"{assignment.shared_modules} is more than the {per_expert} modules of an expert",
        )
    if recipe.router.top_k > experts:
        raise RecipeError("router.top_k", f"{recipe.router.top_k} is more than the {experts} experts there are")


def count_experts(recipe: Recipe) -> int:
    """Return the number of experts: as asked, else one a task."""
    if find_assignment(recipe.assignment.method).is_by_module:
        return recipe.partition.num_modules - recipe.assignment.shared_modules
    return recipe.assignment.num_experts or len(recipe.tasks)


def modules_per_expert(recipe: Recipe) -> int:
    """Return the modules of an expert: as asked, else the fraction of all, at least one."""
    if find_assignment(recipe.assignment.method).is_by_module:
        return recipe.assignment.shared_modules + 1
    return active_modules(recipe)


def fits_layerwise(recipe: Recipe) -> bool:
    """Return whether experts are chosen layer after layer, from what modules put out."""
    return find_assignment(recipe.assignment.method).by_outputs is not None or recipe.assignment.refit


def count_clusters(recipe: Recipe) -> int:
    """Return how many clusters of sequences stand for tasks where there is one task; 1 leaves it as it is.

    They are as many as experts, or where every module is an expert and is cut by gradients, as modules.
    """
    if find_assignment(recipe.assignment.method).is_by_task:
        return recipe.assignment.num_experts or 1
    return recipe.partition.num_modules if reads_gradients(find_partitioner(recipe.partition.method)) else 1
