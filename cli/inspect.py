"""``modmoe inspect``: what a checkpoint is, without loading it."""

from __future__ import annotations

from typing import Annotated

import typer

from modmoe import steps
from modmoe.cli import flags
from modmoe.cli.console import Console

EPILOG = flags.examples("modmoe inspect ./moe", "modmoe inspect ./moe --json | jq .parameters")


def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, converted, exported or dense.")],
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Show parameters (stored, active, materialised), sparsity (FFN, total), modules, experts and their overlap.

    Sparsity is the share that a token does not use: of the dense FFN neurons, and of all dense parameters. Overlap is
    the share of an expert's modules that another expert has too.
    """
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        console.finish(steps.inspect(directory), title=directory)
