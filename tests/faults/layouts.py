"""Layouts of a user's files, drawn at random: whatever a command is told, what modmoe did not write stays as it is.

A layout is a room with models, text, recipes, an output or what a user has where outputs go, links, and a working
directory. Commands run in it one after another, some are killed; in between the user changes things.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shutil
import stat
from pathlib import Path
from typing import Any

from modmoe.storage.seal import SEAL
from tests.faults.harness import Server

Snapshot = dict[str, tuple[str, str]]
"""Path in the room to what it is and what is in it."""

_BATCH = ["--sequence-length", "32", "--batch-size", "2", "--device", "cpu"]
_CALIBRATION = [*_BATCH, "--tokens", "40", "--num-modules", "8", "--partition", "random"]
_STEPS = [*_BATCH, "--max-steps", "3", "--save-steps", "1"]
_NOISE = (
    "notes.txt",
    "README.md",
    "model.safetensors",
    "config.json",
    "data/a.csv",
    "train.log",
    ".env",
    "tokenizer.json",
)


@dataclasses.dataclass(slots=True)
class Figures:
    """What the commands did."""

    layouts: int = 0
    commands: int = 0
    codes: dict[int, int] = dataclasses.field(default_factory=dict)
    killed: int = 0
    faults: list[str] = dataclasses.field(default_factory=list)

    def line(self) -> str:
        """Say it."""
        codes = ", ".join(f"{count} ended with {code}" for code, count in sorted(self.codes.items()))
        return f"{self.layouts} layouts, {self.commands} commands ({codes}), {len(self.faults)} faults"


class Layout:
    """One room, with what is the user's in it."""

    def __init__(self, server: Server, seed: str) -> None:
        """Draw the room."""
        self.server, self.draw = server, random.Random(seed)
        self.root = server.home / "layout"
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()
        draw = self.draw
        self.folders = ["", "work", "work/deep", "disk", "pro ject"]
        for folder in self.folders:
            (self.root / folder).mkdir(exist_ok=True)
        self.sources = {kind: self._place_model(kind) for kind in ("dense", "tied", "adapter")}
        self.tasks = [self._place_task(name) for name in ("sums", "words")]
        self.recipe = self._pick_folder() / "my recipe.yaml"
        self.recipe.write_text("seed: 3\n")
        for _ in range(draw.randint(0, 4)):
            self._drop(self._pick_folder() / draw.choice(_NOISE))
        self.home = draw.choice([self.root / "work", self.root / "disk", self.root])
        self.cwd = draw.choice([self.root, self.root / "work", self.root / "pro ject", self.root / "work/deep"])
        self.output = self._draw_output()
        self._furnish(self.output)

    def _pick_folder(self) -> Path:
        return self.root / self.draw.choice(self.folders)

    def _place_model(self, kind: str) -> Path:
        place = self._pick_folder() / f"{kind}{self.draw.choice(['', '-model', '.v1'])}"
        how = self.draw.random()
        if how < 0.7:
            # without the list it is the user's, though modmoe wrote what it is a copy of
            shutil.copytree(self.server.home / kind, place, ignore=shutil.ignore_patterns(SEAL))
        elif how < 0.85:  # a link to where it lies
            real = self.root / "disk" / f"real-{kind}"
            shutil.copytree(self.server.home / kind, real, ignore=shutil.ignore_patterns(SEAL))
            place = place.with_name(f"{place.name}-link")
            place.symlink_to(real if self.draw.random() < 0.5 else os.path.relpath(real, place.parent))
        else:  # in a folder that it has for itself
            place = place / "inner"
            shutil.copytree(self.server.home / kind, place, ignore=shutil.ignore_patterns(SEAL))
        return place

    def _place_task(self, name: str) -> Path:
        folder = self.draw.choice([self.root, self.root / "work", self.sources["dense"], self.root / "disk"])
        place = folder / f"{name}.jsonl"
        shutil.copyfile(self.server.home / "tasks" / f"{name}.jsonl", place)
        if self.draw.random() < 0.15:
            link = self._pick_folder() / f"{name}-link.jsonl"
            link.symlink_to(place)
            return link
        return place

    def _draw_output(self) -> Path:
        source = self.draw.choice(list(self.sources.values()))
        new = self._pick_folder() / self.draw.choice(["out", "out.v2", "Out put", "model"])
        choices: list[tuple[int, Path]] = [
            (8, new),
            (2, source),
            (2, source.parent),
            (1, source / "out"),
            (1, source / "config.json"),
            (1, self.tasks[0]),
            (1, self.tasks[0].parent),
            (1, self.recipe.parent),
            (1, self.cwd),
            (1, self.cwd.parent),
            (1, self.home),
            (1, self.root / "disk"),
            (1, self.root / "notes.txt" / "out"),
            (1, new.with_name("n" * 250)),
            (1, self.root / "loop"),
            (1, source.with_name(source.name.removesuffix("-model"))),
        ]
        return self.draw.choices([place for _, place in choices], [weight for weight, _ in choices])[0]

    def _furnish(self, output: Path) -> None:
        """Put things of the user where the output goes and beside it."""
        draw = self.draw
        (self.root / "loop").symlink_to("loop")
        if not os.path.lexists(output) and output.parent.is_dir() and len(output.name) < 200:
            how = draw.random()
            if how < 0.15:
                output.mkdir()
            elif how < 0.35:
                self._drop(output / draw.choice(_NOISE))
            elif how < 0.42:
                (self.root / "disk" / "elsewhere").mkdir()
                output.symlink_to(self.root / "disk" / "elsewhere")
                if draw.random() < 0.5:
                    self._drop(self.root / "disk" / "elsewhere" / draw.choice(_NOISE))
            elif how < 0.46:
                output.symlink_to(self.root / "nowhere")
            elif how < 0.5:
                os.mkfifo(output)
        for ending in (".partial", ".states", ".replaced", ".lock", ".logs"):
            if draw.random() < 0.12 and output.parent.is_dir() and len(output.name) < 200:
                beside = output.with_name(f"{output.name}{ending}")
                if os.path.lexists(beside):
                    continue
                how = draw.random()
                if how < 0.5:
                    self._drop(beside / draw.choice([*_NOISE, "checkpoint-3/model.safetensors", "run.json"]))
                elif how < 0.8:
                    beside.write_text("mine")
                else:
                    beside.symlink_to(self.root / "disk")
        if draw.random() < 0.2 and output.parent.is_dir() and len(output.name) < 200:
            lock = output.with_name(f".{output.name}.lock")
            lock.write_text("")

    def _drop(self, path: Path) -> None:
        """Write a file of the user, if there can be one."""
        try:
            if not os.path.lexists(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(f"mine {self.draw.random()}")
        except OSError:
            pass

    def meddle(self, ours: set[str]) -> None:
        """Let the user do something between two commands, mostly in what modmoe wrote."""
        draw = self.draw
        output = self.output if self.output.is_dir() else self.root
        how = draw.random()
        if how < 0.3 and self.root in output.parents:
            self._drop(output / draw.choice([*_NOISE, "analysis/mine.txt", "zzz"]))
        elif how < 0.45 and ours:
            path = self.root / draw.choice(sorted(ours))
            # what was not finished is nobody's to edit
            if (
                path.is_file()
                and not path.is_symlink()
                and ".partial/" not in str(path)
                and ".states/" not in str(path)
            ):
                with path.open("r+b") as file:  # of the same size
                    file.seek(path.stat().st_size // 2)
                    byte = file.read(1)
                    file.seek(path.stat().st_size // 2)
                    file.write(bytes([byte[0] ^ 1]) if byte else b"x")
        elif how < 0.55 and self._may_move(output):
            moved = output.with_name(f"{output.name}{draw.choice(['.partial', '.replaced', '.states', '.bak'])}")
            if not os.path.lexists(moved):
                output.rename(moved)
        elif how < 0.65:
            self._drop(output.with_name(f"{output.name}.states") / "notes.txt")
        elif how < 0.75:
            self._drop(output.with_name(f"{output.name}.partial") / "notes.txt")

    def _may_move(self, output: Path) -> bool:
        """Return whether an output is a directory of its own, with nothing in it that the layout needs."""
        needed = [self.cwd, self.recipe, *self.tasks, *self.sources.values()]
        return self.root in output.parents and not any(output in (path, *path.parents) for path in needed)

    def spell(self, path: Path) -> str:
        """Return one of the ways to write a path from the working directory."""
        how = self.draw.random()
        if how < 0.4:
            return os.path.relpath(path, self.cwd)
        if how < 0.55:
            return f"{path}/" if os.path.isdir(path) else str(path)
        if how < 0.7 and os.path.isdir(path.parent):
            return str(path.parent / ".." / path.parent.name / path.name)
        return str(path)

    def draw_report(self) -> list[str]:
        """Return the words for a report, mostly none."""
        if self.draw.random() < 0.5:
            return []
        source = self.sources["dense"]
        place = self.draw.choice(
            [
                self._pick_folder() / "report.html",
                self._pick_folder() / "notes.txt",
                self.output / "report.html",
                self.output,
                self.output.with_name(f"{self.output.name}.partial") / "report.html",
                source / "model.safetensors",
                source,
                self.tasks[0],
                self.recipe,
                self.root / "loop",
                self.root / "new folder" / "report.html",
            ]
        )
        return ["--report", self.spell(place)]

    def draw_command(self) -> list[str]:
        """Return the words of a command."""
        draw = self.draw
        text = [
            word
            for name, file in zip(("sums", "words"), self.tasks, strict=True)
            for word in ("--task", f"{name}={self.spell(file)}")
        ]
        dense, tied, adapter = (self.spell(self.sources[kind]) for kind in ("dense", "tied", "adapter"))
        out = self.spell(self.output)
        kind = draw.choices(
            ["analyze", "convert", "prune", "attach", "finetune", "export", "recipes"], [3, 4, 1, 2, 4, 3, 1]
        )[0]
        recipe = ["-c", self.spell(self.recipe)] if draw.random() < 0.3 else []
        words = {
            "analyze": ["analyze", dense, "-o", out, *text, *_CALIBRATION, *recipe, *self.draw_report()],
            "convert": ["convert", dense, out, *text, *_CALIBRATION, *recipe, *self.draw_report()],
            "prune": ["convert", dense, out, *text, *_BATCH, "--method", "prune", "--tokens", "40", *recipe],
            "attach": ["convert", dense, out, "--method", "adapters", "--adapter", "molora", *recipe],
            "finetune": [
                "finetune",
                *draw.choice([[tied, out, "--train", "router"], [adapter, out, "--train", "adapters"]]),
                *text,
                *_STEPS,
                *(["--distill-from", dense] if draw.random() < 0.3 else []),
                *(["--resume"] if draw.random() < 0.3 else []),
            ],
            "export": [
                "export",
                *draw.choice(
                    [[tied, out, "--form", "dense", "--expert", "words"], [adapter, out, "--form", "adapter"]]
                ),
                "--no-verify",
            ],
            "recipes": ["recipes", "cp", "cmoe", draw.choice([out, self.spell(self.recipe)])],
        }[kind]
        return [*words, *(["--overwrite"] if draw.random() < 0.6 else [])]


def look(root: Path) -> Snapshot:
    """Return all that lies in a room; no pipe is opened and no link followed."""
    found: Snapshot = {}
    for place, folders, files in os.walk(root):
        for name in [*folders, *files]:
            path = Path(place, name)
            mode = os.lstat(path).st_mode
            if stat.S_ISLNK(mode):
                about = ("link", os.readlink(path))
            elif stat.S_ISDIR(mode):
                about = ("folder", "")
            elif stat.S_ISREG(mode):
                about = ("file", hashlib.sha256(path.read_bytes()).hexdigest())
            else:
                about = ("special", "")
            found[str(path.relative_to(root))] = about
    return found


def run_layout(server: Server, seed: str, figures: Figures, commands: int = 3) -> None:
    """Draw a layout, run commands in it, and note every file of the user that is no longer as it was."""
    layout = Layout(server, seed)
    figures.layouts += 1
    ours: set[str] = set()
    for number in range(commands):
        if number:
            before_meddling = look(layout.root)
            layout.meddle({name for name in ours if layout.root.joinpath(name).is_file()})
            now = look(layout.root)
            ours = {name for name in ours if now.get(name) == before_meddling.get(name)}
        before = look(layout.root)
        words = layout.draw_command()
        fault: dict[str, Any] = {}
        if layout.draw.random() < 0.3:
            fault = {"action": layout.draw.choice(["kill", "interrupt"]), "at": layout.draw.randint(1, 120)}
        done = server.ask(root=str(layout.root), cwd=str(layout.cwd), home=str(layout.home), arguments=words, **fault)
        figures.commands += 1
        figures.codes[done["code"]] = figures.codes.get(done["code"], 0) + 1
        after = look(layout.root)
        where = f"{seed}, command {number + 1} ({' '.join(words)}; in {layout.cwd}; {fault}; exit {done['code']})"
        # in an empty folder there is nothing to lose
        folders = {str(parent) for name in before for parent in Path(name).parents}
        lost = [
            name
            for name, about in before.items()
            if name not in ours and after.get(name) != about and (about[0] != "folder" or name in folders)
        ]
        if lost:
            figures.faults.append(f"{where}: {lost[:5]} of the user: {done['error'][-300:]}")
        if done["code"] not in (0, 2, 130, -9) or "Traceback" in done["error"]:
            figures.faults.append(f"{where}: {done['error'][-600:]}")
        new = after.keys() - before.keys()
        if done["code"] == 2 and new and not fault:
            figures.faults.append(f"{where}: left {sorted(new)[:5]}: {done['error'][-300:]}")
        ours = (
            {name for name in ours if name in after}
            | new
            | {name for name in ours & after.keys() if after[name] != before.get(name)}
        )
