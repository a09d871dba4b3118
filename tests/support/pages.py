"""The commands and the snippets of README.md and docs/, and how they are run on tiny models in place of large ones."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer

from modmoe.cli.main import app, run
from tests.support import moes, tiny

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)

MODELS = {
    "HuggingFaceTB/SmolLM2-135M": "llama",
    "meta-llama/Llama-3.2-1B": "llama",
    "allenai/OLMoE-1B-7B-0924": "olmoe",
    "dense": "llama",
}
"""Models that pages name, by Hub id or directory, and the family of the tiny one that lies there when they are run."""
NUMBERS = {"--max-steps": "2", "--budget": "6000", "--num-modules": "8", "--sequence-length": "48"}
"""Flags whose numbers are for large models, and what they are run with."""
PYTHON_NUMBERS = {r"max_steps=\d+": "max_steps=2", r"num_modules=\d+": "num_modules=8"}


class Block(NamedTuple):
    """One fenced block of a page."""

    kind: str
    text: str


def blocks(page: Path, *kinds: str) -> list[Block]:
    """Return the blocks of a page in their order, of these kinds or of all."""
    found = [Block(*match) for match in _FENCE.findall(page.read_text(encoding="utf-8"))]
    return [block for block in found if not kinds or block.kind in kinds]


def shell_lines(block: Block) -> list[str]:
    """Return the lines that are typed: continued ones joined, no prompt, no output, no comment."""
    lines = block.text.replace("\\\n", " ").splitlines()
    if block.kind == "console":
        lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def modmoe_words(line: str) -> list[str] | None:
    """Return what a line gives to modmoe, by itself or under a launcher; None where it calls something else."""
    words = shlex.split(line, comments=True)
    if any(word in ("|", ">", "&&") for word in words):
        words = words[: next(i for i, word in enumerate(words) if word in ("|", ">", "&&"))]
    if words[:1] == ["modmoe"]:
        return words[1:]
    if "torchrun" in words[:3]:
        from torch.distributed.run import get_args_parser

        given = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
        assert given.no_python and given.training_script == "modmoe", line
        return list(given.training_script_args)
    if words[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser

        given = launch_command_parser().parse_args(words[2:])
        assert given.module and given.training_script == "modmoe.cli.main", line
        return list(given.training_script_args)
    return None


def parse(words: list[str]) -> None:
    """Parse a command line of modmoe as it stands, every option and argument, and run nothing."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"modmoe has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    command.make_context("modmoe", list(words))


def smaller(words: list[str]) -> list[str]:
    """Return a command line with the numbers that a tiny model takes."""
    return [NUMBERS.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def prepare(directory: Path, page: Path) -> None:
    """Put a tiny model wherever the page names one, and a few rows under every path of text that it names."""
    text = page.read_text(encoding="utf-8")
    for name, family in MODELS.items():
        if name in text:
            if family in moes.CONFIGS:
                moes.save_moe(directory / name, family)
            else:
                # as the real ones are; an architecture with experts has no place for biases
                tiny.save_dense(directory / name, family, mlp_bias=False)
    rows = Path(next(iter(tiny.write_tasks(directory / "rows").values()))).read_text(encoding="utf-8")
    for file in re.findall(r"[\w-]+/\w+\.jsonl", text):
        (directory / file).parent.mkdir(exist_ok=True)
        (directory / file).write_text(rows, encoding="utf-8")


def run_python(code: str, page: Path, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a snippet; one that converts begins anew in a folder of its own."""
    for pattern, small in PYTHON_NUMBERS.items():
        code = re.sub(pattern, small, code)
    place = directory / "python" if "convert(" in code else directory
    if place != directory:
        place.mkdir()
        prepare(place, page)
    monkeypatch.chdir(place)
    exec(compile(code, str(page), "exec"), {})
    monkeypatch.chdir(directory)


def run_page(page: Path, directory: Path, monkeypatch: pytest.MonkeyPatch, *, skip: tuple[str, ...] = ()) -> list[str]:
    """Run a page's modmoe commands and Python in their order and return the commands; those in ``skip`` are left out.

    Hub ids are directories with tiny models here. Exports are not reloaded in fresh processes: that is slow, and what
    the tests of export are for. Python that needs a program which modmoe does not install is left out.
    """
    proof = {"reloaded_without_modmoe": True, "max_abs_logit_diff": 0.0, "greedy_tokens_equal": True}
    monkeypatch.setattr("modmoe.exports.converted.verify_export", lambda *_, **__: proof)
    monkeypatch.setattr("modmoe.exports.adapters.verify_export", lambda *_, **__: proof)
    monkeypatch.chdir(directory)
    prepare(directory, page)
    done = []
    for block in blocks(page, "sh", "console", "python"):
        if block.kind == "python":
            if "llama_cpp" not in block.text:
                run_python(block.text, page, directory, monkeypatch)
            continue
        for line in shell_lines(block):
            words = modmoe_words(line)
            if words is None or line.startswith(skip):
                continue
            assert run([*smaller(words), "--quiet"]) == 0, line
            done.append(line)
    return done
