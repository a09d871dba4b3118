"""The curves of a run: their values beside a plain loop, their files read back, and that training is none the wiser."""

from __future__ import annotations

import json
import math
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from modmoe.cli.main import run as command
from modmoe.errors import RecipeError
from modmoe.recipe.schema import make_recipe
from modmoe.storage.checkpoint import Checkpoint
from modmoe.training import curves
from modmoe.training.curves import Curves
from modmoe.training.run import finetune
from tests.support import adapted, tied, tiny

VALUES = {"finetune.batch_size": 2, "finetune.sequence_length": 32, "finetune.learning_rate": 3e-3}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("curves")
    dense = tiny.dense_model("llama", initializer_range=0.05)
    tiny.save_dense(base / "dense", "llama", initializer_range=0.05)
    tied.save_tied(base / "token", dense, base / "dense", num_experts_per_tok=2)
    tiny.write_tasks(base / "tasks")
    return base


def train(room: Path, out: Path, *, resume: bool = False, progress: Any = None, **values: Any) -> dict[str, Any]:
    tasks = {name: str(room / "tasks" / f"{name}.jsonl") for name in tied.NAMES}
    keys = {f"finetune.{name}": value for name, value in values.items()}
    keys = {**VALUES, "finetune.distill_from": str(room / "dense"), **keys}
    recipe = make_recipe({"source": str(room / "token"), "tasks": tasks, "device": "cpu", **keys})
    return finetune(
        str(room / "token"), str(out), recipe, eval_tasks={}, resume=resume, overwrite=False, progress=progress
    )


def events(out: Path) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of every curve that an output's only run has drawn."""
    (directory,) = out.with_name(f"{out.name}.logs").iterdir()
    read = EventAccumulator(str(directory)).Reload()
    return {tag: [(event.step, event.value) for event in read.Scalars(tag)] for tag in read.Tags()["scalars"]}


def plain(probs_TE: Tensor, chosen_TE: Tensor, load_TE: Tensor, mask_T: Tensor) -> tuple[float, list[float], float]:
    """Return the entropy, the experts' loads and the share of experts on, token by token."""
    entropies, loads, on = [], [0.0] * probs_TE.shape[1], []
    for token in range(len(mask_T)):
        if not mask_T[token]:
            continue
        shares = [max(p, 0.0) for p in probs_TE[token].tolist()]
        shares = [p / sum(shares) for p in shares]
        entropies.append(-sum(p * math.log(p) for p in shares if p > 0))
        loads = [sum(pair) for pair in zip(loads, load_TE[token].tolist(), strict=True)]
        on.append(sum(chosen_TE[token].tolist()) / probs_TE.shape[1])
    return sum(entropies) / len(entropies), [load / sum(loads) for load in loads], sum(on) / len(on)


def spread(loads: list[float]) -> float:
    mean = sum(loads) / len(loads)
    return math.sqrt(sum((load - mean) ** 2 for load in loads) / len(loads)) / mean


@pytest.mark.parametrize("top_k", [1, 2])
def test_what_tied_routers_do_is_what_a_loop_finds(top_k: int) -> None:
    dense = tiny.dense_model("llama")
    # one module is in no expert, so that stored ones are not all of the dense FFN's
    model = tied.tied_model(dense, num_experts_per_tok=top_k)
    model.config.num_modules = 9
    ids_BT, mask_BT = tiny.token_ids(), torch.ones(3, 21, dtype=torch.bool)
    mask_BT[1, 9:] = False
    mask_T = mask_BT.flatten()
    with torch.no_grad(), model.record_router_logits():
        model(input_ids=ids_BT, attention_mask=mask_BT.long())
    logits = dict(model.routing_state.logits)
    found = Curves(model)
    found.read(logits, mask_T)
    values = found.take(lambda tensor: tensor)

    wanted: dict[str, list[float]] = {"entropy": [], "load_cv": [], "load_max": [], "on": []}
    loads = []
    for layer, logits_TE in logits.items():
        probs_TE = logits_TE.softmax(-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(top_k).indices, 1.0)
        entropy, load, _ = plain(probs_TE, chosen_TE, chosen_TE, mask_T)
        loads.append(load)
        membership_ES = model.model.layers[layer].mlp.membership
        on = [
            sum(any(chosen_TE[token, e] and membership_ES[e, s] for e in range(3)) for s in range(8)) / 9
            for token in range(len(mask_T))
            if mask_T[token]
        ]
        for name, value in zip(wanted, (entropy, spread(load), max(load), sum(on) / len(on)), strict=True):
            wanted[name].append(value)
        assert values[f"router/entropy/layer_{layer}"] == pytest.approx(entropy, rel=1e-5)
        assert values[f"router/load_cv/layer_{layer}"] == pytest.approx(spread(load), rel=1e-5)
    assert values["router/entropy"] == pytest.approx(sum(wanted["entropy"]) / 2, rel=1e-5)
    assert values["router/load_cv"] == pytest.approx(sum(wanted["load_cv"]) / 2, rel=1e-5)
    assert values["router/load_max"] == pytest.approx(max(wanted["load_max"]))
    assert values["router/modules_on"] == pytest.approx(sum(wanted["on"]) / 2)
    for expert, name in enumerate(tied.NAMES):
        assert values[f"router/load/{name}"] == pytest.approx((loads[0][expert] + loads[1][expert]) / 2)
    assert found.take(lambda tensor: tensor) == {}

    # ranks that have parts of the batch find what one finds that has all of it
    halves = []
    for kept_T in (mask_T & (torch.arange(63) < 20), mask_T & (torch.arange(63) >= 20)):
        found.read(logits, kept_T)
        found.take(lambda tensor: halves.append(tensor) or tensor)
    found.read(logits, mask_T)
    assert found.take(lambda tensor: halves[0] + halves[1]) == pytest.approx(values)


