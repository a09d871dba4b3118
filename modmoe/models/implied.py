"""Whether a checkpoint's tensors are those of the model that its config.json implies, from headers alone.

transformers leaves out what it does not know and draws anew what it lacks, each with no more than a line in a log; the
model that comes of it is another one.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.core_model_loading import revert_weight_conversion

from modmoe.errors import CheckpointError
from modmoe.storage.checkpoint import ADAPTER_CONFIG, Checkpoint
from modmoe.storage.kinds.names import find_prefix

Shape = tuple[int, ...]

_HARMLESS = re.compile(
    r"rotary_emb\.\w+$|(^|\.)(masked_bias|position_ids|inv_freq|total_ops|total_params)$|(^|\.)mtp(_\w+)?\."
)
"""Names of tables that models make themselves, of what profilers leave, and of heads that predict later tokens."""
_BIASES = (("attn", "attention_bias"), ("attention", "attention_bias"), ("mlp", "mlp_bias"))
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "lm_head.weight")


@dataclass(frozen=True, slots=True)
class Fit:
    """How tensors differ from those that a model has; names are those of the files, of what is missing the model's."""

    implied: dict[str, Shape]
    """The shape of each tensor of the model, by its name in a checkpoint."""
    found: dict[str, str]
    """The model's name of each tensor that is there to its name in the files."""
    missing: list[str] = field(default_factory=list)
    extra: list[str] = field(default_factory=list)
    misshapen: list[str] = field(default_factory=list)
    """The model's names of those whose shapes differ."""


def compare(directory: Path, model: Any, shape_of: Callable[[str], Shape], stored: Iterable[str]) -> Fit:
    """Return how the tensors ``stored``, of shapes ``shape_of``, differ from those of a model without values.

    Where names differ, transformers is asked whether it translates them; nothing is read but headers.
    """
    with quiet():
        state = revert_weight_conversion(model, model.state_dict())
    implied = {name: tuple(tensor.shape) for name, tensor in state.items()}
    found = model_names(stored, implied, str(getattr(model, "base_model_prefix", "")))
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = implied.keys() - found.keys() - tied
    extra = found.keys() - implied.keys() - tied - {name for name, _ in model.named_buffers()}
    misshapen = [name for name in implied if name in found and shape_of(found[name]) != implied[name]]
    if (missing or extra) and not misshapen:
        info = _ask(directory, model)
        if info is not None and not info["error_msgs"]:
            missing, extra = set(info["missing_keys"]), set(info["unexpected_keys"])
    # what a model fills in itself: rankings of checkpoints that were written without them
    missing = {name for name in missing if not name.endswith(".ranking")}
    extra = {found.get(name, name) for name in extra if not _HARMLESS.search(name)}
    return Fit(implied, found, sorted(missing, key=_natural), sorted(extra, key=_natural), misshapen)


def check_implied(checkpoint: Checkpoint, model: Any) -> None:
    """Raise CheckpointError unless a checkpoint's tensors are those of ``model``, which is built without values."""
    _check_sizes(checkpoint, model)
    fit = compare(checkpoint.directory, model, checkpoint.shape, checkpoint)
    line = describe(checkpoint, model.config, fit)
    if line:
        raise CheckpointError(line)


def _check_sizes(checkpoint: Checkpoint, empty: Any) -> None:
    """Refuse a configuration of a far larger model than the weights are of, before it is given memory."""
    wanted = sum(tensor.numel() for tensors in (empty.parameters(), empty.buffers()) for tensor in tensors)
    held = sum(math.prod(checkpoint.shape(name)) for name in checkpoint)
    if wanted > _SPARE + 2 * held:
        raise CheckpointError(
            f"{checkpoint.directory}/config.json",
            f"describes a model of {wanted:.3g} parameters, and the checkpoint has {held:.3g}",
            "one of the two is of another model",
        )


_SPARE = 1 << 22
"""Values that a model may have beside its weights: masks, tables of positions."""


