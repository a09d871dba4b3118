"""The property of every hostile input: it is refused in one line, or taken and right; soon, and in little memory."""

from __future__ import annotations

import os
import re
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, settings

from modmoe.errors import ModmoeError

INPUTS = int(os.environ.get("MODMOE_FUZZ_INPUTS", "0"))
"""Inputs of the long run, of all kinds together; 0 is the short run."""
IS_LONG = INPUTS > 0
MOST_SECONDS = 5.0
"""CPU seconds of one input."""
CHILD_SECONDS = 1.0
CHILD_BYTES = 300_000_000
"""Bounds of a child process here; a user's machine gives more."""
MOST_BYTES = 400 << 20
"""What one input may add to the memory that is resident, at its peak."""
MOST_CHARACTERS = 700
"""Of an error, the input's directory not counted."""


@dataclass
class Tally:
    """What became of the inputs of one kind."""

    inputs: int = 0
    refused: int = 0
    accepted: int = 0
    other: int = 0
    worst_s: float = 0.0
    worst_bytes: int = 0
    child_bytes: int = 0
    """Most that a child process had, what it has of its parent included."""


SHARES = {
    "weights": (50, 0.15),
    "index": (30, 0.06),
    "config": (40, 0.12),
    "tied": (20, 0.06),
    "tokenizer": (20, 0.05),
    "adapter": (30, 0.04),
    "measured": (40, 0.07),
    "recipe": (80, 0.15),
    "task": (80, 0.15),
    "template": (8, 0.025),
    "rules": (10, 0.035),
    "special": (15, 0.04),
    "export": (8, 0.02),
    "push": (12, 0.03),
}
"""Inputs of each kind in the short run, and their share of the long one."""


def often(kind: str) -> Callable[[Any], Any]:
    """Return hypothesis' settings for one kind of input; the short run is the same every time."""
    short, share = SHARES[kind]
    return settings(
        max_examples=round(INPUTS * share) if IS_LONG else short,
        derandomize=not IS_LONG,
        database=None,
        deadline=None,
        # an input that fails is shown as it is: to find a smaller one takes many more
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )


TALLIES: dict[str, Tally] = {}


def judge(kind: str, place: Path, *steps: Callable[[], Any]) -> list[Any]:
    """Run each step on a hostile input; return what they return, None for one that refused it as it should.

    The test fails where another exception comes out, the message is no line that names the place, or it took long.
    """
    tally = TALLIES.setdefault(kind, Tally())
    before_bytes, started_s = _resident(), _processor_s()
    _forget_peak()
    results: list[Any] = []
    errors: list[ModmoeError] = []
    tally.inputs += 1
    for step in steps:
        try:
            results.append(step())
        except ModmoeError as error:
            results.append(None)
            errors.append(error)
        except BaseException:
            tally.other += 1
            raise
    took_s, took_bytes = _processor_s() - started_s, _peak() - before_bytes
    tally.worst_s, tally.worst_bytes = max(tally.worst_s, took_s), max(tally.worst_bytes, took_bytes)
    tally.child_bytes = max(tally.child_bytes, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss << 10)
    # each step may have a child process, which ends at its bound
    most_s = MOST_SECONDS + 2 * CHILD_SECONDS * len(steps)
    assert took_s < most_s, f"took {took_s:.1f} s"
    assert took_bytes < MOST_BYTES, f"took {took_bytes / 1e6:.0f} MB"
    for error in errors:
        check_line(str(error), place)
    if errors:
        tally.refused += 1
    else:
        tally.accepted += 1
    return results


def check_line(message: str, place: Path) -> None:
    """Assert that an error is one printable line of some length which names the place."""
    assert message.isprintable(), repr(message)
    short = message.replace(str(place), "")
    assert len(short) < MOST_CHARACTERS, f"{len(short)} characters: {message[:200]}..."
    assert str(place) in message or re.match(r"[\w.-]+[\w./ -]*: ", message), message


def _processor_s() -> float:
    """Return the processor time of this process and of the children that have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() if _HAS_PROC else 0


def _forget_peak() -> None:
    if _HAS_PROC:
        Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    if not _HAS_PROC:
        return 0
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM"))


_HAS_PROC = os.access("/proc/self/clear_refs", os.W_OK)
