"""Balanced clustering of neurons: the sum of squares and time against k_means_constrained; the assignment's optimum.

    python benchmarks/clustering.py [--quick] [--json FILE [--add]] [--model DIR ... --text FILE]
                                    [--parts assignment,start,layers,planted,real] [--sizes 5632x16,...]

Planted features are rows of unit length around directions of unequal numbers of neurons, with noise. Real ones, of each
--model: the rows of the gate, and what the neurons do over 1024 tokens of --text. k_means_constrained (the extra `kmc`)
runs once, on all columns, on one thread like the rest; where it is not installed its rows are left out. Times are of
the processor, since other processes may share the machine. Sums of squares are on all columns.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.table import Table
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import kmeans_plusplus
from torch import Tensor

import modmoe
from modmoe.analysis.balance import assign_balanced
from modmoe.analysis.partitions.activations import activation_features
from modmoe.analysis.partitions.kmeans import balanced_kmeans, cut_by_keys, improve, key_features
from modmoe.analysis.partitions.table import cut_layers
from modmoe.analysis.passes.stream import WholeModel
from modmoe.analysis.profile import profile_model
from modmoe.analysis.text.calibration import load_task, token_batches
from modmoe.models.families import FAMILIES, family_of
from modmoe.models.ffn_layout import FFNWeights, read_ffn
from modmoe.models.loading import load, load_tokenizer
from modmoe.storage.checkpoint import Checkpoint

try:
    from k_means_constrained import KMeansConstrained
except ImportError:
    KMeansConstrained = None

SQUARES_BOUND = 1.01
TIME_BOUND = 0.2
EXACT_BOUND = 1 + 1e-12
COLUMNS = 1024
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, one round: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has and this run has not")
    parser.add_argument("--parts", default="assignment,start,layers,planted,real")
    parser.add_argument("--sizes", default=",".join(f"{f}x{m}" for f in (5632, 11008) for m in (16, 32, 64)))
    parser.add_argument("--rounds", type=int, default=3, help="seeds of each size")
    parser.add_argument("--model", action="append", default=[], help="checkpoint of real features; repeatable")
    parser.add_argument("--text", help="what the models read")
    parser.add_argument("--trust-remote-code", action="store_true")
    return parser.parse_args()


def planted(neurons: int, num_modules: int, seed: int = 0) -> Tensor:
    """Return rows of unit length in twice as many groups as modules, of 1 to 7 times as many neurons."""
    generator = torch.Generator().manual_seed(seed)
    share = 0.25 + 1.5 * torch.rand(2 * num_modules, generator=generator)
    group_F = torch.multinomial(share, neurons, replacement=True, generator=generator)
    rows_FX = torch.randn(2 * num_modules, COLUMNS, generator=generator)[group_F]
    noise_F1 = 1 + torch.rand(neurons, 1, generator=generator)
    rows_FX += noise_F1 * torch.randn(neurons, COLUMNS, generator=generator)
    return rows_FX / rows_FX.norm(dim=1, keepdim=True)


def squares(features_FX: Tensor, module_F: Tensor) -> float:
    """Return the sum of squares within the modules, all of one size."""
    rows_FX = features_FX.double()
    total_MX = rows_FX.new_zeros(int(module_F.max()) + 1, rows_FX.shape[1]).index_add_(0, module_F, rows_FX)
    return float(rows_FX.square().sum() - total_MX.square().sum() * len(total_MX) / len(rows_FX))


def timed(call: Callable[[], Any]) -> tuple[Any, float]:
    started_s = time.process_time()
    found = call()
    return found, time.process_time() - started_s


def by_constrained(features_FX: Tensor, num_modules: int, seed: int) -> Tensor:
    size = len(features_FX) // num_modules
    found = KMeansConstrained(num_modules, size_min=size, size_max=size, n_init=1, random_state=seed)
    return torch.from_numpy(found.fit(features_FX.numpy()).labels_).long()


def by_plusplus(features_FX: Tensor, num_modules: int, seed: int) -> Tensor:
    """Return the modules of the same steps from centres of k-means++, which the bisection stands in for."""
    rows_FX = features_FX
    if rows_FX.shape[1] > 256:
        generator = torch.Generator().manual_seed(seed)
        rows_FX = rows_FX @ (torch.randn(rows_FX.shape[1], 256, generator=generator) / 16)
    rows_FX = rows_FX.double()
    centres, _ = kmeans_plusplus(rows_FX.numpy(), num_modules, random_state=seed)
    centre_MX = torch.as_tensor(centres)
    module_F, _ = assign_balanced(centre_MX.square().sum(1) - 2 * rows_FX @ centre_MX.T)
    module_F = improve(rows_FX, module_F, num_modules, 6)
    return module_F if rows_FX.shape == features_FX.shape else improve(features_FX, module_F, num_modules, 2)


def row(name: str, ratios: list[float], bound: float | None, **more: Any) -> Row:
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else (0, 0, 0)
    value = statistics.median(ratios)
    holds = None if bound is None else value <= bound
    return {"name": name, "ratio": value, "spread": (high - low) / 2, "bound": bound, "holds": holds, **more}


def compare(
    name: str, features_FX: Tensor, num_modules: int, rounds: int, other: str, way: Callable[[Tensor, int, int], Tensor]
) -> Iterator[Row]:
    """Yield the sum of squares and the time of balanced_kmeans over those of another way, round by round."""
    values: list[tuple[float, float, float, float]] = []
    for seed in range(rounds):
        mine_F, mine_s = timed(lambda seed=seed: balanced_kmeans(features_FX, num_modules, seed))
        theirs_F, theirs_s = timed(lambda seed=seed: way(features_FX, num_modules, seed))
        values.append((squares(features_FX, mine_F), squares(features_FX, theirs_F), mine_s, theirs_s))
    mine, theirs, mine_s, theirs_s = (list(column) for column in zip(*values, strict=True))
    bounds = (SQUARES_BOUND, TIME_BOUND) if way is by_constrained else (None, None)
    # below these sizes a fifth of the time is a matter of milliseconds
    bounds = (bounds[0], bounds[1] if len(features_FX) >= 5632 else None)
    ratios = [a / b for a, b in zip(mine, theirs, strict=True)]
    yield row(f"{name}: squares / {other}", ratios, bounds[0], ours=mine, theirs=theirs)
    ratios = [a / b for a, b in zip(mine_s, theirs_s, strict=True)]
    yield row(f"{name}: time / {other}", ratios, bounds[1], ours_s=mine_s, theirs_s=theirs_s)


def costs(neurons: int, num_modules: int) -> tuple[Tensor, Tensor]:
    """Return squared distances, but for a term of each row, to the centres of k-means after one step and after two."""
    rows_FX = planted(neurons, num_modules).double()
    found = []
    for steps in (1, 2):
        module_F = balanced_kmeans(rows_FX, num_modules, 0, steps)
        centre_MX = torch.zeros(num_modules, COLUMNS, dtype=torch.float64).index_add_(0, module_F, rows_FX)
        centre_MX *= num_modules / neurons
        found.append(centre_MX.square().sum(1) - 2 * rows_FX @ centre_MX.T)
    return found[0], found[1]


def assignment_rows(sizes: list[tuple[int, int]], slots_sizes: list[tuple[int, int]], rounds: int) -> Iterator[Row]:
    for neurons, num_modules in slots_sizes:
        cost_FM, _ = costs(neurons, num_modules)
        (bin_F, _), mine_s = timed(lambda cost_FM=cost_FM: assign_balanced(cost_FM))
        slots = cost_FM.repeat_interleave(neurons // num_modules, dim=1).numpy()
        chosen, best_s = timed(lambda slots=slots: linear_sum_assignment(slots))
        mine, best = float(cost_FM.gather(1, bin_F[:, None]).sum()), float(slots[chosen].sum())
        name = f"assignment {neurons} x {num_modules}"
        # both are sums of squares once the rows' own squares, which are 1, are added
        yield row(f"{name}: squares / linear_sum_assignment", [(neurons + mine) / (neurons + best)], EXACT_BOUND)
        yield row(f"{name}: time / linear_sum_assignment", [mine_s / best_s], None, ours_s=mine_s, theirs_s=best_s)
    for neurons, num_modules in sizes:
        first_FM, then_FM = costs(neurons, num_modules)
        cold_s, warm_s = [], []
        for _ in range(rounds):
            (_, price_M), seconds = timed(lambda cost_FM=first_FM: assign_balanced(cost_FM))
            cold_s.append(seconds)
            warm_s.append(timed(lambda cost_FM=then_FM, price_M=price_M: assign_balanced(cost_FM, price_M))[1])
        ratios = [warm / cold for warm, cold in zip(warm_s, cold_s, strict=True)]
        name = f"assignment {neurons} x {num_modules}: time with warm prices / with none"
        yield row(name, ratios, None, ours_s=warm_s, theirs_s=cold_s)


def layer_rows(neurons: int, num_modules: int, rounds: int) -> Iterator[Row]:
    """Yield the time on the clock of four layers on two threads over one thread, and whether they come out the same."""
    keys = [planted(neurons, num_modules, seed) for seed in range(4)]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    found: list[list[Tensor]] = []

    def read(layer: int) -> Any:
        return None, FFNWeights(None, keys[layer], keys[layer].T)

    for _ in range(rounds):
        for threads, spent_s in seconds.items():
            started_s = time.perf_counter()
            cut = cut_layers(cut_by_keys, read, range(len(keys)), num_modules, 0, threads=threads)
            spent_s.append(time.perf_counter() - started_s)
            found.append([partition.module_F for partition in cut])
    assert all(torch.equal(one_F, two_F) for cut in found[1:] for one_F, two_F in zip(cut, found[0], strict=True))
    ratios = [two / one for one, two in zip(seconds[1], seconds[2], strict=True)]
    name = f"4 layers {neurons} x {num_modules}: clock, 2 threads / 1"
    yield row(name, ratios, None, ours_s=seconds[2], theirs_s=seconds[1])


def real_features(directory: str, args: argparse.Namespace) -> Iterator[tuple[str, Tensor]]:
    """Yield a name and the features of the model's middle layer: keys, and activations where there is text."""
    checkpoint = Checkpoint(directory)
    described = None if checkpoint.config.get("model_type") in FAMILIES else {}
    family = family_of(checkpoint.config, described)
    trust = args.trust_remote_code
    model = load(Path(directory), trust_remote_code=trust, device="cpu")
    runner = WholeModel(model, family)
    layer = runner.num_layers // 2
    name = Path(directory).name
    yield f"{name} keys", key_features(read_ffn(checkpoint, family, layer))
    if args.text:
        tokenizer = load_tokenizer(Path(directory), trust_remote_code=trust)
        batches = token_batches(
            tokenizer, "text", load_task("text", args.text), tokens=8192, sequence_length=128, batch_size=16, seed=0
        )
        profiles = profile_model(runner, {"text": batches}, sketch_rows=COLUMNS)
        yield f"{name} activations", activation_features(profiles[layer])


