"""The house: imports go downwards, no files import each other in a circle, and CONTRIBUTING.md shows what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.support import house


def test_no_files_import_each_other_in_a_circle() -> None:
    files = house.sources()
    graph = {module: house.imports(module, files) for module in files}
    assert house.circles(graph) == []
    # which would see one
    graph["modmoe.errors"] = {"modmoe.storage.checkpoint"}
    assert any("modmoe.errors" in circle for circle in house.circles(graph))


def test_an_import_goes_only_downwards(repository: Path) -> None:
    """Inside functions and for types too, in the order that ``make imports`` has."""
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    rank = {name: number for number, layer in enumerate(contract["layers"]) for name in layer.split(" | ")}
    files = house.sources()
    upward = []
    for module in files:
        here = module.split(".")[1:2]
        for other in house.imports(module, files):
            there = other.split(".")[1:2]
            if here and (not there or rank[there[0]] < rank[here[0]]):
                upward.append(f"{module} -> {other}")
    assert upward == []


def test_the_tree_is_the_one_that_contributing_shows(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```text\n{house.tree()}```" in text, "put there what `python -m tests.support.house tree` prints"
    assert all(" " in line.strip() for line in house.tree().splitlines()[1:]), "a file has no docstring"


def test_tables_lie_where_contributing_says(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"`([A-Z_]+)` (?:in|of) `([\w/]+\.py)`", text)
    assert len(rows) >= 8
    for table, named in rows:
        files = [file for file in (repository / "modmoe").rglob("*.py") if str(file).endswith(f"/{named}")]
        assert any(re.search(rf"(?m)^{table}\b", file.read_text(encoding="utf-8")) for file in files), (table, named)


def test_a_conversion_is_told_by_its_row_alone() -> None:
    """No other file compares a recipe's method with a name."""
    compared = re.compile(r"recipe\.method\s*(?:==|!=|in\b|not in\b)")
    found = {
        module: compared.findall(file.read_text(encoding="utf-8"))
        for module, file in house.sources().items()
        if module != "modmoe.conversion.table"
    }
    assert {module: lines for module, lines in found.items() if lines} == {}
