"""What is a program, or no plain file: chat templates, rules of tokenizers, FIFOs; exports and pushes of such."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modmoe import api
from modmoe.analysis.text.encoding import encode_row
from modmoe.diagnosis.doctor import doctor
from modmoe.exports import hub
from modmoe.models.loading import load_tokenizer
from modmoe.models.tokenizer_files import try_tokenizer
from modmoe.storage.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from tests.fuzz import spoil
from tests.fuzz.judge import judge, often
from tests.fuzz.mutate import HOSTILE, Pairs, dump, parse, spoiled, spoiled_bytes
from tests.support.tiny import save_dense

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="no child process has bounds here")

ROWS: tuple[dict[str, Any], ...] = (
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho there"}]},
    {"messages": [{"role": "system", "content": "a"}, {"role": "user", "content": "b\n{{ x }}"}]},
    {"text": "a" * 50 + "! once \u6771\u4eac 0.5\n"},
    {"prompt": "1 + 1 =", "completion": " 2"},
)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A directory that is laid out anew for every input, and what a whole checkpoint has in it."""
    home = tmp_path_factory.mktemp("programs")
    whole = spoil.read_files(save_dense(home / "whole", num_hidden_layers=1))
    (home / "it").mkdir()
    return home / "it", whole


def use(directory: Path, row: dict[str, Any]) -> list[int]:
    ids = encode_row(row, load_tokenizer(directory), longest=5000, num_embeddings=264).input_ids
    assert all(0 <= token < 264 for token in ids)
    return ids


def probe(directory: Path) -> None:
    try_tokenizer(directory, load_tokenizer(directory))


