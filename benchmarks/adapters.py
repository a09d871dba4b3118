"""Speed of mixtures of LoRA at one linear layer, forward and backward: against plain LoRA, and against a loop.

    python benchmarks/adapters.py [--quick] [--json FILE [--add]]

All variants run in turn in one process, on one thread; a ratio is the median over rounds of the ratio within a round,
of processor time, since other processes may share the machine. ``plain r`` and ``plain N r`` are LoRA of one expert's
rank and of all experts' ranks together, the arithmetic that a mixture cannot go below; ``loop`` goes from one
expert's whole LoRA to the next and weighs each output; ``+ frozen`` counts the layer that the adapter sits on.
In bfloat16 the mixtures take the gradients of their narrow weights by a faster product than plain LoRA, which is left
as torch computes it.
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
from torch import Tensor, nn
from torch.nn import functional as F

import modmoe
from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.passes import Frame, Pass
from modmoe.adapters.table import METHODS

# (name, method, settings beyond r and num_experts, bound over plain N r, bound over plain r)
VARIANTS: list[tuple[str, str, dict[str, Any], float | None, float | None]] = [
    ("molora, soft", "molora", {}, 1.4, None),
    ("molora, top 2", "molora", {"top_k": 2}, 1.4, None),
    ("perft_r, top 2", "perft_r", {"top_k": 2}, 1.4, None),
    ("hydralora", "hydralora", {}, None, None),
    ("adamole", "adamole", {}, None, None),
    ("ldmole", "ldmole", {}, None, None),
    ("comol", "comol", {}, None, 1.6),
    ("comol, router on x", "comol", {"core_routing": False}, None, None),
    ("moslora", "moslora", {}, None, None),
]
LOOP_BOUND = 4.0
FROZEN_BOUND = 1.1


class Plain(nn.Module):
    """LoRA as it is."""

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down_RD = nn.Parameter(0.03 * torch.randn(rank, width))
        self.up_OR = nn.Parameter(0.03 * torch.randn(width, rank))

    def forward(self, x_TD: Tensor) -> Tensor:
        return F.linear(F.linear(x_TD, self.down_RD), self.up_OR)


class Loop(nn.Module):
    """LoRAs, one after the other, each output times its weight."""

    def __init__(self, width: int, rank: int, experts: int) -> None:
        super().__init__()
        self.loras = nn.ModuleList(Plain(width, rank) for _ in range(experts))
        self.router_ED = nn.Parameter(0.03 * torch.randn(experts, width))

    def forward(self, x_TD: Tensor) -> Tensor:
        weights_TE = F.linear(x_TD.float(), self.router_ED.float()).softmax(-1).to(x_TD.dtype)
        total = torch.zeros_like(x_TD)
        for index, lora in enumerate(self.loras):
            total = total + weights_TE[:, index : index + 1] * lora(x_TD)
        return total


class OnFrame(nn.Module):
    """An adapter's delta in a pass of its own; a module, so that its gradients start from none as plain LoRA's do."""

    def __init__(self, adapter: Any) -> None:
        super().__init__()
        self.adapter = adapter

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.adapter.delta(x_TD, Frame(0, Pass()))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--add", action="store_true", help="keep the rows of other sizes that the file has: one a run")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--widths", default="1024,2048")
    parser.add_argument("--ranks", default="8,16")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=15)
    return parser.parse_args()


def adapter(method: str, width: int, rank: int, experts: int, dtype: torch.dtype, settings: dict[str, Any]) -> Any:
    """Return a method's adapter at a square layer, moved off its start, without dropout."""
    kind, chosen = METHODS[method]
    sizes = {"r": rank, "num_experts": experts, "lora_dropout": 0.0}
    known = {name: value for name, value in sizes.items() if hasattr(chosen(), name)}
    made = kind(chosen(**known, **settings), shape := SiteShape(inputs=width, outputs=width), "layer")
    shared = nn.Module()
    for name, size in kind.shared_shapes(made.settings, shape).items():
        weight = torch.empty(size)
        kind.reset_shared(made.settings, name, weight)
        shared.register_parameter(name, nn.Parameter(weight.to(dtype)))
    made.shared = [shared]
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if name.startswith("up"):
                weight.normal_(std=0.03)
    return made.to(dtype)


