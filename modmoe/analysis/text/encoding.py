"""Rows become tokens: for calibration, training and evaluation in this one place.

The tokenizer and its chat template are a stranger's programs, so they run in a child process within bounds, and send
what they make of some rows at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modmoe.analysis.text.chat import Span, Template, options_of
from modmoe.analysis.text.rows import TaskRows
from modmoe.analysis.text.turns import SILENCE, TOOLS_BESIDE_TEXT, Conversation
from modmoe.errors import CalibrationError, CheckpointError
from modmoe.models.tokenizer_files import files_of
from modmoe.storage.bounded import in_bounds

_MOST_TOKEN_CHARACTERS = 256
"""Of the tokens of a text on average: more than the longest that vocabularies have."""
_FIRST_ROWS, _MOST_ROWS = 8, 64
_MOST_CHARACTERS = 1 << 20
"""Of rows that are sent together: few at first, since some readers want few."""
_SHOWN_TOKENS = 200

Piece = tuple[str, bool]
"""Text of neighbouring tokens, and whether they count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One row of a task as tokens."""

    task: int
    """Among the tasks."""
    index: int
    """Among the task's rows."""
    input_ids: list[int]
    """Tokens, begun as the tokenizer begins a text, or as its chat template begins a conversation."""
    counted: list[bool]
    """Whether the prediction of a token counts; never that of the first. All true where that was not asked for."""
    num_bytes: list[int]
    """UTF-8 bytes of the text that each token adds; all 0 where what counts was not asked for."""
    lost: list[str]
    """What the chat template leaves out, in the words of ``modmoe.analysis.text.turns``: TOOLS, SILENCE and so on."""
    is_cut: bool
    """Whether the row has more tokens than these."""
    shown: list[Piece]
    """The first tokens in words; of the first row alone."""

    def cut(self, length: int) -> EncodedRow:
        """Return the first ``length`` tokens."""
        return replace(
            self,
            input_ids=self.input_ids[:length],
            is_cut=self.is_cut or len(self.input_ids) > length,
            counted=self.counted[:length],
            num_bytes=self.num_bytes[:length],
        )


def encode_tasks(
    tokenizer: Any,
    tasks: Sequence[TaskRows],
    order: Iterable[tuple[int, int]],
    *,
    counts: bool = True,
    end: bool = False,
    longest: int | None = None,
    num_embeddings: int | None = None,
) -> Iterator[EncodedRow]:
    """Yield rows of several tasks as tokens, lazily.

    What counts: all of a text but its first token, the completion of a prompt, the assistant's turns of messages with
    what ends them. A prompt and its completion are joined as TRL joins them: nothing stands between, and the
    completion begins with the first token that the prompt alone has not. Messages go through the tokenizer's chat
    template, with the row's tools; without a template they become lines of "role: content".

    Args:
        tokenizer: of transformers. One without offsets (not a fast one) is measured by decoding token by token.
        tasks: rows of each.
        order: which rows, by the task's index and the row's among the task's.
        counts: tell what counts, which takes several runs of the template for a row of messages.
        end: add the end-of-text token to a completion of text, so that a model learns to stop. A text gets none: where
            a file's text ends says little. Messages have what their template ends them with.
        longest: rows are cut to so many tokens.
        num_embeddings: rows of the model's embeddings; a token beyond them is refused.

    Raises:
        CalibrationError: the chat template refuses a row, or an assistant's turn is not to be found in its text.
        CheckpointError: the tokenizer or its template takes too much memory or time, or gives a token that the model
            has not.
    """
    encoder = _Encoder(tokenizer, tasks, counts=counts, end=end, longest=longest)
    chosen = list(order)
    files = tasks[0].place if len(tasks) == 1 else f"tasks {', '.join(rows.name for rows in tasks)}"
    items = in_bounds(
        lambda: encoder.encode(chosen),
        place=f"{files_of(tokenizer)}, with the text of {files}",
        remedy="use another tokenizer, or cut the rows",
    )
    with contextlib.closing(items):  # type: ignore[type-var]
        for item in items:
            for task, index, ids, runs, sizes, lost, is_cut, shown in item:
                _check_ids(tokenizer, tasks[task], index, ids, num_embeddings)
                yield EncodedRow(
                    task=task,
                    index=index,
                    input_ids=ids,
                    counted=[True] * len(ids) if runs is None else _flags(runs, len(ids)),
                    num_bytes=sizes or [0] * len(ids),
                    lost=lost,
                    is_cut=is_cut,
                    shown=[(str(text), bool(counted)) for text, counted in shown],
                )


