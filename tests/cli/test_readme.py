"""What README.md tells people to type is there."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

import modmoe
from modmoe.cli.main import app

README = Path(__file__).resolve().parent.parent.parent / "README.md"
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(*kinds: str) -> list[str]:
    return [text for kind, text in FENCE.findall(README.read_text(encoding="utf-8")) if kind in kinds]


def commands() -> list[str]:
    """Return the lines of shell blocks that call modmoe: continued lines joined, no prompt, nothing behind a pipe."""
    lines = "\n".join(blocks("sh", "console")).replace("\\\n", " ").splitlines()
    found = [line.removeprefix("$ ").split(" | ")[0] for line in lines]
    return [line for line in found if line.startswith("modmoe ")]


@pytest.mark.parametrize("line", commands())
def test_a_command_is_one_that_modmoe_takes(line: str) -> None:
    command: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    while hasattr(command, "commands") and words and not words[0].startswith("-"):
        assert words[0] in command.commands, f"modmoe has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    # parses every option and argument, and runs nothing
    command.make_context("modmoe", words)


def test_every_step_is_shown() -> None:
    shown = {line.split()[1] for line in commands()}
    assert {"demo", "convert", "finetune", "eval", "export", "inspect"} <= shown


@pytest.mark.parametrize("code", blocks("python"))
def test_python_names_what_there_is(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "modmoe":
            assert node.attr in modmoe.__all__, f"modmoe.{node.attr} is not public"


def test_files_that_are_linked_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert not missing
