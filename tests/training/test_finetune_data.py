from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe.analysis.text.encoding import encode_row
from modmoe.training.data import IGNORED, Collator, keeps_rows_apart, training_set
from modmoe.training.losses import balance_loss, token_losses
from tests.support import tied, tiny

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</{{ m['role'] }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def counted_text(row: dict[str, Any], tokenizer: Any, **kwargs: Any) -> str:
    made = encode_row(row, tokenizer, **kwargs)
    ids = [token for token, counts in zip(made.input_ids, made.counted, strict=True) if counts]
    return str(tokenizer.decode(ids))


def test_a_text_counts_but_for_its_first_token() -> None:
    made = encode_row({"text": "añb"}, tiny.tokenizer())
    assert made.counted == [False, True, True, True]
    # the two bytes of one character: both are counted once
    assert made.num_bytes == [1, 2, 0, 1]


def test_a_completion_counts_alone() -> None:
    row = {"prompt": "1+1=", "completion": "2."}
    assert counted_text(row, tiny.tokenizer()) == "2."
    assert counted_text(row, tiny.tokenizer(), end=True) == "2.</s>"
    made = encode_row(row, tiny.tokenizer(), end=True)
    assert sum(n for n, counts in zip(made.num_bytes, made.counted, strict=True) if counts) == 2


def test_the_assistants_turns_count() -> None:
    tokenizer = tiny.tokenizer()
    turns = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "more"},
        {"role": "assistant", "content": "no"},
    ]
    assert counted_text({"messages": turns}, tokenizer) == "hono"
    tokenizer.chat_template = TEMPLATE
    assert counted_text({"messages": turns}, tokenizer) == "ho</assistant>no</assistant>"
    # where none of them is the assistant's there is nothing to learn
    assert counted_text({"messages": turns[:1]}, tokenizer) == ""


def test_a_tokenizer_without_offsets_is_measured_by_decoding() -> None:
    class Slow:
        is_fast = False
        inner = tiny.tokenizer()
        eos_token_id = inner.eos_token_id

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": self.inner(texts)["input_ids"]}

        def decode(self, ids: list[int], **kwargs: Any) -> str:
            return str(self.inner.decode(ids, **kwargs))

    row = {"prompt": "1+1=", "completion": "2."}
    assert encode_row(row, Slow()) == encode_row(row, tiny.tokenizer())


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_long_texts_become_several_sequences(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "abcdefghij"}])
    made = training_set(tiny.tokenizer(), {"a": file}, sequence_length=4, num_sequences=9, seed=0)
    assert [bytes(ids).decode() for ids in _as_bytes(made["input_ids"])] == ["abcd", "efgh", "ij"]
    assert [labels[0] for labels in made["labels"]] == [IGNORED] * 3


def _as_bytes(column: Any) -> list[list[int]]:
    tokenizer = tiny.tokenizer()
    return [list(tokenizer.decode(ids).encode()) for ids in column]


def test_no_more_rows_are_read_than_training_needs(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": f"{number:04}"} for number in range(100)])
    values: dict[str, Any] = {"sequence_length": 8, "num_sequences": 5}
    made = training_set(tiny.tokenizer(), {"a": file}, seed=0, **values)
    assert len(made) == 5
    again = training_set(tiny.tokenizer(), {"a": file}, seed=0, **values)
    other = training_set(tiny.tokenizer(), {"a": file}, seed=1, **values)
    assert made["input_ids"][:] == again["input_ids"][:] != other["input_ids"][:]
    packed = training_set(tiny.tokenizer(), {"a": file}, seed=0, packing=True, **values)
    assert len(packed) == 5
    assert packed["seq_lengths"][0] == [4, 4]


def test_a_batch_is_padded_and_tells_rows_apart(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [{"text": "a" * 3}, {"text": "b" * 2}, {"text": "c" * 4}])
    made = training_set(
        tiny.tokenizer(), {"a": file}, sequence_length=5, num_sequences=9, seed=0, experts=["b", "a"], packing=True
    )
    batch = Collator(padding=258, packing=True)([made[number] for number in range(len(made))])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]]
    assert batch["token_mask"].tolist() == [[True] * 4 + [False], [True] * 5]
    assert batch["expert_ids"].tolist() == [[1] * 4 + [0], [1] * 5]
    assert batch["labels"][0, -1] == IGNORED
    assert batch["input_ids"][0, -1] == 258
    assert "attention_mask" not in batch


