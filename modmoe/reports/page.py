"""The parts of an HTML page that needs no other file. Every string that is passed in is escaped here."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path

from modmoe.reports.drawing import PALETTE
from modmoe.reports.script import SCRIPT

SHADES = len(PALETTE)
"""Colours that tokens can have; and lines under them, so that the colour is not all that tells them apart."""
_LINES = ("solid", "double", "dashed", "dotted")
_TOKENS = "\n".join(
    f".e{number} {{ --shade: {colour}; border-bottom-style: {_LINES[number % len(_LINES)]}; }}\n"
    f".q{number} {{ --shade: {PALETTE[1]}; --strength: {8 + 10 * number}%; border-bottom-color: transparent; }}"
    for number, colour in enumerate(PALETTE)
)

STYLE = (
    """
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
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: .8rem 0 0; }
nav a { color: var(--accent); }
pre { background: var(--wash); border-radius: 6px; padding: .7rem; margin: .3rem 0; overflow-x: auto;
  font: 13px/1.45 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
.sample pre { white-space: pre-wrap; }
.sample { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 0 1rem; }
.told { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.pick label { font-weight: 600; }
select { font: inherit; color: inherit; background: var(--wash); border: 1px solid var(--soft); border-radius: 6px;
  padding: .2rem .5rem; margin-left: .4rem; max-width: 100%; }
.pick label { margin-right: 1.2rem; display: inline-block; }
select:focus-visible, svg:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
.tip { position: fixed; z-index: 1; max-width: 20rem; padding: .25rem .6rem; border-radius: 6px; font-size: .85rem;
  background: var(--ink); color: var(--paper); pointer-events: none; }
.tokens { white-space: pre-wrap; background: var(--wash); border-radius: 6px; padding: .7rem; margin: .3rem 0;
  font: 13px/1.9 ui-monospace, Consolas, "DejaVu Sans Mono", monospace; }
.tokens span, .key span { background: color-mix(in srgb, var(--shade) var(--strength, 30%), transparent);
  border-bottom: 2px solid var(--shade); print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.key span { padding: 0 .5rem; margin-right: .5rem; white-space: nowrap; }
"""
    + _TOKENS
    + """
@media print { :root { color-scheme: light; --paper: #ffffff; --ink: #1b1f24; --soft: #5a6472; --line: #d8dde3;
  --wash: #f4f6f8; --accent: #2a63b8; }
  body { max-width: none; font-size: 11pt; padding: 0; }
  nav, .pick, .tip { display: none; }
  [data-layer][hidden], [data-task][hidden] { display: block !important; }
  .whole::details-content { content-visibility: visible; height: auto; }
  .scroll, pre { overflow: visible; } pre { white-space: pre-wrap; }
  figure, tr, .tokens { break-inside: avoid; } h2, h3, summary { break-after: avoid; } }
"""
)
_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
# this policy makes the browser fetch nothing and run no other script
_POLICY = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_DIGEST}'"


def page(title: str, body: Sequence[str]) -> str:
    """Return the whole document; ``body`` is HTML made by the functions here, ``title`` is text."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n'
        "</head>\n<body>\n<main>\n" + "\n".join(body) + "\n</main>\n"
        '<p class="told" id="told">The arrow keys tell the values.</p>\n'
        f"<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def heading(text: str, level: int = 2, anchor: str = "") -> str:
    """Return a heading."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    return f"<h{level}{name}>{escape(text)}</h{level}>"


def contents(places: Sequence[tuple[str, str]]) -> str:
    """Return links to anchors, each with its words."""
    links = "".join(f'<li><a href="#{escape(anchor)}">{escape(words)}</a></li>' for anchor, words in places)
    return f'<nav aria-label="Contents"><ul>{links}</ul></nav>'


def picker(label: str, options: Sequence[tuple[str, str]], *, picks: str, of: str, chosen: str = "") -> str:
    """Return a labelled choice that the script brings to life; it stays out of sight without it, and on paper.

    Args:
        label: what is picked.
        options: value and words of each.
        picks: ``show`` what is ``of`` a layer or a task, or ``colour`` the tokens.
        of: ``layer`` or ``task``.
        chosen: the value that is picked at first.
    """
    items = "".join(
        f'<option value="{escape(value)}"{" selected" if value == chosen else ""}>{escape(words)}</option>'
        for value, words in options
    )
    return (
        f'<div class="pick" hidden><label>{escape(label)}<select data-picks="{escape(picks)}" data-of="{escape(of)}" '
        f'autocomplete="off">{items}</select></label></div>'
    )


def part(parts: Sequence[str], *, of: str, value: str) -> str:
    """Return parts that a picker of ``of`` shows where it is at ``value``."""
    return f'<div data-{escape(of)}="{escape(value)}">{"".join(parts)}</div>'


def tokens(
    pieces: Sequence[str], choices_LT: Sequence[Sequence[int]], names: Sequence[str], *, kind: str, layer: int
) -> str:
    """Return text whose tokens have a colour each: that of ``choices_LT[layer]``, until another layer is picked.

    ``kind`` is ``e`` for colours of their own, or ``q`` for one colour from faint to strong; ``names`` says what each
    choice is.
    """
    spans = "".join(
        f'<span class="{kind}{choice % SHADES}" title="{escape(names[choice])}">{escape(piece)}</span>'
        for piece, choice in zip(pieces, choices_LT[layer], strict=True)
    )
    told = json.dumps([list(choice_T) for choice_T in choices_LT], separators=(",", ":"))
    called = escape(json.dumps(list(names), ensure_ascii=False))
    return f'<div class="tokens" data-kind="{kind}" data-choices="{told}" data-names="{called}">{spans}</div>'


def marked(pieces: Sequence[tuple[str, bool]], name: str) -> str:
    """Return text of which some pieces are marked; ``name`` says what the mark is."""
    spans = "".join(
        f'<span class="e0" title="{escape(name)}">{escape(piece)}</span>' if is_marked else escape(piece)
        for piece, is_marked in pieces
    )
    return f'<div class="tokens marked">{spans}</div>'


def counted(texts_L: Sequence[str], *, layer: int) -> str:
    """Return the words of the layer whose colours ``tokens`` has; the script has those of the others."""
    told = escape(json.dumps(list(texts_L), ensure_ascii=False))
    return f'<p class="note" data-counted="{told}">{escape(texts_L[layer])}</p>'


def key(names: Sequence[str], *, kind: str) -> str:
    """Return what each colour of ``tokens`` is."""
    spans = " ".join(
        f'<span class="{kind}{number % SHADES}">{escape(name)}</span>' for number, name in enumerate(names)
    )
    return f'<p class="key">{spans}</p>'


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
    """Return a plot with its caption; ``svg`` is what ``modmoe.reports.plots`` returned."""
    return f"<figure>{svg}<figcaption><b>{escape(title)}</b> {escape(text)}</figcaption></figure>"


def grid(parts: Sequence[str]) -> str:
    """Return parts side by side where there is room."""
    return f'<div class="plots">{"".join(parts)}</div>'


def fold(
    title: str,
    aside: str,
    parts: Sequence[str],
    *,
    is_open: bool = False,
    anchor: str = "",
    layer: int | None = None,
    is_printed: bool = True,
) -> str:
    """Return a part that opens when its title is clicked, and on paper; ``layer`` is what a picker knows it by."""
    name = f' id="{escape(anchor)}"' if anchor else ""
    state = " open" if is_open else ""
    kind = ' class="whole"' if is_printed else ""
    of = "" if layer is None else f' data-layer="{layer}"'
    return (
        f"<details{name}{kind}{of}{state}><summary>{escape(title)} <span>{escape(aside)}</span></summary>"
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


def short_name(source: str | None) -> str:
    """Return a Hub id or a relative path as it is; of an absolute one the end, since reports are shown to others."""
    path = Path(source or "model")
    return "/".join(path.parts[-2:]) if path.is_absolute() else str(source or "model")