VALUES = ("messages", "messages[0].content", "'a'", "9", "range(9999)", "x", "loop.index", "''", "none", "[[]] * 9")
FILTERS = (
    "center(10 ** 9)",
    "indent(99999)",
    "join('ab' * 999)",
    "list",
    "tojson",
    "string",
    "length",
    "upper",
    "trim",
)
FILTERS += ("replace('a', 'b' * 99999)", "batch(3)", "map('string')", "sort", "format(1)", "wordwrap(1)", "urlize")
WHOLE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}",
    "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "{% macro f(x) %}{{ f(x) }}{{ f(x) }}{% endmacro %}{{ f(1) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{{ '%999999999s' % 1 }}",
    "{{ '{:>1000000000}'.format('x') }}",
    "{{ raise_exception('no') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% include 'x' %}{% import 'y' as y %}",
    "\ud800",
)


@st.composite
def templates(draw: st.DrawFn) -> bytes:
    """Return a chat template: one that is known, a few statements at random, or bytes of either."""
    pieces = []
    for _ in range(draw(st.integers(1, 3))):
        value, filters = draw(st.sampled_from(VALUES)), draw(st.lists(st.sampled_from(FILTERS), max_size=2))
        count = draw(st.sampled_from(("", " * 3", " * 99999", " * 4000000000", " ** 9999", " ~ x", " + 'b'")))
        body = "{{ (" + " | ".join([f"({value}){count}", *filters]) + ") }}"
        loop = draw(st.sampled_from(("%s", "%s", "{%% for m in messages %%}%s{%% endfor %%}", "{%% if x %%}%s")))
        pieces.append(loop % body)
    text = draw(st.one_of(st.sampled_from(WHOLE), st.just("".join(pieces))))
    data = text.encode("utf-8", "surrogatepass")
    return draw(spoiled_bytes(data)) if draw(st.integers(0, 4)) == 0 else data


@often("template")
@given(data=templates(), row=st.sampled_from(ROWS[:2]))
def test_template(room: tuple[Path, dict[str, bytes]], data: bytes, row: dict[str, Any]) -> None:
    directory, whole = room
    spoil.lay_out(directory, whole, {"chat_template.jinja": data})
    judge("template", directory, lambda: use(directory, row), lambda: probe(directory))


EXPRESSIONS = (
    ".",
    "",
    "(?=((a+)+)$)a|(a+)+$",
    "(a|a)*b",
    "\\p{L}+",
    "[",
    "(?<=a*)b",
    "a{99999}",
    "(?i)\u0130",
    "$^",
    "\\G",
)


@st.composite
def rules(draw: st.DrawFn) -> Any:
    """Return what may stand for a part of tokenizer.json, with a part to put it in."""
    text = draw(st.sampled_from(("a", "", " ", "\u2581", "\x00", "ab", "</s>", "once")))
    content = draw(st.sampled_from(("", "a", "a" * 10, "b" * 5000, "\ud83d", "<s>")))
    pattern = draw(
        st.one_of(
            st.just(Pairs([["String", text]])),
            st.sampled_from(EXPRESSIONS).map(lambda regex: Pairs([["Regex", regex]])),
        )
    )
    special = Pairs(
        [["id", "<s>"], ["ids", [draw(st.sampled_from((0, 256, 263, 264, 2**32 - 1)))]], ["tokens", ["<s>"]]]
    )
    piece = Pairs([["SpecialToken", Pairs([["id", "<s>"], ["type_id", 0]])]])
    sequence = Pairs([["Sequence", Pairs([["id", "A"], ["type_id", 0]])]])
    times = draw(st.sampled_from((0, 1, 3, 20_000)))
    replace = [["type", "Replace"], ["pattern", pattern], ["content", content]]
    one = draw(
        st.sampled_from(
            (
                Pairs(replace),
                Pairs([["type", "Prepend"], ["prepend", content * 20]]),
                Pairs([["type", "Split"], ["pattern", pattern], ["behavior", "Isolated"], ["invert", False]]),
                Pairs([["type", "Precompiled"], ["precompiled_charsmap", draw(st.sampled_from(CHARSMAPS))]]),
                Pairs(
                    [
                        ["type", "TemplateProcessing"],
                        ["single", [piece] * times + [sequence]],
                        ["pair", [sequence]],
                        ["special_tokens", Pairs([["<s>", special]])],
                    ]
                ),
                Pairs([["type", "ByteLevel"], ["add_prefix_space", True], ["trim_offsets", True], ["use_regex", True]]),
                Pairs([["type", "Strip"], ["content", "a"], ["start", 2**32], ["stop", 2**32]]),
                Pairs([["type", "Fuse"]]),
                Pairs([["type", "Punctuation"], ["behavior", "Contiguous"]]),
                Pairs([["type", "FixedLength"], ["length", draw(st.sampled_from((0, 1, 2**63)))]]),
            )
        )
    )
    repeats = draw(st.sampled_from((1, 1, 3, 9)))
    if repeats > 1:
        key = draw(st.sampled_from(("normalizers", "pretokenizers", "decoders", "processors")))
        one = Pairs([["type", "Sequence"], [key, [one] * repeats]])
    return draw(spoiled(one)) if draw(st.integers(0, 3)) == 0 else one


CHARSMAPS = ("", "AAAA", "/////wAAAAAAAAA=", "EAAAAP///////////////////wABAgM=", "BAAAAAAAAAA=", "no base64!")
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")


@often("rules")
@given(rule=rules(), part=st.sampled_from(PARTS), row=st.sampled_from(ROWS[2:]))
def test_rules(room: tuple[Path, dict[str, bytes]], rule: Any, part: str, row: dict[str, Any]) -> None:
    directory, whole = room
    tree = parse(whole["tokenizer.json"])
    tree = Pairs([[key, rule if key == part else value] for key, value in tree])
    spoil.lay_out(directory, whole, {"tokenizer.json": dump(tree).encode()})
    judge("rules", directory, lambda: use(directory, row), lambda: probe(directory))


NAMES = ("config.json", "model.safetensors", "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json")
NAMES += ("chat_template.jinja", "generation_config.json", "README.md", "modmoe.yaml", "modmoe_manifest.json", "x.py")
NAMES += (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "tokenizer.model", "special_tokens_map.json", "LICENSE", "notes", "a.png")


@st.composite
def specials(draw: st.DrawFn) -> list[tuple[str, str]]:
    """Return names of files and what stands in their place."""
    kinds = st.sampled_from(("fifo", "zero", "folder", "circle", "outside", "above", "empty", "large"))
    return draw(
        st.lists(st.tuples(st.sampled_from(NAMES), kinds), min_size=1, max_size=3, unique_by=lambda pair: pair[0])
    )


def put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    links = {"zero": "/dev/zero", "circle": path.name, "outside": "/etc/passwd", "above": "../whole/config.json"}
    if kind in links:
        path.symlink_to(links[kind])
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        with path.open("wb") as file:
            file.truncate(300 << 20 if kind == "large" else 0)


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@often("special")
@given(changes=specials())
def test_special_files(room: tuple[Path, dict[str, bytes]], changes: list[tuple[str, str]]) -> None:
    directory, whole = room
    shutil.rmtree(directory)
    directory.mkdir()
    spoil.lay_out(directory, whole, {})
    for name, kind in changes:
        put(directory / name, kind)
    try:
        judge(
            "special",
            directory,
            lambda: api.inspect(directory),
            lambda: doctor(directory),
            lambda: load_tokenizer(directory),
            lambda: hub.push(directory, "me/moe", dry_run=True),
        )
    finally:
        shutil.rmtree(directory)
        directory.mkdir()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("exports")
    dense = save_dense(home / "base", num_hidden_layers=1)
    api.convert(dense, home / "whole", method="adapters", adapter="comol")
    (home / "it").mkdir()
    return home


@often("export")
@given(data=st.data())
def test_export(adapter: Path, data: st.DataObject) -> None:
    directory, whole, output = adapter / "it", spoil.read_files(adapter / "whole"), adapter / "out"
    if data.draw(st.booleans()):
        changed = data.draw(spoil.weights(whole[ADAPTER_WEIGHTS], ADAPTER_WEIGHTS))
    else:
        keys = ("r", "num_experts", "top_k", "target_modules", "peft_type", "base_model_name_or_path", "lora_alpha")
        changed = data.draw(spoil.documents(whole[ADAPTER_CONFIG], ADAPTER_CONFIG, keys))
    spoil.lay_out(directory, whole, changed)
    form = data.draw(st.sampled_from(("adapter", "tied")))
    judge("export", directory, lambda: api.export(directory, output, form=form, verify=False))
    shutil.rmtree(output, ignore_errors=True)
    assert not output.with_name("out.partial").exists()


@often("push")
@given(data=st.data())
def test_push(room: tuple[Path, dict[str, bytes]], data: st.DataObject) -> None:
    directory, whole = room
    changed: dict[str, Any] = {}
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from((*NAMES, ".env", "config.JSON", "\u202egnp.exe", "optimizer.pt", "a b.json")))
        hostile = data.draw(st.sampled_from(HOSTILE))
        text = data.draw(st.sampled_from((dump(hostile), f"hf_{'x' * 34}", "---\nlicense: [\n---\n", "![](a.png)")))
        changed[name] = text.encode("utf-8", "surrogatepass")
    if data.draw(st.booleans()):
        changed |= data.draw(spoil.weights(whole[spoil.WEIGHTS]))
    spoil.lay_out(directory, whole, changed)
    (plan,) = judge("push", directory, lambda: hub.push(directory, "me/moe", dry_run=True))
    sent = {file["path"] for file in plan["files"]} if plan else set()
    assert not sent & {".env", "optimizer.pt", "\u202egnp.exe"}