def encode_rows(
    tokenizer: Any, rows: TaskRows, order: Iterable[int] | None = None, **options: Any
) -> Iterator[EncodedRow]:
    """Yield rows of one task as tokens, all or those of ``order``; as ``encode_tasks``, with its options."""
    chosen = range(len(rows)) if order is None else order
    return encode_tasks(tokenizer, [rows], ((0, index) for index in chosen), **options)


def encode_row(row: dict[str, Any], tokenizer: Any, **options: Any) -> EncodedRow:
    """Return one row as tokens; ``options`` are those of ``encode_tasks``."""
    encoded = encode_rows(tokenizer, TaskRows("row", "memory", [row], [1]), **options)
    with contextlib.closing(encoded):  # type: ignore[type-var]
        return next(encoded)


def _check_ids(tokenizer: Any, rows: TaskRows, index: int, ids: Sequence[int], num_embeddings: int | None) -> None:
    """Refuse a token that the model's embeddings have no row for: on a GPU it would end the process."""
    if not ids or (min(ids) >= 0 and (num_embeddings is None or max(ids) < num_embeddings)):
        return
    wrong = min(ids) if min(ids) < 0 else max(ids)
    has = "" if num_embeddings is None else f", and the embeddings have {num_embeddings} rows"
    raise CheckpointError(
        str(_name_of(tokenizer)),
        f"row {rows.numbers[index]} of {rows.place} has the token {wrong}{has}",
        "use the tokenizer that belongs to the model, or widen the embeddings",
    )


def _name_of(tokenizer: Any) -> str:
    return getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__


@dataclass(frozen=True, slots=True, kw_only=True)
class _Text:
    """A row before it is tokenized."""

    task: int
    index: int
    text: str
    is_special: bool
    """Whether the tokenizer's own first and last tokens are put around it."""
    prompt: str | None
    """What comes before that which counts, as text; None where ``spans`` say what counts."""
    spans: list[Span]
    num_characters: int
    """Of the row itself, whole and without the end-of-text token."""
    lost: list[str]


