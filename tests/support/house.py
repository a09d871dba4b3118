"""The house as it stands: ``python -m tests.support.house tree`` prints its files, ``count`` what is to get less.

Both read the source alone. CONTRIBUTING.md has the tree, and a test compares the two.
"""

from __future__ import annotations

import ast
import itertools
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"modmoe": ROOT / "modmoe", "modmoe.cli": ROOT / "cli"}
_RUN = 6
"""Lines that count as doubled where they stand twice."""
_LONG, _MANY = 60, 8


def sources() -> dict[str, Path]:
    """Return every file of the package by the name of its module."""
    found = {}
    for name, folder in FOLDERS.items():
        for file in sorted(folder.rglob("*.py")):
            parts = [name, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts).removesuffix(".__init__")] = file
    return found


def imports(module: str, files: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a module imports, inside functions and for types too."""
    package = module if files[module].name == "__init__.py" else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(_parse(files[module])):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            base = base if node.level else str(node.module)
            found |= {f"{base}.{name.name}" if f"{base}.{name.name}" in files else base for name in node.names}
    return found & files.keys() - {module}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the sets of modules of which each imports itself by way of the others."""
    reach = {module: _reached(module, graph) for module in graph}
    alike: dict[frozenset[str], list[str]] = {}
    for module in graph:
        if module in reach[module]:
            alike.setdefault(frozenset(one for one in reach[module] if module in reach[one]), []).append(module)
    return list(alike.values())


def _reached(module: str, graph: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(graph[module])
    while waiting:
        one = waiting.pop()
        if one not in reached:
            reached.add(one)
            waiting += graph[one]
    return reached


def tree() -> str:
    """Return every folder and file of ``modmoe/`` with the first line of its docstring."""
    lines = ["modmoe/"]
    for depth, path in _walk(ROOT / "modmoe", 1):
        indent = "  " * depth
        if path.is_dir():
            lines.append(
                f"{indent}{path.name + '/':<{max(30 - len(indent), 1)}} {_title(path / '__init__.py')}".rstrip()
            )
        else:
            lines.append(f"{indent}{path.name:<{max(30 - len(indent), 1)}} {_title(path)}")
    return "\n".join(lines) + "\n"


def _walk(folder: Path, depth: int) -> Iterator[tuple[int, Path]]:
    entries = sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name))
    for path in entries:
        if path.is_dir() and (path / "__init__.py").is_file():
            yield depth, path
            yield from _walk(path, depth + 1)
        elif path.suffix == ".py" and (path.name != "__init__.py" or depth == 1):
            yield depth, path


def _title(file: Path) -> str:
    text = ast.get_docstring(_parse(file)) or ""
    return " ".join(text.split("\n\n")[0].split())


def _parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def count() -> dict[str, int]:
    """Return how much there is of what makes a house hard to find one's way in."""
    files = sources()
    trees = {module: _parse(file) for module, file in files.items()}
    texts = {module: file.read_text(encoding="utf-8").splitlines() for module, file in files.items()}
    functions = [
        node
        for parsed in trees.values()
        for node in ast.walk(parsed)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    graph = {module: imports(module, files) for module in files}
    runs = Counter(
        tuple(lines[start : start + _RUN])
        for lines in ([line.strip() for line in text if line.strip()] for text in texts.values())
        for start in range(len(lines) - _RUN + 1)
    )
    names = [node.id for parsed in trees.values() for node in ast.walk(parsed) if isinstance(node, ast.Name)]
    return {
        "files": len(files),
        "lines": sum(map(len, texts.values())),
        f"functions of more than {_LONG} lines": sum(_length(node) > _LONG for node in functions),
        f"functions of more than {_MANY} parameters": sum(_parameters(node) > _MANY for node in functions),
        "comparisons of a method's name": sum(
            _compares_method(node) for parsed in trees.values() for node in ast.walk(parsed)
        ),
        "files in a circle": sum(map(len, circles(graph))),
        "Any": names.count("Any"),
        f"runs of {_RUN} lines that stand twice": sum(number - 1 for number in runs.values() if number > 1),
    }


def long_functions() -> list[str]:
    """Return the functions of more lines than fit a screen, by their full names."""
    return [name for name, node in _functions() if _length(node) > _LONG]


def wide_functions() -> list[str]:
    """Return the functions of more parameters than one keeps in mind, by their full names."""
    return [name for name, node in _functions() if _parameters(node) > _MANY]


def _functions() -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for module, file in sources().items():
        for node in ast.walk(_parse(file)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield f"{module}.{node.name}", node


def _length(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the lines of a function's body without its docstring."""
    body = node.body[1:] if ast.get_docstring(node) and len(node.body) > 1 else node.body
    return (node.end_lineno or 0) - body[0].lineno + 1


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    found = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    return len([one for one in found if one.arg not in ("self", "cls")])


def _compares_method(node: ast.AST) -> bool:
    """Return whether a node compares ``something.method`` with a text or a name."""
    if not isinstance(node, ast.Compare):
        return False
    sides = [node.left, *node.comparators]
    return any(isinstance(side, ast.Attribute) and side.attr == "method" for side in sides) and any(
        isinstance(part, ast.Constant) and isinstance(part.value, str)
        for side in sides
        for part in itertools.chain([side], ast.iter_child_nodes(side))
    )


if __name__ == "__main__":
    if sys.argv[1:] == ["tree"]:
        print(tree(), end="")
    else:
        for words, number in count().items():
            print(f"{number:>7,}  {words}")
