"""What is written for others to read: no string of the input acts in a page, a card or the head of one."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from modmoe.formats.card import converted
from modmoe.formats.card.head import head
from modmoe.reports import page

HOSTILE = (
    "<script>alert(1)</script>",
    '"onload="alert(1)',
    "' onerror='x",
    "</title><h1>",
    "</style></pre></table>",
    "--></svg><img src=x onerror=alert(1)>",
    "]]>",
    "&lt;b&gt; &amp;",
    "|`a`|",
    "```\n# x\n```",
    "---\nlicense: mit\n---",
    "\n\n# Heading\n\n- item",
    "[a](javascript:alert(1))",
    "![i](//evil/x.png)",
    "<https://evil>",
    "*a* _b_ ~~c~~ $x$",
    ": {a: [b, !!python/object:os.system x",
    "{{ template }} {% raw %}",
    "\u202etxt.exe\u2066",
    "\x00\x1b[31m\x7f\x85\u2028",
    "\ufeff\ufffe",
    "yes",
    "1e3",
    "2020-01-01",
    "null",
    "*alias &anchor",
)
hostile = st.lists(st.one_of(st.sampled_from(HOSTILE), st.text(max_size=8)), min_size=1, max_size=3).map("".join)
quickly = settings(
    max_examples=60, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[Any] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found.append((tag, sorted(name for name, _ in attrs)))

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)

    def handle_comment(self, data: str) -> None:
        self.found.append("comment")

    def handle_decl(self, decl: str) -> None:
        self.found.append(decl)

    def handle_data(self, data: str) -> None:
        self.text += data


def whole_page(name: str) -> str:
    parts = [
        page.heading(name, 2, name),
        page.paragraph(name, name),
        page.table(name, (name, name), ((name, name),), note=name, is_words=True),
        page.figure("<svg></svg>", name, name),
        page.fold(name, name, [page.preformatted(name, name)], anchor=name),
        page.columns_of_text([(name, name)]),
    ]
    return page.page(name, [page.grid(parts)])


@quickly
@given(name=hostile)
def test_pages(name: str) -> None:
    name = f"x{name}"
    found = Tags(whole_page(name))
    assert found.found == Tags(whole_page("x")).found
    assert "".join(name.split()) in "".join(found.text.split()).replace("\ufffd", "\x00")


def body(name: str) -> str:
    numbers = {name: {"loss": 1.5}, "other": {"perplexity": 2.0}}
    lines = [
        f"# {converted.escape(name)} by modmoe",
        "",
        *converted.table([(name, name), ("key", 3)]),
        *converted.result_lines(numbers),
    ]
    return "\n".join([*lines, f"Made from {converted.escape(name)}.", ""])


@quickly
@given(name=hostile)
def test_cards_as_they_are_shown(name: str) -> None:
    shown, plain = (Tags(MarkdownIt("commonmark").enable("table").render(body(text))) for text in (name, "x"))
    assert shown.found == plain.found
    assert "\u202e" not in body(name) and "\x1b" not in body(name)


@quickly
@given(name=hostile, licence=hostile)
def test_heads_of_cards(tmp_path_factory: pytest.TempPathFactory, name: str, licence: str) -> None:
    source = tmp_path_factory.getbasetemp() / "source"
    source.mkdir(exist_ok=True)
    fields = {"license": licence, "license_name": name, "license_link": name, "base_model": name}
    (source / "README.md").write_text(f"---\n{yaml.safe_dump(fields)}\n---\n", encoding="utf-8", errors="replace")
    tasks = yaml.safe_dump({"tasks": {name: f"hub:{name}"}})
    (source / "modmoe.yaml").write_text(tasks, encoding="utf-8", errors="replace")
    data = head(
        name, base=None, relation="finetune", library="l", tags=["t"], sources=[source], results={name: {"loss": 1}}
    )
    text = data.to_yaml()
    known = yaml.safe_load(text)
    assert "\n---" not in f"\n{text}" and set(known) <= {
        *("library_name", "pipeline_tag", "tags", "datasets", "model-index", "license", "license_name", "license_link")
    }
    assert known["model-index"][0]["name"] == name
    assert known["model-index"][0]["results"][0]["dataset"]["name"] == name
    for key in ("license", "license_name", "license_link"):
        assert known.get(key) in (None, fields[key]) and not set(str(known.get(key))) & set('<>"\n')
