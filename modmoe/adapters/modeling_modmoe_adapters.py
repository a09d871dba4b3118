"""Models that carry their routed adapters: any causal LM of transformers with adapters attached to its layers.

``ModMoEAdaptersLlamaForCausalLM`` is ``LlamaForCausalLM`` to which one method's adapters are attached; every weight of
the base model keeps its name. Classes are made from the base family's when they are first asked for by name. This file
knows no method: whoever uses it makes known those that are needed.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import nn

from .configuration_modmoe_adapters import NAME, config_class
from .mechanism.attach import attach

_METHODS: dict[str, tuple[type, type]] = {}


def know(adapter_class: Any, settings_class: type) -> None:
    """Make a method known, so that models with its adapters can be built."""
    _METHODS[adapter_class.method] = (adapter_class, settings_class)


class AdaptersMixin:
    """What attaches the adapters that the configuration names."""

    config: Any
    base_model_prefix: str
    _keep_in_fp32_modules_strict: Any

    def _attach_adapters(self) -> None:
        assert isinstance(self, nn.Module)
        config, prefix = self.config, self.base_model_prefix
        if config.adapter_method not in _METHODS:
            raise ValueError(f"config.json: adapter_method is '{config.adapter_method}'; known: {', '.join(_METHODS)}.")
        adapter_class, settings_class = _METHODS[config.adapter_method]
        paths = list(config.adapter_targets)
        if not hasattr(self, prefix):  # the model without its head
            paths = [path.removeprefix(f"{prefix}.") for path in paths]
        attach(self, adapter_class, settings_class(**config.adapter_settings), targets=paths)
        # routers and small ranks suffer in half precision; the layers that they serve do not
        kept = self._keep_in_fp32_modules_strict or ()
        self._keep_in_fp32_modules_strict = {*kept, f"modmoe_{config.adapter_method}"}


_MADE: dict[type, type] = {}


def model_class(base: type) -> type:
    """Return the class over a base model class, ``<Family>Model`` or ``<Family>ForCausalLM``."""
    if base not in _MADE:

        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
            self._attach_adapters()
            self.post_init()

        made = config_class(base.config_class)  # type: ignore[attr-defined]
        _MADE[base] = type(
            f"{NAME}{base.__name__}",
            (AdaptersMixin, base),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} with routed adapters.",
                "__init__": __init__,
                "config_class": made,
                "__annotations__": {"config": made},
            },
        )
        globals()[_MADE[base].__name__] = _MADE[base]
    return _MADE[base]


def __getattr__(name: str) -> Any:
    """Make ``ModMoEAdapters<Family>ForCausalLM`` and ``...Model`` from transformers' classes."""
    if name.startswith(NAME):
        base = getattr(transformers, name.removeprefix(NAME), None)
        if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
            return model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
