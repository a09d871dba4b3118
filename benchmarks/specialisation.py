"""Which neurons tasks need: what the literature says of it, looked at on a model at hand.

    python benchmarks/specialisation.py [--quick] [--json FILE] [--source DIR --task NAME=FILE --task NAME=FILE ...]

Without a source it runs on the model that ships with modmoe. For each layer, over all pairs of tasks:

    shared rate   share of the quarter of neurons that are most often among the ten largest of a token, which another
                  task's quarter has too (CMoE, https://arxiv.org/abs/2502.04416: 80 to 86 % across domains)
    shared flap   the same of the half that FLAP's score would keep; its Jaccard index is s / (2 - s)
                  (DIVE, https://arxiv.org/abs/2506.09351: pruning on other text gives other experts)
    same task     shared flap of two halves of one task's text: what is left to chance
    cv            median over neurons of the coefficient of variation, over documents, of the mean |act(gate)|, and
    cv > 0.6      the share of neurons where it is above that
                  (ExpertWeaver, https://arxiv.org/abs/2602.15521: high in middle layers, low at both ends)
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import platform
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import modmoe
from modmoe.analysis.text.calibration import load_task
from modmoe.conversion.splits.cmoe import markers
from modmoe.models.loading import load, load_tokenizer

CV_LIMIT = 0.6


# Shapes: T tokens, F neurons, N documents


class Watch:
    """What one layer's neurons do over the documents of one task, each half of them apart."""

    def __init__(self, layer: Any) -> None:
        """Hook a decoder layer's FFN, which must be gated."""
        down, act = layer.mlp.down_proj, layer.mlp.act_fn
        self.norm_F = down.weight.detach().double().norm(dim=0)
        self.marked_F: Any = 0
        self.moments: list[list[Any]] = [[0, 0.0, 0.0], [0, 0.0, 0.0]]
        self.gate_NF: list[Tensor] = []
        self.half = 0
        self.handles = [
            down.register_forward_pre_hook(lambda _, args: self.hidden(args[0][0])),
            layer.mlp.gate_proj.register_forward_hook(
                lambda _, __, out: self.gate_NF.append(act(out[0]).abs().mean(0))
            ),
        ]

    def hidden(self, hidden_TF: Tensor) -> None:
        """Add one document."""
        self.marked_F = self.marked_F + markers(hidden_TF).sum(0)
        moments, high_TF = self.moments[self.half], hidden_TF.double()
        for place, part in enumerate((len(high_TF), high_TF.sum(0), high_TF.square().sum(0))):
            moments[place] = moments[place] + part

    def flap(self, halves: tuple[int, ...] = (0, 1)) -> Tensor:
        """Return the half of the neurons with the highest score, of some of the text."""
        tokens, sum_F, square_F = (sum(self.moments[half][place] for half in halves) for place in range(3))
        score_F: Tensor = (square_F / tokens - (sum_F / tokens).square()) * self.norm_F.square()
        return score_F.topk(len(score_F) // 2).indices

    def rate(self) -> Tensor:
        """Return the quarter of the neurons that are most often among the ten largest."""
        quarter_F: Tensor = self.marked_F.topk(len(self.marked_F) // 4).indices
        return quarter_F


def shared(one: Tensor, two: Tensor) -> float:
    """Return the share of one set's neurons that the other has too."""
    return float(torch.isin(one, two).double().mean())


@torch.no_grad()
def look(source: str, tasks: dict[str, str], documents: int, tokens: int, trust: bool) -> list[dict[str, Any]]:
    """Return one row a layer."""
    model, tokenizer = load(source, trust_remote_code=trust), load_tokenizer(source, trust_remote_code=trust)
    layers = model.model.layers
    watched = {}
    for task, file in tasks.items():
        watched[task] = [Watch(layer) for layer in layers]
        for number, row in enumerate(itertools.islice(load_task(task, file), documents)):
            text = row.get("text") or f"{row['prompt']}{row['completion']}"
            for watch in watched[task]:
                watch.half = number % 2
            model(torch.tensor([tokenizer(text)["input_ids"][:tokens]]))
        for watch in watched[task]:
            for handle in watch.handles:
                handle.remove()
    rows = []
    for number in range(len(layers)):
        of = [watched[task][number] for task in tasks]
        pairs = list(itertools.combinations(of, 2))
        gate_NF = torch.stack([row_F for watch in of for row_F in watch.gate_NF]).double()
        cv_F = gate_NF.std(0) / (gate_NF.mean(0) + 1e-9)
        flap = statistics.mean(shared(a.flap(), b.flap()) for a, b in pairs)
        rows.append(
            {
                "name": f"layer {number}",
                "shared_rate": statistics.mean(shared(a.rate(), b.rate()) for a, b in pairs),
                "shared_flap": flap,
                "jaccard_flap": flap / (2 - flap),
                "same_task": statistics.mean(shared(watch.flap((0,)), watch.flap((1,))) for watch in of),
                "cv": float(cv_F.median()),
                f"cv > {CV_LIMIT}": float((cv_F > CV_LIMIT).double().mean()),
                "ratio": flap,
                "bound": None,
                "holds": None,
            }
        )
    return rows


def main() -> None:
    """Look, print the table, write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few documents")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--source", help="dense checkpoint with gated FFNs; the shipped model if left out")
    parser.add_argument("--task", action="append", default=[], help="NAME=FILE, two at least")
    parser.add_argument("--documents", type=int, default=100, help="of each task")
    parser.add_argument("--tokens", type=int, default=256, help="of a document, at most")
    parser.add_argument("--trust-remote-code", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if args.source is None:
            from modmoe.demo.corpus import write_task_files

            args.source = str(Path(modmoe.__file__).parent / "demo" / "model")
            files = write_task_files(Path(name), split="held_out", rows_per_task=args.documents, seed=0)
            tasks = {task: str(file) for task, file in files.items()}
        else:
            tasks = dict(item.split("=", 1) for item in args.task)
        documents = 10 if args.quick else args.documents
        rows = look(args.source, tasks, documents, args.tokens, args.trust_remote_code)
    table = Table(title=f"{Path(args.source).resolve().name}: neurons that {', '.join(tasks)} have in common")
    columns = ("shared_rate", "shared_flap", "jaccard_flap", "same_task", "cv", f"cv > {CV_LIMIT}")
    for column in ("layer", *columns):
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(row["name"], *(f"{row[column]:.2f}" for column in columns))
    Console(width=100).print(table)
    if args.json:
        device = f"{platform.processor() or 'cpu'}, {os.cpu_count()} cores"
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__}
        found = {"device": device, "date": datetime.date.today().isoformat(), "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
