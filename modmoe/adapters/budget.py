"""Rank and number of experts for a given number of trainable parameters, so that comparisons are equal."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from modmoe.adapters.peft_binding import RoutedConfig
from modmoe.adapters.peft_configs import CONFIGS
from modmoe.errors import AdapterError, did_you_mean

_NEAR = 0.1
_MOST = 1 << 16


def find_config(method: str) -> type[RoutedConfig]:
    """Return a method's configuration class; AdapterError for an unknown name."""
    if method not in CONFIGS:
        raise AdapterError("adapter.method", f"no method '{method}'", did_you_mean(method, CONFIGS))
    return CONFIGS[method]


def solve_budget(method: str, model: nn.Module, parameters: int, **settings: Any) -> RoutedConfig:
    """Return the method's configuration that adds at most ``parameters`` to ``model``, and close to as many.

    The rank is solved first, with the number of experts as the method has it (or as given); where that leaves more
    than a tenth unused, or even rank 1 is too much, the number of experts is solved too: the nearest to what the method
    has, two at least. The scale lora_alpha / r stays.

    Args:
        method: a key of METHODS.
        model: the base model; the meta device will do.
        parameters: the most that may be added.
        settings: further fields of the configuration. ``r`` and ``num_experts`` are not solved where they are given.

    Raises:
        AdapterError: an unknown method or setting; the smallest adapter has more parameters than that.
    """
    kind = find_config(method)
    if parameters < 1:
        raise AdapterError("budget", f"{parameters} is no number of parameters", "at least 1 is needed")
    start = make_config(method, settings)
    fields = {field.name for field in dataclasses.fields(kind)}
    has_rank = "r" in fields and "r" not in settings
    has_experts = "num_experts" in fields and "num_experts" not in settings
    usual = int(getattr(start, "num_experts", 1))
    # a mixture has at least two experts
    fewest = max(getattr(start, "top_k", None) or 1, min(usual, 2))
    found: list[tuple[int, int, RoutedConfig]] = []

    def consider(experts: int) -> int:
        config = _with(start, num_experts=experts) if has_experts else start
        best = _largest(config, model, parameters, "r") if has_rank else config
        if best is None or (count := best.num_parameters(model)) > parameters:
            return 0
        found.append((count, abs(experts - usual), best))
        return count

    if not has_rank and has_experts:
        largest = _largest(start, model, parameters, "num_experts")
        if largest is not None and largest.num_experts >= fewest:  # type: ignore[attr-defined]
            return largest
    elif consider(usual) < (1 - _NEAR) * parameters and has_experts:
        for experts in range(fewest, 2 * usual + 1):
            consider(experts)
    if not found:
        least = _with(start, **({"r": 1} if has_rank else {}), **({"num_experts": fewest} if has_experts else {}))
        raise AdapterError(
            "budget",
            f"{parameters} parameters are too few for {method}",
            f"its smallest has {least.num_parameters(model)}",
        )
    near = [item for item in found if item[0] >= (1 - _NEAR) * parameters]
    if near:
        return min(near, key=lambda item: (item[1], getattr(item[2], "num_experts", 1)))[2]
    return max(found, key=lambda item: item[0])[2]


def make_config(method: str, settings: dict[str, Any]) -> RoutedConfig:
    """Return a method's configuration with ``settings``; AdapterError for a name that it does not have."""
    kind = find_config(method)
    known = {field.name for field in dataclasses.fields(kind)}
    for name in settings:
        if name not in known:
            raise AdapterError(f"adapter.settings.{name}", f"{method} has no such setting", did_you_mean(name, known))
        if isinstance(settings[name], int) and settings[name] > _MOST:
            raise AdapterError(
                f"adapter.settings.{name}", f"{settings[name]!r:.24} is more than {_MOST:,}", "choose less"
            )
    return kind(**settings)


def _largest(config: RoutedConfig, model: nn.Module, parameters: int, field: str) -> RoutedConfig | None:
    """Return ``config`` with the largest ``field`` that fits, or None where 1 is too much already."""

    def count(value: int) -> int:
        return _with(config, **{field: value}).num_parameters(model)

    if count(1) > parameters:
        return None
    low, high = 1, 2
    while high < _MOST and count(high) <= parameters:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) <= parameters else (low, middle)
    return _with(config, **{field: low})


def _with(config: Any, **changes: Any) -> RoutedConfig:
    if "r" in changes and hasattr(config, "lora_alpha"):
        changes["lora_alpha"] = config.lora_alpha / config.r * changes["r"]
    changed: RoutedConfig = dataclasses.replace(config, **changes)
    return changed
