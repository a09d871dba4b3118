"""Speed of the tied FFN: one token, batches of a few, and prefill, against the dense FFN and against other mixtures.

    python benchmarks/runtime.py [--quick] [--json FILE] [--cases decode,batch,prefill]

All variants run in turn in one process, on one thread; a ratio is the median over rounds of the ratio within a round,
of processor time, since other processes may share the machine. Each call takes the next of several copies of the
weights, as a model's layers do, so that none are found in a cache. An expert is the shared modules and a window of
neighbours; a ``scattered`` one drew its modules at random.

    decode    one token of a named task; time over the dense FFN's. ``ours, dense``: the same formulation, all modules.
              ``stream``: adding up as many bytes as the dense FFN has, as float32, in one call of torch.
    batch     every token goes to a random expert of 16, half of whose modules are shared. ``duplicated``: the experts
              as matrices of their own, tokens sorted.
    prefill   one expert, and random ones; ``of ideal`` is the speed over the dense FFN's times the active fraction.
    others    transformers' own experts on the same duplicated weights, prefill of 512 tokens and a batch of 8.
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
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import modmoe
from modmoe.conversion.modular.assignment import assign_at_random, seriate
from modmoe.modeling.modular_ffn import ModularFFN
from modmoe.modeling.routing_modmoe import RoutingState

MODULES = 32
COPIES_BYTES = 800_000_000
"""Weights that calls go through before they come to the same ones again: many times the caches."""

Call = Callable[[int], Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one size, few rounds: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here; those of other cases in it are kept")
    parser.add_argument("--cases", default="decode,batch,prefill,others")
    parser.add_argument("--sizes", default="2048x8192,4096x11008")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--fractions", default="0.125,0.25,0.5")
    parser.add_argument("--rounds", type=int, default=9)
    return parser.parse_args()


def random_weight(rows: int, columns: int, dtype: torch.dtype) -> nn.Parameter:
    """Return a matrix of random rows, few of them different: drawing all takes longer than what is measured."""
    block = 0.02 * torch.randn(16, columns)
    return nn.Parameter(block.to(dtype).repeat(-(-rows // 16), 1)[:rows].clone(), requires_grad=False)


def empty_layer(width: int, size: int, member_ES: Tensor, routing: str, expert: int | None = None) -> ModularFFN:
    """Return a layer with these experts, its weights without memory."""
    experts, stored = member_ES.shape
    config = SimpleNamespace(
        hidden_size=width,
        stored_modules=[stored],
        module_size=size,
        num_experts=experts,
        num_experts_per_tok=1,
        modules_per_expert=int(member_ES[0].sum()),
        routing=routing,
        combine="union",
        routing_chunk=64,
        ffn_biases=[],
        ffn_gated=True,
        ffn_activation="silu",
        ffn_dropout=0.0,
        router_hidden=0,
        compensation=False,
        left_out_means=False,
        shared_modules=0,
    )
    with torch.device("meta"):
        ffn = ModularFFN(config, 0, RoutingState([str(number) for number in range(experts)], expert=expert))
    ffn.membership = member_ES.clone()
    ffn.ranking = torch.zeros(ffn.ranking.shape, dtype=torch.int32)
    ffn.check_ranking()
    return ffn.eval()


def tied_layers(width: int, neurons: int, dtype: torch.dtype, member_ES: Tensor, routing: str) -> list[ModularFFN]:
    """Return as many layers with the same experts as fill COPIES_BYTES, random weights in each."""
    experts, stored = member_ES.shape
    size = neurons // MODULES
    layers = []
    for _ in range(max(3, COPIES_BYTES // (3 * width * neurons * dtype.itemsize))):
        ffn = empty_layer(width, size, member_ES, routing)
        for linear, shape in (
            (ffn.gate_proj, (stored * size, width)),
            (ffn.up_proj, (stored * size, width)),
            (ffn.down_proj, (width, stored * size)),
        ):
            linear.weight = random_weight(*shape, dtype)
        if ffn.router is not None:
            ffn.router.weight = nn.Parameter(torch.randn(experts, width).to(dtype), requires_grad=False)
        layers.append(ffn)
    return layers


def windows_of(count: int, fraction: float, shared: float) -> Tensor:
    """Return a membership as conversion orders it: the shared modules first, then a window of neighbours an expert."""
    each = int(MODULES * fraction)
    core = int(each * shared)
    member_ES = torch.zeros(count, MODULES, dtype=torch.bool)
    member_ES[:, :core] = True
    first_E = torch.linspace(core, MODULES - (each - core), count).round().long()
    for expert, first in enumerate(first_E.tolist()):
        member_ES[expert, first : first + each - core] = True
    return member_ES


def scattered_of(count: int, fraction: float, shared: float) -> Tensor:
    """Return a membership, seriated, of experts that share some of their modules and draw the rest; all are stored."""
    each = int(MODULES * fraction)
    names = tuple(str(number) for number in range(count))
    core = int(each * shared)
    made = assign_at_random(torch.zeros(count, MODULES), names, modules_per_expert=each, shared_modules=core)
    order_S = seriate(made.membership_EM)
    left_out = torch.tensor(sorted(set(range(MODULES)) - set(order_S.tolist())), dtype=torch.long)
    return made.membership_EM[:, torch.cat([order_S, left_out])]


def dense_ffn(ffn: ModularFFN, x_TD: Tensor) -> Tensor:
    """The dense FFN as transformers computes it."""
    gate_TF = F.linear(x_TD, ffn.gate_proj.weight)
    return F.linear(F.silu(gate_TF) * F.linear(x_TD, ffn.up_proj.weight), ffn.down_proj.weight)


def measure(calls: dict[str, Call], rounds: int) -> dict[str, list[float]]:
    """Return the processor seconds of each variant, round by round; the calls get numbers that never repeat."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    number = 0
    for round_number in range(rounds + 1):
        for name, call in calls.items():
            number += 1
            started_s = time.process_time()
            call(number)
            if round_number:
                seconds[name].append(time.process_time() - started_s)
    return seconds


