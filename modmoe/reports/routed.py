"""The parts of the report that show routers at work, from a ``RoutingView``, and one more where it was fine-tuned."""

# Shapes: T tokens, P tasks, E experts, K experts chosen at once, L layers, Q steps from few modules to all of an expert

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.routing import RoutedText, RoutingView
from modmoe.recipe.schema import Recipe
from modmoe.reports import page, plots

_MOST_NAMED = 8
"""Experts that tokens have a colour of their own for; and columns of a table of experts."""


def over_layers(views: Sequence[RoutingView]) -> list[str]:
    """Return the plots of what is kept of each layer, and of how routers choose: as converted, and fine-tuned since."""
    view = views[0]
    sparsity_L = (100 * view.sparsity_LQ[:, -1]).tolist()
    kept_L = (100 * view.kept_LQ[:, -1]).tolist()
    lines = {"FFN sparsity": sparsity_L, "output kept": kept_L}
    parts = [
        page.figure(
            plots.draw_layers("kept", f"Sparsity and output kept by layer, percent: {spell(lines)}", lines, "%"),
            "Sparsity and what is kept.",
            "The share of a layer's neurons that a token does not use, and the share of the dense layer's output that "
            "is kept of the same input: 1 - |difference|² / |dense output|².",
        )
    ]
    if view.kept_LQ.shape[1] > 1:
        kept_by_step = {f"layer {layer}": (100 * kept_Q).tolist() for layer, kept_Q in enumerate(view.kept_LQ)}
        label = f"Output kept in percent as each expert is cut to fewer of its modules: {spell(kept_by_step)}"
        svg = plots.draw_sweep(
            "sweep", label, (100 * view.sparsity_LQ).double().numpy(), (100 * view.kept_LQ).double().numpy()
        )
        text = (
            "As each expert is cut to its best modules, step by step; the dot to the left is as converted. Layers "
            "between the first and the last are pale."
        )
        parts.append(page.figure(svg, "Were it sparser.", text))
    last = views[-1]
    if last.certainty_L is not None:
        lines = {"of one token": (100 * last.certainty_L).tolist(), "of all together": (100 * last.balance_L).tolist()}
        label = f"Router entropy by layer, percent of its largest: {spell(lines)}"
        text = (
            "Entropy of the probabilities over experts, in percent of its largest. Of one token: 0 is a router that is "
            "sure. Of all together: 100 is experts chosen equally often, 0 is one for everything."
        )
        before = None
        if last is not view and view.certainty_L is not None:
            values = (view.certainty_L, view.balance_L)
            before = {title: (100 * value_L).tolist() for title, value_L in zip(lines, values, strict=True)}
            label += f" As converted: {spell(before)}"
            text += " Dashed is as converted."
        svg = plots.draw_layers("entropy", label, lines, "% of the largest", before=before)
        parts.append(page.figure(svg, "Router entropy.", text))
    return parts


def describe(views: Sequence[RoutingView]) -> str:
    """Return what was read for the views, and which model each part is of."""
    view = views[-1]
    read = ", ".join(f"{count:,} of {task}" for task, count in zip(view.tasks, view.tokens_P, strict=True))
    told = "text that calibration did not read" if view.is_held_out else "calibration's own text, for want of other"
    words = f"What tokens do was measured with {told}: {read}."
    if len(views) > 1:
        words += (
            " What is kept is the conversion's work; modules used, choices and coloured text are those of the "
            "fine-tuned model."
        )
    return words


