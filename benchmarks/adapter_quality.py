"""Quality of routed adapters at one number of trainable parameters, against plain LoRA, each at its best rate.

    python benchmarks/adapter_quality.py [--quick] [--json FILE] [--model DIR --train FILE --eval FILE]

Without a model it adapts the one that ships with modmoe to its documentation task. Every method gets the same budget,
steps, tokens and sweep of learning rates; the rate is chosen on one half of the held-out rows, over all seeds, and the
loss (nats a token) is told on the other half.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table

import modmoe
from modmoe.adapters import CONFIGS, solve_budget
from modmoe.adapters.table import METHODS
from modmoe.errors import AdapterError
from modmoe.models.loading import load, load_tokenizer
from modmoe.recipe.schema import make_recipe
from modmoe.training.data import Collator, training_set
from modmoe.training.evaluation.task_loss import evaluate_model
from modmoe.training.run import training_arguments
from modmoe.training.trainer import DivergedError, ModularTrainer

LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "down_proj")
# the default net has more parameters than a model as small as these
SETTINGS: dict[str, dict[str, Any]] = {"ldmole": {"lambda_width": 16}}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, one rate, few steps: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--model", help="checkpoint; the shipped model if left out")
    parser.add_argument("--train", help="task file to learn")
    parser.add_argument("--eval", help="held-out task file")
    parser.add_argument("--method", action="append", default=[], help="of CONFIGS, or lora; all if left out")
    parser.add_argument("--budget", type=int, default=48_000, help="trainable parameters")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", default="1e-3,3e-3,1e-2", help="learning rates of the sweep")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=128)
    parser.add_argument("--eval-tokens", type=int, default=16384)
    return parser.parse_args()


def base_model(args: argparse.Namespace) -> Any:
    """Return the base model in float32; experts run one by one, since the grouped product is for GPUs."""
    model: Any = load(args.model, dtype=torch.float32, device="cpu")
    if hasattr(model, "set_experts_implementation") and getattr(model.config, "num_local_experts", 0):
        model.set_experts_implementation("eager")
    return model


def configuration(method: str, model: Any, budget: int) -> Any:
    """Return a method's configuration within the budget; None where it cannot be attached or made so small."""
    if method == "lora":
        sizes = [
            module.in_features + module.out_features
            for name, module in model.named_modules()
            if name.endswith(LORA_TARGETS) and hasattr(module, "in_features")
        ]
        rank = budget // sum(sizes)
        return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=list(LORA_TARGETS))
    settings = dict(SETTINGS.get(method, {}))
    if METHODS[method].adapter.kind == "linear":
        # one set of layers for all, so that the mixture alone is compared
        there = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "in_features")}
        settings["target_modules"] = [name for name in LORA_TARGETS if name in there]
    try:
        return solve_budget(method, model, budget, **settings)
    except AdapterError as error:
        Console(stderr=True).print(f"{method} is left out: {error}", highlight=False)
        return None


def one_run(args: argparse.Namespace, config: Any, rate: float, seed: int, held: dict[str, str]) -> dict[str, float]:
    """Train once and return the losses on both halves of the held-out rows, the parameters and the seconds a step."""
    torch.manual_seed(seed)
    model = base_model(args)
    tokenizer = load_tokenizer(args.model)
    recipe = make_recipe(
        {
            "tasks": {"task": args.train},
            "seed": seed,
            "device": "cpu",
            "finetune.learning_rate": rate,
            "finetune.max_steps": args.steps,
            "finetune.batch_size": args.batch_size,
            "finetune.sequence_length": args.sequence_length,
            "finetune.save_steps": args.steps + 1,
        }
    )
    data = training_set(
        tokenizer,
        recipe.tasks,
        sequence_length=args.sequence_length,
        num_sequences=args.steps * args.batch_size,
        seed=seed,
        experts=None,
        packing=True,
    )
    attached = get_peft_model(model, config)
    with tempfile.TemporaryDirectory() as states:
        trainer: Any = ModularTrainer(
            model=attached,
            args=training_arguments(Path(states), recipe, torch.device("cpu"), 64),
            data_collator=Collator(padding=tokenizer.pad_token_id or tokenizer.eos_token_id or 0, packing=True),
            train_dataset=data,
            processing_class=tokenizer,
            recipe=recipe.finetune,
        )
        trainable = sum(weight.numel() for weight in attached.parameters() if weight.requires_grad)
        started_s = time.perf_counter()
        trainer.train()
        step_s = (time.perf_counter() - started_s) / args.steps
    return {**losses(attached, tokenizer, held, args), "parameters": trainable, "step_s": step_s}


