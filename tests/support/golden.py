"""What every command writes and says, as sums: ``python -m tests.support.golden FILE [--with MODEL]``.

A change that is to change no behaviour leaves the file as it was before. It has, for each command, the exit code, the
JSON that it prints, and of each file that it writes the SHA-256; times, versions and code are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modmoe.cli import main
from tests.support import moes, tiny

_TIMES = re.compile(r"seconds|_s$|per_second|version|memory|rss|speed|minutes|hours|uploaded|estimate|commit")
"""Keys of what differs from run to run."""
_TASKS = "--task sums=tasks/sums.jsonl --task words=tasks/words.jsonl --tokens 900 --sequence-length 64"
_CUT = "--num-modules {modules}"
_CONVERSIONS = {
    "modular": "",
    "greedy refit": "--assignment greedy --refit --routing task",
    "tokens": "--assignment tokens --compensation",
    "modules": "--assignment modules --router-start average_key",
    "union": "--top-k 2 --combine union --router-kind mlp",
    "sum": "--top-k 2 --combine sum --routing sequence --routing-chunk 8",
    "coactivation": "--partition coactivation --by-layer",
    "gradient": "--partition gradient --score taylor",
    "random": "--partition random --seed 3",
}
_METHODS = {
    "prune": "--method prune",
    "prune refit": "--method prune --refit --score magnitude",
    "wanda": "--method prune --score wanda",
    "cmoe": "--method cmoe",
    "moefication": "--method moefication",
    "emoe": "--method emoe",
    "llama_moe": "--method llama_moe",
    "upcycle": "--method upcycle --num-experts 3",
}
_WHOLE = ("prune", "prune refit", "wanda", "upcycle")
"""Methods that cut no modules."""
_ADAPTERS = ("comol", "soft_moa", "mixlora", "molora", "perft_r", "sparmoe")
_EXPERTS = ("reap", "frequency", "contribution")


def commands(dense: str, modules: int, *, is_first: bool) -> Iterator[tuple[str, str]]:
    """Yield a name and the words of each command over a dense model; each writes into a directory of its name."""
    cut = _CUT.format(modules=modules)
    yield "analyze", f"analyze {dense} -o {{out}} {_TASKS} {cut}"
    for name, more in (_CONVERSIONS if is_first else {"modular": "", "sum": _CONVERSIONS["sum"]}).items():
        yield f"convert {name}", f"convert {dense} {{out}} {_TASKS} {cut} {more}"
    for name, more in _METHODS.items() if is_first else ():
        text = "" if name == "upcycle" else _TASKS
        yield name, f"convert {dense} {{out}} {text} {'' if name in _WHOLE else cut} {more}"
    for adapter in _ADAPTERS if is_first else _ADAPTERS[:2]:
        yield f"adapters {adapter}", f"convert {dense} {{out}} --method adapters --adapter {adapter}"
    yield "dry run", f"convert {dense} {{out}} {_TASKS} {cut} --dry-run"
    tied = f"{dense} convert modular"
    few = (
        "--max-steps 3 --batch-size 2 --sequence-length 64 --task sums=tasks/sums.jsonl --task words=tasks/words.jsonl"
    )
    for train in ("router", "lora", "full") if is_first else ("full",):
        yield (
            f"finetune {train}",
            f"finetune {tied!r} {{out}} {few} --train {train} --distill-from {dense} --save-steps 2",
        )
    yield "finetune adapters", f"finetune {f'{dense} adapters comol'!r} {{out}} {few}"
    yield "finetune dry run", f"finetune {tied!r} {{out}} {few} --dry-run"
    for form, more in (
        ("tied", "--dtype bfloat16 --max-shard-size 100KB"),
        ("dense", "--expert sums"),
        ("native", ""),
        ("packed", ""),
    ):
        yield f"export {form}", f"export {tied!r} {{out}} --form {form} {more}"
    for form in ("tied", "adapter"):
        yield f"export adapters {form}", f"export {f'{dense} finetune adapters'!r} {{out}} --form {form}"
    yield "eval", f"eval {tied!r} --task sums=tasks/sums.jsonl --tokens 300 --baseline {dense}"
    for source in ("convert modular", "export packed", "export adapters adapter", "finetune full"):
        yield f"inspect {source}", f"inspect {f'{dense} {source}'!r}"
        yield f"doctor {source}", f"doctor {f'{dense} {source}'!r}"
    yield "push", f"push {f'{dense} export tied'!r} me/moe --dry-run"
    yield "validate", f"validate {tied!r}/modmoe.yaml"


def run(words: str, out: str) -> dict[str, Any]:
    """Run a command in this process, and return its code, its JSON and what it wrote."""
    import shlex

    arguments = [word.replace("{out}", out) for word in shlex.split(words)]
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = main.run([*arguments, "--json"])
    text = stdout.getvalue()
    errors = [line for line in stderr.getvalue().splitlines() if code and line.startswith("modmoe: ")][-1:]
    found: dict[str, Any] = {"code": code, "errors": errors, "said": plain(json.loads(text)) if text else None}
    if Path(out).is_dir():
        found["files"] = {
            str(file.relative_to(out)): file_sum(file) for file in sorted(Path(out).rglob("*")) if file.is_file()
        }
    return found


def file_sum(file: Path) -> Any:
    """Return what must stay of a file: the sum, or of JSON the sum of its values without times; None of code."""
    if file.suffix in (".py", ".html", ".md", ".svg") or file.name == ".modmoe.json":
        return None
    data = file.read_bytes()
    if file.suffix == ".json":
        data = json.dumps(plain(json.loads(data)), sort_keys=True).encode()
    if file.suffix == ".yaml":
        data = re.sub(rb"(?m)^#.*\n", b"", data)
    return hashlib.sha256(data).hexdigest()


def plain(value: Any) -> Any:
    """Return a value of JSON without times, versions and the working directory, and floats to eight digits."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items() if not _TIMES.search(key)}
    if isinstance(value, list):
        return [
            plain(item)
            for item in value
            if not (isinstance(item, dict) and str(item.get("path")).endswith((".py", ".md", ".json")))
        ]
    if isinstance(value, str):
        return value.replace(os.getcwd(), "HERE")
    return float(f"{value:.8g}") if isinstance(value, float) else value


