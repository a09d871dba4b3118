"""Configurations of models that carry their routed adapters: the base family's own, with what says where they hang.

``ModMoEAdaptersLlamaConfig`` derives from ``LlamaConfig`` and has the ``model_type`` ``modmoe_adapters_llama``, so that
nothing mistakes the model for the base model alone. The class for any other architecture of transformers is made the
same way when it is first asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers

PREFIX = "modmoe_adapters_"
"""What the ``model_type`` begins with."""
NAME = "ModMoEAdapters"
"""What the names of classes begin with."""


@dataclass(kw_only=True, repr=False)
class AdapterFields:
    """The fields that such a configuration adds to its base family's."""

    adapter_method: str = ""
    """The method's name."""
    adapter_settings: dict[str, Any] = field(default_factory=dict)
    """The method's settings."""
    adapter_targets: list[str] = field(default_factory=list)
    """Paths, from the causal LM, of the layers that have an adapter."""
    modmoe_version: str = ""
    """The version of modmoe that wrote the model."""


_MADE: dict[type, type] = {}


def config_class(base: type) -> type:
    """Return the configuration class over a base family's; one class for each base."""
    if base not in _MADE:
        stem = base.__name__.removesuffix("Config")
        _MADE[base] = type(
            f"{NAME}{stem}Config",
            (AdapterFields, base),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} with the fields of routed adapters.",
                "model_type": f"{PREFIX}{getattr(base, 'model_type', '')}",
                # an adapter reads and changes whole layers, not one device's part of them
                "base_model_tp_plan": {},
            },
        )
        globals()[_MADE[base].__name__] = _MADE[base]
    return _MADE[base]


def __getattr__(name: str) -> Any:
    """Make ``ModMoEAdapters<Family>Config`` from transformers' ``<Family>Config``."""
    if name.startswith(NAME) and name.endswith("Config"):
        base = getattr(transformers, name.removeprefix(NAME), None)
        if isinstance(base, type):
            return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
