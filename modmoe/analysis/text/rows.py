"""The rows of a task: what a file or a data set of the Hub holds, each checked and in exactly one form."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from modmoe.analysis.text.forms import COLUMNS, EMPTY, FORMS, check_row, strings_of
from modmoe.errors import CalibrationError, reason_of
from modmoe.storage.documents import check_task_file

_PASSAGE_CHARACTERS = 2000
_SPLITS = frozenset({"train", "validation", "valid", "dev", "test"})
_MOST_LINE_BYTES = 32 << 20
_MOST_JSON_BYTES = 256 << 20
_MOST_TEXT_BYTES = 1 << 30
"""Of a line, and of files that are read whole: small values take twenty times their JSON in memory."""
_MOST_GROWTH = 100
_FREE_GROWTH_BYTES = 64 << 20
"""A parquet file may hold this much text, or so many times its size."""


@dataclass(frozen=True, slots=True)
class TaskRows:
    """The rows of one task that have text, in the order of the file.

    They are plain objects and no table: a table would give all rows the same columns, and all messages the same keys.
    """

    name: str
    """The task's name."""
    file: str
    rows: Sequence[dict[str, Any]]
    """Each with ``text``, with ``prompt`` and ``completion``, or with ``messages`` and what belongs to them."""
    numbers: Sequence[int]
    """Of each row in the file, counted from 1, or the line it stands on."""
    left_out: Counter[str] = field(default_factory=Counter)
    """How many rows of the file are not here, by the reason."""
    num_ambiguous: int = 0
    """Rows that have text in more than one form, of which the first of FORMS counts."""

    @property
    def place(self) -> str:
        """The beginning of an error."""
        return f"tasks.{self.name}: {self.file}"

    @property
    def num_in_file(self) -> int:
        """Rows of the file, with text or without, as far as it was read."""
        return len(self.rows) + self.left_out.total()

    def __len__(self) -> int:
        """Return how many rows have text."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row."""
        return self.rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Yield the rows."""
        return iter(self.rows)

    def select(self, indices: Iterable[int]) -> TaskRows:
        """Return some of the rows, in the order given."""
        chosen = list(indices)
        rows, numbers = [self.rows[index] for index in chosen], [self.numbers[index] for index in chosen]
        return TaskRows(self.name, self.file, rows, numbers)


def read_rows(name: str, file: str, limit: int | None = None) -> TaskRows:
    """Return the rows of a task that have text; ``modmoe.analysis.text.calibration.load_task`` says what they may be.

    Raises CalibrationError.
    """
    place = f"tasks.{name}: {file}"
    check_task_file(name, file)
    is_hub = file.startswith("hub:")
    raw = _read_hub(place, file, limit) if is_hub else _read_file(place, Path(file), limit)
    rows, numbers, left_out, num_ambiguous = [], [], Counter[str](), 0
    for number, row in islice(raw, limit):
        try:
            found, num_forms = check_row(f"{place}: row {number}", row, is_filled=is_hub or file.endswith(".parquet"))
        except RecursionError as error:
            raise CalibrationError(
                str(place), f"row {number}: its values lie too deep in one another", "cut it"
            ) from error
        num_ambiguous += num_forms > 1
        if found is None:
            left_out[EMPTY] += 1
        else:
            rows.append(found)
            numbers.append(number)
    if not rows and not left_out:
        raise CalibrationError(place, "holds no rows", "name a file with text in it")
    if not rows:
        raise CalibrationError(place, "the text of every row is empty", "name a file with text in it")
    return TaskRows(name, file, rows, numbers, left_out, num_ambiguous)


_Numbered = Iterable[tuple[int, dict[str, Any]]]
"""Rows with their number, counted from 1, or the line they stand on."""


def _read_file(place: str, path: Path, limit: int | None) -> _Numbered:
    if path.suffix == ".parquet":
        return _read_parquet(place, path)
    try:
        if path.suffix == ".jsonl":
            return list(islice(_read_lines(place, path), limit))
        _check_size(place, path)
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise CalibrationError(f"{place}:{line}", "not valid UTF-8", "save the file as UTF-8") from error
    except OSError as error:
        raise CalibrationError(place, f"{error.strerror or error}", "make the file readable") from error
    return _parse_text(text) if path.suffix == ".txt" else _parse_json(place, path, text, limit)


def _check_size(place: str, path: Path) -> None:
    """Refuse a file that is read whole and would fill the memory."""
    size_bytes, most = path.stat().st_size, _MOST_TEXT_BYTES if path.suffix == ".txt" else _MOST_JSON_BYTES
    if size_bytes > most:
        raise CalibrationError(
            str(place),
            f"has {size_bytes:,} bytes, over {most:,}",
            "write it as .jsonl, which is read line by line, or cut it",
        )


def _read_lines(place: str, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as handle:
        for number, line in enumerate(iter(lambda: handle.readline(_MOST_LINE_BYTES + 1), b""), 1):
            if len(line) > _MOST_LINE_BYTES:
                raise CalibrationError(
                    f"{place}:{number}",
                    f"the line has over {_MOST_LINE_BYTES:,} bytes",
                    "cut its text into several rows",
                )
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{place}:{number}", "not valid UTF-8", "save the file as UTF-8") from error
            if text.strip():
                yield number, _check_object(f"{place}:{number}", _decode(f"{place}:{number}", text))


def _parse_json(place: str, path: Path, text: str, limit: int | None) -> _Numbered:
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
        raise CalibrationError(f"{place}:{line}", f"not valid JSON: {reason_of(error)}") from error
    if not isinstance(value, list):
        if isinstance(value, dict) and any(set(form) <= set(value) for form in FORMS):
            return [(1, value)]
        raise CalibrationError(
            str(place), f"holds a JSON {type(value).__name__}, not a list of objects", "write a list"
        )
    return [(number, _check_object(f"{place}: row {number}", row)) for number, row in enumerate(value[:limit], 1)]


def _parse_text(text: str) -> _Numbered:
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
        known = set(COLUMNS)
        leaves = parquet.read_metadata(path).schema
        texts = [leaves.column(index) for index in range(len(leaves.names))]
        # a value that stands in many rows is held once
        once = [leaf.path for leaf in texts if leaf.path in known and leaf.physical_type == "BYTE_ARRAY"]
        file = parquet.ParquetFile(path, read_dictionary=once)
        names = list(file.schema_arrow.names)
        # where no column is of use, all names are wanted for the error
        columns = [name for name in names if name in known]
        columns = columns if any(set(form) <= set(columns) for form in FORMS) else names
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
                seen_bytes += sum(map(len, strings_of(row)))
                if seen_bytes > most:
                    break
                number += 1
                yield number, row
    except Exception as error:  # a damaged file, or values that Python has not, end in a dozen kinds
        raise CalibrationError(place, f"not a readable parquet file: {reason_of(error)}") from error
    if max(in_all, seen_bytes) > most:
        raise CalibrationError(
            str(place),
            f"holds over {_MOST_GROWTH} times its {path.stat().st_size:,} bytes of text, which would fill the memory",
            "drop what repeats, or write it as .jsonl",
        )


def _rows_of(part: Any) -> Iterator[dict[str, Any]]:
    """Yield a batch's rows one after another, so that no more than one is in memory."""
    columns = {name: part.column(name) for name in part.schema.names}
    for index in range(part.num_rows):
        yield {name: column[index].as_py(maps_as_pydicts="strict") for name, column in columns.items()}


def _read_hub(place: str, file: str, limit: int | None) -> _Numbered:
    from datasets import load_dataset

    parts = file.removeprefix("hub:").split(":")
    if len(parts) > 3 or not parts[0]:
        raise CalibrationError(place, "write hub:ID, hub:ID:CONFIG or hub:ID:CONFIG:SPLIT")
    if len(parts) == 2 and parts[1] in _SPLITS:
        parts = [parts[0], "", parts[1]]
    parts += [""] * (3 - len(parts))
    try:
        # a few rows of a large corpus are streamed; else the Hub's own cache saves the next run the download
        dataset = load_dataset(parts[0], parts[1] or None, split=parts[2] or "train", streaming=limit is not None)
        return [(number, dict(row)) for number, row in enumerate(islice(dataset, limit), 1)]
    except Exception as error:
        # the library raises a dozen kinds; their first line says enough
        raise CalibrationError(place, f"not to be had from the Hub: {reason_of(error)}") from error


def _decode(place: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(place, f"not valid JSON: {reason_of(error)}", "mend or remove the line") from error


def _check_object(place: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise CalibrationError(place, f"is a JSON {type(value).__name__}, not an object", 'write {"text": ...}')
    return value
