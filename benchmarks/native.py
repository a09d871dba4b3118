"""Native exports against the tied models they come from: every source family, target, case and type.

    python benchmarks/native.py [--quick] [--json FILE] [--model DIR]

Each tied model has random experts and routers over random weights, or over those of --model, which takes the place of
the tiny model of its family. Exports are written, reloaded by plain transformers in one process that cannot import
modmoe, and compared: the largest and the mean difference of logits, as shares of the largest logit, and the greedy
tokens. ``bytes`` is the export's size over the tied model's. The bound is that of the proof: on the largest difference
where gates are exact, on the mean where they are nearly even or a factor was rounded, and always in half precision.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table

import modmoe

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from modmoe.errors import ExportError
from modmoe.formats.proof import reload
from modmoe.formats.proof.verify import TOLERANCES
from modmoe.models.counts import tensor_bytes
from modmoe.models.loading import load
from modmoe.storage.checkpoint import Checkpoint
from tests.support import native_models
from tests.support.native_models import CASES, NEW_TOKENS, PAIRS, SOURCES, sample_ids

TYPES = ("float32", "bfloat16")
MODULES = 86  # of a model that is given: its neurons must be a multiple, as 172 are


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one case and type of each source and target")
    parser.add_argument("--json", type=Path, help="write the rows there, and the table beside it as Markdown")
    parser.add_argument("--model", type=Path, help="a dense checkpoint in place of its family's tiny one")
    parser.add_argument("--modules", type=int, default=MODULES, help="modules to cut --model into")
    return parser.parse_args()


def write_all(home: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Write every export and what its tied model computes; return a row each."""
    given = None if args.model is None else str(Checkpoint(args.model).config["model_type"])
    if given is not None and given not in SOURCES:
        raise SystemExit(f"{args.model}: a '{given}' model; this takes {', '.join(SOURCES)}")
    made: list[dict[str, Any]] = []
    tied: dict[tuple[str, str], Path] = {}
    for source, target in PAIRS:
        for case in ["union of three"] if args.quick else CASES:
            if (source, case) not in tied:
                sharing, router = CASES[case]
                weights = {"dense": args.model, "num_modules": args.modules} if source == given else {}
                directory = home / f"tied-{len(tied)}"
                tied[source, case] = native_models.write_native_source(directory, source, sharing, **weights, **router)
            for dtype in TYPES[: 1 if args.quick else 2]:
                made.append({"source": source, "target": target, "case": case, "dtype": dtype, "real": source == given})
                made[-1].update(write_one(home / f"export-{len(made)}", tied[source, case], target, dtype))
    return made


def write_one(directory: Path, tied: Path, target: str, dtype: str) -> dict[str, Any]:
    """Write one export; return what was said of it, and what the tied model computes."""
    kind = getattr(torch, dtype)
    try:
        native = native_models.write_export(directory, tied, target, kind)
    except ExportError as error:
        return {"refused": str(error).partition("can't hold ")[2].partition(";")[0]}
    kinds = [dtype] if dtype == "float32" else [dtype, "float32"]
    wanted = reload.compute(load(tied, dtype=kind), sample_ids(), NEW_TOKENS, [getattr(torch, name) for name in kinds])
    share = tensor_bytes(Checkpoint(directory)) / tensor_bytes(Checkpoint(tied)) * (4 / kind.itemsize)
    return {"why": native.why, "tolerance": native.tolerance, "bytes": share, "wanted": wanted, "directory": directory}


def compare(row: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Return a row with the differences of its types in place of the tensors."""
    wanted, tolerance = row.pop("wanted"), row.pop("tolerance")
    row.pop("directory")
    row["bound"] = max(tolerance or 0, TOLERANCES[torch.float32])
    for name, (logits_BTV, tokens_BG) in zip(
        (row["dtype"], "float32") if len(wanted) == 2 else ("float32",), wanted, strict=True
    ):
        difference_BTV = (found[f"{name}.logits"].float() - logits_BTV.float()).abs() / logits_BTV.abs().max().float()
        row[f"{name} max"], row[f"{name} mean"] = float(difference_BTV.max()), float(difference_BTV.mean())
        row[f"{name} greedy"] = float((found[f"{name}.tokens"] == tokens_BG).double().mean())
    row["ratio"] = row["float32 max" if tolerance is None else "float32 mean"]
    row["holds"] = row["ratio"] <= row["bound"] and row.get("bfloat16 mean", 0) <= TOLERANCES[torch.bfloat16]
    row["name"] = f"{row['source']} to {row['target']}: {row['case']}, {row['dtype']}"
    return row


def cells(row: dict[str, Any]) -> list[str]:
    """Return a row of the table."""
    head = [row["source"] + (" (real)" if row["real"] else ""), row["target"], row["case"], row["dtype"]]
    if "refused" in row:
        return [*head, f"refused: {row['refused']}", "", "", "", ""]
    own = row["dtype"]
    return [
        *head,
        f"{row['float32 max']:.1e}",
        f"{row['float32 mean']:.1e}",
        "" if own == "float32" else f"{row[f'{own} mean']:.1e}",
        f"{row[f'{own} greedy']:.0%}",
        f"{row['bytes']:.2f}" + ("" if row["holds"] else " MISSED"),
    ]


def main() -> None:
    """Write, reload, compare, print the table and write the rows."""
    args = parse()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        home = Path(name)
        rows = write_all(home, args)
        written = [row for row in rows if "refused" not in row]
        kinds = [["float32"] if row["dtype"] == "float32" else [row["dtype"], "float32"] for row in written]
        found = native_models.compute_without_modmoe([row["directory"] for row in written], kinds, home)
        for row, computed in zip(written, found, strict=True):
            compare(row, computed)
    columns = ["source", "target", "case", "type", "float32 max", "float32 mean", "own mean", "greedy", "bytes"]
    table = Table(title="differences of logits from the tied model, as shares of the largest logit")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*cells(row))
    Console(width=150).print(table)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        device = platform.processor() or "cpu"
        result = {"device": device, "date": str(datetime.date.today()), "versions": versions, "rows": rows}
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        lines = [" | ".join(columns), " | ".join("---" for _ in columns), *(" | ".join(cells(row)) for row in rows)]
        text = "\n".join(f"| {line} |" for line in lines)
        said = f"{__doc__.strip()}\n\n{device}, {result['date']}, {json.dumps(versions)}\n\n{text}\n"
        args.json.with_suffix(".md").write_text(f"# Native exports\n\n{said}", encoding="utf-8")


if __name__ == "__main__":
    main()
