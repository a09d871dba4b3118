from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.trainer.sft_trainer import SFTTrainer

import modmoe
from modmoe.errors import CalibrationError, RecipeError
from modmoe.models.loading import load
from modmoe.recipe.schema import load_recipe, make_recipe
from modmoe.storage.checkpoint import Checkpoint, read_config
from modmoe.training import trainer
from modmoe.training.run import default_learning_rate, finetune
from modmoe.training.trainer import DivergedError, ModularTrainer
from tests.support import tied, tiny

# peft 0.21 asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
SMALL = {"finetune.batch_size": 2, "finetune.sequence_length": 32, "finetune.learning_rate": 3e-3}


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory with tiny models: dense, another vocabulary, and tied ones by routing."""
    base = tmp_path_factory.mktemp("finetune")
    # a model of the usual scale, so that training helps
    dense = tiny.dense_model("llama", initializer_range=0.05)
    tiny.save_dense(base / "dense", "llama", initializer_range=0.05)
    tiny.save_dense(base / "other", "llama", vocab_size=300)
    for routing in ("token", "sequence", "task"):
        tied.save_tied(base / routing, dense, base / "dense", routing=routing)
    return base


@pytest.fixture(scope="module")
def tasks(room: Path) -> dict[str, str]:
    return tiny.write_tasks(room / "tasks", rows=32)


def run(room: Path, out: Path, source: str, tasks: dict[str, str], *, progress: Any = None, **values: Any) -> Any:
    keys = {key if key == "seed" else f"finetune.{key}": value for key, value in values.items()}
    resume, overwrite = keys.pop("finetune.resume", False), keys.pop("finetune.overwrite", False)
    eval_tasks = keys.pop("finetune.eval_tasks", {})
    recipe = make_recipe({"source": str(room / source), "tasks": tasks, "device": "cpu", **SMALL, **keys})
    return finetune(
        str(room / source),
        str(out),
        recipe,
        eval_tasks=eval_tasks,
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return dict(Checkpoint(directory))


def changed(before: Path, after: Path) -> set[str]:
    old, new = tensors(before), tensors(after)
    assert old.keys() == new.keys()
    assert all(old[name].dtype == new[name].dtype for name in old)
    return {name for name in old if not torch.equal(old[name], new[name])}


def test_a_whole_checkpoint_of_the_same_form_is_written(
    room: Path, tmp_path: Path, tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[tuple[Any, ...]] = []
    log = SimpleNamespace(info=lambda text, *values: said.append((text % values,)))
    monkeypatch.setattr(trainer, "LOG", log)
    result = run(
        room,
        tmp_path / "out",
        "token",
        tasks,
        max_steps=12,
        distill_from=str(room / "dense"),
        eval_tasks=tasks,
        progress=lambda *words: said.append(words),
    )
    out = tmp_path / "out"
    assert result["steps"] == 12
    assert result["tokens"] > 12 * 2 * 20
    assert result["parameters"]["trainable"] == result["parameters"]["total"]
    assert result["loss"]["last"] < result["loss"]["first"]
    assert all(numbers["after"] < numbers["before"] for numbers in result["tasks"].values())
    steps = [words for words in said if words[0].startswith(("training, steps", "step "))]
    # the stage ends behind the line of its last step, and only once
    assert steps[-2][0].startswith("step 12/12: loss") and steps[-1] == ("training, steps", 12, 12)
    assert [words[1] for words in steps if len(words) == 3] == list(range(13))
    assert "lm_head.weight" not in tensors(out)  # tied to the embedding, and written once
    assert any(name.endswith("gate_proj.weight") for name in changed(room / "token", out))
    assert read_config(out) == read_config(room / "token")
    assert {"modeling_modmoe.py", "modular_ffn.py", "tokenizer.json", "modmoe.yaml"} <= {p.name for p in out.iterdir()}
    assert load_recipe(out / "modmoe.yaml").finetune.max_steps == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    logged = json.loads((out / "modmoe_training.json").read_text())["log"]
    assert {"loss", "loss/text", "loss/distillation", "loss/balance", "router/entropy"} <= logged[0].keys()
    load(out)


def test_only_routers_learn(room: Path, tmp_path: Path, tasks: dict[str, str]) -> None:
    run(room, tmp_path / "out", "sequence", tasks, train="router", max_steps=3)
    assert changed(room / "sequence", tmp_path / "out") == {
        f"model.layers.{layer}.mlp.router.weight" for layer in range(2)
    }


@pytest.mark.parametrize("source", ["token", "task", "dense"])
def test_lora_learns_the_ffns_and_the_routers(room: Path, tmp_path: Path, tasks: dict[str, str], source: str) -> None:
    result = run(room, tmp_path / "out", source, tasks, train="lora", lora_rank=2, max_steps=3)
    total = sum(weight.numel() for weight in load(room / source, device="cpu").parameters())
    assert 0 < result["parameters"]["trainable"] < result["parameters"]["total"] / 2 == total / 2
    names = {f"{part}_proj.weight" for part in ("gate", "up", "down")}
    names |= {"router.weight"} if source == "token" else set()
    assert changed(room / source, tmp_path / "out") == {
        f"model.layers.{layer}.mlp.{name}" for layer in range(2) for name in names
    }


def test_the_sources_type_is_restored(room: Path, tmp_path: Path, tasks: dict[str, str]) -> None:
    dense = tiny.dense_model("llama", initializer_range=0.05)
    source = tied.save_tied(tmp_path / "half", dense, room / "dense", torch.bfloat16, routing="token")
    result = run(tmp_path, tmp_path / "out", "half", tasks, max_steps=3, eval_tasks={"words": tasks["words"]})
    assert changed(source, tmp_path / "out")  # which also compares types
    from modmoe.models.loading import load_tokenizer
    from modmoe.training.evaluation.task_loss import evaluate_model

    # what is said of the model is said of the weights that were written
    model = load(tmp_path / "out", dtype=torch.float32, device="cpu")
    found = evaluate_model(
        model, load_tokenizer(tmp_path / "out"), {"words": tasks["words"]}, sequence_length=32, batch_size=2
    )
    assert found["words"]["loss"] == pytest.approx(result["tasks"]["words"]["after"], rel=1e-5)


@pytest.mark.parametrize("packing", [True, False])
def test_each_row_is_read_by_its_tasks_expert(room: Path, tmp_path: Path, tasks: dict[str, str], packing: bool) -> None:
    run(room, tmp_path / "out", "task", {"words": tasks["words"]}, max_steps=3, packing=packing)
    before, after = tensors(room / "task"), tensors(tmp_path / "out")
    for layer in range(2):
        prefix = f"model.layers.{layer}.mlp"
        has_S = before[f"{prefix}.membership"][tied.NAMES.index("words")]
        has_F = has_S.repeat_interleave(tiny.NEURONS // 8)
        moved_F = (before[f"{prefix}.up_proj.weight"] != after[f"{prefix}.up_proj.weight"]).any(1)
        assert torch.equal(moved_F, has_F)


def test_dense_models_are_trained_as_they_are(room: Path, tmp_path: Path, tasks: dict[str, str]) -> None:
    run(room, tmp_path / "out", "dense", tasks, max_steps=3)
    assert "model.layers.0.mlp.up_proj.weight" in changed(room / "dense", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.py"))


@pytest.mark.parametrize(
    ("source", "values", "words"),
    [
        ("dense", {"train": "router"}, "is dense and has no router; train lora or full"),
        ("task", {"train": "router"}, "is routed by task and has no router"),
        ("token", {"train": "adapters"}, "has no adapters; name one"),
        ("token", {"distill_from": "other"}, "predicts 300 tokens, the model that learns 264"),
        ("token", {"distill_from": "task"}, "is routed by task; name the dense model"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    room: Path, tmp_path: Path, tasks: dict[str, str], source: str, values: dict[str, Any], words: str
) -> None:
    if "distill_from" in values:
        values = {"distill_from": str(room / values["distill_from"])}
    with pytest.raises(RecipeError, match=words) as caught:
        run(room, tmp_path / "out", source, tasks, max_steps=2, **values)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_task_that_is_no_expert_is_refused(room: Path, tmp_path: Path, tasks: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match=r"tasks\.poems: is no expert .* its experts are sums, words, code"):
        run(room, tmp_path / "out", "task", {"poems": tasks["words"]}, max_steps=2)


def test_text_that_does_not_fit_is_refused(room: Path, tmp_path: Path) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"prompt": "x" * 100, "completion": "y"}) + "\n")
    with pytest.raises(CalibrationError, match=r"to learn from within 32 tokens \(1\); raise --sequence-length"):
        run(room, tmp_path / "out", "token", {"long": str(file)}, max_steps=2)


@pytest.mark.parametrize(("what", "good", "packing"), [("loss", 2, False), ("gradient", 3, True)])
def test_a_loss_that_is_no_number_stops(
    room: Path,
    tmp_path: Path,
    tasks: dict[str, str],
    packing: bool,
    what: str,
    good: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[torch.Tensor] = []
    real, norm = ModularTrainer.compute_loss, SFTTrainer._clip_grad_norm

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"])
        if what == "loss" and self.state.global_step == 3:
            model.get_input_embeddings().weight.data.fill_(torch.nan)
        return real(self, model, inputs, *args, **kwargs)

    def clip(self: Any, model: Any) -> Any:
        found = norm(self, model)
        return found * torch.inf if self.state.global_step == 3 else found

    monkeypatch.setattr(ModularTrainer, "compute_loss", compute_loss)
    if what == "gradient":
        monkeypatch.setattr(SFTTrainer, "_clip_grad_norm", clip)
    with pytest.raises(DivergedError, match=rf"^finetune: the {what} is (nan|inf) at step 4 \(rows of ") as caught:
        run(room, tmp_path / "out", "dense", tasks, max_steps=5, save_steps=1, packing=packing)
    said = str(caught.value)
    assert "; lower finetune.learning_rate (now 0.003), or look for damage" in said and "\n" not in said
    # the rows that are named are those that were read
    text = "".join(tiny.tokenizer().decode(row) for row in seen[-1])
    rows = re.search(r"\(rows of the batch: (.*?)\);", said)
    assert rows is not None and len(seen) == 4
    named = [(part.split()[0], int(number)) for part in rows[1].split("; ") for number in re.findall(r"\d+", part)]
    assert named
    for task, number in named:
        row = json.loads(Path(tasks[task]).read_text().splitlines()[number - 1])
        assert row.get("text", f"{row.get('prompt')}{row.get('completion')}")[-4:] in text
    # the state that is named has weights that gave a finite loss
    state = tmp_path / "out.states" / f"checkpoint-{good}"
    assert said.endswith(f"The last good state is {state}.")
    assert all(bool(weight.isfinite().all()) for weight in load(state, device="cpu").parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["out.states"]


def test_a_state_is_no_source_of_the_run_that_removes_it(room: Path, tmp_path: Path, tasks: dict[str, str]) -> None:
    with pytest.raises(KeyboardInterrupt) as caught:
        run(room, tmp_path / "out", "token", tasks, max_steps=4, save_steps=2, progress=stop_at(3))
    states = tmp_path / "out.states"
    assert caught.value.__notes__ == [f"Training up to step 2 is kept in {states}; go on with --resume."]
    with pytest.raises(RecipeError, match=r"the source \(.*\) lies where this run keeps what is unfinished"):
        modmoe.finetune(str(states / "checkpoint-2"), str(tmp_path / "out"), tasks=tasks, max_steps=2, overwrite=True)
    run(states, tmp_path / "other", "checkpoint-2", tasks, max_steps=2)
    assert changed(states / "checkpoint-2", tmp_path / "other")


def test_room_for_the_states_is_looked_for_first(
    room: Path, tmp_path: Path, tasks: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = sum(weight.numel() for weight in load(room / "token", device="cpu").parameters())
    # three states, each with the optimiser's two numbers a weight, and the output
    free = SimpleNamespace(free=4 * (3 * 3 * weights + weights) - 1)
    monkeypatch.setattr("modmoe.storage.staging.shutil.disk_usage", lambda _: free)
    with pytest.raises(RecipeError, match=r"needs [\d,]+ bytes, and [\d,]+ are free there"):
        run(room, tmp_path / "out", "token", tasks, max_steps=9, save_steps=2)
    assert list(tmp_path.iterdir()) == []
    run(room, tmp_path / "out", "token", tasks, max_steps=1, save_steps=2)


def stop_at(step: int | None, error: type[BaseException] = KeyboardInterrupt) -> Callable[..., None]:
    """Stop a run behind a step, or while its checkpoint is written."""

    def progress(message: str, done: int | None = None, total: int | None = None) -> None:
        if (message.startswith("training") and done == step) or (message == "writing" and step is None):
            raise error

    return progress


@pytest.mark.parametrize("train", ["full", "lora", "router"])
@pytest.mark.parametrize(("step", "again"), [(3, [3, 4, 5, 6]), (6, [5, 6]), (None, [])])
def test_a_resumed_run_is_the_unbroken_one(
    room: Path, tmp_path: Path, tasks: dict[str, str], train: str, step: int | None, again: list[int]
) -> None:
    values = {"train": train, "max_steps": 6, "save_steps": 2, "lora_rank": 2, "distill_from": str(room / "dense")}
    whole = run(room, tmp_path / "whole", "token", tasks, **values)
    with pytest.raises(KeyboardInterrupt):
        run(room, tmp_path / "out", "token", tasks, progress=stop_at(step), **values)
    assert not (tmp_path / "out").exists()
    steps: list[int] = []

    def note(message: str, done: int | None = None, total: int | None = None) -> None:
        if message.startswith("training") and done is not None:
            steps.append(done)  # the first is where it begins

    resumed = run(room, tmp_path / "out", "token", tasks, resume=True, progress=note, **values)
    assert steps[1:] == again
    assert not changed(tmp_path / "whole", tmp_path / "out")
    for key in ("steps", "tokens", "parameters", "loss"):
        assert resumed[key] == whole[key]


@pytest.mark.parametrize("left", ["", "[" * 100_000], ids=["empty", "deep"])
def test_a_state_cut_short_is_passed_over(room: Path, tmp_path: Path, tasks: dict[str, str], left: str) -> None:
    values = {"max_steps": 5, "save_steps": 2}
    run(room, tmp_path / "whole", "token", tasks, **values)
    with pytest.raises(RuntimeError):
        run(room, tmp_path / "out", "token", tasks, progress=stop_at(5, RuntimeError), **values)
    states = tmp_path / "out.states"
    assert {path.name for path in states.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    (states / "checkpoint-4" / "trainer_state.json").write_text(left)
    run(room, tmp_path / "out", "token", tasks, resume=True, **values)
    assert not changed(tmp_path / "whole", tmp_path / "out")


def test_a_changed_recipe_is_refused_by_the_key(room: Path, tmp_path: Path, tasks: dict[str, str]) -> None:
    values = {"max_steps": 4, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run(room, tmp_path / "out", "token", tasks, progress=stop_at(3), **values)
    with pytest.raises(RecipeError, match=r"^finetune\.learning_rate: is 0\.001, but 0\.003 in the run") as caught:
        run(room, tmp_path / "out", "token", tasks, resume=True, learning_rate=1e-3, **values)
    assert "\n" not in str(caught.value)
    with pytest.raises(RecipeError, match=r"^seed: is 1, but 0"):
        run(room, tmp_path / "out", "token", tasks, resume=True, seed=1, **values)
    other = tmp_path / "words.jsonl"
    shutil.copyfile(tasks["words"], other)
    changed_tasks = {**tasks, "words": str(other)}
    with pytest.raises(RecipeError, match=r"^tasks: "):
        run(room, tmp_path / "out", "token", changed_tasks, resume=True, **values)
    # the states are still there
    assert run(room, tmp_path / "out", "token", tasks, resume=True, **{**values, "save_steps": 2})["steps"] == 4


def test_changed_text_is_refused(room: Path, tmp_path: Path) -> None:
    tasks = tiny.write_tasks(tmp_path / "tasks", rows=20)
    values = {"max_steps": 4, "save_steps": 1}
    with pytest.raises(KeyboardInterrupt):
        run(room, tmp_path / "out", "token", tasks, progress=stop_at(3), **values)
    text = Path(tasks["words"]).read_text()
    Path(tasks["words"]).write_text(text.replace("stone", "stove"))
    with pytest.raises(RecipeError, match="tasks: the text is not that of the run"):
        run(room, tmp_path / "out", "token", tasks, resume=True, **values)


def test_nothing_to_resume_begins_anew(
    room: Path, tmp_path: Path, tasks: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="modmoe"):
        assert run(room, tmp_path / "out", "token", tasks, resume=True, max_steps=2)["steps"] == 2
    assert "there is no state to go on from" in caplog.text
    assert "step 2/2: loss" in caplog.text


def test_nothing_is_printed(
    room: Path, tmp_path: Path, tasks: dict[str, str], capfd: pytest.CaptureFixture[str]
) -> None:
    run(room, tmp_path / "out", "token", tasks, max_steps=2)
    assert capfd.readouterr().out == ""


def test_an_output_that_is_not_free_is_refused_at_once(room: Path, tmp_path: Path, tasks: dict[str, str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(RecipeError, match="is not empty"):
        run(room, tmp_path / "out", "token", tasks, max_steps=2)
    with pytest.raises(RecipeError, match="holds 'file', which modmoe did not write"):
        run(room, tmp_path / "out", "token", tasks, max_steps=2, overwrite=True)
    (tmp_path / "out" / "file").unlink()
    for overwrite in (False, True):
        run(room, tmp_path / "out", "token", tasks, max_steps=2, overwrite=overwrite)
    assert (tmp_path / "out" / "config.json").is_file()


def test_wide_models_take_small_steps() -> None:
    assert default_learning_rate("full", 64) == pytest.approx(1e-3)
    assert default_learning_rate("full", 4096) == pytest.approx(5e-5)
    assert default_learning_rate("lora", 500) == pytest.approx(3 * default_learning_rate("full", 500)) == 6e-4
