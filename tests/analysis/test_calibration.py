"""Files of every form become rows, rows become tokens, and what is wrong is said in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe.analysis.passes.clusters import cluster_sequences
from modmoe.analysis.passes.stream import WholeModel
from modmoe.analysis.run import tokenize
from modmoe.analysis.text.calibration import Batch, load_task, token_batches, warn_of_length
from modmoe.analysis.text.encoding import encode_row
from modmoe.analysis.text.rows import TaskRows
from modmoe.cli import main
from modmoe.errors import CalibrationError
from modmoe.models.families import FAMILIES
from modmoe.recipe.schema import CalibrationRecipe, Recipe
from modmoe.runtime.progress import silent
from tests.support.tiny import dense_model, save_dense, tokenizer, write_tasks

TEXT = [{"text": "a b c"}, {"text": "d"}]
PAIR = [{"prompt": "1+1=", "completion": "2"}]
TALK = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}]


def write(directory: Path, name: str, content: str | bytes) -> str:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def texts_of(rows: TaskRows) -> list[str]:
    return [row["text"] for row in rows]


def task(rows: list[dict[str, Any]]) -> TaskRows:
    return TaskRows("t", "t.jsonl", rows, range(1, len(rows) + 1))


def lines(rows: list[dict[str, Any]]) -> str:
    return "\n".join(json.dumps(row) for row in rows)


@pytest.mark.parametrize("rows", [TEXT, PAIR, TALK], ids=["text", "pair", "messages"])
def test_jsonl_json_and_parquet_give_the_same_rows(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    extra = [{**row, "id": number} for number, row in enumerate(rows)]
    from datasets import Dataset

    files = [write(tmp_path, "a.jsonl", "\ufeff" + lines(extra) + "\n\n"), write(tmp_path, "a.json", json.dumps(extra))]
    files.append(write(tmp_path, "lines.json", lines(extra)) if len(extra) > 1 else files[0])
    Dataset.from_list(extra).to_parquet(str(tmp_path / "a.parquet"))
    for file in [*files, str(tmp_path / "a.parquet")]:
        assert list(load_task("t", file)) == rows, file
        assert len(load_task("t", file, limit=1)) == 1


def test_a_text_file_is_cut_at_blank_lines_or_joined_into_passages(tmp_path: Path) -> None:
    documents = texts_of(load_task("t", write(tmp_path, "a.txt", "one\ntwo\r\n\r\n \nthree\n")))
    assert documents == ["one\ntwo", "three"]
    flat = "\n".join(f"line {number} of some length" for number in range(300))
    passages = texts_of(load_task("t", write(tmp_path, "b.txt", flat)))
    assert "\n".join(passages) == flat
    assert len(passages) > 1
    assert max(map(len, passages)) <= 2000


def test_strings_in_a_list_are_text_and_blank_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    file = write(tmp_path, "a.json", json.dumps(["x", "  ", {"text": None}, "y"]))
    rows = load_task("t", file)
    assert texts_of(rows) == ["x", "y"]
    assert list(rows.numbers) == [1, 4]
    assert dict(rows.left_out) == {"the row is empty": 2}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", "", "holds no rows"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', ":2: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', ":2: not valid UTF-8"),
        ("a.txt", b"ab\ncd\xff\n", ":2: not valid UTF-8"),
        ("a.jsonl", '{"text": 3}', "row 1: 'text' is a int, not text"),
        ("a.jsonl", '{"text": "a"}\n{"text": ["b"]}', "row 2: 'text' is a list"),
        ("a.jsonl", "[1]", "is a JSON list, not an object"),
        ("a.json", '{"a": 1}', "not a list of objects"),
        ("a.json", "[" * 100_000, "not valid JSON"),
        ("a.jsonl", '{"question": "a", "answer": "b"}', "no usable column among question, answer"),
        ("a.jsonl", '{"text": " "}\n{"text": ""}', "text of every row is empty"),
        ("a.jsonl", '{"text": "\\ud800"}', "half a surrogate pair"),
        ("a.jsonl", '{"messages": [{"role": "user"}]}', "lacks 'role' or 'content'"),
        ("a.jsonl", '{"messages": "hi"}', "'messages' is not a list"),
        ("a.parquet", "no parquet", "not a readable parquet file"),
        ("a.csv", "text\na", "unknown extension '.csv'"),
        ("a", "text", "unknown extension ''"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    file = write(tmp_path, name, content)
    with pytest.raises(CalibrationError) as error:
        load_task("math", file)
    message = str(error.value)
    assert message.startswith(f"tasks.math: {file}")
    assert said in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "said"), [("none.jsonl", "no such file"), ("hub:", "write hub:ID"), ("hub:a/b:c:d:e", "write hub:ID")]
)
def test_a_name_that_leads_nowhere_is_said_in_one_line(file: str, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        load_task("t", file)


def test_messages_go_through_the_template_where_there_is_one() -> None:
    tok = tokenizer()

    def text(row: dict[str, Any]) -> str:
        return str(tok.decode(encode_row(row, tok).input_ids))

    assert text(PAIR[0]) == "1+1=2"
    assert text(TALK[0]) == "user: hi\nassistant: ho"
    tok.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert text(TALK[0]) == "<s>[user]hi[assistant]ho"


def test_batches_are_cut_padded_on_the_right_and_stop_in_time() -> None:
    rows = task([{"text": "x" * length} for length in range(1, 40)])
    settings: dict[str, Any] = {"tokens": 100, "sequence_length": 16, "batch_size": 3}
    batches = token_batches(tokenizer(), "t", rows, **settings, seed=3)
    again = token_batches(tokenizer(), "t", rows, **settings, seed=3)
    assert all(torch.equal(a.input_ids_BT, b.input_ids_BT) for a, b in zip(batches, again, strict=True))
    lengths = [int(mask.sum()) for batch in batches for mask in batch.attention_mask_BT]
    assert max(lengths) == 16
    assert 100 <= sum(lengths) < 116
    for batch in batches:
        mask_BT = batch.attention_mask_BT
        assert torch.equal(mask_BT, mask_BT.sort(dim=1, descending=True).values)
        assert bool((batch.input_ids_BT[mask_BT == 0] == 258).all())
        assert batch.num_tokens == int(mask_BT.sum())
    assert all(len(batch.input_ids_BT) == 3 for batch in batches[:-1])


@pytest.mark.parametrize(("wanted", "is_said"), [(40, False), (4000, True)])
def test_little_text_is_pointed_out(wanted: int, is_said: bool, caplog: pytest.LogCaptureFixture) -> None:
    recipe = Recipe(calibration=CalibrationRecipe(tokens=wanted, sequence_length=8))
    texts = {"maths": task([{"text": "one two three four five six"}] * 8)}
    with caplog.at_level("INFO", logger="modmoe"):
        tokenize(recipe, texts, tokenizer(), silent)
    assert [record.getMessage().startswith("maths: only ") for record in caplog.records] == [True] * is_said


def test_a_template_that_writes_the_first_token_does_not_get_a_second() -> None:
    from tokenizers.processors import TemplateProcessing

    tok = tokenizer()
    tok.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    settings: dict[str, Any] = {"tokens": 10, "sequence_length": 16, "batch_size": 1, "seed": 0}
    plain = token_batches(tok, "t", task([{"text": "ab"}]), **settings)
    assert plain[0].input_ids_BT[0].tolist().count(256) == 1
    tok.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    talk = token_batches(tok, "t", task(TALK), **settings)
    assert talk[0].input_ids_BT[0].tolist().count(256) == 1


def test_a_template_that_refuses_a_row_is_said_in_one_line() -> None:
    tok = tokenizer()
    tok.chat_template = "{{ raise_exception('no such\nrole') }}"
    with pytest.raises(CalibrationError, match=r"tasks\.t: t\.jsonl: row 1: the chat template refuses .* no such role"):
        token_batches(tok, "t", task(TALK), tokens=5, sequence_length=4, batch_size=1, seed=0)


def test_no_tokens_at_all_is_an_error() -> None:
    def none(texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[]] * len(texts)}

    with pytest.raises(CalibrationError, match="no row has anything to read"):
        token_batches(none, "t", task(PAIR), tokens=5, sequence_length=4, batch_size=1, seed=0)


def test_clusters_keep_every_sequence_and_part_two_kinds_of_text() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.randint(0, 2, (6, 12), generator=generator)
    high = torch.randint(120, 122, (6, 12), generator=generator)
    ids_BT = torch.stack([low, high], 1).flatten(0, 1)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[:, 9:] = 0
    batches = [Batch(ids_BT[i : i + 4], mask_BT[i : i + 4]) for i in range(0, 12, 4)]
    clusters = cluster_sequences(WholeModel(dense_model("llama"), FAMILIES["llama"]), batches, 2, seed=0)
    assert list(clusters) == ["cluster0", "cluster1"]
    kinds = [{bool(row[0] >= 120) for batch in cluster for row in batch.input_ids_BT} for cluster in clusters.values()]
    assert sorted(map(sorted, kinds)) == [[False], [True]]
    assert sum(batch.num_tokens for cluster in clusters.values() for batch in cluster) == 12 * 9
    with pytest.raises(CalibrationError, match="cannot make 13 clusters"):
        cluster_sequences(WholeModel(dense_model("llama"), FAMILIES["llama"]), batches, 13, seed=0)


@pytest.mark.parametrize(
    ("settings", "length", "said"),
    [
        ({"max_position_embeddings": 128}, 129, "129 tokens are more than the 128 positions"),
        ({"max_position_embeddings": 2048}, 8192, "8,192 tokens are more than the 2,048 positions"),
        (dense_model("llama").config, 200, "200 tokens are more than the 128 positions"),
        ({"max_position_embeddings": 128}, 128, None),
        ({}, 9999, None),
    ],
)
def test_sequences_longer_than_the_model_has_positions_are_named(caplog, settings, length, said):
    warn_of_length(settings, length, "calibration.sequence_length")
    assert [said in record.message for record in caplog.records] == ([True] if said else [])


def test_every_step_names_them(tmp_path, caplog):
    dense, tasks = save_dense(tmp_path / "dense", "llama"), write_tasks(tmp_path / "tasks", rows=6)
    names = [part for name in ("sums", "code") for part in ("--task", f"{name}={tasks[name]}")]
    for arguments, place in (
        (["convert", str(dense), str(tmp_path / "moe"), "--tokens", "64", "--num-modules", "8"], "calibration"),
        (["finetune", str(tmp_path / "moe"), str(tmp_path / "tuned"), "--max-steps", "1"], "finetune"),
        (["eval", str(dense), "--tokens", "64"], ""),
    ):
        caplog.clear()
        assert main.run([*arguments, *names, "--sequence-length", "500", "-q"]) == 0
        found = [record.message for record in caplog.records if "positions of the model" in record.message]
        assert len(found) == 1 and place in found[0]
