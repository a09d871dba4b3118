"""Plain values become dataclasses: each value of a YAML file has to be of its field's type, and nothing is guessed."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union

from modmoe.errors import RecipeError, did_you_mean

_LARGEST = 2**53
"""The largest whole number up to which a float holds every whole number exactly."""


def build(cls: type[Any], values: Mapping[str, Any], place: str) -> Any:
    """Return a dataclass whose fields are ``values``, checked against the fields' types, inner dataclasses included.

    Raises RecipeError at ``place`` and the key for an unknown key or a value of another type.
    """
    hints = typing.get_type_hints(cls)
    known = {item.name for item in dataclasses.fields(cls)}
    built: dict[str, Any] = {}
    for key, value in values.items():
        if key not in known:
            raise RecipeError(f"{place}{key}", "no such key", did_you_mean(key, known))
        built[key] = _fit(hints[key], value, f"{place}{key}")
    return cls(**built)


def _shown(value: Any) -> str:
    """Return a value as text, shortened."""
    try:
        return f"{value!r:.80}"
    except ValueError:  # a number may have thousands of digits
        return f"this {type(value).__name__}"


def _fit(hint: Any, value: Any, place: str) -> Any:
    """Return ``value`` as the type ``hint`` or raise; YAML reads 1e-4 as a string, and True is an int."""
    origin = typing.get_origin(hint)
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, dict):
            raise RecipeError(place, f"{_shown(value)} is not a mapping of keys")
        return build(typing.cast(type[Any], hint), value, place + ".")
    if origin in (Union, types.UnionType):
        inner = [item for item in typing.get_args(hint) if item is not type(None)]
        return None if value is None else _fit(inner[0], value, place)
    if origin is Literal:
        options = typing.get_args(hint)
        if value not in options or isinstance(value, bool):
            raise RecipeError(
                str(place), f"no such value {_shown(value)}", did_you_mean(_shown(value), map(str, options))
            )
        return value
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise RecipeError(place, f"{_shown(value)} is not a mapping of names")
        if typing.get_args(hint)[1] is str:
            for key, item in value.items():
                _fit(str, item, f"{place}.{key}")
        return dict(value)
    if hint is bool:
        if not isinstance(value, bool):
            raise RecipeError(place, f"{_shown(value)} is not true or false")
        return value
    if hint is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise RecipeError(place, f"{_shown(value)} is not a whole number")
        if abs(value) > _LARGEST:
            raise RecipeError(place, f"{_shown(value)} is out of range", f"numbers go to {_LARGEST}")
        return value
    if hint is float:
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):
            number = float("nan")
        if isinstance(value, bool) or not abs(number) < float("inf"):
            raise RecipeError(place, f"{_shown(value)} is not a number")
        return number
    if hint is str and not isinstance(value, str):
        raise RecipeError(place, f"{_shown(value)} is not text")
    return value
