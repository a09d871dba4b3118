"""Every form of one converted model of three tasks: bytes on disk, and speed of decoding in transformers and llama.cpp.

    python benchmarks/exports.py [--quick] [--json FILE] [--model DIR --task NAME=FILE ...] [--converter FILE]

The model that ships with modmoe (or --model), and one with random weights that is wide enough for weights to be what
takes the time, are converted to three experts routed by token, exported in every form, and written as GGUF by
llama.cpp's converter where that and llama-cpp-python are there (`make test-clients` puts both in place). One sequence,
a prompt of eight tokens. All variants decode in turn; a ratio is the median over rounds of the ratio, within a round,
to the dense model in the same program. Processor time, one thread. The forms are the same model: what differs is how
many bytes a token reads and what a program makes of them.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import transformers
from rich.console import Console
from rich.table import Table

import modmoe
from modmoe import api
from modmoe.demo.corpus import write_task_files
from modmoe.demo.main_job import MODEL
from modmoe.models.loading import load

HERE = Path(__file__).resolve().parent
CONVERTER = HERE.parent / "build" / "llama_cpp" / "llama.cpp" / "convert_hf_to_gguf.py"
PROMPT = list(range(3, 11))
# the converter knows published tokenizers by a hash; speed is measured on token numbers, whatever they stand for
CONVERT = """
import runpy, sys
from pathlib import Path
script, *rest = sys.argv[1:]
sys.path[:0] = [str(Path(script).parent), str(Path(script).parent / "gguf-py")]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
for source, file, kind in zip(*[iter(rest)] * 3):
    sys.argv = [script, source, "--outfile", file, "--outtype", kind]
    runpy.run_path(script, run_name="__main__")
"""


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="the shipped model alone, few rounds: within a minute")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--model", default=str(MODEL), help="a dense checkpoint in place of the one that ships")
    parser.add_argument("--task", action="append", default=[], metavar="NAME=FILE", help="its tasks")
    parser.add_argument("--num-modules", type=int, default=16, help="of its layers; experts have half of them")
    parser.add_argument("--converter", type=Path, default=CONVERTER, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--width", type=int, default=1024, help="of the model with random weights")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=24, help="tokens generated in a round")
    parser.add_argument("--rounds", type=int, default=7)
    return parser.parse_args()


def write_wide(directory: Path, width: int, layers: int) -> Path:
    """Save a Llama with random weights in bfloat16: four times the width in the FFN, 32,000 words."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 256,
        vocab_size=32000,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(directory)
    return directory


def write_forms(dense: Path, home: Path, tasks: dict[str, str], num_modules: int) -> dict[str, Path]:
    """Convert a dense model to an expert a task, each with half of the modules, and write every form of it."""
    options: dict[str, Any] = {"num_modules": num_modules, "modules_per_expert": num_modules // 2, "tokens": 2048}
    api.convert(dense, home / "converted", tasks=tasks, routing="token", **options)
    forms = {"dense": dense}
    for form in ("tied", "packed", "native"):
        client = "llama.cpp" if form == "native" else "transformers"
        made = api.export(home / "converted", home / form, form=form, client=client, verify=False)
        forms[f"native {made['target']}" if form == "native" else form] = home / form
    for name in tasks:
        forms[f"dense, {name}"] = home / f"dense-{name}"
        api.export(home / "converted", forms[f"dense, {name}"], form="dense", expert=name, verify=False)
    return forms


def write_gguf(forms: dict[str, Path], home: Path, converter: Path, kinds: tuple[str, ...]) -> dict[str, Path]:
    """Write what llama.cpp can run as GGUF in one process; nothing where it is not there."""
    if importlib.util.find_spec("llama_cpp") is None or not converter.is_file():
        print("llama.cpp or its converter is not there: make test-clients", file=sys.stderr)
        return {}
    wanted, files = [], {}
    one = next(name for name in forms if name.startswith("dense, "))
    native = next(name for name in forms if name.startswith("native"))
    for form in ("dense", native, one):
        for kind in kinds:
            files[f"{form}, {kind}"] = home / f"{form} {kind}.gguf".replace(", ", "-")
            wanted += [str(forms[form]), str(files[f"{form}, {kind}"]), kind]
    command = [sys.executable, "-c", CONVERT, str(converter), *wanted]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    return files


def in_transformers(directory: Path, tokens: int) -> Callable[[], Any]:
    """Return a function that generates ``tokens`` tokens with transformers."""
    model: Any = load(directory, device="cpu")
    ids_BT = torch.tensor([PROMPT])
    settings = transformers.GenerationConfig(
        max_new_tokens=tokens, do_sample=False, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    return lambda: model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), generation_config=settings)


