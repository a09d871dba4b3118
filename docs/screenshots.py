"""Makes docs/images again: what a terminal shows of three commands, under way and at the end, and the demo's report.

`make screenshots` runs them as README.md does, in a pseudo-terminal of 100 columns, and has Chromium draw what a
terminal emulator (pyte) then holds: the same bytes that a person would see.
"""

from __future__ import annotations

import codecs
import io
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from html import escape
from itertools import groupby
from pathlib import Path

import pyte
from PIL import Image

from modmoe.demo.main_job import MODEL
from tests.support.browser import Browser, find_chromium

IMAGES = Path(__file__).parent / "images"
COLUMNS, LINES, SEEN = 100, 90, 36
"""The emulator's width and height, and how many of its last lines are drawn."""
TASKS = "--task code=train/code.jsonl --task arithmetic=train/arithmetic.jsonl"
SHOTS: dict[str, tuple[str, str]] = {
    "convert": (
        f"modmoe convert dense moe {TASKS} --routing sequence --active-fraction 0.5 --shared-modules 4",
        r"starting routers .* [2-5]\d,\d+ of .* left",
    ),
    "finetune": (
        f"modmoe finetune moe tuned {TASKS} --train full --distill-from dense --max-steps 60 --learning-rate 6e-4 "
        "--sequence-length 128",
        r"training .* [34]\d of 60 .* left",
    ),
    "inspect": ("modmoe inspect tuned", ""),
}
"""Picture to command, and what the screen holds at the moment that is shown of it under way."""
COLOURS = {
    "black": "#3b4252", "red": "#ff7b72", "green": "#7ee787", "brown": "#e3b341", "blue": "#79c0ff", 
    "magenta": "#d2a8ff", "cyan": "#76e3ea", "white": "#d0d7de",
}  # fmt: skip
STYLE = """body { margin: 0; overflow: hidden; background: #0d1117; color: #d0d7de; width: max-content; }
pre { margin: 0; padding: 26px 32px; font: 28px/1.3 "DejaVu Sans Mono", monospace; }
pre + pre { border-top: 4px dashed #30363d; } b { color: #ffffff; } i { color: #8b949e; font-style: normal; }"""


def record(command: str, folder: Path, wanted: str, columns: int = COLUMNS) -> list[str]:
    """Run a command in a pseudo-terminal; return its screen when it first matched ``wanted``, and at the end."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
        os.execvpe("sh", ["sh", "-c", f"stty cols {columns} rows {LINES}; exec {command}"], environment)
    frames, screen = [], pyte.Screen(columns, LINES)
    stream, decoder = pyte.Stream(screen), codecs.getincrementaldecoder("utf-8")("replace")
    while True:
        try:
            data = os.read(terminal, 1 << 12)
        except OSError:  # what Linux says once the other end is closed
            data = b""
        if not data:
            break
        stream.feed(decoder.decode(data))
        if wanted and not frames and re.search(wanted, "\n".join(screen.display)):
            frames.append(draw(screen, command))
    _, status = os.waitpid(pid, 0)
    assert status == 0, f"{command}: {status}\n" + "\n".join(screen.display)
    assert frames or not wanted, f"{command}: never showed {wanted}"
    return [*frames, draw(screen, command)]


def draw(screen: pyte.Screen, command: str) -> str:
    """Return a screen as HTML, below the prompt with its command."""
    typed = textwrap.wrap(f"$ {command}", screen.columns - 2, subsequent_indent="    ", break_on_hyphens=False)
    lines = [f"<i>{escape(line)}</i>" for line in " \\\n".join(typed).splitlines()]
    last = max((row for row, text in enumerate(screen.display) if text.strip()), default=0)
    for row in range(last + 1):
        cells = [screen.buffer[row][column] for column in range(screen.columns)]
        parts = []
        for (colour, is_bold), run in groupby(cells, key=lambda cell: (cell.fg, cell.bold)):
            text = escape("".join(cell.data for cell in run))
            text = f"<b>{text}</b>" if is_bold else text
            value = COLOURS.get(colour, "#" + colour)
            parts.append(text if colour == "default" else f'<span style="color: {value}">{text}</span>')
        lines.append("".join(parts).rstrip())
    return "<pre>" + "\n".join(lines[-SEEN:]) + "</pre>"


def save(png: bytes, path: Path) -> None:
    """Write a picture with as many colours as it takes, so that it stays small."""
    image = Image.open(io.BytesIO(png)).convert("RGB").quantize(256)
    image.save(path, optimize=True)
    print(f"{path}: {image.width} x {image.height}, {path.stat().st_size:,} bytes")


def photograph(browser: Browser, html: str, path: Path) -> None:
    """Draw HTML and write what is seen."""
    page = path.with_suffix(".html")
    page.write_text(f"<!doctype html><meta charset=utf-8><style>{STYLE}</style>{html}", encoding="utf-8")
    browser.open(page)
    browser.set_view(*browser.run("[document.body.scrollWidth, document.body.scrollHeight]"))
    save(browser.screenshot(), IMAGES / path.with_suffix(".png").name)


def main() -> None:
    """Make the pictures in a folder where ``modmoe demo`` may have been, all or those of some commands: minutes."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()
    for name, place in {"train": "train", "held-out": "held_out"}.items():
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(Path("modmoe-demo/tasks") / place)
    shutil.copytree(MODEL, folder / "dense", dirs_exist_ok=True)
    if not (folder / "modmoe-demo" / "report.html").exists():
        subprocess.run(["modmoe", "demo", "--overwrite"], cwd=folder, check=True)
    program = find_chromium()
    assert program is not None, "no Chromium on this machine"
    with tempfile.TemporaryDirectory() as profile:
        browser = Browser(program, Path(profile))
        try:
            for name, (command, wanted) in SHOTS.items():
                if name not in (sys.argv[2:] or SHOTS):
                    continue
                shutil.rmtree(folder / {"convert": "moe", "finetune": "tuned"}.get(name, "none"), ignore_errors=True)
                photograph(browser, "".join(record(command, folder, wanted)), folder / f"terminal-{name}.html")
            for width in (1280, 400):
                browser.set_view(width, scrollbars=False)
                browser.open(folder / "modmoe-demo" / "report.html")
                save(browser.screenshot(whole=True), IMAGES / f"report-{width}.png")
        finally:
            browser.close()


if __name__ == "__main__":
    main()
