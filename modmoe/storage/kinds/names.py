"""Names of tensors that say how a model was saved: inside of a wrapper, or with adapters that were not merged."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from modmoe.storage.kinds.headers import Headers, Problem

_WRAPPERS = {
    "_orig_mod": ("torch.compile", "model._orig_mod"),
    "_fsdp_wrapped_module": ("FSDP", "the unwrapped model (accelerate's unwrap_model)"),
    "_checkpoint_wrapped_module": ("activation checkpointing", "the model it wraps"),
    "_forward_module": ("Lightning Fabric", "the model it wraps (model.module)"),
    "_fpw_module": ("FairScale's FSDP", "the model it wraps (model.module)"),
    "_ddp_module": ("DDP", "model.module"),
    "_module": ("Opacus", "model._module"),
    "module": ("DDP or DeepSpeed", "model.module"),
    "base_model": ("PEFT", "what merge_and_unload() returns"),
}
"""A part of a name to what puts it there, and what should have been saved."""
_PEFT = "base_model.model."
_COMMON = ("module", "_module")
_ADAPTERS = re.compile(
    r"(^|\.)(lora_(A|B|E|embedding_A|embedding_B|magnitude_vector)|base_layer|modules_to_save|original_module|ia3_l"
    r"|vera_lambda_[bd]|(lokr|hada)_[wt]\d?(_[ab])?|oft_[rR]|boft_[RS]|adaption_prompt|prompt_encoder)(\.|$)"
)


def find_wrapped(directory: Path, config: Mapping[str, Any], headers: Headers) -> Iterator[Problem]:
    """Yield, of each kind of wrapper, how many tensors have its mark, and how it is taken out."""
    marks: dict[str, list[str]] = {}
    for name in headers:
        mark = wrapper_of(name, is_own=has_own_code(config))
        if mark:
            marks.setdefault(mark, []).append(name)
    for mark, names in marks.items():
        by, instead = _WRAPPERS[mark.split(".")[0]]
        what = f"'{mark}', the mark of {by}, is in the names of {_share(names, headers)}, such as '{names[0][:99]}'"
        remedy = f"save {instead}, or take '{mark}' out of the names"
        yield Problem(str(directory / headers[names[0]].file), what, remedy)


def wrapper_of(name: str, *, is_own: bool = False) -> str:
    """Return the parts of a tensor's name that wrappers put there, each once and with its dot; "" where none did.

    An architecture with code of its own may use common words as it likes.
    """
    # PEFT's mark is of two parts, and each of them a common word
    parts = name.replace(_PEFT, "base_model.", 1).split(".")[:-1]
    found = [part for part in parts if part in _WRAPPERS and not (is_own and part in _COMMON)]
    # one mark for all names, however often layers are wrapped one by one
    mark = "".join(f"{part}." for part in dict.fromkeys(found) if part != "base_model" or _PEFT in name)
    return mark.replace("base_model.", _PEFT)


def has_own_code(config: Mapping[str, Any]) -> bool:
    """Return whether Python files of its own define the architecture, as far as config.json says so."""
    dense = config.get("dense_config") if str(config.get("model_type")).startswith("modmoe_") else config
    return isinstance(dense, Mapping) and "auto_map" in dense


def find_adapters(directory: Path, config: Mapping[str, Any], headers: Headers) -> Iterator[Problem]:
    """Yield that the weights of a model hold an adapter that was not merged into them."""
    if has_own_code(config):  # some architectures are made of such layers
        return
    names = [name for name in headers if _ADAPTERS.search(name)]
    if names:
        what = f"holds an adapter that was not merged: {_share(names, headers)}, such as '{names[0][:99]}'"
        remedy = "save what merge_and_unload() returns, or its base model and the adapter in directories of their own"
        yield Problem(str(directory / headers[names[0]].file), what, remedy)


def _share(names: list[str], headers: Headers) -> str:
    return f"all {len(names)} tensors" if len(names) == len(headers) else f"{len(names)} of {len(headers)} tensors"


def find_prefix(found: Iterable[str], expected: Iterable[str]) -> tuple[str, str] | None:
    """Return what the names that are found have in front, and what the expected ones have, where that alone differs.

    One of the two is empty; None where most names differ in more.
    """
    names, implied = set(found), set(expected)
    names, implied = names - implied, implied - names
    if not names or not implied:
        return None
    for longer, shorter, is_found in ((names, implied, True), (implied, names, False)):
        # the longest name is the one in which the fewest others end
        ending = f".{max(shorter, key=len)}"
        for name in longer:
            prefix = name.removesuffix(ending) + "."
            if name.endswith(ending) and 2 * len({prefix + other for other in shorter} & longer) > len(shorter):
                return (prefix, "") if is_found else ("", prefix)
    return None
