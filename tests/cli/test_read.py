"""Every command that reads text says once for each task what it read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from modmoe.cli.main import run
from tests.support import tiny

ROWS = [{"prompt": f"{n} + 1 = ", "completion": f"{n + 1}"} for n in range(20)]
ROWS += [{"text": f"the number {n} is here"} for n in range(20)]
ROWS += [{"prompt": "nothing follows", "completion": None}, {"text": " "}]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    room = tmp_path_factory.mktemp("room")
    tiny.save_dense(room / "dense")
    (room / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return room


@pytest.mark.parametrize(
    ("command", "rows", "left_out"),
    [
        ("analyze {dense} -o {out} --num-modules 8 --tokens 9999 --report {report}", 41, {"the row is empty": 1}),
        (
            "convert {dense} {out} --num-modules 8 --num-experts 2 --tokens 9999 --routing token",
            41,
            {"the row is empty": 1},
        ),
        (
            "finetune {dense} {out} --max-steps 60 --batch-size 1 --train full",
            40,
            {"the row is empty": 1, "the completion is empty": 1},
        ),
        ("eval {dense}", 40, {"the row is empty": 1, "the completion is empty": 1}),
    ],
)
def test_every_command_says_what_it_read(
    room: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, rows: int, left_out: dict[str, int]
) -> None:
    places = {"dense": room / "dense", "out": tmp_path / "out", "report": tmp_path / "report.html"}
    words = [*command.format(**places).split(), "--task", f"a={room / 'a.jsonl'}", "--device", "cpu", "--json", "-v"]
    assert run(words) == 0
    out, err = capsys.readouterr()
    read = json.loads(out)["read"]["a"]
    assert (read["rows"], read["rows_in_file"], read["left_out"]) == (rows, 42, left_out)
    assert 0 < read["counted"] <= read["tokens"]
    assert err.count(f"a: {rows} of 42 rows read, {read['tokens']:,} tokens, of which {read['counted']:,} count;") == 1
    assert err.count("the first row as the model reads it") == 1
    if places["report"].exists():
        page = places["report"].read_text()
        assert "What was read" in page and '<span class="e0" title="counts">' in page
