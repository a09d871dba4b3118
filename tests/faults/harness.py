"""Commands are stopped anywhere and run again: is what they leave whole or absent, and in the end what it should be?"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from modmoe.storage.seal import MARK, seal

REPOSITORY = Path(__file__).resolve().parents[2]
OUTPUT = "out"
SIGNALS = {"kill": signal.SIGKILL, "interrupt": signal.SIGINT}
CODES = {"kill": -signal.SIGKILL, "interrupt": 130}
"""Exit codes, where it is not 2."""
WORDS = {
    "ENOSPC": ("No space left on device",),
    "EIO": ("Input/output error",),
    "EFBIG": ("File too large",),
}
Tree = dict[str, str]
"""Path of a file to the SHA-256 of what is in it."""

_TEXT = ["--task", "sums=../tasks/sums.jsonl", "--task", "words=../tasks/words.jsonl"]
_BATCH = ["--sequence-length", "32", "--batch-size", "2", "--device", "cpu"]
_CALIBRATION = [*_TEXT, *_BATCH, "--tokens", "120", "--num-modules", "8", "--partition", "random"]
_STEPS = [*_TEXT, *_BATCH, "--max-steps", "4", "--save-steps", "1", "--learning-rate", "0.003"]
_EXPORT = ["--no-verify", "--max-shard-size", "20KB"]

COMMANDS: dict[str, list[str]] = {
    "convert": ["convert", "../dense", OUTPUT, *_CALIBRATION],
    "convert by layer": ["convert", "../dense", OUTPUT, *_CALIBRATION, "--by-layer"],
    "prune": ["convert", "../dense", OUTPUT, *_TEXT, *_BATCH, "--method", "prune", "--tokens", "120"],
    "attach": ["convert", "../dense", OUTPUT, "--method", "adapters", "--adapter", "molora"],
    "analyze": ["analyze", "../dense", "-o", OUTPUT, *_CALIBRATION],
    "finetune full": ["finetune", "../tied", OUTPUT, *_STEPS, "--train", "full"],
    "finetune router": ["finetune", "../tied", OUTPUT, *_STEPS, "--train", "router"],
    "finetune lora": ["finetune", "../tied", OUTPUT, *_STEPS, "--train", "lora", "--lora-rank", "2"],
    "finetune adapters": ["finetune", "../adapter", OUTPUT, *_STEPS, "--train", "adapters"],
    "export tied": ["export", "../tied", OUTPUT, *_EXPORT],
    "export dense": ["export", "../tied", OUTPUT, *_EXPORT, "--form", "dense", "--expert", "words"],
    "export native": ["export", "../tied", OUTPUT, *_EXPORT, "--form", "native"],
    "export packed": ["export", "../tied", OUTPUT, *_EXPORT, "--form", "packed"],
    "export adapter": ["export", "../adapter", OUTPUT, *_EXPORT, "--form", "adapter"],
    "export adapter inside": ["export", "../adapter", OUTPUT, *_EXPORT, "--form", "tied"],
}
"""Every command that writes weights, on tiny models; each is run in a directory of its own beside them."""


class Server:
    """The process that forks the runs, and the room they read from."""

    def __init__(self, home: Path) -> None:
        """Start it and have the models made in ``home``."""
        self.home = home
        home.mkdir(parents=True, exist_ok=True)
        environment = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env={"HF_HUB_OFFLINE": "1", **environment, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        self._receive()
        made = self.ask(root=str(home), call="make")
        assert made["code"] == 0, made["error"]

    def close(self) -> None:
        """Let it end."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(20)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def ask(self, **job: Any) -> dict[str, Any]:
        """Run one job; see ``tests.faults.server.serve``."""
        assert self.process.stdin is not None
        job.setdefault("log", str(self.home / "log"))
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = self._receive()
        assert not answer["hung"], f"{job} hung: {answer['error']}"
        return answer

    def _receive(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the server is gone; see its stderr"
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextlib.contextmanager
def serving(home: Path) -> Iterator[Server]:
    """Start a server and let it end."""
    server = Server(home)
    try:
        yield server
    finally:
        server.close()


def tree_of(directory: Path) -> Tree | None:
    """Return what is in a directory, None where there is none."""
    if not directory.exists():
        return None
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != MARK  # which a kill may leave in an output that is whole
    }


@dataclasses.dataclass(frozen=True, slots=True)
class Command:
    """A command, and what it does where nothing goes wrong."""

    server: Server
    name: str
    wanted: Tree
    calls: int
    """Calls that change the disk, where there is an older output to replace."""
    seconds: float

    @property
    def arguments(self) -> list[str]:
        """Of modmoe."""
        return COMMANDS[self.name]

    def fresh(self, *, old: bool) -> Path:
        """Return an empty room for a run, or one with an older output."""
        root = self.server.home / "run"
        shutil.rmtree(root, ignore_errors=True)
        root.mkdir()
        if old:
            shutil.copytree(self.server.home / "dense", root / OUTPUT)
            seal(root / OUTPUT)
        return root

    def run(self, root: Path, *more: str, **job: Any) -> dict[str, Any]:
        """Run it in a room."""
        return self.server.ask(root=str(root), arguments=[*self.arguments, *more], **job)


