"""An upcycled model is the dense model, or one whose experts have neurons drawn anew; it is trained and inspected."""

# Shapes: F neurons, N neurons drawn anew, X the other dimension

from __future__ import annotations

import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import modmoe
from modmoe.conversion import driver, upcycle
from modmoe.conversion.options import check_recipe
from modmoe.errors import ModmoeError
from modmoe.formats.native.targets import TARGETS
from modmoe.models.inspection import inspect
from modmoe.models.loading import load
from modmoe.recipe.schema import load_recipe, make_recipe
from modmoe.storage.checkpoint import MANIFEST, Checkpoint
from tests.support.native_models import SOURCES
from tests.support.tiny import save_dense, token_ids

FORMATS = {
    "llama": "mixtral",
    "mistral": "mixtral",
    "qwen2": "qwen2_moe",
    "qwen3": "qwen3_moe",
    "granite": "granitemoeshared",
    "olmo2": "flex_olmo",
}
EXPERTS = 4


def save(directory: Path, model_type: str = "llama", **changes: Any) -> Path:
    """Save a tiny dense model that some format holds."""
    return save_dense(directory, model_type, **{**SOURCES[model_type], **changes})


def moe(directory: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Load it with plain transformers."""
    return AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, experts_implementation="eager").eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(token_ids()).logits


def prove_here(in_memory: Callable[[torch.dtype], Any], directory: Path, **_: Any) -> dict[str, Any]:
    """The proof without a process of its own, which takes seconds."""
    difference = (logits(in_memory(torch.float64)) - logits(moe(directory))).abs().max()
    return {"max_abs_logit_diff": float(difference)}


def unproved(*_: Any, **__: Any) -> dict[str, Any]:
    """No proof, where something else is tested."""
    return {}


def convert(source: Path, output: Path, prove: Callable[..., Any] = prove_here, **values: Any) -> dict[str, Any]:
    """Upcycle, with everything but the proof in a process of its own and the card."""
    recipe = make_recipe({"source": str(source), "method": "upcycle", "assignment.num_experts": EXPERTS, **values})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(upcycle, "verify", prove)
        patch.setattr(upcycle, "write_upcycled_card", lambda *_: None)
        return driver.convert(recipe, str(output), overwrite=True)


@pytest.mark.parametrize("model_type", FORMATS)
def test_copies_are_the_dense_model(tmp_path: Path, model_type: str) -> None:
    source = save(tmp_path / "dense", model_type)
    result = convert(source, tmp_path / "out", **{"router.top_k": 3})
    assert result["model_type"] == result["target"] == FORMATS[model_type]
    # transformers computes routers in float32
    assert result["verified"]["max_abs_logit_diff"] < 1e-5
    found = inspect(str(tmp_path / "out"))
    assert (found["method"], found["num_experts"], found["top_k"]) == ("upcycle", EXPERTS, 3)
    assert found["parameters"]["stored"] == result["parameters"]["stored"] > result["parameters_before"]
    assert {path.name for path in (tmp_path / "out").iterdir()} > {MANIFEST, "modmoe.yaml", "tokenizer.json"}


def router_rows(directory: Path) -> list[Tensor]:
    checkpoint = Checkpoint(directory)
    target = TARGETS[checkpoint.config["model_type"]]
    return [checkpoint[f"model.layers.{layer}.{target.router}"] for layer in range(2)]


def test_a_router_is_drawn_small_and_for_each_layer(tmp_path: Path) -> None:
    source = save(tmp_path / "dense", hidden_size=128)
    convert(source, tmp_path / "out", unproved, **{"assignment.num_experts": 32})
    first_ED, second_ED = router_rows(tmp_path / "out")
    convert(source, tmp_path / "other", unproved, **{"assignment.num_experts": 32, "seed": 1})
    assert not torch.equal(first_ED, router_rows(tmp_path / "other")[0])
    assert first_ED.shape == (32, 128) and not torch.equal(first_ED, second_ED)
    assert float(first_ED.std()) == pytest.approx(0.02, rel=0.1) and abs(float(first_ED.mean())) < 2e-3


Matrices = namedtuple("Matrices", ["gate_FX", "up_FX", "down_FX"])


def expert_rows(directory: Path, layer: int, expert: int | None = None) -> Matrices:
    """Return the matrices of a Llama's FFN, or of a Mixtral's expert, neurons first."""
    checkpoint = Checkpoint(directory)
    names = ("gate_proj", "up_proj", "down_proj") if expert is None else ("w1", "w3", "w2")
    place = "mlp" if expert is None else f"block_sparse_moe.experts.{expert}"
    gate, up, down = (checkpoint[f"model.layers.{layer}.{place}.{name}.weight"] for name in names)
    return Matrices(gate, up, down.T)


def test_the_same_neurons_of_each_matrix_are_drawn_anew(tmp_path: Path) -> None:
    # a width at which means and deviations say something, and weights that are far from both
    source = save(tmp_path / "dense", intermediate_size=400, initializer_range=0.02)
    shifted(source, mean=0.3, scale=2.0)
    values = {"upcycle.redrawn_fraction": 0.25}
    result = convert(source, tmp_path / "out", **values)
    assert result["verified"]["max_abs_logit_diff"] < 1e-5
    assert not torch.equal(logits(moe(tmp_path / "out")), logits(load(source, dtype=torch.float64)))
    drawn = {}
    for layer in range(2):
        dense = expert_rows(source, layer)
        for expert in range(EXPERTS):
            made = expert_rows(tmp_path / "out", layer, expert)
            changed = [(new != old).any(1) for new, old in zip(made, dense, strict=True)]
            assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
            assert int(changed[0].sum()) == 100
            drawn[layer, expert] = made.up_FX[changed[0]].flatten()[:8].tolist(), changed[0].tolist()
            for new, old in zip(made, dense, strict=True):
                new_NX, old_NX = new[changed[0]], old[changed[0]]
                assert bool((new_NX != old_NX).all())
                assert float(new_NX.mean()) == pytest.approx(float(old_NX.mean()), abs=0.02 * float(old_NX.std()) * 3)
                assert float(new_NX.std()) == pytest.approx(float(old_NX.std()), rel=0.06)
    for column in zip(*drawn.values(), strict=True):
        assert len({tuple(values) for values in column}) == len(drawn)
    convert(source, tmp_path / "again", unproved, **values)
    assert same_weights(tmp_path / "out", tmp_path / "again")
    convert(source, tmp_path / "other", unproved, **values, seed=1)
    assert not same_weights(tmp_path / "out", tmp_path / "other")


def shifted(directory: Path, mean: float, scale: float) -> None:
    """Make one FFN matrix's weights differ from the others in mean and deviation."""
    model: Any = load(directory)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.mul_(scale).add_(mean)
    model.save_pretrained(directory)


def same_weights(one: Path, two: Path) -> bool:
    mine, theirs = Checkpoint(one), Checkpoint(two)
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_proof_fails_where_an_expert_is_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "dense")

    def damage(in_memory: Callable[[torch.dtype], Any], directory: Path, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr(upcycle, "_seed", lambda *_: 7)
        return prove_here(in_memory, directory)

    found = convert(source, tmp_path / "out", damage, **{"upcycle.redrawn_fraction": 0.5})
    assert found["verified"]["max_abs_logit_diff"] > 1e-3


def test_a_model_too_large_for_the_proof_is_written_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upcycle, "fits", lambda *_: False)
    result = convert(save(tmp_path / "dense"), tmp_path / "out")
    assert result["verified"] is None and "not verified" in result["warnings"][0]


