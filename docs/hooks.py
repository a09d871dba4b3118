"""What mkdocs does with the pages: facts that lie in the code, in README or in measured tables are put in here.

A page says where by a line such as ``<!-- adapter: comol -->``; see MAKERS. Links into the repository become links to
the page that shows the file, so that they lead somewhere on the site and where the source of a page is read.
"""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable
from typing import Any

import notebook
import source_text
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from source_text import ROOT, as_markdown, cell, docstring, find, parse, settings_of, settings_table, split_title

from modmoe.conversion.table import CONVERSIONS

RESULTS = "benchmarks/results"
_DIRECTIVE = re.compile(r"^<!-- (\w+): (.+?) -->$", re.MULTILINE)
_LINK = re.compile(r"\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def make_method(module: str) -> str:
    """Return what a conversion is in one line, its sources and where it lies."""
    title, text = split_title(docstring(parse(module)))
    facts = {"source": " ".join(source_text.sources_of(text)), "file": f"`{source_text.path_of(module)}`"}
    return f"{title}\n\n{_facts(facts)}"


def make_adapter(method: str) -> str:
    """Return what an adapter is in one line, its sources, its cost, where it is attached and how it folds."""
    facts = source_text.adapter_facts(method)
    return f"{facts.pop('title')}\n\n**`{method}`**: {facts.pop('about')}\n\n{_facts(facts)}"


def make_equations(name: str) -> str:
    """Return what a file says at its top behind the first line; the file is a module or that of an adapter."""
    module = source_text.adapter_table().get(name, (name,))[0]
    return as_markdown(split_title(docstring(parse(module)))[1])


def make_adapters(_: str) -> str:
    """Return a table of all adapters."""
    rows = ["| `--adapter` | what it is | attached to | folds |", "|---|---|---|---|"]
    for method in source_text.adapter_table():
        facts = source_text.adapter_facts(method)
        place = facts["attached to"].split(":")[0].split(";")[0]
        rows.append(f"| [`{method}`]({method}.md) | {facts['about']} | {place} | {facts['folds'].split(',')[0]} |")
    return "\n".join(rows)


def make_conversions(_: str) -> str:
    """Return a table of all conversions, as their rows describe them."""
    rows = ["| `--method` | what comes out | text | in short |", "|---|---|---|---|"]
    for name, row in CONVERSIONS.items():
        page = {"adapters": "../adapters/index.md"}.get(name, f"{name}.md")
        rows.append(f"| [`{name}`]({page}) | {row.output} | {'read' if row.reads_text else 'none'} | {row.brief} |")
    return "\n".join(rows)


def make_settings(name: str) -> str:
    """Return the fields of a dataclass, ``module.Class`` or the settings of an adapter, as a table."""
    module, _, cls = name.rpartition(".")
    if name in source_text.adapter_table():
        module, _, cls = source_text.adapter_table()[name]
    return settings_table(settings_of(module, cls))


def make_function(name: str) -> str:
    """Return a function's signature, ``module.function`` or ``module.Class.method``, and what its docstring says."""
    module, _, function = name.rpartition(".")
    cls = ""
    if module.rpartition(".")[2][0].isupper():
        module, _, cls = module.rpartition(".")
    node = find(module, function, cls)
    assert isinstance(node, ast.FunctionDef)
    parts = _arguments(node.args)[1 if cls else 0 :]
    is_context = any("contextmanager" in ast.unparse(item) for item in node.decorator_list)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns and not is_context else ""
    signature = f"{'with ' if is_context else ''}{function}({', '.join(parts)}){returns}"
    if len(signature) > 100:
        signature = f"{function}(\n    " + ",\n    ".join(parts) + f",\n){returns}"
    title, text = split_title(docstring(node))
    return f"```python\n{signature}\n```\n\n{title}\n\n{as_markdown(text)}".strip()


def _arguments(arguments: ast.arguments) -> list[str]:
    """Return the arguments of a function, each as it is written."""
    plain = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(plain) - len(arguments.defaults)) + list(arguments.defaults)
    made = [_argument(item, default) for item, default in zip(plain, defaults, strict=True)]
    if arguments.vararg or arguments.kwonlyargs:
        made.append(f"*{ast.unparse(arguments.vararg) if arguments.vararg else ''}")
    made += [_argument(*pair) for pair in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)]
    return made + ([f"**{ast.unparse(arguments.kwarg)}"] if arguments.kwarg else [])


