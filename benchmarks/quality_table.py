"""What the cells of quality.py say: a row for each method and sparsity, margins over peers, and pictures.

    python benchmarks/quality_table.py [FILE.md]

writes the tables of quality.md anew from the cells in the .jsonl beside it, each between two comments that name its
model and the steps of training, and the pictures.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeAlias

PEERS = ("prune", "seap", "cmoe", "moefication", "emoe", "llama_moe", "upcycle")
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
                row[f"{when}_by_seed"] = dict(zip((cell["seed"] for cell in best if when in cell), losses, strict=True))
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


Margin: TypeAlias = tuple[float, str, str, str, str, str]
"""Sparsity, before or after, ours, best or worst, the peer, and what ours wins in per cent of the peer's loss."""


def margins(rows: list[dict[str, Any]]) -> list[Margin]:
    """Return, for each sparsity, before and after, what the best of ours wins over peers, controls left out.

    Ours is the best of those that were run with the most seeds. It is compared with a peer seed by seed, with the seeds
    that both have: the mean of what is won, and its spread where there are several.
    """
    found: list[Margin] = []
    for sparsity in sorted({row["sparsity"] for row in rows if row["name"] != "dense"}):
        for when in ("before", "after"):
            known = [row for row in rows if row["sparsity"] == sparsity and when in row]
            of = {row["name"]: row[f"{when}_by_seed"] for row in known}
            of = {name: seeds for name, seeds in of.items() if not any(word in name for word in CONTROLS)}
            ours = {name: seeds for name, seeds in of.items() if first_word(name) not in (*PEERS, "dense")}
            peers = {name: seeds for name, seeds in of.items() if first_word(name) in PEERS}
            if not ours or not peers:
                continue
            mine = min(ours, key=lambda name: (-len(ours[name]), statistics.mean(ours[name].values())))
            won = {}
            for peer, seeds in peers.items():
                each = [100 * (1 - ours[mine][seed] / loss) for seed, loss in seeds.items() if seed in ours[mine]]
                won[peer] = (statistics.mean(each), f" ± {statistics.stdev(each):.1f}" if len(each) > 1 else "")
            for which, choose in (("best", min), ("worst", max)):
                peer = choose(won, key=won.__getitem__)
                found.append((sparsity, when, mine, which, peer, f"{won[peer][0]:+.1f}{won[peer][1]} %"))
    return found


def tables(rows: list[dict[str, Any]]) -> str:
    """Return two tables in Markdown: a row a method, those best at the first sparsity first; and the margins."""
    sparsities = sorted({row["sparsity"] for row in rows} - {0.0})
    middle = 0.5 if 0.5 in sparsities else sparsities[0]
    names = dict.fromkeys(row["name"] for row in sorted(rows, key=lambda row: _rank(row, middle)))
    off = [f"{sparsity:.0%} off" for sparsity in sparsities]
    columns = ["method", *off, "rate", f"by task, {middle:.0%} off", "bits per byte", "active", "stored"]
    lines = [" | ".join(columns), " | ".join(["---", *["---:"] * len(off), "---", "---", "---", "---:", "---:"])]
    exact = any("exact_match" in task for row in rows for task in row.get("after_tasks", {}).values())
    for name in names:
        of = {row["sparsity"]: row for row in rows if row["name"] == name}
        row = of.get(middle) or of.get(0.0) or next(iter(of.values()))
        by_task = row.get("after_tasks") or row["before_tasks"]
        values = [" / ".join(f"{task[key]:.2f}" for task in by_task.values()) for key in ("loss", "bits_per_byte")]
        if exact:
            rights = [task["exact_match"] for task in by_task.values() if "exact_match" in task]
            values[0] += "".join(f", {right:.1%} right" for right in rights if right)
        cells = [_change(of.get(sparsity)) if sparsity in of else "" for sparsity in sparsities]
        if 0.0 in of:  # a model that has no sparsity stands in the middle
            cells[sparsities.index(middle)] = _change(of[0.0])
        sizes = [f"{row[key]:,}" if key in row else "" for key in ("active", "stored")]
        label = "dense, fine-tuned" if name == "dense" else name
        lines.append(" | ".join([label, *cells, "/".join(f"{rate:g}" for rate in row["rates"]), *values, *sizes]))
    lines += [
        "",
        "off | when | ours | best peer | won | worst peer | won",
        "---: | --- | --- | --- | ---: | --- | ---:",
    ]
    found = margins(rows)
    for best, worst in zip(found[::2], found[1::2], strict=True):
        sparsity, when, mine = best[:3]
        of = {row["name"]: row[when] for row in rows if row["sparsity"] == sparsity and when in row}
        against = [cell for margin in (best, worst) for cell in (f"{margin[4]}, {of[margin[4]]:.3f}", margin[5])]
        lines.append(" | ".join([f"{sparsity:.0%}", when, f"{mine}, {of[mine]:.3f}", *against]))
    return "\n".join(f"| {line} |" if line else line for line in lines)


