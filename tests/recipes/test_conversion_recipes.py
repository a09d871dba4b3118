"""Recipes for published models: each validates, and is planned from the real sizes, of which only headers are there."""

import json
import math
import struct
from functools import cache
from importlib.resources import files
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    OlmoeConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import modmoe
from modmoe.conversion.options import check_recipe
from modmoe.recipe.schema import FinetuneRecipe, load_recipe
from tests.support import tiny

_LLAMA = {"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}
# billions of parameters as the models' pages say; half of the FFN and all of the rest is for each token
MODELS = {
    "llama-3.2-1b": (
        LlamaConfig(**_LLAMA, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, tie_word_embeddings=True),
        "1.24",
    ),
    "llama-3.1-8b": (LlamaConfig(**_LLAMA, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32), "8.03"),
    "qwen2.5-0.5b": (
        Qwen2Config(
            hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
        ),
        "0.49",
    ),
    "qwen2.5-7b": (
        Qwen2Config(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
            num_key_value_heads=4, vocab_size=152064,
        ),
        "7.62",
    ),
    "qwen3-0.6b": (
        Qwen3Config(
            hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
            num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
        ),
        "0.60",
    ),
    "qwen3-8b": (
        Qwen3Config(
            hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, vocab_size=151936,
        ),
        "8.19",
    ),
    "mistral-7b": (
        MistralConfig(
            hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
            num_key_value_heads=8, vocab_size=32768,
        ),
        "7.25",
    ),
    "gemma-2-2b": (
        Gemma2Config(
            hidden_size=2304, intermediate_size=9216, num_hidden_layers=26, num_attention_heads=8,
            num_key_value_heads=4, head_dim=256, vocab_size=256000,
        ),
        "2.61",
    ),
    "smollm2-1.7b": (
        LlamaConfig(
            hidden_size=2048, intermediate_size=8192, num_hidden_layers=24, num_attention_heads=32,
            num_key_value_heads=32, vocab_size=49152, tie_word_embeddings=True,
        ),
        "1.71",
    ),
    "olmoe-1b-7b": (
        OlmoeConfig(
            hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, vocab_size=50304,
        ),
        "6.92",
    ),
    "qwen3-30b-a3b": (
        Qwen3MoeConfig(
            hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
            num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
            vocab_size=151936,
        ),
        "30.53",
    ),
}  # fmt: skip


def write_headers(directory: Path, config) -> None:
    """Write a checkpoint whose file has the length of the real one and takes no room: it is a hole."""
    config.architectures = [type(config).__name__.replace("Config", "ForCausalLM")]
    config.dtype = "bfloat16"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors, tied = {}, set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        for part, shape in _as_stored(name, tuple(tensor.shape)):
            tensors[part] = shape
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config.to_dict()), encoding="utf-8")
    # in shards, as they come: no machine maps a file that is much larger than its memory
    shards, size = [{}], 0
    for name, shape in tensors.items():
        num_bytes = 2 * torch.Size(shape).numel()
        if size + num_bytes > 4 * 10**9 and shards[-1]:
            shards, size = [*shards, {}], 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [size, size + num_bytes]}
        size += num_bytes
    weight_map = {}
    for number, shard in enumerate(shards):
        file = directory / f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps({"__metadata__": {"format": "pt"}, **shard}).encode()
        with file.open("wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.truncate(8 + len(text) + max(entry["data_offsets"][1] for entry in shard.values()))
        weight_map.update(dict.fromkeys(shard, file.name))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _as_stored(name: str, shape: tuple[int, ...]):
    """Yield a tensor under its name in the file: transformers holds experts fused, files have them one by one."""
    if name.endswith("experts.gate_up_proj"):
        for expert in range(shape[0]):
            for part in ("gate_proj", "up_proj"):
                yield name.replace("gate_up_proj", f"{expert}.{part}.weight"), (shape[1] // 2, shape[2])
    elif name.endswith("experts.down_proj"):
        for expert in range(shape[0]):
            yield name.replace("down_proj", f"{expert}.down_proj.weight"), shape[1:]
    else:
        yield name, shape


@cache
def plan_of(name: str, directory: Path) -> dict:
    # copies of FFNs are made without a word of text
    tasks = None if name in UPCYCLED else {"words": tiny.write_tasks(directory / "tasks", rows=3)["words"]}
    model = name.removeprefix("drop-").split("-", 1)[1]
    write_headers(directory / "dense", MODELS[model][0])
    tiny.tokenizer().save_pretrained(directory / "dense")
    path = str(files("modmoe.recipes") / f"{name}.yaml")
    options = {"dry_run": True, "estimate_for": "h100-80gb"}
    return modmoe.convert(str(directory / "dense"), directory / "out", path, tasks=tasks, **options)


NAMES = sorted(
    path.name.removesuffix(".yaml")
    for path in files("modmoe.recipes").iterdir()
    if path.name.startswith(("modules-", "experts-")) and path.name != "experts-mixtral.yaml"
)

UPCYCLED = sorted(
    path.name.removesuffix(".yaml") for path in files("modmoe.recipes").iterdir() if "upcycle-" in path.name
)


def check_estimate(plan, recipe, parameters):
    assert plan["device"] == "h100-80gb"
    # there is one of the training where the recipe says anything of it
    assert ("finetune" in plan["estimate"]) == (recipe.finetune != FinetuneRecipe())
    for step, need in plan["estimate"].items():
        assert math.isfinite(need["seconds_high"]) and 0 < need["seconds_low"] < need["seconds_high"], step
        # Adam's state of 7 G parameters is for several GPUs
        assert need["fits"] == (step == "convert" or recipe.upcycle.redrawn_fraction == 0), need["verdict"]
        # no step takes less than the weights in bfloat16; copies are made on the CPU
        place = "host_bytes" if recipe.method == "upcycle" and step == "convert" else "device_bytes"
        assert need[place] > 2 * parameters, step


def test_there_is_a_recipe_for_every_model():
    assert sorted(name.split("-", 1)[1] for name in NAMES) == sorted(MODELS)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_is_planned_at_the_real_size(name, tmp_path):
    path = files("modmoe.recipes") / f"{name}.yaml"
    recipe = load_recipe(str(path))
    check_recipe(recipe)
    plan = plan_of(name, tmp_path)
    before = plan["parameters"].get("dense") or plan["parameters_before"]
    assert f"{before / 1e9:.2f}" == MODELS[name.split("-", 1)[1]][1]
    # the sizes that the recipe's comment tells
    text = " ".join(path.read_text(encoding="utf-8").replace("\n#", " ").split())
    kept = "stored" if recipe.method == "experts" else "active"
    for size in (before, plan["parameters"][kept], plan["parameters"]["active"]):
        assert f"{size / 1e9:.2f} G" in text
    if recipe.method == "modular":
        assert plan["num_experts"] == recipe.partition.num_modules - recipe.assignment.shared_modules
        assert f"{plan['num_modules']} modules of {plan['module_size']} neurons" in text
    assert not (tmp_path / "out").exists()
    check_estimate(plan, recipe, before)


@pytest.mark.parametrize("name", UPCYCLED)
def test_upcycling_is_planned_at_the_real_size(name, tmp_path):
    text = (files("modmoe.recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    plan = plan_of(name, tmp_path)
    sizes = plan["parameters"]
    assert f"{sizes['dense'] / 1e9:.2f}" == MODELS[name.removeprefix("drop-").split("-", 1)[1]][1]
    assert "{dense:.2f} G parameters become {stored:.2f} G, {active:.2f} G of them active".format(
        **{kind: sizes[kind] / 1e9 for kind in ("dense", "stored", "active")}
    ) in " ".join(text.replace("\n#", " ").split())
    assert (plan["num_experts"], plan["top_k"]) == (8, 2)
    assert plan["redrawn_fraction"] == (0.5 if name.startswith("drop-") else 0.0)
    assert plan["target"] == ("qwen3_moe" if "qwen3" in name else "mixtral")
    check_estimate(plan, load_recipe(str(files("modmoe.recipes") / f"{name}.yaml")), sizes["dense"])
