"""``modmoe eval``: loss, perplexity, bits per byte and speed of each task."""

from __future__ import annotations

from typing import Annotated

import typer

from modmoe import steps
from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.errors import RecipeError

EPILOG = flags.examples(
    "modmoe eval ./tuned --task math=math-test.jsonl --task stories=stories-test.txt",
    "modmoe eval ./tuned --task math=math-test.jsonl --baseline ./dense --json",
)


def evaluate(
    source: flags.Source,
    task: flags.Task = None,
    baseline: Annotated[str | None, typer.Option(metavar="DENSE", help="The model to compare with.")] = None,
    tokens: Annotated[int, typer.Option(help="At most so many tokens of each task.")] = 32768,
    sequence_length: Annotated[int, typer.Option(help="Tokens of a sequence.")] = 256,
    batch_size: Annotated[int, typer.Option(help="Sequences of a batch.")] = 8,
    expert: Annotated[
        str | None, typer.Option(metavar="NAME", help="Use this expert throughout; by default the task's own.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that draws numbers.")] = 0,
    device: Annotated[str, typer.Option(metavar="auto|cpu|cuda", help="Where models run.")] = "auto",
    trust_remote_code: flags.Trust = False,
    revision: flags.Revision = None,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Measure a model on each task's text: loss, perplexity, bits per byte, tokens a second."""
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        tasks = flags.parse_tasks(task)
        if tasks is None:
            raise RecipeError("--task: no task is given; add --task NAME=FILE.")
        flags.choose("--device", device, ("auto", "cpu", "cuda"))
        for flag, number in {
            "--tokens": tokens,
            "--sequence-length": sequence_length,
            "--batch-size": batch_size,
        }.items():
            if number < 1:
                raise RecipeError(f"{flag}: {number} is not above 0.")
        result = steps.evaluate(
            source,
            tasks,
            baseline=baseline,
            tokens=tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            device=device,
            trust_remote_code=trust_remote_code,
            expert=expert,
            seed=seed,
            revision=revision,
            progress=console.progress,
        )
        console.finish(result, title=source)
