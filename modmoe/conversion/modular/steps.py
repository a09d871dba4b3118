"""ModularMoE and the published splits: analysis, experts, routers, plan, proof, as the driver calls them."""

# Shapes: T tokens, E experts, M modules

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modmoe.analysis.passes.by_layer import ByLayer
from modmoe.analysis.run import Analysis, analyze_source, save_analysis, tokens_by_task
from modmoe.analysis.score import module_scores
from modmoe.analysis.source import Source, core_modules, open_source
from modmoe.conversion.modular.assignment import Assignment
from modmoe.conversion.modular.assignments import find_assignment
from modmoe.conversion.modular.layerwise import FitOptions, LayerFit, fit_layers
from modmoe.conversion.modular.module_outputs import ModuleOutputs
from modmoe.conversion.modular.plan import modular_plan
from modmoe.conversion.modular.router_view import view_converted
from modmoe.conversion.modular.routers import RouterStart, start_routers
from modmoe.conversion.modular.settled import (
    count_clusters,
    count_experts,
    fits_layerwise,
    modules_per_expert,
    settle_and_check,
)
from modmoe.conversion.proof import verify_all_on
from modmoe.conversion.splits.table import SPLITS
from modmoe.conversion.steps import Draft, Steps
from modmoe.formats.tied_code import write_code
from modmoe.models.counts import count_copies, dense_neurons
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.progress import Progress, counter, silent


def make(recipe: Recipe, source: Source, directory: Path, progress: Progress) -> Draft | None:
    """Return the draft of a parameter-sharing mixture of experts, on the first process; the recipe is settled."""
    analysis = analyze_source(recipe, source, progress, directory, num_clusters=count_clusters(recipe))
    if fits_layerwise(recipe):
        fits = _fit_layerwise(recipe, analysis, directory, progress)
        analysis = with_partitions(analysis, recipe, fits)
    else:
        assignments = make_assignments(recipe, analysis)
        starts = _start_routers(recipe, analysis, assignments, progress)
        fits = [LayerFit(assignment, start) for assignment, start in zip(assignments, starts, strict=True)]
    if not ranks.is_first():
        return None
    shared_modules = recipe.assignment.shared_modules
    plan = modular_plan(
        source, recipe.router, analysis.partitions, fits, shared_modules=shared_modules, method=recipe.method
    )

    def write(output: Path) -> None:
        write_code(output, plan.config, source.model.directory)
        save_analysis(output / "analysis", analysis)

    def report(output: Path) -> Mapping[str, Any]:
        assignments = [fit.assignment for fit in fits]
        members_EM = [assignment.membership_EM for assignment in assignments]
        view = view_converted(recipe, output, analysis, members_EM, scratch=output)
        return {"analysis": analysis, "assignments": assignments, "routing": view}

    return Draft(
        plan=plan,
        write=write,
        prove=lambda output: verify_all_on(output, analysis, fits, report=partial(progress, "verifying, models")),
        facts={
            "routers": [
                {"layer": layer, "agreement": fit.start.agreement, "chance": fit.start.chance}
                for layer, fit in enumerate(fits)
            ]
        },
        readings=analysis.readings,
        report=report,
    )


def layered(analysis: Analysis, scratch: Path) -> ByLayer:
    """Return what runs the analysed model one layer at a time, its hidden states on the disk of ``scratch``."""
    source, runner = analysis.source, analysis.runner
    if isinstance(runner, ByLayer):
        return runner
    return ByLayer(source.model, source.family, device=next(runner.model.parameters()).device, scratch=scratch)


def fit_options(recipe: Recipe) -> FitOptions:
    """Return how a settled recipe has layers fitted."""
    assignment = recipe.assignment
    return FitOptions(
        router=recipe.router, shared_modules=assignment.shared_modules, refit=assignment.refit, seed=recipe.seed
    )


def _fit_layerwise(recipe: Recipe, analysis: Analysis, scratch: Path, progress: Progress) -> list[LayerFit]:
    names, by_outputs = tuple(analysis.batches), find_assignment(recipe.assignment.method).by_outputs
    by_scores = make_assignments(recipe, analysis) if by_outputs is None else []

    def assign(layer: int, outputs: ModuleOutputs) -> Assignment:
        if by_outputs is None:
            return by_scores[layer]
        return by_outputs(
            outputs,
            names,
            num_experts=count_experts(recipe),
            modules_per_expert=modules_per_expert(recipe),
            shared_modules=recipe.assignment.shared_modules,
            core_modules=core_modules(recipe),
            coverage=recipe.assignment.coverage,
            seed=recipe.seed,
        )

    total = sum(tokens_by_task(analysis.batches).values())
    return fit_layers(
        layered(analysis, scratch),
        analysis.batches,
        analysis.ffns,
        analysis.partitions,
        assign,
        fit_options(recipe),
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
    """Choose each expert's modules in each layer by the modules' scores."""
    names, by_scores = tuple(analysis.batches), find_assignment(recipe.assignment.method).by_scores
    assert by_scores is not None, "an assignment by outputs needs them"
    return [
        by_scores(
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
    report_fit = silent if isinstance(analysis.runner, ByLayer) else partial(progress, "fitting routers, layers")
    return start_routers(
        analysis.runner,
        analysis.batches,
        analysis.ffns,
        analysis.partitions,
        assignments,
        recipe.router,
        recipe.seed,
        progress=counter(progress, "starting routers, tokens", total),
        fitted=report_fit,
    )


def describe(recipe: Recipe, source: Source) -> dict[str, Any]:
    """Return what a conversion would make and cost, from headers alone: bounds, since the overlap is not known yet."""
    modules, experts = recipe.partition.num_modules, count_experts(recipe)
    per_expert, shared = modules_per_expert(recipe), recipe.assignment.shared_modules
    checkpoint, family = source.checkpoint, source.family
    sizes = {name: torch.Size(checkpoint.shape(name)).numel() for name in checkpoint}
    dense = sum(sizes.values())
    ffn = sum(sizes[name] for name in dense_neurons(checkpoint, family, source.num_layers))
    stored = min(modules, experts * (per_expert - shared) + shared)
    active = min(modules, recipe.router.top_k * (per_expert - shared) + shared)
    copies = count_copies(experts * (per_expert - shared), shared, experts, recipe.router.top_k, recipe.router.combine)
    tokens = recipe.calibration.tokens * len(recipe.tasks)
    return {
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


STEPS = Steps(settle=settle_and_check, open=open_source, describe=describe, make=make)
"""ModularMoE, and the published splits of ``SPLITS``."""