def agreements(recipe: Recipe, summary: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return each layer's agreement and chance; nothing where the caller routes."""
    found = (summary or {}).get("routers") or []
    is_measured = all(isinstance(router.get(name), float) for router in found for name in ("agreement", "chance"))
    return list(found) if recipe.router.routing != "task" and is_measured else []


def choices(layer: int, views: Sequence[RoutingView], names: Sequence[str]) -> str:
    """Return how often each task's tokens chose each expert of a layer; where there is room, before and after."""
    tasks, chosen_PE = views[-1].tasks, 100 * views[-1].chosen_LPE[layer]
    note = "share of a task's tokens that chose each expert, in percent"
    if len(names) > _MOST_NAMED:
        label = f"Layer {layer}: {note}."
        svg = plots.draw_cells(f"l{layer}c", label, chosen_PE.double().numpy(), list(tasks), names, "%")
        return page.figure(svg, "Choices:", f"{note}. The strongest is {float(chosen_PE.max()):.0f}.")
    words_PE = [[f"{value:.0f}" for value in chosen_E] for chosen_E in chosen_PE]
    if len(views) > 1:
        note += ", as converted → fine-tuned"
        before_PE = 100 * views[0].chosen_LPE[layer]
        words_PE = [
            [f"{value:.0f} → {words}" for value, words in zip(before_E, words_E, strict=True)]
            for before_E, words_E in zip(before_PE, words_PE, strict=True)
        ]
    rows = [(task, *words_E) for task, words_E in zip(tasks, words_PE, strict=True)]
    return page.table("Choices:", ("", *names), rows, note=f"{note}.")


def text(view: RoutingView, names: Sequence[str]) -> list[str]:
    """Return a sequence of each task whose tokens are coloured by what was chosen for them."""
    if view.certainty_L is None:
        return []  # the caller chooses for whole texts
    layers, most = len(view.chosen_LPE), most_telling(view)
    is_named = view.samples[0].ids_LTK.shape[2] == 1
    if is_named:
        kind, meanings = "e", list(names)
        shown = page.key(names[: page.SHADES], kind=kind)
        words = "Each token has the colour of its expert"
        if len(names) > page.SHADES:
            words += f"; of {len(names)} experts every {page.SHADES}th has the same colour, and the pointer names it"
    else:
        kind, meanings = "q", _RARITIES
        shown = page.key(("common modules", "rare modules"), kind=kind)
        shown = shown.replace('class="q1"', f'class="q{page.SHADES - 1}"')
        words = (
            f"Each token chooses {view.samples[0].ids_LTK.shape[2]} of {len(names)} experts. The stronger its "
            "colour, the rarer those are: the mean over them of log2(1 / share of tokens that choose it), from the "
            "least to the largest of the layer"
        )
    layer_options = [(str(layer), f"layer {layer}") for layer in range(layers)]
    task_options = [("all", "all tasks"), *((str(number), task) for number, task in enumerate(view.tasks))]
    levels = None if is_named else _rarity_levels(view)
    parts = [page.paragraph(f"{words}.", "note")]
    parts.append(page.paragraph(f"Shown first is layer {most}, whose choices tell the tasks apart best.", "note"))
    parts.append(page.picker("Layer of the colours", layer_options, picks="colour", of="layer", chosen=str(most)))
    parts.append(page.picker("Task", task_options, picks="show", of="task", chosen="all"))
    parts.append(shown)
    for number, sample in enumerate(view.samples):
        choices_LT = sample.ids_LTK[:, :, 0].tolist() if levels is None else levels[number]
        body = [
            page.heading(sample.task, 3),
            page.tokens(sample.pieces, choices_LT, meanings, kind=kind, layer=most),
        ]
        if is_named:
            counts = [_count(sample, layer, names) for layer in range(layers)]
            body.append(page.counted(counts, layer=most))
        parts.append(page.part(body, of="task", value=str(number)))
    return parts


_RARITIES = [f"rarity {level + 1} of {page.SHADES}" for level in range(page.SHADES)]


def _count(sample: RoutedText, layer: int, names: Sequence[str]) -> str:
    """Return in words how often each expert was chosen: colours are not for everyone."""
    counts = torch.bincount(sample.ids_LTK[layer, :, 0], minlength=len(names))
    order = counts.argsort(descending=True, stable=True)[:_MOST_NAMED].tolist()
    told = ", ".join(f"{names[expert]} {int(counts[expert])}" for expert in order if counts[expert])
    return f"Of {len(sample.pieces)} tokens in layer {layer}: {told}."


def _rarity_levels(view: RoutingView) -> list[list[list[int]]]:
    """Return for each sample, layer and token how rare its experts are, 0 to SHADES - 1."""
    share_LE = view.chosen_LPE.mean(1).clamp_min(1e-6)
    bits_LE = -share_LE.log2()
    rarities = [
        bits_LE.gather(1, sample.ids_LTK.flatten(1)).view(sample.ids_LTK.shape).mean(2) for sample in view.samples
    ]
    least_L1 = torch.stack([rarity_LT.amin(1) for rarity_LT in rarities]).amin(0)[:, None]
    largest_L1 = torch.stack([rarity_LT.amax(1) for rarity_LT in rarities]).amax(0)[:, None]
    levels = []
    for rarity_LT in rarities:
        part_LT = (rarity_LT - least_L1) / (largest_L1 - least_L1).clamp_min(1e-9)
        levels.append((part_LT * page.SHADES).long().clamp(0, page.SHADES - 1).tolist())
    return levels


def most_telling(view: RoutingView) -> int:
    """Return the layer whose choices of experts have most in common with the tasks: the largest mutual information."""
    joint_LPE = view.chosen_LPE.double() / view.chosen_LPE.double().sum(2, keepdim=True).clamp_min(1e-30)
    joint_LPE = joint_LPE / len(view.tasks)
    alone_LPE: Tensor = joint_LPE.sum(1, keepdim=True) * joint_LPE.sum(2, keepdim=True)
    told_LPE = torch.where(joint_LPE > 0, joint_LPE * (joint_LPE / alone_LPE.clamp_min(1e-30)).log(), 0)
    return int(told_LPE.sum((1, 2)).argmax())


def spell(lines: Mapping[str, Sequence[float]]) -> str:
    """Return the values of some lines in words, for those who do not see them."""
    return "; ".join(f"{name} " + ", ".join(f"{value:.3g}" for value in values) for name, values in lines.items()) + "."