def measure(args: argparse.Namespace) -> Iterator[Row]:
    parts = args.parts.split(",")
    sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
    if "assignment" in parts:
        speed, slots = ([(11008, 32), (14336, 64)], [(2048, 32), (4096, 16)])
        yield from assignment_rows(*(([(2816, 16)], [(1024, 16)]) if args.quick else (speed, slots)), 5)
    for neurons, num_modules in sizes:
        if "start" in parts:
            name, rows_FX = f"planted {neurons} x {num_modules}", planted(neurons, num_modules)
            yield from compare(name, rows_FX, num_modules, args.rounds, "k-means++ start", by_plusplus)
    if "layers" in parts:
        yield from layer_rows(*sizes[0], args.rounds)
    if KMeansConstrained is None:
        print("k_means_constrained is not installed (the extra kmc): its rows are left out")
        return
    for neurons, num_modules in sizes:
        if "planted" in parts:
            name, rows_FX = f"planted {neurons} x {num_modules}", planted(neurons, num_modules)
            yield from compare(name, rows_FX, num_modules, args.rounds, "k_means_constrained", by_constrained)
    for directory in args.model if "real" in parts else []:
        for name, rows_FX in real_features(directory, args):
            wanted = sorted({num_modules for _, num_modules in sizes})
            fitting = [number for number in wanted if len(rows_FX) % number == 0]
            # a width that none divides is cut into modules of four
            for number in fitting or [len(rows_FX) // 4]:
                size = f"{name} {len(rows_FX)} x {number}"
                yield from compare(size, rows_FX, number, args.rounds, "k_means_constrained", by_constrained)


def main() -> None:
    args = parse()
    if args.quick:
        args.sizes, args.rounds = "1408x16,1408x32", 1
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    table = Table(title="balanced clustering; ! misses its bound")
    for title in ("ratio", "value", "spread", "bound", "seconds"):
        table.add_column(title, justify="left" if title == "ratio" else "right")
    for found in measure(args):
        rows.append(found)
        spent = [statistics.median(np.atleast_1d(found[key])) for key in ("ours_s", "theirs_s") if key in found]
        bound = "" if found["bound"] is None else f"<= {found['bound']:.3g}"
        value = f"{found['ratio']:.4f}{'' if found['holds'] is not False else ' !'}"
        table.add_row(found["name"], value, f"{found['spread']:.4f}", bound, " / ".join(f"{s:.3g}" for s in spent))
    Console(width=120).print(table)
    if args.json:
        names = {found["name"] for found in rows}
        if args.add and args.json.exists():
            rows = [old for old in json.loads(args.json.read_text())["rows"] if old["name"] not in names] + rows
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "numpy": np.__version__}
        report = {
            "device": f"{platform.processor() or 'cpu'}, one thread",
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "rows": rows,
        }
        args.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