class _Encoder:
    """What runs in the child."""

    def __init__(
        self, tokenizer: Any, tasks: Sequence[TaskRows], *, counts: bool, end: bool, longest: int | None
    ) -> None:
        self._tokenizer, self._tasks = tokenizer, tasks
        self._counts, self._end = counts, end
        self._longest = longest
        # tokenizers cut a text when it is tokenized whole, which takes minutes where it is a book without a space
        self._most = None if longest is None else _MOST_TOKEN_CHARACTERS * longest
        self._template = Template(tokenizer)
        self._is_seen = [False] * len(tasks)
        self._is_steady = False

    def encode(self, order: Iterable[tuple[int, int]]) -> Iterator[list[Any]]:
        """Yield lists of rows: task, index, ids, where they count, bytes, what is lost, whether it is cut, words."""
        texts: list[_Text] = []
        num_rows, num_characters = _FIRST_ROWS, 0
        for task, index in order:
            try:
                texts.append(self._write(task, index))
            except CalibrationError:
                # the rows before may be all that is wanted
                if texts:
                    yield self._tokenize(texts)
                raise
            num_characters += len(texts[-1].text)
            if len(texts) >= num_rows or num_characters >= _MOST_CHARACTERS:
                yield self._tokenize(texts)
                texts, num_rows, num_characters = [], min(2 * num_rows, _MOST_ROWS), 0
        if texts:
            yield self._tokenize(texts)

    def _write(self, task: int, index: int) -> _Text:
        rows, counts = self._tasks[task], self._counts
        row, place = rows[index], f"{rows.place}: row {rows.numbers[index]}"
        text, prompt, is_special = "", None, True
        spans: list[Span] = []
        lost = [TOOLS_BESIDE_TEXT] if "tools" in row else []
        if "messages" in row:
            text, spans, lost = self._converse(place, row, row["messages"], 0, counts=counts)
        elif "text" in row:
            text = row["text"]
            spans = [(0, len(text))]
        elif isinstance(row["completion"], list):
            text, prompt, spans, lost = self._converse_pair(place, row)
        else:
            prompt, text = row["prompt"], row["prompt"] + row["completion"]
        num_characters = len(text)
        bos = getattr(self._tokenizer, "bos_token", None)
        if self._template.is_there and ("messages" in row or isinstance(row.get("completion"), list)):
            # a template writes the first token itself
            is_special = False
        elif bos and text.startswith(bos):
            # a second first token would be text that the model never saw
            is_special = False
        eos = getattr(self._tokenizer, "eos_token", None)
        if self._end and eos and isinstance(row.get("completion"), str) and not text.endswith(eos):
            text += eos
        return _Text(
            task=task,
            index=index,
            text=text[: self._most],
            is_special=is_special,
            prompt=prompt if prompt is None else prompt[: self._most],
            spans=spans,
            num_characters=num_characters,
            lost=lost,
        )

    def _converse(
        self, place: str, row: dict[str, Any], messages: list[dict[str, Any]], first: int, *, counts: bool
    ) -> tuple[str, list[Span], list[str]]:
        """Return the text of messages, what the assistant wrote of it from one message on, and what is lost."""
        options = options_of(place, row)
        text, way = self._template.choose(place, messages, options)
        if not self._is_steady and self._template.run(way(messages), options) != text:
            raise CalibrationError(
                str(place), "the chat template writes another text each time, such as the time of day", "take that out"
            )
        self._is_steady = True
        conversation = Conversation(place, self._template, way(messages), options, text)
        lost = conversation.lost()
        spans = conversation.spans(first) if counts else []
        return text, spans, lost if spans or not counts else [*lost, SILENCE]

    def _converse_pair(self, place: str, row: dict[str, Any]) -> tuple[str, str | None, list[Span], list[str]]:
        """Return the text of a prompt and a completion of messages, and that of the prompt as TRL writes it alone.

        Where the template refuses the prompt alone there is none, and the assistant's turns behind it count.
        """
        prompt, options = row["prompt"], options_of(place, row)
        messages = [*prompt, *row["completion"]]
        text, way = self._template.choose(place, messages, options)
        alone = self._template.try_run(way(prompt), options, opened=True) if prompt else ""
        text, spans, lost = self._converse(place, row, messages, len(prompt), counts=self._counts and alone is None)
        return text, alone, spans, lost

    def _tokenize(self, texts: Sequence[_Text]) -> list[Any]:
        """Return rows as they are sent; the tokenizer gets all of them at once."""
        found: list[Any] = []
        is_fast = getattr(self._tokenizer, "is_fast", False)
        wholes = self._call([(row.text, row.is_special) for row in texts], return_offsets_mapping=is_fast)
        prompts = self._call([(row.prompt or "", row.is_special) for row in texts if row.prompt is not None])
        for row, (ids, offsets) in zip(texts, wholes, strict=True):
            before = None if row.prompt is None else next(prompts)[0]
            runs: list[int] | None = None
            sizes: list[int] | None = None
            is_first = not self._is_seen[row.task]
            self._is_seen[row.task] = True
            if self._counts or is_first:
                offsets = self._offsets(ids) if offsets is None else offsets
                counted = _count(ids, offsets, row.spans, before)
                runs, sizes = _runs(counted[: self._longest]), _sizes(row, offsets)[: self._longest]
            shown = self._words(ids, _flags(runs, len(ids))) if is_first and runs is not None else []
            told = (runs, sizes) if self._counts else (None, None)
            is_cut = len(ids) > (self._longest or len(ids)) or row.num_characters > len(row.text)
            found.append((row.task, row.index, ids[: self._longest], *told, row.lost, is_cut, shown))
        return found

    def _call(
        self, texts: Sequence[tuple[str, bool]], *, return_offsets_mapping: bool = False
    ) -> Iterator[tuple[list[int], list[Span] | None]]:
        """Yield the tokens of texts, with the characters of each where the tokenizer tells them."""
        answers: dict[bool, Iterator[Any]] = {}
        for special in (True, False):
            part = [text for text, is_special in texts if is_special == special]
            if part:
                options = {"return_offsets_mapping": True} if return_offsets_mapping else {}
                made = self._tokenizer(part, add_special_tokens=special, verbose=False, **options)
                places = made["offset_mapping"] if return_offsets_mapping else [None] * len(part)
                answers[special] = iter(zip(made["input_ids"], places, strict=True))
        for _, special in texts:
            ids, places = next(answers[special])
            yield [int(token) for token in ids], places

    def _offsets(self, ids: Sequence[int]) -> list[Span]:
        offsets, reached = [], 0
        for token in ids:
            length = len(self._tokenizer.decode([token], skip_special_tokens=True))
            offsets.append((reached, reached + length))
            reached += length
        return offsets

    def _words(self, ids: Sequence[int], counted: Sequence[bool]) -> list[Piece]:
        """Return the first tokens in words, those together that count alike."""
        pieces: list[Piece] = []
        start, most = 0, min(len(ids), _SHOWN_TOKENS)
        for stop in range(1, most + 1):
            if stop == most or counted[stop] != counted[start]:
                pieces.append((str(self._tokenizer.decode(list(ids[start:stop]))), bool(counted[start])))
                start = stop
        return pieces


