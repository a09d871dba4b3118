"""How fast the models of quality.py's table decode: times as fast as the dense model, a line a method and sparsity.

    python benchmarks/quality_speed.py [--quick] [the options of quality.py] --rows quality_speed.jsonl

Each method converts the model anew, with the first seed and without training, which does not change what a token costs.
Dense and converted model then generate in turn, one sequence each, on one thread, by processor time; the ratio is the
median of the rounds'. What is in --rows already is not run again. quality_table.py draws the last of its pictures from
those lines. On models as small as these a token's time is mostly that of Python and of starting products:
benchmarks/generate.py has widths that matter.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
import tempfile
from typing import Any

import quality
import torch
import transformers
from generate import seconds_of
from rich.console import Console
from rich.table import Table

import modmoe
from modmoe.models.loading import load, load_tokenizer

ROUNDS, TOKENS = 7, 48
PROMPT = "Once upon a time"


def seconds(model: Any, tokenizer: Any) -> float:
    """Return the seconds that a model takes to generate TOKENS tokens behind the prompt."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    settings = transformers.GenerationConfig(
        do_sample=False, min_new_tokens=TOKENS, max_new_tokens=TOKENS, use_cache=True, pad_token_id=0
    )
    ids_BT, mask_BT = inputs["input_ids"], inputs["attention_mask"]
    return seconds_of(lambda: model.generate(ids_BT, attention_mask=mask_BT, generation_config=settings), "cpu")


def main() -> None:
    """Run what is missing, print the table, write the rows."""
    args = quality.parse()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    methods = [name for name in (args.methods.split(";") if args.methods else quality.METHODS) if name != "dense"]
    if args.quick:
        methods, args.tokens = ["modules, refit"], 1024
    with quality.texts(args) as (tasks, _):
        known = [] if args.rows is None or not args.rows.exists() else args.rows.read_text().splitlines()
        lines = {(line["model"], line["method"], line["sparsity"]): line for line in map(json.loads, known)}
        name, trust = quality.model_name(args), args.trust_remote_code
        tokenizer = load_tokenizer(args.source, trust_remote_code=trust)
        dense = load(args.source, trust_remote_code=trust).eval()
        for sparsity, method in itertools.product(map(float, args.sparsities.split(",")), methods):
            key = (name, method, 0.0 if method in quality.WHOLE else sparsity)
            if key in lines:
                continue
            recipe = quality.recipe_of(args, method, sparsity, 0, 1.0, tasks)
            of = {"generic": args.generic} if quality.METHODS[method].get("generic") else tasks
            with tempfile.TemporaryDirectory() as directory:
                modmoe.convert(dataclasses.replace(recipe, tasks=of), f"{directory}/converted")
                made = load(f"{directory}/converted", trust_remote_code=trust).eval()
                models = (dense, made)
                # the first round warms up
                taken_s = [[seconds(model, tokenizer) for model in models] for _ in range(ROUNDS + 1)][1:]
            low, middle, high = statistics.quantiles((its / mine for its, mine in taken_s), n=4)
            lines[key] = dict(zip(("model", "method", "sparsity"), key, strict=True)) | {
                "speed": round(middle, 4),
                "spread": round((high - low) / 2, 4),
                "tokens_per_s": round(TOKENS / statistics.median(mine for _, mine in taken_s), 1),
            }
            if args.rows is not None:
                with args.rows.open("a", encoding="utf-8") as handle:
                    handle.write(json.dumps(lines[key]) + "\n")
    table = Table(title=f"{name}: decoding, times as fast as the dense model")
    for column in ("sparsity", "method", "speed", "spread", "tokens/s"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for (model, method, sparsity), line in lines.items():
        if model == name:
            shown = (f"{line[key]:.2f}" for key in ("speed", "spread", "tokens_per_s"))
            table.add_row(f"{sparsity:.0%}", method, *shown)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