def losses(model: Any, tokenizer: Any, held: dict[str, str], args: argparse.Namespace) -> dict[str, float]:
    """Return the mean loss of each half of the held-out rows."""
    model.eval()
    found = evaluate_model(
        model,
        tokenizer,
        held,
        tokens=args.eval_tokens,
        sequence_length=args.sequence_length,
        batch_size=args.batch_size,
        seed=0,
    )
    return {name: values["loss"] for name, values in found.items()}


def halves(file: str, work: Path) -> dict[str, str]:
    """Write every second row of a held-out file to one file, the others to another."""
    lines = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)
    found = {}
    for name, start in (("choose", 0), ("told", 1)):
        path = work / f"{name}.jsonl"
        path.write_text("".join(lines[start::2]), encoding="utf-8")
        found[name] = str(path)
    return found


def sweep(args: argparse.Namespace, method: str, held: dict[str, str]) -> dict[str, Any] | None:
    """Run every rate and seed of a method and return its row at the best rate."""
    config = configuration(method, base_model(args), args.budget)
    if config is None:
        return None
    by_rate: dict[float, list[dict[str, float]]] = {}
    for rate in (float(word) for word in args.rates.split(",")):
        try:
            by_rate[rate] = [one_run(args, config, rate, seed, held) for seed in range(args.seeds)]
        except DivergedError:
            continue
        told = statistics.mean(run["told"] for run in by_rate[rate])
        Console(stderr=True).print(f"{method} at {rate:g}: {told:.4f}", highlight=False)
    best = min(by_rate, key=lambda rate: statistics.mean(run["choose"] for run in by_rate[rate]))
    values = [run["told"] for run in by_rate[best]]
    return {
        "name": method,
        "loss": statistics.mean(values),
        "spread": statistics.stdev(values) if len(values) > 1 else 0.0,
        "losses": values,
        "rate": best,
        "at_edge": best in (min(by_rate), max(by_rate)) and len(by_rate) > 1,
        "parameters": by_rate[best][0]["parameters"],
        "settings": {name: getattr(config, name) for name in ("r", "num_experts", "top_k") if hasattr(config, name)},
        "step_s": statistics.median(run["step_s"] for run in by_rate[best]),
        "rates": {
            str(rate): {half: [run[half] for run in runs] for half in ("choose", "told")}
            for rate, runs in by_rate.items()
        },
    }


def main() -> None:
    """Run all methods, print the table, write the rows."""
    args = parse()
    transformers.utils.logging.disable_progress_bar()
    if args.quick:
        args.seeds, args.steps, args.rates, args.eval_tokens = 1, 4, "3e-3", 1024
    methods = args.method or ["lora", *CONFIGS]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if args.model is None:
            from modmoe.demo.corpus import write_task_files

            args.model = str(Path(modmoe.__file__).parent / "demo" / "model")
            args.train = str(write_task_files(work / "train", split="train", rows_per_task=600, seed=0)["docs"])
            args.eval = str(write_task_files(work / "held", split="held_out", rows_per_task=200, seed=0)["docs"])
        held = halves(args.eval, work)
        base = losses(base_model(args), load_tokenizer(args.model), held, args)["told"]
        rows = [row for method in methods if (row := sweep(args, method, held)) is not None]
    lora = next((row["loss"] for row in rows if row["name"] == "lora"), None)
    for row in rows:
        row["ratio"] = None if lora is None else row["loss"] / lora
        row["bound"] = row["holds"] = None
    table = Table(title=f"loss in nats a token, mean of {args.seeds} seeds; without an adapter {base:.4f}")
    for column in ("method", "loss", "spread", "/ lora", "best rate", "parameters", "settings", "s / step"):
        table.add_column(column, justify="left" if column in ("method", "settings") else "right")
    for row in sorted(rows, key=lambda row: row["loss"]):
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.4f}"
        edge = " (edge)" if row["at_edge"] else ""
        settings = ", ".join(f"{key} {value}" for key, value in row["settings"].items() if value is not None)
        table.add_row(
            row["name"], f"{row['loss']:.4f}", f"{row['spread']:.4f}", ratio, f"{row['rate']:g}{edge}",
            f"{row['parameters']:,}", settings, f"{row['step_s']:.3f}",
        )  # fmt: skip
    Console().print(table)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        settings = {
            key: str(value) for key, value in vars(args).items() if key not in ("model", "train", "eval", "json")
        }
        found = {
            "device": platform.processor() or "cpu",
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "settings": settings,
            "model": Path(args.model).name,
            "task": Path(args.train).name,
            "without": base,
            "rows": rows,
        }
        args.json.write_text(json.dumps(found, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
