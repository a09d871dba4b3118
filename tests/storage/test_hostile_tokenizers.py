"""Tokenizers and chat templates that fill the memory, take all time or break down: one line, whoever uses them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from modmoe import api
from modmoe.cli.main import run
from modmoe.errors import CheckpointError
from modmoe.models import tokenizer_files
from modmoe.models.loading import load_tokenizer
from modmoe.models.tokenizer_files import check_sizes, open_in_bounds, try_tokenizer
from modmoe.storage import bounded
from tests.support.tiny import save_dense

pytestmark = pytest.mark.skipif(not bounded.HAS_CHILDREN, reason="no child process has bounds here")

Rules = dict[str, Any]
TOO_MUCH, BROKEN = "needs more than the 0.12 GB", "cannot be used (broke down: "
TOO_LONG = "takes over 0.5 s"
"""What fills the memory may take too long before, where the machine is busy."""


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("hostile") / "dense", num_hidden_layers=1)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give less, so that the tests are soon done."""
    monkeypatch.setattr(bounded, "MEMORY_BYTES", 120_000_000)
    monkeypatch.setattr(bounded, "ITEM_SECONDS", 0.5)
    monkeypatch.setattr(tokenizer_files, "_PROBE_SECONDS", 0.5)


def replace(pattern: Rules, content: str, times: int) -> Rules:
    rule = {"type": "Replace", "pattern": pattern, "content": content}
    return {"type": "Sequence", "normalizers": [rule] * times, "decoders": [rule] * times}


def post_processor(count: int) -> Rules:
    special = {"id": "<s>", "ids": [256] * 3000, "tokens": ["<s>"] * 3000}
    single = [{"SpecialToken": {"id": "<s>", "type_id": 0}}] * count + [{"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": {"<s>": special}}


def split(expression: str) -> Rules:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


TOKENIZERS: dict[str, tuple[str, Rules, str]] = {
    "letters": ("normalizer", replace({"String": "a"}, "a" * 10, 9), TOO_MUCH),
    "words of its own": ("normalizer", replace({"String": "zebra"}, "zebra" * 10, 9), TOO_MUCH),
    "expressions": ("normalizer", replace({"Regex": "."}, "x" * 1000, 4), TOO_MUCH),
    "texts before": (
        "normalizer",
        {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "y" * 20_000}] * 60},
        TOO_MUCH,
    ),
    "special tokens": ("post_processor", post_processor(20_000), TOO_MUCH),
    "decoders": ("decoder", replace({"String": "a"}, "a" * 10, 9), TOO_MUCH),
    "expressions that give up": ("pre_tokenizer", split("(?=((a+)+)$)a|(a+)+$"), BROKEN),
    "tables that lie": (
        "normalizer",
        {"type": "Precompiled", "precompiled_charsmap": "EAAAAP///////////////////wABAgM="},
        BROKEN,
    ),
    "moderate growth": ("normalizer", replace({"String": "b"}, "b" * 20, 3), "makes "),
}


@pytest.mark.parametrize(("part", "rules", "problem"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_breaks_the_bounds(
    part: str, rules: Rules, problem: str, dense: Path, tmp_path: Path, capfd: Any
) -> None:
    directory = tmp_path / "it"
    shutil.copytree(dense, directory)
    file = directory / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), part: rules}))
    assert run(["doctor", str(directory)]) == 2
    assert is_told(str(file), problem, capfd.readouterr().err)
    if problem == "makes ":
        return
    task = tmp_path / "t.jsonl"
    task.write_text(json.dumps({"text": "a" * 40 + "! There was once a zebra."}) + "\n")
    code = run(["eval", str(directory), "--task", f"a={task}"])
    told = capfd.readouterr().err
    assert "Traceback" not in told and "memory" not in told
    # a decoder is asked for what a command shows
    assert part == "decoder" or (code == 2 and is_told(str(file), problem, told)), told


def is_told(file: str, problem: str, told: str) -> bool:
    """Return whether the last line names the file and the problem."""
    last = told.strip().splitlines()[-1]
    return file in last and (problem in last or (problem == TOO_MUCH and TOO_LONG in last))


