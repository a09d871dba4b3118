"""``modmoe demo``: the whole main job on the model that ships with modmoe."""

from __future__ import annotations

from typing import Annotated

import typer

from modmoe.cli import flags
from modmoe.cli.console import Console

EPILOG = flags.examples("modmoe demo", "modmoe demo ./demo-out --overwrite --json")


def demo(
    output: Annotated[
        str | None, typer.Argument(metavar="[OUT]", help="Where to leave the models; by default nothing is left.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of everything that draws numbers.")] = 0,
    overwrite: flags.Overwrite = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Convert, fine-tune, measure and export the small model that ships with modmoe: offline, on a laptop CPU."""
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from modmoe.demo.run import run

        result = run(output, seed=seed, overwrite=overwrite, progress=console.progress)
        next_step = "" if output is None else flags.quote("modmoe", "inspect", output)
        console.finish(result, title="demo", next_step=next_step)
