"""Files from strangers: JSON, YAML and safetensors are read within bounds, and links do not lead out of a directory.

What a file says is checked before anything of that size is made; errors quote of it a short, printable piece.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from modmoe.errors import CalibrationError, CheckpointError, did_you_mean, is_panic, reason_of

MOST_JSON_BYTES = 64 << 20
"""Of a configuration or an index; that of a model with 200,000 tensors takes a quarter of it."""
MOST_HEADER_BYTES = 32 << 20
"""Of the header of a safetensors file, which for 200,000 tensors is as large."""
MOST_YAML_BYTES = 100_000
"""Of a recipe, or of the head of a card."""
MOST_YAML_NODES = 20_000
"""Values and keys, each alias counted as what it stands for."""
MOST_YAML_DEPTH = 30
MOST_ENTRIES = 20_000
"""Files and folders of a checkpoint's directory."""
FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py", "README.md", "LICENSE*")
"""What of a checkpoint is fetched."""
TEXT_EXTENSIONS = (".jsonl", ".json", ".parquet", ".txt")
"""Of files with a task's text."""
_MOST_BYTES = {
    "*.jinja": 1 << 20,
    "README.md": 16 << 20,
    "*.py": 16 << 20,
    # by name, since a JSON file of another may be a task's text
    "*config.json": MOST_JSON_BYTES,
    "*.index.json": MOST_JSON_BYTES,
    "special_tokens_map.json": MOST_JSON_BYTES,
    "added_tokens.json": MOST_JSON_BYTES,
    "chat_template.json": MOST_JSON_BYTES,
    "modmoe*.json": MOST_JSON_BYTES,
}
"""Of files of a checkpoint that are read whole."""
_PLAIN = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.py", "README.md")
"""What is read by its name, which a folder may not have."""
_TEMPLATES = "additional_chat_templates"
"""The one folder of a checkpoint that transformers reads."""
_SPECIAL = {
    stat.S_IFIFO: "a FIFO, which is waited for without end",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def local_directory(source: str | Path) -> Path | None:
    """Return a checkpoint's local directory; None where ``source`` is a Hub id, which is not asked for.

    Raises CheckpointError where it is neither.
    """
    path = Path(source)
    # os.path answers of every text, where pathlib raises an error for a name that is too long
    if os.path.isdir(path):
        check_files(path)
        return path
    if os.path.exists(path):
        raise CheckpointError(str(path), "is a file", "name the directory that holds config.json and the safetensors")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", str(source)):
        raise CheckpointError(str(source), "no such directory, and not of the form OWNER/NAME of a Hub id")
    return None


def check_task_file(name: str, file: str) -> None:
    """Raise CalibrationError where a task's text is no file, or one of no kind that is read; the Hub is not asked."""
    if file.startswith("hub:"):
        return
    place, path, kinds = f"tasks.{name}: {file}", Path(file), TEXT_EXTENSIONS
    if path.suffix not in kinds:
        hint = did_you_mean(path.suffix, kinds) if path.suffix else f"Known: {', '.join(kinds)}."
        raise CalibrationError(place, f"unknown extension '{path.suffix}'", f"{hint} Or name hub:ID.")
    if not os.path.isfile(path):
        kind = special_kind(path)
        what = f"is {kind}" if kind else "is a directory" if os.path.isdir(path) else "no such file"
        raise CalibrationError(place, what, f"name a file ({', '.join(kinds)}) or hub:ID")


def special_kind(path: Path) -> str:
    """Return what a path is that is neither a file nor a directory, after "is"; nothing where it is one or absent."""
    try:
        return _SPECIAL.get(stat.S_IFMT(path.stat().st_mode), "")
    except (OSError, ValueError):
        return ""


def open_plain(path: Path) -> BufferedReader:
    """Open a plain file for reading; ValueError where it is none, OSError where it cannot be opened.

    A FIFO would be waited for, and a device has no end.
    """
    special = special_kind(path)  # before it is opened, which of some devices does something
    if special:
        raise ValueError(f"it is {special}")
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    file = os.fdopen(handle, "rb")
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        file.close()
        raise ValueError("it is no plain file")
    return file


def read_text(path: Path, most_bytes: int) -> str:
    """Return a UTF-8 file's text.

    Raises ValueError where it is larger, no UTF-8 or no plain file, OSError where it cannot be read.
    """
    with open_plain(path) as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > most_bytes:
            raise ValueError(f"it has {size_bytes:,} bytes, over {most_bytes:,}")
        data = file.read(most_bytes + 1)  # it may grow meanwhile
    if len(data) > most_bytes:
        raise ValueError(f"it has over {most_bytes:,} bytes")
    return data.decode("utf-8")


_HALF_PAIR = re.compile(r"\\u[dD][89a-fA-F]")
"""What may be one, or one of two that belong together."""


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON file's object; CheckpointError where it is none, is too large, or has a key twice.

    A text with half a surrogate pair is refused too: no other file, name or terminal could hold it.
    """
    try:
        text = read_text(path, MOST_JSON_BYTES)
        value = json.loads(text, object_pairs_hook=_unique)
        if _HALF_PAIR.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"cannot be read as JSON: {reason_of(error)}", "fetch it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(str(path), f"is a JSON {type(value).__name__}, not an object")
    return value


def read_index(index: Path) -> dict[str, str]:
    """Return tensor name to file name of an index; CheckpointError where it is none or names a place elsewhere."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(str(index), "weight_map is missing or empty", "the index is damaged, fetch it again")
    for name, file in weight_map.items():
        if not is_plain_name(file):
            raise CheckpointError(
                str(index),
                f"'{name[:80]}' lies in {file!r:.80}, which is not a plain file name in the directory",
                "refused",
            )
    return weight_map


def open_tensors(path: Path, again: str = "fetch it again") -> Any:
    """Open a safetensors file after its header was checked; no tensor is read.

    Raises CheckpointError, which ends in ``again``, where the header lies about lengths, offsets or shapes, names a
    tensor twice or has more than MOST_HEADER_BYTES, or where the file is too large for this machine to map.
    """
    try:
        with open_plain(path) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > MOST_HEADER_BYTES:
                raise ValueError(f"its header would have {size:,} bytes")
            header = file.read(size)
        opened = safe_open(path, framework="pt")
        # safetensors itself keeps the last of two tensors of one name; that it has the rest right is known by now
        json.loads(header, object_pairs_hook=_unique)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise CheckpointError(str(path), f"damaged or cut short ({reason_of(error)})", again) from error
    except RuntimeError as error:
        # a file much larger than memory, which the system does not map as one
        raise CheckpointError(str(path), f"{reason_of(error)}", "have it saved in shards of 5 GB") from error
    except BaseException as error:
        if not is_panic(error):
            raise
        raise CheckpointError(str(path), f"safetensors broke down ({reason_of(error)})", again) from error
    return opened


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"'{twice[:80]}' is there twice")
    return found


