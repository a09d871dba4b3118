"""Trained models and real text, where they are at hand: what holds of random weights must hold of these."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from modmoe.conversion.driver import convert
from modmoe.exports.converted import export
from modmoe.models.loading import load, load_tokenizer
from modmoe.recipe.schema import make_recipe
from modmoe.training.evaluation.task_loss import evaluate


@pytest.fixture(scope="module")
def tasks(shared, tmp_path_factory):
    """Stories, fairy tales and word problems."""
    directory = tmp_path_factory.mktemp("tasks")
    stories = json.loads((shared / "data/tinystories_snippets/tinystories_1000.json").read_text())
    tales = [json.loads(line) for line in (shared / "data/fairytales/train.jsonl").read_text().splitlines()][:20]
    problems = [json.loads(line) for line in (shared / "data/gsm8k/train.jsonl").read_text().splitlines()][:200]
    rows = {
        "stories": [{"text": text} for text in stories[:200]],
        "tales": [{"text": part} for tale in tales for part in tale["text"].split("\n") if len(part) > 80],
        "math": [{"prompt": p["question"] + "\n", "completion": p["answer"]} for p in problems],
        "held": [{"text": text} for text in stories[600:650]],
    }
    paths = {}
    for name, items in rows.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items))
        paths[name] = str(path)
    return paths


@torch.no_grad()
def test_the_loss_of_a_trained_model_is_that_of_the_loop(shared, tasks):
    """Each story alone, cut at 256 tokens, no batches and no padding."""
    source = str(shared / "models/stories260K")
    model, tokenizer = load(source), load_tokenizer(source)
    sums, counts = 0.0, 0
    for line in Path(tasks["held"]).read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"])["input_ids"][:256]])
        sums += float(model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        counts += ids.shape[1] - 1
    found = evaluate(source, {"held": tasks["held"]}, tokens=10**6, sequence_length=256)["tasks"]["held"]
    assert found["tokens"] == counts
    assert found["loss"] == pytest.approx(sums / counts, rel=1e-5)
    assert 1.2 < found["loss"] < 1.7, "far from what a trained model reaches"


@pytest.mark.parametrize(
    ("name", "family", "num_modules"),
    [("stories260K", None, 43), ("spllama2M-relu", {"model_type": "spllama"}, 24)],
    ids=["llama", "own code"],
)
def test_a_trained_model_converts_and_leaves(shared, tasks, tmp_path, name, family, num_modules):
    source = shared / "models" / name
    trust = family is not None
    recipe = make_recipe(
        {
            "source": str(source),
            "tasks": {task: tasks[task] for task in ("stories", "tales", "math")},
            "family": family,
            "trust_remote_code": trust,
            "partition.num_modules": num_modules,
            "assignment.coverage": True,
            "calibration.tokens": 3000,
        }
    )
    found = convert(recipe, str(tmp_path / "moe"))
    assert found["verified"]["modules_left_out"] == 0
    assert found["verified"]["max_abs_logit_diff_all_on"] <= 1e-10
    # routers fitted on real activations know more than the expert that is best most often
    assert sum(router["agreement"] - router["chance"] for router in found["routers"]) > 0
    made = export(
        str(tmp_path / "moe"),
        str(tmp_path / "dense"),
        form="dense",
        expert="math",
        trust_remote_code=trust,
        verify=False,
    )
    assert made["bytes_after"] < made["bytes_before"]
    tied = load(tmp_path / "moe", trust_remote_code=trust, dtype=torch.float64)
    dense = load(tmp_path / "dense", trust_remote_code=trust, dtype=torch.float64)
    tied.set_expert("math")
    ids_BT = torch.arange(60).reshape(3, 20) * 7 % 500
    with torch.no_grad():
        difference = (tied(ids_BT).logits - dense(ids_BT).logits).abs().max()
    assert difference <= 1e-10
