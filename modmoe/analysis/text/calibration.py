"""Calibration text: named tasks become rows, rows become batches of tokens."""

# Shapes: B sequences of a batch, T tokens of a sequence, N sequences in all, D model width

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.text.encoding import encode_rows
from modmoe.analysis.text.reading import Reading
from modmoe.analysis.text.rows import TaskRows, read_rows

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Sequences padded on the right to one length."""

    input_ids_BT: Tensor
    """int64 token ids."""
    attention_mask_BT: Tensor
    """int64; 1 for a token, 0 for padding."""

    @property
    def num_tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.attention_mask_BT.sum())


def load_task(name: str, file: str, *, limit: int | None = None) -> TaskRows:
    """Read the rows of one task, each in one form: text, prompt and completion, or messages.

    Args:
        name: the task's name, for errors.
        file: a ``.jsonl``, ``.json`` (a list of objects, or of strings), ``.parquet`` or ``.txt`` file, or
            ``hub:ID[:CONFIG][:SPLIT]``; a single part after the id that is train, validation or test is a split.
            A ``.txt`` file is cut into documents at blank lines; without any, its lines are joined into passages.
        limit: at most so many rows are read; None reads all.

    A file may have rows of all forms; a row that has several counts as the first of
    ``modmoe.analysis.text.forms.FORMS``. Other columns are dropped, but for ``tools`` and ``chat_template_kwargs``
    beside messages. Rows without a single character that is not white space are left out, and counted. Local files
    leave nothing in a cache.

    Raises:
        CalibrationError: no such file, an unknown extension, invalid UTF-8, JSON or parquet, a row without a usable
            column, a value of the wrong type, lines or files that would fill the memory, or no text at all. One line
            with the task, the file, the row and the remedy.
    """
    return read_rows(name, file, limit)


def warn_of_length(settings: Any, sequence_length: int, place: str) -> None:
    """Warn where sequences are longer than a model has positions: what it computes behind them it never learned.

    Args:
        settings: the model's configuration, or its values.
        sequence_length: tokens of a sequence, at most.
        place: the key that the length was given under.
    """
    values = settings if isinstance(settings, dict) else settings.to_dict()
    positions = values.get("max_position_embeddings")
    if isinstance(positions, int) and 0 < positions < sequence_length:
        LOG.warning(
            f"{place}: {sequence_length:,} tokens are more than the {positions:,} positions of the model "
            f"(max_position_embeddings), which learned nothing of those behind; give {positions:,} at most"
        )


def token_batches(
    tokenizer: Any,
    name: str,
    rows: TaskRows,
    *,
    tokens: int,
    sequence_length: int,
    batch_size: int,
    seed: int,
    num_embeddings: int | None = None,
    reading: Reading | None = None,
) -> list[Batch]:
    """Turn rows, in an order drawn from ``seed``, into batches until ``tokens`` tokens are reached.

    Each row is cut to ``sequence_length`` tokens and begins as the tokenizer begins a text. All of its tokens are read,
    those of a prompt too. The sequences drawn are sorted by length before they are batched, so that little is padded;
    padding is on the right. ``num_embeddings`` is as for ``encode_rows``; ``reading`` counts what is read.

    Raises:
        CalibrationError: the rows have no tokens, or the chat template refuses one.
        CheckpointError: the tokenizer takes too much memory or time, or gives a token that the model has not.
    """
    reading = reading or Reading(rows, tokenizer, learns=False, length=sequence_length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    sequences: list[list[int]] = []
    encoded = encode_rows(tokenizer, rows, order, counts=False, longest=sequence_length, num_embeddings=num_embeddings)
    with contextlib.closing(encoded):  # type: ignore[type-var]
        while reading.num_tokens < tokens and (row := next(encoded, None)) is not None:
            if reading.add(row):
                sequences.append(row.input_ids)
    reading.check()
    padding = padding_of(tokenizer, num_embeddings)
    sequences.sort(key=len)
    return [pad(sequences[start : start + batch_size], padding) for start in range(0, len(sequences), batch_size)]


def padding_of(tokenizer: Any, num_embeddings: int | None) -> int:
    """Return the token that fills rows up, which nothing reads: the tokenizer's own, or one that the model has."""
    named = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id"))
    known = [token for token in named if isinstance(token, int) and 0 <= token < (num_embeddings or token + 1)]
    return known[0] if known else 0


def pad(sequences: Sequence[Sequence[int]], padding: int) -> Batch:
    """Return sequences of tokens as a batch, filled up on the right with the token ``padding``."""
    longest = max(map(len, sequences))
    ids_BT = torch.full((len(sequences), longest), padding, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        mask_BT[row, : len(sequence)] = 1
    return Batch(ids_BT, mask_BT)
