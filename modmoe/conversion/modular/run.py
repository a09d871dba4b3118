"""A whole conversion: checks, analysis, experts, routers, plan, checkpoint, proof."""

# Shapes: T tokens, E experts, M modules

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modmoe.analysis.passes.by_layer import ByLayer
from modmoe.analysis.passes.by_layer import fits as has_room
from modmoe.analysis.run import (
    Analysis,
    Progress,
    Source,
    analyze_source,
    counter,
    open_source,
    save_analysis,
    save_recipe,
    silent,
    tokens_by_task,
)
from modmoe.analysis.score import module_scores
from modmoe.analysis.text.reading import summaries
from modmoe.conversion.modular.assignment import ASSIGNMENTS, Assignment
from modmoe.conversion.modular.from_outputs import OUTPUT_ASSIGNMENTS
from modmoe.conversion.modular.layerwise import KEPT_ROWS, LayerFit, fit_layers
from modmoe.conversion.modular.module_outputs import ModuleOutputs
from modmoe.conversion.modular.plan import modular_plan
from modmoe.conversion.modular.router_view import view_converted
from modmoe.conversion.modular.routers import RouterStart, start_routers
from modmoe.conversion.proof import verify_all_on
from modmoe.conversion.splits.table import SPLITS, settle_split
from modmoe.errors import PartitionError, RecipeError, did_you_mean
from modmoe.formats.tied_code import write_code
from modmoe.models.counts import count_copies, tensor_bytes
from modmoe.models.inspection import inspect
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.memory import calibrates
from modmoe.runtime.preflight import noting_output, place_report
from modmoe.storage.checkpoint import CheckpointWriter, copy_companions, write_json
from modmoe.storage.staging import check_output


