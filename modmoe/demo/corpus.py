"""Text of three domains found on any machine with Python: its library's code, its docs, and sums.

`code` is the source of the standard library, `docs` the language reference that `help()` shows plus
the library's docstrings, and `arithmetic` is generated. One document in twenty is held out, chosen by
a hash of its name (of its prompt, for arithmetic). A module is held out as code and as docs together,
so no held-out docstring was read as part of a training file. The choice depends on neither the seed
nor the Python version: what is held out here was held out when the shipped model was trained.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import itertools
import json
import os
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from modmoe.demo.arithmetic import Problem, iterate_problems
from modmoe.errors import CalibrationError

DOMAINS = ("code", "docs", "arithmetic")
SPLITS = ("train", "held_out")

_HELD_OUT_ONE_IN = 20
# a list of all problems must end; this is about what the shipped model read
_NUM_PROBLEMS = 200_000
_MIN_DOCUMENT_CHARS = 80
_PASSAGE_CHARS = 1200
# passages are dealt from this many documents in turn, so that few rows still show many documents
_DOCUMENTS_IN_TURN = 32

_MAX_SOURCE_BYTES = 200_000
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    | {"lib-dynload", "encodings", "pydoc_data", "msilib"}
)
# tables rather than prose or programs, and one that differs between machines
_SKIPPED_FILE_STARTS = ("html/entities.py", "_sysconfigdata", "config-")


def documents(domain: str, split: str, *, seed: int = 0, limit_chars: int | None = None) -> Iterator[str]:
    """Yield the documents of one domain's split, in an order that the seed shuffles.

    Args:
        domain: one of `DOMAINS`.
        split: one of `SPLITS`.
        seed: the order; for arithmetic, which problems are drawn.
        limit_chars: stop after the document that reaches this many characters; only as much of the
            library as that takes is read.

    Raises:
        ValueError: the domain or the split is unknown.
        CalibrationError: this Python was installed without the source of its library.
    """
    _check_choice("domain", domain, DOMAINS)
    _check_choice("split", split, SPLITS)
    return _take_chars(_iterate_documents(domain, split, seed), limit_chars)


def problems(split: str, *, seed: int = 0) -> Iterator[Problem]:
    """Yield the arithmetic problems of one split: those whose prompt hashes into it."""
    _check_choice("split", split, SPLITS)
    drawn = itertools.islice(iterate_problems(seed), _NUM_PROBLEMS)
    return (problem for problem in drawn if _find_split(problem.prompt) == split)


def write_task_files(directory: str | Path, *, split: str, rows_per_task: int, seed: int = 0) -> dict[str, Path]:
    """Write `<domain>.jsonl` for every domain and return the paths by domain.

    Rows are `{"text"}` for code and docs, passages of at most 1200 characters cut between lines, and
    `{"prompt", "completion"}` for arithmetic. A domain with fewer passages than `rows_per_task` gives
    all it has. Each split wants a directory of its own: files of the same name are overwritten.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for domain in DOMAINS:
        rows = itertools.islice(task_rows(domain, split, seed=seed), rows_per_task)
        paths[domain] = directory / f"{domain}.jsonl"
        with paths[domain].open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return paths


def task_rows(domain: str, split: str, *, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield the rows of one task, as `write_task_files` writes them."""
    if domain == "arithmetic":
        for problem in problems(split, seed=seed):
            yield {"prompt": problem.prompt, "completion": problem.completion}
        return
    cut = (cut_passages(document) for document in documents(domain, split, seed=seed))
    for passage in _deal(cut, _DOCUMENTS_IN_TURN):
        yield {"text": passage}


def cut_passages(document: str, max_chars: int = _PASSAGE_CHARS) -> Iterator[str]:
    """Cut a document between lines into passages; only a line longer than a passage is cut itself.

    Pieces too short to say anything are dropped.
    """
    pieces = (
        line[start : start + max_chars]
        for line in document.splitlines(keepends=True)
        for start in range(0, len(line), max_chars)
    )
    passage = ""
    for piece in itertools.chain(pieces, [None]):
        if piece is not None and len(passage) + len(piece) <= max_chars:
            passage += piece
            continue
        if len(passage.strip()) >= _MIN_DOCUMENT_CHARS:
            yield passage.strip("\n")
        passage = piece or ""


def _iterate_documents(domain: str, split: str, seed: int) -> Iterator[str]:
    if domain == "arithmetic":
        return (problem.text for problem in problems(split, seed=seed))
    if domain == "code":
        names = _choose_names(_find_sources(), split, seed)
        return (text for name in names if (text := _read_source(name)).strip())
    return _iterate_docs(split, seed)


def _iterate_docs(split: str, seed: int) -> Iterator[str]:
    topics = _load_topics()
    seen: set[int] = set()
    for name in _choose_names([*_find_sources(), *topics], split, seed):
        texts = [topics[name]] if name in topics else _extract_docstrings(_read_source(name))
        for text in texts:
            # methods often repeat the docstring of the method they override
            if len(text) > _MIN_DOCUMENT_CHARS and (digest := _hash(text)) not in seen:
                seen.add(digest)
                yield text


def _choose_names(names: Iterable[str], split: str, seed: int) -> list[str]:
    chosen = (name for name in names if _find_split(name) == split)
    return sorted(chosen, key=lambda name: _hash(f"{seed} {name}"))


def _find_split(name: str) -> str:
    return "held_out" if _hash(name) % _HELD_OUT_ONE_IN == 0 else "train"


def _hash(text: str) -> int:
    """Hash stably: `hash()` differs from run to run."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


@functools.cache
def _find_sources() -> tuple[str, ...]:
    """Names of the library's own pure-Python files, relative to its root with forward slashes."""
    root = Path(sysconfig.get_path("stdlib"))
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _SKIPPED_FOLDERS]
        for file in files:
            path = Path(folder, file)
            name = path.relative_to(root).as_posix()
            if path.suffix != ".py" or name.startswith(_SKIPPED_FILE_STARTS):
                continue
            if path.stat().st_size <= _MAX_SOURCE_BYTES:
                names.append(name)
    if not names:
        raise CalibrationError(
            f"no source of the standard library under {root}: the code and docs domains need a "
            "Python that was installed with its .py files"
        )
    return tuple(sorted(names))


def _read_source(name: str) -> str:
    """Read one file in the encoding that it declares; one that is not text reads as empty."""
    try:
        with tokenize.open(Path(sysconfig.get_path("stdlib"), name)) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return ""


def _load_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions package it apart
        return {}
    return {f"topic {name}": text.strip() for name, text in topics.items()}


def _extract_docstrings(source: str) -> list[str]:
    """Docstrings of a module and everything defined in it, with their indentation removed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's strings
        try:
            tree = ast.parse(source)
        except SyntaxError:  # templates that only look like Python
            return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [text.strip() for text in found if text]


def _take_chars(texts: Iterable[str], limit_chars: int | None) -> Iterator[str]:
    total_chars = 0
    for text in texts:
        if limit_chars is not None and total_chars >= limit_chars:
            return
        total_chars += len(text)
        yield text


def _deal(groups: Iterable[Iterator[str]], num_in_turn: int) -> Iterator[str]:
    """Take one item of each group in turn, over `num_in_turn` groups at a time."""
    waiting = iter(groups)
    while block := list(itertools.islice(waiting, num_in_turn)):
        for turn in itertools.zip_longest(*block):
            yield from (item for item in turn if item is not None)


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"unknown {what} {value!r}; one of: {', '.join(choices)}")