def _argument(item: ast.arg, default: ast.expr | None) -> str:
    return ast.unparse(item) + ("" if default is None else f" = {ast.unparse(default)}")


def make_file(module: str) -> str:
    """Return what a file says at its top."""
    title, text = split_title(docstring(parse(module)))
    return f"{title}\n\n{as_markdown(text)}"


def make_table(name: str) -> str:
    """Return the table of functions ``module.TABLE``, and what their files say at their tops."""
    module, _, table = name.rpartition(".")
    functions = source_text.named_functions(module, table)
    rows = [f"| `{key}` | {cell(said)} |" for key, (_, said) in functions.items()]
    parts = ["\n".join(["| name | what it does |", "|---|---|", *rows])]
    for home in dict.fromkeys(home for home, _ in functions.values()):
        names = ", ".join(key for key, (place, _) in functions.items() if place == home)
        parts.append(f"### {names}\n\n{make_file(home)}")
    return "\n\n".join(parts)


def make_rows(query: str) -> str:
    """Return rows of a measured table, ``file.md pattern``: those whose first cell the pattern matches."""
    file, _, pattern = query.partition(" ")
    made: list[str] = []
    heading, head = "", []
    for line in (ROOT / RESULTS / file).read_text(encoding="utf-8").splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        if not line.startswith("|"):
            head = []
        elif len(head) < 2:
            head.append(line)
            begun = False
        elif re.search(pattern, line.strip("| ").split("|")[0].strip()):
            if not begun:
                made += ["", f"{heading}:", "", *head]
                begun = True
            made.append(line)
    if not made:
        raise LookupError(f"{RESULTS}/{file} has no row that fits {pattern}")
    return "\n".join(made).strip()


def make_keywords(step: str) -> str:
    """Return the keywords of a step and the place in the recipe that each sets."""
    from modmoe.api import KEYWORDS

    rows = ["| keyword | place in the recipe |", "|---|---|"]
    return "\n".join(rows + [f"| `{name}` | `{place}` |" for name, place in KEYWORDS[step].items()])


def make_commands(_: str) -> str:
    """Return every command with its arguments, its options and its examples."""
    import typer

    from modmoe.cli.main import app

    root: Any = typer.main.get_command(app)
    parts = []
    for name, command in root.commands.items():
        inner = getattr(command, "commands", {})
        parts.append(_command(f"modmoe {name}", command))
        parts += [_command(f"modmoe {name} {below}", one) for below, one in inner.items()]
    return "\n\n".join(parts)


def _command(name: str, command: Any) -> str:
    arguments = [item for item in command.params if type(item).__name__ == "TyperArgument"]
    options = [item for item in command.params if type(item).__name__ == "TyperOption" and not item.hidden]
    usage = " ".join([name, *(_usage(item) for item in arguments), "[OPTIONS]" if options else ""]).strip()
    rows = [f"| `{item.metavar}` | {_help(item)} |" for item in arguments]
    rows += [f"| {_flags(item)} | {_help(item)} |" for item in options]
    said = re.sub(r"\x08\n((?:.+\n?)+)", lambda block: f"```text\n{block[1].rstrip()}\n```", command.help or "")
    table = "| argument or option | meaning |\n|---|---|\n" + "\n".join(rows) if rows else ""
    examples = (command.epilog or "").partition("Examples:\n")[2]
    shown = "```sh\n" + "\n".join(line.strip() for line in examples.splitlines()) + "\n```" if examples else ""
    return "\n\n".join(part for part in (f"## {name}", f"```text\n{usage}\n```", said, table, shown) if part)


def _usage(item: Any) -> str:
    return str(item.metavar) if item.required else f"[{item.metavar}]"


