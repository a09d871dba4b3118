"""What decides quality: one choice changed at a time, of a conversion before any fine-tuning, or of the fine-tuning.

    python benchmarks/quality_choices.py [--quick] [--json FILE] [--source DIR --task NAME=FILE ... --eval ...]

It takes the options of quality.py and runs its cells, without training but where the training is what is varied. Two
conversions are varied: experts made for tasks, and experts that are the modules themselves. The table has the mean over
tasks of the loss in nats a token on half of the held-out rows.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
from typing import Any

import quality
import torch
from quality_table import mean_loss
from rich.console import Console
from rich.table import Table

import modmoe

TASKS: dict[str, Any] = {"assignment.method": "greedy", "router.compensation": True}
MODULES: dict[str, Any] = {"assignment.method": "modules", "router.compensation": True, "assignment.refit": True}
WIDTHS = {
    # numbers of modules, which quality.py works out
    "one neuron": {"partition.num_modules": "neurons"},
    "half": {"partition.num_modules": "double"},
    "as it is": {},
    "a few wide ones": {"partition.num_modules": "few"},
}

CHOICES: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "modules: partition": (
        MODULES,
        {
            name: {"partition.method": name}
            for name in ("kmeans", "activations", "coactivation", "random", "contiguous")
        },
    ),
    "modules: width": (MODULES, WIDTHS),
    "modules: shared": (
        MODULES,
        {
            "none": {},
            "quarter": {"assignment.shared_modules": "quarter"},
            "eighth": {"assignment.shared_modules": "eighth"},
        },
    ),
    "modules: repairs": (
        {"assignment.method": "modules"},
        {
            "none": {},
            "means": {"router.compensation": True},
            "refit": {"assignment.refit": True},
            "both": {"assignment.refit": True, "router.compensation": True},
        },
    ),
    "modules: router": (
        MODULES,
        {
            "linear": {},
            "mlp": {"router.kind": "mlp"},
            "average key": {"router.start": "average_key"},
            "zero": {"router.start": "zero"},
        },
    ),
    "tasks: score": (
        {},
        {
            name: {"assignment.score": name}
            for name in ("magnitude", "activation", "wanda", "wifv", "taylor", "output_norm")
        },
    ),
    "tasks: assignment": (
        {"router.compensation": True},
        {
            "top score": {},
            "greedy": {"assignment.method": "greedy"},
            "greedy, refit": {"assignment.method": "greedy", "assignment.refit": True},
            "tokens 4, refit": {"assignment.method": "tokens", "assignment.num_experts": 4, "assignment.refit": True},
            "tokens 16, refit": {"assignment.method": "tokens", "assignment.num_experts": 16, "assignment.refit": True},
            "tokens 64, refit": {"assignment.method": "tokens", "assignment.num_experts": 64, "assignment.refit": True},
        },
    ),
    # a router that reads sequences goes with scores alone
    "tasks: routing": (
        {"router.compensation": True},
        {name: {"router.routing": name} for name in ("token", "sequence", "task")},
    ),
    "tasks: partition": (
        TASKS,
        {name: {"partition.method": name} for name in ("kmeans", "activations", "coactivation", "random")},
    ),
    "tasks: width": (TASKS, WIDTHS),
}

TUNED: dict[str, Any] = {"assignment.method": "modules", "assignment.refit": True, "router.start": "average_key"}
TRAINED: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    # rates are multiples of what full training begins with; what learns wants its own
    "training: what learns": (
        TUNED,
        {
            f"{what}, rate {rate}": {"finetune.train": what, "rate": rate}
            for what, rates in {"full": (1, 3), "lora": (1, 3, 9, 27), "router": (1, 3, 9, 27)}.items()
            for rate in rates
        },
    ),
    "training: share of distillation": (
        TUNED,
        {str(share): {"finetune.distill_weight": share, "rate": 3} for share in (0.0, 0.25, 0.5, 0.9)},
    ),
    "training: temperature": (
        TUNED,
        {str(value): {"finetune.temperature": value, "rate": 3} for value in (0.5, 1.0, 2.0, 4.0)},
    ),
    "training: balance": (
        TUNED,
        {str(factor): {"finetune.balance_weight": factor, "rate": 3} for factor in (0.0, 0.01, 0.1)},
    ),
}
"""The fine-tuning varied, for --steps steps."""


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    args = quality.parse()
    steps = args.steps
    groups = list({**CHOICES, **TRAINED}.items())[: 1 if args.quick else None]
    with quality.texts(args) as (tasks, held):
        known = [] if args.rows is None or not args.rows.exists() else args.rows.read_text().splitlines()
        cells = {(cell["model"], cell["group"], cell["method"]): cell for cell in map(json.loads, known)}
        model = quality.model_name(args)
        for group, (common, choices) in groups:
            args.steps = steps if group in TRAINED else 0
            for name, changes in choices.items():
                if (model, group, name) in cells:
                    continue
                quality.METHODS[f"{group}, {name}"] = {**common, **changes}
                cell = {"model": model, "method": f"{group}, {name}", "sparsity": 0.5, "seed": 0}
                cell["rate"] = float(changes.get("rate", 1))
                made = {**quality.run_cell(args, cell, tasks, held), "group": group, "method": name}
                cells[model, group, name] = made
                if args.rows is not None:
                    with args.rows.open("a", encoding="utf-8") as handle:
                        handle.write(json.dumps(made) + "\n")
    rows = []
    table = Table(title=f"{model}: mean loss of the tasks, half of the neurons on")
    for column in ("what", "choice", "loss", "active", "stored"):
        table.add_column(column, justify="left" if column in ("what", "choice") else "right")
    for (of, group, name), cell in cells.items():
        if of != model:
            continue
        loss = mean_loss(cell.get("after", cell["before"]), "tell")
        rows.append({"name": f"{group}, {name}", "ratio": None, "bound": None, "holds": None, "loss": loss})
        table.add_row(group, name, f"{loss:.3f}", f"{cell['active']:,}", f"{cell['stored']:,}")
    Console(width=100).print(table)
    if args.json:
        device = f"{platform.processor() or 'cpu'}, {os.cpu_count()} cores"
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__}
        found = {"device": device, "date": datetime.date.today().isoformat(), "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
