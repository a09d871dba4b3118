"""Quality at one active size: ways of making a model sparse against each other, before and after fine-tuning.

    python benchmarks/quality.py [--quick] [--json FILE] [--source DIR --task NAME=FILE ... --eval NAME=FILE ...]

Without a source it runs on the model that ships with modmoe. A cell is a method, a sparsity (share of the FFN neurons
that a token does not use), a seed and a learning rate. All methods have as many active neurons, the same text for
calibration, the same fine-tuning steps, rows and teacher. Held-out rows are halved: each method's learning rate is
chosen on one half, with the first seed at the first sparsity, and the loss of the other half is told. Each cell is one
JSON line in --rows, and a cell that is there is not run again, so that a run goes on where it was cut off.

The table has the mean over tasks of the loss in nats a token, and its spread over seeds; after it, what the best of
ours wins against the best and the worst peer.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers
from quality_table import best_of, draw, margins, summarize
from rich.console import Console
from rich.table import Table

import modmoe
from modmoe.analysis.text.calibration import load_task
from modmoe.modeling.modular_ffn import ModularFFN
from modmoe.recipe.schema import make_recipe
from modmoe.training.evaluation.task_loss import evaluate
from modmoe.training.run import finetune

_ROUTED = {"assignment.method": "modules", "router.compensation": True}
_NARROW = {"partition.num_modules": "double"}
_FLAP = {"method": "prune", "assignment.score": "wifv", "router.compensation": True}
METHODS: dict[str, dict[str, Any]] = {
    # the model itself, fine-tuned like the others: what no sparsity costs
    "dense": {},
    # the model grown: four FFNs, two on; no sparsity, so in the table beside dense
    "upcycle": {"method": "upcycle", "assignment.num_experts": 4, "router.top_k": 2},
    "upcycle, half redrawn": {
        "method": "upcycle",
        "assignment.num_experts": 4,
        "router.top_k": 2,
        "upcycle.redrawn_fraction": 0.5,
    },
    # one mask for all tasks, neuron by neuron
    "prune magnitude": {"method": "prune", "assignment.score": "magnitude"},
    "prune random": {"method": "prune", "assignment.score": "random"},
    "prune wanda": {"method": "prune", "assignment.score": "wanda"},
    "prune flap": _FLAP,
    "prune flap, refit": {**_FLAP, "assignment.refit": True},
    # the same, of other text than the tasks'
    "prune flap, generic text": {**_FLAP, "generic": True},
    "prune wanda, generic text": {"method": "prune", "assignment.score": "wanda", "generic": True},
    # one mask a task, the task known
    "seap": {
        "partition.method": "contiguous",
        "partition.num_modules": "neurons",
        "assignment.score": "wifv",
        "router.routing": "task",
    },
    # published splits
    "cmoe": {"method": "cmoe"},
    "moefication": {"method": "moefication"},
    "moefication, similarity": {"method": "moefication", "router.kind": "linear"},
    "moefication, narrow, similarity": {"method": "moefication", "router.kind": "linear", **_NARROW},
    "moefication, coactivation, similarity": {
        "method": "moefication",
        "router.kind": "linear",
        "partition.method": "coactivation",
    },
    "emoe": {"method": "emoe"},
    "emoe, narrow": {"method": "emoe", **_NARROW},
    "emoe, random modules": {"method": "emoe", "partition.method": "random"},
    "emoe, bottom": {"method": "emoe", "choice": "bottom"},
    "llama_moe": {"method": "llama_moe"},
    "llama_moe, gradient": {"method": "llama_moe", "partition.method": "gradient"},
    # ours: experts are tasks
    "tasks, top_score": {},
    "tasks, greedy, refit": {
        "assignment.method": "greedy",
        "assignment.refit": True,
        "router.compensation": True,
    },
    "tasks, random experts": {"assignment.method": "random"},
    # ours: experts are found from tokens, or are the modules themselves
    "tokens 16, refit": {
        "assignment.method": "tokens",
        "assignment.num_experts": 16,
        "assignment.refit": True,
        "router.compensation": True,
    },
    "modules": _ROUTED,
    "modules, refit": {**_ROUTED, "assignment.refit": True},
    "modules, quarter shared, refit": {**_ROUTED, "assignment.refit": True, "assignment.shared_modules": "quarter"},
    "modules, average key, refit": {**_ROUTED, "assignment.refit": True, "router.start": "average_key"},
    "modules, average key, refit, no means": {
        "assignment.method": "modules",
        "assignment.refit": True,
        "router.start": "average_key",
    },
    "modules, narrow, refit": {**_ROUTED, **_NARROW, "assignment.refit": True},
    "modules, narrow, average key, refit": {
        **_ROUTED,
        **_NARROW,
        "assignment.refit": True,
        "router.start": "average_key",
    },
    "modules, narrow, average key, refit, no means": {
        **_NARROW,
        "assignment.method": "modules",
        "assignment.refit": True,
        "router.start": "average_key",
    },
    "modules, mlp, refit": {**_ROUTED, "assignment.refit": True, "router.kind": "mlp"},
    "modules, activations, refit": {**_ROUTED, "assignment.refit": True, "partition.method": "activations"},
    "modules, random partition": {**_ROUTED, "partition.method": "random"},
    "modules, router from zero": {**_ROUTED, "router.start": "zero"},
    # no method: the modules of the largest output are known beforehand, in training too
    "modules, oracle": {**_ROUTED, "choice": "oracle"},
    "moefication, oracle": {"method": "moefication", "router.kind": "linear", "choice": "oracle"},
}
WHOLE = ("dense", "upcycle", "upcycle, half redrawn")
"""What uses all neurons: run once, whatever the sparsities."""
Halves: TypeAlias = dict[str, dict[str, str]]
"""Half to task to file."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two methods, one seed, few steps: within a minute")
    parser.add_argument("--json", type=Path, help="write the table's rows here")
    parser.add_argument("--plot", type=Path, help="draw loss by active and by stored parameters here, as .svg or .png")
    parser.add_argument("--rows", type=Path, help="one JSON line a cell; what is there is not run again")
    parser.add_argument("--source", help="dense checkpoint; the shipped model if left out")
    parser.add_argument("--task", action="append", default=[], help="NAME=FILE to calibrate and train on")
    parser.add_argument("--eval", action="append", default=[], help="NAME=FILE held out")
    parser.add_argument("--methods", help="names to run, with ; between them; all if left out")
    parser.add_argument("--sparsities", default="0.5", help="such as 0.25,0.5,0.75")
    parser.add_argument("--num-modules", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rates", default="1", help="learning rates to choose from, as multiples of the default")
    parser.add_argument("--generic", help="FILE of text that belongs to no task, for masks that are not made for tasks")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=8192, help="calibration tokens of a task")
    parser.add_argument("--eval-tokens", type=int, default=8192, help="of each half of a task's held-out rows")
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--family", help="JSON of the recipe's family, for an architecture without a row")
    return parser.parse_args()


