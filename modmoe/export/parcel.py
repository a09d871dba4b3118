"""What of a directory goes to others: the files that belong to a model, without the paths of this machine."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from modmoe.documents import MOST_YAML_BYTES, parse_yaml, read_text
from modmoe.errors import ExportError
from modmoe.shards import adder

CARD = "README.md"
RECIPES = ("modmoe.yaml", "modmoe.source.yaml")
"""The resolved recipe, and that of the model it began with."""
PLACEHOLDER = "PATH_OR_REPO"
"""Stands in a card for what only a push knows: the repository's name."""

Contents = dict[str, Path | bytes]
"""Name in the repository to the file that is sent as it is, or to what is sent in its place."""

_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".txt", ".model", ".jinja", ".yaml"}
_IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
_PREFIXES = ("LICENSE", "NOTICE")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# what says that a text is a path: it begins at a root, at home, here or above, or has a drive
_PATH = re.compile(r"(?:/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
_ABSOLUTE = re.compile(r"\"((?:/|~/|[A-Za-z]:\\\\)[^\"\n]+)\"")
_SETTINGS = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")


def contents(directory: Path, repo: str | None = None) -> Contents:
    """Return what of a checkpoint or adapter is sent, by name.

    A list of what is wanted rather than of what is not: an optimizer's state or an .env is never sent. An image goes
    where the card shows it. Recipes are sent as ``public_recipe`` has them, and the card with ``repo`` for its
    placeholder; the files themselves stay as they are.

    Raises ExportError where a recipe cannot be read.
    """
    card = directory / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found: Contents = {}
    for file in sorted(directory.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        wanted = file.suffix in _SUFFIXES or file.name.startswith(_PREFIXES)
        if wanted or (file.suffix in _IMAGES and f"]({file.name})" in text):
            found[file.name] = file
    if text and repo is not None:
        found[CARD] = re.sub(rf"\b{PLACEHOLDER}\b", repo, text).encode()
    for name in RECIPES:
        if name in found:
            found[name] = public_recipe(directory / name).encode()
    return found


def list_files(parcel: Contents, report: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """Return path, size and SHA-256 of everything in a parcel, by name.

    ``report`` is called with the bytes read and the bytes in all.
    """
    sizes = {name: len(item) if isinstance(item, bytes) else item.stat().st_size for name, item in parcel.items()}
    add = adder(report, sum(sizes.values()))
    files = []
    for name, item in parcel.items():
        files.append({"path": name, "bytes": sizes[name], "sha256": _sha256(item)})
        add(sizes[name])
    return files


def public_recipe(path: Path) -> str:
    """Return a recipe's text in which a path of this machine is its last name alone; Hub ids stay.

    Comments on top stay too, unless they name a path. Raises ExportError where the file is no YAML.
    """
    try:
        text = read_text(path, MOST_YAML_BYTES)
        values = parse_yaml(text)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path}: cannot be read as YAML; mend it or take it away.") from error
    lines = text.splitlines()
    count = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    head = [line for line in lines[:count] if not any(map(_is_path, re.split(r"[\s='\"]+", line)))]
    return "".join(f"{line}\n" for line in head) + yaml.safe_dump(_public(values, ""), sort_keys=False)


def hub_id(named: Any) -> str | None:
    """Return ``named`` where it is a Hub id and nothing on this disk, which nobody else could find; else None."""
    is_id = isinstance(named, str) and _HUB_ID.fullmatch(named) is not None
    return named if is_id and not os.path.exists(named) else None


def warnings_of(directory: Path) -> list[str]:
    """Return what the user should look at before others can, one line each."""
    found = []
    if not (directory / CARD).is_file():
        found.append(f"there is no {CARD}; `modmoe export` writes one.")
    for name in _SETTINGS:
        file = directory / name
        path = _ABSOLUTE.search(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
        if path is not None:
            found.append(f"{name} names a path of this machine, {path[1]}; write a Hub id there.")
    return found


def _public(value: Any, key: str) -> Any:
    if isinstance(value, dict):
        # every task is a file, or a data set of the Hub
        return {name: _public(item, "tasks" if key == "tasks" else str(name)) for name, item in value.items()}
    if isinstance(value, list):
        return [_public(item, key) for item in value]
    if not isinstance(value, str):
        return value
    if key == "tasks":
        return value if value.startswith("hub:") else _last_name(value)
    if hub_id(value):
        return value
    return _last_name(value) if _is_path(value) or (key in ("source", "distill_from") and value) else value


def _is_path(text: str) -> bool:
    return _PATH.match(text) is not None and len(text) > 1


def _last_name(text: str) -> str:
    named = PureWindowsPath(text).name if "\\" in text else PurePosixPath(text).name
    return named or "local"


def _sha256(item: Path | bytes) -> str:
    if isinstance(item, bytes):
        return hashlib.sha256(item).hexdigest()
    with item.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
