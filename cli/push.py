"""``modmoe push``: an exported directory goes to the Hub."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Annotated

import typer

from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.cli.groups import grouped

EPILOG = flags.examples(
    "modmoe push ./out me/my-moe --dry-run",
    "modmoe push ./out me/my-moe --private",
    "modmoe push ./out someone/their-moe --create-pr",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Where a push goes, and how."""

    private: Annotated[bool, typer.Option("--private", help="Make a new repository private; refuse a public one.")] = (
        False
    )
    revision: Annotated[str | None, typer.Option(help="The branch to push to; made if it is not there.")] = None
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request to the default branch.")] = False
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show files, sizes, hashes and card; send nothing.")] = (
        False
    )


@grouped
def push(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="An exported directory.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="OWNER/NAME on the Hub.")],
    where: Target,
    shown: flags.Shown,
) -> None:
    """Push an exported directory to the Hub, in one commit; weights of an earlier push that it does not replace go.

    The token is the one that `hf auth login` or HF_TOKEN set.
    """
    with Console(as_json=shown.as_json, quiet=shown.quiet, verbose=shown.verbose) as console:
        from modmoe.exports.hub import push as run

        result = run(
            directory,
            repo,
            private=where.private,
            revision=where.revision,
            create_pr=where.create_pr,
            dry_run=where.dry_run,
            progress=console.progress,
        )
        table = {key: value for key, value in result.items() if key not in ("card", "left_out")}
        if result["left_out"]:
            console.say(f"not sent: {', '.join(item['path'] for item in result['left_out'])}")
        if result["card"] and not (shown.as_json or shown.quiet):
            console.write(f"card\n{textwrap.indent(result['card'], '  ')}\n")
        console.finish(result, shown=table, title=repo, next_step="the same without --dry-run" if where.dry_run else "")
