"""``modmoe doctor``: is a checkpoint whole and unchanged, and if not, what is wrong and how is it mended."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.errors import hide_secrets, visible

EPILOG = flags.examples("modmoe doctor ./moe", "modmoe doctor ./moe --json | jq .faults")


def doctor(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint of any form, or an adapter.")],
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Check a checkpoint against its manifest and its configuration: names, shapes, types, sums, values, leftovers.

    Everything is read, nothing is changed, and no code of the checkpoint is executed. All faults are named, each with
    its place and its remedy; the exit code is 2 where there is one.
    """
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from modmoe.diagnosis.doctor import doctor as run

        result = run(directory, progress=console.progress)
        shown = {"kind": result["kind"], **result["checked"], "healthy": result["healthy"]}
        console.finish(result, shown=shown, title=directory)
        if not as_json:
            for line in result["notes"]:
                console.say(f"note: {line}.")
    # behind the console, which silences everything else where only errors are wanted
    for fault in () if as_json else result["faults"]:
        line = f"modmoe: {fault['place']}: {fault['wrong']}; {fault['remedy']}."
        print(visible(hide_secrets(line)), file=sys.stderr)
    if not result["healthy"]:
        raise typer.Exit(2)
