"""The configuration of an adapter directory, checked before anything is built by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modmoe.errors import CheckpointError, did_you_mean, reason_of
from modmoe.storage.checkpoint import ADAPTER_CONFIG, read_adapter_config

PEFT_PREFIX = "MODMOE_"
"""The ``peft_type`` of a routed adapter begins with it."""


def adapter_method(directory: Path) -> str:
    """Return the method of an adapter directory; CheckpointError where it is none of METHODS."""
    from modmoe.adapters.table import METHODS

    kind = str(read_adapter_config(directory).get("peft_type"))
    method = kind.removeprefix(PEFT_PREFIX).lower()
    place = f"{directory / ADAPTER_CONFIG}: peft_type"
    if not kind.startswith(PEFT_PREFIX):
        raise CheckpointError(
            str(place),
            f"{kind} is no routed adapter",
            "merge it into its base model with peft (merge_and_unload), and name what that gives",
        )
    if method not in METHODS:
        raise CheckpointError(str(place), f"this version knows no method '{method}'", did_you_mean(method, METHODS))
    return method


def read_peft_config(directory: Path) -> Any:
    """Return an adapter's configuration as PEFT builds it; CheckpointError where it does not fit its method."""
    from peft import PeftConfig

    adapter_method(directory)
    try:
        config: Any = PeftConfig.from_pretrained(str(directory))
        for name, kind in (("target_modules", str), ("modules_to_save", str), ("layers_to_transform", int)):
            value = getattr(config, name, None)
            several = value if isinstance(value, list | tuple | set) else [] if value is None else [value]
            if not all(isinstance(item, kind) and not isinstance(item, bool) for item in several):
                raise ValueError(f"{name} is {value!r:.80}, and not {'names' if kind is str else 'numbers'}")
    except Exception as error:  # what a stranger's values make of PEFT is of any kind
        place, reason = directory / ADAPTER_CONFIG, reason_of(error, 300)
        raise CheckpointError(str(place), f"is not the configuration of an adapter: {reason}", "restore it") from error
    return config
