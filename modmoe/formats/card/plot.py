"""The picture of a card: which modules each expert has, layer by layer."""

# Shapes: R rows (an expert of a layer each, and a gap between layers), M modules

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

PLOT = "experts.png"
_COLOURS = ("#eceef1", "#7a828e", "#3b7dd8", "#e07b1a")
_LABELS = ("not in this expert", "in every expert", "in some", "in this one alone")
_GAP = -1
_MOST_NAMED = 40
_LABEL_CHARACTERS = 16


def draw_experts(path: Path, layers: Sequence[Sequence[Sequence[int]]], names: Sequence[str]) -> None:
    """Write a PNG of at most about 1000 by 1400 pixels; no setting of matplotlib changes.

    Args:
        path: the file.
        layers: the stored modules of each layer's experts, as ``modmoe.models.counts.read_experts`` gives them.
        names: of the experts.
    """
    import matplotlib
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    kinds_RM = _kinds(layers)
    rows, experts = len(kinds_RM), max((len(layer) for layer in layers), default=0)
    # a user's own matplotlibrc must not reach the picture; Any, since the keys' types differ between releases
    settings: Any = {key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")}
    settings.update({"font.size": 8, "text.parse_math": False})
    height_inches = min(max(0.1 * rows, 0.8), 11.0) + 0.9
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        # a name in a script that matplotlib's font lacks
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        figure = Figure(figsize=(8.0, height_inches), dpi=120)
        axes = figure.add_axes((0.16, 0.45 / height_inches, 0.82, (height_inches - 0.9) / height_inches))
        colours = ListedColormap(["#ffffff", *_COLOURS])
        axes.imshow(kinds_RM, aspect="auto", interpolation="none", cmap=colours, vmin=_GAP, vmax=len(_COLOURS) - 1)
        starts = np.arange(len(layers)) * (experts + 1)
        if rows <= _MOST_NAMED:
            labels = {
                start + e: f"{layer} {_shorten(name)}"
                for layer, start in enumerate(starts)
                for e, name in enumerate(names[:experts])
            }
            axes.set_yticks(list(labels), list(labels.values()))
        else:
            step = -(-len(layers) // _MOST_NAMED)
            axes.set_yticks(starts[::step] + (experts - 1) / 2, [str(i) for i in range(0, len(layers), step)])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel("layer")
        axes.set_xlabel("module")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        handles = [Patch(color=colour, label=label) for colour, label in zip(_COLOURS, _LABELS, strict=True)]
        axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False, fontsize=8)
        figure.savefig(path, format="png", metadata={"Software": None})


def _kinds(layers: Sequence[Sequence[Sequence[int]]]) -> NDArray[np.int64]:
    """Return what each cell is: a place in ``_LABELS``, or ``_GAP``."""
    width = max((module + 1 for layer in layers for expert in layer for module in expert), default=1)
    blocks = []
    for layer in layers:
        member_EM = np.zeros((len(layer), width), dtype=bool)
        for expert, modules in enumerate(layer):
            member_EM[expert, list(modules)] = True
        holders_M = member_EM.sum(0)
        kind_M = np.where(holders_M == len(layer), 1, np.where(holders_M > 1, 2, 3))
        blocks += [np.where(member_EM, kind_M, 0), np.full((1, width), _GAP)]
    return np.concatenate(blocks[:-1]) if blocks else np.zeros((1, 1), dtype=np.int64)


def _shorten(text: str) -> str:
    flat = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return flat if len(flat) <= _LABEL_CHARACTERS else f"{flat[: _LABEL_CHARACTERS - 1]}…"
