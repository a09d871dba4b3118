from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modmoe.errors import CalibrationError, CheckpointError
from modmoe.storage import bounded
from modmoe.storage.bounded import ask_in_bounds, call_in_bounds, in_bounds

PLACE: dict[str, Any] = {"place": "d/tokenizer.json", "remedy": "fetch it again"}
needs_children = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the work is done in this process")


def memory() -> Any:
    return "x" * (4 << 30)


def lists() -> Any:
    held: list[Any] = []
    while True:
        held.append([0] * 100_000)


def no_end() -> Any:
    while True:
        pass


def deep() -> Any:
    return deep()


def panic() -> Any:
    raise type("PanicException", (BaseException,), {})("index out of bounds")


def crash() -> Any:
    os.kill(os.getpid(), signal.SIGSEGV)


def leave() -> Any:
    sys.exit(0)


def large() -> Any:
    return "x" * (bounded.MOST_ITEM_BYTES + 1)


def no_json() -> Any:
    return {1, 2}


@needs_children
@pytest.mark.parametrize(
    ("work", "problem"),
    [
        (memory, "needs more than the 0.3 GB that it may use"),
        (lists, "needs more than the 0.3 GB that it may use"),
        (no_end, "takes over 0.5 s"),
        (deep, "cannot be used (maximum recursion depth exceeded"),
        (panic, "cannot be used (broke down: index out of bounds)"),
        (crash, "broke down (SIGSEGV)"),
        (leave, "cannot be used (0)"),
        (no_json, "cannot be used (Object of type set is not JSON serializable)"),
    ],
)
def test_what_breaks_the_bounds_is_one_line(work: Callable[[], Any], problem: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        call_in_bounds(work, **PLACE, memory_bytes=300_000_000, item_seconds=0.5)
    assert str(caught.value).startswith(f"d/tokenizer.json: {problem}")
    assert str(caught.value).endswith("; fetch it again.")
    assert no_children()


def test_an_item_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "MOST_ITEM_BYTES", 1000)
    with pytest.raises(CheckpointError, match="makes over 1,000 bytes of one item"):
        call_in_bounds(large, **PLACE)
    assert call_in_bounds(lambda: "x" * 900, **PLACE) == "x" * 900


@pytest.mark.parametrize("has_children", [pytest.param(True, marks=needs_children), False])
def test_items_and_errors_arrive_as_they_were(
    has_children: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bounded, "HAS_CHILDREN", has_children)
    caplog.set_level(logging.INFO, "modmoe")  # a command that ran in this process may have set another
    values = [1, 2.5, None, "ü\ud800\n", [1, [2]], {"a": True}, list(range(100_000))]

    def work() -> Iterator[Any]:
        yield from values
        logging.getLogger("modmoe.x").warning("row %d is long", 3)
        error = CalibrationError("tasks.a: no")
        error.add_note("And so.")
        raise error

    found = []
    with pytest.raises(CalibrationError, match=r"^tasks.a: no") as caught:
        for item in in_bounds(work, **PLACE):
            found.append(item)
    assert found == values
    assert str(caught.value) == "tasks.a: no" and caught.value.__notes__ == ["And so."]
    assert [(record.name, record.getMessage()) for record in caplog.records] == [("modmoe.x", "row 3 is long")]
    with pytest.raises(CheckpointError, match=r"broke down: index"):
        call_in_bounds(panic, **PLACE)


@pytest.mark.parametrize("has_children", [pytest.param(True, marks=needs_children), False])
def test_one_child_answers_all_questions(has_children: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "HAS_CHILDREN", has_children)

    def answer(question: Any) -> Any:
        return panic() if question == "break" else [os.getpid(), len(question)]

    with pytest.raises(CheckpointError, match="broke down: index"), ask_in_bounds(answer, **PLACE) as ask:
        long = "ä\n" * 100_000
        found = [ask(question) for question in ("a", long, [1, 2])]
        assert [length for _, length in found] == [1, len(long), 2]
        assert len({process for process, _ in found} - {os.getpid()}) == has_children
        ask("break")
    assert no_children()


@needs_children
def test_closing_ends_the_child(tmp_path: Path) -> None:
    def work() -> Iterator[int]:
        number = 0
        while True:
            with (tmp_path / "ahead").open("a") as file:
                file.write(".")
            yield number
            number += 1

    items = in_bounds(work, **PLACE)
    assert [next(items), next(items)] == [0, 1]
    assert not no_children()
    items.close()  # type: ignore[attr-defined]
    assert no_children()
    # what a pipe holds, of ten bytes an item
    assert (tmp_path / "ahead").stat().st_size < 10_000


@needs_children
def test_the_child_ends_with_its_parent() -> None:
    read, write = os.pipe()
    parent = bounded._fork()
    if parent == 0:
        try:

            def work() -> Iterator[Any]:
                yield os.getpid()
                no_end()

            os.write(write, json.dumps(next(in_bounds(work, **PLACE))).encode())
            time.sleep(60)
        finally:
            os._exit(0)
    child = int(os.read(read, 100))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    for _ in range(1000):
        status = Path(f"/proc/{child}/stat")
        if not status.exists() or status.read_text().split(") ")[1][0] == "Z":
            break
        time.sleep(0.01)
    else:
        pytest.fail("the child lives on")
    os.close(read), os.close(write)


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
        return False
    except ChildProcessError:
        return True