@ranks.joined()
@calibrates
def convert_modular(
    recipe: Recipe,
    output: str,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    report: str | None = None,
    write_report: Callable[..., None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Turn a dense checkpoint into a parameter-sharing MoE at ``output``, whole or not at all.

    Processes that torchrun or accelerate launch started share the text and the layers. The first alone writes, and the
    others return no more than where.

    Returns what ``modmoe convert --json`` prints: the inspection of the new checkpoint with ``seconds``,
    ``peak_rss_bytes``, ``verified`` and how well each layer's router agrees with the best expert. The source is left
    unchanged.

    Raises:
        ModmoeError: a kind of it that says what to mend; nothing is left behind.
    """
    progress = progress or silent
    started_s = time.monotonic()
    check_output(output, overwrite=overwrite)
    recipe = settle(recipe)
    check_experts(recipe)
    source = open_source(recipe, revision, progress, headers_only=dry_run)
    if dry_run:
        return plan_costs(recipe, source)
    with ranks.open_first_output(output, overwrite=overwrite, size_bytes=tensor_bytes(source.checkpoint)) as directory:
        analysis = analyze_source(recipe, source, progress, directory)
        if fits_layerwise(recipe):
            fits = _fit_layerwise(recipe, analysis, directory, progress)
            analysis = with_partitions(analysis, recipe, fits)
        else:
            assignments = make_assignments(recipe, analysis)
            starts = _start_routers(recipe, analysis, assignments, progress)
            fits = [LayerFit(assignment, start) for assignment, start in zip(assignments, starts, strict=True)]
        if not ranks.is_first():
            return {"output": str(output)}
        checkpoint = source.checkpoint
        plan = modular_plan(
            checkpoint, source.family, recipe, analysis.partitions, fits, source.classes, source.settings
        )
        plan.check(checkpoint)
        writer = CheckpointWriter(directory, report=partial(progress, "writing, bytes"))
        plan.run(checkpoint, writer)
        writer.finish(plan.config)
        copy_companions(checkpoint.directory, directory)
        write_code(directory, plan.config, checkpoint.directory)
        save_recipe(directory, recipe)
        save_analysis(directory / "analysis", analysis)
        write_json(directory / "analysis" / "plan.json", plan.describe())
        verified = verify_all_on(
            directory,
            analysis,
            fits,
            trust_remote_code=recipe.trust_remote_code,
            report=partial(progress, "verifying, models"),
        )
        result = {
            **inspect(str(directory)),
            "output": str(output),
            "read": summaries(analysis.readings),
            "routers": [{"agreement": fit.start.agreement, "chance": fit.start.chance} for fit in fits],
            "verified": verified,
        }
        inside = place_report(report, output, directory)
        if report is not None and write_report is not None:
            progress("writing the report")
            chosen = [fit.assignment for fit in fits]
            members_EM = [assignment.membership_EM for assignment in chosen]
            view = view_converted(recipe, directory, analysis, members_EM, scratch=directory)
            write = partial(write_report, recipe=recipe, analysis=analysis, assignments=chosen, routing=view)
            if inside is not None:
                write(inside, summary=result)
        progress("putting it on the disk")
    if report is not None and write_report is not None and inside is None:
        with noting_output(output):
            write(Path(report), summary=result, overwrite=overwrite)
    result["seconds"] = round(time.monotonic() - started_s, 2)
    result["peak_rss_bytes"] = peak_rss_bytes()
    return result


def check_experts(recipe: Recipe) -> None:
    """Refuse numbers of experts and modules that no assignment can have."""
    wanted, modules = recipe.assignment, recipe.partition.num_modules
    tasks, experts = len(recipe.tasks), count_experts(recipe)
    per_expert = modules_per_expert(recipe)
    methods = (*ASSIGNMENTS, *OUTPUT_ASSIGNMENTS)
    if wanted.method not in methods:
        raise RecipeError(f"assignment.method: no method '{wanted.method}'.{did_you_mean(wanted.method, methods)}")
    if fits_layerwise(recipe) and recipe.router.routing == "sequence":
        raise RecipeError("router.routing: sequence does not go with this assignment or refit; use token or task.")
    if wanted.method in ("tokens", "modules") and recipe.router.routing == "task":
        raise RecipeError(f"router.routing: with assignment '{wanted.method}' experts are no tasks; use token.")
    if wanted.coverage and wanted.method == "tokens":
        raise RecipeError("assignment.coverage: assignment 'tokens' has none; leave it out.")
    if wanted.method == "modules" and wanted.num_experts not in (None, experts):
        raise RecipeError(
            f"assignment.num_experts: with assignment 'modules' there is one a module that is not shared, {experts}; "
            "leave it out."
        )
    if fits_layerwise(recipe):
        grams_bytes = 4 * KEPT_ROWS * modules**2
        if not has_room(grams_bytes, torch.device("cpu")):
            raise RecipeError(
                f"partition.num_modules: what {modules} modules put out takes {grams_bytes / 1e9:.1f} GB with this "
                "assignment or refit; choose fewer modules."
            )
    if wanted.method not in ("tokens", "modules") and tasks > 1 and experts != tasks:
        raise PartitionError(
            f"assignment.num_experts: {experts} experts for {tasks} tasks; leave it out (one a task), or name one task "
            "to have its sequences clustered."
        )
    if per_expert > modules:
        raise PartitionError(
            f"assignment.modules_per_expert: {per_expert} is more than the {modules} modules there are."
        )
    if wanted.shared_modules > per_expert:
        raise PartitionError(
            f"assignment.shared_modules: {wanted.shared_modules} is more than the {per_expert} modules of an expert."
        )
    if recipe.router.top_k > experts:
        raise RecipeError(f"router.top_k: {recipe.router.top_k} is more than the {experts} experts there are.")


def check_tasks(recipe: Recipe) -> None:
    """Check the experts of a recipe that names tasks: without any it is not known how many there are."""
    if recipe.tasks:
        check_experts(recipe)


def check_settled(recipe: Recipe) -> None:
    """Check the experts of a published way, with what follows from it."""
    check_experts(settle(recipe))


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe with what follows from it: where the router chooses modules, how many it chooses."""
    if SPLITS.get(recipe.method) is not None:
        recipe = settle_split(recipe)
    wanted = recipe.assignment
    if wanted.method != "modules":
        return recipe
    active = wanted.modules_per_expert or max(1, round(wanted.active_fraction * recipe.partition.num_modules))
    chosen = active - wanted.shared_modules
    if chosen < 1:
        raise PartitionError(
            f"assignment.shared_modules: {wanted.shared_modules} leave nothing to choose of {active} active modules."
        )
    if recipe.router.top_k not in (1, chosen):
        raise RecipeError(
            f"router.top_k: with assignment 'modules' it follows from the active modules, {chosen}; leave it out."
        )
    return replace(recipe, router=replace(recipe.router, top_k=chosen))


def count_experts(recipe: Recipe) -> int:
    """Return the number of experts: as asked, else one a task."""
    if recipe.assignment.method == "modules":
        return recipe.partition.num_modules - recipe.assignment.shared_modules
    return recipe.assignment.num_experts or len(recipe.tasks)


def modules_per_expert(recipe: Recipe) -> int:
    """Return the modules of an expert: as asked, else the fraction of all, at least one."""
    asked = recipe.assignment.modules_per_expert
    if recipe.assignment.method == "modules":
        return recipe.assignment.shared_modules + 1
    return asked or max(1, round(recipe.assignment.active_fraction * recipe.partition.num_modules))


def fits_layerwise(recipe: Recipe) -> bool:
    """Whether experts are chosen layer after layer, from what modules put out."""
    return recipe.assignment.method in OUTPUT_ASSIGNMENTS or recipe.assignment.refit


def layered(recipe: Recipe, analysis: Analysis, scratch: Path) -> ByLayer:
    """Return what runs the analysed model one layer at a time, its hidden states on the disk of ``scratch``."""
    source, runner = analysis.source, analysis.runner
    if isinstance(runner, ByLayer):
        return runner
    return ByLayer(
        source.checkpoint,
        source.family,
        device=next(runner.model.parameters()).device,
        scratch=scratch,
        trust_remote_code=recipe.trust_remote_code,
    )


def _fit_layerwise(recipe: Recipe, analysis: Analysis, scratch: Path, progress: Progress) -> list[LayerFit]:
    names, wanted = tuple(analysis.batches), recipe.assignment
    by_score = make_assignments(recipe, analysis) if wanted.method in ASSIGNMENTS else []

    def assign(layer: int, outputs: ModuleOutputs) -> Assignment:
        if by_score:
            return by_score[layer]
        return OUTPUT_ASSIGNMENTS[wanted.method](
            outputs,
            names,
            num_experts=count_experts(recipe),
            modules_per_expert=modules_per_expert(recipe),
            shared_modules=wanted.shared_modules,
            coverage=wanted.coverage,
            seed=recipe.seed,
        )

    total = sum(tokens_by_task(analysis.batches).values())
    return fit_layers(
        layered(recipe, analysis, scratch),
        analysis.batches,
        analysis.ffns,
        analysis.partitions,
        assign,
        recipe,
        counter(progress, "fitting layers, tokens", total),
        split.split if (split := SPLITS.get(recipe.method)) is not None else None,
    )


def with_partitions(analysis: Analysis, recipe: Recipe, fits: list[LayerFit]) -> Analysis:
    """Return the analysis with the modules, and their scores, that were made with the fits."""
    if fits[0].partition is None:
        return analysis
    partitions = [fit.partition or partition for fit, partition in zip(fits, analysis.partitions, strict=True)]
    score = recipe.assignment.score
    scored = zip(analysis.profiles, analysis.ffns, partitions, strict=True)
    scores_PM = [module_scores(score, *layer) for layer in scored]
    return replace(analysis, partitions=partitions, scores_PM=scores_PM)


def make_assignments(recipe: Recipe, analysis: Analysis) -> list[Assignment]:
    """Choose each expert's modules in each layer."""
    names = tuple(analysis.batches)
    return [
        ASSIGNMENTS[recipe.assignment.method](
            scores_PM,
            names,
            modules_per_expert=modules_per_expert(recipe),
            shared_modules=recipe.assignment.shared_modules,
            coverage=recipe.assignment.coverage,
            seed=recipe.seed + layer,
        )
        for layer, scores_PM in enumerate(analysis.scores_PM)
    ]


def _start_routers(
    recipe: Recipe, analysis: Analysis, assignments: list[Assignment], progress: Progress
) -> list[RouterStart]:
    total = sum(tokens_by_task(analysis.batches).values()) * (2 if recipe.router.compensation else 1)
    # layer by layer the fits come between the layers' text, whose count goes on
    fitted = silent if isinstance(analysis.runner, ByLayer) else partial(progress, "fitting routers, layers")
    return start_routers(
        analysis.runner,
        analysis.batches,
        analysis.ffns,
        analysis.partitions,
        assignments,
        recipe.router,
        recipe.seed,
        progress=counter(progress, "starting routers, tokens", total),
        fitted=fitted,
    )


def plan_costs(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return what a conversion would make and cost, from headers alone: bounds, since the overlap is not known yet."""
    modules, experts = recipe.partition.num_modules, count_experts(recipe)
    per_expert, shared = modules_per_expert(recipe), recipe.assignment.shared_modules
    checkpoint, family = source.checkpoint, source.family
    sizes = {name: torch.Size(checkpoint.shape(name)).numel() for name in checkpoint}
    dense = sum(sizes.values())
    paths = {path for path in (family.gate, family.up, family.down) if path is not None}
    # the bias behind down belongs to no module
    kinds = [f"{path}.weight" for path in paths] + [f"{path}.bias" for path in paths - {family.down}]
    ffn = sum(sizes.get(f"{family.layers}.{layer}.{kind}", 0) for layer in range(source.num_layers) for kind in kinds)
    stored = min(modules, experts * (per_expert - shared) + shared)
    active = min(modules, recipe.router.top_k * (per_expert - shared) + shared)
    copies = count_copies(experts * (per_expert - shared), shared, experts, recipe.router.top_k, recipe.router.combine)
    tokens = recipe.calibration.tokens * len(recipe.tasks)
    return {
        "dry_run": True,
        "model_type": family.model_type,
        "num_layers": source.num_layers,
        "num_modules": modules,
        "module_size": source.neurons // modules,
        "num_experts": experts,
        "modules_per_expert": per_expert,
        "parameters": {
            "dense": dense,
            "stored_at_least": dense - ffn + ffn * per_expert // modules,
            "stored_at_most": dense - ffn + ffn * stored // modules,
            "active": dense - ffn + ffn * active // modules,
            "materialised": dense - ffn + ffn * copies // modules,
        },
        "calibration_tokens": tokens,
        # a forward pass is two operations a parameter and token, and routers take a second one
        "calibration_flops": 2 * dense * tokens * 2,
        "tensors": len(checkpoint),
    }


def peak_rss_bytes() -> int:
    """Return the most memory this process has had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
