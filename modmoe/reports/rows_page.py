"""The report's section on rows: how many of each task were read, and the first row as the model reads it."""

from __future__ import annotations

from collections.abc import Mapping

from modmoe.analysis.text.reading import Reading
from modmoe.reports import page


def rows_read(readings: Mapping[str, Reading]) -> list[str]:
    """Return the parts of the section; nothing where nothing was noted."""
    if not readings:
        return []
    found = {name: reading.summary() for name, reading in readings.items()}
    lines = [
        (
            name,
            f"{read['rows']:,}",
            f"{read['rows_in_file']:,}",
            f"{read['tokens']:,}",
            f"{read['cut']:,}",
            ", ".join(f"{reason} ({count:,})" for reason, count in read["left_out"].items()) or "-",
        )
        for name, read in found.items()
    ]
    parts = [
        page.table(
            "Rows.", ("task", "rows read", "rows in the file", "tokens", "rows cut", "left out"), lines, is_words=True
        )
    ]
    parts += [page.paragraph(f"{name}: {words}.") for name, read in found.items() for words in read["warnings"]]
    shown = {name: reading.first for name, reading in readings.items() if reading.first}
    if shown:
        words = "The first row of each task as the model reads it. What fine-tuning and evaluation count is marked."
        parts.append(page.paragraph(words, "note"))
    for name, pieces in shown.items():
        parts += [page.heading(name, 3), page.marked(pieces, "counts")]
    return parts
