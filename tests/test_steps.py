"""The public names, and how keywords, recipes and files become one recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import modmoe
from modmoe import api
from modmoe.api import KEYWORDS, resolve_recipe
from modmoe.errors import RecipeError
from modmoe.recipe.schema import Recipe, make_recipe


@pytest.mark.parametrize("name", modmoe.__all__)
def test_what_is_public_is_there(name: str) -> None:
    assert getattr(modmoe, name) is not None
    assert name in dir(modmoe)


@pytest.mark.parametrize("name", ["analyze", "convert", "export", "finetune", "evaluate", "inspect"])
def test_a_step_is_a_function_of_api(name: str) -> None:
    assert getattr(modmoe, name) is getattr(api, name)


def test_importing_modmoe_imports_nothing_heavy() -> None:
    code = "import sys, modmoe; modmoe.Recipe; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'convrt'"):
        _ = modmoe.convrt  # type: ignore[attr-defined]


@pytest.mark.parametrize("step", KEYWORDS)
def test_every_keyword_sets_a_place_of_the_recipe(step: str) -> None:
    from dataclasses import fields, is_dataclass

    default = Recipe()
    places = {item.name for item in fields(default)}
    for item in fields(default):
        value = getattr(default, item.name)
        if is_dataclass(value):
            places |= {f"{item.name}.{inner.name}" for inner in fields(value)}
    assert set(KEYWORDS[step].values()) <= places


def test_keywords_lie_over_the_recipe_which_lies_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("seed: 3\npartition: {num_modules: 8}\ntasks: {a: a.txt}\n")
    resolved = resolve_recipe("convert", "dense", file, {"num_modules": 4, "tokens": None})
    assert (resolved.source, resolved.seed, resolved.partition.num_modules) == ("dense", 3, 4)
    assert resolved.calibration.tokens == Recipe().calibration.tokens
    assert resolved.tasks == {"a": "a.txt"}
    again = resolve_recipe("convert", resolved, None, {"router.top_k": 2})
    assert (again.router.top_k, again.partition.num_modules, again.tasks) == (2, 4, {"a": "a.txt"})
    assert resolve_recipe("convert", file, None, {}) == resolve_recipe("convert", None, file, {})


def test_a_fraction_given_now_overrides_a_recipes_number() -> None:
    recipe = make_recipe({"assignment.modules_per_expert": 3})
    resolved = resolve_recipe("convert", recipe, None, {"active_fraction": 0.25})
    assert resolved.assignment.modules_per_expert is None
    assert resolved.assignment.active_fraction == 0.25
    with pytest.raises(RecipeError, match="not both"):
        resolve_recipe("convert", recipe, None, {"active_fraction": 0.25, "modules_per_expert": 2})


def test_what_is_wrong_is_told_with_the_nearest_name() -> None:
    with pytest.raises(RecipeError, match=r"no such keyword 'num_module'\. Did you mean 'num_modules'"):
        resolve_recipe("convert", "x", None, {"num_module": 3})
    with pytest.raises(RecipeError, match="no task is given"):
        modmoe.convert("x", "y")
    with pytest.raises(RecipeError, match="no source is given"):
        modmoe.convert(output="y", tasks={"a": "a.txt"})
    with pytest.raises(RecipeError, match="two recipes"):
        modmoe.convert(Recipe(), "y", Recipe())
    with pytest.raises(RecipeError, match="one of them"):
        modmoe.convert("x", "y", tasks={"a": "a"}, active_fraction=0.5, fit_bytes=10)
