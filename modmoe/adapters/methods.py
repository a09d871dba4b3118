"""The table of methods: name to the class of the adapter and of its settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from .base import RoutedAdapter
from .comol import CoMoL, CoMoLSettings


class Method(NamedTuple):
    """One method."""

    adapter: type[RoutedAdapter]
    settings: type[Any]


METHODS: dict[str, Method] = {
    "comol": Method(CoMoL, CoMoLSettings),
}
"""Every routed adapter by name; the configuration of each for PEFT is made in ``peft.py``."""
