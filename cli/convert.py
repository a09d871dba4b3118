"""``modmoe convert``: a dense checkpoint becomes a mixture of experts, or one of these has fewer experts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Annotated

import typer

from modmoe import api
from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.cli.estimates import estimate_words
from modmoe.cli.groups import grouped
from modmoe.cli.inspect import draw_tree
from modmoe.conversion.table import CONVERSIONS
from modmoe.errors import RecipeError

EPILOG = flags.examples(
    "modmoe convert ./dense ./moe --task math=math.jsonl --task stories=stories.txt --active-fraction 0.5",
    "modmoe convert ./dense ./moe -c three-tasks.yaml --routing task --dry-run --estimate-for rtx-4090",
    "modmoe convert ./dense ./moe -c three-tasks.yaml --fit-bytes 4GB --json",
    "modmoe convert ./dense ./moe --method cmoe --num-modules 8 --active-fraction 0.75 --task math=math.jsonl",
    "modmoe convert ./dense ./pruned --method prune --score wifv --compensation --task math=math.jsonl",
    "modmoe convert ./dense ./moe --method upcycle --num-experts 8 --top-k 2",
    "modmoe convert ./mixtral ./smaller --method experts --num-experts 4 --task math=math.jsonl",
    "modmoe convert ./model ./adapter --method adapters --adapter comol --budget 1000000",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """Which conversion is run, and on what text, how much of it."""

    task: flags.Task = None
    recipe: flags.RecipeFile = None
    method: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help=f"The conversion, by default modular: {', '.join(CONVERSIONS)}; or the dotted path of one of yours.",
        ),
    ] = None
    adapter: Annotated[
        str | None, typer.Option(metavar="METHOD", help="With --method adapters: which routed adapter.")
    ] = None
    budget: Annotated[
        int | None, typer.Option(help="With --method adapters: parameters to stay within; the rank is solved for.")
    ] = None
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
class ExpertOptions:
    """How many experts there are, and which modules they have."""

    num_experts: Annotated[
        int | None,
        typer.Option(
            help="Experts; by default one a task, with --method upcycle 8. With --method experts: those that are left."
        ),
    ] = None
    modules_per_expert: Annotated[int | None, typer.Option(help="Modules of each expert, shared ones included.")] = None
    active_fraction: Annotated[
        float | None,
        typer.Option(
            help="The same as a share of all modules, by default 0.5; with --method prune the share of neurons kept."
        ),
    ] = None
    fit_bytes: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="As many modules an expert as keep the weights within a size such as 4GB."),
    ] = None
    shared_modules: Annotated[
        int | None, typer.Option(help="Modules that every expert has, counted among its own; by default 0.")
    ] = None
    assignment: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="How modules are given to experts: top_score (the default), greedy, tokens, modules, random. With "
            "--method experts: prune (the default) or merge.",
        ),
    ] = None
    coverage: Annotated[
        bool | None, typer.Option("--coverage/--no-coverage", help="Give every module to some expert.")
    ] = None
    refit: Annotated[
        bool | None, typer.Option("--refit/--no-refit", help="Fit down projections anew to the modules that are on.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """How experts are chosen, and what their outputs add up to."""

    top_k: Annotated[int | None, typer.Option(help="Experts chosen at once; by default 1.")] = None
    routing: Annotated[
        str | None,
        typer.Option(
            metavar="token|sequence|task",
            help="What a router chooses an expert for: each token (the default) or each sequence; task: no router, the "
            "caller names the expert.",
        ),
    ] = None
    combine: Annotated[
        str | None,
        typer.Option(
            metavar="union|sum",
            help="With --top-k above 1: a module counts once (union, the default), or experts are weighted and added.",
        ),
    ] = None
    compensation: Annotated[
        bool | None, typer.Option("--compensation/--no-compensation", help="Add the mean output of skipped modules.")
    ] = None
    router_start: Annotated[
        str | None,
        typer.Option(
            metavar="METHOD",
            help="What the router starts from: logistic (the default), ridge, least_squares, centroid, average_key, "
            "zero.",
        ),
    ] = None
    router_kind: Annotated[
        str | None, typer.Option(metavar="linear|mlp", help="One matrix (linear, the default) or two layers.")
    ] = None
    routing_chunk: Annotated[
        int | None, typer.Option(help="Sequence routing: tokens after which the choice is made anew without a prompt.")
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How the run goes."""

    report: Annotated[
        str | None, typer.Option(metavar="FILE", help="Write a self-contained HTML report with plots.")
    ] = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what it will cost; write nothing.")] = (
        False
    )
    estimate_for: flags.EstimateFor = None
    overwrite: flags.Overwrite = False
    seed: flags.Seed = None
    device: flags.Device = None
    trust_remote_code: flags.Trust = False
    allow_code: flags.AllowCode = False
    revision: flags.Revision = None


