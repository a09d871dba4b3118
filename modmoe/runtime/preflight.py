"""Checks before anything is loaded or touched: the inputs of a run exist, and nothing is lost where it writes.

An output never replaces what the run reads, nor what modmoe did not write.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from modmoe.errors import ModmoeError, RecipeError
from modmoe.runtime.launch import is_first_of_many
from modmoe.storage.documents import check_task_file, read_object
from modmoe.storage.files import check_file, check_name, is_page, place_of, target_of
from modmoe.storage.kinds.faults import check_source
from modmoe.storage.seal import find_stranger, is_marked, is_taken
from modmoe.storage.staging import check_output

if TYPE_CHECKING:
    from modmoe.recipe.schema import Recipe

STATES = ".states"
"""Ending of the directory beside an output that holds the states of its training until the output is whole."""
_BESIDE = (".partial", ".replaced", STATES)
_MOST_LINKS = 10_000


def check_there(sources: Sequence[str | Path | None], *tasks: Mapping[str, str], **needs: bool) -> None:
    """Raise an error for a missing input or one that is not a model, before torch and its libraries are loaded.

    ``needs`` is what ``modmoe.storage.kinds.faults.check_source`` takes.
    """
    # of several processes none speaks here: each tells the others what it lacks once they have joined
    if is_first_of_many() is not None:
        return
    for source in sources:
        if source is not None:
            check_source(source, **needs)
    for name, file in (item for texts in tasks for item in texts.items()):
        check_task_file(name, file)


def check_places(
    output: str | Path,
    *,
    overwrite: bool,
    inputs: Mapping[str, str | Path | None],
    report: str | Path | None = None,
    trains: bool = False,
    resume: bool = False,
) -> None:
    """Raise RecipeError for places where a run must not write; nothing is changed.

    Args:
        output: the directory that the run makes.
        overwrite: replace what modmoe wrote there, and nothing else.
        inputs: what the run reads, by its name in an error; inputs that are not on this disk are passed over.
        report: the HTML file that the run writes as well.
        trains: states are kept beside ``output``.
        resume: training goes on from them.

    Raises:
        RecipeError: a place that no file can have, that holds anything that modmoe did not write, or that is, holds or
            lies over an input, the working directory, the home directory or the root.
    """
    if is_first_of_many() is False:
        return  # the first process alone writes
    check_name(output)
    target = target_of(output)
    beside = [target.with_name(target.name + ending) for ending in _BESIDE]
    owned = {"the working directory": os.getcwd(), "the home directory": os.path.expanduser("~")}
    for words, file in [*inputs.items(), *owned.items()]:
        for place in _real_places(file, with_links=words not in owned):
            if _holds(target, place):
                what = "is" if os.path.samefile(target, place) else "holds"
                raise RecipeError(
                    str(output), f"{what} {words} ({file}), which is never replaced", "name another directory"
                )
            if words not in owned and any(_holds(path, place) for path in beside):
                raise RecipeError(
                    str(output), f"{words} ({file}) lies where this run keeps what is unfinished", "name another output"
                )
    check_output(output, overwrite=overwrite)
    if trains:
        check_states(beside[-1], overwrite=overwrite, resume=resume)
    if report is not None:
        _check_report(report, target, beside, overwrite=overwrite, inputs=inputs)


def _real_places(file: str | Path | None, *, with_links: bool) -> Iterator[Path]:
    """Yield the places of an input: the path as written, the path behind all links, and where links in it lead."""
    if file is None or not os.path.exists(file):
        return
    path = place_of(file)
    yield path
    yield path.resolve()
    if with_links and path.is_dir():
        with os.scandir(path) as entries:
            for _, entry in zip(range(_MOST_LINKS), entries, strict=False):
                if entry.is_symlink() and os.path.exists(entry.path):
                    yield Path(entry.path).resolve()


def _holds(directory: Path, path: Path) -> bool:
    """Return whether ``path`` is ``directory`` or lies in it, however both are spelled."""
    if not directory.exists():
        return False
    return any(parent.exists() and os.path.samefile(directory, parent) for parent in (path, *path.parents))


def check_states(states: Path, *, overwrite: bool, resume: bool) -> None:
    """Raise RecipeError where training would remove states beside the output unasked; nothing is changed.

    Raises RecipeError where ``states`` is not of modmoe, or has states and neither ``resume`` nor ``overwrite`` is set.
    """
    if not os.path.lexists(states):
        return
    if states.is_symlink() or not states.is_dir() or (any(states.iterdir()) and not is_marked(states)):
        raise RecipeError(
            str(states),
            "is in the way of the states of training, and not of modmoe",
            "move it away, or name another output",
        )
    stranger = find_stranger(states)
    if stranger is not None:
        raise RecipeError(
            str(states), f"holds '{stranger}', which modmoe did not write", "move it away, or name another output"
        )
    if any(states.glob("checkpoint-*")) and not (resume or overwrite):
        raise RecipeError(
            str(states),
            "holds the states of a run that was stopped",
            "go on with --resume, name another output, or replace them with --overwrite",
        )


def _check_report(
    report: str | Path,
    target: Path,
    beside: list[Path],
    *,
    overwrite: bool,
    inputs: Mapping[str, str | Path | None],
) -> None:
    check_file(report, overwrite=overwrite, is_ours=is_page, flag="--report")
    path = place_of(report)
    if path == target or path in target.parents:
        raise RecipeError("--report", f"{report}: is where the output {target} is to be", "name another file")
    inside = path.relative_to(target).as_posix() if target in path.parents else ""
    if inside and is_taken(inside):
        raise RecipeError(
            "--report", f"{report}: is where the output has files of its own", "name it report.html there"
        )
    for other in beside:
        if path == other or other in path.parents:
            raise RecipeError(
                "--report", f"{report}: lies where this run keeps what is unfinished", "name another file"
            )
    for words, file in inputs.items():
        if file is not None and path.exists() and os.path.exists(file) and os.path.samefile(path, file):
            raise RecipeError("--report", f"{report}: is {words}, which is never replaced", "name another file")


def input_words(
    source: str | Path | None,
    tasks: Mapping[str, str],
    *,
    teacher: str | Path | None = None,
    eval_tasks: Mapping[str, str] | None = None,
    recipe: str | Path | None = None,
) -> dict[str, str | Path | None]:
    """Return the inputs of a run by their names in an error, the base model of an adapter among them."""
    found: dict[str, str | Path | None] = {"the source": source, "the teacher": teacher, "the recipe": recipe}
    found |= {f"the text of task {name}": file for name, file in (eval_tasks or {}).items()}
    found |= {f"the text of task {name}": file for name, file in tasks.items()}
    for words in ("the source", "the teacher"):
        place = found[words]
        if place is not None and os.path.isdir(place):
            found[f"the model under the adapter {place}"] = _base_of(Path(place))
    return found


def _base_of(directory: Path) -> Path | None:
    """Return the local directory of the model that an adapter is for; None where there is none."""
    try:
        named = read_object(directory / "adapter_config.json").get("base_model_name_or_path")
    except ModmoeError:  # no adapter, or one that is refused when it is read
        return None
    places = (Path(named), directory / named) if isinstance(named, str) and named else ()
    return next((place for place in places if os.path.isdir(place)), None)


@contextlib.contextmanager
def noting_output(output: str | Path) -> Iterator[None]:
    """Let an error that comes once ``output`` is written say so."""
    try:
        yield
    except Exception as error:
        error.add_note(f"{output} is whole.")
        raise


def recipe_inputs(
    recipe: Recipe,
    source: Recipe | str | Path | None,
    file: Recipe | str | Path | None,
    eval_tasks: Mapping[str, str] | None = None,
) -> dict[str, str | Path | None]:
    """Return what a run reads, by what it is called; ``source`` and ``file`` are a step's own arguments."""
    paths = [one for one in (file, source) if isinstance(one, str | Path) and Path(one).suffix in (".yaml", ".yml")]
    return input_words(
        recipe.source,
        recipe.tasks,
        teacher=recipe.finetune.distill_from,
        eval_tasks=eval_tasks,
        recipe=file if isinstance(file, str | Path) else next(iter(paths), None),
    )


def place_report(report: str | Path | None, output: str | Path, directory: Path) -> Path | None:
    """Return where in ``directory``, which becomes ``output``, a report lies; None for one that lies elsewhere."""
    if report is None:
        return None
    path, target = place_of(report), target_of(output)
    return directory / path.relative_to(target) if target in path.parents else None


def need_source_and_tasks(step: str, recipe: Recipe, *, reads_text: bool = True) -> None:
    """Refuse a recipe that names no source, or no task where text is read."""
    if recipe.source is None:
        raise RecipeError(str(step), "no source is given", "name a local directory or a Hub id")
    if reads_text and not recipe.tasks:
        raise RecipeError(str(step), "no task is given", "add --task NAME=FILE, or tasks: in a recipe")
