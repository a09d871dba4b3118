"""Parts that all plots of the report share: colours, names, margins, and an SVG element that fits into the page.

Beside its SVG a plot carries the places of its values, so that the page can show them to a pointer and the keyboard.
"""

from __future__ import annotations

import html
import io
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

PALETTE = ("#3b7dd8", "#e07b1a", "#2a9d6f", "#c456a6", "#d1495b", "#1b9aaa", "#7d5fd3", "#8f8a1e")
"""One colour for each task or expert, of medium lightness, since it lies on white and on black."""
HOLDERS = ("#7a828e", "#3b7dd8", "#e07b1a")
"""Colours of a module that every expert has, that some have, that one has."""
WIDTH_INCHES = 4.3
ABSENT = 0.08
"""How opaque a cell is that stands for nothing."""
# stand-ins for colours that only the page knows; matplotlib takes no CSS variables
INK, _PAPER = "#010203", "#fcfdfe"
MOST_RULED, _MOST_NAMED, MOST_ROWS = 32, 20, 40
_LABEL_CHARACTERS = 16


@dataclass(slots=True, eq=False)
class Canvas:
    """An unfinished figure, and the values that the page will show of it."""

    figure: Figure
    marks: list[dict[str, Any]] = field(default_factory=list)

    def mark(
        self,
        axes: Axes,
        rows: Sequence[str],
        columns: Sequence[str],
        words: Sequence[Sequence[str]],
        before: str = "",
        behind: str = "",
    ) -> None:
        """Say what lies in the axes: a grid of cells as large as they are, with the words of each, and around all."""
        place = axes.get_position()
        box = [place.x0, 1 - place.y1, place.width, place.height]
        self.marks.append(
            {
                "box": [round(number, 4) for number in box],
                "rows": list(rows),
                "columns": list(columns),
                "words": words,
                "around": [before, behind],
            }
        )


def frame(canvas: Canvas, left: float, height: float, head: float = 0.35) -> Axes:
    """Add axes with margins in inches: a layout engine would draw everything once more to measure it."""
    foot = 0.5
    axes = canvas.figure.add_axes(
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


def label_inches(names: Sequence[str]) -> float:
    """Return the margin that names need on the left, in inches."""
    return 0.2 + 0.078 * max(4, *(len(shorten(name)) for name in names))


def paint_cells(kind: NDArray[Any], strength: Floats, colours: Sequence[str]) -> Floats:
    """Return RGBA: the colour of each cell's kind, as opaque as it is strong, so that the page shows through."""
    rgb = np.array([[int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)] for colour in colours])
    return np.concatenate([rgb[kind % len(colours)], np.clip(strength, 0, 1)[..., None]], -1)


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Write names beside rows of cells, as many as there is room for."""
    step = -(-len(names) // MOST_ROWS)
    axes.set_yticks(range(0, len(names), step), [shorten(name) for name in names[::step]])


def name_modules(axes: Axes, modules: Sequence[int]) -> None:
    """Write numbers of modules under columns of cells, as many as there is room for."""
    step = -(-len(modules) // _MOST_NAMED)
    shown = range(0, len(modules), step)
    axes.set_xticks(shown, [str(modules[place]) for place in shown], fontsize=8)
    axes.set_xlabel("module" if step == 1 else f"module, one in {step} named")


def rule(axes: Axes, rows: int, columns: int, *, is_ruled_across: bool = True) -> None:
    """Draw thin lines in the page's colour between the columns of cells, unless they are too narrow, and the rows."""
    # lines, not a grid: a tick for each would take most of the time
    if columns <= MOST_RULED:
        axes.vlines(np.arange(0.5, columns - 1), -0.5, rows - 0.5, colors=_PAPER, linewidth=1.2)
    if is_ruled_across and rows <= MOST_ROWS:
        axes.hlines(np.arange(0.5, rows - 1), -0.5, columns - 0.5, colors=_PAPER, linewidth=1.2)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)


def legend(axes: Axes, colours: Mapping[str, str]) -> None:
    """Say above the axes what each colour is."""
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(color=colour, label=shorten(title, 20)) for title, colour in colours.items()],
        loc="lower left",
        bbox_to_anchor=(0, 1),
        ncols=4,
        frameon=False,
        handlelength=0.9,
        handletextpad=0.4,
        columnspacing=1.1,
        borderpad=0,
    )


def shorten(text: str, most: int = _LABEL_CHARACTERS) -> str:
    """Return the text on one line, its middle left out where it is long: names often differ at their end."""
    flat = " ".join(text.split())
    head, tail = most // 2, most - most // 2 - 1
    return flat if len(flat) <= most else f"{flat[:head]}…{flat[-tail:]}"


def render(name: str, label: str, height_inches: float, paint: Callable[[Canvas], None]) -> str:
    """Draw a figure and return it as an SVG element whose ids start with ``name``; no setting of matplotlib changes."""
    import matplotlib
    from matplotlib.figure import Figure

    # a user's own matplotlibrc must not reach the report; Any, since the keys' types differ between releases
    settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings.update(
        dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)
    )
    settings.update(
        {
            "grid.color": INK,
            "font.size": 9,
            "legend.fontsize": 8.5,
            "axes.titlesize": 8.5,
            "axes.titlelocation": "left",
            "axes.titlepad": 4,
            "axes.titlecolor": INK,
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
        canvas = Canvas(figure)
        paint(canvas)
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _embed(stream.getvalue(), name, label, canvas.marks)


def _embed(svg: str, name: str, label: str, marks: list[dict[str, Any]]) -> str:
    """Return matplotlib's SVG document as an element that can stand in a page beside others of its kind."""
    svg = svg[svg.index("<svg") :]
    view = re.search(r'viewBox="([^"]*)"', svg)
    assert view is not None
    # its style sheet would reach the whole page
    body = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index(">") + 1 :], flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", body)
    body = body.replace(INK, "currentColor").replace(_PAPER, "var(--paper)")
    # the family is the page's: what matplotlib measured with need not be there
    body = re.sub(r"(font(?:-size)?: )([0-9.]+px)[^;\"]*", r"font-size: \2", body)
    body = re.sub(r"font-family: [^;\"]*;? ?", "", body)
    # in single quotes, since there are as many double ones as values
    values = html.escape(json.dumps(marks, ensure_ascii=False, separators=(",", ":")), quote=False).replace(
        "'", "&#39;"
    )
    told = f" data-marks='{values}'" if marks else ""
    head = f'<svg viewBox="{view[1]}" role="img" aria-label="{html.escape(label)}"{told}>'
    return head + re.sub(r">\s+<", "><", body).strip()
