from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from modmoe import api
from modmoe.errors import CalibrationError, RecipeError
from modmoe.training.evaluation.task_loss import decode_speed, evaluate, evaluate_model
from tests.support import native_models, tied, tiny

KEYS = {"loss", "perplexity", "bits_per_byte", "tokens", "tokens_per_second"}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return tiny.write_tasks(tmp_path_factory.mktemp("tasks"), rows=10)


def test_the_loss_is_that_of_each_row_alone(tasks: dict[str, str]) -> None:
    model, tokenizer = tiny.dense_model("llama"), tiny.tokenizer()
    found = evaluate_model(model, tokenizer, tasks)
    for name, numbers in found.items():
        has_prompts = "prompt" in Path(tasks[name]).read_text()
        assert numbers.keys() == KEYS | ({"exact_match"} if has_prompts else set())
        total, count = 0.0, 0
        for line in Path(tasks[name]).read_text().splitlines():
            row = json.loads(line)
            prompt, text = row.get("prompt", ""), row.get("prompt", "") + row.get("completion", row.get("text", ""))
            ids_T = torch.tensor(tokenizer(text)["input_ids"])
            first = max(len(prompt), 1)
            with torch.no_grad():
                logits_TV = model(ids_T[None]).logits[0]
            losses_T = torch.nn.functional.cross_entropy(logits_TV[:-1], ids_T[1:], reduction="none")[first - 1 :]
            total, count = total + losses_T.double().sum().item(), count + len(losses_T)
        assert numbers["tokens"] == count
        assert numbers["loss"] == pytest.approx(total / count, rel=1e-5)
        assert numbers["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
        # the tokenizer makes a token of each byte
        assert numbers["bits_per_byte"] == pytest.approx(total / count / math.log(2), rel=1e-5)
        assert numbers["tokens_per_second"] > 0


@torch.no_grad()
def test_exact_matches_are_what_greedy_decoding_gives(tmp_path: Path) -> None:
    model, tokenizer = tiny.dense_model("llama"), tiny.tokenizer()
    rows = []
    for number in range(200):
        prompt = f"{number} is "
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        made = model.generate(ids, max_new_tokens=2, do_sample=False)[0]
        text = tokenizer.decode(made)
        if tokenizer(text)["input_ids"] == made.tolist():
            rows.append((prompt, text[len(prompt) :]))
    assert len(rows) >= 3, "no greedy text that can be written down; take another seed"
    rows = [*rows[:2], (rows[2][0], rows[2][1][0] + "~"), (rows[2][0], "~" + rows[2][1][1])]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows))
    for batch_size in (1, 4):
        found = evaluate_model(model, tokenizer, {"t": str(tmp_path / "t.jsonl")}, batch_size=batch_size)
        assert found["t"]["exact_match"] == 0.5


@pytest.mark.parametrize("routing", ["token", "sequence", "task"])
def test_batches_and_padding_move_nothing(tasks: dict[str, str], routing: str) -> None:
    model = tied.tied_model(tiny.dense_model("llama"), routing=routing, routing_chunk=4)
    found = [evaluate_model(model, tiny.tokenizer(), tasks, batch_size=size) for size in (1, 3, 64)]
    for name in tasks:
        assert found[1][name]["loss"] == pytest.approx(found[0][name]["loss"], rel=1e-5)
        assert found[2][name]["loss"] == pytest.approx(found[0][name]["loss"], rel=1e-5)
        assert found[2][name]["tokens"] == found[0][name]["tokens"]


def test_no_more_tokens_than_asked_for(tasks: dict[str, str]) -> None:
    model = tiny.dense_model("llama")
    whole = evaluate_model(model, tiny.tokenizer(), {"words": tasks["words"]})["words"]["tokens"]
    found = evaluate_model(model, tiny.tokenizer(), {"words": tasks["words"]}, tokens=120)["words"]["tokens"]
    assert whole > 120 >= found > 0
    short = evaluate_model(model, tiny.tokenizer(), {"words": tasks["words"]}, sequence_length=5)["words"]["tokens"]
    assert short == 40