@pytest.mark.parametrize("routing", ["dense", "token", "sequence", "task"])
def test_a_packed_sequence_has_the_losses_of_its_rows(tmp_path: Path, routing: str) -> None:
    model = tiny.dense_model("llama")
    if routing != "dense":
        model = tied.tied_model(model, routing=routing, routing_chunk=4)
    tasks = tiny.write_tasks(tmp_path, rows=6)
    losses = []
    for packing in (True, False):
        made = training_set(
            tiny.tokenizer(),
            tasks,
            sequence_length=64,
            num_sequences=99,
            seed=0,
            experts=tied.NAMES if routing == "task" else None,
            packing=packing,
        )
        batch = Collator(padding=258, packing=packing)([made[number] for number in range(len(made))])
        labels_BT = batch.pop("labels")[:, 1:]
        batch.pop("token_mask")
        with torch.no_grad():
            logits_BTV = model(**batch, use_cache=False).logits[:, :-1]
        counts_BT = labels_BT != IGNORED
        losses.append(token_losses(logits_BTV[counts_BT], labels_BT[counts_BT])[0].item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", sorted(tiny.CONFIGS))
def test_architectures_keep_packed_rows_apart(family: str) -> None:
    model = tiny.dense_model(family)
    # OPT reads positions off the attention mask, so its rows are not packed
    assert keeps_rows_apart(model) == (family != "opt")
    assert not model.training


def test_a_model_that_ignores_positions_is_found_out() -> None:
    model = tiny.dense_model("llama")
    forward = model.forward
    model.forward = lambda position_ids=None, **kwargs: forward(**kwargs)
    assert not keeps_rows_apart(model)


def test_losses_are_what_they_say() -> None:
    torch.manual_seed(0)
    logits_NV, teacher_NV = torch.randn(7, 11, requires_grad=True), torch.randn(7, 11)
    target_N = torch.randint(0, 11, (7,))
    text, distill = token_losses(logits_NV, target_N, teacher_NV, temperature=2.0)
    wanted_text = -logits_NV.log_softmax(-1)[range(7), target_N].mean()
    p_NV, q_NV = (teacher_NV / 2).softmax(-1), (logits_NV / 2).softmax(-1)
    wanted_distill = 4 * (p_NV * (p_NV.log() - q_NV.log())).sum(-1).mean()
    torch.testing.assert_close(text, wanted_text)
    torch.testing.assert_close(distill, wanted_distill)
    assert token_losses(logits_NV, target_N)[1] is None
    assert token_losses(teacher_NV, target_N, teacher_NV)[1] == pytest.approx(0, abs=1e-6)


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    target_N = torch.randint(0, 11, (7,))
    results = []
    for numbers in (10**6, 11 * 3):
        monkeypatch.setattr("modmoe.training.losses._CHUNK_NUMBERS", numbers)
        logits_NV = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)).requires_grad_()
        teacher_NV = torch.randn(7, 11, generator=torch.Generator().manual_seed(2))
        text, distill = token_losses(logits_NV, target_N, teacher_NV)
        assert distill is not None
        (text + distill).backward()
        results.append((text.detach(), distill.detach(), logits_NV.grad))
    torch.testing.assert_close(results[0], results[1])


def test_balance_is_one_where_experts_are_used_evenly() -> None:
    even_TE = 50 * torch.eye(4).repeat(3, 1)
    mask_T = torch.ones(12, dtype=torch.bool)
    assert balance_loss({0: even_TE, 1: even_TE}, mask_T, 1).item() == pytest.approx(1)
    one_TE = even_TE[:1].repeat(12, 1)
    assert balance_loss({0: one_TE}, mask_T, 1).item() == pytest.approx(4)
    # padding does not count
    padded_TE = torch.cat([even_TE, one_TE])
    padded_T = torch.cat([mask_T, ~mask_T])
    assert balance_loss({0: padded_TE}, padded_T, 1).item() == pytest.approx(1)
    # two of four, evenly
    pairs_TE = torch.tensor([[9.0, 9.0, 0.0, 0.0], [0.0, 0.0, 9.0, 9.0]])
    assert balance_loss({0: pairs_TE}, mask_T[:2], 2).item() == pytest.approx(1)
