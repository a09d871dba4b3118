"""What was found: faults, each with its place and its remedy, notes, and what was checked."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong."""

    place: str
    """The file, and where there is one the tensor or the key in it."""
    wrong: str
    """What is wrong there."""
    remedy: str
    """How it is mended."""

    def __str__(self) -> str:
        """Return the one line that a user reads."""
        return f"{self.place}: {self.wrong}; {self.remedy}."


@dataclass(slots=True)
class Findings:
    """Faults and notes in the order in which they were found."""

    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a user should know that is no fault, one line each."""
    checked: dict[str, Any] = field(default_factory=dict)
    """What was looked at, and how much of it; ``no: why`` where it could not be."""
    told: set[str] = field(default_factory=set)
    """Tensors whose name or shape is known to be wrong, so that it is not said twice."""

    def fault(self, place: object, wrong: str, remedy: str) -> None:
        """Add a fault; strings of the checkpoint are given as they are, and cut where they are endless."""
        self.faults.append(Fault(*(_one_line(str(text)) for text in (place, wrong, remedy))))

    def fault_of_error(self, place: object, error: Exception, remedy: str) -> None:
        """Add what an error says; its own remedy, behind the last semicolon, wins over ``remedy``."""
        text = " ".join(str(error).split()).removeprefix(f"{place}: ").rstrip(".") or type(error).__name__
        wrong, _, own = text.rpartition("; ")
        self.fault(place, wrong or text, own if wrong else remedy)

    def fault_of_each(self, file: object, names: Iterable[str], wrong: str, remedy: str) -> None:
        """Add the same fault of several tensors, in one line for those whose names differ in their numbers alone."""
        alike: dict[str, list[str]] = {}
        for name in names:
            alike.setdefault(re.sub(r"\d+", "*", name), []).append(name)
        for pattern, group in alike.items():
            told = f"'{group[0][:99]}'" if len(group) == 1 else f"'{pattern[:99]}' ({len(group)} tensors)"
            self.fault(f"{file}: {told}", wrong, remedy)

    def note(self, text: str) -> None:
        """Add a note."""
        self.notes.append(_one_line(text))


_MOST_CHARACTERS = 5000


def _one_line(text: str) -> str:
    """Return ``text`` without what would move a terminal's cursor or colour it, and not longer than a path may be."""
    return "".join(letter if letter.isprintable() else " " for letter in text[:_MOST_CHARACTERS])
