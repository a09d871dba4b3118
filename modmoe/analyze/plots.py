"""Plots of the report: inline SVG that takes its text colour from the page, so that it reads on light and on dark.

Each is drawn narrow enough for a phone; a wide page shows several side by side. matplotlib is imported when something
is drawn, and its settings are put back.
"""

# Shapes: E experts, P tasks, M modules, L layers, m neurons of a module

from __future__ import annotations

import html
import io
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

PALETTE = ("#3b7dd8", "#e07b1a", "#2a9d6f", "#c456a6", "#d1495b", "#1b9aaa", "#7d5fd3", "#8f8a1e")
"""One colour a task; of middling lightness, since they lie on white and on black."""
HOLDERS = ("#7a828e", "#3b7dd8", "#e07b1a")
"""Colours of a module that every expert has, that some have, that one has."""
WIDTH_INCHES = 4.3
# stand-ins for colours that only the page knows; matplotlib takes no CSS variables
_INK, _PAPER = "#010203", "#fcfdfe"
_MOST_RULED, _MOST_NAMED, _MOST_ROWS = 32, 20, 40
_LABEL_CHARACTERS = 16
_ABSENT = 0.08


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


def draw_modules(name: str, label: str, view: LayerView) -> str:
    """Return experts, importance and neurons of a layer's modules, one above the other."""
    rows = [("importance for each task", len(view.tasks), view.tasks)]
    if view.membership_EM is not None:
        rows.insert(0, ("experts", len(view.experts), view.experts))
    heights = [min(0.21, 5 / count) * count for _, count, _ in rows] + [1.25]
    gap, foot = 0.42, 0.42
    height = sum(heights) + gap * len(heights) + foot

    def paint(figure: Figure) -> None:
        top = height
        left = _label_inches([*view.tasks, *view.experts]) + 0.15
        for number, panel_height in enumerate(heights):
            top -= gap + panel_height
            place = (
                left / WIDTH_INCHES,
                top / height,
                (WIDTH_INCHES - left - 0.05) / WIDTH_INCHES,
                panel_height / height,
            )
            axes = figure.add_axes(place)
            if number == len(rows):
                _paint_neurons(axes, view)
            elif rows[number][0] == "experts":
                _paint_experts(axes, view)
            else:
                _paint_importance(axes, view)
            if number < len(heights) - 1:
                axes.set_xticks([])
        _name_modules(axes, view.modules)

    return _render(name, label, height, paint)


def _paint_experts(axes: Axes, view: LayerView) -> None:
    member_EM = view.membership_EM
    assert member_EM is not None
    holders_M = member_EM.sum(0)
    # with one expert nothing is shared, and with two "some" is "all" or "one"
    kind_M = np.where(holders_M <= 1, 2, np.where(holders_M == len(member_EM), 0, 1))
    # what an expert lacks is a faint cell in the first colour, so that the matrix stays one
    kind_EM = np.where(member_EM, kind_M, 0)
    axes.imshow(_paint(kind_EM, np.where(member_EM, 1.0, _ABSENT), HOLDERS), aspect="auto", interpolation="none")
    _name_rows(axes, view.experts)
    _rule(axes, *member_EM.shape)
    words = ("of every expert", "of some", "of one")
    used = [kind for kind in range(3) if (kind_M[holders_M > 0] == kind).any()]
    _legend(axes, {words[kind]: HOLDERS[kind] for kind in used})


def _paint_importance(axes: Axes, view: LayerView) -> None:
    # scores of modules differ by a factor of two or so; from zero the cells would look alike
    least_P1 = view.importance_PM.min(1, keepdims=True)
    range_P1 = np.maximum(view.importance_PM.max(1, keepdims=True) - least_P1, 1e-30)
    strength_PM = _ABSENT + (1 - _ABSENT) * (view.importance_PM - least_P1) / range_P1
    cells = _paint(np.zeros(view.importance_PM.shape, dtype=int), strength_PM, PALETTE)
    axes.imshow(cells, aspect="auto", interpolation="none")
    _name_rows(axes, view.tasks)
    _rule(axes, *view.importance_PM.shape)
    axes.set_title("importance, from least to largest in each row")
    if len(view.tasks) > 1:
        # the colours of the tasks, for the neurons below
        colours = [PALETTE[task % len(PALETTE)] for task in range(len(view.tasks))]
        place = axes.get_yaxis_transform()
        axes.scatter(
            [-0.025] * len(colours), range(len(colours)), color=colours, marker="s", transform=place, clip_on=False
        )
        axes.tick_params(axis="y", pad=13)


