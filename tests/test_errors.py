"""Errors: one line made of a place, a problem and a remedy, which stay apart for those who ask."""

from __future__ import annotations

import pickle

import pytest

from modmoe.errors import CheckpointError, ModmoeError, RecipeError, did_you_mean


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        (("router.top_k", "5 is more than 4"), "router.top_k: 5 is more than 4."),
        (("router.top_k", "5 is more than 4", "choose less"), "router.top_k: 5 is more than 4; choose less."),
        (
            ("method", "no method 'modula'", did_you_mean("modula", ["modular", "prune"])),
            "method: no method 'modula'. Did you mean 'modular'?",
        ),
        (("method", "no method 'x'", did_you_mean("x", ["ab", "cd"])), "method: no method 'x'. Known: ab, cd."),
        (("method", "no method 'x'", did_you_mean("x", [])), "method: no method 'x'."),
        (("memory is full.",), "memory is full."),
    ],
)
def test_parts_make_one_line(parts: tuple[str, ...], line: str) -> None:
    assert str(RecipeError(*parts)) == line


def test_a_line_keeps_its_parts_in_another_process_and_at_another_place() -> None:
    error = pickle.loads(pickle.dumps(RecipeError("seed", "-1 is below 0", "choose 0")))
    assert (error.place, error.problem, error.remedy) == ("seed", "-1 is below 0", "choose 0")
    assert str(error.at("r.yaml: seed")) == "r.yaml: seed: -1 is below 0; choose 0."
    whole = pickle.loads(pickle.dumps(CheckpointError("a: is damaged.")))
    assert (whole.place, str(whole)) == ("", "a: is damaged.")


@pytest.mark.parametrize("part", [0, 1, 2])
def test_no_part_breaks_the_line_or_shows_a_token(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    parts = ["place", "problem", "remedy"]
    parts[part] += "\n\x1b[31mhf_secret\u202e"
    assert str(ModmoeError(*parts)).replace("\\x1b[31m***\\u202e", "") == "place: problem; remedy.".replace(
        parts[part].split("\n")[0], parts[part].split("\n")[0] + " "
    )
