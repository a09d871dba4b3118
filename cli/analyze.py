"""``modmoe analyze``: what each task's text does in the dense model, and the modules that follow from it."""

from __future__ import annotations

from typing import Annotated

import typer

from modmoe import api
from modmoe.cli import flags
from modmoe.cli.console import Console

EPILOG = flags.examples(
    "modmoe analyze ./dense -o ./profile --task math=math.jsonl --task stories=stories.txt",
    "modmoe analyze ./dense -o ./profile -c three-tasks.yaml --num-modules 32 --report report.html",
)


def analyze(
    source: flags.Source,
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="The directory to write.")],
    task: flags.Task = None,
    recipe: flags.RecipeFile = None,
    tokens: flags.Tokens = None,
    num_modules: flags.NumModules = None,
    partition: flags.PartitionMethod = None,
    score: flags.Score = None,
    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report with plots.")
    ] = None,
    sequence_length: flags.SequenceLength = None,
    batch_size: flags.BatchSize = None,
    by_layer: flags.ByLayer = None,
    overwrite: flags.Overwrite = False,
    seed: flags.Seed = None,
    device: flags.Device = None,
    trust_remote_code: flags.Trust = False,
    allow_code: flags.AllowCode = False,
    revision: flags.Revision = None,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Run each task's text through a dense model, measure its FFNs and cut them into modules."""
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        result = api.analyze(
            source,
            output,
            recipe,
            report=report,
            overwrite=overwrite,
            revision=revision,
            progress=console.progress,
            tasks=flags.parse_tasks(task),
            tokens=tokens,
            num_modules=num_modules,
            partition=partition,
            score=score,
            sequence_length=sequence_length,
            batch_size=batch_size,
            by_layer=by_layer,
            seed=seed,
            device=device,
            trust_remote_code=trust_remote_code or None,
            allow_code=allow_code,
        )
        console.finish(result, title=output, next_step=flags.quote("modmoe", "convert", source, "OUT") + " ...")
