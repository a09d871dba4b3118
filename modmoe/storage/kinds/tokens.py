"""Whether the embeddings have a row for each token that a tokenizer can give, known from its files before it is used.

Tokens are added in a line, and a model that is not resized for them fails where the first of them is read. A model with
more rows than tokens is as it should be: many are padded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modmoe.storage.documents import MOST_JSON_BYTES, read_text
from modmoe.storage.kinds.headers import Headers, Problem

EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "embed_in.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
)
"""Ends of the names that architectures give to the matrix with a row a token."""
_FILES = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json", "merges.txt", "special_tokens_map.json")
_SETTINGS = "tokenizer_config.json"
_SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_PLACEHOLDER = re.compile(r"<[^<>]*(image|audio|video|vision|img|frame)[^<>]*>", re.IGNORECASE)
"""Tokens that stand for what is no text: models of text alone come with the tokenizers of models that see."""
_MANY = 1000
"""Tokens without a row that nobody adds by hand: the tokenizer is another model's."""

Token = tuple[int, str, str]
"""The id, the token, and the file that says so."""


def has_tokenizer(directory: Path) -> bool:
    """Return whether a directory holds any file of a tokenizer."""
    return any(True for pattern in _FILES for _ in directory.glob(pattern))


def count_rows(headers: Headers) -> int | None:
    """Return the rows of the embeddings; None where no tensor is called as they are."""
    rows = [header.shape[0] for name, header in headers.items() if name.endswith(EMBEDDINGS) and header.shape]
    return max(rows, default=None)


def find_rowless(directory: Path, rows: int) -> Problem | None:
    """Return that a tokenizer in ``directory`` can give a token without one of the embeddings' ``rows``.

    What is no JSON, or not as tokenizers write it, is left to those who load the tokenizer.
    """
    found: dict[str, Token] = {}
    known: set[str] = set()
    largest = -1
    for number, token, file in _read_tokens(directory):
        known.add(token)
        largest = max(largest, number)
        if number >= rows and not _PLACEHOLDER.fullmatch(token):
            found.setdefault(token, (number, token, file))
    if known:
        # what is named as a special token and is none yet becomes the next one when the tokenizer is loaded
        new = [token for token in _named(directory) if token not in known]
        for number, token in enumerate(dict.fromkeys(new), largest + 1):
            if number >= rows:
                found.setdefault(token, (number, token, _SETTINGS))
    return describe_rowless(directory, sorted(found.values()), rows) if found else None


def describe_rowless(directory: Path, tokens: list[Token], rows: int) -> Problem:
    """Return the first of some tokens without a row, and what to do, which depends on how many there are."""
    number, token, file = tokens[0]
    others = f", and {len(tokens) - 1} tokens more are beyond them" if len(tokens) > 1 else ""
    what = f"token '{token[:60]}' has id {number}, and the embeddings have {rows} rows{others}"
    needed = tokens[-1][0] + 1
    if len(tokens) > _MANY or needed > 2 * rows + _MANY:
        return Problem(str(directory / file), what, "copy the tokenizer that belongs to these weights there")
    resize = f"model.resize_token_embeddings({needed})"
    return Problem(str(directory / file), what, f"save the model after {resize}, or take the tokens out of the files")


def without_row(vocabulary: Mapping[str, int], rows: int) -> list[Token]:
    """Return the tokens of a loaded tokenizer that have no row, the first id first."""
    return sorted(
        (number, token, ".")
        for token, number in vocabulary.items()
        if number >= rows and not _PLACEHOLDER.fullmatch(token)
    )


def _read_tokens(directory: Path) -> Iterator[Token]:
    file = "tokenizer.json"
    whole = _read(directory / file)
    if isinstance(whole, dict):
        model = whole.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        if isinstance(vocabulary, list):  # the place in the list is the id
            vocabulary = {str(one[0]): index for index, one in enumerate(vocabulary) if isinstance(one, list) and one}
        yield from _pairs(vocabulary, file)
        added = whole.get("added_tokens")
        for one in added if isinstance(added, list) else ():
            if isinstance(one, dict):
                yield from _pairs({str(one.get("content")): one.get("id")}, file)
    else:
        yield from _pairs(_read(directory / "vocab.json"), "vocab.json")
    yield from _pairs(_read(directory / "added_tokens.json"), "added_tokens.json")
    settings = _read(directory / _SETTINGS)
    decoder = settings.get("added_tokens_decoder") if isinstance(settings, dict) else None
    for number, one in decoder.items() if isinstance(decoder, dict) else ():
        if isinstance(one, dict) and number.isascii() and number.isdecimal() and len(number) < 12:
            yield int(number), str(one.get("content")), _SETTINGS


def _named(directory: Path) -> Iterator[str]:
    """Yield the special tokens that the settings of a tokenizer name."""
    settings = _read(directory / _SETTINGS)
    for key in _SPECIAL if isinstance(settings, dict) else ():
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str) and text:
            yield text


def _pairs(vocabulary: Any, file: str) -> Iterator[Token]:
    for token, number in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(number, int) and not isinstance(number, bool):
            yield number, str(token), file


def _read(path: Path) -> Any:
    try:
        return json.loads(read_text(path, MOST_JSON_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
