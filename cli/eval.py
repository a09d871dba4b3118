"""``modmoe eval``: loss, perplexity, bits per byte and speed of each task, or lm-eval's tasks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from modmoe import api
from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.cli.groups import grouped
from modmoe.errors import RecipeError

EPILOG = flags.examples(
    "modmoe eval ./tuned --task math=math-test.jsonl --task stories=stories-test.txt",
    "modmoe eval ./tuned --task math=math-test.jsonl --baseline ./dense --json",
    "modmoe eval ./tuned --harness arc_easy,wikitext --limit 200 --baseline ./dense",
    "modmoe eval ./tuned --harness my_task --harness-path ./my-tasks --expert math",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What text is read, and how much."""

    task: flags.Task = None
    tokens: Annotated[int, typer.Option(help="At most so many tokens of each task.")] = 32768
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """Tasks of lm-eval."""

    harness: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Run these tasks of lm-eval, separated by commas.")
    ] = None
    harness_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="With --harness: a folder of task files (.yaml) of your own.")
    ] = None
    limit: Annotated[int | None, typer.Option(help="With --harness: at most so many samples of each task.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How the models are run."""

    baseline: Annotated[str | None, typer.Option(metavar="DENSE", help="The model to compare with.")] = None
    expert: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this expert throughout; by default the task's own.")
    ] = None
    seed: Annotated[
        int | None, typer.Option(help="Seed of everything that draws numbers: 0, or lm-eval's own.", show_default=False)
    ] = None
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where models run.")] = "auto"
    trust_remote_code: flags.Trust = False
    revision: flags.Revision = None


@grouped
def evaluate(
    context: typer.Context,
    source: flags.Source,
    text: TextOptions,
    tasks_of_harness: HarnessOptions,
    run: RunOptions,
    shown: flags.Shown,
) -> None:
    """Measure a model on each task's text: loss, perplexity, bits per byte, tokens a second; or run lm-eval on it.

    Loss is in nats a token. With --baseline, ratio is the loss divided by the baseline's: 1 is as good, above 1 is
    worse. Where rows have a prompt, exact_match is the share of them whose completion greedy decoding would give word
    for word.
    """
    with Console(as_json=shown.as_json, quiet=shown.quiet, verbose=shown.verbose) as console:
        tasks = flags.parse_tasks(text.task)
        names = None if tasks_of_harness.harness is None else _names(tasks_of_harness.harness)
        if tasks is None and names is None:
            raise RecipeError("--task", "no task is given", "add --task NAME=FILE, or --harness with lm-eval's tasks")
        _check_company(context, tasks is not None, names is not None)
        flags.choose("--device", run.device, ("auto", "cpu", "cuda"))
        for flag, number in {
            "--tokens": text.tokens,
            "--sequence-length": text.sequence_length,
            "--batch-size": text.batch_size,
            "--limit": 1 if tasks_of_harness.limit is None else tasks_of_harness.limit,
        }.items():
            if number < 1:
                raise RecipeError(str(flag), f"{number} is not above 0")
        result = api.evaluate(
            source,
            tasks,
            baseline=run.baseline,
            tokens=text.tokens,
            sequence_length=text.sequence_length,
            batch_size=text.batch_size,
            device=run.device,
            trust_remote_code=run.trust_remote_code,
            expert=run.expert,
            seed=run.seed,
            revision=run.revision,
            harness=names,
            harness_path=tasks_of_harness.harness_path,
            limit=tasks_of_harness.limit,
            progress=console.progress,
        )
        console.finish(result, title=source, shown=result if names is None else _rows(result))


def _names(harness: str) -> list[str]:
    names = [name.strip() for name in harness.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise RecipeError("--harness", f"'{harness}' is not a list of different names separated by commas")
    return names


def _check_company(context: typer.Context, is_text: bool, is_harness: bool) -> None:
    """Raise RecipeError for a flag that the other kind of evaluation reads."""
    if is_text and is_harness:
        raise RecipeError("--harness", "goes without --task", "run the two one after another")
    others = ("tokens", "sequence_length") if is_harness else ("harness_path", "limit")
    for name in others:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            company = "goes with --task, not with --harness" if is_harness else "goes with --harness"
            raise RecipeError(f"--{name.replace('_', '-')}", company, "leave it out")


def _rows(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return lm-eval's results as one table: a row for each metric of each task."""
    rows = []
    for task, found in result["tasks"].items():
        for metric, numbers in found["metrics"].items():
            row = {"task": task, "metric": metric, "value": numbers["value"], "stderr": numbers["stderr"]}
            if "baseline" in result:
                row["baseline"] = result["baseline"][task]["metrics"][metric]["value"]
                row["difference"] = numbers["difference"]
            rows.append({**row, "samples": found["samples"]})
    return {"lm_eval": result["lm_eval"], "tasks": rows}