def _paint_neurons(axes: Axes, view: LayerView) -> None:
    cells = _paint(view.favourite_mM, _ABSENT + (1 - _ABSENT) * view.strength_mM, PALETTE)
    axes.imshow(cells, aspect="auto", interpolation="none")
    axes.set_yticks([])
    axes.set_ylabel("neurons")
    _rule(axes, len(cells), len(view.modules), is_ruled_across=False)
    if len(view.tasks) == 1:
        axes.set_title("the stronger, the more active")
    else:
        axes.set_title("by the task that they are most active for")


def draw_square(name: str, label: str, value_EE: Floats, names: Sequence[str]) -> str:
    """Return a heat map of what two of the named have in common."""
    count = len(names)
    left = _label_inches(names)
    side = min(0.25 * count, WIDTH_INCHES - left - 0.05)
    height = side + left + 0.1

    def paint(figure: Figure) -> None:
        axes = figure.add_axes((left / WIDTH_INCHES, left / height, side / WIDTH_INCHES, side / height))
        cells = _paint(np.zeros(value_EE.shape, dtype=int), value_EE / max(1e-30, value_EE.max()), PALETTE)
        axes.imshow(cells, aspect="auto", interpolation="none")
        _name_rows(axes, names)
        step = -(-count // _MOST_ROWS)
        axes.set_xticks(range(0, count, step), [_shorten(item) for item in names[::step]], rotation=90)
        _rule(axes, count, count)

    return _render(name, label, height, paint)


def draw_layers(name: str, label: str, lines: Mapping[str, Sequence[float]], unit: str) -> str:
    """Return one line for each name over the layers; the one named ``chance`` is dashed and grey."""
    from matplotlib.ticker import MaxNLocator

    colours = {title: PALETTE[number % len(PALETTE)] for number, title in enumerate(lines)}
    if "chance" in colours:
        colours["chance"] = HOLDERS[0]

    def paint(figure: Figure) -> None:
        axes = _frame(figure, 0.55, 2.2)
        for title, values in lines.items():
            style = "--" if title == "chance" else "-"
            marker = "o" if len(values) <= _MOST_RULED else None
            axes.plot(range(len(values)), values, color=colours[title], linestyle=style, marker=marker, markersize=4)
        top = max((value for values in lines.values() for value in values), default=1)
        axes.set_ylim(0, 1.08 * top or 1)
        axes.set_xlabel("layer")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", alpha=0.18)
        _legend(axes, colours)

    return _render(name, label, 2.2, paint)


def draw_losses(name: str, label: str, losses: Mapping[str, Mapping[str, float]], tasks: Sequence[str]) -> str:
    """Return one row a task and one dot a model; ``losses`` is model to task to loss."""
    height = 0.95 + 0.3 * len(tasks)
    palette = (HOLDERS[0], *PALETTE)
    colours = {title: palette[number % len(palette)] for number, title in enumerate(losses)}

    def paint(figure: Figure) -> None:
        axes = _frame(figure, _label_inches(tasks), height)
        for row, task in enumerate(tasks):
            values = [by_task[task] for by_task in losses.values() if task in by_task]
            axes.plot([min(values), max(values)], [row, row], color=_INK, alpha=0.25, linewidth=1)
        for title, by_task in losses.items():
            rows = [row for row, task in enumerate(tasks) if task in by_task]
            axes.scatter([by_task[tasks[row]] for row in rows], rows, color=colours[title], s=34, zorder=3)
        axes.set_yticks(range(len(tasks)), [_shorten(task) for task in tasks])
        axes.set_ylim(len(tasks) - 0.5, -0.5)
        axes.set_xlabel("loss, nats a token (lower is better)")
        axes.grid(axis="x", alpha=0.18)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        _legend(axes, colours)

    return _render(name, label, height, paint)


def draw_bars(name: str, label: str, values: Mapping[str, float], unit: str) -> str:
    """Return one horizontal bar for each name."""
    height = 0.75 + 0.27 * len(values)

    def paint(figure: Figure) -> None:
        axes = _frame(figure, _label_inches(list(values)), height, head=0.1)
        axes.barh(range(len(values)), list(values.values()), height=0.68, color=PALETTE[0])
        axes.set_yticks(range(len(values)), list(values))
        axes.invert_yaxis()
        axes.set_xlabel(unit)
        axes.grid(axis="x", alpha=0.18)
        axes.set_axisbelow(True)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)

    return _render(name, label, height, paint)


