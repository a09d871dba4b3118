"""Recipes for published adapters: each validates, and is planned from the base model's configuration alone."""

import json
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

import modmoe
from modmoe.conversion.options import check_recipe
from modmoe.recipe.schema import load_recipe
from tests.adapters.test_adapter_counts import SIZES

NAMES = sorted(
    path.name.removesuffix(".yaml")
    for path in files("modmoe.recipes").iterdir()
    if path.name.endswith(tuple(f"{model}.yaml" for model in SIZES))
    and not path.name.startswith(("modules-", "experts-"))
)
# what the papers print, where they have this base model
PUBLISHED = {
    "comol-qwen3-8b": "25.16",
    "comol-llama-3.1-8b": "23.24",
    "soft-moa-llama-3.1-8b": "24.52",
    "sparse-moa-qwen3-8b": "24.49",
    "perft-r-olmoe-1b-7b": "4.33",
    "perft-r-mixtral-8x7b": "17.30",
    "perft-e-olmoe-1b-7b": "67.11",
    "perft-e-mixtral-8x7b": "33.55",
}


def test_every_base_model_and_method_family_is_there():
    assert len(NAMES) == 16


@pytest.mark.parametrize("name", NAMES)
def test_recipe_validates_and_is_planned_from_a_configuration_alone(name, tmp_path):
    path = str(files("modmoe.recipes") / f"{name}.yaml")
    model = next(model for model in SIZES if name.endswith(model))
    config = SIZES[model]
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")

    recipe = load_recipe(path)
    check_recipe(recipe)
    plan = modmoe.convert(str(tmp_path), tmp_path / "out", path, dry_run=True, estimate_for="h200")

    assert recipe.source is not None and recipe.method == "adapters" and recipe.finetune.train == "adapters"
    if name in PUBLISHED:
        assert f"{plan['parameters']['adapter'] / 1e6:.2f}" == PUBLISHED[name]
    said = yaml.safe_load(Path(path).read_text(encoding="utf-8"))["adapter"]["settings"]
    assert {key: plan["settings"][key] for key in said} == said
    assert not (tmp_path / "out").exists()
    for step, need in plan["estimate"].items():
        assert 0 < need["seconds_low"] < need["seconds_high"] < float("inf"), step
    # beside the frozen weights in bfloat16 the adapter has its own, gradients and two moments
    training = plan["estimate"]["finetune"]["device_bytes"]
    assert training > 2 * plan["parameters"]["base"] + 16 * plan["parameters"]["adapter"]
