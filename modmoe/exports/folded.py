"""The dense export of an adapter: folded into its base model, which keeps its architecture.

Where the adapter is the same linear map for every token, this is exact. Where experts are weighed token by token, it is
done on demand with each expert's weight fixed at its mean over text, and the loss that this costs is measured.
"""

# Shapes: B sequences, T tokens, E experts, V vocabulary, N tokens that count

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.core_model_loading import revert_weight_conversion

from modmoe.adapters.mechanism.attach import CONTEXT, Site, detach
from modmoe.adapters.mechanism.base import RoutedAdapter
from modmoe.adapters.peft_binding import fold_into
from modmoe.adapters.table import METHODS
from modmoe.analysis.text.calibration import Batch, load_task, token_batches
from modmoe.analysis.text.reading import Reading
from modmoe.errors import ExportError
from modmoe.exports.adapter_source import (
    NAME_IN_PEFT,
    Source,
    Written,
    cast_base,
    put_saved_in,
    sites_of,
    stored_type,
    untied_state,
    write_own_files,
)
from modmoe.formats.proof.verify import TOLERANCES, sample_ids
from modmoe.formats.tied import with_dtype
from modmoe.models.loading import load_tokenizer, own_code
from modmoe.storage.checkpoint import CheckpointWriter

TOKENS, SEQUENCE_LENGTH, BATCH_SIZE = 16384, 256, 8
"""Tokens of each task that the weights are averaged over, and the length of a sequence."""
_MOST_LOGITS = 1 << 25
"""Logits kept for the comparison of before and after."""


def write_folded(source: Source, writer: CheckpointWriter, *, approximate: bool, tasks: Mapping[str, str]) -> Written:
    """Fold an adapter into its base model and write that, untouched tensors byte for byte.

    The result gains ``folding: {kind, mean_abs_logit_diff, max_abs_logit_diff, max_abs_logit}``, between the model with
    the adapter and with it folded; where it is approximate, measured on the tasks' tokens, also ``tasks: {NAME:
    {before, after, tokens}}`` of mean losses over all tokens.

    Raises:
        ExportError: the fold is not exact and ``approximate`` is not set, or the adapter is not a linear map.
        CalibrationError: a task cannot be read.
    """
    stored = _widest(source)
    base = source.load(stored).get_base_model()
    kinds = [_adapter_of(site).fold_kind for site in sites_of(base)]
    is_exact = all(kind == "exact" for kind in kinds)
    if not is_exact:
        _check_approximate(source, base, approximate)
    batches: dict[str, list[Batch]] = {}
    if approximate:
        batches = _read_tasks(source, tasks)
    else:
        ids_BT, _ = sample_ids(base)
        batches = {"": [Batch(ids_BT, torch.ones_like(ids_BT))]}
    weights: dict[str, Tensor] = {} if is_exact else mean_weights(base, _all(batches))
    before = measure(base, batches)
    changed = _fold(base, weights)
    after = measure(base, batches)
    folding = _compare(before[1], after[1])
    limit = TOLERANCES[base.dtype] * folding["max_abs_logit"]
    if is_exact and not folding["mean_abs_logit_diff"] <= limit:
        raise ExportError(
            str(source.directory),
            f"folding moves the logits by {folding['mean_abs_logit_diff']:.3g} on average, where "
            f"{limit:.3g} is allowed",
            "the base model's type is too narrow, so use a wider --dtype",
        )
    _write(source, writer, base, changed)
    more: dict[str, Any] = {"folding": {"kind": "exact" if is_exact else "approximate", **folding}}
    warnings = []
    if approximate:
        more["tasks"] = {
            name: {
                "before": before[0][name],
                "after": after[0][name],
                "tokens": sum(batch.num_tokens for batch in batches[name]),
            }
            for name in tasks
        }
        if not is_exact:
            told = ", ".join(
                f"{name} {task['before']:.4f} -> {task['after']:.4f}" for name, task in more["tasks"].items()
            )
            warnings.append(
                f"the fold is approximate: logits move by {folding['mean_abs_logit_diff']:.3g} on average and by "
                f"{folding['max_abs_logit_diff']:.3g} at most; loss {told}."
            )
    written_type = source.dtype or base.dtype
    merged = [base]  # handed over, so that the proof does not hold two models
    return Written(
        target=str(source.base.config["model_type"]),
        reference=lambda dtype: cast_base(merged.pop(), dtype),
        stored=written_type,
        options={"execute_code": bool(own_code(source.base.config)) and source.trust_remote_code},
        warnings=warnings,
        more=more,
    )


