"""The parts of an HTML page that needs nothing beside itself. Every string that is handed in is escaped here."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1b1f24; --soft: #5a6472; --line: #d8dde3; --wash: #f4f6f8;
  --accent: #2a63b8; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --soft: #9aa4b0; --line: #343b44;
  --wash: #1d2228; --accent: #7fb0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.4rem 0 .6rem; padding-top: .6rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.4rem 0 .4rem; }
.sample h3 { font-size: .88rem; color: var(--soft); margin: .5rem 0 .2rem; font-weight: 600; }
p { margin: .4rem 0; max-width: 46rem; }
.lead { font-size: 1.05rem; color: var(--soft); }
.note { color: var(--soft); font-size: .88rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 21rem), 1fr)); gap: 1rem 2rem;
  align-items: start; }
figure { margin: .6rem 0; max-width: 34rem; }
figcaption { font-size: .88rem; color: var(--soft); }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; font-family: inherit; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .4rem 0; min-width: min(100%, 24rem);
  font-variant-numeric: tabular-nums; font-size: .92rem; }
caption { text-align: left; font-size: .88rem; color: var(--soft); padding-bottom: .3rem; }
caption b { color: var(--ink); }
th, td { padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  overflow-wrap: normal; }
td, thead th { white-space: nowrap; }
th:first-child, td:first-child, .words td, .words th { text-align: left; }
.words td { overflow-wrap: anywhere; white-space: normal; }
thead th { color: var(--soft); font-weight: 600; }
tbody th { font-weight: 500; }
details { border: 1px solid var(--line); border-radius: 6px; margin: .5rem 0; padding: 0 .9rem; }
details[open] { padding-bottom: .8rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
summary span { font-weight: 400; color: var(--soft); }
summary:focus-visible, .scroll:focus-visible, a:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
nav a { display: inline-block; padding: .1rem .5rem; color: var(--accent); }
pre { background: var(--wash); border-radius: 6px; padding: .7rem; margin: .3rem 0; overflow-x: auto;
  font: 13px/1.45 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
.sample pre { white-space: pre-wrap; }
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0 1rem; }
@media print { details { break-inside: avoid; } }
"""


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole document; ``body`` is HTML made by the functions here, ``title`` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n'
        "</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2, anchor: str = "") -> str:
    """Return a heading."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph of the class ``kind``."""
    return f'<p class="{escape(kind)}">{escape(text)}</p>' if kind else f"<p>{escape(text)}</p>"


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, note: str = "", is_words: bool = False
) -> str:
    """Return a table whose first column names its rows; ``is_words`` sets text to the left."""
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in columns)
    lines = (
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    kind = ' class="words"' if is_words else ""
    # a wide table scrolls by itself, and by the keyboard too
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(title)}"><table{kind}>'
        f"<caption><b>{escape(title)}</b> {escape(note)}</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def figure(svg: str, title: str, text: str) -> str:
    """Return a plot with its caption; ``svg`` is what ``modmoe.analyze.plots`` returned."""
    return f"<figure>{svg}<figcaption><b>{escape(title)}</b> {escape(text)}</figcaption></figure>"


def grid(parts: Sequence[str]) -> str:
    """Return parts side by side where there is room."""
    return f'<div class="plots">{"".join(parts)}</div>'


def fold(title: str, aside: str, parts: Sequence[str], *, is_open: bool = False, anchor: str = "") -> str:
    """Return a part that opens when its title is clicked."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    state = " open" if is_open else ""
    return (
        f"<details{name}{state}><summary>{escape(title)} <span>{escape(aside)}</span></summary>"
        f"{''.join(parts)}</details>"
    )


def preformatted(text: str, title: str = "") -> str:
    """Return text as it stands, under a small title."""
    head = f"<h3>{escape(title)}</h3>" if title else ""
    return f"{head}<pre>{escape(text)}</pre>"


def columns_of_text(texts: Sequence[tuple[str, str]]) -> str:
    """Return titled texts side by side where there is room."""
    parts = "".join(f"<div>{preformatted(text, title)}</div>" for title, text in texts)
    return f'<div class="sample">{parts}</div>'
