"""Exports of an adapter directory: with its base model in one checkpoint, folded into it, or alone as PEFT has it."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modmoe.adapters.configuration_modmoe_adapters import NAME
from modmoe.adapters.modeling_modmoe_adapters import model_class
from modmoe.adapters.table import METHODS
from modmoe.errors import ExportError
from modmoe.exports.adapter_source import (
    NAME_IN_PEFT,
    Source,
    Written,
    put_saved_in,
    sites_of,
    stored_type,
    untied_state,
)
from modmoe.exports.folded import fold_to_single, write_folded
from modmoe.formats.adapter_code import CONFIGURATION, MODELING, write_code
from modmoe.formats.card.adapter import write_adapter_card
from modmoe.formats.dense import RECIPE
from modmoe.formats.proof.verify import verify as verify_export
from modmoe.formats.pushed_files import public_recipe
from modmoe.formats.tied import with_dtype
from modmoe.models.adapter_config import adapter_method, read_peft_config
from modmoe.models.counts import tensor_bytes
from modmoe.models.loading import TIED_PREFIX, own_code, tokenizer_home
from modmoe.storage.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Checkpoint,
    CheckpointWriter,
    adapter_headers,
    copy_companions,
    local_base,
    read_adapter_config,
    resolve_base,
    write_json,
)
from modmoe.storage.scratch import scratch_directory
from modmoe.storage.staging import open_output
from modmoe.version import __version__

_log = logging.getLogger(__name__)


def export_adapter(
    directory: Path,
    output: str,
    *,
    form: str,
    target: str,
    client: str,
    expert: str | None,
    dtype: torch.dtype | None,
    shard_bytes: int,
    overwrite: bool,
    trust_remote_code: bool,
    verify: bool,
    approximate: bool,
    tasks: Mapping[str, str],
) -> dict[str, Any]:
    """Write an adapter directory in another form; ``modmoe.exports.converted.export`` has checked the options.

    Returns the keys that it names, without ``seconds``; for the dense form also ``folding``, and ``tasks`` where it is
    approximate: see ``modmoe.exports.folded``.

    Raises:
        ExportError: a form that cannot hold the adapter; a failed proof.
        CheckpointError, AdapterError: the adapter or its base model is damaged or missing.
    """
    source = Source(
        directory=directory,
        method=adapter_method(directory),
        base=Checkpoint(resolve_base(directory)),
        dtype=dtype,
        trust_remote_code=trust_remote_code,
    )
    read_peft_config(directory)
    headers = adapter_headers(directory)
    _check(source, form, expert, approximate, tasks)
    adapter_bytes = _header_bytes(headers)
    base_bytes = 0 if form == "adapter" else tensor_bytes(source.base)
    with open_output(output, overwrite=overwrite, size_bytes=adapter_bytes + base_bytes) as partial:
        writer = CheckpointWriter(partial, max_shard_bytes=shard_bytes)
        if form == "adapter":
            made = _write_alone(source, partial, Path(output))
        elif form == "dense":
            made = write_folded(source, writer, approximate=approximate, tasks=tasks)
        elif form == "native":
            made = _write_native(source, writer, target, client)
        else:
            made = _write_tied(source, writer)
        for line in made.warnings:
            _log.warning("%s", line)
        _copy_tokenizer(directory, source.base.directory, partial, with_settings=form != "adapter")
        verified = verify_export(made.reference, partial, stored=made.stored, **made.options) if verify else None
        result = {
            "form": form,
            "target": made.target,
            "output": str(output),
            "expert": None,
            "method": source.method,
            "dtype": "float32" if form == "adapter" else str(made.stored).removeprefix("torch."),
            "verified": verified,
            "bytes_before": tensor_bytes(source.base) + adapter_bytes,
            "bytes_after": adapter_bytes if form == "adapter" else tensor_bytes(Checkpoint(partial)),
            "warnings": made.warnings,
            **made.more,
        }
        write_adapter_card(partial, result, read_adapter_config(directory), source.base.directory, directory)
    return result


def _check(source: Source, form: str, expert: str | None, approximate: bool, tasks: Mapping[str, str]) -> None:
    model_type, place = source.base.config.get("model_type"), source.directory
    if expert is not None:
        raise ExportError("expert", f"'{expert}' is for converted models", f"the router of {place} chooses")
    if form == "packed":
        raise ExportError("form", "packed is for converted models", "forms that work: tied, dense, native, adapter")
    if approximate and form != "dense":
        raise ExportError("approximate", "goes with the dense form only", f"this is {form}")
    if bool(tasks) != approximate:
        if approximate:
            raise ExportError("approximate", "a fold that is not exact needs text", "add --task NAME=FILE")
        raise ExportError("approximate", "goes with tasks")
    if form == "adapter":
        if source.dtype is not None:
            raise ExportError("dtype", "an adapter alone keeps its float32", "leave --dtype out")
        return
    if str(model_type).startswith(TIED_PREFIX):
        raise ExportError(str(place), f"its base model is a {model_type}", "only --form adapter can hold that")
    if form == "tied" and own_code(source.base.config):
        raise ExportError(
            str(place), f"'{model_type}' is defined by files of its own", "forms that work: adapter, dense"
        )


def _write_tied(source: Source, writer: CheckpointWriter) -> Written:
    """Write base model and adapters as one checkpoint with the code that loads it."""
    model = source.load()
    settings = model.peft_config[NAME_IN_PEFT].settings()
    base = put_saved_in(model.get_base_model())
    stored = source.dtype or base.dtype
    for name, tensor in untied_state(base).items():
        rounds = source.dtype is not None and tensor.is_floating_point() and "routed_" not in name
        writer.write(name, tensor.to(source.dtype) if rounds else tensor)
    kind = model_class(type(base))
    config = dict(source.base.config)
    config.pop("auto_map", None)
    config.update(
        model_type=kind.config_class.model_type,  # type: ignore[attr-defined]
        architectures=[kind.__name__],
        auto_map={
            "AutoConfig": f"{Path(CONFIGURATION).stem}.{kind.config_class.__name__}",  # type: ignore[attr-defined]
            "AutoModel": f"{Path(MODELING).stem}.{NAME}{type(base.base_model).__name__}",
            "AutoModelForCausalLM": f"{Path(MODELING).stem}.{kind.__name__}",
        },
        adapter_method=source.method,
        adapter_settings=dataclasses.asdict(settings),
        adapter_targets=[site.path for site in sites_of(base)],
        modmoe_version=__version__,
    )
    writer.finish(with_dtype(config, stored))
    write_code(writer.directory, METHODS[source.method])
    return Written(
        target=str(config["model_type"]), reference=source.reference, stored=stored, options={"execute_code": True}
    )


def _write_alone(source: Source, partial: Path, output: Path) -> Written:
    """Write a clean PEFT directory: without a trainer's files, and with a base model that is still found."""
    config = {**read_adapter_config(source.directory), "inference_mode": True}
    tensors, more = load_file(source.directory / ADAPTER_WEIGHTS), {}
    merged = METHODS[source.method].adapter.merges_into
    if merged is not None and int(config.get("num_experts", 1)) > 1:
        # several adapters that are always on equal one whose rank is the sum: fewer products, the same numbers
        config, tensors = _folded_to_single(source, config)
        more = {"folding": {"kind": "exact", "into": merged}}
    named, warnings = str(config["base_model_name_or_path"]), []
    found = local_base(source.directory)
    if found is not None:
        if not os.path.isdir(named):  # a relative path starts at the adapter's directory, which has changed
            config["base_model_name_or_path"] = os.path.relpath(found, output)
        warnings.append(
            f"the base model is named by a path, '{named}'; write its Hub id into {ADAPTER_CONFIG} before you share it."
        )
    save_file(tensors, partial / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    (partial / ADAPTER_WEIGHTS).chmod(0o644)
    write_json(partial / ADAPTER_CONFIG, config)
    if (source.directory / RECIPE).is_file():
        (partial / RECIPE).write_text(public_recipe(source.directory / RECIPE), encoding="utf-8")
    stored = stored_type(source.base)
    options = {"base": source.base.directory, "execute_code": source.trust_remote_code}
    return Written(
        target=str(config["peft_type"]),
        reference=source.reference,
        stored=stored,
        options=options,
        warnings=warnings,
        more=more,
    )


def _folded_to_single(source: Source, config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return configuration and tensors of the PERFT-S that computes what a PERFT-D does."""
    single = fold_to_single(source.load())
    with scratch_directory("fold") as scratch:
        single.save_pretrained(scratch)
        made = read_adapter_config(scratch)
        tensors = load_file(scratch / ADAPTER_WEIGHTS)
    kept = ("base_model_name_or_path", "revision", "inference_mode")
    return {**made, **{name: config.get(name) for name in kept}}, tensors


def _write_native(source: Source, writer: CheckpointWriter, target: str, client: str) -> Written:
    """Write the experts of a MixLoRA out in full."""
    if METHODS[source.method].adapter.fold != "to_moe":
        known = ", ".join(name for name, method in METHODS.items() if method.adapter.fold == "to_moe")
        raise ExportError(
            str(source.directory),
            f"{source.method} is no mixture of whole FFNs, so no other architecture holds "
            f"it (only {known or 'none'} does)",
            "forms that work: tied, adapter",
        )
    from modmoe.formats.native.mixlora import base_weights, expand_mixlora
    from modmoe.formats.native.plan import native_warnings

    model = source.load()
    model_dtype = model.get_base_model().dtype
    put_saved_in(model.get_base_model())
    plan = expand_mixlora(model, NAME_IN_PEFT, target, source.dtype, client)
    plan.run(base_weights(model), writer)
    writer.finish(plan.config)
    # weights are rounded once more than in the model whose adapter is separate
    options = {"options": {"experts_implementation": "eager"}, "is_rounded": True}
    return Written(
        target=str(plan.config["model_type"]),
        reference=source.reference,
        stored=source.dtype or model_dtype,
        options=options,
        warnings=native_warnings(plan, client),
    )


def _copy_tokenizer(adapter: Path, base: Path, partial: Path, *, with_settings: bool) -> None:
    """Copy the adapter's tokenizer, or the base model's where it has none; never parts of both."""
    home = tokenizer_home(adapter)
    copy_companions(home, partial)
    if with_settings and home != base:
        for file in (base / "generation_config.json", *base.glob("LICENSE*")):
            if file.is_file():
                (partial / file.name).write_bytes(file.read_bytes())


def _header_bytes(headers: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in headers.values())