def describe(checkpoint: Checkpoint, settings: Any, fit: Fit) -> str:
    """Return one line on the first of what differs, with what to do; "" where nothing does."""
    directory, place = checkpoint.directory, checkpoint.directory / "config.json"
    prefix = find_prefix(checkpoint, fit.implied) if fit.missing or fit.extra else None
    if prefix is not None:
        front, lack = prefix
        what = f"all names have '{front}' in front" if front else f"all names lack '{lack}' in front"
        remedy = f"take '{front}' out of" if front else f"put '{lack}' in front of"
        return f"{directory}: {what} of what config.json implies; {remedy} the names, or save the model itself."
    if fit.misshapen:
        name = fit.misshapen[0]
        shape, implied = list(checkpoint.shape(fit.found[name])), list(fit.implied[name])
        remedy = "restore config.json, or the weights that belong to it"
        if name.endswith(_EMBEDDINGS) and shape[1:] == implied[1:]:
            remedy = f"set vocab_size to {shape[0]} there, or restore the weights that belong to it"
        what = f"{place}: implies {implied} for '{name[:99]}', which has shape {shape}{_more(fit.misshapen)}"
        return f"{what}; {remedy}."
    if fit.extra:
        return _describe_extra(place, settings, fit)
    if fit.missing:
        name = fit.missing[0]
        remedy = "fetch the checkpoint again"
        if name == "lm_head.weight" and len(fit.missing) == 1:
            remedy = "save the causal LM with its head, or set tie_word_embeddings to true if the embeddings are it"
        return (
            f"{directory}: '{name[:80]}' is missing, of {len(fit.missing)} tensors that config.json asks for; {remedy}."
        )
    return ""


def _describe_extra(place: Path, settings: Any, fit: Fit) -> str:
    name = fit.extra[0]
    beyond = _beyond(settings, fit.extra)
    if beyond:
        return f"{place}: {beyond}; restore the number of layers, or take those tensors out of the weights."
    what = f"{place}: describes a model without '{name[:99]}', which is there{_more(fit.extra)}"
    if fit.missing:
        what += f", and with '{fit.missing[0][:99]}', which is not"
    remedy = "restore config.json, or take out of the weights what belongs to no part of the model"
    keys = [key for part, key in _BIASES if name.endswith(".bias") and part in name]
    key = next((key for key in keys if getattr(settings, key, None) is False), None)
    if key is not None:
        remedy = f"set {key} to true there, or take the tensors out where they are not meant"
    return f"{what}; it would be left out without a word: {remedy}."


def _beyond(settings: Any, names: Iterable[str]) -> str:
    """Return that all names are of layers behind the last one that the configuration has; "" where they are not."""
    text = settings.get_text_config() if hasattr(settings, "get_text_config") else settings
    count = getattr(text, "num_hidden_layers", None)
    numbers = [re.search(r"\.(?:layers|h|blocks)\.(\d+)\.", name) for name in names]
    found = [int(number[1]) for number in numbers if number is not None and len(number[1]) < 9]
    if not isinstance(count, int) or len(found) < len(numbers) or min(found) < count:
        return ""
    return f"says {count} layers, and there are {len(found)} tensors of layers {min(found)} to {max(found)}"


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} tensors more" if len(names) > 1 else ""


def _natural(name: str) -> list[tuple[bool, int, str]]:
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in name.split(".")]


def model_names(stored: Iterable[str], implied: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Return the model's name of each tensor to the stored one: a base model may be saved without its prefix."""
    names = list(stored)
    if not prefix or any(name.startswith(f"{prefix}.") for name in names):
        return {name: name for name in names}
    return {f"{prefix}.{name}" if f"{prefix}.{name}" in implied else name: name for name in names}


def _ask(directory: Path, model: Any) -> dict[str, Any] | None:
    """Return what transformers says of a load, all of it on the device that holds nothing; None where it fails."""
    if (directory / ADAPTER_CONFIG).is_file():
        return None  # it would load that adapter too
    try:
        with quiet():
            _, info = type(model).from_pretrained(
                directory, config=deepcopy(model.config), device_map="meta", output_loading_info=True
            )
    except Exception:  # of every kind: then it does not load
        return None
    found: dict[str, Any] = info
    return None if found["mismatched_keys"] else found


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' reports of what it misses off the terminal: they are told here, one line each."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
