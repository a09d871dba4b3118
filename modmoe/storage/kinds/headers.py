"""Names, types and shapes of a checkpoint's tensors, read without torch.

What is damaged is passed over here: it is told where the files are opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from modmoe.errors import ModmoeError
from modmoe.storage.documents import MOST_HEADER_BYTES, read_index

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The weights of a checkpoint of one file, and the list of the files of a larger one."""


class Header(NamedTuple):
    """What a file says of a tensor before its values."""

    file: str
    """The file's name in its directory."""
    dtype: str
    """As safetensors writes it: F32, BF16, U8, F8_E4M3."""
    shape: tuple[int, ...]


Headers = Mapping[str, Header]
"""By the tensor's name in the file."""


class Problem(NamedTuple):
    """What a checkpoint is that it should not be, in the parts of one line."""

    place: str
    """The file or the directory, and where there is one the tensor or the key in it."""
    wrong: str
    remedy: str

    def __str__(self) -> str:
        """Return the line that a user reads."""
        return f"{self.place}: {self.wrong}; {self.remedy}."


def read_headers(directory: Path) -> dict[str, Header]:
    """Return the header of each tensor of the files that the index names, or of the one file without an index."""
    files = [SINGLE]
    if (directory / INDEX).is_file():
        try:
            files = sorted(set(read_index(directory / INDEX).values()))
        except ModmoeError:
            return {}
    headers: dict[str, Header] = {}
    for file in files:
        headers.update(_read_file(directory, file))
    return headers


def _read_file(directory: Path, file: str) -> dict[str, Header]:
    try:
        with (directory / file).open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            if size > MOST_HEADER_BYTES:
                return {}
            header = json.loads(opened.read(size))
        return {
            name: Header(file, str(entry["dtype"]), tuple(map(int, entry["shape"])))
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return {}
