"""The report: one self-contained HTML file with the measurements of a run and its result."""

# Shapes: P tasks, E experts, M modules, F neurons, m neurons of a module

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from modmoe.analysis.profile import ActivationProfile
from modmoe.analysis.routing import RoutingView
from modmoe.analysis.run import Analysis, tokens_by_task
from modmoe.models.counts import tensor_bytes, tensor_parameters
from modmoe.recipe.schema import Recipe, dump_recipe
from modmoe.reports import page, plots, routed, rows_page
from modmoe.storage.files import is_page, sign_page, write_file
from modmoe.version import __version__

_MOST_NEURONS = 96
"""Rows of the map of neurons; of larger modules every second, third, ... neuron is shown."""
_MOST_OVERLAP_COLUMNS = 8
_MOST_VALUES = 40_000
"""Scores of modules, of all layers and tasks, beyond which there are no tables of them: the page would be slow."""


class ModuleAssignment(Protocol):
    """Which modules make up which expert, in one layer."""

    @property
    def membership_EM(self) -> Tensor:
        """bool; whether an expert has a module."""
        ...

    @property
    def expert_names(self) -> tuple[str, ...]:
        """One name an expert."""
        ...


def write_report(
    path: Path,
    recipe: Recipe,
    analysis: Analysis,
    *,
    assignments: Sequence[ModuleAssignment] | None = None,
    summary: Mapping[str, Any] | None = None,
    evaluation: Mapping[str, Mapping[str, Any]] | None = None,
    samples: Mapping[str, Mapping[str, str]] | None = None,
    routing: RoutingView | None = None,
    tuned: RoutingView | None = None,
    overwrite: bool = False,
) -> None:
    """Write the report to ``path``, whole or not at all; the page asks for no other file and no network.

    Args:
        path: the HTML file.
        recipe: the settings of the run.
        analysis: the result of calibration.
        assignments: one a layer, where experts were made.
        summary: what a conversion returned; its ``parameters``, ``sparsity`` and ``routers`` are shown.
        evaluation: model to task to loss, or to a mapping that has ``loss``; as dense, converted, fine-tuned.
        samples: task to model to text; a model named ``prompt`` is shown as the prompt.
        routing: what the routers of the converted model do with text.
        tuned: the same of the fine-tuned model, on the same text.
        overwrite: replace an older report.

    Raises RecipeError where the file is something other than a report.
    """
    tasks = list(analysis.profiles[0].task_names)
    names = assignments[0].expert_names if assignments else ()
    views = [view for view in (routing, tuned) if view is not None]
    sections = {
        "parameters": ("Parameters", _parameters(analysis, summary) if summary is not None else []),
        "quality": ("Quality", _quality(evaluation) if evaluation else []),
        "over-layers": ("Over the layers", _over_layers(recipe, analysis, assignments, summary, views)),
        "layers": ("Layer by layer", _layers(recipe, analysis, assignments, summary, tasks, views)),
        "tokens": ("Which expert each token chooses", routed.text(views[-1], names) if views else []),
        "text": ("What the models write", _samples(samples) if samples else []),
        "rows": ("What was read", rows_page.rows_read(analysis.readings)),
        "origin": ("How it was made", _origin(recipe, analysis)),
    }
    shown = {anchor: section for anchor, section in sections.items() if section[1]}
    body = [
        page.heading("ModularMoE report", 1),
        page.paragraph(_describe(recipe, analysis, assignments, summary, is_tuned=tuned is not None), "lead"),
        page.contents([(anchor, title) for anchor, (title, _) in shown.items()]),
    ]
    for anchor, (title, parts) in shown.items():
        body += [page.heading(title, anchor=anchor), *parts]
    text = page.page(f"ModularMoE report: {page.short_name(recipe.source)}", body)
    write_file(path, sign_page(text), overwrite=overwrite, is_ours=is_page)


def _describe(
    recipe: Recipe,
    analysis: Analysis,
    assignments: Sequence[ModuleAssignment] | None,
    summary: Mapping[str, Any] | None,
    *,
    is_tuned: bool,
) -> str:
    source, partition = analysis.source, analysis.partitions[0]
    text = (
        f"{page.short_name(recipe.source)}, a {source.family.model_type} model of {source.num_layers} layers with "
        f"{source.neurons:,} FFN neurons each. The neurons of a layer were cut into {partition.num_modules} modules of "
        f"{partition.module_size} by '{recipe.partition.method}'"
    )
    if not assignments:
        return text + ". No experts were made."
    names, sizes = assignments[0].expert_names, assignments[0].membership_EM.sum(1).tolist()
    size = f"{sizes[0]}" if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"
    chosen = {
        "token": f"a router chooses {recipe.router.top_k} for each token",
        "sequence": f"a router chooses {recipe.router.top_k} for each sequence",
        "task": "the caller names the task and so the expert",
    }[recipe.router.routing]
    shown = ", ".join(names[:12]) + (" and more" if len(names) > 12 else "")
    lies = "Fine-tuned, it lies" if is_tuned else "It lies"
    where = f" {lies} in {summary['output']}." if summary is not None and summary.get("output") else ""
    return f"{text}. {len(names)} experts ({shown}) share them, {size} modules each; {chosen}.{where}"


