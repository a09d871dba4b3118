"""A token is nowhere but in the headers of a request: not in what is said, nor in a file, nor on a command line."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from huggingface_hub import constants
from huggingface_hub.utils import _http

from modmoe import api
from modmoe.cli.main import app, run
from modmoe.errors import CheckpointError, hide_secrets
from modmoe.exports import hub as pushing
from tests.support.fake_hub import TOKEN, FakeHub
from tests.support.tiny import save_dense

OTHER = "pa55word-of-an-address"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("secret") / "dense", num_hidden_layers=1)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[FakeHub]:
    """A Hub on the loopback, asked with the token of the environment; nobody waits between two tries."""
    clock = SimpleNamespace(sleep=lambda _: None, time=time.time, monotonic=time.monotonic)
    with FakeHub() as hub:
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(_http, "time", clock)
        monkeypatch.setattr(pushing, "time", clock)
        yield hub


def said(capfd: Any, caplog: Any) -> str:
    """Return all that was printed or logged, after a look that no secret is in it."""
    out, err = capfd.readouterr()
    text = out + err + caplog.text
    assert TOKEN not in text and OTHER not in text and TOKEN[3:] not in text, text
    return text


@pytest.mark.parametrize("status", [401, 403, 404, 500])
def test_refusals_of_the_hub(
    server: FakeHub, dense: Path, tmp_path: Path, capfd: Any, caplog: Any, status: int
) -> None:
    caplog.set_level(logging.INFO)  # below it is what the server sent, header by header, which no command prints
    for method in ("GET", "POST", "HEAD"):
        server.fault(method, ".", times=10**6, status=status, message=f"no: Bearer {TOKEN} said {TOKEN}")
    task = tmp_path / "t.jsonl"
    task.write_text('{"text": "a"}\n')
    words = ["--task", f"a={task}", "-v"]
    assert run(["push", str(dense), "me/moe", "-v"]) == 2
    assert run(["convert", "me/private", str(tmp_path / "out"), *words]) == 2
    assert run(["eval", "me/private", *words]) == 2
    assert run(["eval", str(dense), "--task", "a=hub:me/private", "-v"]) == 2
    text = said(capfd, caplog)
    assert text.count("not to be had from the Hub") == 3 and "Traceback" not in text
    assert any(request.token == TOKEN for request in server.requests), "the token was sent at all"
    assert not server.failures
    check_files(tmp_path)


def test_a_password_in_an_address(dense: Path, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    address = f"https://someone:{OTHER}@host/me/model"
    assert run(["convert", address, str(tmp_path / "out"), "--task", f"a={address}", "-v"]) == 2
    assert run(["eval", str(dense), "--task", f"a={address}.jsonl", "-v"]) == 2
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps({"source": address, "methd": 1}))
    assert run(["validate", str(recipe)]) == 2
    assert "***@host" in said(capfd, caplog)


def test_a_bug(monkeypatch: pytest.MonkeyPatch, capfd: Any, caplog: Any) -> None:
    def break_down(_: str) -> None:
        try:
            raise ValueError(f"GET https://u:{OTHER}@host with Authorization: Bearer {TOKEN}")
        except ValueError as error:
            raise RuntimeError(f"token={TOKEN}") from error

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(api, "inspect", break_down)
    assert run(["inspect", "it"]) == 1
    text = said(capfd, caplog)
    assert "Traceback" in text and "break_down" in text and "***" in text


def test_what_is_written(monkeypatch: pytest.MonkeyPatch, dense: Path, tmp_path: Path, capfd: Any, caplog: Any) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    command = ["convert", str(dense), str(tmp_path / "adapter"), "--method", "adapters", "--adapter", "comol", "-v"]
    assert run(command) == 0
    assert run(["push", str(tmp_path / "adapter"), "me/moe", "--dry-run", "-v"]) == 0
    assert run(["env", "--json"]) == 0
    said(capfd, caplog)
    assert check_files(tmp_path) > 3


def check_files(directory: Path) -> int:
    """Assert that no file holds a secret; return how many there are."""
    files = [file for file in directory.rglob("*") if file.is_file()]
    for file in files:
        assert TOKEN.encode() not in file.read_bytes(), file
    return len(files)


def test_no_option_takes_a_token() -> None:
    """It would stand in the list of processes, and in the shell's history."""
    waiting, names = [typer.main.get_command(app)], set()
    while waiting:
        command = waiting.pop()
        waiting += list(getattr(command, "commands", {}).values())
        names |= {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert "--tokens" in names and not {name for name in names if "token" in name or "password" in name} - {"--tokens"}


def test_hiding_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "odd token/+=")
    text = "https://host/a@b.c hf_hub hf_modules/hub:me/data@main Bearer odd token/+= a.jsonl"
    assert hide_secrets(text) == "https://host/a@b.c hf_hub hf_modules/hub:me/data@main Bearer *** a.jsonl"
    monkeypatch.delenv("HF_TOKEN")
    assert str(CheckpointError("x\x1b[31m\ny" + "z" * 5000)).startswith("x\\x1b[31m yz")
    assert len(str(CheckpointError("z" * 5000))) <= 700
