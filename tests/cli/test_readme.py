"""What README.md and docs/ tell people to type is there, and what README says to do runs."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch

import modmoe
from modmoe.adapters.table import METHODS
from modmoe.models.ffn_layout import FFNWeights
from tests.conversion import test_upcycle
from tests.support import adapted, moes, pages

README = pages.ROOT / "README.md"
COMMANDS = [
    pytest.param(line, id=f"{page.stem}-{line}")
    for page in pages.PAGES
    for block in pages.blocks(page, "sh", "console")
    for line in pages.shell_lines(block)
]
PYTHON = [pytest.param(block.text, id=page.stem) for page in pages.PAGES for block in pages.blocks(page, "python")]
# what pages say to type besides modmoe; whatever is not here is a mistake, or has to be put here
OTHERS = (
    "tensorboard ",
    "pip ",
    "make ",
    "cp -r ",
    "ln -s ",
    "tar ",
    "python ",
    "python3 -m venv",
    ". .venv/",
    "head=$(scontrol ",
)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_is_one_that_there_is(line: str) -> None:
    if not line.startswith(OTHERS):
        words = pages.modmoe_words(line)
        assert words is not None, f"neither modmoe nor one of {OTHERS}"
        pages.parse(words)


def test_every_step_is_shown() -> None:
    lines = [line for block in pages.blocks(README, "sh", "console") for line in pages.shell_lines(block)]
    shown = {line.split()[1] for line in lines if line.startswith("modmoe ")}
    assert {"demo", "convert", "finetune", "eval", "export", "inspect"} <= shown


@pytest.mark.parametrize("code", PYTHON)
def test_python_names_what_there_is(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "modmoe":
            assert node.attr in {*modmoe.__all__, "adapters"}, f"modmoe.{node.attr} is not public"


def test_files_that_are_linked_are_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (README.parent / link).exists()]
    assert not missing


def test_the_method_of_ones_own_cuts_a_layer() -> None:
    code = next(block.text for block in pages.blocks(README, "python") if "def by_size" in block.text)
    names: dict[str, Any] = {}
    exec(code, names)
    down_DF = torch.tensor([[4.0, 1.0, 3.0, 2.0, 6.0, 5.0]])
    weights = FFNWeights(gate_FD=None, up_FD=down_DF.T, down_DF=down_DF)
    assert names["by_size"](None, weights, 3, 0).module_F.tolist() == [1, 0, 1, 0, 2, 2]


def test_methods_are_tested_on_what_readme_says() -> None:
    rows = dict(
        re.findall(r"^\| ([^|]*`[^|]*|adapters[^|]*) \| ([\w, ]+) \|$", README.read_text(encoding="utf-8"), re.M)
    )
    said = {name: set(families.split(", ")) for name, families in rows.items()}
    assert said["`experts`"] == set(moes.CONFIGS)
    assert said["`upcycle`"] == set(test_upcycle.FORMATS)
    held = {method: {family for name, family in adapted.CASES if name == method} for method in METHODS}
    special = {"perft_e": "`perft_e`, `expert_lora`", "expert_lora": "`perft_e`, `expert_lora`", "mixlora": "`mixlora`"}
    for method, families in held.items():
        assert said[special.get(method, "adapters but for the next two rows")] == families, method