def test_a_task_is_read_by_its_expert(tasks: dict[str, str]) -> None:
    model = tied.tied_model(tiny.dense_model("llama"), routing="task").train()
    found = evaluate_model(model, tiny.tokenizer(), tasks)
    assert model.training
    assert model.routing_state.expert is None
    same = evaluate_model(model, tiny.tokenizer(), {"words": tasks["words"]}, expert="words")["words"]
    other = evaluate_model(model, tiny.tokenizer(), {"words": tasks["words"]}, expert="code")["words"]
    assert same["loss"] == found["words"]["loss"] != other["loss"]
    poems = {"poems": tasks["words"]}
    with pytest.raises(RecipeError, match=r"tasks\.poems: is no expert .* one of sums, words, code, or pass --expert"):
        evaluate_model(model, tiny.tokenizer(), poems)
    with pytest.raises(RecipeError, match=r"no expert 'wrods'\. Did you mean 'words'"):
        evaluate_model(model, tiny.tokenizer(), poems, expert="wrods")
    assert evaluate_model(model, tiny.tokenizer(), poems, expert="words")["poems"]["loss"] == same["loss"]
    model.set_expert("code")  # as a default expert does
    assert evaluate_model(model, tiny.tokenizer(), poems)["poems"]["loss"] == other["loss"]
    assert evaluate_model(model, tiny.tokenizer(), {"words": tasks["words"]})["words"]["loss"] == same["loss"]


def test_dense_models_have_no_experts(tasks: dict[str, str]) -> None:
    with pytest.raises(RecipeError, match="the model is dense and has no experts"):
        evaluate_model(tiny.dense_model("llama"), tiny.tokenizer(), tasks, expert="words")


def test_text_without_a_token_to_predict_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n')
    with pytest.raises(CalibrationError, match="no row has anything to learn from: no token to learn from within 256"):
        evaluate_model(tiny.dense_model("llama"), tiny.tokenizer(), {"a": str(file)})


def test_a_baseline_lies_beside(tmp_path: Path, tasks: dict[str, str]) -> None:
    dense = tiny.save_dense(tmp_path / "dense")
    source = tied.save_tied(tmp_path / "tied", tiny.dense_model("llama"), dense, routing="task")
    found = evaluate(str(source), tasks, baseline=str(dense), device="cpu")
    assert found.keys() == {"tasks", "baseline", "read"}
    for name, numbers in found["tasks"].items():
        assert numbers.keys() - {"exact_match"} == KEYS | {"ratio"}
        assert found["baseline"][name].keys() - {"exact_match"} == KEYS
        assert numbers["ratio"] == pytest.approx(numbers["loss"] / found["baseline"][name]["loss"])
    same = evaluate(str(dense), tasks, baseline=str(dense), device="cpu")["tasks"]
    assert all(numbers["ratio"] == 1 for numbers in same.values())
    assert evaluate(str(source), {"words": tasks["words"]}, device="cpu").keys() == {"tasks", "read"}


def test_decoding_speed_is_measured(tmp_path: Path) -> None:
    model = tied.tied_model(tiny.dense_model("llama"), routing="token").train()
    assert decode_speed(model, tiny.tokenizer(), "hello", 4) > 0
    assert model.training


def test_a_native_model_of_any_width_is_read_on_a_cpu(tmp_path: Path, tasks: dict[str, str]) -> None:
    source = native_models.write_native_source(tmp_path, "qwen3", "core")  # 18 neurons an expert
    api.export(source, tmp_path / "native", form="native", target="qwen3_moe", verify=False)
    found = evaluate(str(tmp_path / "native"), {"words": tasks["words"]}, baseline=str(source), tokens=200)
    assert found["tasks"]["words"]["ratio"] == pytest.approx(1, rel=1e-4)
