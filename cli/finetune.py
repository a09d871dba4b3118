"""``modmoe finetune``: train a converted model's routers, a LoRA, all weights or adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from modmoe import api
from modmoe.cli import flags
from modmoe.cli.console import Console, is_first_process
from modmoe.cli.estimates import estimate_words
from modmoe.cli.groups import grouped

EPILOG = flags.examples(
    "modmoe finetune ./moe ./tuned --task math=math.jsonl --task stories=stories.txt --train full",
    "modmoe finetune ./moe ./tuned -c three-tasks.yaml --distill-from ./dense --max-steps 500",
    "modmoe finetune ./moe ./tuned -c three-tasks.yaml --resume",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """What is trained, and on what text."""

    task: flags.Task = None
    recipe: flags.RecipeFile = None
    eval_task: Annotated[
        list[str] | None,
        typer.Option("--eval", metavar="NAME=FILE", help="Text to measure before and after. May be repeated."),
    ] = None
    train: Annotated[
        str | None,
        typer.Option(metavar="router|lora|full|adapters", help="What learns; by default full: every weight."),
    ] = None
    adapter: Annotated[
        str | None, typer.Option(metavar="METHOD", help="With --train adapters: attach this one to a model without.")
    ] = None
    budget: Annotated[
        int | None, typer.Option(help="With --adapter: parameters to stay within; the rank is solved for.")
    ] = None
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the LoRA matrices; by default 16.")] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """What the loss is made of."""

    distill_from: Annotated[
        str | None,
        typer.Option(metavar="DENSE", help="The dense model whose predictions are learned; by default the text alone."),
    ] = None
    distill_weight: Annotated[
        float | None, typer.Option(help="Share of the distillation loss, 0 to 1; by default 0.5.")
    ] = None
    temperature: Annotated[float | None, typer.Option(help="Temperature of the distillation; by default 1.")] = None
    balance_weight: Annotated[float | None, typer.Option(help="Factor of the load-balance loss; by default 0.01.")] = (
        None
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOptions:
    """How the steps go."""

    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps; by default 200.")] = None
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; by default by the hidden size, 5e-5 to 1e-3.")
    ] = None
    warmup_fraction: Annotated[
        float | None, typer.Option(help="Share of the steps in which the learning rate rises; by default 0.05.")
    ] = None
    batch_size: flags.BatchSize = None
    sequence_length: flags.SequenceLength = None
    packing: Annotated[
        bool | None, typer.Option("--packing/--no-packing", help="Fill sequences with several rows.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StateOptions:
    """What is kept and drawn of a run, and gone on with."""

    save_steps: Annotated[
        int | None, typer.Option(help="Steps between two states that --resume goes on from; by default 100.")
    ] = None
    report_to: Annotated[
        str | None, typer.Option(metavar="tensorboard|trackio|wandb", help="What draws the curves as they grow.")
    ] = None
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last state of an interrupted run.")] = False


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How the run goes."""

    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what learns and what it will cost; write nothing.")
    ] = False
    estimate_for: flags.EstimateFor = None
    overwrite: flags.Overwrite = False
    seed: flags.Seed = None
    device: flags.Device = None
    trust_remote_code: flags.Trust = False
    allow_code: flags.AllowCode = False
    revision: flags.Revision = None


@grouped
def finetune(
    source: flags.Source,
    output: flags.Output,
    job: JobOptions,
    losses: LossOptions,
    steps: StepOptions,
    states: StateOptions,
    run: RunOptions,
    shown: flags.Shown,
) -> None:
    """Train a converted model on the tasks' text."""
    with Console(as_json=shown.as_json, quiet=shown.quiet, verbose=shown.verbose) as console:
        result = api.finetune(
            source,
            output,
            job.recipe,
            eval_tasks=flags.parse_tasks(job.eval_task, "--eval"),
            resume=states.resume,
            overwrite=run.overwrite,
            dry_run=run.dry_run,
            estimate_for=run.estimate_for,
            revision=run.revision,
            progress=console.progress,
            tasks=flags.parse_tasks(job.task),
            train=job.train,
            adapter=job.adapter,
            budget=job.budget,
            distill_from=losses.distill_from,
            distill_weight=losses.distill_weight,
            temperature=losses.temperature,
            balance_weight=losses.balance_weight,
            max_steps=steps.max_steps,
            learning_rate=steps.learning_rate,
            warmup_fraction=steps.warmup_fraction,
            batch_size=steps.batch_size,
            sequence_length=steps.sequence_length,
            packing=steps.packing,
            lora_rank=job.lora_rank,
            save_steps=states.save_steps,
            report_to=states.report_to,
            seed=run.seed,
            device=run.device,
            trust_remote_code=run.trust_remote_code or None,
            allow_code=run.allow_code,
        )
        line = flags.quote("modmoe", "export", output, "OUT", "--format", "safetensors", "--form", "tied")
        if not run.dry_run and not _can_export(output):
            words = flags.task_words(flags.parse_tasks(job.task), None) or ["--task", "NAME=FILE"]
            line = flags.quote("modmoe", "eval", output, *words, "--baseline", source)
        console.finish(
            result,
            title=output,
            next_step="the same without --dry-run" if run.dry_run else line,
            shown=estimate_words(result),
        )


def _can_export(output: str) -> bool:
    """Return whether ``modmoe export`` takes what was written: a dense model or a native mixture is whole as it is."""
    if not is_first_process() or not (Path(output) / "config.json").is_file():
        return True
    from modmoe.models.loading import is_tied

    return is_tied(Path(output))
