"""The recipe that prunes experts validates, and runs on a small model of its family."""

from importlib.resources import files

import modmoe
from modmoe.conversion.options import check_recipe
from modmoe.recipe.schema import load_recipe
from tests.support import moes, tiny


def test_recipe_validates_and_is_planned(tmp_path):
    path = str(files("modmoe.recipes") / "experts-mixtral.yaml")
    recipe = load_recipe(path)
    check_recipe(recipe)
    source = moes.save_moe(tmp_path / "moe", "mixtral", num_local_experts=8)
    tasks = tiny.write_tasks(tmp_path / "tasks")

    plan = modmoe.convert(source, tmp_path / "out", path, tasks=tasks, dry_run=True, estimate_for="l4")

    assert (recipe.method, recipe.experts.score, recipe.finetune.train) == ("experts", "reap", "router")
    assert (plan["num_experts"], plan["num_experts_before"]) == (4, 8)
    assert plan["calibration_tokens"] == 3 * recipe.calibration.tokens
    assert set(plan["estimate"]) == {"convert", "finetune"} and plan["device"] == "l4"
    assert not (tmp_path / "out").exists()
