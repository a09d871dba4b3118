"""``modmoe recipes``: the recipes that ship with modmoe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.errors import RecipeError, did_you_mean
from modmoe.storage.documents import MOST_YAML_BYTES
from modmoe.storage.files import write_file

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

EPILOG = flags.examples(
    "modmoe recipes ls", "modmoe recipes show three-tasks", "modmoe recipes cp three-tasks my-recipe.yaml"
)
app = typer.Typer(rich_markup_mode=None)

Name = Annotated[str, typer.Argument(metavar="NAME", help="A name that `modmoe recipes ls` lists.")]


@app.callback(invoke_without_command=True, epilog=EPILOG)
def root(context: typer.Context) -> None:
    """List, show and copy the recipes that ship with modmoe."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@app.command("ls", epilog=EPILOG)
def list_recipes(as_json: flags.Json = False, quiet: flags.Quiet = False, verbose: flags.Verbose = False) -> None:
    """List the recipes with the first line of each."""
    with Console(as_json=as_json, verbose=verbose) as console:
        rows: list[dict[str, Any]] = [
            {"name": name, "about": read_recipe(name).splitlines()[0].lstrip("# ").rstrip()} for name in recipe_names()
        ]
        if quiet and not as_json:
            console.write("".join(f"{row['name']}\n" for row in rows))
        else:
            console.finish({"recipes": rows})


@app.command("show", epilog=EPILOG)
def show_recipe(
    name: Name, as_json: flags.Json = False, quiet: flags.Quiet = False, verbose: flags.Verbose = False
) -> None:
    """Print a recipe."""
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        text = read_recipe(name)
        if as_json:
            console.finish({"name": name, "text": text})
        else:
            console.write(text)


@app.command("cp", epilog=EPILOG)
def copy_recipe(
    name: Name,
    file: Annotated[str, typer.Argument(metavar="FILE", help="The file to write.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a copy that nobody has edited.")] = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Copy a recipe to a file of your own, to be edited."""
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        text, path = read_recipe(name), Path(file)
        if path.is_dir():
            path = path / f"{_stem(name)}.yaml"
        try:
            write_file(path, text, overwrite=overwrite, is_ours=_is_shipped)
        except OSError as error:
            raise RecipeError(str(path), f"{error.strerror}", "name another file") from error
        if as_json:
            console.finish({"name": _stem(name), "file": str(path)})
        else:
            console.say(f"{path}: written. next: edit it, then {flags.quote('modmoe', 'validate', str(path))}")


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with modmoe."""
    return sorted(_stem(file.name) for file in _folder().iterdir() if file.name.endswith(".yaml"))


def read_recipe(name: str) -> str:
    """Return the text of a recipe; RecipeError with the nearest name where there is none of that name."""
    known = recipe_names()
    if _stem(name) not in known:
        raise RecipeError("recipes", f"no recipe '{name}'", did_you_mean(_stem(name), known))
    return (_folder() / f"{_stem(name)}.yaml").read_text(encoding="utf-8")


def _is_shipped(path: Path) -> bool:
    """Return whether a file is a copy of one of the recipes, which nobody has edited."""
    with path.open("rb") as file:
        data = file.read(MOST_YAML_BYTES + 1)
    return any(read_recipe(name).encode() == data for name in recipe_names())


def _folder() -> Traversable:
    from importlib import resources

    return resources.files("modmoe.recipes")


def _stem(name: str) -> str:
    return name.removesuffix(".yaml")
