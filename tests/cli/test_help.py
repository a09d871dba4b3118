"""Help, versions and wrong options answer without the heavy imports."""

from __future__ import annotations

import re
import subprocess
import sys
from functools import reduce

import pytest
import typer

from modmoe import __version__
from modmoe.cli.main import app, run
from modmoe.recipe.keywords import KEYWORDS
from modmoe.recipe.schema import Recipe

COMMANDS = ("analyze", "convert", "finetune", "export", "push", "inspect", "doctor", "eval", "validate", "env", "demo")
SUBCOMMANDS = (("recipes", "ls"), ("recipes", "show"), ("recipes", "cp"))
HEAVY = ("torch", "transformers", "sklearn", "peft", "trl", "datasets", "numpy", "huggingface_hub", "matplotlib")


@pytest.mark.parametrize("command", [(name,) for name in (*COMMANDS, "recipes")] + list(SUBCOMMANDS), ids=" ".join)
def test_every_command_has_help_with_examples(command: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert f"Usage: modmoe {' '.join(command)}" in out
    assert f"Examples:\n    modmoe {command[0]}" in out
    assert err == ""


def test_the_root_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"\n  {command} " in out for command in (*COMMANDS, "recipes"))
    assert "--install-completion" in out
    assert "..." not in out.partition("Commands:")[2].partition("Examples:")[0]
    assert run([]) == 0
    assert capsys.readouterr().out == out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out == f"modmoe {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["--help"], 0), (["convert", "--help"], 0), (["convert", "--no-such-flag"], 2), (["recipes", "ls"], 0), ([], 0)],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else str(value),
)
def test_what_must_answer_at_once_imports_nothing_heavy(arguments: list[str], code: int) -> None:
    program = (
        "import sys\n"
        "from modmoe.cli.main import run\n"
        f"code = run({arguments!r})\n"
        f"heavy = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "print(code, heavy, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.splitlines()[-1] == f"{code} []"


@pytest.mark.parametrize("flag", ["--json", "--quiet", "--verbose"])
def test_flags_that_are_everywhere(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    for command in [(name,) for name in COMMANDS] + list(SUBCOMMANDS):
        run([*command, "--help"])
        assert flag in capsys.readouterr().out, command


@pytest.mark.parametrize("command", ["analyze", "convert", "finetune", "export", "eval"])
def test_flags_of_commands_that_read_a_model(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    run([command, "--help"])
    out = capsys.readouterr().out
    assert "--trust-remote-code" in out
    assert "--revision" in out
    if command != "export":
        assert "--seed" in out
        assert "--device auto|cpu|cuda" in out
    if command != "eval":
        assert "--overwrite" in out


@pytest.mark.parametrize(("command", "least"), [("analyze", 5), ("convert", 14), ("finetune", 8)])
def test_defaults_that_the_help_names_are_the_recipes(command: str, least: int) -> None:
    root = typer.main.get_command(app)
    options = {item.name: getattr(item, "help", "") or "" for item in root.commands[command].params}  # type: ignore[attr-defined]
    said = {
        name: found[1] or found[2]
        for name, words in options.items()
        if (found := re.search(r"[Bb]y default ([\d.]*\d)\b|(\w+)(?:,| \()\s?\(?the default", words))
    }
    recipe = Recipe()
    for name, value in said.items():
        default = reduce(getattr, KEYWORDS[command][name].split("."), recipe)
        assert float(value) == default if isinstance(default, int | float) else value == default, name
    assert len(said) >= least
