"""Values of a config.json that must not be followed: counts that no model has, code of the Hub, and NaN.

transformers follows them: it makes a name for each of a billion labels, and fetches the kernel that an implementation
of attention names by its repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modmoe.storage.kinds.headers import Headers, Problem

_LAYERS = re.compile(r"n_layers?|num_.*(layers|blocks)|depth|\w*_depth")
_THINGS = re.compile(r"num_labels|\w*num_(local_|routed_)?experts|n_routed_experts|num_hash_buckets")
_MOST_LAYERS = 10_000
"""Layers of a configuration without weights."""
_MOST_THINGS = 100_000
"""Labels or experts; transformers makes an object for each of them."""


def find_orders(directory: Path, config: Mapping[str, Any], headers: Headers) -> Iterator[Problem]:
    """Yield the keys of a configuration whose values must not be followed."""
    layers = len(headers) or _MOST_LAYERS
    for place, key, value in _values("", config):
        at = f"{directory / 'config.json'}: {place}{key}"
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if is_whole and _LAYERS.fullmatch(key) and value > layers:
            held = f", and there are {layers} tensors" if headers else ""
            yield Problem(at, f"is {value!r:.24}{held}", "restore it")
        elif is_whole and _THINGS.fullmatch(key) and value > _MOST_THINGS:
            yield Problem(at, f"is {value!r:.24}, and no model has more than {_MOST_THINGS:,}", "restore it")
        elif is_whole and abs(value) >= 2**63:
            yield Problem(at, f"is {value!r:.24}..., too large for any number of a model", "restore it")
        elif isinstance(value, float) and value != value:
            yield Problem(at, "is NaN; a number belongs there", "restore it")
        elif isinstance(value, str) and "implementation" in f"{place}{key}" and re.search(r"[/:]", value):
            yield Problem(at, f"names code of the Hub, {value!r:.80}, which would be run", "take that key out")


def _values(place: str, config: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield each value with its key and what the key lies in, objects in objects and lists too."""
    waiting: list[tuple[str, Any]] = [(place, config)]
    while waiting:
        place, holder = waiting.pop()
        pairs = holder.items() if isinstance(holder, Mapping) else ((f"[{n}]", item) for n, item in enumerate(holder))
        for key, value in pairs:
            if isinstance(value, Mapping | list):
                waiting.append((f"{place}{key}.", value))
            else:
                yield place, str(key), value
