"""A tokenizer's files: how large they may be, and what they come to, tried out before this process reads or uses them.

What stands in them is read by two libraries, one of them not in Python, which know no bounds: a vocabulary that fills
the memory, an expression that takes all time, a rule that makes a thousand letters of one.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modmoe.errors import CheckpointError
from modmoe.storage import bounded
from modmoe.storage.bounded import call_in_bounds
from modmoe.storage.documents import open_plain, read_text

MOST_FILE_BYTES = 256 << 20
"""Of any of them; the largest vocabularies take a quarter of it."""
MOST_TEMPLATE_CHARACTERS = 1 << 20
"""Of a chat template inside of tokenizer_config.json."""
REMEDY = "use a tokenizer that you trust, or fetch its files again"
"""What to do about a tokenizer that breaks the bounds, without a full stop."""

_CORES = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "tokenizer_config.json")
_NAMES: tuple[str, ...] = ("tokenizer*", "vocab*", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "*.jinja")
_NAMES += ("config.json", "special_tokens_map.json", "added_tokens.json", "processor_config.json")
_SMALL = "tokenizer_config.json"
_MOST_TOKENS = 100
"""That a healthy tokenizer makes of a character."""
_FREE_TOKENS = 1000
_PROBE = (
    "Once upon a time, 3.14 + 27 = 30.14; naïve café — 東京, Привет, 😀!\n\tif x[0] != 'y':  return None\n"
    + "".join(map(chr, range(32, 127)))
)
_RUNS = ("a" * 48 + "!", " " * 48 + "x", "0" * 48 + "a", "\n" * 48, "ab" * 24)
"""What expressions that repeat themselves take long for."""
_MOST_STRINGS = 200
_PROBE_SECONDS = 20.0
# digests of directories that were tried out in this process
_TRIED: set[bytes] = set()


def place_of(directory: Path) -> str:
    """Return the file that a tokenizer is in, for errors; the directory where none is known."""
    return str(next((directory / name for name in _CORES if (directory / name).is_file()), directory))


def open_in_bounds(directory: Path, read: Callable[[], Any], *, is_trusted: bool) -> Any:
    """Return what ``read()`` makes of a tokenizer's files, after it was done in a child process within bounds.

    Where the same bytes were tried out before, they are not again; with ``is_trusted`` Python files belong to them, and
    they are.

    Raises CheckpointError where a file is too large, or what ``read`` raises, or where it breaks the bounds.
    """
    check_sizes(directory)
    digest = None if is_trusted else _digest(directory)
    if bounded.HAS_CHILDREN and (digest is None or digest not in _TRIED):

        def attempt() -> None:
            logging.disable()  # all that is logged is logged again
            read()

        call_in_bounds(attempt, place=place_of(directory), remedy=REMEDY)
        if digest is not None:
            _TRIED.add(digest)
    return read()


def check_sizes(directory: Path) -> None:
    """Raise CheckpointError where a tokenizer's file, or the chat template in one, is larger than any is."""
    for path in _files(directory):
        size_bytes = path.stat().st_size
        if size_bytes > MOST_FILE_BYTES:
            raise CheckpointError(str(path), f"has {size_bytes:,} bytes, over {MOST_FILE_BYTES:,}", REMEDY)
    settings = directory / _SMALL
    if not settings.is_file():
        return
    try:
        value = json.loads(read_text(settings, MOST_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return  # told by those who read it
    template = value.get("chat_template") if isinstance(value, dict) else None
    size = len(json.dumps(template, ensure_ascii=False))
    if size > MOST_TEMPLATE_CHARACTERS:
        wrong = f"has {size:,} characters, over {MOST_TEMPLATE_CHARACTERS:,}"
        raise CheckpointError(str(settings), f"chat_template {wrong}", "take it away")


def try_tokenizer(directory: Path, tokenizer: Any) -> None:
    """Encode and decode some short texts, and run the chat template, within bounds.

    The texts have every letter of ASCII and what the rules of tokenizer.json look for.

    Raises CheckpointError, with the file's name, where that takes too much memory or time, breaks down, or makes far
    more of a text than it is; and where a template cannot be read.
    """
    texts = [_PROBE, *_RUNS, *_strings_of(directory)]
    bounds: dict[str, Any] = {"remedy": REMEDY, "item_seconds": _PROBE_SECONDS}

    def use() -> list[int] | None:
        for text in texts:
            ids = tokenizer(text, verbose=False)["input_ids"]
            if len(ids) > _MOST_TOKENS * len(text) + _FREE_TOKENS:
                return [len(ids), len(text)]
            answer = tokenizer.decode(ids)
            if len(answer) > _MOST_TOKENS * (len(text) + len(ids)) + _FREE_TOKENS:
                return [len(answer), len(text)]
        return None

    place = place_of(directory)
    grown = call_in_bounds(use, place=place, **bounds)
    if grown is not None:
        raise CheckpointError(str(place), f"makes {grown[0]:,} tokens or letters of {grown[1]} letters", REMEDY)
    if getattr(tokenizer, "chat_template", None):
        place = template_place(directory)
        wrong = call_in_bounds(lambda: _run_template(tokenizer), place=place, **bounds)
        if wrong is not None:
            raise CheckpointError(str(place), wrong, "fetch it again, or take it away")


def template_place(directory: Path) -> str:
    """Return the file that a chat template is in, for errors."""
    alone = directory / "chat_template.jinja"
    return str(alone if alone.is_file() else directory / _SMALL)


def files_of(tokenizer: Any) -> str:
    """Return the file that a loaded tokenizer is in, for errors, and before it that of its chat template, if any."""
    directory = Path(getattr(tokenizer, "name_or_path", "") or "")
    if not directory.name or not directory.is_dir():
        return str(getattr(tokenizer, "name_or_path", "") or type(tokenizer).__name__)
    template = f"{template_place(directory)} or " if getattr(tokenizer, "chat_template", None) else ""
    return f"{template}{place_of(directory)}"


def _run_template(tokenizer: Any) -> str | None:
    """Run a chat template on two turns; return what is wrong with it, if it is no template."""
    from jinja2 import TemplateSyntaxError

    turns = [{"role": "user", "content": "Once upon a time"}, {"role": "assistant", "content": "there was a dog."}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except TemplateSyntaxError as error:
        return f"is no template ({error})"
    except MemoryError:
        raise
    except RecursionError:
        return "calls itself too often, or is nested too deep"
    except Exception:
        return None  # some ask for turns of their own kind, and refuse others
    most = MOST_TEMPLATE_CHARACTERS
    return f"makes {len(text):,} letters of two short turns" if len(text) > most else None


def _files(directory: Path) -> Iterator[Path]:
    seen = {path for name in _NAMES for path in directory.glob(name) if path.is_file()}
    yield from sorted(seen)


def _digest(directory: Path) -> bytes:
    digest = hashlib.sha256()
    for path in _files(directory):
        with open_plain(path) as file:
            digest.update(f"{path.name}\0".encode(errors="surrogateescape"))
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.digest()


def _strings_of(directory: Path) -> list[str]:
    """Return the strings that tokenizer.json's rules look for, but for its vocabulary."""
    try:
        value = json.loads(read_text(directory / "tokenizer.json", MOST_FILE_BYTES))
    except (OSError, ValueError, RecursionError):
        return []
    rules = [value.get(key) for key in ("normalizer", "pre_tokenizer", "decoder")] if isinstance(value, dict) else []
    found: dict[str, None] = {}
    waiting: list[Any] = rules
    while waiting and len(found) < _MOST_STRINGS:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and 0 < len(item) <= 200 and item.isprintable():
            found[f"{item} {item}"] = None
    return list(found)
