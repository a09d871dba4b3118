"""Speed of `generate` with a converted model against the dense one, and against the ceiling that its bytes allow.

    python benchmarks/generate.py [--quick] [--json FILE] [--device cpu|cuda]

Decoding one sequence reads every weight in use once a token. If FFNs are the share s of those bytes and a token uses
the part f of them, nothing can be faster than 1 / (1 - s (1 - f)) times the dense model: the ceiling. Models have
random weights, which cost as much as trained ones; an expert is the shared core and a run of its own, or, in the rows
named so, each of 32, 64 or 128 modules is an expert and the router picks as many as make up f, wherever they lie. A
ratio is the median over rounds of the ratio within a round; every variant generates in turn. On a CPU: processor time,
one thread.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import modmoe
from modmoe.modeling import configuration_modmoe, modeling_modmoe

MODULES, EXPERTS = 32, 3
OF_CEILING = 0.9
# (name, routing, way)
VARIANTS = [
    ("task", "task", "auto"),
    ("sequence", "sequence", "auto"),
    ("token", "token", "auto"),
    ("task, gather", "task", "gather"),
    ("token, gather", "token", "gather"),
    ("task, masked", "task", "masked"),
    *((f"{modules} modules", modules, "auto") for modules in (32, 64, 128)),
    *((f"{modules} modules, gather", modules, "gather") for modules in (32, 64, 128)),
]
"""The second is the routing of experts, or how many modules there are of which each is an expert."""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small model, few rounds: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=24, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtypes", default="bfloat16,float32")
    return parser.parse_args()


def dense_config(args: argparse.Namespace) -> Any:
    """Return a Llama's configuration: four times the width in the FFN, grouped-query attention, 32,000 words."""
    return transformers.LlamaConfig(
        hidden_size=args.width,
        intermediate_size=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.width // 64,
        num_key_value_heads=args.width // 256,
        vocab_size=32000,
        max_position_embeddings=1024,
        eos_token_id=None,
        bos_token_id=1,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def tied_model(args: argparse.Namespace, active: int, routing: str, dtype: torch.dtype) -> Any:
    """Return a tied model whose experts have ``active`` modules, half of them shared and stored first."""
    core = active // 2
    own = active - core
    return _tied(args, dtype, [[*range(core), *range(core + e * own, core + (e + 1) * own)] for e in range(EXPERTS)],
        num_modules=MODULES, shared_modules=core, routing=routing,
        default_expert="expert 1" if routing == "task" else None)  # fmt: skip


def routed_model(args: argparse.Namespace, active: int, modules: int, dtype: torch.dtype) -> Any:
    """Return a tied model each of whose ``modules`` modules is an expert, with ``active`` of MODULES chosen."""
    chosen = active * modules // MODULES
    return _tied(args, dtype, [[e] for e in range(modules)], num_modules=modules, num_experts_per_tok=chosen)


def _tied(args: argparse.Namespace, dtype: torch.dtype, modules_EA: list[list[int]], **fields: Any) -> Any:
    """Return a tied model whose experts have the modules named."""
    dense = dense_config(args)
    experts, stored = len(modules_EA), 1 + max(map(max, modules_EA))
    own = {
        "module_size": dense.intermediate_size // fields["num_modules"],
        "stored_modules": [stored] * dense.num_hidden_layers,
        "num_experts": experts,
        "expert_names": [f"expert {number}" for number in range(experts)],
        "modules_per_expert": len(modules_EA[0]),
        "dense_intermediate_size": dense.intermediate_size,
    }
    config = configuration_modmoe.ModMoELlamaConfig(**{**dense.to_dict(), **own, **fields})
    model = made(modeling_modmoe.ModMoELlamaForCausalLM, config, args.device, dtype)
    for layer in model.model.layers:
        member_ES = torch.zeros(experts, stored, dtype=torch.bool)
        for expert, held in enumerate(modules_EA):
            member_ES[expert, held] = True
        layer.mlp.membership.copy_(member_ES)
        layer.mlp.check_ranking()
    return model


def made(kind: Any, config: Any, device: str, dtype: torch.dtype) -> Any:
    """Return a model with small random weights, in evaluation mode."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = kind(config)
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02) if weight.dim() > 1 else weight.fill_(1.0)
    return model.eval()


def seconds_of(generate: Callable[[], Any], device: str) -> float:
    """Return the seconds of one call: of the processor on a CPU, by the clock on a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
    clock = time.perf_counter if device == "cuda" else time.process_time
    started_s = clock()
    generate()
    if device == "cuda":
        torch.cuda.synchronize()
    return clock() - started_s


def decoder(model: Any, args: argparse.Namespace) -> Callable[[], Any]:
    """Return a function that generates ``tokens`` tokens from a prompt of eight."""
    ids_BT = torch.arange(3, 11, device=args.device)[None]
    settings = transformers.GenerationConfig(
        max_new_tokens=args.tokens, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    return lambda: model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings)


def ceiling(model: Any, active: int) -> float:
    """Return how much faster than the dense model reading only the active modules can be, by bytes."""
    config = model.config
    ffn = 3 * config.hidden_size * config.intermediate_size * config.num_hidden_layers
    # a token reads one row of the embedding
    read = sum(weight.numel() for weight in model.parameters()) - model.get_input_embeddings().weight.numel()
    return 1 / (1 - ffn / read * (1 - active / MODULES))


def rows_of(args: argparse.Namespace, dtype: torch.dtype, active: int, variants: list[Any]) -> list[dict[str, Any]]:
    """Return the rows of one size of expert and one type."""
    dense = made(transformers.LlamaForCausalLM, dense_config(args), args.device, dtype)
    timed = {"dense": decoder(dense, args)}
    models: dict[str | int, Any] = {}
    for name, routing, way in variants:
        if routing not in models:
            make: Callable[..., Any] = tied_model if isinstance(routing, str) else routed_model
            models[routing] = make(args, active, routing, dtype)
        model, run = models[routing], decoder(models[routing], args)

        def switched(model: Any = model, way: str = way, run: Callable[[], Any] = run) -> Any:
            model.set_ffn_way(way)
            return run()

        timed[name] = switched
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_number in range(args.rounds + 1):
        for name, run in timed.items():
            found_s = seconds_of(run, args.device)
            if round_number:
                seconds[name].append(found_s)
    most = ceiling(dense, active)
    rows = []
    for name, *_ in variants:
        ratios = [a / b for a, b in zip(seconds["dense"], seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (ratios * 3)
        bound = OF_CEILING * most if name in ("task", "sequence") else None
        rows.append(
            {
                "name": f"dense / {name}",
                "size": f"{str(dtype).removeprefix('torch.')} {args.width} x {args.layers}",
                "sparsity": 1 - active / MODULES,
                "ratio": middle,
                "spread": (high - low) / 2,
                "ceiling": most,
                "of_ceiling": middle / most,
                "bound": bound,
                "holds": None if bound is None else middle >= bound,
                "tokens_per_second": args.tokens / statistics.median(seconds[name]),
                "dense_tokens_per_second": args.tokens / statistics.median(seconds["dense"]),
            }
        )
    return rows


def main() -> None:
    """Run all sizes, print the table, write the rows."""
    args = parse()
    variants = VARIANTS
    if args.quick:
        args.width, args.layers, args.tokens, args.rounds, args.dtypes = 1024, 2, 8, 3, "bfloat16"
        variants = VARIANTS[:2] + VARIANTS[6:7]
    if args.device == "cpu":
        torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.utils.logging.set_verbosity_error()
    rows = []
    for word in args.dtypes.split(","):
        for active in (MODULES // 2, MODULES // 4):
            rows += rows_of(args, getattr(torch, word), active, variants)
    table = Table(
        title=f"generate, {args.tokens} tokens, batch 1: times as fast as dense; ! misses {OF_CEILING} of the ceiling"
    )
    for column in ("model", "FFN sparsity", "ratio", "speed", "spread", "ceiling", "of it", "tokens/s"):
        table.add_column(column, justify="left" if column in ("model", "ratio") else "right")
    for row in rows:
        table.add_row(
            row["size"], f"{row['sparsity']:.0%}", row["name"], f"{row['ratio']:.2f}", f"{row['spread']:.2f}",
            f"{row['ceiling']:.2f}", f"{row['of_ceiling']:.2f}{' !' if row['holds'] is False else ''}",
            f"{row['tokens_per_second']:.1f}",
        )  # fmt: skip
    Console(width=110).print(table)
    if args.json:
        where = (
            torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.processor() or 'cpu'}, one thread"
        )
        found = {
            "device": where,
            "date": datetime.date.today().isoformat(),
            "versions": {
                "modmoe": modmoe.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "rows": rows,
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
