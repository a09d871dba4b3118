"""FIFOs, sockets, devices, folders of a file's name and links in a circle are told at once, and never opened."""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from modmoe.cli.main import run
from modmoe.errors import CheckpointError
from modmoe.storage.documents import MOST_ENTRIES, check_files, check_tree, open_plain, read_text
from tests.support.tiny import save_dense, write_tasks

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs here")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("special") / "dense", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def never_waits() -> Iterator[None]:
    """Let a test fail that would wait for a FIFO without end."""

    def stop(*_: Any) -> None:
        raise AssertionError("it was waited for")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(15)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def fifo(path: Path) -> str:
    os.mkfifo(path)
    return "is a FIFO"


def device(path: Path) -> str:
    path.symlink_to("/dev/zero")
    return "is a device"


def listener(path: Path) -> str:
    # the path of a socket has at most a hundred bytes
    here = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)
    return "is a socket"


def folder(path: Path) -> str:
    path.mkdir()
    return "is a directory"


def circle(path: Path) -> str:
    path.symlink_to(path.name)
    return "leads nowhere"


def outside(path: Path) -> str:
    path.symlink_to("/etc/passwd")
    return "is a link to /etc/passwd"


NAMES = (
    ("config.json", fifo),
    ("model.safetensors.index.json", fifo),
    ("tokenizer.json", fifo),
    ("tokenizer.model", fifo),
    ("chat_template.jinja", fifo),
    ("additional_chat_templates/tool.jinja", fifo),
    ("generation_config.json", fifo),
    ("README.md", fifo),
    ("modmoe.yaml", fifo),
    ("modmoe_manifest.json", fifo),
    ("x.py", fifo),
    ("config.json", device),
    ("tokenizer_config.json", device),
    ("model.safetensors", listener),
    ("config.json", folder),
    ("model-00001-of-00002.safetensors", folder),
    ("tokenizer.json", circle),
    ("additional_chat_templates/tool.jinja", outside),
)


@pytest.mark.parametrize(("name", "make"), NAMES, ids=[f"{name}-{make.__name__}" for name, make in NAMES])
def test_what_is_no_plain_file_is_told(
    name: str, make: Callable[[Path], str], dense: Path, tmp_path: Path, capfd: Any
) -> None:
    directory = tmp_path / "it"
    shutil.copytree(dense, directory)
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).unlink(missing_ok=True)
    problem = make(directory / name)
    task = write_tasks(tmp_path / "tasks", rows=2)["words"]
    commands = [["inspect"], ["doctor"], ["push", "me/moe", "--dry-run"], ["eval", "--task", f"a={task}"]]
    for command, *more in commands:
        assert run([command, str(directory), *more]) == 2, command
        out, err = capfd.readouterr()
        assert problem in (said := out + err), (command, said)
        assert "Traceback" not in said


def test_an_adapter_is_looked_at_too(dense: Path, tmp_path: Path, capfd: Any) -> None:
    adapter = tmp_path / "adapter"
    assert run(["convert", str(dense), str(adapter), "--method", "adapters", "--adapter", "comol"]) == 0
    for name in ("adapter_config.json", "adapter_model.safetensors", "modmoe.yaml"):
        (adapter / name).rename(tmp_path / "kept")
        os.mkfifo(adapter / name)
        for command in (["inspect"], ["doctor"], ["export", str(tmp_path / "out"), "--form", "dense"]):
            assert run([command[0], str(adapter), *command[1:]]) == 2, (name, command)
            assert "is a FIFO" in "".join(capfd.readouterr())
        (adapter / name).unlink()
        (tmp_path / "kept").rename(adapter / name)


@pytest.mark.parametrize("ending", [".jsonl", ".txt", ".parquet"])
@pytest.mark.parametrize("make", [fifo, device, listener])
def test_a_task_is_a_plain_file(
    ending: str, make: Callable[[Path], str], dense: Path, tmp_path: Path, capfd: Any
) -> None:
    path = tmp_path / f"x{ending}"
    problem = make(path)
    assert run(["eval", str(dense), "--task", f"a={path}"]) == 2
    assert f"{path}: {problem}" in capfd.readouterr().err


def test_a_recipe_is_a_plain_file(tmp_path: Path, capfd: Any) -> None:
    path = tmp_path / "r.yaml"
    problem = fifo(path)
    assert run(["validate", str(path)]) == 2
    assert problem in capfd.readouterr().err
    assert run(["validate", "/dev/zero"]) == 2
    assert "is a device" in capfd.readouterr().err


def test_a_folder_is_looked_at_within_bounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    fifo(tmp_path / "deep" / "er" / "task.yaml")
    check_files(tmp_path)
    with pytest.raises(CheckpointError, match=r"deep/er/task\.yaml: is a FIFO"):
        check_tree(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"x" * 1_100_000)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja: has 1,100,000 bytes"):
        check_files(tmp_path)
    assert MOST_ENTRIES > 1000
    (tmp_path / "chat_template.jinja").write_bytes(b"x")
    monkeypatch.setattr("modmoe.storage.documents.MOST_ENTRIES", 1)
    with pytest.raises(CheckpointError, match="holds over 1 files"):
        check_files(tmp_path)


def test_a_file_that_is_exchanged_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.json"
    path.write_text("{}")
    assert read_text(path, 10) == "{}"
    path.unlink()
    os.mkfifo(path)
    monkeypatch.setattr("modmoe.storage.documents.special_kind", lambda _: "")
    with pytest.raises(ValueError, match="no plain file"):
        open_plain(path)
