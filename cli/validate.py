"""``modmoe validate``: is a recipe right, and what does it come to."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.errors import ModmoeError

EPILOG = flags.examples("modmoe validate my-recipe.yaml", "modmoe validate my-recipe.yaml -q && echo fine")


def validate(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML recipe.")],
    allow_code: flags.AllowCode = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Check a recipe strictly and print it with every default filled in."""
    from modmoe.conversion.options import check_recipe
    from modmoe.recipe.schema import dump_recipe, load_recipe

    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        resolved = load_recipe(recipe, allow_code=allow_code)
        try:
            check_recipe(resolved)
        except ModmoeError as error:
            raise type(error)(f"{recipe}: {error}") from error
        if as_json:
            console.finish({"ok": True, "recipe": dataclasses.asdict(resolved)})
        elif not quiet:
            console.say(f"{recipe}: ok")
            console.write(dump_recipe(resolved))
