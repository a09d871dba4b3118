"""What a row of a task may be: a text, a prompt with its completion, or messages; checked, and kept as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from modmoe.errors import CalibrationError

FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
"""The columns a row may have; of a row that has several forms with text in them, the first of these counts."""
EXTRAS = ("tools", "chat_template_kwargs")
"""Columns beside messages that reach the chat template, as TRL passes them on."""
COLUMNS = (*(column for form in FORMS for column in form), *EXTRAS)
EMPTY = "the row is empty"
NO_COMPLETION = "the completion is empty"
NO_ASSISTANT = "no message is the assistant's"
NO_ANSWER = "the assistant's messages are empty"
NO_WEIGHT = "the assistant's messages have weight 0"

# what a part of a message holds that is not text: learned from, it would have to be something else than a token
_NOT_TEXT = ("image", "audio", "video", "file")
CALL_KEYS = ("tool_calls", "function_call")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
_PAYLOAD = ("content", *CALL_KEYS, *REASONING_KEYS)


def check_row(place: str, row: Mapping[str, Any], *, is_filled: bool = False) -> tuple[dict[str, Any] | None, int]:
    """Return a row in one form, with that form's columns alone, and in how many it could be read.

    The row is None where there is no text in it. Messages keep every key that is not None, since templates read what
    they like.

    Args:
        place: of the row, the beginning of an error.
        row: as the file has it.
        is_filled: the file gives all messages the same keys, and None for those that they lack, as parquet does.

    Raises:
        CalibrationError: the row has none of the forms, or a value of the wrong type.
    """
    forms = [form for form in FORMS if all(column in row for column in form)]
    if not forms:
        if all(_is_blank(value) for value in row.values()):
            return None, 0
        raise CalibrationError(place, _unusable(row))
    # a prompt without its completion gives way to a form that is whole
    whole = [form for form in forms if not _is_blank(row[form[-1]])]
    part = [form for form in forms if any(not _is_blank(row[column]) for column in form)]
    form = (whole or part or forms)[0]
    found: dict[str, Any] = {}
    for column in form:
        found[column] = _check_value(f"{place}: '{column}'", row[column], column, is_filled=is_filled)
    if not any(text.strip() for value in found.values() for text in strings_of(value, skip=("role",))):
        return None, len(part)
    if form == ("prompt", "completion"):
        _agree(place, found)
        if any(not is_learned(message) for message in found["completion"] if isinstance(message, dict)):
            raise CalibrationError(
                str(place), "'completion' has a message of 'weight' 0", "write the row as 'messages'"
            )
    if isinstance(found[form[-1]], list):
        found |= _check_extras(place, row, is_filled=is_filled)
    elif isinstance(row.get("tools"), list) and row["tools"]:
        found["tools"] = row["tools"]  # so that it can be told that nothing reads them
    return found, len(part)


def lacks(row: Mapping[str, Any]) -> str:
    """Return why nothing can be learned from a checked row, whatever the tokenizer; empty where something can."""
    if "completion" in row:
        told = row["completion"]
        is_empty = not (told.strip() if isinstance(told, str) else any(map(says_something, told)))
        return NO_COMPLETION if is_empty else ""
    if "messages" in row:
        turns = [message for message in row["messages"] if message["role"] == "assistant"]
        if not turns:
            return NO_ASSISTANT
        said = [message for message in turns if says_something(message)]
        return "" if any(map(is_learned, said)) else NO_WEIGHT if said else NO_ANSWER
    return ""


def is_learned(message: Mapping[str, Any]) -> bool:
    """Return whether a message of the assistant's is to be learned: its ``weight``, if it has one, is not 0."""
    return bool(message.get("weight", 1))


def says_something(message: Mapping[str, Any]) -> bool:
    """Return whether a message holds anything: content, calls of tools, or reasoning."""
    return any(text.strip() for key in _PAYLOAD for text in strings_of(message.get(key), skip=("type", "id")))


