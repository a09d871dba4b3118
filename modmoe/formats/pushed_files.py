"""What of a directory goes to others: the files that belong to a model, without the paths of this machine."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml
from huggingface_hub import get_token

import modmoe.adapters
import modmoe.modeling
from modmoe.errors import TOKEN_NAMES, ExportError
from modmoe.formats.credentials import find_credential
from modmoe.formats.tied_code import own_files
from modmoe.storage.documents import (
    MOST_JSON_BYTES,
    MOST_YAML_BYTES,
    open_tensors,
    parse_yaml,
    read_index,
    read_object,
    read_text,
)
from modmoe.storage.seal import INDEX, MANIFEST, MARK, SEAL, SINGLE
from modmoe.storage.shards import adder

CARD = "README.md"
RECIPES = ("modmoe.yaml", "modmoe.source.yaml")
"""The resolved recipe, and that of the model it began with."""
PLACEHOLDER = "PATH_OR_REPO"
"""Stands in a card for what only a push knows: the repository's name."""

Contents = dict[str, Path | bytes]
"""Name in the repository to the file that is sent as it is, or to what is sent in its place."""

_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt", "merges.txt"})
_KNOWN = _VOCABULARIES | {
    CARD,
    *RECIPES,
    SINGLE,
    INDEX,
    MANIFEST,
    "adapter_model.safetensors",
    *("config.json", "generation_config.json", "adapter_config.json", "modmoe_training.json", "modmoe_eval.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("preprocessor_config.json", "processor_config.json", "chat_template.jinja", "chat_template.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
}
"""Names that a checkpoint's or an adapter's files have, whoever wrote it."""
_LEGAL = re.compile(r"(?:LICENSE|LICENCE|COPYING|NOTICE|USE_POLICY)(?:[._-][A-Za-z0-9._-]{1,40})?")
_MOST_TEXT_BYTES = 16 << 20
_TEMPLATES = "additional_chat_templates"
_LARGE = {".safetensors", ".model"}
_IMAGES = {".png", ".jpg", ".jpeg", ".webp"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
# what says that a text is a path: it begins at a root, at home, here or above, or has a drive
_PATH = re.compile(r"(?:/|~|\.{1,2}[/\\]|[A-Za-z]:[/\\]|\\\\|file:)")
_ABSOLUTE = re.compile(r"\"((?:/|~/|[A-Za-z]:\\\\)[^\"\n]+)\"")
_SETTINGS = ("config.json", "adapter_config.json", "tokenizer_config.json", "generation_config.json")


def contents(directory: Path, repo: str | None = None) -> Contents:
    """Return what of a checkpoint or adapter is sent, by name: the files that its format knows, and no other.

    An image goes where the card shows it. Recipes are sent as ``public_recipe`` has them, and the card with ``repo``
    for its placeholder; the files themselves stay as they are. Small files are read here, so that what was looked at is
    what is sent. ``left_out`` tells the rest.

    Raises ExportError where a file of the format is a link, where one of them holds what looks like a credential, or
    where a recipe cannot be read.
    """
    names = _names(directory)
    card = directory / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    found: Contents = {}
    for name in sorted(names | {file for file in _images(directory) if f"]({file})" in text}):
        path = directory / name
        if any(part.is_symlink() for part in (path, *path.parents[: name.count("/")])):
            raise ExportError(str(path), "is a link", "put the file itself there")
        if path.is_file():
            is_large = path.suffix in _LARGE | _IMAGES or name in _VOCABULARIES
            found[name] = path if is_large else _read(path)
    if text and repo is not None:
        found[CARD] = re.sub(rf"\b{PLACEHOLDER}\b", repo, text).encode()
    for name in RECIPES:
        if name in found:
            found[name] = public_recipe(directory / name).encode()
    _check_credentials(directory, found)
    return found


def _read(path: Path) -> bytes:
    most_bytes = MOST_JSON_BYTES if path.suffix == ".json" else _MOST_TEXT_BYTES
    size_bytes = path.stat().st_size
    if size_bytes > most_bytes:
        raise ExportError(str(path), f"has {size_bytes:,} bytes, over {most_bytes:,} of such a file", "take it away")
    return path.read_bytes()


def left_out(directory: Path, parcel: Contents) -> list[dict[str, str]]:
    """Return ``path`` and ``why`` of what lies in a directory and is not sent, a folder as one."""
    folders = {name.partition("/")[0] for name in parcel if "/" in name}
    found = []
    for file in sorted(directory.iterdir()):
        if file.name in parcel or file.name in folders or file.name in (SEAL, MARK):
            continue
        is_folder = file.is_dir() and not file.is_symlink()
        kind = "a link" if file.is_symlink() else "a folder" if is_folder else ""
        found.append({"path": file.name, "why": kind or "no file of a checkpoint's format"})
    return found


def _names(directory: Path) -> set[str]:
    """Return the names of the files that belong to a checkpoint or an adapter, whether they are there or not."""
    names = set(_KNOWN)
    if (directory / INDEX).is_file() and not (directory / INDEX).is_symlink():
        names |= set(read_index(directory / INDEX).values())
    config = directory / "config.json"
    if config.is_file() and not config.is_symlink():
        names |= set(own_files(read_object(config), directory))
    for home in (modmoe.modeling, modmoe.adapters):
        names |= {file.name for file in Path(str(home.__file__)).parent.glob("*.py") if file.name != "__init__.py"}
    there = [file.name for file in directory.iterdir()]
    names |= {name for name in there if _LEGAL.fullmatch(name)}
    if (directory / _TEMPLATES).is_dir() and not (directory / _TEMPLATES).is_symlink():
        names |= {f"{_TEMPLATES}/{file.name}" for file in (directory / _TEMPLATES).glob("*.jinja")}
    return {name for name in names if os.path.lexists(directory / name)}


def _images(directory: Path) -> list[str]:
    return [file.name for file in directory.iterdir() if file.suffix in _IMAGES]


def _check_credentials(directory: Path, parcel: Contents) -> None:
    """Raise ExportError with the place and the kind of the first credential in what is to be sent; it is not shown.

    Vocabularies are not looked through, since they hold strings of all kinds, nor are images. Of weights the names and
    the metadata are.
    """
    own = (get_token(), *(os.environ.get(name) for name in TOKEN_NAMES))
    for name, item in parcel.items():
        if name in _VOCABULARIES or Path(name).suffix in _IMAGES | {".model"}:
            continue
        if isinstance(item, bytes):
            text = item.decode("utf-8", errors="replace")
        elif name.endswith(".safetensors"):
            with open_tensors(item) as opened:
                text = "\n".join(
                    [*opened.keys(), *(f"{key}: {value}" for key, value in (opened.metadata() or {}).items())]
                )
        else:
            text = read_text(item, MOST_JSON_BYTES)
        credential = find_credential(text, own)
        if credential is not None:
            line, kind = credential
            place = f"{directory / name}" if name.endswith(".safetensors") else f"{directory / name}:{line}"
            raise ExportError(
                str(place),
                f"holds what looks like {kind}, which everybody could read",
                "remove it, and make it invalid where it has been shown to others",
            )


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
        raise ExportError(str(path), "cannot be read as YAML", "mend it or take it away") from error
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