def measure(server: Server, name: str) -> Command:
    """Run a command without a fault, over an older output, and return what it does."""
    command = Command(server, name, {}, 0, 0)
    root = command.fresh(old=True)
    done = command.run(root, "--overwrite")
    assert done["code"] == 0, f"{name}: {done['error']}"
    wanted = tree_of(root / OUTPUT)
    assert wanted and os.listdir(root) == [OUTPUT]
    return Command(server, name, wanted, len(done["calls"]), done["seconds"])


@dataclasses.dataclass(slots=True)
class Figures:
    """What became of the runs."""

    counts: Counter[str] = dataclasses.field(default_factory=Counter)
    lost: list[str] = dataclasses.field(default_factory=list)

    def line(self) -> str:
        """Say it."""
        told = ", ".join(f"{number} {name}" for name, number in self.counts.items())
        return f"{told}, {len(self.lost)} lost"


def draw_fault(command: Command, draw: random.Random, action: str) -> dict[str, Any]:
    """Return a fault at a random call, or for signals also at a random time."""
    if action in SIGNALS and draw.random() < 0.3:
        return {"signal": int(SIGNALS[action]), "after_s": draw.uniform(0, 1.1 * command.seconds)}
    return {"action": action, "at": draw.randint(1, command.calls)}


def stop_once(command: Command, draw: random.Random, figures: Figures, action: str = "kill") -> None:
    """Stop one run somewhere, look at what it said and left, run it again and look once more."""
    old = draw.random() < 0.5
    fault = draw_fault(command, draw, action)
    resumes = command.name.startswith("finetune") and draw.random() < 0.7
    root = command.fresh(old=old)
    try:
        there = _stop(command, root, fault, action, old, figures)
        _run_again(command, root, bool(there), resumes, figures)
    except AssertionError as error:
        figures.lost.append(f"{command.name}, old {old}, {fault}, resumes {resumes}: {error}")


def _stop(command: Command, root: Path, fault: dict[str, Any], action: str, old: bool, figures: Figures) -> Tree | None:
    """Run with a fault and return what lies at the output then: what lay there before, or all that was to come."""
    before = tree_of(root / OUTPUT)
    done = command.run(root, *(["--overwrite"] if old else []), **fault)
    code, said = done["code"], done["error"]
    assert code in (0, CODES.get(action, 2)), f"exit {code}: {said[-600:]}"
    figures.counts["stopped" if code else "not stopped"] += 1
    there = tree_of(root / OUTPUT)
    assert there in (before, command.wanted), f"neither old nor new: {sorted(there or {})}"
    figures.counts["new one whole" if there == command.wanted else "old one whole" if old else "absent"] += 1
    if code == 0:
        assert there == command.wanted, "says that it is done"
    elif action != "kill":
        assert_said(action, said, there == command.wanted)
        left = set(os.listdir(root)) - {OUTPUT, f"{OUTPUT}.states"}
        assert not left, f"left {sorted(left)}"
    return there


def assert_said(action: str, said: str, is_whole: bool) -> None:
    """Look at the last line of what a command that failed said: the place, what happened, what to do."""
    assert "Traceback" not in said and "bug" not in said, said[-1500:]
    line = said.rstrip("\n").rpartition("\n")[2]
    assert line.startswith("modmoe: "), line
    if action == "interrupt":
        told = (f"{OUTPUT} is whole.",) if is_whole else (f"Nothing of {OUTPUT} was written.", "go on with --resume.")
        # before there is anything to speak of
        assert line == "modmoe: stopped." or line.endswith(told), line
        return
    assert OUTPUT in line and "; " in line, line
    assert any(words in line for words in (*WORDS[action], "could not be written")), line


def _run_again(command: Command, root: Path, is_there: bool, resumes: bool, figures: Figures) -> None:
    """Run without a fault: what comes out is what an unbroken run writes, and nothing else is left."""
    # states of a run that was stopped are replaced only when asked
    replaces = is_there or ((root / f"{OUTPUT}.states").is_dir() and not resumes)
    again = command.run(root, *(["--overwrite"] if replaces else []), *(["--resume"] if resumes else []))
    assert again["code"] == 0, f"run again: exit {again['code']}: {again['error'][-600:]}"
    found = tree_of(root / OUTPUT) or {}
    changed = [name for name in found.keys() | command.wanted.keys() if found.get(name) != command.wanted.get(name)]
    assert not changed, f"run again: other bytes in {sorted(changed)}"
    assert os.listdir(root) == [OUTPUT], f"run again: left {sorted(os.listdir(root))}"
    figures.counts["resumed byte-identically"] += 1
    if resumes and "going on from" in again["error"]:
        figures.counts["from a state"] += 1
