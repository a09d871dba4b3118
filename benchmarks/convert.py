"""Cost of rewriting a checkpoint, against `cp` of the same bytes and against loading and saving it whole.

    python benchmarks/convert.py [--quick] [--json FILE] [--scratch DIRECTORY]

A synthetic Llama of random bytes (the shape of Llama 3.2 1B: 16 layers, 2.47 GB in bf16, 4 shards) has the neurons of
its FFNs permuted; there is no calibration. Each way runs in a process of its own, which another one watches: the
anonymous memory is the most that it had beyond what it had at rest. Ways take turns, round by round; times are wall
time with the source in the page cache; ratios are medians of those within a round. Smaller models of the same
proportions give the slope over the size.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

import modmoe
from modmoe.storage import shards
from modmoe.storage.checkpoint import INDEX, Checkpoint, CheckpointWriter, write_json
from modmoe.storage.plan import Const, Copy, Op, Plan, Take
from modmoe.storage.staging import open_output

WIDTH, NEURONS, VOCABULARY = 2048, 8192, 8016  # the last is a layer's part of Llama 3.2 1B's 128256 tokens
TIME_BOUND, MEMORY_BOUND = 1.7, 2.0
GB = 1e9
# way, way that its time is held against, bound
RATIOS: list[tuple[str, str, float | None]] = [
    ("rewrite", "cp", TIME_BOUND),
    ("rewrite, no checksums", "cp", None),
    ("rewrite, one worker", "cp", None),
    ("rewrite + fsync", "cp + fsync", None),
    ("load_file + save_file", "cp", None),
    ("from_pretrained + save_pretrained", "cp", None),
    ("check_finite", "reading", None),
    ("torch.isfinite", "reading", None),
]
MEMORY = ("rewrite", "load_file + save_file", "from_pretrained + save_pretrained", "check_finite", "torch.isfinite")
# so that what the ways import is imported once, and what each of them has at rest is the same
CONTEXT = multiprocessing.get_context("fork")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one small model, few rounds: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--scratch", type=Path, help="where the models are made and removed; 8 GB")
    parser.add_argument("--layers", default="2,4,8,16", help="sizes; a layer is 0.15 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ways", default=";".join(WAYS), help="those to run; each goes with what it is held against")
    return parser.parse_args()


def make_dense(directory: Path, layers: int) -> None:
    """Write a Llama of random bf16 values into four shards."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": WIDTH,
        "intermediate_size": NEURONS,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": VOCABULARY * layers,
        "tie_word_embeddings": True,
    }
    shapes = {"model.embed_tokens.weight": (VOCABULARY * layers, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(layers):
        kinds = {"q": (WIDTH, WIDTH), "k": (WIDTH // 4, WIDTH), "v": (WIDTH // 4, WIDTH), "o": (WIDTH, WIDTH)}
        shapes |= {f"model.layers.{layer}.self_attn.{kind}_proj.weight": shape for kind, shape in kinds.items()}
        kinds = {"gate": (NEURONS, WIDTH), "up": (NEURONS, WIDTH), "down": (WIDTH, NEURONS)}
        shapes |= {f"model.layers.{layer}.mlp.{kind}_proj.weight": shape for kind, shape in kinds.items()}
        shapes |= {f"model.layers.{layer}.{kind}_layernorm.weight": (WIDTH,) for kind in ("input", "post_attention")}
    # any bits but the highest of the exponent, so that all values are finite
    pool = torch.randint(-(2**15), 2**15, (1 << 22,), dtype=torch.int16) & ~0x4000
    directory.mkdir()
    write_json(directory / "config.json", config)
    total = 2 * sum(torch.Size(shape).numel() for shape in shapes.values())
    files: list[dict[str, Tensor]] = [{} for _ in range(4)]
    done = 0
    weight_map = {}
    for name, shape in shapes.items():
        count = torch.Size(shape).numel()
        bits = pool.repeat(count // len(pool) + 1)[:count].reshape(shape).clone()
        number = min(3, 4 * done // total)
        done += bits.nbytes
        files[number][name] = bits.view(torch.bfloat16)
        weight_map[name] = f"model-{number + 1:05d}-of-00004.safetensors"
        if number < min(3, 4 * done // total):
            save_file(files[number], directory / weight_map[name], metadata={"format": "pt"})
            files[number] = {}
    save_file(files[3], directory / "model-00004-of-00004.safetensors", metadata={"format": "pt"})
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def permuted(source: Checkpoint) -> Plan:
    """Return the plan of the same model with each layer's neurons in a random order, and a router a layer."""
    draw = torch.Generator().manual_seed(0)
    ops: dict[str, Op] = {name: Copy(name) for name in source}
    for layer in range(source.config["num_hidden_layers"]):
        order_F = torch.randperm(NEURONS, generator=draw)
        ffn = f"model.layers.{layer}.mlp."
        for kind, dim in (("gate", 0), ("up", 0), ("down", 1)):
            ops[f"{ffn}{kind}_proj.weight"] = Take(f"{ffn}{kind}_proj.weight", order_F, dim=dim)
        ops[f"{ffn}router.weight"] = Const(torch.zeros(8, WIDTH, dtype=torch.bfloat16))
    return Plan(source.config, ops)


class NoDigest:
    """Stands in for SHA-256 where its share is measured."""

    def update(self, data: memoryview) -> None: ...

    def hexdigest(self) -> str:
        return ""


def rewrite(dense: Path, out: Path) -> None:
    source = Checkpoint(dense)
    plan = permuted(source)
    plan.check(source)
    out.mkdir()
    writer = CheckpointWriter(out)
    plan.run(source, writer)
    writer.finish(plan.config)


def rewrite_without_checksums(dense: Path, out: Path) -> None:
    shards.hashlib.sha256 = NoDigest  # type: ignore[assignment]
    rewrite(dense, out)


def rewrite_alone(dense: Path, out: Path) -> None:
    shards.WORKERS = 1
    rewrite(dense, out)


def rewrite_durably(dense: Path, out: Path) -> None:
    with open_output(out) as partial:
        rewrite(dense, partial / "checkpoint")


def copy_durably(dense: Path, out: Path) -> None:
    """Copy, and wait until the copy is on the disk, as ``open_output`` does."""
    copy(dense, out)
    for file in out.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def copy(dense: Path, out: Path) -> None:
    out.mkdir()
    subprocess.run(["cp", *map(str, dense.glob("*.safetensors")), str(out)], check=True)


def load_and_save(dense: Path, out: Path) -> None:
    plan = permuted(Checkpoint(dense))
    state: dict[str, Tensor] = {}
    for file in sorted(dense.glob("*.safetensors")):
        state |= load_file(file)
    out.mkdir()
    save_file({name: op.make(state) for name, op in plan.ops.items()}, out / "model.safetensors")


def from_and_save_pretrained(dense: Path, out: Path) -> None:
    from transformers import AutoModelForCausalLM

    plan = permuted(Checkpoint(dense))
    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    state = model.state_dict()
    for name, op in plan.ops.items():
        if isinstance(op, Take):
            state[name].copy_(op.make(state))
    model.save_pretrained(out)


def read_all(dense: Path, out: Path) -> None:
    buffer = bytearray(1 << 20)
    for file in sorted(dense.glob("*.safetensors")):
        with file.open("rb", buffering=0) as handle:
            while handle.readinto(buffer):
                pass


def check_finite(dense: Path, out: Path) -> None:
    Checkpoint(dense).check_finite()


def check_finite_by_torch(dense: Path, out: Path) -> None:
    source = Checkpoint(dense)
    assert all(bool(torch.isfinite(source[name]).all()) for name in source)


WAYS: dict[str, Callable[[Path, Path], None]] = {
    "cp": copy,
    "rewrite": rewrite,
    "rewrite, no checksums": rewrite_without_checksums,
    "rewrite, one worker": rewrite_alone,
    "cp + fsync": copy_durably,
    "rewrite + fsync": rewrite_durably,
    "load_file + save_file": load_and_save,
    "from_pretrained + save_pretrained": from_and_save_pretrained,
    "reading": read_all,
    "check_finite": check_finite,
    "torch.isfinite": check_finite_by_torch,
}


def serve(way: str, dense: Path, out: Path, pipe: Any) -> None:
    """Run one way each time it is asked to, and answer with the wall and processor seconds that it took."""
    if way.startswith("from"):
        import transformers

        transformers.logging.disable_progress_bar()
        transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(num_hidden_layers=1, hidden_size=64))
    pipe.send(None)
    while pipe.recv():
        started_s, started_cpu_s = time.perf_counter(), cpu_s()
        WAYS[way](dense, out)
        pipe.send((time.perf_counter() - started_s, cpu_s() - started_cpu_s))


def cpu_s() -> float:
    """Return the processor seconds of this process and of those that it waited for."""
    return sum(os.times()[:4])


class Child:
    """A process that runs one way, and the most anonymous memory that it had beyond what it had at rest."""

    def __init__(self, way: str, dense: Path, out: Path) -> None:
        self.way, self.out = way, out
        self.wall_s: list[float] = []
        self.cpu_s: list[float] = []
        self.peak_bytes = self.rest_bytes = 0
        self.pipe, other = CONTEXT.Pipe()
        self.process = CONTEXT.Process(target=serve, args=(way, dense, out, other), daemon=True)
        self.process.start()
        other.close()
        self.pipe.recv()

    def run(self) -> None:
        os.sync()
        self.rest_bytes = self.rest_bytes or self.anonymous_bytes()
        self.pipe.send(True)
        while not self.pipe.poll(0.005):
            self.peak_bytes = max(self.peak_bytes, self.anonymous_bytes() - self.rest_bytes)
        wall_s, spent_s = self.pipe.recv()
        self.wall_s.append(wall_s)
        self.cpu_s.append(spent_s)
        shutil.rmtree(self.out, ignore_errors=True)

    def anonymous_bytes(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = status.partition("RssAnon:")[2].split()
        return 1024 * int(found[0]) if found else 0

    def close(self) -> None:
        self.pipe.send(False)
        self.process.join()


def measure(scratch: Path, layers: int, rounds: int, ways: list[str]) -> dict[str, Child]:
    """Return what became of each way on one model."""
    dense = scratch / "dense"
    make_dense(dense, layers)
    children = {way: Child(way, dense, scratch / "out") for way in ways}
    for _ in range(rounds):
        for child in children.values():
            child.run()
    for child in children.values():
        child.close()
    shutil.rmtree(dense)
    return children


def over(children: dict[str, Child], name: str, base: str, kind: str) -> tuple[float, float]:
    """Return the median ratio of two ways over rounds, and half the distance of its quartiles."""
    pairs = zip(getattr(children[name], kind), getattr(children[base], kind), strict=True)
    ratios = [one / other for one, other in pairs]
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return statistics.median(ratios), (high - low) / 2


def rows_of(children: dict[str, Child], size_bytes: int, largest_bytes: int) -> list[dict[str, Any]]:
    """Return the rows of one size: times over that of a base, memory over the largest tensor."""
    rows: list[dict[str, Any]] = []
    for name, base, bound in (one for one in RATIOS if one[0] in children):
        value, spread = over(children, name, base, "wall_s")
        cpu, cpu_spread = over(children, name, base, "cpu_s")
        rows.append(
            {
                "name": f"{name} / {base}",
                "bytes": size_bytes,
                "ratio": value,
                "spread": spread,
                "bound": bound,
                "holds": None if bound is None else value <= bound,
                "cpu_ratio": cpu,
                "cpu_spread": cpu_spread,
                "seconds": statistics.median(children[name].wall_s),
                "cpu_seconds": statistics.median(children[name].cpu_s),
            }
        )
    for name in MEMORY:
        if name in children:
            peak_bytes = children[name].peak_bytes
            value, bound = peak_bytes / largest_bytes, MEMORY_BOUND if name == "rewrite" else None
            row = {"name": f"{name}: anonymous memory / largest tensor", "bytes": size_bytes, "ratio": value}
            holds = None if bound is None else value <= bound
            rows.append({**row, "spread": 0.0, "bound": bound, "holds": holds, "anonymous_bytes": peak_bytes})
    return rows


def slopes(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return, for each way, the line through what the sizes cost, and where it is at 70B parameters in bf16."""
    found = []
    for name in dict.fromkeys(row["name"] for row in rows):
        mine = [row for row in rows if row["name"] == name]
        key = "anonymous_bytes" if "anonymous_bytes" in mine[0] else "cpu_seconds"
        if len(mine) < 2:
            continue
        slope, start = statistics.linear_regression([row["bytes"] / GB for row in mine], [row[key] for row in mine])
        label = name.partition(" / ")[0].partition(":")[0]
        found.append({"name": f"{label}: {key} a GB", "ratio": slope, "bound": None, "holds": None, "spread": 0.0})
        found[-1]["at_140_GB"] = start + slope * 140
    return found


def show(rows: list[dict[str, Any]], lines: list[dict[str, Any]], rounds: int) -> None:
    table = Table(title=f"rewriting a checkpoint, medians of {rounds} rounds; ! misses its bound")
    for column in ("GB", "what", "ratio", "bound", "cpu ratio", "seconds", "cpu s", "anonymous"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for row in rows:
        memory = f"{row['anonymous_bytes'] / 1e6:.0f} MB" if "anonymous_bytes" in row else ""
        times = [f"{row[key]:.2f}" if key in row else "" for key in ("cpu_ratio", "seconds", "cpu_seconds")]
        ratio = f"{row['ratio']:.2f} ± {row['spread']:.2f}{' !' if row['holds'] is False else ''}"
        bound = "" if row["bound"] is None else f"<= {row['bound']}"
        table.add_row(f"{row['bytes'] / GB:.2f}", row["name"], ratio, bound, *times, memory)
    Console(width=150).print(table)
    for line in lines:
        unit, size = ("MB", 1e6) if "bytes" in line["name"] else ("s", 1)
        print(f"{line['name']}: {line['ratio'] / size:.2f} {unit}; at 140 GB {line['at_140_GB'] / size:.0f} {unit}")


def main() -> None:
    args = parse()
    if args.quick:
        args.layers, args.rounds = "2", 2
    torch.set_num_threads(1)
    torch.manual_seed(0)
    # so that what was made is removed when the run is stopped
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="modmoe-convert-", dir=args.scratch) as scratch:
        for layers in map(int, args.layers.split(",")):
            size_bytes = 2 * WIDTH * layers * (2 * WIDTH + WIDTH // 2 + 3 * NEURONS + VOCABULARY)
            largest_bytes = 2 * WIDTH * max(NEURONS, VOCABULARY * layers)
            children = measure(Path(scratch), layers, args.rounds, args.ways.split(";"))
            rows += rows_of(children, size_bytes, largest_bytes)
    lines = slopes(rows)
    show(rows, lines, args.rounds)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "numpy": np.__version__}
        versions |= {"safetensors": safetensors.__version__, "transformers": metadata.version("transformers")}
        found = {
            "device": f"{os.cpu_count()} shared {platform.processor() or 'cpu'} cores, local disk",
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "rows": [*rows, *lines],
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
