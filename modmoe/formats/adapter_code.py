"""The code that a model with its adapters carries: the files of ``modmoe/adapters`` that it needs, and no others."""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path

from modmoe.adapters.table import Method
from modmoe.errors import ExportError

CONFIGURATION = "configuration_modmoe_adapters.py"
MODELING = "modeling_modmoe_adapters.py"

_PACKAGE = "modmoe.adapters."
# a method may use what tied models have; there they are siblings
_MODELING_IMPORT = re.compile(r"^(\s*)from modmoe\.modeling\.(\w+) import ", re.MULTILINE)
# the forms that relative imports have in these files, which lie side by side where they are carried to
_RELATIVE = re.compile(r"^(\s*)from \.+(?:\w+\.)*(\w+) import ", re.MULTILINE)
_FOLDERS = ("adapters", "adapters/methods", "adapters/mechanism", "modeling")
_FOREIGN = re.compile(r"^\s*(?:from|import) (?:modmoe|peft)\b.*$", re.MULTILINE)


def write_code(directory: Path, method: Method) -> list[str]:
    """Write the code that a checkpoint with this method's adapters is loaded with; return the names of the files."""
    texts = code_files(method)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return sorted(texts)


def code_files(method: Method) -> dict[str, str]:
    """Return the text of each file by name: the classes, the method, and what they import.

    Raises ExportError where one of them needs modmoe itself.
    """
    added = _added(method)
    texts: dict[str, str] = {}
    waiting = [CONFIGURATION, MODELING, *(f"{module}.py" for _, module in _RELATIVE.findall(added))]
    while waiting:
        name = waiting.pop()
        if name in texts:
            continue
        text = _RELATIVE.sub(r"\1from .\2 import ", _MODELING_IMPORT.sub(r"\1from .\2 import ", _read(name)))
        if name == MODELING:
            text += added
        foreign = _FOREIGN.search(text)
        if foreign:
            raise ExportError(
                str(name), f"'{foreign[0].strip()}' cannot be carried", "a method imports its siblings only"
            )
        texts[name] = text
        waiting += [f"{module}.py" for _, module in _RELATIVE.findall(text)]
    return texts


def _added(method: Method) -> str:
    """Return the lines that make one method known to the classes."""
    lines, names = [], []
    for kind in dict.fromkeys((method.adapter, method.settings)):
        if not kind.__module__.startswith(_PACKAGE):
            raise ExportError(
                f"{kind.__module__}.{kind.__name__}", "is not of modmoe.adapters", "its file is not carried"
            )
        lines.append(f"from .{kind.__module__.rpartition('.')[2]} import {kind.__name__}  # noqa: E402")
        names.append(kind.__name__)
    return "\n\n" + "\n".join(lines) + f"\n\nknow({', '.join(names)})\n"


def _read(name: str) -> str:
    for folder in _FOLDERS:
        file = importlib.resources.files("modmoe").joinpath(folder, name)
        if file.is_file():
            return file.read_text(encoding="utf-8")
    raise ExportError(str(name), "is neither in modmoe.adapters nor in modmoe.modeling")