def check_files(directory: Path) -> None:
    """Raise CheckpointError where a checkpoint's directory holds what no program should open, or far too much.

    That is a FIFO, a socket or a device, by itself or behind a link, a folder of the name of a file, or a template of
    more than a million bytes. Libraries open files by their names and look at none of this.
    """
    try:
        folders = [directory, directory / _TEMPLATES]
        for folder in folders if folders[1].is_dir() else folders[:1]:
            with os.scandir(folder) as entries:
                for number, entry in enumerate(entries):
                    if number >= MOST_ENTRIES:
                        raise CheckpointError(
                            str(folder), f"holds over {MOST_ENTRIES:,} files", "name the directory of a checkpoint"
                        )
                    _check_entry(Path(entry.path), entry)
    except OSError as error:
        raise CheckpointError(str(directory), f"cannot be read ({reason_of(error)})") from error


def _check_entry(path: Path, entry: os.DirEntry[str]) -> None:
    limit = next((most for name, most in _MOST_BYTES.items() if fnmatch(entry.name, name)), None)
    if entry.is_file(follow_symlinks=False) and limit is None:
        return  # the system tells so much without a look at the file itself
    try:
        facts = entry.stat()
    except OSError:
        return  # a link that leads nowhere, which is checked where it would be read
    special = _SPECIAL.get(stat.S_IFMT(facts.st_mode))
    if special:
        raise CheckpointError(str(path), f"is {special}", "put a plain file there, or take it away")
    if stat.S_ISDIR(facts.st_mode) and any(fnmatch(entry.name, name) for name in _PLAIN):
        raise CheckpointError(str(path), "is a directory", "put the file of that name there")
    if limit is not None and facts.st_size > limit:
        raise CheckpointError(str(path), f"has {facts.st_size:,} bytes, over {limit:,}", "take it away")


