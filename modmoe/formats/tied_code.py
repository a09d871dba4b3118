"""The code that a tied checkpoint carries, so that plain transformers loads it where modmoe is not installed.

Beside the weights lie the files of ``modmoe/modeling``. An architecture that transformers does not know brings files of
its own; they are copied too, and a few lines are added to ours that build the tied classes over them.
"""

from __future__ import annotations

import importlib.resources
import re
from pathlib import Path
from typing import Any

from modmoe.errors import ExportError
from modmoe.models.loading import own_code

CONFIGURATION = "configuration_modmoe.py"
MODELING = "modeling_modmoe.py"
CODE_FILES = (
    CONFIGURATION,
    MODELING,
    "generation_modmoe.py",
    "modular_ffn.py",
    "routing_modmoe.py",
    "sequences_modmoe.py",
    "ways_modmoe.py",
)
"""What ``modmoe/modeling`` gives to every tied checkpoint."""
PACKED = "packed_modmoe.py"
"""What it gives to a packed export: one file, over an architecture of transformers."""

# the two forms that transformers itself looks for when it copies a module's siblings
_RELATIVE = re.compile(r"^\s*(?:from\s+\.(\S+)\s+import|import\s+\.(\S+)\s*$)", re.MULTILINE)


def write_code(directory: Path, config: dict[str, Any], source: Path) -> list[str]:
    """Write the code that the tied checkpoint in ``directory`` is loaded with, and return the names of the files.

    Nothing is executed.

    Args:
        directory: where the checkpoint is or will be.
        config: its configuration, with ``dense_config``.
        source: the dense checkpoint or a tied one; an own architecture's files are taken from there.

    Raises:
        ExportError: a file of the architecture's own code is missing, in another repository or named as one of ours;
            ``auto_map`` names code that is not ours.
    """
    check_auto_map(config)
    modeling = importlib.resources.files("modmoe") / "modeling"
    texts = {name: (modeling / name).read_text(encoding="utf-8") for name in CODE_FILES}
    code = own_code(config)
    if code:
        own = own_files(config, source)
        for name in own.keys() & texts.keys():
            raise ExportError(str(source / name), "has the name of a file that modmoe writes", "rename it")
        texts.update(own)
        texts[CONFIGURATION] += _added_configuration(code)
        texts[MODELING] += _added_models(code)
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
    return sorted(texts)


def check_auto_map(config: dict[str, Any]) -> None:
    """Raise ExportError where loading a tied checkpoint would have other code than ours executed."""
    auto_map = config.get("auto_map")
    ours = tuple(f"{Path(name).stem}.ModMoE" for name in (CONFIGURATION, MODELING))
    for key, value in auto_map.items() if isinstance(auto_map, dict) else ():
        if not (isinstance(value, str) and value.startswith(ours) and value.rpartition(".")[2].isidentifier()):
            raise ExportError(
                "config.json",
                f"auto_map: {key} names {str(value)[:80]!r}, which modmoe did not write",
                "take the entry out, or convert again",
            )


def write_packed_code(directory: Path) -> None:
    """Write the code that a packed export in ``directory`` is loaded with."""
    text = (importlib.resources.files("modmoe") / "modeling" / PACKED).read_text(encoding="utf-8")
    (directory / PACKED).write_text(text, encoding="utf-8")


def own_files(config: dict[str, Any], source: Path) -> dict[str, str]:
    """Return the text of an architecture's own Python files by name: those that auto_map names and what they import.

    ``config`` is the tied or the dense configuration; the answer is empty where transformers knows the architecture.
    """
    texts: dict[str, str] = {}
    waiting = sorted({_reference(value)[0] for value in own_code(config).values()})
    while waiting:
        module = waiting.pop()
        name = f"{module}.py"
        if name in texts:
            continue
        if not module.isidentifier():
            raise ExportError(
                str(source), f"its code imports '.{module}'", "only files beside the weights can be carried"
            )
        path = source / name
        if not path.is_file():
            raise ExportError(str(path), "is missing", "config.json or another file there needs it")
        texts[name] = path.read_text(encoding="utf-8")
        waiting += [first or second for first, second in _RELATIVE.findall(texts[name])]
    return texts


def _reference(value: str) -> tuple[str, str]:
    """Return the module and the class that an entry of auto_map names."""
    module, _, name = value.rpartition(".")
    if "--" in value:
        raise ExportError(
            "config.json", f"auto_map names '{value}', code in another repository", "fetch the files first"
        )
    # the names become lines of Python, so nothing else may stand there
    if not module.isidentifier() or not name.isidentifier():
        raise ExportError("config.json", f"auto_map has '{value}', which is not of the form module.Class")
    return module, name


def _added_configuration(code: dict[str, str]) -> str:
    if "AutoConfig" not in code:
        raise ExportError(
            "config.json", "auto_map lacks AutoConfig", "the architecture's configuration class is needed"
        )
    module, name = _reference(code["AutoConfig"])
    return f"\n\nfrom .{module} import {name}  # noqa: E402\n\nconfig_class({name})\n"


def _added_models(code: dict[str, str]) -> str:
    config_module, config_name = _reference(code["AutoConfig"])
    lines = [f"from .{config_module} import {config_name}  # noqa: E402"]
    calls: list[str] = []
    for key in ("AutoModel", "AutoModelForCausalLM"):
        if key not in code:
            continue
        module, name = _reference(code[key])
        lines.append(f"from .{module} import {name}  # noqa: E402")
        # code of one's own may leave config_class to a parent, whose configuration is another
        calls += [f"{name}.config_class = {config_name}", f"model_class({name})"]
    return "\n\n" + "\n".join([*lines, "", *calls]) + "\n"
