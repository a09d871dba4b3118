"""``modmoe export``: a converted model or an adapter in a form that is given away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import typer

from modmoe import api
from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.cli.groups import grouped
from modmoe.formats.names import CLIENTS, DTYPES, FORMS

EPILOG = flags.examples(
    "modmoe export ./tuned ./out --format safetensors --form tied",
    "modmoe export ./tuned ./mixtral --form native --target mixtral --dtype bfloat16",
    "modmoe export ./tuned ./for-gguf --form native --for llama.cpp",
    "modmoe export ./tuned ./math-only --form dense --expert math",
    "modmoe export ./adapter ./whole --form tied",
    "modmoe export ./adapter ./plain --form dense --approximate --task math=math.jsonl",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileOptions:
    """The files that are written."""

    file_format: Annotated[
        str, typer.Option("--format", metavar="safetensors", help="The format of the weight files.")
    ] = "safetensors"
    dtype: Annotated[
        str | None, typer.Option(metavar="|".join(DTYPES), help="Type of the weights; by default as they are.")
    ] = None
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="The most that one weight file holds.")] = "5GB"
    overwrite: flags.Overwrite = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOptions:
    """What is written of the model, and for whom."""

    form: Annotated[str, typer.Option(metavar="|".join(FORMS), help="What is written; see above.")] = "tied"
    target: Annotated[
        str,
        typer.Option(
            metavar="auto|mixtral|qwen2_moe|qwen3_moe|granitemoeshared|glm4_moe|flex_olmo",
            help="The architecture of a native export.",
        ),
    ] = "auto"
    client: Annotated[
        str, typer.Option("--for", metavar="|".join(CLIENTS), help="The program that a native export is for.")
    ] = "transformers"
    expert: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="The expert that a dense export keeps, or that a model routed by task begins with."
        ),
    ] = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ProofOptions:
    """How the export is proved, and folded where that is not exact."""

    verify: Annotated[
        bool, typer.Option("--verify/--no-verify", help="Reload in a fresh process and compare the outputs.")
    ] = True
    approximate: Annotated[
        bool, typer.Option("--approximate", help="Fold an adapter that depends on the token, at its mean over --task.")
    ] = False
    task: flags.Task = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RunOptions:
    """How the run goes."""

    trust_remote_code: flags.Trust = False
    revision: flags.Revision = None
    seed: Annotated[int | None, typer.Option(hidden=True)] = None
    device: Annotated[str | None, typer.Option(hidden=True)] = None


@grouped
def export(
    source: flags.Source,
    output: flags.Output,
    files: FileOptions,
    model: ModelOptions,
    proof: ProofOptions,
    run: RunOptions,
    shown: flags.Shown,
) -> None:
    """Export a converted model, or a routed adapter.

    \b
    tied     every module once, or the base model and its adapter, with the code that runs it
    native   an architecture that other tools know, experts copied out
    dense    one expert as a dense model of the original family, or the base model with the adapter folded in
    packed   modules as ordinary experts, the router choosing modules: for vLLM and SGLang alone
    adapter  the adapter alone, as PEFT has it
    """
    with Console(as_json=shown.as_json, quiet=shown.quiet, verbose=shown.verbose) as console:
        flags.choose("--format", files.file_format, ("safetensors",))
        flags.choose("--form", model.form, FORMS)
        flags.choose("--for", model.client, CLIENTS)
        if files.dtype is not None:
            flags.choose("--dtype", files.dtype, DTYPES)
        if run.device is not None:
            flags.choose("--device", run.device, ("auto", "cpu", "cuda"))
        flags.parse_size("--max-shard-size", files.max_shard_size)
        result = api.export(
            source,
            output,
            form=model.form,
            target=model.target,
            client=model.client,
            expert=model.expert,
            dtype=files.dtype,
            max_shard_size=files.max_shard_size,
            overwrite=files.overwrite,
            trust_remote_code=run.trust_remote_code,
            verify=proof.verify,
            revision=run.revision,
            approximate=proof.approximate,
            tasks=flags.parse_tasks(proof.task),
            progress=console.progress,
        )
        if not shown.as_json and result.get("verified"):
            # people read the line that counts; programs get all of it
            result["verified"].pop("by_dtype", None)
        console.finish(result, title=output, next_step=flags.quote("modmoe", "push", output, "OWNER/NAME", "--dry-run"))
