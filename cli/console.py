"""Where a command's words go: one result to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

from modmoe.cli.progress import Progress, size_words


def is_first_process() -> bool:
    """Return whether this is the only process of a run, or the first of those that a launcher started."""
    return os.environ.get("RANK", "0") == "0"


class StoppedError(Exception):
    """Ctrl-C within a command; says what is left of its work. Typer would turn the interrupt itself into a number."""


class Console:
    """One command's output. While it is open, whatever a library prints to stdout goes to stderr instead.

    Of several processes that run the same command the first alone speaks.
    """

    def __init__(self, *, as_json: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        """Say less (``quiet``), more (``verbose``), or put one JSON object on stdout (``as_json``)."""
        self.speaks = is_first_process()
        self.as_json, self.quiet, self.verbose = as_json, quiet or not self.speaks, verbose
        self._stdout: IO[str] = sys.stdout
        self._progress = Progress()
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Console:
        """Send stdout to stderr and calm the libraries down."""
        self._stdout = sys.stdout
        self._undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        self._undo.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning
        if not self.verbose:
            for name in ("TRANSFORMERS_VERBOSITY", "DATASETS_VERBOSITY", "HF_HUB_VERBOSITY"):
                os.environ.setdefault(name, "error")
            for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
                os.environ.setdefault(name, "1")
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
            if "transformers" in sys.modules:  # where it was imported before, it has read the environment already
                sys.modules["transformers"].utils.logging.disable_progress_bar()
            warnings.simplefilter("ignore")
            if self.speaks:
                warnings.filterwarnings("default", module=r"modmoe\b")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        logger = logging.getLogger("modmoe")
        handler = _StderrHandler()
        logger.addHandler(handler)
        self._undo.callback(logger.removeHandler, handler)
        level = logging.DEBUG if self.verbose else logging.WARNING if self.quiet else logging.INFO
        logger.setLevel(level if self.speaks else logging.ERROR)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        """Put stdout back. Ctrl-C becomes a StoppedError with what was said of it on its way here."""
        self._progress.close(failed=kind is not None)
        self._undo.close()
        if isinstance(error, KeyboardInterrupt):
            raise StoppedError(" ".join(getattr(error, "__notes__", ()))) from error

    def progress(self, message: str, done: int | None = None, total: int | None = None) -> None:
        """Say what a step is doing: a bar on a terminal, otherwise lines; see ``modmoe.cli.progress``."""
        if not self.quiet:
            self._progress.report(message, done, total)

    def say(self, line: str) -> None:
        """Print one line to stderr unless quiet."""
        if not self.quiet:
            self._progress.close()
            print(line, file=sys.stderr, flush=True)

    def finish(
        self,
        result: Mapping[str, Any],
        *,
        title: str = "",
        next_step: str = "",
        shown: Mapping[str, Any] | None = None,
        picture: Callable[[], Any] | None = None,
    ) -> None:
        """Print the result: one JSON object, or tables (of ``shown`` if given) and what the user may do next.

        On a terminal it is what ``picture`` makes for rich, where that is given.
        """
        self._progress.close()
        if not self.speaks:
            return
        if self.as_json:
            self._stdout.write(json.dumps(_jsonable(result), ensure_ascii=False, allow_nan=False) + "\n")
        elif not self.quiet and picture is not None and self._stdout.isatty():
            from rich.console import Console as RichConsole

            RichConsole(file=self._stdout, highlight=False).print(picture())
        elif not self.quiet:
            show(result if shown is None else shown, title, self._stdout)
        self._stdout.flush()
        if next_step and not self.as_json:
            self.say(f"next: {next_step}")

    def write(self, text: str) -> None:
        """Print text to stdout as it is."""
        if not self.speaks:
            return
        self._stdout.write(text)
        self._stdout.flush()


class _StderrHandler(logging.Handler):
    """Prints log lines to whatever stderr is at that moment, so that they land above a bar."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        print(f"modmoe: {record.getMessage()}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"modmoe: warning: {' '.join(str(message).split())}", file=sys.stderr)


def show(result: Mapping[str, Any], title: str, stream: IO[str]) -> None:
    """Print a result as small tables: single values first, then one table for each list or mapping of mappings."""
    values: list[tuple[str, str]] = []
    tables: list[tuple[str, list[Mapping[str, Any]]]] = []
    for key, value in result.items():
        if isinstance(value, Mapping) and value and all(isinstance(item, Mapping) for item in value.values()):
            tables.append((key, [{"name": name, **item} for name, item in value.items()]))
        elif isinstance(value, Mapping):
            values.extend((f"{key}.{name}", _words(f"{key}.{name}", item)) for name, item in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            tables.append((key, list(value)))
        else:
            values.append((key, _words(key, value)))
    draw = _draw_rich if stream.isatty() else _draw_plain
    if values:
        draw(title, [], values, stream)
    for name, rows in tables:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        draw(name, columns, [tuple(_words(column, row.get(column)) for column in columns) for row in rows], stream)


def _draw_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str]) -> None:
    from rich import box
    from rich.console import Console as RichConsole
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, show_header=bool(columns)
    )
    for number, column in enumerate(columns or ("", "")):
        table.add_column(column, justify="right" if columns and number else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    RichConsole(file=stream).print(table)


def _draw_plain(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str]) -> None:
    everything = [tuple(columns), *rows] if columns else list(rows)
    widths = [max(len(row[number]) for row in everything) for number in range(len(everything[0]))]
    if title:
        stream.write(f"{title}\n")
    for row in everything:
        stream.write(
            ("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip() + "\n"
        )


def _words(key: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return size_words(value) if "bytes" in key.rpartition(".")[2] else f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_words(name, item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            return "-"
        words = [_words(key, item) for item in value]
        return words[0] + f" (each of {len(words)})" if len(words) > 3 and len(set(words)) == 1 else ", ".join(words)
    return str(value)


def _jsonable(value: Any) -> Any:
    """Return ``value`` as what JSON can hold; a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_jsonable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    item: Callable[[], Any] | None = getattr(value, "item", None)  # numbers of numpy and torch
    return _jsonable(item()) if item is not None and getattr(value, "size", 1) == 1 else str(value)
