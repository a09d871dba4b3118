"""Which of a conversation's text the assistant wrote.

A template is a program and says nothing of where a message went. It may mark the assistant's turns ({% generation %}).
Else its text is compared with what it makes of the same conversation with other words in a message: what differs is
that message's. So a turn is found in the whole text, however the template writes earlier turns, the last one, or the
beginning of a conversation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from modmoe.analysis.text.chat import Messages, Options, Span, Template, calls_of, holds, text_of
from modmoe.analysis.text.forms import CALL_KEYS, REASONING_KEYS, is_learned, says_something, strings_of
from modmoe.errors import CalibrationError

TOOLS, CALLS, REASONING, CONTENT = "tools", "tool calls", "reasoning", "messages"
"""What a template may leave out of its text."""
TOOLS_BESIDE_TEXT = "tools beside text"
"""Of a row that is no conversation."""
SILENCE = "silence"
"""Nothing that the assistant says is in the text."""
_NO_WORDS = ("type", "id", "tool_use_id", "signature", "format", "cache_control")
"""Keys of parts whose values are not said."""
_END_OF_THOUGHT = "</think>"
_CALL_PARTS = ("name", "arguments")
_UNCLOSED = re.compile(r"[<\[][^>\]]*$")
_TAG = re.compile(r"[<\[][^>\]]*[>\]]")


class Conversation:
    """One row's messages and the text that a template made of them."""

    def __init__(self, place: str, template: Template, messages: Messages, options: Options, text: str) -> None:
        """Take messages in the way of writing them that the template understands, and ``place`` for errors."""
        self._place, self._template = place, template
        self._messages, self._options, self._text = messages, options, text
        self._contents: dict[int, Span] = {}

    def lost(self) -> list[str]:
        """Return what the row has and its text has not: TOOLS, CALLS, REASONING, CONTENT."""
        text, messages = self._text, self._messages
        found = []
        if "tools" in self._options:
            options = {key: value for key, value in self._options.items() if key != "tools"}
            if self._template.try_run(messages, options) == text:
                found.append(TOOLS)
        if any(calls_of(message) for message in messages):
            bare = [{"content": "", **_without(message, CALL_KEYS)} for message in messages]
            if self._template.try_run(bare, self._options) == text:
                found.append(CALLS)
        if not all(holds(text, thought) for message in messages for thought in _thoughts(message)):
            found.append(REASONING)
        dense = _squeeze(text)
        pieces = [piece for message in messages for piece in _pieces(message)]
        if not all(holds(text, piece) or holds(dense, _squeeze(piece)) for piece in pieces):
            found.append(CONTENT)
        return found

    def spans(self, first: int = 0) -> list[Span]:
        """Return where the assistant wrote, from the message ``first`` on, with what ends each of its turns.

        Turns of ``weight`` 0 are left out.

        Raises:
            CalibrationError: the text of a turn is not to be found.
        """
        turns = [
            index
            for index, message in enumerate(self._messages)
            if index >= first and message["role"] == "assistant" and says_something(message)
        ]
        marks = self._template.marks(self._messages, self._options, self._text) if turns and not first else []
        learned = {index for index in turns if is_learned(self._messages[index])}
        if marks and self._agree(marks, turns):
            return [mark for mark, index in zip(marks, turns, strict=True) if index in learned]
        self._contents = dict(self._all_at_once())
        regions = {index: region for index in turns if (region := self._region(index)) is not None}
        # of a turn whose calls the template leaves out nothing is to be learned, and of such a turn alone
        if (
            marks
            and len(regions) == len(turns) == len(learned)
            and all(any(_meet(mark, region) for mark in marks) for region in regions.values())
        ):
            return marks
        opening, spans = self._opening(turns), []
        for index, region in regions.items():
            if index not in learned:
                continue
            spans.append((self._start(index, region, opening), self._stop(index, region)))
        return spans

    def _agree(self, marks: list[Span], turns: list[int]) -> bool:
        """Return whether there is a mark for each turn, with its words in it."""
        return len(marks) == len(turns) and all(
            holds(self._text[slice(*mark)], _core(self._messages[index]))
            and all(call.get("name", "") in self._text[slice(*mark)] for call in calls_of(self._messages[index]))
            for mark, index in zip(marks, turns, strict=True)
        )

    def _all_at_once(self) -> Iterator[tuple[int, Span]]:
        """Yield the place of every content, where the template writes what is around contents whatever they are."""
        marks = {
            index: f"Q7301x{index}xQ"
            for index, message in enumerate(self._messages)
            if isinstance(message.get("content"), str) and message["content"].strip()
        }
        changed = [
            {**message, "content": marks[index]} if index in marks else message
            for index, message in enumerate(self._messages)
        ]
        other = self._template.try_run(changed, self._options)
        if other is None or any(other.count(mark) > 1 or mark in self._text for mark in marks.values()):
            return
        order = sorted((other.index(mark), index) for index, mark in marks.items() if mark in other)
        found, reached, done = [], 0, 0
        for number, (place, index) in enumerate(order):
            before = other[done:place]
            done = place + len(marks[index])
            after = other[done : order[number + 1][0] if number + 1 < len(order) else len(other)]
            content, start = self._messages[index]["content"], reached + len(before)
            stop = next(
                (
                    start + len(way)
                    for way in (content, content.strip(), content.lstrip(), content.rstrip())
                    if self._text.startswith(way, start) and self._text.startswith(after, start + len(way))
                ),
                None,
            )
            if stop is None or not self._text.startswith(before, reached):
                return
            found.append((index, (start, stop)))
            reached = stop
        if self._text[reached:] == other[done:]:
            yield from found

    def _region(self, index: int) -> Span | None:
        """Return where the words of a message lie; None where it has none, or the template ignores what it has.

        Raises:
            CalibrationError: the message has content, and its place is not to be found.
        """
        message = self._messages[index]
        sure = [self._contents[index]] if index in self._contents else []
        if not sure and says_something({"content": message.get("content")}):
            sure.append(self._changed(index, ("content",)) or self._region_by_prefix(index))
        if calls_of(message) and (place := self._changed(index, CALL_KEYS)) is not None:
            # a template may write a call's name once more where the tool answers
            inner = self._changed(index, CALL_KEYS, ("arguments",)) or place
            sure.append((place[0], inner[1]))
        if not sure and (place := self._changed(index, REASONING_KEYS)) is not None:
            sure.append(place)
        return (min(start for start, _ in sure), max(stop for _, stop in sure)) if sure else None

    def _changed(self, index: int, keys: tuple[str, ...], parts: tuple[str, ...] = _CALL_PARTS) -> Span | None:
        """Return what changes in the text with what a message has under some keys; None where nothing does."""
        other = self._run_with(index, _reworded(self._messages[index], keys, self._text, parts))
        return None if other is None or other == self._text else _difference(self._text, other)

    def _region_by_prefix(self, index: int) -> Span:
        """Return what the conversation up to a message has more than up to the one before."""
        run = self._template.try_run
        before = run(self._messages[:index], self._options, opened=True) if index else ""
        whole = run(self._messages[: index + 1], self._options)
        if before is not None and whole is not None and self._text.startswith(before) and self._text.startswith(whole):
            region = (len(before), len(whole))
            if holds(self._text[slice(*region)], _core(self._messages[index])):
                return region
        raise CalibrationError(
            str(self._place),
            f"the chat template leaves message {index + 1}, which is the assistant's, out of "
            "its text, or rewrites it so that it is not to be found",
            "leave the row out, or mark the assistant's turns in the template with {% generation %}",
        )

    def _run_with(self, index: int, message: dict[str, Any]) -> str | None:
        return self._template.try_run([*self._messages[:index], message, *self._messages[index + 1 :]], self._options)

    def _opening(self, turns: list[int]) -> str:
        """Return what the template writes for the assistant to go on from."""
        whole = self._template.try_run(self._messages, self._options, opened=True)
        if whole is not None and whole.startswith(self._text) and len(whole) > len(self._text):
            return whole[len(self._text) :]
        for index in turns:
            part = self._messages[:index]
            closed = self._template.try_run(part, self._options) if part else None
            opened = self._template.try_run(part, self._options, opened=True) if part else None
            if closed is not None and opened is not None and opened.startswith(closed) and opened != closed:
                return opened[len(closed) :]
        return ""

    def _start(self, index: int, region: Span, opening: str) -> int:
        """Return where the assistant begins to write: behind the opening, where it is there, or with its words."""
        least = self._stop_before(index)
        # a template may write the opening of a turn that is over without its end, such as the tag of a thought
        for length in range(len(opening), len(opening) // 2, -1):
            part = opening[:length] if length == len(opening) else _UNCLOSED.sub("", opening[:length])
            # what comes first belongs to the turn, since reasoning may have an opening of its own
            find = self._text.rfind if least is None else self._text.find
            place = find(part, least or 0, region[0]) if part.strip() else -1
            if place >= 0:
                return place + len(part)
        return region[0]

    def _stop_before(self, index: int) -> int | None:
        """Return where the words of the message before end, so that they are not taken for an opening; None unknown."""
        if index == 0:
            return None
        try:
            region = self._region(index - 1)
        except CalibrationError:
            return None
        return None if region is None else region[1]

    def _stop(self, index: int, region: Span) -> int:
        """Return where the turn is over, with what the template writes at the end of one."""
        if index == len(self._messages) - 1:
            return len(self._text)
        follows = self._text[region[1] :]
        shared = follows[: _shared(follows, self._end_of(index, region[1]))]
        end = _UNCLOSED.sub("", shared)
        if shared and not end and (tag := _TAG.match(follows)):
            # another tag ends the last turn of a conversation than the turns before
            end = tag[0]
        return region[1] + len(end)

    def _end_of(self, index: int, stop: int) -> str:
        """Return what the template writes behind a message's words where nothing follows."""
        last = len(self._messages) - 1
        is_alike = self._messages[last]["role"] == "assistant" and not any(
            calls_of(self._messages[number]) for number in (index, last)
        )
        if is_alike and last in self._contents:
            end = self._text[self._contents[last][1] :]
            if end and self._text.startswith(end[0], stop):
                return end
        part = self._messages[: index + 1]
        text = self._template.try_run(part, self._options)
        if text is None:
            return ""
        if text.startswith(self._text[:stop]):
            return text[stop:]
        region = Conversation(self._place, self._template, part, self._options, text)._region(index)
        return "" if region is None else text[region[1] :]


def _thoughts(message: dict[str, Any]) -> Iterator[str]:
    """Yield the reasoning of a message, in keys of its own and in its content."""
    for key in (*REASONING_KEYS, "reasoning_details"):
        yield from strings_of(message.get(key), skip=_NO_WORDS)
    content = text_of(message.get("content"))
    if message["role"] == "assistant" and _END_OF_THOUGHT in content:
        yield content.rpartition(_END_OF_THOUGHT)[0].rpartition("<think>")[2]


def _core(message: dict[str, Any]) -> str:
    """Return the words of a message behind its reasoning, which templates may leave out."""
    return text_of(message.get("content")).rpartition(_END_OF_THOUGHT)[2]


def _without(message: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if key not in keys}


def _pieces(message: dict[str, Any]) -> Iterator[str]:
    """Yield the words of a message's content, also those in parts that are no text."""
    content = message.get("content")
    if isinstance(content, list):
        yield from strings_of(content, skip=_NO_WORDS)
    else:
        yield _core(message) if message["role"] == "assistant" else text_of(content)


def _squeeze(text: str) -> str:
    """Return a text without its white space, which templates set as they like."""
    return "".join(text.split())


def _reworded(
    message: dict[str, Any], keys: tuple[str, ...], text: str, parts: tuple[str, ...] = _CALL_PARTS
) -> dict[str, Any]:
    """Return a message with other words under some keys, and in some parts of a call.

    They begin and end with another letter than the message's own.
    """
    told = [text_of(message.get("content")), _core(message), *(str(call.get("name", "")) for call in calls_of(message))]
    told += [str(message.get(key, "")) for key in REASONING_KEYS]
    ends = {part.strip()[place] for part in told if part.strip() for place in (0, -1)}
    letter = next(letter for letter in "QXJZWVKYquxjzwvky" if letter not in ends)
    word = next(word for number in range(10**9) if (word := f"{letter}7301x{number}{letter}") not in text)

    def reword(key: str, value: Any) -> Any:
        if key in CALL_KEYS:
            return (
                [_call(call, word, parts) for call in value] if isinstance(value, list) else _call(value, word, parts)
            )
        if isinstance(value, list):
            return [{**part, "text": word} if "text" in part else part for part in value]
        return word

    return {key: reword(key, value) if key in keys and value else value for key, value in message.items()}


def _call(call: Any, word: str, parts: tuple[str, ...]) -> Any:
    if not isinstance(call, dict):
        return call
    if "function" in call:
        return {**call, "function": _call(call["function"], word, parts)}
    arguments = {word: word} if isinstance(call.get("arguments"), dict) else f'{{"{word}": "{word}"}}'
    values = {"name": word, "arguments": arguments}
    return {key: values[key] if key in parts else value for key, value in call.items()}


def _difference(text: str, other: str) -> Span:
    """Return the range of a text that lies between what it shares with another from either end."""
    start = _shared(text, other)
    most = min(len(text), len(other)) - start
    return start, len(text) - _shared(text[::-1][:most], other[::-1][:most])


def _shared(text: str, other: str) -> int:
    """Return how many leading characters two texts share."""
    least, most = 0, min(len(text), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        least, most = (middle, most) if text[:middle] == other[:middle] else (least, middle - 1)
    return least


def _meet(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]
