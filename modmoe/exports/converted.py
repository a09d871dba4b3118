"""One entry for every form of export: plan, write beside, prove by reloading, rename."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modmoe.errors import CheckpointError, ExportError, did_you_mean
from modmoe.formats.card.converted import write_card
from modmoe.formats.dense import RECIPE, dense_plan, expert_number, family_of_tied
from modmoe.formats.names import CLIENTS, DTYPES, FORMS
from modmoe.formats.native.plan import native_export
from modmoe.formats.packed import packed_plan, packed_warnings
from modmoe.formats.proof.verify import verify as verify_export
from modmoe.formats.pushed_files import public_recipe
from modmoe.formats.tied import tied_plan, with_dtype
from modmoe.formats.tied_code import own_files, write_code, write_packed_code
from modmoe.models.counts import tensor_bytes
from modmoe.models.loading import PACKED_PREFIX, is_adapted, is_adapter, is_tied, is_tied_type, own_code
from modmoe.models.opened import OpenedModel
from modmoe.runtime.progress import Progress, silent
from modmoe.storage.checkpoint import Checkpoint, CheckpointWriter, copy_companions, parse_bytes, resolve_source
from modmoe.storage.plan import Plan
from modmoe.storage.staging import check_output, open_output

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Export:
    """One form of a model: what is written and how it is proved."""

    plan: Plan
    target: str
    expert: str | None = None
    """The expert that the tied model is held to in the proof."""
    needs_code: bool = False
    """Whether the export carries code of its own."""
    load_options: dict[str, Any] = field(default_factory=dict)
    tolerance: float | None = None
    """Bound of the proof in float32, as a share of the largest logit; None for that of exact exports."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the result of this form has beside that of every form."""
    warnings: list[str] = field(default_factory=list)


