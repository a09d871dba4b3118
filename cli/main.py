"""The command ``modmoe``: one app, and the one place that turns errors into lines and exit codes.

0 done, 2 what the user can mend (one line, no traceback), 1 a bug, 130 Ctrl-C, 143 SIGTERM, 129 SIGHUP.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated

import typer

from modmoe.cli import (
    analyze,
    convert,
    demo,
    doctor,
    env,
    eval,
    export,
    finetune,
    flags,
    inspect,
    push,
    recipes,
    validate,
)
from modmoe.cli.console import StoppedError, is_first_process
from modmoe.cli.stops import INTERRUPTED, Stops, stoppable
from modmoe.cli.streams import ReaderGoneError, StdoutError, end_streams, open_missing, plain_streams
from modmoe.errors import (
    ModmoeError,
    RankError,
    disk_error,
    hide_secrets,
    input_error,
    is_failure,
    visible,
)
from modmoe.storage.files import check_working_directory
from modmoe.version import __version__

app = typer.Typer(
    name="modmoe",
    help="Dense language models become parameter-sharing mixtures of experts.",
    epilog=flags.examples(
        "modmoe demo",
        "modmoe convert ./dense ./moe --task math=math.jsonl --task stories=stories.txt",
        "modmoe finetune ./moe ./tuned --task math=math.jsonl --task stories=stories.txt --distill-from ./dense",
        "modmoe export ./tuned ./out --format safetensors --form tied",
    ),
    context_settings={"help_option_names": ["-h", "--help"]},
    # plain help: it starts faster, and reads the same in a log
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

# The commands with the line that stands for each in the list of them.
for name, module, function, line in (
    ("analyze", analyze, analyze.analyze, "Measure a dense model's neurons on each task's text."),
    ("convert", convert, convert.convert, "Make a mixture of experts of a dense checkpoint: the first step."),
    ("finetune", finetune, finetune.finetune, "Train what convert wrote on the tasks' text."),
    ("export", export, export.export, "Write a trained model in a form that others load."),
    ("push", push, push.push, "Send an exported directory to the Hub."),
    ("inspect", inspect, inspect.inspect, "Show parameters, sparsity, experts, overlap."),
    ("doctor", doctor, doctor.doctor, "Say whether a checkpoint is whole, and how to mend it."),
    ("eval", eval, eval.evaluate, "Measure loss, perplexity and speed on each task's text."),
    ("validate", validate, validate.validate, "Check a recipe and print it with every default."),
    ("env", env, env.env, "Show versions, device, threads and caches, for a bug report."),
    ("demo", demo, demo.demo, "All of it on a small model that ships with modmoe: begin here."),
):
    app.command(name, cls=flags.Command, short_help=line, epilog=module.EPILOG)(function)
app.add_typer(recipes.app, name="recipes")

# Typer may carry its own copy of click, so the class is found through the one that typer names.
_ClickException = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
# What several processes, started by torchrun, do together; of the rest the first does all.
_SHARED = ("analyze", "convert", "finetune", "eval")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"modmoe {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Dense language models become parameter-sharing mixtures of experts."""
    check_working_directory()  # without one, loading torch would end the process
    if context.invoked_subcommand is None:
        print(context.get_help())
    elif context.invoked_subcommand not in _SHARED and not is_first_process():
        raise typer.Exit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    open_missing()
    # read once, when torch is loaded: threads that wait by spinning are a tenth faster where nothing else runs, and
    # made a training step twelve times slower where something did
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = run(arguments)
    end_streams()
    sys.exit(code)


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    with plain_streams(), stoppable() as stops:
        code = _run(arguments, stops)
        try:
            sys.stdout.flush()  # of what left by another way, such as --help
        except StdoutError as error:
            return code or _fail(str(error))
        except ReaderGoneError:
            pass
        return code


def _run(arguments: Sequence[str] | None, stops: Stops) -> int:
    try:
        code = app(None if arguments is None else list(arguments), prog_name="modmoe", standalone_mode=False)
        sys.stdout.flush()
        return _say_stopped(stops) if code == INTERRUPTED else code if isinstance(code, int) else 0
    except ModmoeError as error:
        if stops.is_asked:
            return _say_stopped(stops)
        # what one process fails of, all are told, and the first says it; one that lost the others speaks for itself
        return _fail(f"{error}{_notes(error)}", is_own=isinstance(error, RankError))
    except StoppedError as stop:
        return _say_stopped(stops, f" {stop}")
    except (KeyboardInterrupt, typer.Abort):
        return _say_stopped(stops)
    except typer.Exit as stop:
        return stop.exit_code
    except ReaderGoneError:
        return 0
    except BaseException as error:
        if not is_failure(error):
            raise
        if stops.is_asked:
            return _say_stopped(stops)
        if isinstance(error, _ClickException):
            return _fail_usage(error)
        # what a full disk, a protected directory or a stranger's file raises is no bug of ours
        failed = disk_error(error, "output") or input_error(error)
        if failed is not None:
            return _fail(f"{failed}{_notes(error)}")
        print(hide_secrets(traceback.format_exc()), file=sys.stderr, end="")
        print(
            "modmoe: this is a bug in modmoe; please report it with the lines above and `modmoe env`.", file=sys.stderr
        )
        return 1


def _say_stopped(stops: Stops, words: str = "") -> int:
    if is_first_process():
        print(f"modmoe: stopped.{words.rstrip()}", file=sys.stderr)
    return stops.code


def _notes(error: BaseException) -> str:
    """Return what was said of an error on its way here: what is kept of the work, and how to go on."""
    return "".join(f" {note}" for note in getattr(error, "__notes__", ()))


def _fail_usage(error: BaseException) -> int:
    """Print what click says about a wrong command line, and where its help is."""
    message = getattr(error, "format_message", lambda: str(error))().strip()
    context = getattr(error, "ctx", None)
    command = getattr(context, "command_path", "modmoe")
    return _fail(f"{message if message.endswith(('.', '?')) else message + '.'} See {command} --help.")


def _fail(message: str, *, is_own: bool = False) -> int:
    if is_own or is_first_process():
        print(f"modmoe: {visible(' '.join(hide_secrets(message).split()))}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
