"""Where a run may write: never over what it reads, nor over what modmoe did not write, however it is spelled."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modmoe.cli import main
from modmoe.errors import RecipeError
from modmoe.runtime.preflight import check_places, input_words
from modmoe.storage import seal
from modmoe.storage.files import check_file, is_page, sign_page, write_file
from modmoe.storage.seal import MARK, SEAL
from modmoe.storage.staging import open_output


@pytest.fixture
def room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model, text, an older output and the user's own things; the working directory is beside them."""
    write_output(tmp_path / "desk" / "old")
    (tmp_path / "desk" / "model").mkdir()
    (tmp_path / "desk" / "model" / "config.json").write_text("{}")
    (tmp_path / "desk" / "text.jsonl").write_text("{}")
    (tmp_path / "desk" / "r.yaml").write_text("seed: 1")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path


def write_output(path: Path) -> None:
    with open_output(path) as partial:
        (partial / "config.json").write_text("{}")
        (partial / "README.md").write_text("card")
        (partial / "analysis").mkdir()
        (partial / "analysis" / "plan.json").write_text("{}")


def inputs(room: Path) -> dict[str, Any]:
    return input_words(
        room / "desk" / "model", {"a": str(room / "desk" / "text.jsonl")}, recipe=room / "desk" / "r.yaml"
    )


def tree(directory: Path) -> dict[str, Any]:
    return {
        str(path): path.read_bytes() if path.is_file() else os.readlink(path) if path.is_symlink() else None
        for path in sorted(directory.rglob("*"))
    }


def link(room: Path, to: str) -> Path:
    (room / "link").symlink_to(room / to)
    return room / "link"


@pytest.mark.parametrize(
    "place",
    [
        lambda room: room / "desk" / "model",
        lambda room: room / "desk",
        lambda room: room,
        lambda room: link(room, "desk"),
        lambda room: link(room, "desk/model"),
        lambda room: room / "here" / ".." / "desk" / "." / "model",
        lambda room: "../desk/model/",
        lambda room: link(room, "desk/model") / ".." / ".." / "desk",
        lambda room: link(room, "home") / ".." / "desk" / "model",
        lambda room: ".",
        lambda room: "..",
        lambda room: room / "home",
        lambda room: "/",
    ],
)
def test_an_output_is_not_and_does_not_hold_what_is_read_or_where_one_works(
    room: Path, place: Callable[[Path], Any]
) -> None:
    out, before = place(room), tree(room)
    with pytest.raises(RecipeError, match=r"which is never replaced; name another|the root of the file system"):
        check_places(out, overwrite=True, inputs=inputs(room))
    assert tree(room) == before


@pytest.mark.parametrize("role", ["source", "teacher", "tasks", "recipe", "base"])
def test_an_older_output_that_is_read_is_not_replaced(room: Path, role: str) -> None:
    old = room / "desk" / "old"
    read: dict[str, Any] = {
        "source": input_words(old, {}),
        "teacher": input_words(None, {}, teacher=old),
        "tasks": input_words(None, {}, eval_tasks={"a": str(old / "README.md")}),
        "recipe": input_words(None, {}, recipe=old / "config.json"),
        "base": {},
    }[role]
    if role == "base":
        (room / "adapter").mkdir()
        (room / "adapter" / "adapter_config.json").write_text(f'{{"base_model_name_or_path": "{old}"}}')
        read = input_words(room / "adapter", {})
    with pytest.raises(RecipeError, match=r"old: (is|holds) .*which is never replaced"):
        check_places(old, overwrite=True, inputs=read)
    check_places(old, overwrite=True, inputs=inputs(room))


def test_a_path_behind_a_link_is_what_the_system_makes_of_it(room: Path) -> None:
    out = link(room, "desk/old") / ".." / "new"
    with open_output(out) as partial:
        (partial / "config.json").write_text("{}")
    assert (room / "desk" / "new" / "config.json").is_file() and out.is_dir() and not (room / "new").exists()


def test_an_output_inside_the_source_is_fine(room: Path) -> None:
    check_places(room / "desk" / "model" / "out", overwrite=False, inputs=inputs(room))


def test_weights_behind_a_link_in_the_source_are_not_replaced(room: Path) -> None:
    (room / "desk" / "model" / "model.safetensors").symlink_to(room / "desk" / "old" / "README.md")
    with pytest.raises(RecipeError, match="old: holds the source"):
        check_places(room / "desk" / "old", overwrite=True, inputs=inputs(room))


def add(name: str) -> Callable[[Path], object]:
    return lambda old: (old / name).write_text("mine")