def golden(models: dict[str, Path]) -> dict[str, Any]:
    """Return what all commands write and say, run in a directory of its own."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="golden-") as home:
        os.chdir(home)
        tiny.write_tasks(Path("tasks"), rows=24)
        for name, source in models.items():
            os.symlink(source, name)
        for name, changes in (("qwen3", {}), ("gpt2", {}), ("phi3", {})):
            tiny.save_dense(Path(name), name, **changes)
        for dense in (*models, "qwen3", "gpt2", "phi3"):
            width = 43 if dense in models else 8
            for name, words in commands(dense, width, is_first=dense in ("qwen3", *models)):
                found[f"{dense} {name}"] = run(words, f"{dense} {name}")
                print(f"{dense} {name}: {found[f'{dense} {name}']['code']}", file=sys.stderr, flush=True)
        for family in ("mixtral", "qwen3_moe"):
            moes.save_moe(Path(family), family)
            for score in _EXPERTS:
                name = f"{family} experts {score}"
                found[name] = run(
                    f"convert {family} {{out}} --method experts --score {score} --num-experts 2 {_TASKS}", name
                )
                print(f"{name}: {found[name]['code']} {found[name]['errors']}", file=sys.stderr, flush=True)
        os.chdir("/")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--with", dest="models", type=Path, action="append", default=[], help="a dense model more")
    wanted = parser.parse_args()
    target = wanted.file.resolve()
    result = golden({path.name: path.resolve() for path in wanted.models})
    target.write_text(json.dumps(result, indent=1, sort_keys=True) + "\n", encoding="utf-8")