def _count(
    ids: Sequence[int], offsets: Sequence[Span], spans: Sequence[Span], before: Sequence[int] | None
) -> list[bool]:
    """Return which tokens count: behind what a prompt alone has, or those that have a part in the spans."""
    if before is not None:
        pairs = enumerate(zip(ids, before, strict=False))
        shared = next((place for place, (one, other) in pairs if one != other), min(len(ids), len(before)))
        return [0 < place >= shared for place in range(len(ids))]
    counted, place = [], 0
    for number, (start, stop) in enumerate(offsets):
        while place < len(spans) and spans[place][1] <= start:
            place += 1
        counted.append(number > 0 and place < len(spans) and start < stop and spans[place][0] < stop)
    return counted


def _sizes(row: _Text, offsets: Sequence[Span]) -> list[int]:
    """Return the bytes that each token adds.

    They are counted from where the last token ended: tokenizers leave out spaces, and split a character's bytes.
    """
    text, most, is_plain = row.text, min(row.num_characters, len(row.text)), row.text.isascii()
    sizes, reached = [], 0
    for _, stop in offsets:
        stop = min(stop, most)
        sizes.append(0 if stop <= reached else stop - reached if is_plain else len(text[reached:stop].encode()))
        reached = max(reached, stop)
    return sizes


def _runs(counted: Sequence[bool]) -> list[int]:
    """Return where tokens begin to count and where they cease to, in turn."""
    runs, before = [], False
    for place, counts in enumerate(counted):
        if counts != before:
            runs.append(place)
            before = counts
    return runs


def _flags(runs: Sequence[int], length: int) -> list[bool]:
    flags: list[bool] = []
    for number, place in enumerate([*runs, length]):
        flags += [number % 2 == 1] * (place - len(flags))
    return flags