CHANGES: dict[str, Callable[[Path], object]] = {
    "a file": add("notes.txt"),
    "a file with a name that modmoe uses": add("generation_config.json"),
    "a file in a folder of modmoe's": add("analysis/notes.txt"),
    "a hidden file": add(".env"),
    "an edited card": add("README.md"),
    "a folder": lambda old: (old / "data").mkdir(),
    "a link": lambda old: (old / "to").symlink_to("/"),
    "a link in place of a file": lambda old: ((old / "README.md").unlink(), (old / "README.md").symlink_to("x")),
    "a pipe": lambda old: os.mkfifo(old / "pipe"),
    "no list": lambda old: (old / SEAL).unlink(),
    "another list": add(SEAL),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_modmoe_did_not_write_or_somebody_changed_is_not_replaced(room: Path, change: str) -> None:
    old = room / "desk" / "old"
    CHANGES[change](old)
    before = tree(room)
    for act in (
        lambda: check_places(old, overwrite=True, inputs={}),
        lambda: open_output(old, overwrite=True).__enter__(),
    ):
        with pytest.raises(RecipeError, match=r"old: holds .*; name another directory"):
            act()
    assert tree(room) == before


def test_what_comes_while_a_run_works_is_not_replaced(room: Path) -> None:
    old = room / "desk" / "old"
    with pytest.raises(RecipeError, match="was changed by somebody"), open_output(old, overwrite=True) as partial:
        (partial / "config.json").write_text("new")
        add("notes.txt")(old)
    assert (old / "notes.txt").read_text() == "mine" and (old / "README.md").read_text() == "card"
    assert not (room / "desk" / "old.partial").exists()


def test_what_comes_into_an_empty_directory_while_a_run_works_stays(room: Path) -> None:
    (room / "empty").mkdir()
    with pytest.raises(RecipeError, match="somebody wrote there"), open_output(room / "empty") as partial:
        (partial / "config.json").write_text("new")
        add("notes.txt")(room / "empty")
    assert tree(room / "empty") == {str(room / "empty" / "notes.txt"): b"mine"}


@pytest.mark.parametrize("ending", [".partial", ".replaced", ".states"])
@pytest.mark.parametrize("what", ["folder", "file", "link", "marked"])
def test_names_beside_an_output_that_are_not_of_modmoe_stay(room: Path, ending: str, what: str) -> None:
    beside = room / f"out{ending}"
    if what == "file":
        beside.write_text("mine")
    elif what == "link":
        beside.symlink_to(room / "desk")
    else:
        beside.mkdir()
        (beside / "notes.txt").write_text("mine")
        if what == "marked":
            (beside / MARK).touch()
    before = tree(room)
    try:
        check_places(room / "out", overwrite=True, inputs={}, trains=ending == ".states")
        with open_output(room / "out", overwrite=True, spent=room / "out.states") as partial:
            (partial / "config.json").write_text("new")
    except RecipeError as error:
        assert ending != ".replaced" and str(beside) in str(error)
        assert tree(room) == before
    else:
        assert ending == ".replaced"
        assert {name: value for name, value in tree(room).items() if name in before} == before


def test_an_output_that_the_user_renamed_is_no_leftover(room: Path) -> None:
    old = room / "desk" / "old"
    for ending in (".partial", ".replaced"):
        kept = old.rename(f"{old}{ending}")
        before = tree(kept)
        try:
            write_output(old)
        except RecipeError as error:
            assert ending == ".partial" and "no run of modmoe left it" in str(error)
        assert tree(kept) == before
        if ending == ".replaced":
            assert (old / "README.md").is_file()
        else:
            kept.rename(old)


def test_states_are_replaced_only_when_asked(room: Path) -> None:
    states = room / "out.states"
    (states / "checkpoint-3").mkdir(parents=True)
    (states / "checkpoint-3" / "model.safetensors").write_text("x")
    (states / MARK).touch()
    options: dict[str, Any] = {"inputs": {}, "trains": True}
    with pytest.raises(
        RecipeError, match=r"go on with --resume, name another output, or replace them with --overwrite"
    ):
        check_places(room / "out", overwrite=False, **options)
    check_places(room / "out", overwrite=False, resume=True, **options)
    check_places(room / "out", overwrite=True, **options)
    check_places(room / "out", overwrite=False, inputs={})  # of a command that does not train
    (states / "checkpoint-3" / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(RecipeError, match=r"holds 'checkpoint-3/notes.txt', which modmoe did not write"):
            check_places(room / "out", overwrite=True, resume=resume, **options)
    assert seal.clear(states) == ["checkpoint-3/notes.txt"]
    assert (states / "checkpoint-3" / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("end", [".partial", ".states", ".replaced"])
def test_what_is_read_does_not_lie_where_a_run_keeps_what_is_unfinished(room: Path, end: str) -> None:
    (room / f"out{end}" / "checkpoint-1").mkdir(parents=True)
    with pytest.raises(RecipeError, match=r"lies where this run keeps what is unfinished"):
        check_places(room / "out", overwrite=True, inputs={"the source": room / f"out{end}" / "checkpoint-1"})


NOWHERE: dict[str, Callable[[Path], Any]] = {
    "under a file": lambda room: room / "desk" / "text.jsonl" / "out",
    "deep under a file": lambda room: room / "desk" / "text.jsonl" / "a" / "b",
    "a file": lambda room: room / "desk" / "text.jsonl",
    "a loop": lambda room: loop(room),
    "under a loop": lambda room: loop(room) / "out",
    "under a link to nothing": lambda room: link(room, "nothing") / "out",
    "a long name": lambda room: room / ("n" * 250),
    "a longer name": lambda room: room / ("n" * 300),
    "a long path": lambda room: room / "/".join(["d" * 200] * 30),
    "not UTF-8": lambda room: os.fsdecode(os.fsencode(room) + b"/\xff"),
    "a zero": lambda room: f"{room}/a\0b",
    "nothing": lambda room: "",
    "spaces": lambda room: "  ",
    "no disk": lambda room: "/proc/none/out",
}


def loop(room: Path) -> Path:
    (room / "loop").symlink_to("loop")
    return room / "loop"


@pytest.mark.parametrize("where", NOWHERE)
def test_a_place_that_cannot_be_is_one_line(room: Path, where: str) -> None:
    out = NOWHERE[where](room)
    before = tree(room)
    with pytest.raises(RecipeError) as caught:
        check_places(out, overwrite=True, inputs={})
    assert "\n" not in str(caught.value) and "; " in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(RecipeError):
        check_file(out, overwrite=True, is_ours=is_page)
    assert tree(room) == before


def test_a_working_directory_that_is_gone_is_one_line(room: Path) -> None:
    (room / "here").rmdir()
    with pytest.raises(RecipeError, match="the working directory is gone; change to one that is there"):
        check_places("out", overwrite=False, inputs={})


@pytest.mark.parametrize("words", [["env"], ["inspect", "model"], ["eval", "model", "--task", "a=a.txt"], ["demo"]])
def test_no_command_runs_where_the_working_directory_is_gone(room: Path, words: list[str], capfd: Any) -> None:
    (room / "here").rmdir()
    assert main.run(words) == 2
    out, err = capfd.readouterr()
    assert (out, err) == ("", "modmoe: the working directory is gone; change to one that is there.\n")


def special(room: Path) -> Path:
    os.mkfifo(room / "pipe")
    return room / "pipe"


def listening(room: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as server:
        os.chdir(room)  # the name of a socket is short
        server.bind("socket")
    return room / "socket"


REPORTS: dict[str, Callable[[Path], Any]] = {
    "the weights": lambda room: room / "desk" / "model" / "config.json",
    "the text": lambda room: room / "desk" / "text.jsonl",
    "the recipe": lambda room: room / "desk" / "r.yaml",
    "a folder": lambda room: room / "desk",
    "a pipe": special,
    "a socket": listening,
    "a device": lambda room: "/dev/null",
    "a link": lambda room: link(room, "desk/text.jsonl"),
    "a link to nothing": lambda room: link(room, "nothing"),
    "under a file": lambda room: room / "desk" / "text.jsonl" / "report.html",
    "the output": lambda room: room / "out",
    "over the output": lambda room: room / "new",
    "unfinished": lambda room: room / "out.partial" / "report.html",
    "an edited report": lambda room: edited(room),
    "a report with a line more": lambda room: edited(room, "\n"),
    "a standard stream": lambda room: "/dev/stdout",
    "a file of the output": lambda room: room / "new" / "out" / "model.safetensors",
    "a folder of the output": lambda room: room / "new" / "out" / "analysis",
    "in a folder of the output": lambda room: room / "new" / "out" / "analysis" / "report.html",
    "where the output has a file": lambda room: room / "new" / "out" / "config.json" / "report.html",
    "the seal": lambda room: room / "new" / "out" / ".modmoe.json",
}


def edited(room: Path, end: str = "") -> Path:
    page = sign_page("<html>")
    (room / "report.html").write_text(page + end if end else page.replace("<html>", "<html> mine"))
    return room / "report.html"


@pytest.mark.parametrize("where", REPORTS)
def test_a_report_replaces_nothing_but_a_report(room: Path, where: str) -> None:
    report, before = REPORTS[where](room), tree(room)
    out = room / "new" / "out" if str(report).startswith(f"{room / 'new'}") else room / "out"
    with pytest.raises(RecipeError, match=r"^--report: .*; name|^--report: .*; choose"):
        check_places(out, overwrite=True, inputs=inputs(room), report=report)
    assert tree(room) == before


def test_a_report_is_replaced_when_asked(room: Path) -> None:
    path = room / "deep" / "report.html"
    options: dict[str, Any] = {"is_ours": is_page}
    write_file(path, sign_page("<html>one"), overwrite=False, **options)
    assert is_page(path) and oct(path.stat().st_mode)[-3:] == "644"
    with pytest.raises(RecipeError, match="exists; name another file or pass --overwrite"):
        write_file(path, sign_page("<html>two"), overwrite=False, **options)
    write_file(path, sign_page("<html>two"), overwrite=True, **options)
    assert path.read_text().startswith("<html>two") and os.listdir(path.parent) == ["report.html"]
