"""Safetensors read a second way, by the letter of https://github.com/huggingface/safetensors#format."""

from __future__ import annotations

import json
import math
from typing import Any

WIDTHS = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2}
WIDTHS |= {"I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8, "U64": 8}


def read(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Return name to type, shape and bytes; None where the file breaks the format."""
    try:
        return _read(data)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _read(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8 or size > 100_000_000 or data[8:9] != b"{":
        return None
    header = json.loads(data[8 : 8 + size].decode(), object_pairs_hook=_unique)
    body = data[8 + size :]
    found, spans = {}, []
    for name, entry in header.items():
        if name == "__metadata__":
            if entry is not None and not all(isinstance(value, str) for value in entry.values()):
                return None
            continue
        begin, end = entry["data_offsets"]
        shape = tuple(entry["shape"])
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            return None
        if end - begin != math.prod(shape) * WIDTHS[entry["dtype"]] or end > len(body):
            return None
        spans.append((begin, end))
        found[name] = (entry["dtype"], shape, body[begin:end])
    at = 0
    for begin, end in sorted(spans):
        if begin != at:
            return None
        at = end
    return found if at == len(body) else None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key twice")
    return dict(pairs)
