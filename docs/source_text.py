"""Docstrings, tables of methods and settings, read from the source without importing it, as Markdown."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).resolve().parent.parent
_FOLDS = {
    "exact": "exactly",
    "to_moe": "into a checkpoint with experts of its own",
    "approximate": "approximately, the experts' weights held; exactly with one expert",
    "none": "no",
}
_SECTION = re.compile(r"(Args|Raises|Returns):\n")
_COST = re.compile(r"\bcosts?\b(?! that)")


@dataclass(frozen=True)
class Setting:
    """One field of a dataclass."""

    name: str
    kind: str
    default: str
    meaning: str


@cache
def parse(module: str) -> ast.Module:
    """Return the syntax tree of a module of modmoe, named with dots; FileNotFoundError where there is none."""
    return ast.parse((ROOT / path_of(module)).read_text(encoding="utf-8"))


def path_of(module: str) -> str:
    """Return where a module lies in the repository."""
    for installed, folder in {"modmoe.cli": "cli", "modmoe.recipes": "recipes"}.items():
        if module == installed or module.startswith(f"{installed}."):
            module = folder + module.removeprefix(installed)
    path = module.replace(".", "/")
    return f"{path}/__init__.py" if (ROOT / path).is_dir() else f"{path}.py"


def docstring(node: ast.AST) -> str:
    """Return a docstring; ValueError where there is none."""
    assert isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    text = ast.get_docstring(node)
    if not text:
        raise ValueError(f"no docstring: {getattr(node, 'name', 'a module')}")
    return text


def split_title(text: str) -> tuple[str, str]:
    """Return the first line of a docstring, or the sentence that begins there, and the rest."""
    title, _, rest = text.partition("\n\n")
    return " ".join(title.split()), rest


def as_markdown(text: str) -> str:
    """Return a docstring as Markdown: what is indented or stands in columns becomes code, Args a list."""
    done: list[str] = []
    for is_code, part in _parts(text):
        if is_code:
            done.append("```text\n" + part.replace("``", "`") + "\n```")
        elif _SECTION.match(part):
            done.append(_entries(part))
        else:
            done.append(_prose(part))
    return "\n\n".join(done)


def _parts(text: str) -> Iterator[tuple[bool, str]]:
    """Yield code and prose in turn; neighbouring paragraphs of code are one block."""
    block: list[str] = []
    for paragraph in re.split(r"\n\s*\n", text.strip("\n")):
        if _is_code(paragraph):
            block.append(paragraph)
            continue
        if block:
            yield True, dedent("\n\n".join(block))
            block = []
        yield False, dedent(paragraph)
    if block:
        yield True, dedent("\n\n".join(block))


def _is_code(paragraph: str) -> bool:
    if paragraph.startswith("* ") or _SECTION.match(paragraph):
        return False
    in_columns = any(re.search(r"\S {3,}\S", line) for line in paragraph.splitlines())
    return in_columns or (paragraph.startswith("    ") and " = " in paragraph)


def _prose(text: str) -> str:
    """Return prose with what HTML would take for tags escaped, and lists that are set apart."""
    text = re.sub(r"(?<!`)<(?!https?:)", "&lt;", text)
    return re.sub(r"\n(?=\* )", "\n\n", text, count=1).strip()


def _entries(text: str) -> str:
    head, _, body = text.partition("\n")
    entries = re.split(r"\n(?=\S)", dedent(body))
    lines = [" ".join(entry.split()).partition(": ") for entry in entries]
    return f"**{head[:-1]}**\n\n" + "\n".join(f"* `{name}`: {_prose(rest)}" for name, _, rest in lines)


def sources_of(text: str) -> list[str]:
    """Return the URLs that a docstring names, each once, in order; a number of the ACL Anthology is one."""
    found = [url.rstrip(".,;:") for url in re.findall(r"https?://[^\s)>\]]+", text)]
    found += [f"https://aclanthology.org/{paper}" for paper in re.findall(r"\b\d{4}\.[a-z][a-z-]+\.\d+\b", text)]
    return list(dict.fromkeys(found))


def costs_of(text: str) -> list[str]:
    """Return the sentences of a docstring's prose that say what the method costs."""
    prose = [" ".join(part.split()) for is_code, part in _parts(text) if not is_code]
    sentences = [sentence for part in prose for sentence in re.split(r"(?<=[.:])\s(?=[A-Z])", part)]
    return [_prose(sentence) for sentence in sentences if _COST.search(sentence)]


def find(module: str, name: str, cls: str = "") -> ast.ClassDef | ast.FunctionDef:
    """Return a class or function of a module, or a method of a class; LookupError where there is none of that name."""
    for node in find(module, cls).body if cls else parse(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"{module} has no {cls and cls + '.'}{name}")


