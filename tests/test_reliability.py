"""docs/reliability.md names a test for each promise, and each of them is there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and line != "| promise | test |"]
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_promise_names_a_test() -> None:
    assert len(ROWS) > 30
    assert [row for row in ROWS if not re.search(r"\| `tests/[\w/]+\.py::test_\w+` \|$", row)] == []
    assert len(NAMED) == len(set(NAMED)) == len(ROWS)


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_the_tests_are_there(path: str) -> None:
    names = {node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert [name for file, name in NAMED if file == path and name not in names] == []
