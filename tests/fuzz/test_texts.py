"""Hostile recipes and task files: refused in one line, or taken and right."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from modmoe.analysis.text.calibration import load_task, token_batches
from modmoe.conversion.options import check_recipe
from modmoe.recipe.schema import Recipe, dump_recipe, flat_recipe, load_recipe
from modmoe.storage.documents import parse_yaml
from tests.fuzz.judge import judge, often
from tests.fuzz.mutate import HOSTILE, Pairs, Raw, dump, spoiled, spoiled_bytes
from tests.support.tiny import tokenizer

YAML_LEAVES = (
    "2020-01-01",
    "2020-01-01T00:00:00Z",
    "9999-99-99",
    ".nan",
    ".inf",
    "-.inf",
    "1e400",
    "0x" + "f" * 400,
    "1" * 4000,
    "0b101",
    "190:20:30",
    "!!python/object/apply:os.system [echo]",
    "!!python/name:os.system",
    "!!binary aGVsbG8=",
    "!!set {a, b}",
    "!!omap [a: 1]",
    "!unknown x",
    "{1: 2, null: 3, true: 4, [a]: 5}",
    "{<<: {a: 1}}",
    "*nowhere",
    "[" * 3000 + "]" * 3000,
    "{a: " * 500 + "1" + "}" * 500,
    "|\n  text\n  more",
    '"\\ud800"',
    '"\\0"',
    "yes",
    "~",
    "'" + "x" * 100_000 + "'",
    "00017",
    "1_000",
    "=",
    "- a\n- b",
)
BOMBS = (
    "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    + "tasks: *a11\n",
    "x0: &x0 {a: 1}\n"
    + "".join(f"x{i}: &x{i} {{<<: [{','.join([f'*x{i - 1}'] * 9)}]}}\n" for i in range(1, 10))
    + "router: *x9\n",
    "family: &f {gate: *f}\n",
    "tasks: &t\n  a: *t\n",
    "partition: &p\n  method: *p\n",
    "? &k [*k]\n: 1\n",
    "- " * 20_000 + "x\n",
    "tasks:\n" + "  a: b\n" * 50_000,
    "a: b: c\n",
    "\t- x\n",
    "--- a\n--- b\n",
    "%TAG ! tag:x,2000:\n---\n!y z\n",
    "tasks: {a: x.txt, a: y.txt}\nseed: 1\nseed: 2\n",
    "adapter: {settings: " + "{a: " * 300 + "1" + "}" * 300 + "}\n",
)
"""Aliases that double, circles, depth, length, keys twice."""


@st.composite
def recipes(draw: st.DrawFn) -> bytes:
    """Return the text of a recipe, hostile in some way or as it should be."""
    how = draw(st.sampled_from(("leaf", "leaf", "leaf", "json", "bytes", "bomb", "none")))
    flat = dict(flat_recipe(Recipe(tasks={"words": "words.jsonl"})).items())
    if how == "bomb":
        return draw(st.sampled_from(BOMBS)).encode()
    lines = [f"{key}: {json.dumps(value)}" for key, value in flat.items()]
    tree: dict[str, list[str]] = {}
    for key, line in zip(flat, lines, strict=True):
        section, _, _name = key.rpartition(".")
        tree.setdefault(section, []).append(line[len(section) + 1 :] if section else line)
    if how == "leaf":
        for _ in range(draw(st.integers(1, 2))):
            section = draw(st.sampled_from(sorted(tree)))
            at = draw(st.integers(0, len(tree[section]) - 1))
            key = tree[section][at].split(":")[0]
            leaf = draw(st.one_of(st.sampled_from(YAML_LEAVES), st.sampled_from(HOSTILE).map(dump)))
            tree[section][at] = f"{key}: {leaf}"
    text = "".join(f"{line}\n" for line in tree.pop("", []))
    for section, items in tree.items():
        text += f"{section}:\n" + "".join(f"  {line}\n" for line in items)
    if how == "json":
        pairs = Pairs([[key, value] for key, value in yaml.safe_load(text).items()])
        text = dump(draw(spoiled(_pairs(pairs))))
    data = text.encode("utf-8", "surrogatepass")
    return draw(spoiled_bytes(data)) if how == "bytes" else data


def _pairs(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs([key, _pairs(item)] for key, item in value.items())
    if isinstance(value, Pairs):
        return Pairs([key, _pairs(item)] for key, item in value)
    return value


@often("recipe")
@given(data=recipes())
def test_recipe(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "r.yaml"
    path.write_bytes(data)

    def read() -> Recipe:
        recipe = load_recipe(path)
        check_recipe(recipe)
        return recipe

    (recipe,) = judge("recipe", path, read)
    if recipe is not None:
        # what is written out is read as the same, and each value is of the kind that its place has
        path.write_text(dump_recipe(recipe), encoding="utf-8")
        assert load_recipe(path) == recipe
        said = parse_yaml(data.decode())  # which differs from YAML 1.1 in what 00017 is
        for key, value in flat_recipe(recipe).items():
            section, _, name = key.rpartition(".")
            place = (said or {}).get(section) if section else said
            if isinstance(place, dict) and type(place.get(name)) is int:
                # a float holds the first sixteen digits of a whole number
                assert value == (float(place[name]) if isinstance(value, float) else place[name])


ROWS: tuple[Any, ...] = (
    {"text": "a plain row"},
    {"prompt": "1+1=", "completion": "2"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {"text": "ünï\u2028cödé 🙂", "other": [1, {"x": None}]},
)


@st.composite
def tasks(draw: st.DrawFn) -> tuple[str, bytes]:
    """Return the ending and the bytes of a task file."""
    ending = draw(st.sampled_from((".jsonl", ".json", ".txt", ".parquet", ".csv", "", ".JSONL")))
    rows = draw(st.lists(st.sampled_from(ROWS), max_size=5))
    if ending == ".parquet":
        return ending, draw(parquets(rows))
    texts = []
    for row in rows:
        tree = _pairs(row) if not isinstance(row, dict) else _deep(row)
        if draw(st.booleans()):
            tree = draw(spoiled(tree, ("text", "messages", "content", "prompt")))
        texts.append(dump(tree))
    if ending in (".json", "") and draw(st.booleans()):
        text = "[" + ",".join(texts) + "]"
    elif ending == ".csv":
        buffer = io.StringIO()
        csv.writer(buffer).writerows([["text"], *([text] for text in texts)])
        text = buffer.getvalue()
    else:
        text = draw(st.sampled_from(("\n", "\r\n", "\n\n", " "))).join(texts)
    data = text.encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        data = draw(spoiled_bytes(data))
    return ending, data


def _deep(value: Any) -> Any:
    if isinstance(value, dict):
        return Pairs([key, _deep(item)] for key, item in value.items())
    if isinstance(value, list):
        return [_deep(item) for item in value]
    return value


@st.composite
def parquets(draw: st.DrawFn, rows: list[Any]) -> bytes:
    """Return a parquet file: of odd types, with bytes changed, or one that holds far more than its size."""
    import pyarrow
    from pyarrow import parquet

    how = draw(st.sampled_from(("rows", "bytes", "bytes", "types", "bomb", "wide")))
    columns: dict[str, Any]
    if how == "bomb":
        columns = {"text": pyarrow.array([" " * 4_000_000] * draw(st.sampled_from((1, 40))))}
    elif how == "wide":
        columns = {"text": pyarrow.array(["x"] * 200_000)}
    elif how == "types":
        columns = {
            draw(st.sampled_from(("text", "prompt", "messages", "completion"))): draw(
                st.sampled_from(
                    (
                        pyarrow.array([b"\xff\xfe", None]),
                        pyarrow.array([1, None]),
                        pyarrow.array([[1], []]),
                        pyarrow.array([{"role": None, "content": 3}]),
                        pyarrow.array([[{"role": "user", "content": None}]]),
                        pyarrow.nulls(3),
                        pyarrow.array(["a", "a"]).dictionary_encode(),
                        pyarrow.array([2**62], pyarrow.timestamp("ns")),
                        pyarrow.array([2**40], pyarrow.timestamp("s")),
                        pyarrow.array(["\x00", ""]),
                    )
                )
            )
        }
    else:
        columns = {"text": pyarrow.array([str(row) for row in rows] or ["x"])}
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(columns), buffer, compression="zstd")
    data = buffer.getvalue()
    return draw(spoiled_bytes(data)) if how == "bytes" else data


TOKENIZER = tokenizer()


@often("task")
@given(made=tasks())
def test_task(tmp_path_factory: pytest.TempPathFactory, made: tuple[str, bytes]) -> None:
    ending, data = made
    path = tmp_path_factory.getbasetemp() / f"task{ending}"
    path.write_bytes(data)

    def read() -> Any:
        rows = load_task("words", str(path), limit=1000)
        sizes = {"tokens": 2000, "sequence_length": 64, "batch_size": 4}
        return rows, token_batches(TOKENIZER, "words", rows, **sizes, seed=0)

    (found,) = judge("task", path, read)
    if found is not None:
        check_rows(ending, data, found[0])


def check_rows(ending: str, data: bytes, rows: Any) -> None:
    """Assert that the rows are those of the file, where it is lines of JSON, read a second way."""
    assert len(rows) and all(isinstance(text, str) for row in rows for text in row.values() if isinstance(text, str))
    if ending != ".jsonl":
        return
    lines = [json.loads(line) for line in data.decode("utf-8-sig").split("\n") if line.strip()]
    if all(isinstance(line, str) or not {"prompt", "completion", "messages"} & set(line) for line in lines):
        texts = [line if isinstance(line, str) else line.get("text") for line in lines]
        assert [row["text"] for row in rows] == [text for text in texts if text is not None and text.strip()]
    assert rows.num_in_file == len(lines)


def test_bounds_of_a_line(tmp_path: Path) -> None:
    """A line of 100 MB: read or refused, in bounded memory."""
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"text": "' + b"x" * (8 << 20) + b'"}\n')
    judge("task", path, lambda: load_task("words", str(path)))


def test_raw_is_written_as_it_stands() -> None:
    assert dump(Pairs([["a", Raw("NaN")], ["a", [1, "x"]]])) == '{"a":NaN,"a":[1,"x"]}'
