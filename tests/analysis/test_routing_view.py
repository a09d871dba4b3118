"""What a report says of routers is what the model does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe.analysis.passes.stream import WholeModel
from modmoe.analysis.routing import RoutingView, dense_output, split_text, view_routing
from modmoe.analysis.source import open_source
from modmoe.conversion.driver import convert
from modmoe.modeling.modular_ffn import ModularFFN
from modmoe.models.families import family_of
from modmoe.models.ffn_layout import LazyFFNs, read_ffn
from modmoe.models.loading import load
from modmoe.recipe.schema import Recipe, make_recipe
from modmoe.reports.report import write_report
from modmoe.storage.checkpoint import Checkpoint
from tests.support import tiny

COUNTS = {"sums": 4, "words": 4, "code": 4}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("routing")
    tiny.save_dense(home / "dense", dtype=torch.float64)
    tiny.write_tasks(home / "tasks")
    return home


def made(home: Path, name: str, **changes: Any) -> tuple[Recipe, Any]:
    """Return the recipe and the model of a conversion that wrote a report."""
    recipe = make_recipe(
        {
            "source": str(home / "dense"),
            "tasks": {task: str(home / "tasks" / f"{task}.jsonl") for task in COUNTS},
            "calibration.tokens": 200,
            "calibration.sequence_length": 32,
            "partition.num_modules": 8,
            **changes,
        }
    )
    convert(recipe, str(home / name), report=str(home / f"{name}.html"), write_report=write_report)
    return recipe, load(home / name, device="cpu").double()


def view_of(recipe: Recipe, model: Any, read: dict[str, int] | None = None) -> tuple[RoutingView, list[torch.Tensor]]:
    source = open_source(recipe)
    ffns = LazyFFNs(source.checkpoint, source.family, source.num_layers)
    # the modules as they lie in the checkpoint are as good a numbering as any
    ffns_tied = [part for part in model.modules() if isinstance(part, ModularFFN)]
    members_EM = [torch.nn.functional.pad(part.membership, (0, 8 - part.stored_modules)) for part in ffns_tied]
    runner = WholeModel(model, source.family)
    return view_routing(runner, source.texts, tiny.tokenizer(), ffns, members_EM, read=read), members_EM


def test_choices_are_those_of_the_model(home: Path) -> None:
    recipe, model = made(home, "token")
    view, members_EM = view_of(recipe, model, COUNTS)
    assert view.is_held_out and view.tasks == tuple(COUNTS)
    for sample in view.samples:
        ids_BT = torch.tensor([tiny.tokenizer()("".join(sample.pieces))["input_ids"]])
        with torch.no_grad(), model.record_router_logits():
            model(input_ids=ids_BT, use_cache=False)
            logits = model.routing_state.logits
        for layer, ids_TK in enumerate(sample.ids_LTK):
            assert torch.equal(ids_TK[:, 0], logits[layer].argmax(-1))
    assert torch.allclose(view.chosen_LPE.sum(2), torch.ones(2, 3))
    for layer, member_EM in enumerate(members_EM):
        # one expert a token: a module is used as often as the experts that have it
        assert torch.allclose(view.used_LPM[layer], view.chosen_LPE[layer] @ member_EM.float(), atol=1e-6)
    assert view.certainty_L is not None and bool(((view.certainty_L > 0) & (view.certainty_L <= 1)).all())
    assert torch.allclose(view.sparsity_LQ[:, -1], torch.tensor(0.5))
    assert bool((view.kept_LQ < 1).all())
    assert model.routing_state.active_modules is None and model.routing_state.expert is None
    text = (home / "token.html").read_text(encoding="utf-8")
    assert "Router entropy." in text and 'class="tokens"' in text


def test_with_all_modules_in_every_expert_everything_is_kept(home: Path) -> None:
    recipe, model = made(home, "all", **{"assignment.active_fraction": 1.0, "router.routing": "task"})
    view, _ = view_of(recipe, model)
    assert torch.allclose(view.kept_LQ[:, -1], torch.ones(2), atol=1e-5)
    assert torch.allclose(view.sparsity_LQ[:, -1], torch.zeros(2))
    assert bool((view.kept_LQ[:, 0] < 0.999).all())
    # the caller routes, each task to its own
    assert view.certainty_L is None and torch.allclose(view.chosen_LPE, torch.eye(3).expand(2, 3, 3))
    assert view.is_held_out and not view_of(recipe, model, dict.fromkeys(COUNTS, 24))[0].is_held_out
    assert 'class="tokens"' not in (home / "all.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi3"])
def test_the_dense_output_is_the_model_s(tmp_path: Path, model_type: str) -> None:
    tiny.save_dense(tmp_path, model_type)
    checkpoint, model = Checkpoint(tmp_path), load(tmp_path, device="cpu").eval()
    family = family_of(checkpoint.config, None, "")
    checkpoint.add_prefix(family.layers)
    ffn = model.get_submodule(f"{family.layers}.1.{family.ffn}")
    x_ND = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    activation = getattr(ffn, "act_fn", None) or getattr(ffn, "act", None) or ffn.activation_fn
    with torch.no_grad():
        assert torch.allclose(dense_output(read_ffn(checkpoint, family, 1), x_ND, activation), ffn(x_ND), atol=1e-4)


def test_pieces_are_the_text() -> None:
    tokenizer, text = tiny.tokenizer(), "a b\n 計算 é"
    ids = tokenizer(text)["input_ids"]
    pieces = split_text(tokenizer, ids)
    assert len(pieces) == len(ids) and "".join(pieces) == text
    assert "計" in pieces and not any("\ufffd" in piece for piece in pieces)