def _flags(item: Any) -> str:
    names = ", ".join(f"`{name}`" for name in [*item.opts, *item.secondary_opts])
    if getattr(item, "is_flag", False):
        return names
    return f"{names} `{item.metavar or item.type_descriptor.annotation.__name__}`"


def _help(item: Any) -> str:
    text = cell(str(item.help or "").replace("<", "&lt;"))
    default = getattr(item, "default", None)
    if default not in (None, False, True, []) and not callable(default):
        text += f" Default: `{default}`."
    return text


def make_readme(heading: str) -> str:
    """Return a section of README.md without its heading; or, for ``(top)``, what stands before the first."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    top, *sections = re.split(r"^## ", text, flags=re.MULTILINE)
    if heading == "(top)":
        return _from("", top.partition("\n")[2].strip())
    for section in sections:
        name, _, body = section.partition("\n")
        if name.strip() == heading:
            return _from("", body.strip())
    raise LookupError(f"README.md has no section '{heading}'")


def _facts(facts: dict[str, str]) -> str:
    return "\n".join(f"* **{name}**: {value}" for name, value in facts.items() if value)


def _from(folder: str, text: str) -> str:
    """Return text of a file in a folder of the repository with its links written as from docs/."""

    def moved(link: re.Match[str]) -> str:
        path = os.path.relpath(ROOT / folder / link[1], ROOT / "docs")
        return f"]({path}{link[2] or ''})"

    return _LINK.sub(moved, text)


MAKERS: dict[str, Callable[[str], str]] = {
    "conversions": make_conversions,
    "method": make_method,
    "adapter": make_adapter,
    "adapters": make_adapters,
    "equations": make_equations,
    "settings": make_settings,
    "function": make_function,
    "file": make_file,
    "table": make_table,
    "rows": make_rows,
    "keywords": make_keywords,
    "commands": make_commands,
    "readme": make_readme,
}
"""What a line ``<!-- name: argument -->`` is replaced with."""


def on_files(files: Any, config: Any) -> Any:
    """Add the measured tables and the notebooks, and read the code anew where the site is served as it is written."""
    source_text.parse.cache_clear()
    source_text.adapter_table.cache_clear()
    source_text.kinds_of_places.cache_clear()
    for path in sorted((ROOT / RESULTS).glob("*.md")):
        text = _from(RESULTS, path.read_text(encoding="utf-8"))
        files.append(File.generated(config, f"results/{path.name}", content=_LINK.sub(r"](../\1\2)", text)))
    for path in sorted((ROOT / RESULTS).glob("*.png")):
        files.append(File.generated(config, f"results/{path.name}", content=path.read_bytes()))
    for path in sorted((ROOT / "docs").rglob("*.ipynb")):
        page = path.relative_to(ROOT / "docs").with_suffix(".md").as_posix()
        text, pictures = notebook.as_page(path)
        files.append(File.generated(config, page, content=text))
        for name, picture in pictures.items():
            files.append(File.generated(config, f"{os.path.dirname(page)}/{name}", content=picture))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put in what the page asks for, and lead links into the repository to the pages that show its files."""
    place = page.file.src_uri

    def make(line: re.Match[str]) -> str:
        if line[1] not in MAKERS:
            raise PluginError(f"{place}: no such line '{line[0]}'; there are {', '.join(MAKERS)}.")
        try:
            return MAKERS[line[1]](line[2])
        except (LookupError, ValueError, OSError) as error:
            raise PluginError(f"{place}: {line[0]}: {error}") from error

    def lead(link: re.Match[str]) -> str:
        folder = os.path.join("docs", os.path.dirname(place))
        target = os.path.normpath(os.path.join(folder, link[1]))
        if target.endswith(".ipynb"):
            return f"]({link[1].removesuffix('.ipynb')}.md{link[2] or ''})"
        if os.path.dirname(target) != RESULTS:
            return link[0]
        return f"]({os.path.relpath(f'docs/results/{os.path.basename(target)}', folder)}{link[2] or ''})"

    return _LINK.sub(lead, _DIRECTIVE.sub(make, markdown))
