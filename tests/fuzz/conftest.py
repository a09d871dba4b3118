"""The figures of a long run, and what each kind of input starts from."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from modmoe.models import tokenizer_files
from modmoe.storage import bounded
from tests.fuzz.judge import CHILD_BYTES, CHILD_SECONDS, IS_LONG, TALLIES


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """Give child processes little, so that ten thousand inputs are soon done."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bounded, "MEMORY_BYTES", CHILD_BYTES)
        patch.setattr(bounded, "ITEM_SECONDS", CHILD_SECONDS)
        patch.setattr(tokenizer_files, "_PROBE_SECONDS", CHILD_SECONDS)
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what became of the inputs."""
    if not IS_LONG or not TALLIES:
        return
    columns = ("inputs", "refused", "accepted", "other", "worst_s", "worst_bytes", "child_bytes")
    terminalreporter.write_line(f"{'kind':12}" + "".join(f"{column:>14}" for column in columns))
    for kind, tally in TALLIES.items():
        cells = [getattr(tally, column) for column in columns]
        terminalreporter.write_line(
            f"{kind:12}" + "".join(f"{c:14.2f}" if isinstance(c, float) else f"{c:14}" for c in cells)
        )
    total = [sum(getattr(tally, column) for tally in TALLIES.values()) for column in columns[:4]]
    terminalreporter.write_line(f"{'all':12}" + "".join(f"{number:14}" for number in total))
