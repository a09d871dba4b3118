"""The rows of a task: what a file or a data set of the Hub holds, checked and in exactly one form."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from modmoe.documents import check_task_file
from modmoe.errors import CalibrationError, reason_of

FORMS: tuple[tuple[str, ...], ...] = (("messages",), ("prompt", "completion"), ("text",))
"""The columns a row may have; where a file has several forms, the first of these counts."""

_PASSAGE_CHARACTERS = 2000
_SPLITS = frozenset({"train", "validation", "valid", "dev", "test"})
_MOST_LINE_BYTES = 32 << 20
_MOST_JSON_BYTES = 256 << 20
_MOST_TEXT_BYTES = 1 << 30
"""Of a line, and of files that are read whole: small values take twenty times their JSON in memory."""
_MOST_GROWTH = 100
_FREE_GROWTH_BYTES = 64 << 20
"""A parquet file may hold this much text, or so many times its size."""


def read_rows(name: str, file: str, limit: int | None = None) -> list[dict[str, Any]]:
    """Return the rows of a task that have text; ``modmoe.analyze.calibration.load_task`` says what they may be.

    Raises CalibrationError.
    """
    place = f"tasks.{name}: {file}"
    check_task_file(name, file)
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
    return rows


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
    if path.suffix == ".parquet":
        return _read_parquet(place, path)
    try:
        if path.suffix == ".jsonl":
            return list(islice(_read_lines(place, path), limit))
        _check_size(place, path)
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{place}:{line}: not valid UTF-8; save the file as UTF-8.") from error
    except OSError as error:
        raise CalibrationError(f"{place}: {error.strerror or error}; make the file readable.") from error
    return _parse_text(text) if path.suffix == ".txt" else _parse_json(place, path, text, limit)


def _check_size(place: str, path: Path) -> None:
    """Refuse a file that is read whole and would fill the memory."""
    size_bytes, most = path.stat().st_size, _MOST_TEXT_BYTES if path.suffix == ".txt" else _MOST_JSON_BYTES
    if size_bytes > most:
        raise CalibrationError(
            f"{place}: has {size_bytes:,} bytes, over {most:,}; write it as .jsonl, which is read line by line, or cut "
            "it."
        )


def _read_lines(place: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(_MOST_LINE_BYTES + 1), b""), 1):
            if len(line) > _MOST_LINE_BYTES:
                raise CalibrationError(
                    f"{place}:{number}: the line has over {_MOST_LINE_BYTES:,} bytes; cut its text into several rows."
                )
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
        raise CalibrationError(f"{place}:{line}: not valid JSON: {reason_of(error)}.") from error
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
    from pyarrow import parquet  # type: ignore[import-untyped]

    most = max(_FREE_GROWTH_BYTES, _MOST_GROWTH * path.stat().st_size)
    try:
        known = {column for form in FORMS for column in form}
        leaves = parquet.read_metadata(path).schema
        texts = [leaves.column(index) for index in range(len(leaves.names))]
        # a value that stands in many rows is held once
        once = [leaf.path for leaf in texts if leaf.path in known and leaf.physical_type == "BYTE_ARRAY"]
        file = parquet.ParquetFile(path, read_dictionary=once)
        names = list(file.schema_arrow.names)
        # where no column is of use, all names are wanted for the error
        columns = [name for name in names if name in known] or names
        groups = [file.metadata.row_group(index) for index in range(file.num_row_groups)]
        in_all = sum(
            group.column(index).total_uncompressed_size
            for group in groups
            for index in range(group.num_columns)
            if group.column(index).path_in_schema.split(".")[0] in columns
        )
        number = seen_bytes = 0
        for part in file.iter_batches(256, columns=columns) if in_all <= most else ():
            for row in _rows_of(part):
                seen_bytes += sum(len(value) for value in row.values() if isinstance(value, str))
                if seen_bytes > most:
                    break
                number += 1
                yield number, row
    except Exception as error:  # a damaged file, or values that Python has not, end in a dozen kinds
        raise CalibrationError(f"{place}: not a readable parquet file: {reason_of(error)}.") from error
    if max(in_all, seen_bytes) > most:
        raise CalibrationError(
            f"{place}: holds over {_MOST_GROWTH} times its {path.stat().st_size:,} bytes of text, which would fill the "
            "memory; drop what repeats, or write it as .jsonl."
        )


def _rows_of(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a batch's rows one after another, so that no more than one is in memory."""
    columns = {name: part.column(name) for name in part.schema.names}
    for index in range(part.num_rows):
        yield {name: column[index].as_py() for name, column in columns.items()}


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
        raise CalibrationError(f"{place}: not to be had from the Hub: {reason_of(error)}") from error


def _decode(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place}: not valid JSON: {reason_of(error)}; mend or remove the line.") from error


def _check_object(place: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise CalibrationError(f'{place}: is a JSON {type(value).__name__}, not an object; write {{"text": ...}}.')
    return value