def _parameters(analysis: Analysis, summary: Mapping[str, Any]) -> list[str]:
    counts, sparsity = summary.get("parameters") or {}, summary.get("sparsity") or {}
    names = ("dense", "stored", "active", "materialised")
    values = {name: int(counts[name]) for name in names if counts.get(name) is not None}
    if not values:
        return []
    checkpoint = analysis.source.checkpoint
    # tensors of one type throughout make this exact; the checkpoint's own bytes are known anyway
    each_bytes = tensor_bytes(checkpoint) / max(1, sum(tensor_parameters(checkpoint).values()))
    exact = {"dense": tensor_bytes(checkpoint), "stored": summary.get("tensor_bytes")}
    rows = [
        (
            name,
            f"{value:,}",
            _megabytes(exact.get(name) or value * each_bytes),
            f"{100 * value / values.get('dense', value):.1f} %",
        )
        for name, value in values.items()
    ]
    label = "Parameters: " + ", ".join(f"{name} {value:,}" for name, value in values.items()) + "."
    millions = {name: value / 1e6 for name, value in values.items()}
    parts = [
        page.table("Parameters", ("", "number", "bytes", "of dense"), rows, note="and the bytes of their tensors."),
        page.figure(plots.draw_bars("bars", label, millions, "million parameters"), "Parameters.", "As in the table."),
    ]
    words = (
        "Stored is what the checkpoint holds, every module once. Active is what one token uses, the mean over the "
        "choices of experts. Materialised is what it would be if every expert had its own copy of its modules."
    )
    if sparsity:
        words += (
            f" FFN sparsity is {100 * sparsity['ffn']:.1f} %: the share of FFN neurons that a token does not use. "
            f"Total sparsity is {100 * sparsity['total']:.1f} %: the share of all parameters, embeddings and attention "
            "included."
        )
    return [page.grid(parts), page.paragraph(words)]


def _quality(evaluation: Mapping[str, Mapping[str, Any]]) -> list[str]:
    losses = {
        model: {task: float(value["loss"] if isinstance(value, Mapping) else value) for task, value in by_task.items()}
        for model, by_task in evaluation.items()
    }
    tasks = list(dict.fromkeys(task for by_task in losses.values() for task in by_task))
    if not tasks:
        return []
    models = list(losses)
    rows = [
        (task, *(f"{losses[model][task]:.3f}" if task in losses[model] else "-" for model in models)) for task in tasks
    ]
    label = "Loss of each task: " + "; ".join(
        f"{task} " + ", ".join(f"{model} {losses[model][task]:.3f}" for model in models if task in losses[model])
        for task in tasks
    )
    return [
        page.grid(
            [
                page.table("Loss of each task,", ("", *models), rows, note="in nats a token; lower is better."),
                page.figure(
                    plots.draw_losses("loss", label, losses, tasks),
                    "Loss of each task.",
                    "The nearer to the dense model's, the less was lost.",
                ),
            ]
        ),
    ]


def _over_layers(
    recipe: Recipe,
    analysis: Analysis,
    assignments: Sequence[ModuleAssignment] | None,
    summary: Mapping[str, Any] | None,
    views: Sequence[RoutingView],
) -> list[str]:
    parts = routed.over_layers(views) if views else []
    if len(analysis.profiles[0].task_names) > 1:
        lines = {
            "neurons": [_variation(_mean_activation(profile)) for profile in analysis.profiles],
            "modules": [_variation(scores_PM) for scores_PM in analysis.scores_PM],
        }
        label = "Coefficient of variation between tasks by layer: " + routed.spell(lines)
        text = (
            "Standard deviation between tasks over the mean: of a neuron's mean |h|, and of a module's "
            f"'{recipe.assignment.score}' score. 0 means that tasks use the layer alike."
        )
        parts.append(
            page.figure(plots.draw_layers("variation", label, lines, "variation"), "Variation between tasks.", text)
        )
    routers = routed.agreements(recipe, summary)
    if routers:
        lines = {name: [100 * float(router[name]) for router in routers] for name in ("agreement", "chance")}
        label = "Agreement of the routers with the best expert by layer, percent: " + routed.spell(lines)
        text = (
            "How often the router as converted chooses the expert that loses least of the dense output; chance is "
            "always choosing the one that is best most often."
        )
        parts.append(
            page.figure(plots.draw_layers("routers", label, lines, f"% of {recipe.router.routing}s"), "Routers.", text)
        )
    if assignments:
        stored = [float(assignment.membership_EM.any(0).sum()) for assignment in assignments]
        core = [float(assignment.membership_EM.all(0).sum()) for assignment in assignments]
        lines = {"stored": stored, "of every expert": core}
        label = "Modules by layer: " + routed.spell(lines)
        text = f"Of {analysis.partitions[0].num_modules} modules: those that some expert has, and those all have."
        parts.append(page.figure(plots.draw_layers("stored", label, lines, "modules"), "Modules stored.", text))
    told = [page.paragraph(routed.describe(views), "note")] if views else []
    return [page.grid(parts), *told] if parts else []