def in_llama_cpp(file: Path, tokens: int, opened: contextlib.ExitStack) -> Callable[[], Any]:
    """Return a function that generates ``tokens`` tokens with llama.cpp, until ``opened`` is closed."""
    from llama_cpp import Llama, llama_cpp

    settings = llama_cpp.llama_model_default_params()
    settings.use_extra_bufts = False  # llama.cpp's AMX code, which is one of these, crashes on Q8_0 on some machines
    with mock.patch.object(llama_cpp, "llama_model_default_params", lambda: settings):
        model = Llama(str(file), n_ctx=len(PROMPT) + tokens + 1, n_threads=1, n_threads_batch=1, verbose=False)
    opened.callback(model.close)

    def generate() -> None:
        model.reset()
        for number, _ in enumerate(model.generate(PROMPT, top_k=1, temp=0.0, repeat_penalty=1.0), 1):
            if number == tokens:
                break

    return generate


def bytes_of(place: Path) -> int:
    """Return the bytes of a file, or of all files of a directory."""
    return sum(file.stat().st_size for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file())


def measure(
    size: str, forms: dict[str, Path], files: dict[str, Path], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Return a row for each form in each program that runs it."""
    runs: dict[tuple[str, str], Callable[[], Any]] = {
        ("transformers", name): in_transformers(place, args.tokens) for name, place in forms.items()
    }
    seconds: dict[tuple[str, str], list[float]] = {}
    with contextlib.ExitStack() as opened:
        runs |= {("llama.cpp", name): in_llama_cpp(file, args.tokens, opened) for name, file in files.items()}
        for round_number in range(args.rounds + 1):
            for key, run in runs.items():
                started_s = time.process_time()
                run()
                if round_number:
                    seconds.setdefault(key, []).append(time.process_time() - started_s)
    rows = []
    for (program, name), taken_s in seconds.items():
        base = "dense" if program == "transformers" else f"dense, {name.rpartition(', ')[2]}"
        ratios = [a / b for a, b in zip(seconds[program, base], taken_s, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        place = forms[name] if program == "transformers" else files[name]
        rows.append(
            {
                "name": f"{name} / dense",
                "model": size,
                "program": program,
                "form": name,
                "bytes_on_disk": bytes_of(place),
                "of_dense_bytes": bytes_of(place) / bytes_of(forms["dense"]),
                "tokens_per_second": args.tokens / statistics.median(taken_s),
                "ratio": middle,
                "spread": (high - low) / 2,
                "bound": None,
                "holds": None,
            }
        )
    return rows


def rows_of(size: str, dense: Path, home: Path, tasks: dict[str, str], num_modules: int, args: Any) -> list[Any]:
    """Write one model's forms and measure them."""
    home.mkdir()
    forms = write_forms(dense, home, tasks, num_modules)
    files = write_gguf(forms, home, args.converter, ("bf16",) if args.quick else ("bf16", "q8_0"))
    return measure(size, forms, files, args)


def main() -> None:
    """Write and measure all forms, print the table, write the rows."""
    args = parse()
    if args.quick:
        args.tokens, args.rounds = 8, 3
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        made = write_task_files(home / "texts", split="train", rows_per_task=60)
        texts = {name: str(file) for name, file in made.items()}
        given = dict(item.split("=", 1) for item in args.task)
        dense = Path(args.model)
        name = "shipped" if args.model == str(MODEL) else dense.name
        rows = rows_of(name, dense, home / "small", given or texts, args.num_modules, args)
        if not args.quick:
            wide = write_wide(home / "wide-dense", args.width, args.layers)
            rows += rows_of(f"random {args.width} x {args.layers}", wide, home / "wide", texts, 32, args)
    table = Table(title=f"forms of a model of three tasks; decoding {args.tokens} tokens, batch 1, one thread")
    for column in ("model", "program", "form", "MB", "of dense", "tokens/s", "times dense", "spread"):
        table.add_column(column, justify="left" if column in ("model", "program", "form") else "right")
    for row in rows:
        table.add_row(
            row["model"], row["program"], row["form"], f"{row['bytes_on_disk'] / 1e6:.1f}",
            f"{row['of_dense_bytes']:.2f}", f"{row['tokens_per_second']:.1f}", f"{row['ratio']:.2f}",
            f"{row['spread']:.2f}",
        )  # fmt: skip
    Console(width=110).print(table)
    if args.json:
        versions = {"modmoe": modmoe.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        if importlib.util.find_spec("llama_cpp") is not None:
            versions["llama_cpp_python"] = importlib.metadata.version("llama_cpp_python")
        found = {
            "device": f"{platform.processor() or 'cpu'}, one thread",
            "date": datetime.date.today().isoformat(),
            "versions": versions,
            "rows": rows,
        }
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
