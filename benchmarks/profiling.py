"""Cost of profiling, on a whole model and layer by layer, and what the small sketch of it is worth.

    python benchmarks/profiling.py [--quick] [--json FILE] [--model DIR --text FILE] [--large GB --scratch DIR]

cost     processor time of a pass with statistics over the bare forward pass of the same tokens, variants in turn in
         one process on one thread; ``empty`` hooks that do nothing; ``by layer`` reads the weights from disk. Beside
         it, of one pass, the whole over all but the statistics: where others use the machine, it is the steadier.
quality  for each --model and --text: neurons are cut by the rows of the sketch, and by all rows; of the activations on
         other text, the energy in the best quarter of each token's modules. The text is of any kind that a task may be.
scale    random Llamas of four sizes on disk, run layer by layer in a process each: processor seconds, and the most
         anonymous memory above what the process held before; extrapolated to 80 layers of width 8192.
large    one checkpoint of about so many GB with layers of that width, analysed from text to modules; it is deleted at
         the end.

A file that is there keeps the rows that are not measured anew (``--parts``, ``--sizes``, ``--dtypes``).
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

import modmoe
from modmoe.analysis.partitions.activations import cut_by_activations
from modmoe.analysis.partitions.table import Partition
from modmoe.analysis.passes.by_layer import ByLayer
from modmoe.analysis.passes.stream import Turn, WholeModel, frozen, run_body
from modmoe.analysis.profile import ActivationProfile, profile_model
from modmoe.analysis.text.calibration import Batch, load_task, token_batches
from modmoe.models.families import FAMILIES, Family
from modmoe.models.loading import load, load_tokenizer
from modmoe.models.opened import OpenedModel
from modmoe.storage.checkpoint import Checkpoint

# (hidden size, neurons, layers)
COST_SIZES = {"small": (768, 2304, 12), "wide": (2048, 5632, 2)}
SIZES = [(512, 1536, 4), (768, 2304, 8), (1024, 3072, 12), (1536, 4608, 16)]
LARGE = (8192, 28672, 80)
COST_BOUND, BYTES_BOUND, QUALITY_BOUND = 1.05, 4096, 0.01
VOCABULARY, SEQUENCE = 32000, 256
LLAMA = FAMILIES["llama"]
Row = dict[str, Any]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, few rounds: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--parts", default="cost,quality,scale,large", help="what to run")
    parser.add_argument("--sizes", default="small,wide", help="of cost")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="of cost")
    parser.add_argument("--model", action="append", default=[], help="a real model to judge the sketch on")
    parser.add_argument("--text", help="the text for it")
    parser.add_argument("--trust-remote-code", action="store_true", help="execute own code of --model")
    parser.add_argument("--large", type=float, help="GB of the large checkpoint")
    parser.add_argument("--scratch", type=Path, help="where checkpoints are made for a while")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def write_llama(directory: Path, size: tuple[int, int, int], dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write a random Llama, one shard a layer, with no more than one layer in memory."""
    width, heads = size[0], size[0] // (128 if size[0] > 4096 else 64)
    config = transformers.LlamaConfig(
        **{"vocab_size": VOCABULARY, "hidden_size": width, "intermediate_size": size[1], "num_hidden_layers": size[2]},
        **{"num_attention_heads": heads, "num_key_value_heads": 8 if width > 4096 else heads},
        **{"max_position_embeddings": 512, "tie_word_embeddings": True, "dtype": dtype},
    )
    directory.mkdir(parents=True)
    with torch.device("meta"):
        shapes = {name: tuple(like.shape) for name, like in transformers.LlamaModel(config).state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn(max(map(math.prod, shapes.values())), generator=generator, dtype=torch.float32).to(dtype)
    where: dict[str, str] = {}
    for number, (place, names) in enumerate(itertools.groupby(shapes, lambda name: name.split(".")[:2])):
        file = f"model-{number:05d}.safetensors"
        tensors = {}
        for index, name in enumerate(names):
            numbers = math.prod(shapes[name])
            # the same random numbers from another place on, so that layers differ and are cheap to make
            start = (7919 * number + 104729 * index) % (len(pool) - numbers + 1)
            scale = 1.0 if place[0] == "norm" or "norm" in name else shapes[name][-1] ** -0.5
            drawn = torch.ones(numbers, dtype=dtype) if scale == 1.0 else pool[start : start + numbers] * scale
            tensors[f"model.{name}"] = drawn.view(shapes[name])
        save_file(tensors, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, file))
    index_of = {"metadata": {}, "weight_map": where}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_of), encoding="utf-8")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    return directory


