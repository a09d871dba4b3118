"""The one run of every conversion: what all of them share, once and in this order."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from modmoe.analysis.source import needs_gradients, with_num_modules
from modmoe.analysis.text.reading import summaries
from modmoe.conversion.steps import Draft, Opened, Steps
from modmoe.conversion.table import Conversion, find_conversion
from modmoe.models.inspection import inspect
from modmoe.recipe.dotted import object_at
from modmoe.recipe.record import save_recipe
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.memory import names_what_to_lower
from modmoe.runtime.preflight import noting_output, place_report
from modmoe.runtime.progress import Progress, silent
from modmoe.storage.checkpoint import CheckpointWriter, copy_companions, write_json
from modmoe.storage.staging import check_output


def convert(
    recipe: Recipe,
    output: str,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    report: str | None = None,
    write_report: Callable[..., None] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Convert the recipe's source by the recipe's method and write it to ``output``, whole or not at all.

    Processes that torchrun or accelerate launch started share the text and the layers. The first alone writes, and the
    others return no more than where. The source is left unchanged.

    Args:
        recipe: its ``method`` is a key of ``CONVERSIONS``, or the dotted path of a ``Conversion``.
        output: a directory that is free.
        overwrite: replace what modmoe wrote to ``output`` before.
        dry_run: return what would be made and cost, from headers alone, and write nothing.
        revision: of a source on the Hub.
        report: the file of an HTML report; only for conversions that have one.
        write_report: writes it; without it none is written.
        progress: called with a message and, where they are known, what is done and what there is in all.

    Returns what ``modmoe convert --json`` prints: the inspection of the new checkpoint with what the conversion says of
    itself, ``verified``, ``seconds`` and ``peak_rss_bytes``.

    Raises:
        ModmoeError: a kind of it that says what to mend; nothing is left behind.
    """
    conversion, steps = find_conversion(recipe.method), steps_of(recipe.method)
    progress, started_s = progress or silent, time.monotonic()
    with ranks.joined(), _names_what_to_lower(recipe, conversion):
        check_output(output, overwrite=overwrite)
        recipe = steps.settle(with_num_modules(recipe, revision))
        opened: Opened = steps.open(recipe, revision=revision, progress=progress, headers_only=dry_run)
        if dry_run:
            return {"dry_run": True, **steps.describe(recipe, opened)}
        with ranks.open_first_output(output, overwrite=overwrite, size_bytes=opened.size_bytes) as directory:
            if not (ranks.is_first() or conversion.reads_text):
                return {"output": str(output)}
            draft = steps.make(recipe, opened, directory, progress)
            if draft is None:
                return {"output": str(output)}
            write_draft(draft, recipe, opened, directory, progress)
            verified = draft.prove(directory)
            inspected = {} if draft.plan is None else inspect(str(directory))
            read = {} if draft.readings is None else {"read": summaries(draft.readings)}
            result = {**inspected, **draft.facts, "output": str(output), **read, "verified": verified}
            draft.finish(directory, result)
            write, inside = None, place_report(report, output, directory)
            if report is not None and write_report is not None and draft.report is not None:
                progress("writing the report")
                write = partial(write_report, recipe=recipe, summary=result, **draft.report(directory))
                if inside is not None:
                    write(inside)
            progress("putting it on the disk")
        if report is not None and write is not None and inside is None:
            with noting_output(output):
                write(Path(report), overwrite=overwrite)
    result["seconds"] = round(time.monotonic() - started_s, 2)
    if draft.plan is not None:
        result["peak_rss_bytes"] = _peak_rss_bytes()
    return result


def steps_of(method: str) -> Steps:
    """Return the functions of a conversion, by its name; this imports its file."""
    steps: Steps = object_at(find_conversion(method).steps, "method")
    return steps


def write_draft(draft: Draft, recipe: Recipe, opened: Opened, directory: Path, progress: Progress) -> None:
    """Write a draft's weights and every file beside them; PlanError where the plan does not fit the source."""
    plan = draft.plan
    if plan is None:
        progress("writing")
        return draft.write(directory)
    source = opened.model.checkpoint
    plan.check(source)
    writer = CheckpointWriter(directory, report=partial(progress, "writing, bytes"))
    plan.run(source, writer)
    writer.finish(plan.config)
    copy_companions(source.directory, directory)
    save_recipe(directory, recipe)
    (directory / "analysis").mkdir(exist_ok=True)
    write_json(directory / "analysis" / "plan.json", plan.describe())
    return draft.write(directory)


def _names_what_to_lower(recipe: Recipe, conversion: Conversion) -> AbstractContextManager[None]:
    if not conversion.reads_text:
        return nullcontext()
    needs_whole_model = not conversion.has_by_layer or needs_gradients(recipe)
    return names_what_to_lower(recipe, "calibration", needs_whole_model=needs_whole_model)


def _peak_rss_bytes() -> int:
    """Return the most memory this process has had resident so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
