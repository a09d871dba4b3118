"""What a terminal shows at the end of a command: tables that lose no number where it is narrow, trees that fit."""

from __future__ import annotations

import io
import json
import re
import sys
from typing import Any

import pytest
from rich.console import Console as RichConsole

from modmoe import api
from modmoe.cli.console import Console, show
from modmoe.cli.inspect import draw_tree
from modmoe.cli.main import run

MODELS = {
    name: {
        "loss code": 2.737,
        "loss arithmetic": loss,
        "stored": 2_361_408,
        "active": 1_627_008,
        "decode tokens/s": 93.6,
    }
    for name, loss in (("dense", 0.1623), ("converted", 0.5923), ("fine-tuned", 0.2589))
}
LONG = "self." + 30 * "__name__."
RESULT = {"seconds": 193.7, "models": MODELS, "text": [{"task": "code", "model": "dense", "text": LONG}]}
CONVERTED = {
    "model_type": "modmoe_llama",
    "routing": "sequence",
    "num_experts": 2,
    "top_k": 1,
    "parameters": {"dense": 2_361_408, "stored": 1_957_824},
    "routers": [{"agreement": 0.95, "chance": 0.63}, {"agreement": 0.98, "chance": 0.68}],
    "verified": {"max_abs_logit_diff_all_on": 1.5e-12, "max_abs_logit": 14.13},
    "stored_modules": [12, 12],
    "active_modules": [8, 8],
    "seconds": 159,
    "peak_rss_bytes": 800_440_000,
}


class Terminal(io.StringIO):
    """A stream that calls itself a terminal."""

    def isatty(self) -> bool:
        """Return True."""
        return True

    def words(self) -> str:
        """Return what was written without colours."""
        return re.sub(r"\x1b\[[?0-9;]*[A-Za-z]", "", self.getvalue())


def open_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Return what stdout and stderr are from here on: a terminal with colours."""
    terminal = Terminal()
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return terminal


@pytest.mark.parametrize("columns", [60, 80, 100, 200])
def test_no_number_is_cut_and_no_line_too_long(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv("COLUMNS", str(columns))
    show(RESULT, "demo", terminal)
    text = terminal.words()
    for words in ("0.1623", "0.5923", "0.2589", "2,361,408", "1,627,008", "93.6", "fine-tuned", "193.7"):
        assert words in text
    assert max(map(len, text.splitlines())) <= columns
    assert "…" in text  # of long text, and of nothing else
    assert text.count("…") == 1
    # where there is room each model is a row
    is_row = any(line.split()[:1] == ["dense"] and "2,361,408" in line for line in text.splitlines())
    assert is_row is (columns >= 80)


def test_what_comes_next_stands_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    with Console() as console:
        console.progress("profiling, tokens", 0, 10)
        console.progress("profiling, tokens", 10, 10)
        console.finish(CONVERTED, title="moe", next_step="modmoe x", picture=lambda: draw_tree(CONVERTED, "moe"))
    lines = terminal.words().split("\n")
    assert not lines[lines.index("moe") - 1].strip() and "\n\nnext: modmoe x\n" in terminal.words()
    assert "\x1b[1m" in terminal.getvalue()


@pytest.mark.parametrize("name", ["NO_COLOR", "TERM"])
def test_without_colours(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = open_terminal(monkeypatch)
    monkeypatch.setenv(name, "dumb")
    with Console() as console:
        console.finish(RESULT, title="demo", next_step="modmoe x")
    assert not re.search(r"\x1b\[[0-9;]*3\d", terminal.getvalue())
    if name == "TERM":
        assert "\x1b" not in terminal.getvalue()


DENSE = {
    "model_type": "llama",
    "method": None,
    "num_layers": 5,
    **dict.fromkeys(("num_modules", "num_experts", "modules_per_expert", "top_k"), 0),
    "routing": None,
    "experts": [],
    "parameters": dict.fromkeys(("dense", "stored", "active", "active_max", "materialised"), 2_361_408),
    "bytes_on_disk": 4_727_864,
    "tensor_bytes": 4_722_816,
    "sparsity": {"ffn": 0.0, "total": 0.0},
}
PRUNED = {
    **DENSE,
    "method": "prune",
    "parameters": {**dict.fromkeys(("stored", "active", "active_max", "materialised"), 1_624_128), "dense": 2_361_408},
    "sparsity": {"ffn": 0.5, "total": 0.3122},
}


@pytest.mark.parametrize(
    ("result", "tree", "rows"),
    [
        (
            DENSE,
            ["llama, dense, 5 layers", "2,361,408 parameters, 4.73 MB on disk"],
            ["model_type", "kind", "num_layers", "parameters", "bytes_on_disk", "tensor_bytes"],
        ),
        (
            PRUNED,
            [
                "llama, prune, dense, 5 layers",
                "parameters, 4.73 MB on disk",
                "dense",
                "stored",
                "sparsity",
                "ffn",
                "total",
            ],
            [
                "model_type",
                "kind",
                "method",
                "num_layers",
                "parameters.dense",
                "parameters.stored",
                "bytes_on_disk",
                "tensor_bytes",
                "sparsity.ffn",
                "sparsity.total",
            ],
        ),
    ],
    ids=["dense", "pruned"],
)
def test_a_dense_model_is_said_to_be_dense(
    result: dict[str, Any],
    tree: list[str],
    rows: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(api, "inspect", lambda _: result)
    assert run(["inspect", "it", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == result
    assert run(["inspect", "it"]) == 0
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "it"
    assert [line.split()[0] for line in lines] == rows
    assert lines[1].split() == ["kind", "dense"]
    terminal = open_terminal(monkeypatch)
    assert run(["inspect", "it"]) == 0
    lines = [line.strip(" │├└─") for line in terminal.words().splitlines()]
    assert lines[0] == "it"
    assert [line[: len(words)] for line, words in zip(lines[1:], tree, strict=True)] == tree


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_converted_model_is_a_tree_that_fits(columns: int) -> None:
    stream = io.StringIO()
    RichConsole(file=stream, width=columns, highlight=False).print(draw_tree(CONVERTED, "moe"))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= columns
    for words in ("logits differ", "for 95 to 98 %", "layers 0 to 1"):
        assert words in text
    if columns >= 80:
        assert "by 1.5e-12 of 14.1" in text and "63 to 68 %" in text and "2 min 39 s and 800.44 MB" in text
        assert "…" not in text