def random_batches(tokens: int, batch_size: int = 8) -> dict[str, list[Batch]]:
    ids_NT = torch.randint(0, VOCABULARY, (max(1, tokens // SEQUENCE), SEQUENCE))
    return {"a": [Batch(ids_BT, torch.ones_like(ids_BT)) for ids_BT in ids_NT.split(batch_size)]}


def ratio(seconds: dict[str, list[float]], name: str, base: str) -> tuple[float, float]:
    ratios = [one / other for one, other in zip(seconds[name], seconds[base], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2


class Timed(WholeModel):
    """Sums the processor time of what is done with the activations."""

    spent_s = 0.0

    def run(self, batches: Any, *, on_hidden: Any = None, **rest: Any) -> None:
        def timed(*given: Any) -> Any:
            started_s = time.process_time()
            found = on_hidden(*given)
            self.spent_s += time.process_time() - started_s
            return found

        super().run(batches, on_hidden=timed if on_hidden else None, **rest)


def cost(args: argparse.Namespace) -> list[Row]:
    """Measure the statistics against the bare forward pass."""
    rows = []
    for size in (COST_SIZES[name] for name in args.sizes.split(",")):
        for name in args.dtypes.split(","):
            with tempfile.TemporaryDirectory(dir=args.scratch) as home:
                directory = write_llama(Path(home) / "model", size, getattr(torch, name))
                rows += cost_of(directory, f"{name} {size[0]} x {size[1]} x {size[2]}", args)
    return rows


def cost_of(directory: Path, label: str, args: argparse.Namespace) -> list[Row]:
    whole = Timed(load(directory, device="cpu"), LLAMA)
    layers = ByLayer(OpenedModel(directory), LLAMA, scratch=directory)
    batches = random_batches(args.tokens)
    profiles: list[ActivationProfile] = []
    shares: list[float] = []

    def bare() -> None:
        with frozen(whole.model), torch.no_grad():
            for batch in batches["a"]:
                run_body(whole.model, batch)

    def measured() -> None:
        started_s, whole.spent_s = time.process_time(), 0.0
        profiles[:] = profile_model(whole, batches)
        shares.append(1 / (1 - whole.spent_s / (time.process_time() - started_s)))

    variants: dict[str, Callable[[], None]] = {"bare": bare, "profile": measured}
    variants["empty"] = lambda: whole.run(batches, on_hidden=lambda *_: None)
    variants["by layer"] = lambda: layers.run(batches)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_number in range(args.rounds + 1):
        for name, call in variants.items():
            started_s = time.process_time()
            call()
            if round_number:
                seconds[name].append(time.process_time() - started_s)
    bare_s = statistics.median(seconds["bare"])
    rows = [
        row("cost", f"{name} / bare", label, *ratio(seconds, name, "bare"), bound, bare_s=bare_s)
        for name, bound in (("empty", None), ("profile", COST_BOUND), ("by layer", None))
    ]
    inside = (statistics.median(shares), statistics.pstdev(shares))
    rows.append(row("cost", "whole pass / all but the statistics", label, *inside, COST_BOUND))
    profile = profiles[0]
    fields = (profile.sum_PF, profile.abs_PF, profile.square_PF, profile.rows_SF)
    held_bytes = sum(field.nbytes for field in fields) / profile.num_neurons
    return [*rows, row("cost", "bytes a neuron", label, held_bytes, 0.0, BYTES_BOUND)]


def quality(args: argparse.Namespace) -> list[Row]:
    """Compare modules cut by the sketch with modules cut by every row, on text that neither saw."""
    if not args.model or not args.text:
        print("quality: skipped; name a real model and text with --model and --text")
        return []
    return [row for model in args.model for row in quality_of(Path(model), args)]


def quality_of(directory: Path, args: argparse.Namespace) -> list[Row]:
    checkpoint, seeds = Checkpoint(directory), range(2 if args.quick else 5)
    family = FAMILIES.get(str(checkpoint.config["model_type"]), Family(model_type="own"))
    runner = WholeModel(load(directory, trust_remote_code=args.trust_remote_code, device="cpu"), family)
    tokenizer = load_tokenizer(directory, trust_remote_code=args.trust_remote_code)
    sizes = {"tokens": 4096 if args.quick else 20480, "sequence_length": 128, "batch_size": 8, "seed": 0}
    batches = token_batches(tokenizer, "text", load_task("text", args.text), **sizes)
    # every fifth batch is held out: they are sorted by length
    seen, held = [b for i, b in enumerate(batches) if i % 5], batches[::5]
    found: dict[str, list[float]] = {"sketch": [], "full": [], "random": []}
    full = profile_model(runner, {"a": seen}, sketch_rows=10**9)
    modules = max(n for n in range(1, 49) if full[0].num_neurons % n == 0)
    for seed in seeds:
        sketch = profile_model(runner, {"a": seen}, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        cuts = {
            "sketch": [cut_by_activations(profile, None, modules, seed) for profile in sketch],  # type: ignore[arg-type]
            "full": [cut_by_activations(profile, None, modules, seed) for profile in full],  # type: ignore[arg-type]
            "random": [Partition(torch.randperm(p.num_neurons, generator=draw) % modules, modules) for p in full],
        }
        for name, value in best_quarter(runner, held, cuts).items():
            found[name].append(value)
    gaps = [one - two for one, two in zip(found["full"], found["sketch"], strict=True)]
    label = f"{directory.name}, {modules} modules"
    rows = [("energy, " + name, values, None) for name, values in found.items()]
    rows.append(("full - sketch", gaps, QUALITY_BOUND))
    return [row("quality", name, label, statistics.mean(v), statistics.pstdev(v), bound) for name, v, bound in rows]


def best_quarter(runner: WholeModel, held: list[Batch], cuts: dict[str, list[Partition]]) -> dict[str, float]:
    """Return the share of each token's energy that is in a quarter of the modules, the mean over tokens and layers."""
    shares: dict[str, list[Tensor]] = {name: [] for name in cuts}

    def watch(layer: int, hidden: Tensor, turn: Turn) -> None:
        energy_TF = turn.real_rows(hidden).double().square()
        for name, partitions in cuts.items():
            modules = partitions[layer].num_modules
            energy_TM = energy_TF[:, partitions[layer].permutation_F].view(len(energy_TF), modules, -1).sum(2)
            best_T = energy_TM.topk(modules // 4, 1).values.sum(1)
            shares[name].append(best_T / energy_TM.sum(1).clamp_min(1e-30))

    runner.run({"held": held}, on_hidden=watch)
    return {name: float(torch.cat(values).mean()) for name, values in shares.items()}


def scale(args: argparse.Namespace) -> list[Row]:
    """Measure a pass layer by layer at several sizes, and extrapolate."""
    rows, parameters, seconds, above = [], [], [], []
    tokens = 512 if args.quick else 1024
    for size in SIZES[:2] if args.quick else SIZES:
        with tempfile.TemporaryDirectory(dir=args.scratch) as home:
            directory = write_llama(Path(home) / "model", size)
            child = run_child("pass", directory, tokens)
        width, neurons, layers = size
        inside = layers * (4 * width * width + 3 * width * neurons)
        parameters.append(inside)
        seconds.append(child["cpu_s"])
        above.append(child["anon_bytes"] - child["before_bytes"])
        value = child["cpu_s"] / inside / tokens * 1e12
        rows.append(row("scale", "s / 1e12 parameter tokens", f"{width} x {neurons} x {layers}", value, **child))
    x, y = [math.log(p) for p in parameters], [math.log(s) for s in seconds]
    slope = statistics.linear_regression(x, y).slope
    width, neurons, layers = LARGE
    inside = layers * (2 * width * width + 2 * width * width // 8 + 3 * width * neurons)
    tokens_wanted = 32768
    # the largest model measured: small ones spend their time elsewhere
    time_s = seconds[-1] * inside / parameters[-1] * tokens_wanted / tokens
    label = f"{width} x {neurons} x {layers}, {tokens_wanted} tokens"
    held = {"hidden_file_bytes": tokens_wanted * width * 2, "profile_bytes": layers * neurons * (1024 + 32)}
    return [
        *rows,
        row("scale", "slope, log s / log parameters", "all", slope),
        row("scale", "extrapolated hours", label, time_s / 3600, **held),
    ]


def large(args: argparse.Namespace) -> list[Row]:
    """Analyse one large checkpoint from text to modules."""
    if not args.large:
        print("large: skipped; name its size with --large")
        return []
    width, neurons, _ = LARGE
    layer_bytes = 2 * (2 * width * width + 2 * width * width // 8 + 3 * width * neurons)
    size = (width, neurons, max(1, round((args.large * 1e9 - 2 * VOCABULARY * width) / layer_bytes)))
    with tempfile.TemporaryDirectory(dir=args.scratch) as home:
        directory = write_llama(Path(home) / "model", size)
        total = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
        make_tokenizer(directory)
        child = run_child("analyze", directory, args.tokens if args.tokens < 2048 else 512)
    label = f"{total / 1e9:.1f} GB, {width} x {neurons} x {size[2]}"
    return [row("large", "peak anonymous GB", label, child["anon_bytes"] / 1e9, 0.0, 24.0, **child)]


def make_tokenizer(directory: Path) -> None:
    """Save a tokenizer of bytes beside a model."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.add_special_tokens(["</s>"])
    transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>").save_pretrained(directory)


def run_child(kind: str, directory: Path, tokens: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "--child", kind, str(directory), "--tokens", str(tokens)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def child(kind: str, directory: Path, tokens: int) -> None:
    """Run in a process of its own and print what it took."""
    torch.manual_seed(0)
    runner = ByLayer(OpenedModel(directory), LLAMA, scratch=directory)
    runner.run(random_batches(SEQUENCE), layers=1)  # what is imported and made once is no part of a pass
    before = peak = anonymous_bytes()
    is_done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not is_done.wait(0.02):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started_s, cpu_s = time.monotonic(), time.process_time()
    marks: dict[str, float] = {}
    if kind == "pass":
        profile_model(runner, random_batches(tokens))
    else:
        text = directory / "text.txt"
        text.write_text("\n\n".join(f"{n} and {n * n} make {n + n * n} in all." * 9 for n in range(400)))

        def note(message: str, *_: Any) -> None:
            marks[message] = round(time.monotonic() - started_s, 1)

        recipe = modmoe.make_recipe(
            {"source": str(directory), "tasks": {"text": str(text)}, "calibration.tokens": tokens, "device": "cpu"}
        )
        modmoe.analyze(recipe, str(directory / "out"), progress=note)
    is_done.set()
    watcher.join()
    taken = {"cpu_s": time.process_time() - cpu_s, "wall_s": time.monotonic() - started_s, "until_s": marks}
    found = taken | {"anon_bytes": peak, "before_bytes": before, "tokens": tokens}
    print(json.dumps(found))


def row(
    part: str, name: str, size: str, value: float, spread: float = 0.0, bound: float | None = None, **more: Any
) -> Row:
    holds = None if bound is None else value <= bound
    found = {"part": part, "name": name, "size": size, "ratio": value, "spread": spread, "bound": bound, "holds": holds}
    return found | more


def place(row: Row) -> tuple[str, str, str]:
    return row["part"], row["name"], row["size"]


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def main() -> None:
    args = parse()
    torch.set_num_threads(1)
    if args.child:
        child(args.child[0], Path(args.child[1]), args.tokens)
        return
    torch.manual_seed(0)
    if args.quick:
        args.rounds, args.tokens, args.sizes, args.dtypes = 3, 512, "small", "bfloat16"
    parts = {"cost": cost, "quality": quality, "scale": scale, "large": large}
    rows = [row for name in args.parts.split(",") for row in parts[name](args)]
    table = Table(title="profiling; ! misses its bound")
    for name in ("part", "", "size", "value", "spread", "bound"):
        table.add_column(name, justify="left" if name in ("part", "", "size") else "right")
    for row in rows:
        value = f"{row['ratio']:.4g}{'' if row['holds'] is not False else ' !'}"
        bound = "" if row["bound"] is None else f"<= {row['bound']}"
        table.add_row(row["part"], row["name"], row["size"], value, f"{row['spread']:.3f}", bound)
    Console(width=110).print(table)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        kept = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
        found = {
            "device": f"{platform.processor() or 'cpu'}, {os.cpu_count()} shared cores, one thread",
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "rows": [row for row in kept if place(row) not in map(place, rows)] + rows,
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
