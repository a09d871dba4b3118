"""Every turn of the assistant counts, and nothing else, however a chat template writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import trl

from modmoe.analysis.text.chat import Template
from modmoe.analysis.text.turns import CALLS, CONTENT, REASONING, TOOLS, Conversation
from modmoe.errors import CalibrationError
from tests.support import tiny

# templates of real models: with and without reasoning, with other ends of the last turn, with system texts of their own
REAL = ["deepseekv3", "gemma", "glm4moe", "gptoss", "llama3_1", "lfm2", "phi3", "qwen2_5", "qwen3", "qwen3_5_think"]
PLAIN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}<assistant>{% endif %}"
CALL = {"type": "function", "function": {"name": "find_cat", "arguments": {"where": "garden"}}}
TOOL = {"type": "function", "function": {"name": "find_cat", "description": "d", "parameters": {"type": "object"}}}


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def told(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


TALK = [user("one"), told("The cat sat."), user("two"), told("The dog ran."), user("three"), told("A bird sang.")]


def read(template: str, messages: list[dict[str, Any]], **options: Any) -> tuple[list[str], list[str]]:
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = template
    writer = Template(tokenizer)
    text, way = writer.choose("row 7", messages, options)
    conversation = Conversation("row 7", writer, way(messages), options, text)
    return [text[start:stop] for start, stop in conversation.spans()], conversation.lost()


def real(name: str) -> str:
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize(
    "messages",
    [
        TALK,
        [*TALK, user("four")],
        [user("yes"), told("yes"), user("yes"), told("yes")],
        [user("one"), told("<think>\nhm\n</think>\n\nyes"), user("two"), told("<think>\nho\n</think>\n\nno")],
    ],
    ids=["turns", "ends with the user", "all alike", "reasoning"],
)
def test_all_turns_of_real_templates(name: str, messages: list[dict[str, Any]]) -> None:
    spans, _ = read(real(name), messages)
    turns = [message["content"].rpartition("</think>")[2].strip() for message in messages if message["role"] != "user"]
    assert len(spans) == len(turns)
    for span, turn in zip(spans, turns, strict=True):
        assert span.count(turn) == 1
        assert not any(word in span for word in ("<|user|>", "user<|", "<|im_start|>", "three"))
    # what a model has to write so that it stops is learned after each turn, not after the last one alone
    if name not in ("glm4moe",):
        assert all(not span.endswith(turn) for span, turn in zip(spans, turns, strict=True))


@pytest.mark.parametrize("name", ["gptoss", "glm4moe", "qwen2_5", "qwen3", "deepseekv3"])
def test_calls_of_tools_are_turns(name: str) -> None:
    answer = {"role": "tool", "name": "find_cat", "tool_call_id": "1", "content": "in the tree"}
    messages = [user("Where?"), told("", tool_calls=[CALL]), answer, told("In the tree."), user("ok"), told("bye")]
    spans, lost = read(real(name), messages, tools=[TOOL])
    assert [word in span for word, span in zip(("find_cat", "In the tree.", "bye"), spans, strict=True)] == [True] * 3
    assert "garden" in spans[0] and not any("in the tree" in span for span in spans)
    assert CALLS not in lost


@pytest.mark.parametrize(
    ("template", "messages", "wanted"),
    [
        # an opening of the last turn alone, as Qwen3 has
        (
            "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' and loop.last %}<think></think>"
            "{% endif %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}",
            TALK,
            ["The cat sat.\n", "The dog ran.\n", "<think></think>A bird sang.\n"],
        ),
        # white space around contents is cut
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}<end>{% endfor %}" + OPENED,
            [user(" a "), told("  b  "), user("c"), told("\nd")],
            ["b<end>", "d<end>"],
        ),
        # the system's message becomes a part of the user's
        (
            "{% for m in messages if m.role != 'system' %}<{{ m.role }}>"
            "{% if loop.first and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
            "{{ m.content }}<end>{% endfor %}" + OPENED,
            [{"role": "system", "content": "Be b."}, user("a"), told("b"), user("b"), told("b")],
            ["b<end>", "b<end>"],
        ),
        # a conversation has to end with the assistant, so that no beginning of it can be written
        (
            "{% if messages[-1].role != 'assistant' or messages | length < 6 %}{{ raise_exception('no') }}{% endif %}"
            + PLAIN,
            TALK,
            ["The cat sat.<end>\n", "The dog ran.<end>\n", "A bird sang.<end>\n"],
        ),
        # the opening stands in what the user says
        (PLAIN + OPENED, [user("<assistant>x"), told("<user>"), user("b"), told("c")], ["<user><end>\n", "c<end>\n"]),
        # the assistant begins
        (PLAIN + OPENED, [told("a"), user("b"), told("c")], ["a<end>\n", "c<end>\n"]),
        # a turn without words is no turn
        (PLAIN + OPENED, [user("a"), told(""), user("b"), told("c")], ["c<end>\n"]),
        # another end of the last turn
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last %}<stop>{% else %}<end>{% endif %}"
            "{% endfor %}" + OPENED,
            TALK[:4],
            ["The cat sat.<end>", "The dog ran.<stop>"],
        ),
        # marks of the template's own
        (
            "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}",
            TALK[:4],
            ["The cat sat.", "The dog ran."],
        ),
        # marks of the last turn alone are not all
        (
            "{% for m in messages %}<{{ m.role }}>{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}"
            "{% else %}{{ m.content }}{% endif %}<end>{% endfor %}" + OPENED,
            TALK[:4],
            ["The cat sat.<end>", "The dog ran.<end>"],
        ),
        # contents as lists of parts, for templates that read one or the other
        (PLAIN + OPENED, [user("a"), told([{"type": "text", "text": "b"}])], ["b<end>\n"]),
        (
            "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}<end>{% endfor %}"
            + OPENED,
            [user("a"), told("b")],
            ["b<end>"],
        ),
        ("", TALK[:4], ["The cat sat.", "The dog ran."]),
    ],
)
def test_turns_are_found(template: str, messages: list[dict[str, Any]], wanted: list[str]) -> None:
    spans, lost = read(template, messages)
    assert spans == wanted
    assert lost == []


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (
            "{% for m in messages[-1:] %}<{{ m.role }}>{{ m.content }}{% endfor %}",
            "message 2, which is the assistant's",
        ),
        ("{% for m in messages %}<{{ m.role }}>{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}", "2"),
        ("{{ raise_exception('roles must\nalternate') }}", "refuses its messages: roles must alternate"),
        ("{{ 1 / 0 }}", "refuses its messages: division by zero"),
    ],
)
def test_a_row_whose_turns_cannot_be_told_is_refused(template: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=message) as caught:
        read(template, TALK)
    assert str(caught.value).startswith("row 7: the chat template")


@pytest.mark.parametrize(
    ("template", "arguments", "wanted"),
    [
        ("{{ c.function.arguments | tojson }}", {"where": "garden"}, '{"where": "garden"}'),
        ("{{ c.function.arguments | tojson }}", '{"where": "garden"}', '{"where": "garden"}'),
        ("{{ 'json ' + c.function.arguments }}", {"where": "garden"}, 'json {"where": "garden"}'),
        ("{{ '' + m.content + c.function.arguments }}", {"where": "garden"}, '{"where": "garden"}'),
        ("{{ c.function.arguments }}", {"where": "garden"}, '{"where": "garden"}'),
        (
            "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}",
            '{"where": "garden"}',
            "where=garden",
        ),
    ],
)
def test_arguments_are_written_as_the_template_wants_them(template: str, arguments: Any, wanted: str) -> None:
    whole = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% for c in m.tool_calls or [] %}"
        "{{ c.function.name }} " + template + "{% endfor %}<end>{% endfor %}" + OPENED
    )
    call = {"function": {"name": "find_cat", "arguments": arguments}}
    spans, lost = read(whole, [user("a"), {"role": "assistant", "tool_calls": [call]}, user("b"), told("c")])
    assert spans == [f"find_cat {wanted}<end>", "c<end>"]
    assert lost == []


def test_what_a_template_leaves_out_is_told() -> None:
    messages = [
        user("a"),
        told("", tool_calls=[CALL]),
        {"role": "tool", "content": "find_cat"},
        told("b", thinking="hm"),
    ]
    spans, lost = read("{% for m in messages if m.role != 'tool' %}<{{ m.role }}>{{ m.content }}{% endfor %}", messages)
    # the turn that had but calls is not learned as an empty one
    assert spans == ["b"]
    messages[0]["content"] = "find_cat"
    _, lost = read("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}", messages, tools=[TOOL])
    assert lost == [TOOLS, CALLS, REASONING]
    _, lost = read("{% for m in messages if m.role != 'user' %}<{{ m.role }}>{{ m.content }}{% endfor %}", TALK)
    assert lost == [CONTENT]


TEXTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}{% endif %}<end>{% endfor %}" + OPENED
)


@pytest.mark.parametrize(
    "part",
    [
        {"type": "tool_result", "tool_use_id": "1", "content": "42 cats"},
        {"type": "tool_use", "id": "1", "name": "find_cat", "input": {"where": "garden"}},
        {"type": "thinking", "thinking": [{"type": "text", "text": "where may it be"}]},
        {"type": "refusal", "refusal": "I will not"},
    ],
)
@pytest.mark.parametrize("has_template", [True, False])
def test_parts_that_are_not_written_are_told(part: dict[str, Any], has_template: bool) -> None:
    messages = [user("a"), {"role": "user", "content": [{"type": "text", "text": "b"}, part]}, told("c")]
    spans, lost = read(TEXTS if has_template else "", messages)
    assert spans == (["c<end>"] if has_template else ["c"])
    assert lost == [CONTENT]
    messages[1]["content"] = [{"type": "text", "text": "b"}]
    assert read(TEXTS if has_template else "", messages)[1] == []


@pytest.mark.parametrize("thought", [[{"type": "text", "text": "it is there"}], {"text": "it is there"}, "it is there"])
@pytest.mark.parametrize("key", ["reasoning", "reasoning_content", "reasoning_details", "thinking"])
def test_reasoning_of_any_form_that_is_not_written_is_told(key: str, thought: Any) -> None:
    assert read(TEXTS, [user("a"), told("b", **{key: thought})]) == (["b<end>"], [REASONING])


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_words_that_a_template_cuts_off_are_told(role: str) -> None:
    cut = PLAIN.replace("{{ m.content }}", "{{ m.content[:12] if m.role == '" + role + "' else m.content }}")
    messages = [{"role": name, "content": f"this is what the {name} says"} for name in ("system", "user")]
    messages += [told("this is what the assistant says"), {"role": "tool", "content": "this is what it says"}, TALK[1]]
    assert read(PLAIN, messages)[1] == []
    assert read(cut, messages)[1] == [CONTENT]


def test_white_space_and_json_of_contents_are_the_templates_to_set() -> None:
    loose = "{% for m in messages %}<{{ m.role }}>{{ m.content.split() | join('\n') }}<end>{% endfor %}"
    assert read(loose, [user("one  two"), told("three")])[1] == []
    as_json = "{% for m in messages %}{{ m | tojson }}{% endfor %}"
    assert read(as_json, [user('one "two"\nthree'), told("four")])[1] == []


@pytest.mark.parametrize("template", [PLAIN + OPENED, real("qwen2_5"), ""])
def test_a_message_of_weight_0_is_not_learned(template: str) -> None:
    messages = [dict(message) for message in TALK]
    every, _ = read(template, messages)
    messages[1]["weight"], messages[3]["weight"] = 0, 1
    assert read(template, messages) == (every[1:], [])


def test_a_marked_message_of_weight_0_is_not_learned() -> None:
    marked = (
        "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>"
        "{% endgeneration %}{% else %}{{ m.content }}<end>{% endif %}{% endfor %}" + OPENED
    )
    messages = [dict(message) for message in TALK]
    messages[3]["weight"] = 0
    assert read(marked, messages)[0] == ["The cat sat.<end>", "A bird sang.<end>"]