def recipe_of(args: argparse.Namespace, method: str, sparsity: float, seed: int, rate: float, tasks: Any) -> Any:
    """Return the recipe of a cell."""
    config = json.loads((Path(args.source) / "config.json").read_text(encoding="utf-8"))
    neurons, modules = config["intermediate_size"], args.num_modules
    named = {"neurons": neurons, "quarter": modules // 4, "eighth": modules // 8, "half": modules // 2}
    named |= {"double": 2 * modules, "few": max(size for size in range(1, modules) if neurons % size == 0)}
    settings = {key: named.get(value, value) for key, value in METHODS[method].items() if "." in key or key == "method"}
    return make_recipe(
        {
            "source": args.source,
            "tasks": tasks,
            "seed": seed,
            "trust_remote_code": args.trust_remote_code,
            "family": json.loads(args.family) if args.family else None,
            "calibration.tokens": args.tokens,
            "calibration.sequence_length": args.sequence_length,
            "partition.num_modules": args.num_modules,
            "assignment.active_fraction": 1 - sparsity,
            "finetune.max_steps": max(1, args.steps),
            "finetune.batch_size": args.batch_size,
            "finetune.learning_rate": rate * min(1e-3, max(5e-5, 0.1 / config["hidden_size"])),
            "finetune.sequence_length": args.sequence_length,
            "finetune.distill_from": args.source,
            "finetune.save_steps": 10**6,
            **settings,
        }
    )


def run_cell(args: argparse.Namespace, cell: dict[str, Any], tasks: Any, held_out: Any) -> dict[str, Any]:
    """Convert, measure, fine-tune and measure again."""
    recipe = recipe_of(args, cell["method"], cell["sparsity"], cell["seed"], cell["rate"], tasks)
    started_s = time.process_time()
    with tempfile.TemporaryDirectory() as name:
        model, found = args.source, {}
        if cell["method"] != "dense":
            model = f"{name}/converted"
            of = {"generic": args.generic} if METHODS[cell["method"]].get("generic") else tasks
            made = modmoe.convert(dataclasses.replace(recipe, tasks=of), model)
            found = {key: made["parameters"][key] for key in ("active", "stored")}
        with choosing(METHODS[cell["method"]].get("choice")):
            found["before"] = measure(model, held_out, args)
            if args.steps:
                finetune(model, f"{name}/tuned", recipe, eval_tasks={}, resume=False, overwrite=False)
                found["after"] = measure(f"{name}/tuned", held_out, args)
    return {**cell, **found, "cpu_s": round(time.process_time() - started_s, 1)}


@contextlib.contextmanager
def choosing(choice: str | None) -> Iterator[None]:
    """Choose otherwise than by a router's best: ``oracle``, by the modules' own outputs, or ``bottom``, its worst."""
    choose = ModularFFN._choose

    def chosen(self: ModularFFN, x: torch.Tensor, x_TD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            if choice == "oracle":
                hidden_TSm = self._hidden(x_TD).unflatten(-1, (self.stored_modules, self.module_size))
                down_DSm = self.down_proj.weight.unflatten(-1, (self.stored_modules, self.module_size))
                values_TE = torch.einsum("tsm,dsm->tsd", hidden_TSm, down_DSm).norm(dim=-1)
            else:
                values_TE = -self.router(x_TD)
            ids_TK = values_TE.topk(self.top_k, dim=1).indices
        return ids_TK, torch.full(ids_TK.shape, 1 / self.top_k, dtype=x_TD.dtype)

    if choice is not None:
        ModularFFN._choose = chosen  # type: ignore[method-assign]
    try:
        yield
    finally:
        ModularFFN._choose = choose  # type: ignore[method-assign]


def measure(model: str, held_out: Halves, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return what is measured of each task's halves, as TASK.choose and TASK.tell."""
    made = {}
    for half, files in held_out.items():
        # by the tasks' own names, which a model routed by task goes by
        found = evaluate(
            model,
            files,
            tokens=args.eval_tokens,
            sequence_length=args.sequence_length,
            trust_remote_code=args.trust_remote_code,
        )
        for task, values in found["tasks"].items():
            kept = ("loss", "bits_per_byte", "exact_match")
            made[f"{task}.{half}"] = {key: values[key] for key in kept if key in values}
    return made


def halves(tasks: dict[str, str], directory: Path) -> Halves:
    """Write each task's held-out rows as two files, to choose by and to tell."""
    made: Halves = {"choose": {}, "tell": {}}
    for task, file in tasks.items():
        rows = list(load_task(task, file))
        for number, half in enumerate(made):
            path = directory / f"{task}.{half}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in rows[number::2]), encoding="utf-8")
            made[half][task] = str(path)
    return made


@contextlib.contextmanager
def texts(args: argparse.Namespace) -> Iterator[tuple[dict[str, str], Halves]]:
    """Yield the files to train on and the halves of those held out; settle the source where none is given."""
    with tempfile.TemporaryDirectory() as name:
        if args.source is None:
            from modmoe.demo.corpus import write_task_files

            args.source = str(Path(modmoe.__file__).parent / "demo" / "model")
            made = {"train": 600, "held_out": 400}
            files = [
                write_task_files(Path(name) / split, split=split, rows_per_task=rows, seed=0)
                for split, rows in made.items()
            ]
            tasks, held = ({task: str(file) for task, file in of.items()} for of in files)
        else:
            tasks, held = (dict(item.split("=", 1) for item in items) for items in (args.task, args.eval))
        yield tasks, halves(held, Path(name))


def model_name(args: argparse.Namespace) -> str:
    """Return the name of the source's directory."""
    return Path(args.source).resolve().name


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    args = parse()
    transformers.utils.logging.disable_progress_bar()
    methods = args.methods.split(";") if args.methods else list(METHODS)
    if args.quick:
        args.seeds, args.steps, args.tokens, args.eval_tokens = 1, 5, 1024, 1024
        methods = ["tasks, top_score", "modules, refit"]
    with texts(args) as (tasks, held):
        known = [] if args.rows is None or not args.rows.exists() else args.rows.read_text().splitlines()
        cells = [json.loads(line) for line in known]
        keys = ("model", "method", "sparsity", "seed", "rate", "steps")
        done = {tuple(cell[key] for key in keys) for cell in cells}
        model, sparsities = model_name(args), [float(text) for text in args.sparsities.split(",")]
        for seed, sparsity, method in itertools.product(range(args.seeds), sparsities, methods):
            size = 0.0 if method in WHOLE else sparsity
            rates = [float(text) for text in args.rates.split(",")]
            if (seed, sparsity) != (0, sparsities[0]):
                swept = [cell for cell in cells if (cell["model"], cell["method"], cell["seed"]) == (model, method, 0)]
                rates = [best_of(c for c in swept if c["sparsity"] in (0.0, sparsities[0]))["rate"]] if swept else rates
            for rate in rates:
                cell = dict(zip(keys, (model, method, size, seed, rate, args.steps), strict=True))
                if tuple(cell.values()) in done:
                    continue
                done.add(tuple(cell.values()))
                cells.append(run_cell(args, cell, tasks, held))
                if args.rows is not None:
                    with args.rows.open("a", encoding="utf-8") as handle:
                        handle.write(json.dumps(cells[-1]) + "\n")
    # lines of other models or steps may lie in the same file
    mine = [cell for cell in cells if (cell["model"], cell["steps"]) == (model, args.steps)]
    rows = summarize(mine)
    table = Table(title=f"{model}: mean loss of the tasks, nats a token, {args.steps} steps")
    for column in ("sparsity", "method", "before", "after", "seeds", "active", "stored"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in rows:
        shown = [f"{row[w]:.3f} ± {row[w + '_spread']:.3f}" if w in row else "" for w in ("before", "after")]
        sizes = [f"{row[key]:,}" if key in row else "" for key in ("active", "stored")]
        table.add_row(f"{row['sparsity']:.0%}", row["name"], *shown, str(row["seeds"]), *sizes)
    Console(width=120).print(table)
    for size, when, mine, which, peer, won in margins(rows):
        print(f"{size:.0%} off, {when}: '{mine}' against the {which} peer, '{peer}': {won}")
    if args.plot:
        draw(rows, args.plot, model)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        device = f"{platform.processor() or 'cpu'}, {os.cpu_count()} cores"
        found = {"device": device, "date": datetime.date.today().isoformat(), "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