def named_functions(module: str, table: str) -> dict[str, tuple[str, str]]:
    """Return a table of functions: each name with the function's module and the first line of its docstring."""
    tree = parse(module)
    homes = {
        alias.name: str(node.module) for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    values = next(
        node.value for node in tree.body if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == table
    )
    assert isinstance(values, ast.Dict)
    made = {}
    for key, value in zip(values.keys, values.values, strict=True):
        assert isinstance(key, ast.Constant)
        # the function, or what it is made from
        name = next(node.id for node in ast.walk(value) if isinstance(node, ast.Name))
        home = homes.get(name, module)
        made[str(key.value)] = home, split_title(docstring(find(home, name)))[0]
    return made


def settings_of(module: str, name: str) -> list[Setting]:
    """Return the fields of a dataclass, those of its bases in the same file first; a field set anew stays in place."""
    node = find(module, name)
    assert isinstance(node, ast.ClassDef)
    fields: dict[str, Setting] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            fields |= {setting.name: setting for setting in settings_of(module, base.id)}
    for field, after in zip(node.body, [*node.body[1:], None], strict=True):
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        meaning = ""
        if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            meaning = " ".join(str(after.value.value).split())
        default = "" if field.value is None else ast.unparse(field.value)
        fields[field.target.id] = Setting(field.target.id, ast.unparse(field.annotation), default, meaning)
    return list(fields.values())


def settings_table(settings: list[Setting]) -> str:
    """Return a table of settings with their defaults."""
    rows = ["| key | default | meaning |", "|---|---|---|"]
    for item in settings:
        default = re.sub(r"field\(default_factory=(\w+)\)", r"\1()", item.default)
        kind = "" if item.kind in ("int", "float", "bool", "str") else cell(f"`{item.kind}`. ")
        rows.append(f"| `{item.name}` | `{default}` | {kind}{cell(_prose(item.meaning))} |")
    return "\n".join(rows)


def cell(text: str) -> str:
    """Return text as it stands in a cell of a table: a bar outside of code would end the cell."""
    return "".join(part if at % 2 else part.replace("|", "\\|") for at, part in enumerate(re.split(r"(`[^`]*`)", text)))


def class_values(module: str, name: str, keys: tuple[str, ...]) -> dict[str, object]:
    """Return class attributes with plain values, looked for in the class and then in its bases."""
    node = find(module, name)
    assert isinstance(node, ast.ClassDef)
    found: dict[str, object] = {}
    for item in node.body:
        targets = [item.target] if isinstance(item, ast.AnnAssign) else getattr(item, "targets", [])
        value = getattr(item, "value", None)
        for target in targets:
            if isinstance(target, ast.Name) and target.id in keys and value is not None:
                found[target.id] = ast.literal_eval(value)
    for base in node.bases:
        if isinstance(base, ast.Name) and set(keys) - set(found):
            home = "modmoe.adapters.mechanism.base" if base.id == "RoutedAdapter" else module
            if base.id == "RoutedAdapter" or any(getattr(other, "name", "") == base.id for other in parse(home).body):
                found = {**class_values(home, base.id, keys), **found}
    return found


@cache
def adapter_table() -> dict[str, tuple[str, str, str]]:
    """Return the table of adapters: method to its module, its class and the class of its settings."""
    tree = parse("modmoe.adapters.table")
    homes = {
        alias.name: f"modmoe.adapters.{node.module}"
        for node in tree.body
        if isinstance(node, ast.ImportFrom) and node.level
        for alias in node.names
    }
    table = next(item.value for item in tree.body if isinstance(item, ast.AnnAssign))
    assert isinstance(table, ast.Dict)
    made = {}
    for key, value in zip(table.keys, table.values, strict=True):
        assert isinstance(key, ast.Constant) and isinstance(value, ast.Call)
        adapter, settings = (ast.unparse(argument) for argument in value.args)
        made[str(key.value)] = (homes[adapter], adapter, settings)
    return made


@cache
def kinds_of_places() -> dict[str, str]:
    """Return where adapters are attached: the kind and what the file on adapters says of it."""
    body = parse("modmoe.adapters.mechanism.base").body
    at = next(
        i for i, node in enumerate(body) if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "Kind"
    )
    text = body[at + 1]
    assert isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    lines = str(text.value.value).split("\n\n")[1].strip().splitlines()
    return {name: said.strip() for name, _, said in (line.partition(" ") for line in lines)}


def adapter_facts(method: str) -> dict[str, str]:
    """Return what the code says of an adapter in a few words: title, sources, cost, attached to, folds, file."""
    module, adapter, _ = adapter_table()[method]
    title, text = split_title(docstring(parse(module)))
    values = class_values(module, adapter, ("kind", "targets", "fold", "needs_base_router"))
    place = kinds_of_places()[str(values["kind"])]
    targets = values.get("targets") or ()
    assert isinstance(targets, tuple)
    if targets:
        place += "; by default " + ", ".join(f"`{target}`" for target in targets) + ", of those that the model has"
    if values["needs_base_router"] is True:
        place += "; the base model has to have a router"
    return {
        "title": title,
        "about": split_title(docstring(find(module, adapter)))[0],
        "source": " ".join(sources_of(title + text)) or "see below",
        "cost": " ".join(costs_of(text)),
        "attached to": place,
        "folds": _FOLDS[str(values["fold"])],
        "file": f"`{path_of(module)}`",
    }
