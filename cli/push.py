"""``modmoe push``: an exported directory goes to the Hub."""

from __future__ import annotations

from typing import Annotated

import typer

from modmoe.cli import flags
from modmoe.cli.console import Console

EPILOG = flags.examples(
    "modmoe push ./out me/my-moe --dry-run",
    "modmoe push ./out me/my-moe --private --create-pr",
)


def push(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An exported directory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private if it is new.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch to push to.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List what would be uploaded; send nothing.")] = False,
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Push an exported directory to the Hub. The token is the one that `hf auth login` or HF_TOKEN set."""
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        from modmoe.export.hub import push as run

        result = run(
            directory,
            repo,
            private=private,
            revision=revision,
            create_pr=create_pr,
            dry_run=dry_run,
            progress=console.progress,
        )
        console.finish(result, title=repo, next_step="the same without --dry-run" if dry_run else "")
