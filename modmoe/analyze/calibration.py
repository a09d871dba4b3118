"""Calibration text: named tasks become rows, rows become batches of tokens."""

# Shapes: B sequences of a batch, T tokens of a sequence, N sequences in all, D model width

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modmoe.analyze.rows import read_rows
from modmoe.errors import CalibrationError

if TYPE_CHECKING:
    from datasets import Dataset

    from modmoe.analyze.stream import Runner, Turn

_MOST_TOKEN_CHARACTERS = 256
"""Of the tokens of a text on average: more than the longest that vocabularies have."""


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


def load_task(name: str, file: str, *, limit: int | None = None) -> Dataset:
    """Read the text of one task into rows of exactly one form: text, prompt and completion, or messages.

    Args:
        name: the task's name, for errors.
        file: a ``.jsonl``, ``.json`` (a list of objects, or of strings), ``.parquet`` or ``.txt`` file, or
            ``hub:ID[:CONFIG][:SPLIT]``; a single part after the id that is train, validation or test is a split.
            A ``.txt`` file is cut into documents at blank lines; without any, its lines are joined into passages.
        limit: at most so many rows are read; None reads all.

    Other columns are dropped, and so are rows without a single character that is not white space. Local files leave
    nothing in a cache.

    Raises:
        CalibrationError: no such file, an unknown extension, invalid UTF-8, JSON or parquet, no usable column, a value
            of the wrong type, lines or files that would fill the memory, or no text at all. One line with the task,
            the file, the row and the remedy.
    """
    from datasets import Dataset

    return Dataset.from_list(read_rows(name, file, limit))


def render(row: dict[str, Any], tokenizer: Any) -> str:
    """Return the text of a row: its text, prompt and completion, or messages through the tokenizer's chat template.

    Without a chat template, messages become lines of "role: content".
    """
    if "messages" in row:
        messages = [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
        if getattr(tokenizer, "chat_template", None):
            return str(tokenizer.apply_chat_template(messages, tokenize=False))
        return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
    return str(row["prompt"]) + str(row["completion"]) if "prompt" in row else str(row["text"])


def token_batches(
    tokenizer: Any, name: str, dataset: Dataset, *, tokens: int, sequence_length: int, batch_size: int, seed: int
) -> list[Batch]:
    """Turn rows, in an order drawn from ``seed``, into batches until ``tokens`` tokens are reached.

    Each row is cut to ``sequence_length`` tokens and begins as the tokenizer begins a text. The sequences drawn are
    sorted by length before they are batched, so that little is padded; padding is on the right.

    Raises:
        CalibrationError: the rows have no tokens, or the chat template refuses one.
    """
    generator = torch.Generator().manual_seed(seed)
    sequences: list[list[int]] = []
    total = 0
    for index in torch.randperm(len(dataset), generator=generator).tolist():
        if total >= tokens:
            break
        try:
            text = render(dataset[index], tokenizer)
        except Exception as error:  # a template is a program, and raises what it likes
            reason = " ".join(str(error).split())
            raise CalibrationError(f"tasks.{name}: the chat template refuses row {index + 1}: {reason}") from error
        # a chat template writes the first token itself; a second one would be text that the model never saw
        bos = getattr(tokenizer, "bos_token", None)
        special = not (bos and text.startswith(bos))
        # tokenizers cut a text when it is tokenized whole, which takes minutes where it is a book without a space
        text = text[: _MOST_TOKEN_CHARACTERS * sequence_length]
        ids = tokenizer(text, truncation=True, max_length=sequence_length, add_special_tokens=special)["input_ids"]
        if ids:
            sequences.append([int(token) for token in ids])
            total += len(ids)
    if not sequences:
        raise CalibrationError(
            f"tasks.{name}: the tokenizer finds no tokens in its {len(dataset)} rows; name other text."
        )
    padding = getattr(tokenizer, "pad_token_id", None)
    if padding is None:
        padding = getattr(tokenizer, "eos_token_id", None) or 0
    sequences.sort(key=len)
    return [_pad(sequences[start : start + batch_size], padding) for start in range(0, len(sequences), batch_size)]


def cluster_sequences(
    runner: Runner,
    batches: Sequence[Batch],
    num_clusters: int,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[Batch]]:
    """Divide the sequences of one corpus into ``num_clusters`` tasks, named cluster0, cluster1, ...

    k-means on each sequence's mean hidden state, read behind half of the decoder layers, each dimension scaled to unit
    variance. Sizes are not balanced. The model is left as it was. ``progress`` is called with tokens that are done.

    Raises:
        CalibrationError: fewer different sequences than clusters.
    """
    from sklearn.cluster import KMeans

    # here, since what runs the text is told apart from what it is
    from modmoe.analyze import ranks
    from modmoe.analyze.stream import starts_of

    first = starts_of(len(batch.input_ids_BT) for batch in batches)
    features_ND = torch.zeros(0, 1)
    layers = (runner.num_layers + 1) // 2

    def watch(layer: int, hidden_BTD: Tensor, turn: Turn) -> None:
        nonlocal features_ND
        if layer == layers - 1:
            if not len(features_ND):
                total = sum(len(batch.input_ids_BT) for batch in batches)
                features_ND = torch.zeros(total, hidden_BTD.shape[-1], dtype=torch.float64)
            mask_BT1 = turn.batch.attention_mask_BT.double().unsqueeze(-1)
            mean_BD = (hidden_BTD.double().cpu() * mask_BT1).sum(1) / mask_BT1.sum(1).clamp_min(1)
            features_ND[first[turn.index] :][: len(mean_BD)] = mean_BD

    runner.run({"": batches}, on_output=watch, layers=layers, progress=progress)
    features_ND = ranks.add_up(features_ND)
    num_different = len(torch.unique(features_ND, dim=0))
    if num_different < num_clusters:
        raise CalibrationError(
            f"calibration: {num_different} different sequences cannot make {num_clusters} clusters; raise "
            "calibration.tokens, or ask for fewer experts."
        )
    features_ND = features_ND - features_ND.mean(0)
    # a few dimensions of a hidden state are hundreds of times larger than the rest and would decide alone
    features_ND = features_ND / features_ND.std(0, correction=0).clamp_min(1e-12)
    label_N = torch.zeros(len(features_ND), dtype=torch.int64)
    if ranks.is_first():
        label_N += torch.as_tensor(KMeans(num_clusters, n_init=10, random_state=seed).fit_predict(features_ND.numpy()))
    label_N = ranks.from_first(label_N)
    sequences = [
        ids_T[mask_T.bool()].tolist()
        for batch in batches
        for ids_T, mask_T in zip(batch.input_ids_BT, batch.attention_mask_BT, strict=True)
    ]
    size = max(len(batch.input_ids_BT) for batch in batches)
    clusters: dict[str, list[Batch]] = {}
    for cluster in range(num_clusters):
        chosen = [sequence for sequence, label in zip(sequences, label_N, strict=True) if label == cluster]
        clusters[f"cluster{cluster}"] = [_pad(chosen[i : i + size], 0) for i in range(0, len(chosen), size)]
    return clusters


def _pad(sequences: Sequence[Sequence[int]], padding: int) -> Batch:
    longest = max(map(len, sequences))
    ids_BT = torch.full((len(sequences), longest), padding, dtype=torch.int64)
    mask_BT = torch.zeros_like(ids_BT)
    for row, sequence in enumerate(sequences):
        ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        mask_BT[row, : len(sequence)] = 1
    return Batch(ids_BT, mask_BT)
