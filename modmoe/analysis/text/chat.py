"""Messages through a tokenizer's chat template, in the way of writing them that the template understands."""

from __future__ import annotations

import functools
import inspect
import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from modmoe.analysis.text.forms import CALL_KEYS
from modmoe.errors import CalibrationError, reason_of

Messages = list[dict[str, Any]]
Options = Mapping[str, Any]
"""What a template reads beside the messages: ``tools``, and the row's ``chat_template_kwargs``."""
Span = tuple[int, int]
"""A range of characters."""

_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class Template:
    """The chat template of one tokenizer; where it has none, messages are lines of "role: content"."""

    def __init__(self, tokenizer: Any) -> None:
        """Take a tokenizer of transformers."""
        self._tokenizer = tokenizer
        self.is_there = bool(getattr(tokenizer, "chat_template", None))

    def run(self, messages: Messages, options: Options, *, opened: bool = False) -> str:
        """Return the text of messages, with ``opened`` up to where the assistant goes on; raises as a template does."""
        if self.is_there:
            return str(
                self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened, **options)
            )
        lines = [f"{message['role']}: {text_of(message.get('content'))}" for message in messages]
        return "\n".join([*lines, "assistant: "] if opened else lines)

    def try_run(self, messages: Messages, options: Options, *, opened: bool = False) -> str | None:
        """Return as ``run`` does, or None where the template refuses the messages."""
        try:
            return self.run(messages, options, opened=opened)
        except MemoryError:
            raise
        except Exception:  # a template is a program, and raises what it likes
            return None

    def marks(self, messages: Messages, options: Options, text: str) -> list[Span]:
        """Return what the template marks as the assistant's by {% generation %}; nothing where it does not."""
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self.is_there:
            return []
        try:
            template = self._tokenizer.get_chat_template(None, options.get("tools"))
            if not _MARKS.search(template):
                return []
            words: dict[str, Any] = {**self._tokenizer.special_tokens_map, **options}
            found: Any = render_jinja_template(
                [messages], chat_template=template, return_assistant_tokens_mask=True, **words
            )
            texts, marks = found
        except MemoryError:
            raise
        except Exception:
            return []
        return [(int(start), int(stop)) for start, stop in marks[0] if start < stop] if texts == [text] else []

    def choose(self, place: str, messages: Messages, options: Options) -> tuple[str, Way]:
        """Return the text of a row's messages, and the way of writing them that the template understands best.

        Some templates want a call's arguments as an object and some as JSON, some want a content as text and some as a
        list of parts; what they cannot read they refuse, write as Python would, or leave out.

        Raises:
            CalibrationError: the template refuses the messages in every way.
        """
        best: tuple[int, str, Way] | None = None
        refusal: Exception | None = None
        tried: list[Messages] = []
        for way in WAYS:
            written = way(messages)
            if written in tried:
                continue
            tried.append(written)
            try:
                text = self.run(written, options)
            except MemoryError:
                raise
            except Exception as error:  # a template is a program, and raises what it likes
                refusal = refusal or error
                continue
            faults = _count_faults(text, written)
            if best is None or faults < best[0]:
                best = (faults, text, way)
            if not faults:
                break
        if best is None:
            raise CalibrationError(
                str(place),
                f"the chat template refuses its messages: {reason_of(refusal or ValueError())}",
                "mend the row or the template",
            ) from refusal
        return best[1], best[2]


def options_of(place: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a row says to the template beside its messages; CalibrationError where it would do something else."""
    words = row.get("chat_template_kwargs", {})
    for name in words:
        if name in _names_in_use():
            raise CalibrationError(place, f"'chat_template_kwargs' cannot set '{name}'", "take it out")
    return {**words, **({"tools": row["tools"]} if "tools" in row else {})}


@functools.cache
def _names_in_use() -> frozenset[str]:
    from transformers import PreTrainedTokenizerBase

    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters
    return frozenset(names) | {"messages", "conversations"}


def text_of(content: Any) -> str:
    """Return the text of a message's content, which is text, or a list of parts with text in them."""
    if isinstance(content, list):
        return "".join(str(part.get("text", "")) for part in content)
    return "" if content is None else str(content)


def holds(text: str, piece: str) -> bool:
    """Return whether a text has a piece in it, as it stands or as JSON writes it, white space around it aside."""
    piece = piece.strip()
    return piece in text or json.dumps(piece, ensure_ascii=False)[1:-1] in text


Way = Callable[[Messages], Messages]


def _as_they_are(messages: Messages) -> Messages:
    return messages


def _with_empty(messages: Messages) -> Messages:
    return [{"content": "", **message} for message in messages]


def _with_text(messages: Messages) -> Messages:
    return [
        {**message, "content": text_of(message["content"])}
        if isinstance(message.get("content"), list) and all(part["type"] == "text" for part in message["content"])
        else message
        for message in messages
    ]


def _with_parts(messages: Messages) -> Messages:
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else message
        for message in messages
    ]


def _with_objects(messages: Messages) -> Messages:
    return _with_arguments(messages, _as_object)


def _with_json(messages: Messages) -> Messages:
    return _with_arguments(messages, _as_json)


def _with_arguments(messages: Messages, change: Callable[[Any], Any]) -> Messages:
    """Return messages with the arguments of each call changed."""

    def changed(function: dict[str, Any]) -> dict[str, Any]:
        return {**function, "arguments": change(function["arguments"])} if "arguments" in function else function

    def call(value: dict[str, Any]) -> dict[str, Any]:
        return {**value, "function": changed(value["function"])} if "function" in value else changed(value)

    written = []
    for message in messages:
        if "tool_calls" in message:
            message = {**message, "tool_calls": [call(value) for value in message["tool_calls"]]}
        if isinstance(message.get("function_call"), dict):
            message = {**message, "function_call": changed(message["function_call"])}
        written.append(message)
    return written


def _as_object(arguments: Any) -> Any:
    if not isinstance(arguments, str):
        return arguments
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return found if isinstance(found, dict) else arguments


def _as_json(arguments: Any) -> Any:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _both(first: Way, second: Way) -> Way:
    return lambda messages: second(first(messages))


WAYS: tuple[Way, ...] = tuple(
    _both(contents, arguments)
    for contents in (_as_they_are, _with_empty, _with_text, _with_parts)
    for arguments in (_with_objects, _with_json)
)
"""Ways of writing the same messages, the usual one first."""


def _count_faults(text: str, messages: Messages) -> int:
    """Return how many contents are not in a text, or in it as Python or twice encoded JSON would write them."""
    faults = 0
    for message in messages:
        content = message.get("content", "")
        for part in content if isinstance(content, list) else [content]:
            if isinstance(part, str):
                faults += not holds(text, part)
            else:
                faults += 2 * (repr(part) in text) + (not holds(text, text_of([part])))
        for call in calls_of(message):
            arguments = call.get("arguments")
            if isinstance(arguments, dict) and arguments:
                faults += repr(arguments) in text and repr(arguments) != json.dumps(arguments, ensure_ascii=False)
            elif isinstance(arguments, str) and '"' in arguments:
                faults += json.dumps(arguments, ensure_ascii=False)[1:-1] in text
    return faults


def calls_of(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the functions that a message calls, each with ``name`` and ``arguments``."""
    found: list[dict[str, Any]] = []
    for key in CALL_KEYS:
        value = message.get(key) or []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, dict) else None
            if isinstance(function, dict):
                found.append(function)
    return found
