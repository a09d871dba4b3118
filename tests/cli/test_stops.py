"""Signals end a command, what it started, and its temporary directories."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from modmoe import api
from modmoe.cli import main
from modmoe.cli.stops import stoppable
from modmoe.errors import CheckpointError
from modmoe.formats.proof import child
from modmoe.formats.proof.verify import _run_child
from modmoe.storage import scratch
from modmoe.storage.staging import open_output

SLEEPER = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_signal_ends_a_command(
    number: signal.Signals,
    code: int,
    ignored: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def inspect(_: str) -> dict[str, Any]:
        with open_output(tmp_path / "out") as partial:
            (partial / "config.json").touch()
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        return {}

    monkeypatch.setattr(api, "inspect", inspect)
    before = signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    try:
        found = main.run(["inspect", "x"])
    finally:
        signal.signal(number, before)
    err = capfd.readouterr().err
    if ignored and number != signal.SIGINT:  # as under nohup
        assert found == 0 and (tmp_path / "out").is_dir()
        return
    assert (found, err) == (code, f"modmoe: stopped. Nothing of {tmp_path / 'out'} was written.\n")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("other", [ImportError("initialization failed"), CheckpointError("x: cannot be read.")])
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_a_library_makes_of_a_signal_is_the_signal(
    number: signal.Signals,
    code: int,
    other: Exception,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """As a compiled module does that is being loaded when it comes."""

    def inspect(_: str) -> dict[str, Any]:
        try:
            os.kill(os.getpid(), number)
            time.sleep(0.2)
        except KeyboardInterrupt:
            raise other from None
        return {}

    monkeypatch.setattr(api, "inspect", inspect)
    assert main.run(["inspect", "x"]) == code
    assert capfd.readouterr().err == "modmoe: stopped.\n"


def test_handlers_of_others_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    def theirs(*_: Any) -> None: ...

    before = signal.signal(signal.SIGTERM, theirs)
    try:
        with stoppable():
            assert signal.getsignal(signal.SIGTERM) is theirs
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(stoppable().__enter__().code))
        thread.start()
        thread.join()
        assert found == [130]
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_child_ends_with_the_command(number: signal.Signals, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    file = tmp_path / "pid"
    # the tests themselves may run under nohup
    request.addfinalizer(partial(signal.signal, number, signal.signal(number, signal.SIG_DFL)))

    def send() -> None:
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send)
    with stoppable():
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            _run_child([sys.executable, "-c", SLEEPER, str(file)])
    sender.join()
    with pytest.raises(ProcessLookupError):  # not even its entry in the table of processes is left
        os.kill(int(file.read_text()), 0)


def test_a_child_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    words = [str(child.__file__), str(tmp_path / "work"), str(tmp_path / "sleeper.py"), str(tmp_path / "pid")]
    process = subprocess.Popen([sys.executable, *words], stdin=subprocess.PIPE)
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    assert process.stdin is not None
    process.stdin.close()  # as the system does when the parent is gone
    assert process.wait(20) == 1
    assert not (tmp_path / "work").exists()


def test_directories_of_killed_runs_go_with_the_next_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    script = "import os, signal; from modmoe.storage.scratch import scratch_directory\n"
    script += "with scratch_directory('verify'): os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "TMPDIR": str(tmp_path)})
    (tmp_path / "modmoe-of-the-user").mkdir()
    (tmp_path / "modmoe-of-the-user" / "notes.txt").touch()
    left = set(os.listdir(tmp_path))
    assert len(left) == 2
    with scratch.scratch_directory("doctor") as ours:
        assert set(os.listdir(tmp_path)) == {"modmoe-of-the-user", ours.name}
    assert os.listdir(tmp_path) == ["modmoe-of-the-user"]