def strings_of(value: Any, skip: tuple[str, ...] = ()) -> Iterator[str]:
    """Yield every string in a value of JSON, keys aside, and none under the keys of ``skip``."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key not in skip:
                yield from strings_of(item, skip)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item, skip)


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or value == {} or (isinstance(value, str) and not value.strip())


def _unusable(row: Mapping[str, Any]) -> str:
    for here, other in (("prompt", "completion"), ("completion", "prompt")):
        if here in row:
            return f"has '{here}' without '{other}'; add it, empty if need be, or name the column 'text'."
    return (
        f"no usable column among {', '.join(map(str, list(row)[:12])) or 'none'}; rename them to 'text', to 'prompt' "
        "and 'completion', or to 'messages'."
    )


def _check_value(place: str, value: Any, column: str, *, is_filled: bool) -> Any:
    if column == "messages":
        return [] if value is None else _check_messages(place, value, is_filled=is_filled)
    if column in ("prompt", "completion") and isinstance(value, list):
        return _check_messages(place, value, is_filled=is_filled)
    return "" if value is None else check_text(place, value)


def _agree(place: str, row: dict[str, Any]) -> None:
    """See to it that prompt and completion are both text or both messages; what is empty goes with either."""
    kinds = {column: isinstance(value, list) for column, value in row.items()}
    if len(set(kinds.values())) == 1:
        return
    for column, value in row.items():
        if not value:
            row[column] = "" if kinds[column] else []
            return
    raise CalibrationError(
        str(place), "of 'prompt' and 'completion' one is text and one is messages", "write both alike"
    )


def _check_messages(place: str, value: Any, *, is_filled: bool) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise CalibrationError(f"{place} is not a list of objects with 'role' and 'content'; write it as one.")
    return [
        _check_message(f"{place}: message {number}", message, is_filled=is_filled)
        for number, message in enumerate(value, 1)
    ]


def _check_message(place: str, value: dict[str, Any], *, is_filled: bool) -> dict[str, Any]:
    """Return a message without the keys that are None, as transformers hands it to a template."""
    message: dict[str, Any] = {}
    for key, item in value.items():
        if key == "tool_calls" and not _is_blank(item):
            message[key] = _check_calls(place, item, is_filled=is_filled)
        elif item is not None and (key != "tool_calls" or item):
            message[key] = without_none(item) if is_filled else item
    if "role" not in message or not any(key in value for key in _PAYLOAD):
        raise CalibrationError(f"{place} lacks 'role' or 'content'; each needs both.")
    check_text(f"{place}: 'role'", message["role"])
    if message.get("weight", 1) not in (0, 1):
        raise CalibrationError(place, f"'weight' is {message['weight']!r:.40}", "write 1 to learn it, 0 not to")
    content = message.get("content", "")
    if isinstance(content, list):
        for part in content:
            _check_part(f"{place}: 'content'", part)
    else:
        check_text(f"{place}: 'content'", content)
    for text in strings_of(message):
        check_text(place, text)
    return message


def _check_part(place: str, part: Any) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(kind, str):
        raise CalibrationError(f"{place} is a list with a part that has no 'type'; write text as a string.")
    if any(word in kind for word in _NOT_TEXT):
        raise CalibrationError(f"{place} has a part of type '{kind}', and only text can be read; leave the row out.")
    if kind == "text":
        check_text(f"{place}: 'text'", part.get("text"))


def _check_calls(place: str, value: Any, *, is_filled: bool) -> list[dict[str, Any]]:
    calls = _parse(f"{place}: 'tool_calls'", value)
    if isinstance(calls, list):
        calls = [_parse(f"{place}: 'tool_calls'", call) if isinstance(call, str) else call for call in calls]
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise CalibrationError(place, "'tool_calls' is not a list of objects", "write it as one")
    calls = [without_none(call) for call in calls] if is_filled else calls
    for call in calls:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise CalibrationError(place, "a tool call has no 'name' of its function", "add it")
    return calls


def _check_extras(place: str, row: Mapping[str, Any], *, is_filled: bool) -> dict[str, Any]:
    """Return the row's tools as a list of objects, and its other words to the template."""
    extras: dict[str, Any] = {}
    tools = _parse(f"{place}: 'tools'", row.get("tools"))
    if not _is_blank(tools):
        tools = [_parse(f"{place}: 'tools'", tool) for tool in tools] if isinstance(tools, list) else tools
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise CalibrationError(place, "'tools' is not a list of objects", "write it as one, or as JSON of one")
        extras["tools"] = [without_none(tool) for tool in tools] if is_filled else tools
    words = row.get("chat_template_kwargs")
    if not _is_blank(words):
        if not isinstance(words, dict):
            raise CalibrationError(place, "'chat_template_kwargs' is not an object", "write it as one")
        extras["chat_template_kwargs"] = without_none(words) if is_filled else words
    for text in strings_of(extras):
        check_text(place, text)
    return extras


def _parse(place: str, value: Any) -> Any:
    """Return what a string of JSON holds, and anything else as it is."""
    if not isinstance(value, str) or not value.strip():
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place} is a string that is not JSON; write it as JSON.") from error


def without_none(value: Any) -> Any:
    """Return a value of JSON without the keys of objects that are None, however deep."""
    if isinstance(value, dict):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def check_text(place: str, value: Any) -> str:
    """Return a text; CalibrationError where it is something else, or cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise CalibrationError(f"{place} is a {type(value).__name__}, not text; write it as a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{place} has half a surrogate pair at character {error.start}; remove it.") from error
    return value