def _rank(row: dict[str, Any], middle: float) -> tuple[Any, ...]:
    return row["sparsity"] != 0, abs(row["sparsity"] - middle), row.get("after", row["before"])


def _change(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    parts = []
    for when in ("before", "after"):
        if when in row:
            spread = f" ± {row[when + '_spread']:.3f}" if when == "after" and row["seeds"] > 1 else ""
            parts.append(f"{row[when]:.3f}{spread}")
    return " → ".join(parts)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss after fine-tuning by active and by stored parameters, and by speed where known, a line a method."""
    from matplotlib.figure import Figure

    rows = [row for row in rows if not any(word in row["name"] for word in CONTROLS) and "after" in row]
    sizes = {"active": "active parameters, millions", "stored": "stored parameters, millions"}
    if any("speed" in row for row in rows):
        sizes["speed"] = "times as fast as dense, decoding"
    figure = Figure(figsize=(3 + 3.25 * len(sizes), 4.2), layout="constrained")
    axes = figure.subplots(1, len(sizes), sharey=True)
    dense = next((row["after"] for row in rows if row["name"] == "dense"), None)
    names = sorted({row["name"] for row in rows if row["name"] != "dense"})
    styles, markers = ("-", "--", ":", "-."), "osD^vPX"
    for axis, (size, label) in zip(axes, sizes.items(), strict=True):
        if dense is not None:
            axis.axhline(dense, color=_COLOURS["dense"], linewidth=1, label="dense, fine-tuned")
        drawn: dict[str, int] = {}
        for name in names:
            scale = 1 if size == "speed" else 1e6
            known = [row for row in rows if row["name"] == name and size in row]
            points = sorted((row[size] / scale, row["after"], row["after_spread"]) for row in known)
            colour = _COLOURS.get(first_word(name), _PEER)
            number = drawn[colour] = drawn.get(colour, -1) + 1
            look = {"linestyle": styles[number % len(styles)], "marker": markers[number % len(markers)]}
            if not points:
                continue
            x, y, spread = zip(*points, strict=True)
            axis.errorbar(x, y, spread, color=colour, **look, markersize=4, capsize=2, label=name)
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("loss after fine-tuning, nats a token")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.suptitle(title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def rewrite(path: Path) -> None:
    """Put the tables of the cells that lie beside a Markdown file between its comments, and draw the pictures anew."""
    cells, speeds = (
        [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
        for file in (path.with_suffix(".jsonl"), path.with_name(f"{path.stem}_speed.jsonl"))
    )
    speed_of = {(line["model"], line["method"], line["sparsity"]): line["speed"] for line in speeds}

    def made(found: re.Match[str]) -> str:
        model, steps = found[1], int(found[2])
        rows = summarize(cell for cell in cells if (cell["model"], cell["steps"]) == (model, steps))
        for row in rows:
            if (key := (model, row["name"], row["sparsity"])) in speed_of:
                row["speed"] = speed_of[key]
        draw(rows, path.with_name(f"quality-{model}.png"), f"{model}: loss after {steps} steps")
        return f"<!-- {model}, {steps} steps -->\n{tables(rows)}\n<!-- end -->"

    text = re.sub(
        r"<!-- (\S+), (\d+) steps -->\n.*?<!-- end -->", made, path.read_text(encoding="utf-8"), flags=re.DOTALL
    )
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    rewrite(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results" / "quality.md")
