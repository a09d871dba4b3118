"""A conversion of one's own, named by its dotted path: the one that docs/conversions/index.md shows."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

import modmoe
from modmoe.errors import RecipeError
from modmoe.storage.checkpoint import Checkpoint
from tests.support.tiny import save_dense

METHOD = "every_second.EVERY_SECOND"


@pytest.fixture
def own(tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Lay the file of the page where Python finds it, and return an empty directory."""
    page = (repository / "docs" / "conversions" / "index.md").read_text(encoding="utf-8")
    shown = re.search(r'```python title="every_second.py"\n(.*?)```', page, re.S)
    assert shown is not None
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "every_second.py").write_text(shown[1], encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    yield tmp_path
    sys.modules.pop("every_second", None)


def test_it_is_run_by_the_driver_as_any_other(own: Path) -> None:
    save_dense(own / "dense")
    result = modmoe.convert(own / "dense", own / "out", method=METHOD)
    source, written = Checkpoint(own / "dense"), Checkpoint(own / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(written[name], source[name][::2])
    assert result["verified"] is None
    recipe = yaml.safe_load((own / "out" / "modmoe.yaml").read_text(encoding="utf-8"))
    assert recipe["method"] == METHOD
    # what modmoe wrote may be written again, and what it did not may not
    modmoe.convert(own / "dense", own / "out", method=METHOD, overwrite=True)
    (own / "mine").mkdir()
    (own / "mine" / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"mine: .*notes.txt"):
        modmoe.convert(own / "dense", own / "mine", method=METHOD, overwrite=True)


def test_a_dry_run_asks_the_row(own: Path) -> None:
    save_dense(own / "dense")
    result = modmoe.convert(own / "dense", own / "out", method=METHOD, dry_run=True)
    assert result["dry_run"] and result["neurons"] == Checkpoint(own / "dense").config["intermediate_size"] // 2
    assert not (own / "out").exists()


def test_a_recipe_that_names_code_needs_the_flag(own: Path) -> None:
    save_dense(own / "dense")
    (own / "own.yaml").write_text(f"method: {METHOD}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"own.yaml: method: 'every_second.EVERY_SECOND' is code .*--allow-code"):
        modmoe.convert(own / "dense", own / "out", own / "own.yaml")
    assert "every_second" not in sys.modules and not (own / "out").exists()
    modmoe.convert(own / "dense", own / "out", own / "own.yaml", allow_code=True)
    assert (own / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("every_second.NOTHING", r"^method: 'every_second.NOTHING' cannot be imported: module 'every_second' has no"),
        ("nowhere.at.ALL", r"^method: 'nowhere.at.ALL' cannot be imported: No module named 'nowhere'; name "),
        ("every_second.STEPS", r"^method: 'every_second.STEPS' is not a modmoe.conversion.table.Conversion; name the"),
        ("prunes", r"^method: no method 'prunes'. Did you mean 'prune'\?"),
    ],
)
def test_a_path_that_leads_nowhere_is_one_line(own: Path, method: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        modmoe.convert(own / "dense", own / "out", method=method)


def test_keywords_of_other_methods_are_refused(own: Path) -> None:
    with pytest.raises(RecipeError, match=r"^--report: does not go with --method every_second.EVERY_SECOND; leave"):
        modmoe.convert(own / "dense", own / "out", method=METHOD, report="report.html")
