"""Rows mean what they say: each is read in its own form, whole, or it is counted, or refused by its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe.analysis.text.calibration import load_task
from modmoe.analysis.text.encoding import encode_row, encode_rows
from modmoe.analysis.text.reading import Reading
from modmoe.analysis.text.rows import TaskRows
from modmoe.errors import CalibrationError, CheckpointError
from modmoe.training.data import training_set
from modmoe.training.evaluation.task_loss import evaluate_model
from tests.support import tiny

TEMPLATE = (
    "{% if tools %}[tools]{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% for c in m.tool_calls or [] %}!{{ c.function | tojson }}{% endfor %}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLS = [{"id": "1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
OTHER = [{"id": "2", "type": "function", "function": {"name": "g", "arguments": {"b": "x", "c": [None]}}}]
BARE = "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}"
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def talk(answer: Any, **more: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer, **more}]


def counted_text(row: dict[str, Any], tokenizer: Any, **options: Any) -> str:
    encoded = encode_row(row, tokenizer, **options)
    return str(tokenizer.decode([i for i, counts in zip(encoded.input_ids, encoded.counted, strict=True) if counts]))


def test_every_row_is_read_in_its_own_form(tmp_path: Path) -> None:
    rows = [
        {"prompt": "p", "completion": "c", "id": 1},
        {"text": "t", "source": "x"},
        "s",
        {"messages": talk("a"), "text": None},
        {"prompt": "left", "completion": None, "text": "whole"},
        {"prompt": talk("a")[:1], "completion": talk("a")[1:]},
    ]
    found = load_task("t", write(tmp_path / "t.jsonl", rows))
    wanted = [{"prompt": "p", "completion": "c"}, {"text": "t"}, {"text": "s"}, {"messages": talk("a")}]
    assert list(found) == [*wanted, {"text": "whole"}, rows[5]]
    assert (found.num_in_file, found.num_ambiguous) == (6, 1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "a", "answer": "b"}, "no usable column among question, answer; rename"),
        ({"prompt": "a"}, "has 'prompt' without 'completion'"),
        ({"prompt": "a", "completion": talk("b")}, "one is text and one is messages"),
        ({"messages": [{"role": "user"}]}, "message 1 lacks 'role' or 'content'"),
        ({"messages": talk({"a": 1})}, "message 2: 'content' is a dict, not text"),
        ({"messages": talk([{"type": "image_url", "image_url": "x"}])}, "a part of type 'image_url', and only text"),
        ({"messages": talk("", tool_calls=[{"id": "1"}])}, "a tool call has no 'name'"),
        ({"messages": talk("", tool_calls="[1")}, "'tool_calls' is a string that is not JSON"),
        ({"messages": talk("a"), "tools": 3}, "'tools' is not a list of objects"),
        ({"messages": talk("a", thinking="\ud800")}, "half a surrogate pair"),
        ({"messages": talk("a", weight=0.5)}, "message 2: 'weight' is 0.5; write 1 to learn it, 0 not to"),
        ({"messages": talk("a", weight="no")}, "message 2: 'weight' is 'no'; write 1"),
        ({"prompt": talk("a"), "completion": talk("b", weight=0)}, "'weight' 0; write the row as 'messages'"),
    ],
)
def test_what_cannot_be_read_is_refused_by_its_row(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    file = write(tmp_path / "t.jsonl", [{"text": "a"}, {}, row])
    with pytest.raises(CalibrationError) as caught:
        load_task("t", file)
    assert str(caught.value).startswith(f"tasks.t: {file}: row 3: ") and said in str(caught.value)


def test_messages_keep_their_keys_and_get_no_others(tmp_path: Path) -> None:
    rows = [
        {"messages": talk(None, tool_calls=CALLS, reasoning_content="hm"), "tools": json.dumps(TOOLS)},
        {"messages": [*talk("b", weight=1), {"role": "tool", "name": "g", "tool_call_id": "2", "content": "x"}]},
        {"messages": talk("", tool_calls=OTHER), "tools": []},
    ]
    wanted = [
        {"messages": talk(None, tool_calls=CALLS, reasoning_content="hm"), "tools": TOOLS},
        rows[1],
        {"messages": talk("", tool_calls=OTHER)},
    ]
    wanted[0]["messages"][1].pop("content")
    assert list(load_task("t", write(tmp_path / "t.jsonl", rows))) == wanted
    # parquet gives every message and every call all keys
    from datasets import Dataset

    rows[2]["messages"][1]["tool_calls"][0]["function"]["arguments"] = {"b": "x"}
    rows[2].pop("tools")
    Dataset.from_list(rows).to_parquet(str(tmp_path / "t.parquet"))
    assert list(load_task("t", str(tmp_path / "t.parquet"))) == wanted


@pytest.mark.parametrize("calls", [CALLS, json.dumps(CALLS), [json.dumps(CALLS[0])]], ids=["object", "json", "list"])
@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS), [json.dumps(TOOLS[0])]], ids=["object", "json", "list"])
def test_tools_and_calls_reach_the_template(tmp_path: Path, calls: Any, tools: Any) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = TEMPLATE
    (row,) = load_task("t", write(tmp_path / "t.jsonl", [{"messages": talk(None, tool_calls=calls), "tools": tools}]))
    encoded = encode_row(row, tokenizer)
    whole = tokenizer.apply_chat_template(talk(None, tool_calls=CALLS), tools=TOOLS)["input_ids"]
    assert encoded.input_ids == whole
    assert counted_text(row, tokenizer) == f"!{json.dumps(CALLS[0]['function'])}<end>"
    assert encoded.lost == []


@pytest.mark.parametrize(
    ("template", "row", "wanted"),
    [
        (None, {"messages": talk("a", tool_calls=CALLS), "tools": TOOLS}, ["the tools of 3", "the tool calls of 3"]),
        (BARE, {"messages": talk("a", tool_calls=CALLS)}, ["the tool calls"]),
        (BARE, {"messages": talk("a", thinking="h")}, ["the reasoning"]),
        (TEMPLATE, {"messages": talk("a", tool_calls=CALLS), "tools": TOOLS}, []),
        (None, {"prompt": "one", "completion": "two"}, ["3 of 3 rows have no white space"]),
        (None, {"prompt": "one ", "completion": "two"}, []),
        (None, {"prompt": "one ", "completion": "two", "tools": TOOLS}, ["the tools beside text of 3 rows are not"]),
        (BARE, {"messages": talk("a", tool_calls=CALLS), "tools": TOOLS}, ["the tools of 3 rows", "the tool calls of"]),
        (None, {"prompt": "\u4e00", "completion": "\u4e8c"}, []),
        (TEMPLATE, {"prompt": "one ", "completion": "two"}, ["a chat template, which 3 of 3 rows do not"]),
        (None, {"text": "one", "messages": talk("a")}, ["3 rows have text in more than one form"]),
    ],
)  # fmt: skip
def test_what_may_not_be_meant_is_told_once(
    tmp_path: Path, template: str | None, row: dict[str, Any], wanted: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    readings: dict[str, Reading] = {}
    file = write(tmp_path / "t.jsonl", [row] * 3)
    training_set(tokenizer, {"t": file}, sequence_length=200, num_sequences=9, seed=0, readings=readings)
    with caplog.at_level("DEBUG", logger="modmoe"):
        readings["t"].tell()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == len(wanted)
    assert all(words in line and line.startswith("warning: t: ") for words, line in zip(wanted, told, strict=True))
    assert caplog.records[0].getMessage().startswith("t: 3 of 3 rows read, ")
    assert "[[" in caplog.records[-1].getMessage()


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": "p", "completion": None}, {"prompt": "p", "completion": " "}], "completion is empty (2); fill in"),
        ([{"messages": talk("a")[:1]}], "no message is the assistant's (1); give messages whose 'role' is 'assistant'"),
        ([{"messages": talk("a", weight=0)}], "the assistant's messages have weight 0 (1); write 1 as the 'weight'"),
        ([{"messages": talk(None)}, {"text": " "}], "the assistant's messages are empty (1); fill in the 'content'"),
        ([{"prompt": "p" * 40, "completion": "c"}], "within 32 tokens (1); raise --sequence-length"),
        ([{"prompt": "p", "completion": ""}] * 2 + [{"text": "a"}], "the completion is empty (2), no token to learn"),
        ([{"prompt": talk("a"), "completion": []}], "the completion is empty (1)"),
        ([{"messages": talk("", tool_calls=CALLS)}], "text that the model reads (1); use a model whose chat template"),
    ],
)  # fmt: skip
def test_a_task_with_nothing_to_learn_from_is_refused_by_its_reason(
    tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    tasks = {"other": write(tmp_path / "a.jsonl", [{"text": "abc"}]), "t": write(tmp_path / "t.jsonl", rows)}
    with pytest.raises(CalibrationError) as trained:
        training_set(tiny.tokenizer(), tasks, sequence_length=32, num_sequences=9, seed=0)
    with pytest.raises(CalibrationError) as measured:
        evaluate_model(tiny.dense_model("llama"), tiny.tokenizer(), tasks, sequence_length=32)
    for caught in (trained, measured):
        assert str(caught.value).startswith(f"tasks.t: {tasks['t']}: no row has anything to learn from: ")
        assert said in str(caught.value)


def test_rows_with_nothing_to_learn_from_are_counted(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}, {"text": ""}, {"messages": talk("")}]
    rows += [{"prompt": "p" * 40, "completion": "c"}, {"prompt": "p", "completion": "c" * 40}, {"text": "t" * 70}]
    readings: dict[str, Reading] = {}
    file = write(tmp_path / "t.jsonl", rows)
    training_set(tiny.tokenizer(), {"t": file}, sequence_length=32, num_sequences=9, seed=0, readings=readings)
    found = readings["t"].summary()
    assert (found["rows"], found["rows_in_file"], found["counted"], found["cut"]) == (3, 7, 2 + 31 + 67, 1)
    assert found["left_out"] == {
        "the row is empty": 1,
        "the completion is empty": 1,
        "the assistant's messages are empty": 1,
        "no token to learn from within 32 tokens": 1,
    }


STRINGS = [
    {"prompt": "Once upon a ti", "completion": "me there was"},
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"prompt": "", "completion": "All of it."},
    {"prompt": "def f(x):\n   ", "completion": "    return x\n"},
    {"prompt": "Ends with", "completion": " what ends it</s>"},
]
CHATS = [
    {"prompt": talk("a")[:1], "completion": talk("The answer.")[1:]},
    {"prompt": [*talk("a"), talk("a")[0]], "completion": [*talk("b")[1:], *talk("c")]},
]


@pytest.mark.parametrize("rows", [STRINGS, CHATS], ids=["text", "messages"])
def test_prompt_and_completion_are_joined_as_trl_joins_them(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from modmoe.demo.main_job import MODEL

    # one with merges, so that a token can lie over the boundary
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.chat_template = TEMPLATE
    ours = [encode_row(row, tokenizer, end=True) for row in rows]
    settings = SFTConfig(
        output_dir=str(tmp_path),
        report_to="none",
        use_cpu=True,
        bf16=False,
        max_length=None,
        disable_tqdm=True,
        activation_checkpointing=False,
    )
    model = tiny.dense_model("llama", vocab_size=len(tokenizer))
    trainer = SFTTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    for row, theirs in zip(ours, trainer.train_dataset, strict=True):
        assert row.input_ids == theirs["input_ids"]
        # the first token of all is predicted from nothing
        assert row.counted[1:] == [label != -100 for label in theirs["labels"]][1:]
    assert any(row.counted[1:] != row.counted[:-1] for row in ours)


@pytest.mark.parametrize(("number", "size"), [(300, 264), (-1, 264), (264, 264)])
def test_a_token_without_embeddings_never_reaches_the_model(number: int, size: int) -> None:
    class Odd:
        name_or_path = "odd"

        def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[1, number if "x" in text else 2] for text in texts]}

        def decode(self, ids: list[int], **_: Any) -> str:
            return "a" * len(ids)

    rows = TaskRows("t", "t.jsonl", [{"text": "a"}, {"text": "ax"}], [1, 5])
    with pytest.raises(CheckpointError, match=f"odd: row 5 of tasks.t: t.jsonl has the token {number}, and the embed"):
        list(encode_rows(Odd(), rows, num_embeddings=size))


def test_a_row_is_the_same_alone_and_among_others() -> None:
    tokenizer = tiny.tokenizer()
    rows = [{"text": "a" * length} for length in range(1, 90)] + [{"prompt": "p", "completion": "cc"}] * 3
    task = TaskRows("t", "t.jsonl", rows, range(1, len(rows) + 1))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    found = list(encode_rows(tokenizer, task, order, longest=20))
    assert [row.index for row in found] == order
    assert all(len(row.input_ids) == min(20, len("".join(rows[row.index].values()))) for row in found)
    one = next(row for row in found if row.index == 90)
    alone = encode_row(rows[90], tokenizer)
    assert (one.input_ids, one.counted, one.num_bytes) == (alone.input_ids, alone.counted, alone.num_bytes)


@pytest.mark.parametrize("moving", ["{{ strftime_now('%f') }}", "{{ [1, 2, 3, 4, 5, 6, 7, 8, 9] | random }}"])
def test_a_template_that_writes_another_text_each_time_is_refused(moving: str) -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = moving * 20 + BARE
    with pytest.raises(CalibrationError, match="row 1: the chat template writes another text each time"):
        encode_row({"messages": talk("a")}, tokenizer)
