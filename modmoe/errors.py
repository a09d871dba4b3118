"""Errors that a user can mend: one line with the place, the value and the remedy.

The command line prints such an error without a traceback and exits with 2. Each kind is also the built-in error
that plain Python code would expect, so callers need not import this module to catch one.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ModmoeError(Exception):
    """The root of all errors that a user can mend."""


class RecipeError(ModmoeError, ValueError):
    """A recipe, a flag or a value in one of them is wrong."""


class CheckpointError(ModmoeError, ValueError):
    """A checkpoint is missing, damaged, unsafe or of an unknown kind."""


class CalibrationError(ModmoeError, ValueError):
    """The text of a task cannot be read or is too little."""


class PartitionError(ModmoeError, ValueError):
    """Neurons cannot be cut into modules as asked, or modules not made into experts."""


class PlanError(ModmoeError, ValueError):
    """A planned checkpoint does not fit its source."""


class ExportError(ModmoeError, ValueError):
    """A form or target cannot hold this model, or what was written does not reload."""


class AdapterError(ModmoeError, ValueError):
    """A routed adapter does not fit its model, or its file is damaged or belongs to another."""


class RankError(ModmoeError, RuntimeError):
    """Another process of the same run is gone."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name nearest to ``name``, or a list of what is known.

    The answer starts with a space, so that it can be appended to a sentence.
    """
    options = sorted(known)
    close = difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    if close:
        return f" Did you mean '{close[0]}'?"
    return f" Known: {', '.join(options)}." if options else ""
