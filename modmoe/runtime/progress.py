"""How a run says how far it is: a function that is called with a message and two numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from modmoe.runtime import ranks

Progress = Callable[..., None]
"""Called with a message and, where they are known, what is done and what there is in all.

What is counted stands behind the message's last comma: ``progress("writing, bytes", 10**6, 10**9)``.
"""


def silent(*_: Any) -> None:
    """Report no progress."""


def counter(progress: Progress, message: str, total: int) -> Callable[[int], None]:
    """Return a function that adds the tokens it is called with and reports their sum.

    Each process of a run counts as if all the others were as far as this one.
    """
    done = 0

    def add(tokens: int) -> None:
        nonlocal done
        done += tokens * ranks.num_ranks()
        progress(message, min(done, total), total)

    progress(message, 0, total)
    return add