def check_tree(directory: Path) -> None:
    """Raise CheckpointError as ``check_files`` does, for all folders below a directory too."""
    for number, (folder, _, _) in enumerate(os.walk(directory)):
        if number >= MOST_ENTRIES:
            raise CheckpointError(str(directory), f"holds over {MOST_ENTRIES:,} folders", "name a smaller one")
        check_files(Path(folder))


def check_links(directory: Path, patterns: Iterable[str] = (*FILES, "tokenizer*", f"{_TEMPLATES}*/*.jinja")) -> None:
    """Raise CheckpointError where one of a checkpoint's files is a link that leads out of the directory.

    A checkpoint from a stranger would have files of this machine read, copied and published by such a link. The Hub's
    cache is as it is: its snapshots are links to the files in ``blobs`` two levels up.
    """
    check_files(directory)
    try:
        real = directory.resolve(strict=True)
        allowed = [real, *([real.parent.parent / "blobs"] if real.parent.name == "snapshots" else [])]
        for path in (found for pattern in patterns for found in directory.glob(pattern)):
            if path.is_symlink() and not any(path.resolve(strict=True).is_relative_to(root) for root in allowed):
                raise CheckpointError(
                    str(path),
                    f"is a link to {path.resolve()}, outside of the checkpoint",
                    "if that is what you want, put the file itself there, or name the directory it lies in",
                )
    except (OSError, RuntimeError) as error:  # links in a circle are a RuntimeError up to Python 3.12
        raise CheckpointError(str(directory), f"a link leads nowhere ({reason_of(error)})", "take it away") from error


def is_plain_name(file: Any) -> bool:
    """Return whether a file that a document names lies in its own directory, by a name that can be printed."""
    is_name = isinstance(file, str) and len(file) <= 200 and file.isprintable()
    return is_name and Path(file).name == file and file not in ("", ".", "..")


class YamlError(ValueError):
    """A text is no YAML, or none that is read here."""

    def __init__(self, problem: str, line: int | None = None) -> None:
        """Take what is wrong, and the line where that is known, counted from 1."""
        super().__init__(problem)
        self.line = line


def parse_yaml(text: str) -> Any:
    """Return the plain values of a YAML document, as ``yaml.safe_load`` does.

    Raises YamlError where it is none, has a key twice, or is larger than what recipes are once its aliases stand for
    themselves: ten lines of aliases are enough for a tree that no memory holds.
    """
    try:
        if len(text) > MOST_YAML_BYTES:
            raise YamlError(f"has {len(text):,} characters, over {MOST_YAML_BYTES:,}")
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _measure(node, {})
        return loader.construct_document(node)
    except YamlError:
        raise
    except Exception as error:  # dates and numbers that are none end in half a dozen kinds
        mark = getattr(error, "problem_mark", None)
        raise YamlError(str(getattr(error, "problem", None) or reason_of(error)), mark and mark.line + 1) from error


class _Loader(yaml.SafeLoader):
    """PyYAML's, but for a bound on the depth, which it takes seconds to reach its own of."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.depth += 1
        if self.depth > MOST_YAML_DEPTH:
            raise YamlError(_TOO_DEEP, self.peek_event().start_mark.line + 1)  # type: ignore[no-untyped-call]
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1


# YAML 1.1 reads 010 as 8 and 1:30 as 90; what is no plain number stays text, and is refused where one belongs
_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$|[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)

_TOO_DEEP = f"is nested more than {MOST_YAML_DEPTH} deep"


def _measure(node: yaml.Node, known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """Return the nodes and the depth of a tree, aliases written out; YamlError where they are too many or a circle."""
    line, key = node.start_mark.line + 1, id(node)
    if key not in known:
        known[key] = (0, 0)
        parts = list(node.value) if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            names = Counter(name.value for name, _ in parts if isinstance(name, yaml.ScalarNode) and name.value != "<<")
            for name, count in names.most_common(1):
                if count > 1:
                    raise YamlError(f"'{name[:80]}' is there twice", line)
            parts = [part for pair in parts for part in pair]
        inner = [_measure(part, known) for part in parts]
        known[key] = (1 + sum(size for size, _ in inner), 1 + max((depth for _, depth in inner), default=0))
    size, depth = known[key]
    if size == 0:
        raise YamlError("has an alias inside of what it stands for", line)
    if size > MOST_YAML_NODES:
        raise YamlError(f"has over {MOST_YAML_NODES:,} values, its aliases written out", line)
    if depth > MOST_YAML_DEPTH:
        raise YamlError(_TOO_DEEP, line)
    return size, depth
