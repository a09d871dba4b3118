"""Native mixtures of experts are trained, resumed and written as they are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe.conversion.driver import convert
from modmoe.recipe.schema import make_recipe
from modmoe.storage.checkpoint import Checkpoint
from modmoe.training.trainer import ModularTrainer
from tests.support import moes, tiny
from tests.training.test_finetune import changed, run, stop_at

# peft 0.21 asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
VALUES: dict[str, Any] = {"max_steps": 4, "save_steps": 2}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"), rows=32)


@pytest.mark.parametrize("fused", [False, True], ids=["own", "fused"])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_a_resumed_run_is_the_unbroken_one(
    tmp_path: Path, tasks: dict[str, str], model_type: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = moes.save_moe(tmp_path / "moe", model_type, fused=fused, initializer_range=0.05)
    monkeypatch.setattr("modmoe.training.run.load", eager)
    run(tmp_path, tmp_path / "whole", "moe", tasks, **VALUES)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tmp_path / "out", "moe", tasks, progress=stop_at(3), **VALUES)
    shutil.copytree(tmp_path / "out.states", tmp_path / "stock.states")
    run(tmp_path, tmp_path / "out", "moe", tasks, resume=True, **VALUES)
    assert not changed(tmp_path / "whole", tmp_path / "out")
    learned = changed(source, tmp_path / "out")
    assert any(".experts." in name for name in learned) and any(".gate.weight" in name for name in learned)
    if fused:
        return
    # what transformers 5.23 does by itself with the Hub's names: routers and experts stay as they began
    monkeypatch.delattr(ModularTrainer, "_load_from_checkpoint")
    run(tmp_path, tmp_path / "stock", "moe", tasks, resume=True, **VALUES)
    lost = changed(tmp_path / "whole", tmp_path / "stock")
    assert any(".experts." in name for name in lost) and any(".gate.weight" in name for name in lost)


def test_only_routers_learn(tmp_path: Path, tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = moes.save_moe(tmp_path / "moe", "qwen2_moe", initializer_range=0.05, dtype=torch.bfloat16)
    monkeypatch.setattr("modmoe.training.run.load", eager)
    result = run(tmp_path, tmp_path / "out", "moe", tasks, train="router", max_steps=2)
    learned = {f"model.layers.{layer}.mlp.gate.weight" for layer in moes.SPARSE["qwen2_moe"]}
    assert changed(source, tmp_path / "out") == learned
    assert result["parameters"]["trainable"] == len(learned) * moes.EXPERTS * 32


def test_an_upcycled_model_grows_apart(tmp_path: Path, tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.save_dense(tmp_path / "dense", mlp_bias=False, initializer_range=0.05)
    recipe = make_recipe({"source": str(tmp_path / "dense"), "method": "upcycle", "assignment.num_experts": 3})
    monkeypatch.setattr("modmoe.conversion.upcycle.verify", lambda *_, **__: {})
    convert(recipe, str(tmp_path / "moe"))
    monkeypatch.setattr("modmoe.training.run.load", eager)
    run(tmp_path, tmp_path / "out", "moe", tasks, max_steps=2, learning_rate=1e-2)
    learned = changed(tmp_path / "moe", tmp_path / "out")
    assert {f"model.layers.{layer}.block_sparse_moe.gate.weight" for layer in range(2)} <= learned
    tuned = Checkpoint(tmp_path / "out")
    experts = [tuned[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"] for expert in range(3)]
    assert not torch.equal(experts[0], experts[1]) and not torch.equal(experts[1], experts[2])


def eager(*args: Any, **kwargs: Any) -> Any:
    """Load a model whose experts are computed as fits a CPU."""
    from modmoe.models.loading import load

    model: Any = load(*args, **kwargs)
    model.set_experts_implementation("eager")
    return model
