"""The notebook of the main job: its cells run with little of everything, and what is committed has run in order."""

from __future__ import annotations

import base64
import copy
import getpass
import re
import struct
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from tests.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "docs" / "tutorials" / "main-job.ipynb"
# exports are reloaded in fresh processes by tests of their own
LITTLE = """
ROWS, TOKENS, STEPS = 24, 256, 2
import modmoe.exports.converted
proof = {"reloaded_without_modmoe": True, "max_abs_logit_diff": 0.0, "greedy_tokens_equal": True}
modmoe.exports.converted.verify_export = lambda *_, **__: proof
"""
MOST_BYTES = 400_000


@pytest.fixture(scope="module")
def notebook() -> Any:
    return nbformat.read(NOTEBOOK, as_version=4)


def texts(cell: Any) -> str:
    """Return what a cell printed and returned, pictures aside."""
    return "".join(out.get("text", "") + out.get("data", {}).get("text/plain", "") for out in cell.outputs)


# the kernel talks to this process alone
@pytest.mark.filterwarnings("ignore:Kernel is running over TCP without encryption")
def test_every_cell_runs(notebook: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPLBACKEND")  # or nothing would be drawn into the notebook
    ran = copy.deepcopy(notebook)
    place = next(number for number, cell in enumerate(ran.cells) if "parameters" in cell.metadata.get("tags", ()))
    ran.cells.insert(place + 1, nbformat.v4.new_code_cell(LITTLE))
    # an error in a cell is raised here
    NotebookClient(ran, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for then, now in zip(notebook.cells, ran.cells[: place + 1] + ran.cells[place + 2 :], strict=True):
        if then.cell_type == "code":
            kinds = [{out.output_type: sorted(out.get("data", ())) for out in cell.outputs} for cell in (then, now)]
            assert kinds[0] == kinds[1], then.source


def test_what_is_committed_has_run_in_order(notebook: Any) -> None:
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    # only the first cell, of numbers, says nothing
    assert [cell.source for cell in cells if not cell.outputs] == [cells[0].source]
    kinds = {out.output_type for cell in cells for out in cell.outputs}
    assert kinds == {"stream", "execute_result", "display_data"}
    assert {out.name for cell in cells for out in cell.outputs if out.output_type == "stream"} == {"stdout"}


def test_it_is_small_and_its_pictures_can_be_read(notebook: Any) -> None:
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    pictures = [
        out.data["image/png"]
        for cell in notebook.cells
        for out in cell.get("outputs", ())
        if "data" in out and "image/png" in out.data
    ]
    assert len(pictures) >= 2
    for picture in map(base64.b64decode, pictures):
        assert picture[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", picture[16:24])
        assert 300 <= width <= 1000 and 100 <= height <= 800


def test_it_shows_no_place_of_a_machine(notebook: Any) -> None:
    said = "".join(texts(cell) for cell in notebook.cells if cell.cell_type == "code")
    assert said
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|usr|Users|var|opt|mnt)/|[A-Z]:\\|site-packages", said)
    assert not re.search(rf"\b{re.escape(getpass.getuser())}\b", said) or getpass.getuser() == "root"


def test_its_text_is_short_and_leads_somewhere(notebook: Any) -> None:
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= 25, cell.source
        for link in re.findall(r"\]\(([^)#:]+)\)", cell.source) if cell.cell_type == "markdown" else ():
            assert (NOTEBOOK.parent / link).is_file(), link