def _layers(
    recipe: Recipe,
    analysis: Analysis,
    assignments: Sequence[ModuleAssignment] | None,
    summary: Mapping[str, Any] | None,
    tasks: Sequence[str],
    views: Sequence[RoutingView],
) -> list[str]:
    routers = routed.agreements(recipe, summary)
    folds, num_layers = [], len(analysis.scores_PM)
    for layer in range(num_layers):
        assignment = assignments[layer] if assignments else None
        aside = f"{analysis.partitions[layer].num_modules} modules"
        if assignment is not None:
            member_EM = assignment.membership_EM
            held_M = member_EM.sum(0)
            num_stored, num_core = int((held_M > 0).sum()), int(member_EM.all(0).sum())
            aside = f"{num_stored} of {len(held_M)} modules stored, {num_core} of them in every expert"
        if routers:
            which = "router as converted" if len(views) > 1 else "router"
            aside += f", {which} agrees in {100 * routers[layer]['agreement']:.0f}\u00a0%"
        # one task that was clustered has more names here than there
        usage_PM = views[-1].used_LPM[layer] if views and list(views[-1].tasks) == list(tasks) else None
        view = _view(analysis, layer, tasks, assignment, usage_PM)
        label = (
            f"Layer {layer}, {aside}: the modules of each expert, their importance for each task, and their neurons."
        )
        text = (
            "Each column is a module, the same one in all parts. Neurons have the colour of the task that they are "
            "most active for; pale ones serve all tasks alike."
        )
        parts = [page.figure(plots.draw_modules(f"l{layer}", label, view), "Modules.", text)]
        if assignment is not None and len(assignment.expert_names) > 1:
            sides = [_overlaps(layer, assignment)]
            if views and views[-1].certainty_L is not None:
                sides.append(routed.choices(layer, views, assignment.expert_names))
            parts.append(f"<div>{''.join(sides)}</div>")
        values = [] if view.importance_PM.size * num_layers > _MOST_VALUES else [_values(layer, view)]
        title, body = f"Layer {layer}:", [page.grid(parts), *values]
        folds.append(page.fold(title, aside, body, is_open=layer == 0, anchor=f"layer-{layer}", layer=layer))
    options = [("all", "all layers"), *((str(layer), f"layer {layer}") for layer in range(num_layers))]
    return [page.picker("Layer", options, picks="show", of="layer", chosen="0"), *folds]


def _values(layer: int, view: plots.LayerView) -> str:
    """Return what the map of a layer's modules shows as a table, for those who do not see it."""
    columns = [f"for {task}" for task in view.tasks]
    rows = []
    for place, module in enumerate(view.modules):
        row = [str(module), *(f"{value:.3g}" for value in view.importance_PM[:, place])]
        if view.usage_PM is not None:
            row += [f"{100 * value:.0f} %" for value in view.usage_PM[:, place]]
        if view.membership_EM is not None:
            has_E = view.membership_EM[:, place]
            row.append(", ".join(name for name, has in zip(view.experts, has_E, strict=True) if has) or "none")
        rows.append(row)
    head = ["module", *columns]
    head += [f"used by {task}" for task in view.tasks] if view.usage_PM is not None else []
    head += ["experts"] if view.membership_EM is not None else []
    note = "importance for each task, the share of its tokens that use it where there is a router, and who has it."
    table = page.table(f"Modules of layer {layer}:", head, rows, note=note)
    return page.fold("Values", "as a table", [table], is_printed=False)


