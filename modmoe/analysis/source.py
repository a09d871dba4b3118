"""The dense checkpoint that is analysed or converted, opened and checked before any text is run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from modmoe.analysis.partitions.table import check_num_modules, find_partitioner
from modmoe.analysis.profile import reads_gradients
from modmoe.analysis.score import NEURON_SCORES, SCORES
from modmoe.analysis.text.calibration import load_task
from modmoe.analysis.text.rows import TaskRows
from modmoe.errors import CheckpointError, PartitionError, RecipeError, did_you_mean
from modmoe.models.counts import tensor_bytes
from modmoe.models.families import Family, family_of, layers_of, neurons_of
from modmoe.models.ffn_layout import check_ffns
from modmoe.models.loading import is_tied_type
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.progress import Progress, silent
from modmoe.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A dense checkpoint that passed every check that needs no calibration."""

    model: OpenedModel
    family: Family
    num_layers: int
    neurons: int
    """Neurons of one FFN."""
    texts: dict[str, TaskRows] = field(default_factory=dict)
    """The rows of each task."""

    @property
    def checkpoint(self) -> Checkpoint:
        """Its tensors."""
        return self.model.checkpoint

    @property
    def settings(self) -> dict[str, Any]:
        """Its configuration with the defaults filled in."""
        return self.model.settings

    @property
    def size_bytes(self) -> int:
        """The bytes of its tensors on the disk."""
        return tensor_bytes(self.checkpoint)


def needs_gradients(recipe: Recipe) -> bool:
    """Return whether the score or the partition of a recipe reads gradients, so that the whole model must be held."""
    score = NEURON_SCORES.get(recipe.assignment.score)
    return reads_gradients(find_partitioner(recipe.partition.method)) or (score is not None and reads_gradients(score))


def active_modules(recipe: Recipe) -> int:
    """Return how many modules an expert has: as many as the recipe says, else the fraction of all, at least one."""
    assignment = recipe.assignment
    return assignment.modules_per_expert or max(1, round(assignment.active_fraction * recipe.partition.num_modules))


def core_modules(recipe: Recipe) -> int:
    """Return how many modules are the core: a share of those that an expert has, of which one at least is left."""
    active = active_modules(recipe)
    return min(round(recipe.partition.core_fraction * active), active - 1)


def with_num_modules(recipe: Recipe, revision: str | None = None) -> Recipe:
    """Return the recipe with the number of modules that follows from the source and the neurons of a module.

    PartitionError where these do not divide the neurons of an FFN; without ``partition.module_size`` the recipe stays.
    """
    size = recipe.partition.module_size
    if size is None or recipe.source is None:
        return recipe
    model = OpenedModel.at(recipe.source, revision, trust_remote_code=recipe.trust_remote_code)
    family = family_of(model.checkpoint.config, recipe.family, str(model.directory / "config.json"))
    neurons = neurons_of(model.settings, family)
    if neurons % size:
        sizes = [number for number in range(1, neurons + 1) if neurons % number == 0]
        nearest = [number for number in sizes if number < size][-1:] + [number for number in sizes if number > size][:1]
        raise PartitionError(
            "partition.module_size",
            f"{size} does not divide the {neurons} neurons of an FFN",
            f"nearest that do: {', '.join(map(str, nearest))}",
        )
    return replace(recipe, partition=replace(recipe.partition, num_modules=neurons // size, module_size=None))


def open_source(
    recipe: Recipe, revision: str | None = None, progress: Progress | None = None, *, headers_only: bool = False
) -> Source:
    """Check all that can be known before calibration and return the dense source; the first process reads its bytes.

    With ``headers_only`` no weight is read, and values that are not finite are not found.

    Raises the kinds of ModmoeError: an unusable checkpoint, an unknown family, values that are not finite, a number of
    modules that does not divide the neurons, unknown methods, task files that cannot be read.
    """
    if recipe.source is None:
        raise RecipeError("source", "name the dense checkpoint")
    if not recipe.tasks:
        raise RecipeError("tasks", "name at least one task and its file, as in --task math=math.jsonl")
    score = recipe.assignment.score
    if score not in SCORES:
        raise RecipeError("assignment.score", f"no score '{score}'", did_you_mean(score, SCORES))
    if recipe.calibration.by_layer and needs_gradients(recipe):
        by_score = score in NEURON_SCORES and reads_gradients(NEURON_SCORES[score])
        what, other = (f"score {score}", "wanda") if by_score else (f"partition {recipe.partition.method}", "kmeans")
        raise RecipeError(
            "calibration.by_layer",
            f"{what} needs the whole model",
            f"choose another, such as {other}, or set it to false",
        )
    find_partitioner(recipe.partition.method)
    source = open_dense(recipe, revision)
    check_num_modules(source.neurons, recipe.partition.num_modules)
    progress = progress or silent
    progress("reading the tasks")
    texts = {name: load_task(name, file) for name, file in recipe.tasks.items()}
    if ranks.is_first() and not headers_only:
        source.checkpoint.check_finite(partial(progress, "checking the source, bytes"))
    return replace(source, texts=texts)


def open_dense(recipe: Recipe, revision: str | None = None) -> Source:
    """Return the recipe's dense source without any text, from its headers; raises as ``open_source`` does."""
    assert recipe.source is not None
    model = OpenedModel.at(recipe.source, revision, trust_remote_code=recipe.trust_remote_code)
    checkpoint = model.checkpoint
    if is_tied_type(checkpoint.config.get("model_type")):
        raise CheckpointError(str(model.directory), "is a ModularMoE checkpoint already", "name the dense one")
    family = family_of(checkpoint.config, recipe.family, str(model.directory / "config.json"))
    settings = model.settings
    model.check()
    checkpoint.add_prefix(family.layers)
    neurons, num_layers = neurons_of(settings, family), layers_of(settings)
    check_ffns(checkpoint, family, num_layers, neurons)
    return Source(model, family, num_layers, neurons)