def row(
    seconds: dict[str, list[float]], name: str, base: str, case: str, *, scale: float, bound: float | None, most: bool
) -> dict[str, Any]:
    """Return a row: time of ``name`` over ``base`` (``most``) or the reverse, times ``scale``, and its bound."""
    pairs = zip(seconds[name], seconds[base], strict=True)
    ratios = [scale * (one / other if most else other / one) for one, other in pairs]
    low, value, high = statistics.quantiles(ratios, n=4)
    holds = None if bound is None else bool(value <= bound if most else value >= bound)
    kind = f"{name} / {base}" if most else f"{base} / {name}"
    measured_ms = 1e3 * statistics.median(seconds[name])
    found = {"case": case, "name": kind, "ratio": value, "bound": bound, "is_most": most, "holds": holds}
    return {**found, "spread": (high - low) / 2, "ms": measured_ms}


def decode_rows(width: int, neurons: int, dtype: torch.dtype, fraction: float, rounds: int) -> list[Any]:
    """One token of a named task. The ratio is over the active fraction: 1 is time in proportion to what is on."""
    x_1D = torch.randn(1, width).to(dtype)
    torch._dynamo.reset()
    layers = tied_layers(width, neurons, dtype, windows_of(8, fraction, 0.5), "task")
    for layer in layers:
        layer.state.expert = 3
    count, whole = len(layers), 3 * width * neurons
    long_N = torch.ones(COPIES_BYTES // 4)
    words = whole * dtype.itemsize // 4
    pieces = len(long_N) // words
    compiled = torch.compile(ModularFFN.forward, fullgraph=True, dynamic=False)
    compiled_dense = torch.compile(dense_ffn, fullgraph=True, dynamic=False)

    all_on = [copy_all_on(layer) for layer in layers]

    def stream(i: int) -> Any:
        return long_N[(i % pieces) * words : (i % pieces + 1) * words].sum()

    calls: dict[str, Call] = {
        "dense": lambda i: dense_ffn(layers[i % count], x_1D),
        "dense compiled": lambda i: compiled_dense(layers[i % count], x_1D),
        "runs": lambda i: layers[i % count](x_1D),
        "compiled": lambda i: compiled(layers[i % count], x_1D),
        "runs, all modules": lambda i: all_on[i % count](x_1D),
        "compiled, all modules": lambda i: compiled(all_on[i % count], x_1D),
        "stream": stream,
    }
    seconds = measure(calls, rounds)
    case = f"decode {width} {str(dtype).removeprefix('torch.')} {fraction:g}"
    eager = 1.3 if fraction == 0.125 else 1.2
    compiled_bound = (1.1 if fraction == 0.5 else 0.9) if dtype == torch.bfloat16 else None
    return [
        row(seconds, "runs", "dense", case, scale=1 / fraction, bound=eager, most=True),
        row(seconds, "compiled", "dense compiled", case, scale=1 / fraction, bound=compiled_bound, most=True),
        row(seconds, "compiled", "dense", case, scale=1 / fraction, bound=None, most=True),
        row(seconds, "runs", "runs, all modules", case, scale=1 / fraction, bound=None, most=True),
        row(seconds, "compiled", "compiled, all modules", case, scale=1 / fraction, bound=None, most=True),
        row(seconds, "runs", "stream", case, scale=1 / fraction, bound=None, most=True),
        row(seconds, "compiled", "stream", case, scale=1 / fraction, bound=None, most=True),
        row(seconds, "dense", "stream", case, scale=1, bound=None, most=True),
    ]


def copy_all_on(ffn: ModularFFN) -> ModularFFN:
    """Return a layer on the same weights with one expert that has every module."""
    every_1S = torch.ones(1, ffn.stored_modules, dtype=torch.bool)
    made = empty_layer(ffn.up_proj.in_features, ffn.module_size, every_1S, "task", expert=0)
    made.gate_proj, made.up_proj, made.down_proj = ffn.gate_proj, ffn.up_proj, ffn.down_proj
    return made


class Duplicated:
    """Every expert with copies of its modules, tokens sorted by expert."""

    def __init__(self, ffn: ModularFFN) -> None:
        size = ffn.module_size
        self.experts = []
        for member_S in ffn.membership:
            rows_N = (member_S.nonzero() * size + torch.arange(size)).flatten()
            down_DN = ffn.down_proj.weight[:, rows_N].contiguous()
            self.experts.append((ffn.gate_proj.weight[rows_N], ffn.up_proj.weight[rows_N], down_DN))

    def __call__(self, x_TD: Tensor, ids_T: Tensor) -> Tensor:
        order_T = ids_T.argsort(stable=True)
        sorted_TD = x_TD[order_T]
        found_TD, begin = torch.empty_like(sorted_TD), 0
        counts = ids_T.bincount(minlength=len(self.experts)).tolist()
        for (gate, up, down), count in zip(self.experts, counts, strict=True):
            if count:
                x_ND = sorted_TD[begin : begin + count]
                found_TD[begin : begin + count] = F.linear(F.silu(F.linear(x_ND, gate)) * F.linear(x_ND, up), down)
                begin += count
        return torch.empty_like(found_TD).index_copy_(0, order_T, found_TD)


def routed_rows(
    case: str,
    width: int,
    neurons: int,
    dtype: torch.dtype,
    *,
    tokens: int,
    experts: int,
    fraction: float,
    bounds: dict[str, float],
    rounds: int,
    others: bool = False,
    experts_of: Callable[[int, float, float], Tensor] = windows_of,
) -> list[dict[str, Any]]:
    """Tokens that each go to an expert drawn for them, half of the modules shared, against dense and duplicated."""
    layers = tied_layers(width, neurons, dtype, experts_of(experts, fraction, 0.5), "token")
    duplicated = [Duplicated(layer) for layer in layers[:2]]
    count = len(layers)
    x_TD = torch.randn(tokens, width).to(dtype)
    ids_T = [torch.randint(experts, (tokens,)) for _ in range(7)]
    one_TK = torch.ones(tokens, 1, dtype=dtype)
    calls: dict[str, Call] = {
        "dense": lambda i: dense_ffn(layers[i % count], x_TD),
        "runs": lambda i: layers[i % count]._sliced(x_TD, ids_T[i % 7].unsqueeze(1), one_TK),
        "duplicated": lambda i: duplicated[i % 2](x_TD, ids_T[i % 7]),
    }
    if others:
        for way in ("eager", "grouped_mm", "batched_mm"):
            if way == "batched_mm" and tokens > 64:
                continue  # it copies an expert for every token: hundreds of gigabytes
            theirs = transformers_experts(duplicated[0], width, way)
            calls[f"transformers {way}"] = lambda i, t=theirs: t(x_TD, ids_T[i % 7].unsqueeze(1), one_TK)
    seconds = measure(calls, rounds)
    found = [
        row(seconds, "runs", "dense", case, scale=1, bound=bounds.get("dense"), most=False),
        row(seconds, "runs", "dense", f"{case}, of ideal", scale=fraction, bound=bounds.get("ideal"), most=False),
        row(seconds, "runs", "duplicated", case, scale=1, bound=bounds.get("duplicated"), most=False),
        row(seconds, "duplicated", "dense", case, scale=1, bound=None, most=False),
    ]
    for name in calls:
        if name.startswith("transformers"):
            found.append(row(seconds, "runs", name, case, scale=1, bound=None, most=False))
    return found


def transformers_experts(duplicated: Duplicated, width: int, way: str) -> Any:
    """Return transformers' experts, computed in its way, on the weights of duplicated ones."""
    each = duplicated.experts[0][0].shape[0]
    config = transformers.MixtralConfig(
        hidden_size=width, intermediate_size=each, num_local_experts=len(duplicated.experts)
    )
    config._experts_implementation = way
    with torch.device("meta"):
        experts = MixtralExperts(config)
    gate_up = torch.stack([torch.cat([gate, up]) for gate, up, _ in duplicated.experts])
    experts.gate_up_proj = nn.Parameter(gate_up, requires_grad=False)
    down = torch.stack([down for _, _, down in duplicated.experts])
    experts.down_proj = nn.Parameter(down, requires_grad=False)
    return experts.eval()


def one_expert_rows(width: int, neurons: int, dtype: torch.dtype, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """A prompt of one task."""
    layers = tied_layers(width, neurons, dtype, windows_of(8, 0.25, 0.5), "task")
    for layer in layers:
        layer.state.expert = 3
    x_TD = torch.randn(tokens, width).to(dtype)
    count = len(layers)
    calls: dict[str, Call] = {
        "dense": lambda i: dense_ffn(layers[i % count], x_TD),
        "runs": lambda i: layers[i % count](x_TD),
    }
    case = f"prefill {width} {tokens} tokens, one expert, of ideal"
    return [row(measure(calls, rounds), "runs", "dense", case, scale=0.25, bound=0.95, most=False)]


def all_rows(args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    cases = args.cases.split(",")
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    dtypes = [getattr(torch, name) for name in args.dtypes.split(",")]
    few = {"rounds": args.rounds}
    if "decode" in cases:
        fractions = [float(number) for number in args.fractions.split(",")]
        for width, neurons in sizes:
            for dtype in dtypes:
                for fraction in fractions:
                    rows += decode_rows(width, neurons, dtype, fraction, args.rounds)
    if "batch" in cases:
        for dtype in dtypes:
            for tokens in (4, 8, 16):
                case = f"batch 2048 {str(dtype).removeprefix('torch.')} {tokens} tokens, 16 experts, 1/4"
                never = {"dense": 1.0, "duplicated": 1.0}
                rows += routed_rows(
                    case, 2048, 8192, dtype, tokens=tokens, experts=16, fraction=0.25, bounds=never, **few
                )
    if "prefill" in cases:
        low = torch.bfloat16
        rows += one_expert_rows(2048, 8192, low, 512, args.rounds)
        for tokens, experts, bounds in ((2048, 8, {"ideal": 0.85}), (512, 16, {"duplicated": 1.4})):
            case = f"prefill 2048 {tokens} tokens, {experts} experts, 1/4"
            rows += routed_rows(
                case, 2048, 8192, low, tokens=tokens, experts=experts, fraction=0.25, bounds=bounds, **few
            )
            adverse = {"fraction": 0.25, "bounds": {}, "experts_of": scattered_of, **few}
            rows += routed_rows(f"{case}, scattered", 2048, 8192, low, tokens=tokens, experts=experts, **adverse)
    if "others" in cases:
        for tokens in (8, 512):
            case = f"others 2048 {tokens} tokens, 8 experts, 1/4"
            rows += routed_rows(
                case, 2048, 8192, torch.bfloat16, tokens=tokens, experts=8, fraction=0.25, bounds={}, others=True, **few
            )
    return rows


def main() -> None:
    args = parse()
    if args.quick:
        args.cases, args.sizes, args.dtypes, args.fractions, args.rounds = "decode", "2048x8192", "bfloat16", "0.25", 5
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    rows = all_rows(args)
    table = Table(title="speed of the tied FFN; ! misses its bound; decode: time over the active fraction")
    for name in ("case", "ratio", "", "spread", "bound", "ms"):
        table.add_column(name, justify="left" if name in ("case", "ratio") else "right")
    for found in rows:
        sign = "<=" if found["is_most"] else ">="
        bound = "" if found["bound"] is None else f"{sign} {found['bound']}"
        value = f"{found['ratio']:.2f}{' !' if found['holds'] is False else ''}"
        table.add_row(found["case"], found["name"], value, f"{found['spread']:.2f}", bound, f"{found['ms']:.2f}")
    Console(width=140).print(table)
    if args.json:
        known = json.loads(args.json.read_text())["rows"] if args.json.exists() else []
        new = {(found["case"], found["name"]) for found in rows}
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        result = {
            "device": f"{platform.processor() or 'cpu'}, one thread",
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "rows": [old for old in known if (old["case"], old["name"]) not in new] + rows,
        }
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
