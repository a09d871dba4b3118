"""A notebook as a page of the site: its text, the code of its cells, and what these last printed and drew."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

_ABOUT = 'This page is <a href="{name}" download>a notebook</a>: run it yourself, as the tests do.\n\n'


def as_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, and the pictures it shows by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(_fenced(source, "python"))
        for place, output in enumerate(cell["outputs"]):
            picture = output.get("data", {}).get("image/png")
            if picture is None:
                parts.append(_fenced(_text(output), "text"))
                continue
            name = f"{path.stem}-{number}-{place}.png"
            pictures[name] = base64.b64decode("".join(picture))
            parts.append(f"![What the cell above draws]({name})")
    title, _, rest = "\n\n".join(parts).partition("\n\n")
    return f"{title}\n\n{_ABOUT.format(name=path.name)}{rest}\n", pictures


def _text(output: dict[str, Any]) -> str:
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])


def _fenced(text: str, language: str) -> str:
    return f"```{language}\n{text.rstrip()}\n```"