def test_the_command_converts_and_proves(tmp_path: Path) -> None:
    source = save(tmp_path / "dense", dtype=torch.bfloat16)
    planned = modmoe.convert(source, tmp_path / "out", method="upcycle", num_experts=EXPERTS, dry_run=True)
    assert not (tmp_path / "out").exists()
    result = modmoe.convert(source, tmp_path / "out", method="upcycle", num_experts=EXPERTS)
    assert result["verified"]["reloaded_without_modmoe"]
    assert result["verified"]["by_dtype"].keys() == {"bfloat16", "float32"}
    assert planned["parameters"].items() <= result["parameters"].items()
    assert planned["bytes"] == result["tensor_bytes"] and planned["top_k"] == result["top_k"] == 2
    assert "copy of the FFN" in (tmp_path / "out" / "README.md").read_text()
    assert load_recipe(tmp_path / "out" / "modmoe.yaml").method == "upcycle"


REFUSED = [
    ({"num_experts": 4, "top_k": 1}, r"router.top_k: .* choose 2 or more"),
    ({"num_experts": 4, "top_k": 5}, r"router.top_k: 5 is more than the 4 experts"),
    ({"upcycle.redrawn_fraction": 1.5}, r"upcycle.redrawn_fraction: 1.5 is not between 0 and 1"),
    ({"tasks": {"a": "a.txt"}}, r"^--task: does not go with --method upcycle"),
    ({"num_modules": 8}, r"^--num-modules: does not go with --method upcycle"),
    ({"fit_bytes": 10}, r"^--fit-bytes: does not go with --method upcycle"),
    ({"report": "r.html"}, r"^--report: does not go with --method upcycle"),
    ({"budget": 10}, r"^--budget: belongs to --method adapters"),
]


def test_a_report_that_would_not_be_written_is_refused(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    for method in ("adapters", "prune", "experts", "upcycle"):
        with pytest.raises(ModmoeError, match=f"^--report: does not go with --method {method}; leave it out"):
            modmoe.convert(dense, tmp_path / "out", method=method, report="r.html")


@pytest.mark.parametrize(("values", "said"), REFUSED)
def test_what_cannot_be_is_refused(tmp_path: Path, values: dict[str, Any], said: str) -> None:
    dense = save_dense(tmp_path / "dense")
    with pytest.raises(ModmoeError, match=said):
        modmoe.convert(dense, tmp_path / "out", method="upcycle", **values)
    assert [file.name for file in tmp_path.iterdir()] == ["dense"]


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("gpt2", {}, r"no native target holds a 'gpt2' model \(only granite, llama.*qwen3\)\.$"),
        ("llama", {"mlp_bias": True}, r"can't hold biases in the FFN \(gate, up, down\)\.$"),
    ],
)
def test_what_no_format_holds_is_refused(tmp_path: Path, model_type: str, changes: dict[str, Any], said: str) -> None:
    source = save_dense(tmp_path / "dense", model_type, **changes)
    with pytest.raises(ModmoeError, match=said):
        modmoe.convert(source, tmp_path / "out", method="upcycle")
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_no_room_on_the_disk_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save(tmp_path / "dense")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(ModmoeError, match="and 1,000 are free there"):
        convert(source, tmp_path / "out")


def test_a_recipe_is_checked_before_anything_is_read() -> None:
    check_recipe(make_recipe({"method": "upcycle"}))
    with pytest.raises(ModmoeError, match="choose 2 or more"):
        check_recipe(make_recipe({"method": "upcycle", "router.top_k": 1}))
