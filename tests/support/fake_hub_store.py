"""What the stand-in for the Hub keeps, and what it has against what it is given."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import yaml

RELATIONS = {"finetune", "adapter", "merge", "quantized"}
LARGE_BYTES = 10 * 1024 * 1024
_LARGE = (".safetensors", ".model")


@dataclass(frozen=True)
class Blob:
    """A file of a commit."""

    data: bytes
    is_large: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        """What git keeps: the file, or where a large one is."""
        head = b"version https://git-lfs.github.com/spec/v1\noid sha256:"
        return head + f"{self.sha256}\nsize {len(self.data)}\n".encode() if self.is_large else self.data

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.pointer) + self.pointer).hexdigest()

    @property
    def oid(self) -> str:
        """By which the client sees whether a file has changed."""
        return self.sha256 if self.is_large else self.git_oid


@dataclass
class Repository:
    """Files of each commit, and where each branch stands."""

    name: str
    private: bool
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    titles: list[str] = field(default_factory=list)

    def commit(self, ref: str, files: dict[str, Blob], title: str) -> str:
        """Put files on a branch and return the commit."""
        parent = self.refs.get(ref, "")
        tree = sorted((name, blob.oid) for name, blob in files.items())
        sha = hashlib.sha1(f"{len(self.titles)} {parent} {title} {tree}".encode()).hexdigest()
        self.commits[sha], self.refs[ref] = files, sha
        self.titles.append(title)
        return sha

    def files(self, ref: str = "main") -> dict[str, bytes]:
        """Return the files of a branch or commit."""
        return {name: blob.data for name, blob in self.commits[self.refs.get(ref, ref)].items()}


@dataclass
class Request:
    """What was asked."""

    method: str
    path: str
    query: dict[str, list[str]]
    token: str | None
    body: bytes = b""
    status: int = 0


@dataclass
class Fault:
    """What goes wrong with the next requests of a kind."""

    method: str
    path: str
    times: int
    status: int = 0
    code: str = ""
    message: str = ""
    drop_after: int | None = None
    """Bytes of the body that are read before the connection is cut."""
    slow_s: float = 0.0
    corrupt: bool = False
    before: Callable[[], None] | None = None
    """Run before the request is answered as usual."""
    cut_answer: bool = False
    """Do what is asked, and cut the connection before saying so."""
    headers: dict[str, str] = field(default_factory=dict)


class RefusalError(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str = "", **more: Any) -> None:
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


def is_large(path: str, sample: bytes, size_bytes: int) -> bool:
    """Return whether a file belongs to the storage of large files: by its name, its size, or since it is no text."""
    return path.endswith(_LARGE) or b"\0" in sample or size_bytes > LARGE_BYTES


def apply(before: dict[str, Blob], lines: list[dict[str, Any]], large: dict[str, bytes]) -> dict[str, Blob]:
    """Return the files after a commit's lines, or raise RefusalError; nothing changes in between."""
    files = dict(before)
    for line in lines:
        key, value = line["key"], line["value"]
        if key == "file":
            assert value["encoding"] == "base64"
            files[value["path"]] = Blob(base64.b64decode(value["content"]), False)
        elif key == "lfsFile":
            assert value["algo"] == "sha256"
            if len(large.get(value["oid"], b"")) != value["size"]:
                raise RefusalError(400, f"Your push was rejected: the LFS object of {value['path']} does not exist")
            files[value["path"]] = Blob(large[value["oid"]], True)
        elif key == "deletedFile":
            if files.pop(value["path"], None) is None:
                raise RefusalError(404, "A file with this name doesn't exist", "EntryNotFound")
        else:
            raise RefusalError(400, f"no such operation: {key}")
    return files


def check_head(card: str) -> list[str]:
    """Return what the Hub has against a card's YAML head."""
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    if match is None:
        return []
    try:
        head = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return [f"YAML: {error}"]
    errors = []
    for key in ("library_name", "pipeline_tag", "license", "license_name", "license_link"):
        if not isinstance(head.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    if head.get("base_model_relation", "merge") not in RELATIONS:
        errors.append(f'"base_model_relation" must be one of {sorted(RELATIONS)}')
    for key in ("base_model", "datasets", "tags"):
        values = head.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or (key != "tags" and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value)):
                errors.append(f'"{key}" with value "{value}" is not valid')
    for model in head.get("model-index", []):
        for result in model["results"]:
            known = result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"]
            if not known or not all("type" in metric and "value" in metric for metric in result["metrics"]):
                errors.append('"model-index" lacks a key')
    return errors
