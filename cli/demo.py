"""``modmoe demo``: the whole main job on the model that ships with modmoe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from modmoe.cli import flags
from modmoe.cli.console import Console

EPILOG = flags.examples("modmoe demo", "modmoe demo ./demo-out --overwrite --json")
_TEXT_CHARACTERS = 90


def demo(
    output: Annotated[
        str | None, typer.Argument(metavar="OUT", help="The directory to write; by default ./modmoe-demo.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that draws numbers.")] = 0,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Convert, fine-tune, measure and export the small model that ships with modmoe.

    It is offline, and takes some minutes on a laptop CPU.
    """
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from modmoe.demo.main_job import run

        result = run(output, seed=seed, overwrite=overwrite, progress=console.progress)
        report, tuned = result["report"], result["models"]["fine-tuned"]["directory"]
        next_step = f"open {report} in a browser, then {flags.quote('modmoe', 'inspect', tuned)}"
        console.finish(result if as_json else summarise(result), title=result["output"], next_step=next_step)


def summarise(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the demo found as the values and small tables that a person reads."""
    names = {key: key.replace("_", " ") for key in ("stored", "active")}
    models = {
        model: {
            **{f"loss {task}": loss for task, loss in about["loss"].items()},
            **{title: about[key] for key, title in names.items()},
            "decode tokens/s": round(about["decode_tokens_per_second"], 1),
        }
        for model, about in result["models"].items()
    }
    exports = {
        form: {
            "output": about["output"],
            "reloads without modmoe": about["verified"]["reloaded_without_modmoe"],
            "logit difference": about["verified"]["max_abs_logit_diff"],
            "same text": about["verified"]["greedy_tokens_equal"],
        }
        for form, about in result["exports"].items()
    }
    text = [
        {"task": task if model == "prompt" else "", "model": model, "text": _one_line(words)}
        for task, by_model in result["samples"].items()
        for model, words in by_model.items()
    ]
    return {
        "FFN sparsity": result["conversion"]["sparsity"]["ffn"],
        "total sparsity": result["conversion"]["sparsity"]["total"],
        "seconds": result["seconds"]["total"],
        "report": str(Path(result["report"])),
        "models": models,
        "text": text,
        "exports": exports,
    }


def _one_line(text: str) -> str:
    line = text.strip("\n").replace("\n", "\\n")
    return line if len(line) <= _TEXT_CHARACTERS else line[: _TEXT_CHARACTERS - 3] + "..."