def test_the_tokenizer_beside_an_adapter_is_tried_too(dense: Path, tmp_path: Path, capfd: Any) -> None:
    adapter = tmp_path / "adapter"
    assert run(["convert", str(dense), str(adapter), "--method", "adapters", "--adapter", "comol"]) == 0
    part, rules, problem = TOKENIZERS["letters"]
    file = adapter / "tokenizer.json"
    file.write_text(json.dumps({**json.loads((dense / "tokenizer.json").read_text()), part: rules}))
    shutil.copy(dense / "tokenizer_config.json", adapter)
    capfd.readouterr()
    assert run(["doctor", str(adapter)]) == 2
    assert is_told(str(file), problem, capfd.readouterr().err)


TEMPLATES = {
    "product": ("{{ 'a' * 4000000000 }}", TOO_MUCH),
    "doubling": (
        "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
        TOO_MUCH,
    ),
    "format": ("{{ '%999999999s' % 1 }}", TOO_MUCH),
    "filter": ("{{ 'a' | center(10 ** 10) }}", TOO_MUCH),
    "loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TOO_LONG),
    "macro": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself too often"),
    "syntax": ("{% for x in %}", "is no template"),
}


@pytest.mark.parametrize(("name", "is_inside"), [*((name, False) for name in TEMPLATES), ("product", True)])
def test_a_template_that_breaks_the_bounds(name: str, is_inside: bool, dense: Path, tmp_path: Path, capfd: Any) -> None:
    template, problem = TEMPLATES[name]
    directory = tmp_path / "it"
    shutil.copytree(dense, directory)
    file = directory / ("tokenizer_config.json" if is_inside else "chat_template.jinja")
    if is_inside:
        file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    else:
        file.write_text(template)
    assert run(["doctor", str(directory)]) == 2
    assert is_told(str(file), problem, capfd.readouterr().err)
    task = tmp_path / "t.jsonl"
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    task.write_text(json.dumps({"messages": turns}) + "\n")
    assert run(["eval", str(directory), "--task", f"a={task}"]) == 2
    told = capfd.readouterr().err
    assert "Traceback" not in told and "memory" not in told and "template" in told
    assert problem not in (TOO_MUCH, TOO_LONG) or is_told(str(file), problem, told)


def fill() -> Any:
    return [str(number) * 1000 for number in range(10**6)]


def break_down() -> Any:
    raise type("PanicException", (BaseException,), {})("no more")


@pytest.mark.parametrize(("read", "problem"), [(fill, TOO_MUCH), (break_down, BROKEN)])
def test_it_is_tried_out_before_it_is_loaded(read: Callable[[], Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(str(tmp_path))
    with pytest.raises(CheckpointError) as caught:
        open_in_bounds(tmp_path, read, is_trusted=False)
    assert problem in str(caught.value)


def test_what_was_tried_out_is_not_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.json").write_text(f'{{"some": "{tmp_path}"}}')
    assert open_in_bounds(tmp_path, lambda: 3, is_trusted=False) == 3
    monkeypatch.setattr(tokenizer_files, "call_in_bounds", lambda *_, **__: pytest.fail("again"))
    assert open_in_bounds(tmp_path, lambda: 3, is_trusted=False) == 3
    (tmp_path / "tokenizer.json").write_text('{"another": "vocabulary"}')
    with pytest.raises(pytest.fail.Exception):
        open_in_bounds(tmp_path, lambda: 3, is_trusted=False)


def test_files_have_a_size_at_most(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "it"
    shutil.copytree(dense, directory)
    with (directory / "tokenizer.model").open("wb") as file:
        file.truncate(tokenizer_files.MOST_FILE_BYTES + 1)
    with pytest.raises(CheckpointError, match=r"tokenizer\.model: has 268,435,457 bytes, over 268,435,456"):
        load_tokenizer(directory)
    (directory / "tokenizer.model").unlink()
    settings = {"chat_template": [{"name": "default", "template": "x" * 1_100_000}]}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template has 1,100,"):
        check_sizes(directory)


def test_a_healthy_one_passes(dense: Path) -> None:
    tokenizer = load_tokenizer(dense)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try_tokenizer(dense, tokenizer)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (type("PanicException", (BaseException,), {})("out of bounds"), "a library broke down on what it read (out"),
        (RecursionError("maximum"), "nested too deep"),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), "cannot be written as UTF-8"),
        (MemoryError(), "memory is full"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_passes_every_handler_is_one_line(
    error: BaseException, told: str, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    def fail(_: Any) -> None:
        raise error

    monkeypatch.setattr(api, "inspect", fail)
    assert run(["inspect", "it"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("modmoe: ") and told in line