@torch.no_grad()
def mean_weights(base: Any, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Return each expert's mean weight by the path of its site, weights_E, over all tokens but padding."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    context = getattr(base, CONTEXT)
    for batch in batches:
        base(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False)
        counted_T = batch.attention_mask_BT.reshape(-1).bool()
        for route in context.run.routes:
            weights_NE = route.weights_TE.double()
            if len(weights_NE) == len(counted_T):  # routes of whole sequences have no padding among them
                weights_NE = weights_NE[counted_T]
            sums[route.site] = sums.get(route.site, 0) + weights_NE.sum(0)
            counts[route.site] = counts.get(route.site, 0) + len(weights_NE)
    return {site: (total_E / counts[site]).float() for site, total_E in sums.items()}


@torch.no_grad()
def measure(base: Any, batches: Mapping[str, Sequence[Batch]]) -> tuple[dict[str, float], Tensor]:
    """Return each task's mean loss, of every token but the first of a sequence, and some of the logits_NV."""
    losses: dict[str, float] = {}
    kept: list[Tensor] = []
    room = _MOST_LOGITS
    for name, parts in batches.items():
        loss_sum, count = 0.0, 0
        for batch in parts:
            ids_BT, counted_BT = batch.input_ids_BT, batch.attention_mask_BT.bool()
            logits_BTV = base(input_ids=ids_BT, attention_mask=batch.attention_mask_BT, use_cache=False).logits.float()
            follows_BT = counted_BT[:, 1:]
            loss = F.cross_entropy(logits_BTV[:, :-1][follows_BT], ids_BT[:, 1:][follows_BT], reduction="sum")
            loss_sum, count = loss_sum + float(loss), count + int(follows_BT.sum())
            rows = min(int(counted_BT.sum()), room // logits_BTV.shape[-1])
            kept.append(logits_BTV[counted_BT][:rows].clone())
            room -= kept[-1].numel()
        losses[name] = loss_sum / max(count, 1)
    return losses, torch.cat(kept)


def fold_to_single(model: Any) -> Any:
    """Return a PeftModel whose one PERFT-S computes what the several adapters of a PERFT-D did; takes ``model`` apart.

    Raises ExportError where the adapter is another, or layers were trained whole beside it.
    """
    from peft import get_peft_model

    from modmoe.adapters.methods.perft import PerftD, fold_perft_d, folded_settings
    from modmoe.adapters.peft_configs import CONFIGS

    old, base = model.peft_config[NAME_IN_PEFT], model.get_base_model()
    if METHODS[old.method].adapter is not PerftD or old.modules_to_save:
        raise ExportError(str(old.method), "only a perft_d without modules_to_save becomes one adapter")
    tensors = {site.path: fold_perft_d(cast(Any, _adapter_of(site))) for site in sites_of(base)}
    made = CONFIGS["perft_s"](
        **dataclasses.asdict(folded_settings(old.settings())),
        target_modules=old.target_modules,
        layers_to_transform=old.layers_to_transform,
    )
    single = get_peft_model(model.unload(), made)
    config = single.peft_config[NAME_IN_PEFT]
    config.base_model_name_or_path, config.revision = old.base_model_name_or_path, old.revision
    for site in sites_of(base):
        _adapter_of(site).load_state_dict(tensors[site.path])
    return single.eval()


def _fold(base: Any, weights: Mapping[str, Tensor]) -> set[str]:
    """Fold every site's adapter into the weights and take it off; return the names of the weights that changed."""
    sites = sites_of(base)
    # torch counts in-place changes of a tensor, which tells the weights that a method folded into
    versions = {name: weight._version for name, weight in base.named_parameters() if "routed_" not in name}
    for site in sites:
        adapter = _adapter_of(site)
        weights_E = None if adapter.fold_kind == "exact" else weights[site.path]
        fold_into(adapter, base.get_submodule(site.path), weights_E)
    after = dict(base.named_parameters())
    changed = {name for name, version in versions.items() if after[name]._version != version}
    detach(base)
    saved = {name.partition(".modules_to_save.")[0] for name in base.state_dict() if ".modules_to_save." in name}
    put_saved_in(base)
    changed |= {name for name in base.state_dict() if any(name.startswith(f"{path}.") for path in saved)}
    return changed


def _write(source: Source, writer: CheckpointWriter, base: Any, changed: set[str]) -> None:
    """Write the base checkpoint with the changed weights in place of its own."""
    state = untied_state(base)
    new = revert_weight_conversion(base, {name: tensor for name, tensor in state.items() if name in changed})
    prefix = f"{base.base_model_prefix}."
    made: dict[str, Tensor] = {}
    for name, tensor in new.items():
        # a checkpoint of the model without its head has names without its prefix
        stored = next((one for one in (name, name.removeprefix(prefix), prefix + name) if one in source.base), None)
        if stored is None or source.base.shape(stored) != tuple(tensor.shape):
            raise ExportError(
                str(source.base.directory),
                f"has no tensor that '{name}' goes back to",
                "only --form tied or adapter can hold this adapter",
            )
        made[stored] = tensor
    for name in source.base:
        tensor = made.get(name)
        kept = source.base[name] if tensor is None else tensor.to(source.base.dtype(name))
        if tensor is not None and source.dtype is not None:
            kept = tensor
        rounds = source.dtype is not None and kept.is_floating_point()
        writer.write(name, kept.to(source.dtype) if rounds else kept)
    writer.finish(with_dtype(source.base.config, source.dtype))
    write_own_files(source, writer.directory)


def _check_approximate(source: Source, base: Any, approximate: bool) -> None:
    adapters = [_adapter_of(site) for site in sites_of(base)]
    if any(adapter.kind != "linear" or _lacks_weight(adapter) for adapter in adapters if adapter.fold_kind != "exact"):
        raise ExportError(
            str(source.directory),
            f"{source.method} is no linear map of what enters a layer, so it has no place in the weights",
            "forms that work: tied, adapter",
        )
    if not approximate:
        raise ExportError(
            str(source.directory),
            f"{source.method} depends on the token, so it does not fold exactly",
            "use --form tied, or --approximate with --task NAME=FILE to hold its experts at their mean weights",
        )


def _lacks_weight(adapter: RoutedAdapter) -> bool:
    return type(adapter).fixed_weight is RoutedAdapter.fixed_weight


def _adapter_of(site: Site) -> RoutedAdapter:
    adapter = site.adapters[NAME_IN_PEFT]
    assert isinstance(adapter, RoutedAdapter)
    return adapter


def _read_tasks(source: Source, tasks: Mapping[str, str]) -> dict[str, list[Batch]]:
    tokenizer = load_tokenizer(source.directory, trust_remote_code=source.trust_remote_code)
    batches = {}
    for name, file in tasks.items():
        rows = load_task(name, file)
        reading = Reading(rows, tokenizer, learns=False, length=SEQUENCE_LENGTH)
        batches[name] = token_batches(
            tokenizer,
            name,
            rows,
            tokens=TOKENS,
            sequence_length=SEQUENCE_LENGTH,
            batch_size=BATCH_SIZE,
            seed=0,
            num_embeddings=source.base.config.get("vocab_size"),
            reading=reading,
        )
        reading.tell()
    return batches


def _widest(source: Source) -> torch.dtype | None:
    """Return the type to fold in, where it is wider than the base model's."""
    stored = stored_type(source.base)
    wide = source.dtype is not None and source.dtype.itemsize > stored.itemsize
    return source.dtype if wide else None


def _all(batches: Mapping[str, Sequence[Batch]]) -> list[Batch]:
    return [batch for parts in batches.values() for batch in parts]


def _compare(before_NV: Tensor, after_NV: Tensor) -> dict[str, float]:
    difference_NV = (after_NV - before_NV).abs()
    return {
        "mean_abs_logit_diff": float(difference_NV.mean()),
        "max_abs_logit_diff": float(difference_NV.max()),
        "max_abs_logit": float(before_NV.abs().max()),
    }