@grouped
def convert(
    source: flags.Source,
    output: flags.Output,
    job: JobOptions,
    modules: ModuleOptions,
    experts: ExpertOptions,
    router: RouterOptions,
    run: RunOptions,
    shown: flags.Shown,
) -> None:
    """Convert a dense checkpoint into a parameter-sharing mixture of experts.

    FFN neurons are cut into disjoint modules, and each expert is a set of modules that it may share with others. Every
    module is stored once.

    With --method cmoe, moefication, emoe or llama_moe it is a published split: every module is an expert of its own,
    chosen token by token, and --active-fraction of the modules are on (CMoE: half of these for every token, or
    --shared-modules of them).

    With --method prune the FFNs are cut to --active-fraction of their neurons, those of the highest --score (magnitude,
    wanda, wifv, taylor, activation, random), and a dense checkpoint of the same architecture is written.

    With --method upcycle each of --num-experts experts is a copy of the FFN, --top-k of them are chosen (2), and it is
    written for a mixture of experts that transformers knows (Mixtral, Qwen2-MoE, Qwen3-MoE, FlexOlmo, GraniteMoE). It
    computes what the dense model does until it is trained, and needs no text.

    With --method experts the source is a mixture of experts (Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, FlexOlmo): experts
    of a low --score (reap, frequency, activation, msan, contribution, random) are left out, or experts of like outputs
    are merged, and it is written in its own format.
    """
    with Console(as_json=shown.as_json, quiet=shown.quiet, verbose=shown.verbose) as console:
        tasks = flags.parse_tasks(job.task)
        _check_one_size(experts)
        result = api.convert(
            source,
            output,
            job.recipe,
            fit_bytes=None if experts.fit_bytes is None else flags.parse_size("--fit-bytes", experts.fit_bytes),
            overwrite=run.overwrite,
            dry_run=run.dry_run,
            estimate_for=run.estimate_for,
            revision=run.revision,
            report=run.report,
            progress=console.progress,
            allow_code=run.allow_code,
            tasks=tasks,
            method=job.method,
            adapter=job.adapter,
            budget=job.budget,
            tokens=job.tokens,
            sequence_length=job.sequence_length,
            batch_size=job.batch_size,
            by_layer=job.by_layer,
            **asdict(modules),
            **{name: value for name, value in asdict(experts).items() if name != "fit_bytes"},
            **asdict(router),
            seed=run.seed,
            device=run.device,
            trust_remote_code=run.trust_remote_code or None,
        )
        words = flags.task_words(tasks, job.recipe)
        # the dense model teaches what was made of its modules; a pruned model or one with an adapter does without
        words += ["--distill-from", source] if words and result.get("stored_modules") else []
        words += ["--trust-remote-code"] if words and run.trust_remote_code else []
        following = flags.quote("modmoe", "finetune", output, "OUT", *words) + ("" if words else " ...")
        next_step = "the same without --dry-run" if run.dry_run else following
        if result.get("stored_modules") and result["num_experts"] == 1:
            console.say(
                "note: there is one expert, so nothing is chosen; for more give a second --task, or --num-experts."
            )
        picture = (lambda: draw_tree(result, output)) if result.get("stored_modules") and not run.dry_run else None
        console.finish(result, title=output, next_step=next_step, shown=estimate_words(result), picture=picture)


def _check_one_size(experts: ExpertOptions) -> None:
    """Raise RecipeError where the size of an expert is set in two ways."""
    sizes = {
        "--modules-per-expert": experts.modules_per_expert,
        "--active-fraction": experts.active_fraction,
        "--fit-bytes": experts.fit_bytes,
    }
    flags_set = [flag for flag, size in sizes.items() if size is not None]
    if len(flags_set) > 1:
        raise RecipeError(" and ".join(flags_set), "give one of them", "each sets the size of an expert")