def calls(width: int, rank: int, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return what is timed by name: the adapters alone, and with a frozen layer those that have a bound there."""
    frozen_OD = 0.03 * torch.randn(width, width, dtype=dtype)
    found: dict[str, Callable[[Tensor], Tensor]] = {
        "plain r": Plain(width, rank).to(dtype),
        "plain N r": Plain(width, rank * args.experts).to(dtype),
        "loop": Loop(width, rank, args.experts).to(dtype),
    }
    for name, method, settings, _, _ in VARIANTS:
        found[name] = OnFrame(adapter(method, width, rank, args.experts, dtype, settings))
    for name in ("plain r", "comol"):
        inner = found[name]
        found[f"{name} + frozen"] = lambda x_TD, inner=inner: F.linear(x_TD, frozen_OD) + inner(x_TD)
    return found


def measure(width: int, rank: int, args: argparse.Namespace, dtype: torch.dtype) -> dict[str, list[float]]:
    """Return the processor seconds of each variant, round by round."""
    timed = calls(width, rank, args, dtype)
    x_TD = torch.randn(args.tokens, width, dtype=dtype, requires_grad=True)
    grad_TD = torch.randn(args.tokens, width, dtype=dtype)
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_number in range(args.rounds + 2):
        for name, call in timed.items():
            x_TD.grad = None
            if isinstance(call, nn.Module):
                call.zero_grad()
            started_s = time.process_time()
            call(x_TD).backward(grad_TD)
            if round_number >= 2:
                seconds[name].append(time.process_time() - started_s)
    return seconds


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float]:
    """Return the median ratio of two variants over rounds, and half the distance of its quartiles."""
    ratios = [one / other for one, other in zip(seconds[name], seconds[base], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return statistics.median(ratios), (high - low) / 2


def rows_of(seconds: dict[str, list[float]], size: str) -> list[dict[str, Any]]:
    """Return the rows of one size, each with its bound where there is one."""
    rows = []

    def add(name: str, over: str, bound: float | None, *, at_least: bool = False) -> None:
        value, spread = ratio(seconds, over, name) if at_least else ratio(seconds, name, over)
        holds = None if bound is None else (value >= bound if at_least else value <= bound)
        kind = f"{over} / {name}" if at_least else f"{name} / {over}"
        rows.append({"name": kind, "size": size, "ratio": value, "spread": spread, "bound": bound, "holds": holds})

    for name, method, _, over_all, over_one in VARIANTS:
        add(name, "plain r", over_one)
        add(name, "plain N r", over_all)
        if method != "moslora":
            add(name, "loop", LOOP_BOUND if over_all else None, at_least=True)
    add("comol + frozen", "plain r + frozen", FROZEN_BOUND)
    return rows


def main() -> None:
    args = parse()
    if args.quick:
        args.widths, args.ranks, args.dtypes, args.rounds = "1024", "8", "float32", 3
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    if args.add and args.json and args.json.exists():
        rows = json.loads(args.json.read_text(encoding="utf-8"))["rows"]
    for dtype in args.dtypes.split(","):
        for width in map(int, args.widths.split(",")):
            for rank in map(int, args.ranks.split(",")):
                size = f"{dtype} {width} r{rank}"
                rows = [row for row in rows if row["size"] != size]
                rows += rows_of(measure(width, rank, args, getattr(torch, dtype)), size)
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    table = Table(title=f"forward + backward, {args.tokens} tokens, {args.experts} experts; ! misses its bound")
    table.add_column("ratio")
    table.add_column("bound", justify="right")
    for size in sizes:
        table.add_column(size.replace("bfloat", "bf").replace("float", "f"), justify="right")
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = {row["size"]: row for row in rows if row["name"] == name}
        first = next(iter(mine.values()))
        sign = ">=" if " / " in name and name.startswith("loop") else "<="
        bound = "" if first["bound"] is None else f"{sign} {first['bound']}"
        cells = [f"{row['ratio']:.2f}{'' if row['holds'] is not False else ' !'}" for row in mine.values()]
        table.add_row(name, bound, *cells)
    Console(width=max(100, 34 + 15 * len(sizes))).print(table)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        found = {
            "device": f"{platform.processor() or 'cpu'}, one thread",
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "rows": rows,
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
