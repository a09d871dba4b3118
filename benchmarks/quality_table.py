"""What the cells of quality.py say: a row for each method and sparsity, margins over peers, and pictures."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PEERS = ("prune", "seap", "cmoe", "moefication", "emoe", "llama_moe")
"""First words of the published ways."""
CONTROLS = ("oracle", "bottom", "random", "zero", "generic")
"""Words of what is there to compare with, and is neither ours nor a peer."""
_COLOURS = {"dense": "#7a828e", "modules": "#2a63b8", "tokens": "#2a63b8", "tasks": "#1b9aaa", "prune": "#d1495b"}
_PEER = "#e07b1a"


def mean_loss(measured: dict[str, dict[str, float]], half: str) -> float:
    """Return the mean over tasks of the loss on one half."""
    return statistics.mean(value["loss"] for task, value in measured.items() if task.endswith(half))


def best_of(cells: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return the cell of the rate that does best on the half that is for choosing."""
    return min(cells, key=lambda cell: mean_loss(cell.get("after", cell["before"]), "choose"))


def summarize(cells: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each method and sparsity: mean and spread over seeds at the rate that the one half chooses."""
    groups: dict[tuple[str, float], dict[int, list[dict[str, Any]]]] = {}
    for cell in cells:
        groups.setdefault((cell["method"], cell["sparsity"]), {}).setdefault(cell["seed"], []).append(cell)
    rows = []
    for (method, sparsity), seeds in groups.items():
        best = [best_of(cells) for cells in seeds.values()]
        row: dict[str, Any] = {"name": method, "sparsity": sparsity, "seeds": len(best), "bound": None, "holds": None}
        for when in ("before", "after"):
            told = [
                {name: v for name, v in cell[when].items() if name.endswith(".tell")} for cell in best if when in cell
            ]
            if told:
                losses = [mean_loss(values, "tell") for values in told]
                row[when] = statistics.mean(losses)
                row[f"{when}_spread"] = statistics.stdev(losses) if len(losses) > 1 else 0.0
                row[f"{when}_tasks"] = {
                    task.removesuffix(".tell"): {
                        key: statistics.mean(values[task][key] for values in told if key in values[task])
                        for key in first
                    }
                    for task, first in told[0].items()
                }
        row["rates"] = sorted({cell["rate"] for cell in best})
        row.update({key: best[0][key] for key in ("active", "stored") if key in best[0]})
        rows.append(row)
    dense = next((row["before"] for row in rows if row["name"] == "dense"), None)
    for row in rows:
        row["ratio"] = None if dense is None else row.get("after", row["before"]) / dense
    return sorted(rows, key=lambda row: (row["sparsity"], row.get("after", row["before"])))


def first_word(name: str) -> str:
    """Return what a method's name begins with."""
    return name.replace(",", "").split()[0]


def margins(rows: list[dict[str, Any]]) -> list[str]:
    """Return, for each sparsity, before and after, what the best of ours wins over peers, in per cent of their loss."""
    lines = []
    for sparsity in sorted({row["sparsity"] for row in rows if row["name"] != "dense"}):
        for when in ("before", "after"):
            of = {row["name"]: row[when] for row in rows if row["sparsity"] == sparsity and when in row}
            of = {name: loss for name, loss in of.items() if not any(word in name for word in CONTROLS)}
            ours = {name: loss for name, loss in of.items() if first_word(name) not in (*PEERS, "dense")}
            peers = {name: loss for name, loss in of.items() if first_word(name) in PEERS}
            if not ours or not peers:
                continue
            mine = min(ours, key=ours.__getitem__)
            for which, peer in (
                ("best", min(peers, key=peers.__getitem__)),
                ("worst", max(peers, key=peers.__getitem__)),
            ):
                won = 100 * (1 - ours[mine] / peers[peer])
                lines.append(f"{sparsity:.0%} off, {when}: '{mine}' against the {which} peer, '{peer}': {won:+.1f} %")
    return lines


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss after fine-tuning by active and by stored parameters, a line a method."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if not any(word in row["name"] for word in CONTROLS) and "after" in row]
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    dense = next((row["after"] for row in rows if row["name"] == "dense"), None)
    names = sorted({row["name"] for row in rows if row["name"] != "dense"})
    styles = ("-", "--", ":", "-.")
    for axis, size in zip(axes, ("active", "stored"), strict=True):
        if dense is not None:
            axis.axhline(dense, color=_COLOURS["dense"], linewidth=1, label="dense, fine-tuned")
        drawn: dict[str, int] = {}
        for name in names:
            points = sorted((row[size] / 1e6, row["after"], row["after_spread"]) for row in rows if row["name"] == name)
            colour = _COLOURS.get(first_word(name), _PEER)
            style = styles[drawn.setdefault(colour, 0) % len(styles)]
            drawn[colour] += 1
            x, y, spread = zip(*points, strict=True)
            axis.errorbar(x, y, spread, color=colour, linestyle=style, marker="o", markersize=4, capsize=2, label=name)
        axis.set_xlabel(f"{size} parameters, millions")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss after fine-tuning, nats a token")
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
