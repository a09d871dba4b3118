"""Where a command's words go: one result to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import IO, TYPE_CHECKING, Any

from modmoe.cli.progress import Progress, size_words
from modmoe.cli.streams import StdoutError, json_text, plain_streams, silence, terminal
from modmoe.errors import visible

if TYPE_CHECKING:
    from rich.text import Text

_READ = ("read", "read_eval")
_LONG = 40
"""Characters beyond which a cell of a table is text, which may be cut where a terminal is narrow."""


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
        self._is_silent = quiet
        self._stdout: IO[str] = sys.stdout
        self._progress, self._has_moved = Progress(), False
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Console:
        """Send stdout to stderr and calm the libraries down."""
        self._undo.enter_context(plain_streams())
        self._stdout = sys.stdout
        self._undo.enter_context(contextlib.redirect_stdout(sys.stderr))
        if self._is_silent:
            self._undo.enter_context(silence(sys.stderr))
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
            self._has_moved = True
            self._progress.report(message, done, total)

    def say(self, line: str) -> None:
        """Print one line to stderr unless quiet."""
        if not self.quiet:
            self._progress.close()
            print(visible(line), file=sys.stderr, flush=True)

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
        try:
            if self.as_json:
                self._stdout.write(json_text(_jsonable(result), self._stdout) + "\n")
            elif not self.quiet:
                self._show(result if shown is None else shown, title, picture)
            self._stdout.flush()
        except StdoutError as error:
            if (output := result.get("output") or title) and not result.get("dry_run"):
                error.add_note(f"{output} is whole.")
            raise
        if next_step and not self.as_json:
            self._say_next(next_step)

    def _show(self, result: Mapping[str, Any], title: str, picture: Callable[[], Any] | None) -> None:
        screen = terminal(self._stdout)
        if picture is None or screen is None:
            # what was read is in the log already, in words
            show({key: value for key, value in result.items() if key not in _READ}, title, self._stdout)
            return
        from rich.console import Console as RichConsole

        RichConsole(file=screen, highlight=False).print(*([""] if self._has_moved else []), picture(), sep="\n")

    def _say_next(self, step: str) -> None:
        screen = None if self.quiet else terminal(sys.stderr)
        if screen is None:
            self.say(f"next: {step}")
            return
        from rich.console import Console as RichConsole
        from rich.text import Text

        words = Text.assemble("\n", ("next:", "bold"), f" {visible(step)}")
        RichConsole(file=screen, soft_wrap=True).print(words)

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
        print(f"modmoe: {visible(record.getMessage())}", file=sys.stderr, flush=True)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"modmoe: warning: {visible(' '.join(str(message).split()))}", file=sys.stderr)


def show(result: Mapping[str, Any], title: str, stream: IO[str]) -> None:
    """Print a result as small tables: single values first, then one table for each list or mapping of mappings."""
    values: list[tuple[str, str]] = []
    tables: list[tuple[str, list[Mapping[str, Any]]]] = []
    for key, value in result.items():
        if isinstance(value, Mapping) and value and all(isinstance(item, Mapping) for item in value.values()):
            tables.append((key, [{"name": name, **item} for name, item in value.items()]))
        elif isinstance(value, Mapping):
            values.extend((visible(f"{key}.{name}"), _words(f"{key}.{name}", item)) for name, item in value.items())
        elif isinstance(value, Sequence) and not isinstance(value, str) and value and isinstance(value[0], Mapping):
            tables.append((key, list(value)))
        else:
            values.append((visible(key), _words(key, value)))
    screen = terminal(stream)
    draw = _draw_plain if screen is None else _draw_rich
    if values:
        draw(visible(title), [], values, screen or stream)
    for name, rows in tables:
        columns = list(dict.fromkeys(column for row in rows for column in row))
        cells = [tuple(_words(column, row.get(column)) for column in columns) for row in rows]
        draw(visible(name), [visible(column) for column in columns], cells, screen or stream)


def _draw_rich(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], stream: IO[str]) -> None:
    from rich import box
    from rich.console import Console as RichConsole
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = RichConsole(file=stream, highlight=False)
    room = console.width - 2
    heads, width = _fit(columns, rows, room)
    is_wide = width > room
    if is_wide and not any(len(cell) > _LONG for row in rows for cell in row):
        # stood on its side a table of few rows is narrower, and no number is cut
        turned = list(zip(columns, *rows, strict=True))
        turned_heads, width = _fit(turned[0], turned[1:], room)
        if width <= room:
            heads, columns, rows, is_wide = turned_heads, turned[0], turned[1:], False
    table = Table(
        box=box.SIMPLE_HEAD, show_header=bool(columns), show_edge=False, padding=(0, 1, 0, 0), header_style=""
    )
    for head, cells in zip(heads, zip(*rows, strict=True), strict=True):
        is_number = bool(columns) and all(not cell.strip("0123456789.,e+-") for cell in cells)
        is_text = max(map(len, cells)) > _LONG
        table.add_column(
            head, justify="right" if is_number else "left", no_wrap=not is_text and not is_wide, overflow="fold"
        )
    for row in rows:
        table.add_row(*(_as_cell(cell) for cell in row))
    if title:
        console.print(Text.assemble("\n", (title, "bold")))
    console.print(Padding(table, (0, 0, 0, 2)))


def _as_cell(words: str) -> Text:
    from rich.text import Text

    is_long = len(words) > _LONG
    return Text(words, no_wrap=is_long, overflow="ellipsis" if is_long else "fold")


def _fit(columns: Sequence[str], rows: Sequence[Sequence[str]], room: int) -> tuple[list[str], int]:
    """Return heads, broken into lines where there is no room, and the least width of a table, long text left aside."""
    widths = [min(_LONG, max(map(len, cells))) for cells in zip(*rows, strict=True)]
    heads = list(columns) or [""] * len(widths)
    if sum(max(width, len(head)) + 2 for width, head in zip(widths, heads, strict=True)) > room:
        longest = [max(map(len, head.split()), default=0) for head in heads]
        heads = ["\n".join(textwrap.wrap(head, max(pair))) for head, *pair in zip(heads, widths, longest, strict=True)]
        widths = [max(pair) for pair in zip(widths, longest, strict=True)]
        return heads, sum(widths) + 2 * len(widths)
    return heads, 0


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
        return ", ".join(f"{visible(str(name))} {_words(str(name), item)}" for name, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value:
            return "-"
        words = [_words(key, item) for item in value]
        return words[0] + f" (each of {len(words)})" if len(words) > 3 and len(set(words)) == 1 else ", ".join(words)
    return visible(str(value))


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