# of every expert on, of some for a reason of the token's own, of a fixed number
@pytest.mark.parametrize("method", ["soft_moa", "adamole", "molora", "sparse_moa"])
def test_what_adapters_do_is_what_a_loop_finds(method: str) -> None:
    torch.manual_seed(0)
    model = get_peft_model(adapted.base_model("llama"), adapted.config_for(method))
    ids_BT, mask_BT = torch.randint(3, 64, (2, 11)), torch.ones(2, 11, dtype=torch.bool)
    mask_BT[0, 7:] = False
    model.train()
    model(input_ids=ids_BT, attention_mask=mask_BT.long())
    found = Curves(model.get_base_model())
    found.read({}, mask_BT.flatten())
    values = found.take(lambda tensor: tensor)
    routes = model.get_base_model().routed_context.run.routes
    assert routes
    entropies, spreads, largest, on = [], [], 0.0, []
    for route in routes:
        load_TE = route.weights_TE if route.chosen_TE.all() else route.chosen_TE
        entropy, load, share = plain(route.probs_TE, route.chosen_TE, load_TE, mask_BT.flatten())
        entropies.append(entropy)
        spreads.append(spread(load))
        largest = max(largest, *load)
        on.append(share)
    assert values["adapters/entropy"] == pytest.approx(sum(entropies) / len(routes), rel=1e-4)
    assert values["adapters/load_cv"] == pytest.approx(sum(spreads) / len(routes), rel=1e-4)
    assert values["adapters/load_max"] == pytest.approx(largest, rel=1e-5)
    assert values["adapters/experts_on"] == pytest.approx(sum(on) / len(routes), rel=1e-5)
    assert {f"adapters/entropy/layer_{layer}" for layer in range(2)} <= values.keys()
    assert not any(name.startswith("router/") for name in values)


def test_curves_lie_beside_the_output_and_training_is_the_same(
    room: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reads = []
    read = Curves.read
    monkeypatch.setattr(Curves, "read", lambda *args: reads.append(1) or read(*args))
    with caplog.at_level("INFO", "modmoe"):
        train(room, tmp_path / "with", report_to="tensorboard", max_steps=40)
    assert len(reads) == 20  # on the steps that are logged, of 40
    assert f"curves: tensorboard --logdir {tmp_path / 'with.logs'}" in caplog.text
    monkeypatch.setattr(Curves, "read", lambda *_: None)
    train(room, tmp_path / "without", max_steps=40)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["with", "with.logs", "without"]
    drawn, bare = Checkpoint(tmp_path / "with"), Checkpoint(tmp_path / "without")
    assert all(torch.equal(drawn[name], bare[name]) for name in bare)

    found = events(tmp_path / "with")
    log = json.loads((tmp_path / "with" / "modmoe_training.json").read_text())["log"]
    names = {"loss", "loss/text", "loss/distillation", "loss/balance", "learning_rate", "grad_norm"}
    names |= {f"router/{kind}" for kind in ("entropy", "load_cv", "load_max", "modules_on")}
    names |= {f"router/load/{name}" for name in tied.NAMES}
    assert names <= log[0].keys()
    for name in names:
        assert [step for step, _ in found[f"train/{name}"]] == [entry["step"] for entry in log] == [*range(2, 41, 2)]
        assert [value for _, value in found[f"train/{name}"]] == pytest.approx([entry[name] for entry in log])
    loads = [sum(entry[f"router/load/{name}"] for name in tied.NAMES) for entry in log]
    assert loads == pytest.approx([1.0] * 20)
    assert all(0 < entry["router/modules_on"] <= 1 for entry in log)


def test_a_resumed_run_goes_on_with_its_curves(room: Path, tmp_path: Path) -> None:
    def stop(message: str, done: int | None = None, total: int | None = None) -> None:
        if message == "training, steps" and done == 3:
            raise KeyboardInterrupt

    options = {"report_to": "tensorboard", "max_steps": 5, "save_steps": 2}
    with pytest.raises(KeyboardInterrupt):
        train(room, tmp_path / "out", progress=stop, **options)
    train(room, tmp_path / "out", resume=True, **options)
    steps = events(tmp_path / "out")["train/router/entropy"]
    # the step behind the last state is drawn twice, alike
    assert [step for step, _ in steps] in ([1, 2, 3, 4, 5], [1, 2, 3, 3, 4, 5])
    assert len(dict(steps)) == len(set(steps)) == 5


# wandb leaves a directory of its name where it runs, which passes for a package that has no code
@pytest.mark.parametrize("found", [None, ModuleSpec("trackio", None)])
def test_a_tracker_that_is_not_there_is_told_before_anything_is_done(
    found: ModuleSpec | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(curves.importlib.util, "find_spec", lambda name: found)
    (tmp_path / "dense").mkdir()
    (tmp_path / "b.txt").write_text("one")
    line = [
        "finetune",
        f"{tmp_path}/dense",
        f"{tmp_path}/out",
        "--task",
        f"a={tmp_path}/b.txt",
        "--report-to",
        "trackio",
    ]
    assert command(line) == 2
    said = capsys.readouterr().err
    assert "finetune.report_to (--report-to): trackio is not installed; run `pip install trackio`" in said
    assert len(said.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.txt", "dense"]


def test_an_unknown_tracker_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"finetune.report_to: no such value 'tensorbord'.*tensorboard"):
        make_recipe({"finetune.report_to": "tensorbord"})
