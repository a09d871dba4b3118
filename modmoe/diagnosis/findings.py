"""Findings: faults, each with its place and its remedy, notes, and a list of the checks."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault."""

    place: str
    """The file, with the tensor or the key in it where there is one."""
    wrong: str
    """What is wrong at the place."""
    remedy: str
    """The remedy."""

    def __str__(self) -> str:
        """Return the one line that a user reads."""
        return f"{self.place}: {self.wrong}; {self.remedy}."


@dataclass(slots=True)
class Findings:
    """Faults and notes in the order in which they were found."""

    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Remarks that are not faults, one line each."""
    checked: dict[str, Any] = field(default_factory=dict)
    """Each check and how much it covered; ``no: why`` where it could not be made."""
    told: set[str] = field(default_factory=set)
    """Tensors whose name or shape was reported, so that no fault is reported twice."""

    def fault(self, place: object, wrong: str, remedy: str) -> None:
        """Add a fault; strings of the checkpoint are passed as they are and shortened here."""
        self.faults.append(Fault(*(_one_line(str(text)) for text in (place, wrong, remedy))))

    def fault_of_error(self, place: object, error: Exception, remedy: str) -> None:
        """Add an error as a fault; the error's own remedy wins over ``remedy``."""
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
