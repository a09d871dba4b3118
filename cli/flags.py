"""Arguments and options that several commands share, and how their values are checked."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from modmoe.errors import ModmoeError, RecipeError, did_you_mean
from modmoe.recipe.keywords import KEYWORDS

Source = Annotated[str, typer.Argument(metavar="SRC", help="A local directory or a Hub id.")]
Output = Annotated[
    str,
    typer.Argument(
        metavar="OUT", help="The directory to write; new, empty, or with --overwrite one that modmoe wrote."
    ),
]
Task = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        metavar="NAME=FILE",
        help="A task and its text: .jsonl, .json, .parquet, .txt or hub:ID[:CONFIG][:SPLIT]. May be repeated.",
    ),
]
RecipeFile = Annotated[
    str | None, typer.Option("-c", "--recipe", metavar="RECIPE", help="A YAML recipe; flags override it.")
]
Tokens = Annotated[int | None, typer.Option(help="Calibration tokens of each task; by default 32768.")]
SequenceLength = Annotated[int | None, typer.Option(help="Tokens of a sequence; by default 256.")]
BatchSize = Annotated[int | None, typer.Option(help="Sequences of a batch; by default 8.")]
ByLayer = Annotated[
    bool | None,
    typer.Option(
        "--by-layer/--no-by-layer",
        help="Hold one decoder layer in memory at a time; by default where the model takes over half of what is free.",
    ),
]
NumModules = Annotated[int | None, typer.Option(help="Modules of each FFN; must divide its neurons. By default 16.")]
PartitionMethod = Annotated[
    str | None,
    typer.Option(
        "--partition",
        metavar="METHOD",
        help="How neurons are cut into modules: kmeans (the default), activations, coactivation, gradient, "
        "importance, random, contiguous, or the dotted path of a function of yours.",
    ),
]
Score = Annotated[
    str | None,
    typer.Option(
        metavar="METHOD",
        help="How the importance of a module is measured: wanda (the default), magnitude, activation, wifv, taylor, "
        "output_norm. Of an expert, with --method experts: by default reap.",
    ),
]
Seed = Annotated[int | None, typer.Option(help="Seed of everything that draws numbers; by default 0.")]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where models run; by default auto.")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Allow the checkpoint's own Python files to be executed.")
]
AllowCode = Annotated[
    bool,
    typer.Option("--allow-code", help="Allow a recipe's dotted path, a function of somebody's, to be imported."),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of SRC on the Hub.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace what modmoe wrote there before, and nothing else.")
]
EstimateFor = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE",
        help="With --dry-run: the device whose memory and time are estimated, such as rtx-4090; by default this one.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Put one JSON object on stdout and nothing else.")]
Quiet = Annotated[bool, typer.Option("-q", "--quiet", help="Errors only.")]
Verbose = Annotated[bool, typer.Option("-v", "--verbose", help="More log lines, and those of the libraries.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """What a command prints."""

    as_json: Json = False
    quiet: Quiet = False
    verbose: Verbose = False


class Command(TyperCommand):
    """A command whose errors name the flag beside the place in the recipe, where the value came from a flag."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except ModmoeError as error:
            key, flag = _flag_of(error.place, ctx)
            error.args = (f"{flag}{str(error).removeprefix(key)}",)
            raise


def _flag_of(place: str, context: Any) -> tuple[str, str]:
    """Return ``router.routing`` and ``router.routing (--routing)`` where that flag was given, else twice nothing.

    The place is the key itself or begins with it, as ``tasks.math: math.jsonl`` does.
    """
    keywords = {**KEYWORDS.get(str(context.info_name), {}), "task": "tasks", "eval_task": "tasks"}
    recipe = context.params.get("recipe")
    for option in context.command.params:
        source, value = context.get_parameter_source(option.name), context.params[option.name]
        if source is None or source.name != "COMMANDLINE":
            continue
        key = keywords.get(option.name)
        # with --method experts a flag sets the key of its own name there
        keys = [f"experts.{option.name}", *([] if key is None else [key])]
        if key == "tasks":
            keys += [f"tasks.{task.partition('=')[0].strip()}" for task in value]
        for key in keys:
            # what a flag says does not stand in the recipe's file, whose name would mislead
            for begin in (key, f"{recipe}: {key}"):
                if place == begin or place.startswith(f"{begin}: "):
                    return begin, f"{key} ({option.secondary_opts[0] if value is False else option.opts[-1]})"
    return "", ""


def parse_tasks(values: Sequence[str] | None, flag: str = "--task") -> dict[str, str] | None:
    """Return NAME=FILE values as a mapping, or None where there are none; RecipeError for a bad or repeated one."""
    if not values:
        return None
    tasks: dict[str, str] = {}
    for value in values:
        name, sign, file = value.partition("=")
        if not sign or not name.strip() or not file.strip():
            raise RecipeError(flag, f"'{value}' is not of the form NAME=FILE", _as_task(value))
        if name.strip() in tasks:
            raise RecipeError(flag, f"the name '{name.strip()}' is given twice", "names must differ")
        tasks[name.strip()] = file.strip()
    return tasks


def _as_task(value: str) -> str:
    """Return how a file without a name is given as a task, or nothing for what does not look like a file."""
    stem, dot, _ = value.rpartition("/")[2].rpartition(".")
    return f"Name it: {quote(f'{stem}={value}')}." if dot and stem and "=" not in value else ""


def choose(flag: str, value: str, options: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``options``; else raise RecipeError with all of them and the nearest."""
    if value in options:
        return value
    listed = ", ".join(options[:-1]) + f" or {options[-1]}" if len(options) > 1 else options[0]
    hint = did_you_mean(value, options)
    problem = f"no such value '{value}'; choose {listed}"
    raise RecipeError(flag, problem, hint if "Did you mean" in hint else "")


def task_words(tasks: Mapping[str, str] | None, recipe: str | None) -> list[str]:
    """Return the words that give the same tasks to the next command."""
    words = [] if recipe is None else ["-c", recipe]
    return words + [word for name, file in (tasks or {}).items() for word in ("--task", f"{name}={file}")]


def parse_size(flag: str, text: str) -> int:
    """Return the bytes of a size such as 4GB, 500MB or 2GiB; RecipeError for anything else."""
    from modmoe.storage.checkpoint import parse_bytes

    return parse_bytes(text, flag)


def examples(*lines: str) -> str:
    """Return the epilogue of a command's help: its examples, each on a line of its own."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def quote(*words: str) -> str:
    """Return a command line that can be pasted into a shell."""
    return shlex.join(words)