def _view(
    analysis: Analysis,
    layer: int,
    tasks: Sequence[str],
    assignment: ModuleAssignment | None,
    usage_PM: Tensor | None,
) -> plots.LayerView:
    partition, scores_PM = analysis.partitions[layer], analysis.scores_PM[layer]
    order = order_modules(scores_PM, assignment)
    mean_PF = _mean_activation(analysis.profiles[layer])
    share_PF = mean_PF / mean_PF.sum(0).clamp_min(1e-30)
    largest_F, favourite_F = share_PF.max(0)
    if len(tasks) > 1:
        strength_F = ((largest_F - 1 / len(tasks)) / (1 - 1 / len(tasks))).clamp_min(0).sqrt()
    else:
        strength_F = mean_PF[0] / mean_PF[0].max().clamp_min(1e-30)
    # within a module the neurons of one task lie together
    rank_F = favourite_F.double() * 2 + (1 - strength_F)
    member_Mm = partition.permutation_F.view(partition.num_modules, -1)[order]
    index_mM = member_Mm.gather(1, rank_F[member_Mm].argsort(1)).T
    index_mM = index_mM[:: -(-len(index_mM) // _MOST_NEURONS)]
    return plots.LayerView(
        modules=order,
        tasks=tasks,
        importance_PM=scores_PM[:, order].double().numpy(),
        favourite_mM=favourite_F[index_mM].numpy(),
        strength_mM=strength_F[index_mM].numpy(),
        experts=() if assignment is None else assignment.expert_names,
        membership_EM=None if assignment is None else assignment.membership_EM[:, order].numpy(),
        usage_PM=None if usage_PM is None else usage_PM[:, order].double().numpy(),
    )


def _overlaps(layer: int, assignment: ModuleAssignment) -> str:
    names, member_EM = assignment.expert_names, assignment.membership_EM.long()
    shared_EE = member_EM @ member_EM.T
    if len(names) > _MOST_OVERLAP_COLUMNS:
        label = f"Layer {layer}: modules that two experts share."
        svg = plots.draw_cells(f"l{layer}o", label, shared_EE.double().numpy(), names, names, "modules")
        return page.figure(svg, "Overlap.", f"Modules that two experts share; the strongest is {int(shared_EE.max())}.")
    rows = [(name, *map(str, shared_E.tolist())) for name, shared_E in zip(names, shared_EE, strict=True)]
    return page.table("Overlap:", ("", *names), rows, note="modules that two experts share; on the diagonal, its own.")


def _samples(samples: Mapping[str, Mapping[str, str]]) -> list[str]:
    parts = [
        page.paragraph("How each model continues a prompt, taking its most likely token each time.", "note"),
    ]
    for task, texts in samples.items():
        written = [(model, text) for model, text in texts.items() if model != "prompt"]
        parts.append(page.heading(task, 3))
        if "prompt" in texts:
            parts.append(page.columns_of_text([("prompt", texts["prompt"])]))
        parts.append(page.columns_of_text(written))
    return parts


def _origin(recipe: Recipe, analysis: Analysis) -> list[str]:
    tokens = tokens_by_task(analysis.batches)
    rows = [(task, recipe.tasks.get(task, "-"), f"{count:,}") for task, count in tokens.items()]
    return [
        page.table("Calibration text.", ("task", "file", "tokens"), rows, is_words=True),
        page.fold("Recipe", "as YAML", [page.preformatted(dump_recipe(recipe))]),
        page.paragraph(f"Written by modmoe {__version__}.", "note"),
    ]


def order_modules(scores_PM: Tensor, assignment: ModuleAssignment | None) -> list[int]:
    """Return the modules in the order shown: the most shared first, then by expert; without experts by task."""
    total_M = scores_PM.sum(0).tolist()
    if assignment is None:
        favourite_M = (scores_PM / scores_PM.sum(1, keepdim=True).clamp_min(1e-30)).argmax(0).tolist()
        return sorted(range(len(total_M)), key=lambda module: (favourite_M[module], -total_M[module]))
    holders = assignment.membership_EM.T.tolist()
    return sorted(
        range(len(total_M)),
        key=lambda module: (-sum(holders[module]), [not has for has in holders[module]], -total_M[module]),
    )


def _mean_activation(profile: ActivationProfile) -> Tensor:
    return profile.abs_PF.double() / profile.tokens_P.double().clamp_min(1).unsqueeze(1)


def _variation(value_PX: Tensor) -> float:
    """Return the coefficient of variation between tasks, the mean over columns; tasks are scaled to the same total."""
    share_PX = value_PX.double() / value_PX.double().sum(1, keepdim=True).clamp_min(1e-30)
    return float((share_PX.std(0, correction=0) / share_PX.mean(0).clamp_min(1e-30)).mean())


def _megabytes(size_bytes: float) -> str:
    return f"{size_bytes / 1e6:,.2f} MB"
