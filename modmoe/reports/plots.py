"""Plots of the report: inline SVG that takes its text colour from the page, so that it reads on light and on dark.

Each is drawn narrow enough for a phone; a wide page shows several side by side. matplotlib is imported when something
is drawn, and its settings are put back.
"""

# Shapes: E experts, P tasks, M modules, L layers, m neurons of a module

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from modmoe.reports.drawing import (
    ABSENT,
    HOLDERS,
    INK,
    MOST_ROWS,
    MOST_RULED,
    PALETTE,
    WIDTH_INCHES,
    Canvas,
    Floats,
    frame,
    label_inches,
    legend,
    name_modules,
    name_rows,
    paint_cells,
    render,
    rule,
    shorten,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes


Told = tuple[Sequence[Sequence[str]], str, str]
"""The words of each cell, and what stands before and behind all of them."""
_USAGE = 6
"""The colour of usage: none of the first three tasks', which lie right above."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LayerView:
    """What is shown of one layer, over the same modules in the same order."""

    modules: Sequence[int]
    """The modules from left to right."""
    tasks: Sequence[str]
    """Names of the tasks."""
    importance_PM: Floats
    """Of each module for each task; the columns are in the order of ``modules``, as everywhere here."""
    favourite_mM: NDArray[np.int64]
    """The task that each neuron is most active for."""
    strength_mM: Floats
    """How far it prefers that task, 0 to 1."""
    experts: Sequence[str] = ()
    """Names of the experts, where there are any."""
    membership_EM: NDArray[np.bool_] | None = None
    """Which modules each expert has."""
    usage_PM: Floats | None = None
    """The share of each task's tokens that use each module, once there is a router."""


def draw_modules(name: str, label: str, view: LayerView) -> str:
    """Return experts, importance and neurons of a layer's modules, one above the other."""
    rows = [("importance for each task", len(view.tasks), view.tasks)]
    if view.membership_EM is not None:
        rows.insert(0, ("experts", len(view.experts), view.experts))
    if view.usage_PM is not None:
        rows.append(("usage", len(view.tasks), view.tasks))
    heights = [min(0.21, 5 / count) * count for _, count, _ in rows] + [1.25]
    gap, foot = 0.42, 0.42
    painters = {"experts": _paint_experts, "importance for each task": _paint_importance, "usage": _paint_usage}
    height = sum(heights) + gap * len(heights) + foot

    def paint(canvas: Canvas) -> None:
        top = height
        left = label_inches([*view.tasks, *view.experts]) + 0.15
        for number, panel_height in enumerate(heights):
            top -= gap + panel_height
            place = (
                left / WIDTH_INCHES,
                top / height,
                (WIDTH_INCHES - left - 0.05) / WIDTH_INCHES,
                panel_height / height,
            )
            axes = canvas.figure.add_axes(place)
            if number == len(rows):
                _paint_neurons(axes, view)
            else:
                kind, _, names = rows[number]
                told = painters[kind](axes, view)
                canvas.mark(axes, names, [f"module {module}" for module in view.modules], *told)
            if number < len(heights) - 1:
                axes.set_xticks([])
        name_modules(axes, view.modules)

    return render(name, label, height, paint)


def _paint_experts(axes: Axes, view: LayerView) -> Told:
    member_EM = view.membership_EM
    assert member_EM is not None
    holders_M = member_EM.sum(0)
    # with one expert nothing is shared, and with two "some" is "all" or "one"
    kind_M = np.where(holders_M <= 1, 2, np.where(holders_M == len(member_EM), 0, 1))
    # what an expert lacks is a faint cell in the first colour, so that the matrix stays one
    kind_EM = np.where(member_EM, kind_M, 0)
    axes.imshow(paint_cells(kind_EM, np.where(member_EM, 1.0, ABSENT), HOLDERS), aspect="auto", interpolation="none")
    name_rows(axes, view.experts)
    rule(axes, *member_EM.shape)
    words = ("of every expert", "of some", "of one")
    used = [kind for kind in range(3) if (kind_M[holders_M > 0] == kind).any()]
    legend(axes, {words[kind]: HOLDERS[kind] for kind in used})
    return [["has" if has else "lacks" for has in row] for row in member_EM], "", " it"


def _paint_importance(axes: Axes, view: LayerView) -> Told:
    # scores of modules differ by a factor of two or so; from zero the cells would look alike
    least_P1 = view.importance_PM.min(1, keepdims=True)
    range_P1 = np.maximum(view.importance_PM.max(1, keepdims=True) - least_P1, 1e-30)
    strength_PM = ABSENT + (1 - ABSENT) * (view.importance_PM - least_P1) / range_P1
    cells = paint_cells(np.zeros(view.importance_PM.shape, dtype=int), strength_PM, PALETTE)
    axes.imshow(cells, aspect="auto", interpolation="none")
    name_rows(axes, view.tasks)
    rule(axes, *view.importance_PM.shape)
    axes.set_title("importance, from least to largest in each row")
    if len(view.tasks) > 1:
        # the colours of the tasks, for the neurons below
        colours = [PALETTE[task % len(PALETTE)] for task in range(len(view.tasks))]
        place = axes.get_yaxis_transform()
        axes.scatter(
            [-0.025] * len(colours), range(len(colours)), color=colours, marker="s", transform=place, clip_on=False
        )
        axes.tick_params(axis="y", pad=13)
    return [[f"{value:.3g}" for value in row] for row in view.importance_PM], "importance ", ""


def _paint_usage(axes: Axes, view: LayerView) -> Told:
    assert view.usage_PM is not None
    cells = paint_cells(
        np.full(view.usage_PM.shape, _USAGE), ABSENT + (1 - ABSENT) * np.clip(view.usage_PM, 0, 1), PALETTE
    )
    axes.imshow(cells, aspect="auto", interpolation="none")
    name_rows(axes, view.tasks)
    rule(axes, *view.usage_PM.shape)
    axes.set_title("share of the tokens that use it, from none to all")
    return [[f"{100 * value:.0f}" for value in row] for row in view.usage_PM], "used by ", " % of the tokens"


def _paint_neurons(axes: Axes, view: LayerView) -> None:
    cells = paint_cells(view.favourite_mM, ABSENT + (1 - ABSENT) * view.strength_mM, PALETTE)
    axes.imshow(cells, aspect="auto", interpolation="none")
    axes.set_yticks([])
    axes.set_ylabel("neurons")
    rule(axes, len(cells), len(view.modules), is_ruled_across=False)
    if len(view.tasks) == 1:
        axes.set_title("the stronger, the more active")
    else:
        axes.set_title("by the task that they are most active for")


def draw_cells(name: str, label: str, value_RC: Floats, rows: Sequence[str], columns: Sequence[str], unit: str) -> str:
    """Return a heat map of named rows and columns; ``unit`` follows each value when it is told."""
    left, foot = label_inches(rows), label_inches(columns)
    width = min(0.25 * len(columns), WIDTH_INCHES - left - 0.05)
    tall = min(0.25, width / len(columns)) * len(rows) if rows == columns else min(0.25, 5 / len(rows)) * len(rows)
    height = tall + foot + 0.1

    def paint(canvas: Canvas) -> None:
        axes = canvas.figure.add_axes((left / WIDTH_INCHES, foot / height, width / WIDTH_INCHES, tall / height))
        cells = paint_cells(np.zeros(value_RC.shape, dtype=int), value_RC / max(1e-30, value_RC.max()), PALETTE)
        axes.imshow(cells, aspect="auto", interpolation="none")
        name_rows(axes, rows)
        step = -(-len(columns) // MOST_ROWS)
        axes.set_xticks(range(0, len(columns), step), [shorten(item) for item in columns[::step]], rotation=90)
        rule(axes, *value_RC.shape)
        canvas.mark(axes, rows, columns, [[f"{value:.3g}" for value in row] for row in value_RC], behind=f" {unit}")

    return render(name, label, height, paint)


def draw_layers(
    name: str,
    label: str,
    lines: Mapping[str, Sequence[float]],
    unit: str,
    *,
    before: Mapping[str, Sequence[float]] | None = None,
) -> str:
    """Return one line for each name over the layers; the one named ``chance`` is dashed and grey.

    What was ``before`` has the names of lines, is dashed too and has their colours.
    """
    from matplotlib.ticker import MaxNLocator

    colours = {title: PALETTE[number % len(PALETTE)] for number, title in enumerate(lines)}
    if "chance" in colours:
        colours["chance"] = HOLDERS[0]

    def paint(canvas: Canvas) -> None:
        axes = frame(canvas, 0.55, 2.2)
        for title, values in lines.items():
            style = "--" if title == "chance" else "-"
            marker = "o" if len(values) <= MOST_RULED else None
            axes.plot(range(len(values)), values, color=colours[title], linestyle=style, marker=marker, markersize=4)
        for title, values in (before or {}).items():
            axes.plot(range(len(values)), values, color=colours[title], linestyle="--", alpha=0.7)
        drawn = [*lines.values(), *(before or {}).values()]
        top = max((value for values in drawn for value in values), default=1)
        axes.set_ylim(0, 1.08 * top or 1)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.18)
        legend(axes, colours)
        layers = max(map(len, lines.values()))
        axes.set_xlim(-0.5, layers - 0.5)
        words = [
            ", ".join(f"{title} {values[layer]:.3g}" for title, values in lines.items()) for layer in range(layers)
        ]
        canvas.mark(axes, [unit], [f"layer {layer}" for layer in range(layers)], [words])

    return render(name, label, 2.2, paint)


def draw_sweep(name: str, label: str, sparsity_LK: Floats, kept_LK: Floats) -> str:
    """Return what is kept against what is left out, both in percent: one line a layer, from pale to strong."""
    layers = len(kept_LK)

    def paint(canvas: Canvas) -> None:
        axes = frame(canvas, 0.55, 2.2)
        for layer in range(layers):
            colour = PALETTE[1] if layer == layers - 1 else PALETTE[0]
            strength = 1.0 if layer in (0, layers - 1) else 0.35
            axes.plot(
                sparsity_LK[layer],
                kept_LK[layer],
                color=colour,
                alpha=strength,
                marker="o",
                markersize=3,
                linewidth=1.2,
            )
        axes.set_ylim(min(0.0, float(kept_LK.min())), 104)
        axes.set_xlabel("FFN sparsity, % of neurons not used")
        axes.set_ylabel("% kept")
        axes.grid(alpha=0.18)
        first = {"layer 0": PALETTE[0]} if layers > 1 else {}
        legend(axes, {**first, f"layer {layers - 1}": PALETTE[1]})

    return render(name, label, 2.2, paint)


def draw_losses(name: str, label: str, losses: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Return one row a task and one dot a model; ``losses`` is model to task to loss."""
    height = 0.95 + 0.3 * len(tasks)
    palette = (HOLDERS[0], *PALETTE)
    colours = {title: palette[number % len(palette)] for number, title in enumerate(losses)}

    def paint(canvas: Canvas) -> None:
        axes = frame(canvas, label_inches(tasks), height)
        for row, task in enumerate(tasks):
            values = [by_task[task] for by_task in losses.values() if task in by_task]
            axes.plot([min(values), max(values)], [row, row], color=INK, alpha=0.25, linewidth=1)
        for title, by_task in losses.items():
            rows = [row for row, task in enumerate(tasks) if task in by_task]
            axes.scatter([by_task[tasks[row]] for row in rows], rows, color=colours[title], s=34, zorder=3)
        axes.set_yticks(range(len(tasks)), [shorten(task) for task in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlabel("loss, nats a token (lower is better)")
        words = [
            ", ".join(f"{title} {by_task[task]:.3f}" for title, by_task in losses.items() if task in by_task)
            for task in tasks
        ]
        canvas.mark(axes, tasks, ["loss"], [[word] for word in words])
        axes.grid(axis="x", alpha=0.18)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        legend(axes, colours)

    return render(name, label, height, paint)


def draw_bars(name: str, label: str, values: Mapping[str, float], unit: str) -> str:
    """Return one horizontal bar for each name."""
    height = 0.75 + 0.27 * len(values)

    def paint(canvas: Canvas) -> None:
        axes = frame(canvas, label_inches(list(values)), height, head=0.1)
        axes.barh(range(len(values)), list(values.values()), height=0.68, color=PALETTE[0])
        axes.set_yticks(range(len(values)), list(values))
        axes.set_ylim(len(values) - 0.5, -0.5)
        canvas.mark(axes, list(values), [unit], [[f"{value:.4g}"] for value in values.values()])
        axes.set_xlabel(unit)
        axes.grid(axis="x", alpha=0.18)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return render(name, label, height, paint)