def _frame(figure: Figure, left: float, height: float, head: float = 0.35) -> Axes:
    """Add axes with margins in inches: a layout engine would draw everything once more to measure it."""
    foot = 0.5
    axes = figure.add_axes(
        (
            left / WIDTH_INCHES,
            foot / height,
            (WIDTH_INCHES - left - 0.12) / WIDTH_INCHES,
            (height - foot - head) / height,
        )
    )
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return axes


def _label_inches(names: Sequence[str]) -> float:
    return 0.2 + 0.078 * max(4, *(len(_shorten(name)) for name in names))


def _paint(kind: NDArray[Any], strength: Floats, colours: Sequence[str]) -> Floats:
    """Return RGBA: the colour of each cell's kind, as opaque as it is strong, so that the page shows through."""
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    return np.concatenate([rgb[kind % len(colours)], np.clip(strength, 0, 1)[..., None]], -1)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    step = -(-len(names) // _MOST_ROWS)
    axes.set_yticks(range(0, len(names), step), [_shorten(name) for name in names[::step]])


def _name_modules(axes: Axes, modules: Sequence[int]) -> None:
    step = -(-len(modules) // _MOST_NAMED)
    shown = range(0, len(modules), step)
    axes.set_xticks(shown, [str(modules[place]) for place in shown], fontsize=8)
    axes.set_xlabel("module" if step == 1 else f"module, one in {step} named")


def _rule(axes: Axes, rows: int, columns: int, *, is_ruled_across: bool = True) -> None:
    """Draw thin lines in the page's colour between the columns of cells, unless they are too narrow, and the rows."""
    # lines, not a grid: a tick for each would take most of the time
    if columns <= _MOST_RULED:
        axes.vlines(np.arange(0.5, columns - 1), -0.5, rows - 0.5, colors=_PAPER, linewidth=1.2)
    if is_ruled_across and rows <= _MOST_ROWS:
        axes.hlines(np.arange(0.5, rows - 1), -0.5, columns - 0.5, colors=_PAPER, linewidth=1.2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def _legend(axes: Axes, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=colour, label=_shorten(title, 20)) for title, colour in colours.items()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
        handlelength=0.9,
        handletextpad=0.4,
        columnspacing=1.1,
        borderpad=0,
    )


def _shorten(text: str, most: int = _LABEL_CHARACTERS) -> str:
    """Return the text on one line, its middle left out where it is long: names often differ at their end."""
    flat = " ".join(text.split())
    head, tail = most // 2, most - most // 2 - 1
    return flat if len(flat) <= most else f"{flat[:head]}…{flat[-tail:]}"


def _render(name: str, label: str, height_inches: float, paint: Callable[[Figure], None]) -> str:
    """Draw a figure and return it as an SVG element whose ids start with ``name``; no setting of matplotlib changes."""
    import matplotlib
    from matplotlib.figure import Figure

    # a user's own matplotlibrc must not reach the report; Any, since the keys' types differ between releases
    settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings.update(
        dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    )
    settings.update(
        {
            "grid.color": _INK,
            "font.size": 9,
            "legend.fontsize": 8.5,
            "axes.titlesize": 8.5,
            "axes.titlelocation": "left",
            "axes.titlepad": 4,
            "axes.titlecolor": _INK,
            "svg.fonttype": "none",
            "svg.hashsalt": "modmoe",
            "text.parse_math": False,
            "axes.unicode_minus": False,
        }
    )
    stream = io.StringIO()
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # a name in a script that matplotlib's font lacks; the reader's browser has another
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(WIDTH_INCHES, height_inches))
        paint(figure)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(stream.getvalue(), name, label)


def _embed(svg: str, name: str, label: str) -> str:
    """Return matplotlib's SVG document as an element that can stand in a page beside others of its kind."""
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None
    # its style sheet would reach the whole page
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index(">") + 1 :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = body.replace(_INK, "currentColor").replace(_PAPER, "var(--paper)")
    # the family is the page's: what matplotlib measured with need not be there
    body = re.sub(r"(font(?:-size)?: )([0-9.]+px)[^;\"]*", r"font-size: \2", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{html.escape(label)}">'
    return head + re.sub(r">\s+<", "><", body).strip()
