"""How the estimate of a dry run reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def estimate_words(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with its estimate, if it has one, as lines for people in the place of numbers."""
    shown = {key: value for key, value in result.items() if key not in ("estimate", "device_memory_bytes")}
    for step, need in result.get("estimate", {}).items():
        place = result["device"]
        memory = (
            f"about {_memory_words(need['device_bytes'])} of {_memory_words(result['device_memory_bytes'])} on {place}"
        )
        if place != "cpu" and need["host_bytes"] != need["device_bytes"]:
            memory += f", and {_memory_words(need['host_bytes'])} in the machine's own memory"
        shown[f"{step}.memory"] = memory
        low, high = (_time_words(need[f"seconds_{end}"]) for end in ("low", "high"))
        shown[f"{step}.time"] = f"about {low} to {high}, most of it {_WHERE[need['bound_by']]}"
        shown[f"{step}.verdict"] = need["verdict"]
    return shown


_WHERE = {
    "compute": "products (bound by compute)",
    "memory bandwidth": "reading weights (bound by memory bandwidth)",
    "disk": "the disk",
    "host processor": "fits on the processor",
    "start": "starting and small steps",
}


def _memory_words(size_bytes: float) -> str:
    """Return bytes as coarse as an estimate is: 0.54 GB, 21 GB."""
    size_gb = size_bytes / 1e9
    return f"{size_gb:.{2 if size_gb < 1 else 1 if size_gb < 10 else 0}f} GB"


def _time_words(seconds: float) -> str:
    """Return a time as coarse as an estimate is."""
    for unit, size, most in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < most * size:
            return f"{seconds / size:.{0 if seconds >= 10 * size or unit == 's' else 1}f} {unit}"
    return f"{seconds / 86400:.1f} days"
