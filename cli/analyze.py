"""``modmoe analyze``: what each task's text does in the dense model, and the modules that follow from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from modmoe import api
from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.cli.groups import grouped

EPILOG = flags.examples(
    "modmoe analyze ./dense -o ./profile --task math=math.jsonl --task stories=stories.txt",
    "modmoe analyze ./dense -o ./profile -c three-tasks.yaml --num-modules 32 --report report.html",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What text is read."""

    task: flags.Task = None
    recipe: flags.RecipeFile = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How much text is read, and how."""

    tokens: flags.Tokens = None
    sequence_length: flags.SequenceLength = None
    batch_size: flags.BatchSize = None
    by_layer: flags.ByLayer = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleOptions:
    """How neurons are cut into modules, and what a module is worth."""

    num_modules: flags.NumModules = None
    partition: flags.PartitionMethod = None
    score: flags.Score = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How the run goes."""

    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report with plots.")
    ] = None
    overwrite: flags.Overwrite = False
    seed: flags.Seed = None
    device: flags.Device = None
    trust_remote_code: flags.Trust = False
    allow_code: flags.AllowCode = False
    revision: flags.Revision = None


@grouped
def analyze(
    source: flags.Source,
    output: Annotated[str, typer.Option("-o", "--output", metavar="DIR", help="The directory to write.")],
    job: JobOptions,
    text: TextOptions,
    modules: ModuleOptions,
    run: RunOptions,
    shown: flags.Shown,
) -> None:
    """Run each task's text through a dense model, measure its FFNs and cut them into modules."""
    with Console(as_json=shown.as_json, quiet=shown.quiet, verbose=shown.verbose) as console:
        result = api.analyze(
            source,
            output,
            job.recipe,
            report=run.report,
            overwrite=run.overwrite,
            revision=run.revision,
            progress=console.progress,
            tasks=flags.parse_tasks(job.task),
            tokens=text.tokens,
            num_modules=modules.num_modules,
            partition=modules.partition,
            score=modules.score,
            sequence_length=text.sequence_length,
            batch_size=text.batch_size,
            by_layer=text.by_layer,
            seed=run.seed,
            device=run.device,
            trust_remote_code=run.trust_remote_code or None,
            allow_code=run.allow_code,
        )
        console.finish(result, title=output, next_step=flags.quote("modmoe", "convert", source, "OUT") + " ...")
