"""Quality at one active size: shared modules against static pruning, both fine-tuned on the same tokens.

    python benchmarks/quality.py [--quick] [--json FILE] [--source DIR --task NAME=FILE ... --eval NAME=FILE ...]

Without a source it runs on the model that ships with modmoe. The control is what most papers leave out: one static mask
of the same active size, chosen on all tasks together, fine-tuned with the same data, steps and teacher. Prints the loss
(nats a token) of each task for the dense model, the converted one and the control, before and after fine-tuning, over
several seeds.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import modmoe
from modmoe.analyze.calibration import load_task
from modmoe.convert.run import convert
from modmoe.export.run import export
from modmoe.finetune.evaluate import evaluate
from modmoe.finetune.train import finetune
from modmoe.recipe import make_recipe


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, few steps: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--source", help="dense checkpoint; the shipped model if left out")
    parser.add_argument("--task", action="append", default=[], help="NAME=FILE to calibrate and train on")
    parser.add_argument("--eval", action="append", default=[], help="NAME=FILE held out")
    parser.add_argument("--num-modules", type=int, default=16)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--routing", default="token")
    parser.add_argument("--tokens", type=int, default=32768, help="calibration tokens of a task")
    parser.add_argument("--eval-tokens", type=int, default=16384)
    parser.add_argument("--trust-remote-code", action="store_true")
    parser.add_argument("--family", help="JSON of the recipe's family, for an architecture without a row")
    return parser.parse_args()


def one_seed(args: argparse.Namespace, tasks: dict[str, str], held_out: dict[str, str], seed: int) -> dict[str, Any]:
    """Convert, fine-tune and measure both ways once; return the losses by model and task."""
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        merged = work / "all.jsonl"
        with merged.open("w", encoding="utf-8") as handle:
            for task, file in tasks.items():
                handle.writelines(json.dumps(row) + "\n" for row in text_rows(task, file))
        shared = {
            "source": args.source,
            "seed": seed,
            "trust_remote_code": args.trust_remote_code,
            "family": json.loads(args.family) if args.family else None,
            "partition.num_modules": args.num_modules,
            "finetune.max_steps": args.steps,
            "finetune.distill_from": args.source,
        }
        modular = make_recipe(
            {**shared, "tasks": tasks, "router.routing": args.routing, "calibration.tokens": args.tokens}
        )
        static = make_recipe(
            {**shared, "tasks": {"all": str(merged)}, "router.routing": "task", "calibration.tokens": 3 * args.tokens}
        )
        trained = make_recipe({**shared, "tasks": tasks})
        convert(modular, str(work / "modular"))
        convert(static, str(work / "static-tied"))
        trust = args.trust_remote_code
        tied, static_dense = str(work / "static-tied"), str(work / "static")
        export(tied, static_dense, form="dense", expert="all", verify=False, trust_remote_code=trust)
        losses = {"dense": measure(args.source, held_out, args)}
        for kind in ("modular", "static"):
            losses[kind] = measure(str(work / kind), held_out, args)
            tuned = str(work / f"{kind}-tuned")
            finetune(str(work / kind), tuned, trained, eval_tasks={}, resume=False, overwrite=False)
            losses[f"{kind}, fine-tuned"] = measure(tuned, held_out, args)
        shutil.rmtree(work / "modular")
    return losses


def text_rows(task: str, file: str) -> list[dict[str, Any]]:
    """Return a task's rows as plain text, so that rows of different forms fit into one file."""
    rows = load_task(task, file)
    if "text" in rows.column_names:
        return [{"text": row["text"]} for row in rows]
    return [{"text": f"{row['prompt']}{row['completion']}"} for row in rows]


def measure(model: str, held_out: dict[str, str], args: argparse.Namespace) -> dict[str, float]:
    """Return the loss of each held-out task."""
    found = evaluate(model, held_out, tokens=args.eval_tokens, trust_remote_code=args.trust_remote_code)
    return {task: values["loss"] for task, values in found["tasks"].items()}


def main() -> None:
    """Run all seeds, print the table, write the rows."""
    args = parse()
    transformers.utils.logging.disable_progress_bar()
    if args.quick:
        args.seeds, args.steps, args.tokens, args.eval_tokens = 1, 20, 4096, 4096
    with tempfile.TemporaryDirectory() as name:
        if args.source is None:
            from modmoe.demo.corpus import write_task_files

            args.source = str(Path(modmoe.__file__).parent / "demo" / "model")
            tasks = write_task_files(Path(name) / "train", split="train", rows_per_task=600, seed=0)
            held = write_task_files(Path(name) / "held", split="held_out", rows_per_task=200, seed=0)
            tasks, held = ({k: str(v) for k, v in files.items()} for files in (tasks, held))
        else:
            tasks, held = (dict(item.split("=", 1) for item in items) for items in (args.task, args.eval))
        runs = [one_seed(args, tasks, held, seed) for seed in range(args.seeds)]
    table = Table(title=f"loss in nats a token, median of {args.seeds} seeds (range)")
    table.add_column("model")
    for task in held:
        table.add_column(task, justify="right")
    rows = []
    for kind in runs[0]:
        cells = []
        for task in held:
            values = [run[kind][task] for run in runs]
            middle = statistics.median(values)
            cells.append(f"{middle:.3f} ({min(values):.3f} to {max(values):.3f})")
            ratio = middle / statistics.median(run["dense"][task] for run in runs)
            rows.append({"name": f"{kind}: {task}", "ratio": ratio, "bound": None, "holds": None, "losses": values})
        table.add_row(kind, *cells)
    Console().print(table)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        found = {"device": platform.processor() or "cpu", "versions": versions, "settings": vars(args), "rows": rows}
        args.json.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