def export(
    source: str,
    output: str,
    *,
    form: str,
    target: str = "auto",
    client: str = "transformers",
    expert: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    verify: bool = True,
    approximate: bool = False,
    tasks: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a tied checkpoint or an adapter in another form to ``output``, whole or not at all.

    The source is left unchanged.

    Args:
        source: a directory or Hub id of what ``modmoe convert`` or ``finetune`` wrote, or of an adapter.
        output: a directory that is new or empty, unless ``overwrite``.
        form: ``tied``, ``dense``, ``native`` or ``packed``; of an adapter ``adapter`` too, and not ``packed``.
        target: the architecture of a native export, or ``auto``.
        client: the program that a native export is for: ``transformers``, ``vllm``, ``sglang`` or ``llama.cpp``.
        expert: the expert that a dense export keeps, or that a tied or packed one routed by task begins with.
        dtype: ``bfloat16``, ``float16`` or ``float32``; None keeps the weights' type.
        max_shard_size: such as ``5GB``.
        overwrite: replace what is in ``output``.
        trust_remote_code: allow the dense architecture's own code to run, which the proof needs.
        verify: reload the export in a process without modmoe and compare; it takes the model's size in memory.
        approximate: fold an adapter into the base model though it depends on the token: with each expert's weight held
            at its mean over ``tasks``. What that costs is measured.
        tasks: task name to file.
        progress: called with a message and, where they are known, what is done and what there is in all.

    Returns:
        ``form``, ``target``, ``output``, ``expert``, ``dtype``, ``verified`` (None without ``verify``),
        ``bytes_before`` and ``bytes_after`` of all tensors, ``warnings``, ``seconds``; of a native one also ``client``
        and ``why``; of an adapter also ``method``, and what ``modmoe.exports.folded`` adds.

    Raises:
        ExportError: an unknown form, target, expert or dtype; a form that cannot hold the model; a failed proof.
        CheckpointError: the source is damaged, or has code of its own that is not trusted.
        RecipeError: ``output`` is not free, or ``max_shard_size`` no size.
    """
    started_s, progress = time.monotonic(), progress or silent
    _check_words(form, target, client, dtype)
    shard_bytes = parse_bytes(max_shard_size, "max_shard_size")
    check_output(output, overwrite=overwrite)
    directory = resolve_source(source)
    weight_dtype = None if dtype is None else getattr(torch, dtype)
    if is_adapter(directory):
        from modmoe.exports.adapters import export_adapter  # imports peft, which takes seconds

        progress("exporting the adapter" + (", and verifying" if verify else ""))
        result = export_adapter(
            directory,
            output,
            form=form,
            target=target,
            client=client,
            expert=expert,
            dtype=weight_dtype,
            shard_bytes=shard_bytes,
            overwrite=overwrite,
            trust_remote_code=trust_remote_code,
            verify=verify,
            approximate=approximate,
            tasks=tasks or {},
        )
        return {**result, "seconds": round(time.monotonic() - started_s, 2)}
    _check_converted(source, directory, form, approximate or bool(tasks))
    tied = OpenedModel(directory, trust_remote_code=trust_remote_code)
    planned = _plan_checked(tied, form, target, client, expert, weight_dtype, verify, progress)
    bytes_before = tensor_bytes(tied.checkpoint)
    bytes_after = sum(tensor.size_bytes for tensor in planned.plan.outputs(tied.checkpoint, weight_dtype).values())
    progress(f"{form}: {bytes_before:,} bytes become {bytes_after:,}")
    with open_output(output, overwrite=overwrite, size_bytes=bytes_after) as partial_directory:
        writer = CheckpointWriter(
            partial_directory, max_shard_bytes=shard_bytes, report=partial(progress, "writing, bytes")
        )
        planned.plan.run(tied.checkpoint, writer, weight_dtype)
        writer.finish(with_dtype(planned.plan.config, weight_dtype))
        _write_companions(planned, directory, partial_directory)
        result = {
            "form": form,
            "target": planned.target,
            "output": str(output),
            "expert": expert if form in ("tied", "packed") else planned.expert,
            "dtype": str(planned.plan.config.get("dtype")) if dtype is None else dtype,
            "verified": _prove(planned, tied, partial_directory, form, progress) if verify else None,
            "bytes_before": bytes_before,
            "bytes_after": bytes_after,
            "warnings": planned.warnings,
            **planned.facts,
        }
        write_card(partial_directory, result, tied.checkpoint)
    return {**result, "seconds": round(time.monotonic() - started_s, 2)}


def _plan_checked(
    tied: OpenedModel,
    form: str,
    target: str,
    client: str,
    expert: str | None,
    dtype: torch.dtype | None,
    verify: bool,
    progress: Progress,
) -> _Export:
    """Return the plan, checked against the source, and log what the user should know of it."""
    checkpoint = tied.checkpoint
    if verify and own_code(checkpoint.config) and not tied.trust_remote_code:
        raise CheckpointError(
            str(tied.directory),
            "the proof would run the checkpoint's own Python files",
            "read them, then pass --trust-remote-code, or --no-verify",
        )
    planned = _plan(checkpoint, form, target, client, expert, dtype)
    planned.plan.check(checkpoint)
    if not verify:  # the proof would find it
        checkpoint.check_finite(partial(progress, "checking the source, bytes"))
    if "why" in planned.facts:
        LOG.info("%s", planned.facts["why"])
    for line in planned.warnings:
        LOG.warning("%s", line)
    return planned


def _prove(planned: _Export, tied: OpenedModel, directory: Path, form: str, progress: Progress) -> dict[str, Any]:
    """Reload the export in a fresh process and compare it with the tied model; ExportError where they differ."""
    progress("verifying in a process of its own")
    verified = verify_export(
        lambda dtype: tied.load(dtype=dtype, device="cpu"),
        directory,
        expert=planned.expert,
        set_expert=form == "tied",
        execute_code=planned.needs_code,
        options=planned.load_options,
        tolerance=planned.tolerance,
    )
    if planned.tolerance is not None:
        numbers = list(verified["by_dtype"].values())[-1]
        LOG.info(
            "gates are not exact: logits differ by %.2g in the mean, %.2g at most; a mean of %.2g is allowed",
            *(numbers[key] for key in ("mean_abs_logit_diff", "max_abs_logit_diff", "tolerance")),
        )
    return verified


def _check_words(form: str, target: str, client: str, dtype: str | None) -> None:
    if form not in FORMS:
        raise ExportError("form", f"no form '{form}'", did_you_mean(form, FORMS))
    if target != "auto" and form != "native":
        raise ExportError("target", f"'{target}' goes with the native form only", f"this is {form}")
    if client not in CLIENTS:
        raise ExportError("client", f"no client '{client}'", did_you_mean(client, CLIENTS))
    if client != "transformers" and form != "native":
        raise ExportError("client", f"'{client}' goes with the native form only", f"this is {form}")
    if dtype is not None and dtype not in DTYPES:
        raise ExportError("dtype", f"no dtype '{dtype}'", did_you_mean(dtype, DTYPES))


def _check_converted(source: str, directory: Path, form: str, is_approximate: bool) -> None:
    """Raise ExportError unless ``directory`` holds a tied model, and nothing is asked that only adapters have."""
    if is_adapted(directory):
        raise ExportError(str(source), "is an export already", "export the adapter directory that it was made from")
    if form == "adapter":
        raise ExportError(str(source), "has no adapter", "adapters come from `modmoe convert --method adapters`")
    if not is_tied(directory):
        raise ExportError(
            str(source),
            "is no converted model",
            "export takes what `modmoe convert` or `finetune` wrote. A dense one, pruned "
            "or not, needs no export: the directory loads as it is",
        )
    if is_approximate:
        raise ExportError("approximate", "folds an adapter, and this is none", "leave --approximate and --task out")


def _plan(
    tied: Checkpoint, form: str, target: str, client: str, expert: str | None, dtype: torch.dtype | None
) -> _Export:
    names: list[str] = list(tied.config.get("expert_names") or [])
    by_task = tied.config.get("routing") == "task"
    if expert is not None:
        expert_number(tied.config, expert)
    if form == "dense":
        if expert is None and len(names) != 1:
            raise ExportError("expert", "a dense export keeps one expert", f"name it, one of {', '.join(names)}")
        kept = expert or names[0]
        plan = dense_plan(tied, family_of_tied(tied), kept)
        return _Export(plan=plan, target=plan.config["model_type"], expert=kept, needs_code="auto_map" in plan.config)
    if form == "native":
        if expert is not None:
            raise ExportError("expert", "a native export keeps all experts", f"for '{expert}' alone use --form dense")
        native = native_export(tied, target, client, dtype)
        return _Export(
            plan=native.plan,
            target=native.target,
            # the default way of computing experts is for GPUs
            load_options={"experts_implementation": "eager"},
            tolerance=native.tolerance,
            facts={"client": client, "why": native.why},
            warnings=native.warnings,
        )
    if expert is not None and not by_task:
        raise ExportError("expert", "this model's router chooses", f"for '{expert}' alone use --form dense")
    if form == "packed":
        plan = packed_plan(tied, expert)
        fixed, name = plan.config["default_expert"], plan.config["model_type"]
        return _Export(plan=plan, target=name, expert=fixed, needs_code=True, warnings=packed_warnings(plan))
    plan = tied_plan(tied)
    if expert is not None:
        plan.config["default_expert"] = expert
    forced = (expert or plan.config.get("default_expert") or names[0]) if by_task else None
    return _Export(plan=plan, target=plan.config["model_type"], expert=forced, needs_code=True)


def _write_companions(planned: _Export, source: Path, directory: Path) -> None:
    copy_companions(source, directory)
    if (source / RECIPE).is_file():
        (directory / RECIPE).write_text(public_recipe(source / RECIPE), encoding="utf-8")
    if is_tied_type(planned.plan.config["model_type"]):
        write_code(directory, planned.plan.config, source)
    elif planned.plan.config["model_type"].startswith(PACKED_PREFIX):
        write_packed_code(directory)
    else:
        for name, text in own_files(planned.plan.config, source).items():
            (directory / name).write_text(text, encoding="utf-8")
