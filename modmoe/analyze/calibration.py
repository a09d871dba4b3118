"""Calibration text: named tasks become rows, rows become batches of tokens."""

# Shapes: B sequences of a batch, T tokens of a sequence, N sequences in all, D model width

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modmoe.errors import CalibrationError, did_you_mean

if TYPE_CHECKING:
    from datasets import Dataset

    from modmoe.analyze.stream import Runner, Turn

FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
"""The columns a row may have; where a file has several forms, the first of these counts."""

EXTENSIONS = (".jsonl", ".json", ".parquet", ".txt")
_PASSAGE_CHARACTERS = 2000
_SPLITS = frozenset({"train", "validation", "valid", "dev", "test"})


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
            of the wrong type, or no text at all. One line with the task, the file, the row and the remedy.
    """
    from datasets import Dataset

    place = f"tasks.{name}: {file}"
    raw = _read_hub(place, file, limit) if file.startswith("hub:") else _read_file(place, Path(file), limit)
    numbered = [(number, row) for number, row in islice(raw, limit)]
    if not numbered:
        raise CalibrationError(f"{place}: holds no rows; name a file with text in it.")
    columns = list(dict.fromkeys(column for _, row in numbered for column in row))
    form = next((form for form in FORMS if all(column in columns for column in form)), None)
    if form is None:
        raise CalibrationError(
            f"{place}: no usable column among {', '.join(columns[:12]) or 'none'}; rename them to 'text', to "
            "'prompt' and 'completion', or to 'messages'."
        )
    rows = [checked for number, row in numbered if (checked := _check_row(place, number, row, form)) is not None]
    if not rows:
        raise CalibrationError(f"{place}: {' and '.join(form)} of every row is empty; name a file with text in it.")
    return Dataset.from_list(rows)


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


def _check_row(place: str, number: int, row: dict[str, Any], form: tuple[str, ...]) -> dict[str, Any] | None:
    """Return the row with its form's columns alone; None where it has no text."""
    kept: dict[str, Any] = {}
    for column in form:
        value = row.get(column)
        if column == "messages" and value is not None:
            kept[column] = _check_messages(f"{place}: row {number}", value)
        elif value is None:
            kept[column] = [] if column == "messages" else ""
        else:
            kept[column] = _check_text(f"{place}: row {number}: '{column}'", value)
    texts = [message["content"] for message in kept["messages"]] if form == ("messages",) else list(kept.values())
    return kept if any(text.strip() for text in texts) else None


def _check_messages(place: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise CalibrationError(f"{place}: 'messages' is not a list of objects with 'role' and 'content'.")
    messages = []
    for message in value:
        if "role" not in message or "content" not in message:
            raise CalibrationError(f"{place}: a message lacks 'role' or 'content'; each needs both.")
        content = "" if message["content"] is None else message["content"]
        messages.append(
            {
                key: _check_text(f"{place}: '{key}'", text)
                for key, text in (("role", message["role"]), ("content", content))
            }
        )
    return messages


def _check_text(place: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CalibrationError(f"{place} is a {type(value).__name__}, not text; write it as a string.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{place} has half a surrogate pair at character {error.start}; remove it.") from error
    return value


Rows = Iterable[tuple[int, dict[str, Any]]]
"""Rows with their number, counted from 1, or the line they stand on."""


def _read_file(place: str, path: Path, limit: int | None) -> Rows:
    if path.suffix not in EXTENSIONS:
        hint = did_you_mean(path.suffix, EXTENSIONS) if path.suffix else f" Known: {', '.join(EXTENSIONS)}."
        raise CalibrationError(f"{place}: unknown extension '{path.suffix}'.{hint} Or name hub:ID.")
    if not path.is_file():
        what = "is a directory" if path.is_dir() else "no such file"
        raise CalibrationError(f"{place}: {what}; name a file ({', '.join(EXTENSIONS)}) or hub:ID.")
    if path.suffix == ".parquet":
        return _read_parquet(place, path)
    try:
        if path.suffix == ".jsonl":
            return list(islice(_read_lines(place, path), limit))
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{place}:{line}: not valid UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        raise CalibrationError(f"{place}: {error.strerror or error}; make the file readable.") from error
    return _parse_text(text) if path.suffix == ".txt" else _parse_json(place, path, text, limit)


def _read_lines(place: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as handle:
        for number, line in enumerate(handle, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{place}:{number}: not valid UTF-8; save the file as UTF-8.") from error
            if text.strip():
                yield number, _check_object(f"{place}:{number}", _decode(f"{place}:{number}", text))


def _parse_json(place: str, path: Path, text: str, limit: int | None) -> Rows:
    if not text.strip():
        return []
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        # many files called .json hold one object a line
        first = text.lstrip().split("\n", 1)[0]
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data" and first.rstrip().endswith("}"):
            return list(islice(_read_lines(place, path), limit))
        line = getattr(error, "lineno", 1)
        raise CalibrationError(f"{place}:{line}: not valid JSON: {_reason(error)}.") from error
    if not isinstance(value, list):
        if isinstance(value, dict) and any(set(form) <= set(value) for form in FORMS):
            return [(1, value)]
        raise CalibrationError(f"{place}: holds a JSON {type(value).__name__}, not a list of objects; write a list.")
    return [(number, _check_object(f"{place}: row {number}", row)) for number, row in enumerate(value[:limit], 1)]


def _parse_text(text: str) -> Rows:
    text = text.replace("\r\n", "\n").strip("\n")
    documents = [document for document in re.split(r"\n(?:[ \t]*\n)+", text) if document.strip()]
    if len(documents) == 1:
        documents, passage = [], ""
        for line in text.splitlines():
            if passage and len(passage) + len(line) > _PASSAGE_CHARACTERS:
                documents.append(passage)
                passage = ""
            passage = f"{passage}\n{line}" if passage else line
        documents.append(passage)
    return [(number, {"text": document}) for number, document in enumerate(documents, 1)]


def _read_parquet(place: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]

    try:
        file = parquet.ParquetFile(path)
        names = list(file.schema_arrow.names)
        known = {column for form in FORMS for column in form}
        # where no column is of use, all names are wanted for the error
        columns = [name for name in names if name in known] or names
        for start, part in enumerate(file.iter_batches(256, columns=columns)):
            yield from enumerate(part.to_pylist(), 256 * start + 1)
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{place}: not a readable parquet file: {_reason(error)}.") from error


def _read_hub(place: str, file: str, limit: int | None) -> Rows:
    from datasets import load_dataset

    parts = file.removeprefix("hub:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise CalibrationError(f"{place}: write hub:ID, hub:ID:CONFIG or hub:ID:CONFIG:SPLIT.")
    if len(parts) == 2 and parts[1] in _SPLITS:
        parts = [parts[0], "", parts[1]]
    parts += [""] * (3 - len(parts))
    try:
        # a few rows of a large corpus are streamed; else the Hub's own cache saves the next run the download
        dataset = load_dataset(parts[0], parts[1] or None, split=parts[2] or "train", streaming=limit is not None)
        return [(number, dict(row)) for number, row in enumerate(islice(dataset, limit), 1)]
    except Exception as error:
        # the library raises a dozen kinds; their first line says enough
        raise CalibrationError(f"{place}: not to be had from the Hub: {_reason(error)}") from error


def _decode(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place}: not valid JSON: {_reason(error)}; mend or remove the line.") from error


def _check_object(place: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise CalibrationError(f'{place}: is a JSON {type(value).__name__}, not an object; write {{"text": ...}}.')
    return value


def _reason(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
