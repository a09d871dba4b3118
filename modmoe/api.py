"""The steps as plain functions: with a recipe, with a recipe file, or with keywords named as the command line's flags.

``modmoe.convert("dense", "out", tasks={"math": "math.jsonl"}, num_modules=16)`` and
``modmoe.convert(load_recipe("r.yaml"), "out")`` do the same as ``modmoe convert``. Keywords override the recipe.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modmoe.conversion.table import ADAPTER_COUNTS, find_conversion
from modmoe.errors import RecipeError, did_you_mean
from modmoe.recipe.keywords import KEYWORDS
from modmoe.runtime.preflight import check_places, check_there, input_words, need_source_and_tasks, recipe_inputs

if TYPE_CHECKING:
    from modmoe.recipe.schema import Recipe
    from modmoe.runtime.progress import Progress


def resolve_recipe(
    step: str,
    source: Recipe | str | Path | None,
    recipe: Recipe | str | Path | None,
    keywords: Mapping[str, Any],
    *,
    allow_code: bool = False,
) -> Recipe:
    """Return the recipe that a step runs: ``keywords`` over ``recipe`` over defaults.

    Raises RecipeError for an unknown keyword, two recipes, or whatever is wrong with the recipe.

    Args:
        step: a key of KEYWORDS.
        source: the checkpoint; or a Recipe or the path of a .yaml file, where ``recipe`` is None.
        recipe: a Recipe or the path of one.
        keywords: names of KEYWORDS[step], or dotted places; None leaves what the recipe says.
        allow_code: a dotted path in the recipe's file may be imported.
    """
    from modmoe.recipe.schema import Recipe, flat_recipe, load_recipe, make_recipe

    if isinstance(source, Recipe) or (source is not None and Path(source).suffix in (".yaml", ".yml")):
        if recipe is not None:
            raise RecipeError(str(step), "two recipes are given", "the first argument is one already")
        source, recipe = None, source
    known = KEYWORDS[step]
    overrides: dict[str, Any] = {}
    for name, value in keywords.items():
        if value is not None and name not in known and "." not in name:
            raise RecipeError(str(step), f"no such keyword '{name}'", did_you_mean(name, known))
        if value is not None:
            overrides[known.get(name, name)] = value
    if "assignment.active_fraction" in overrides and "assignment.modules_per_expert" in overrides:
        raise RecipeError("assignment", "give modules_per_expert or active_fraction, not both")
    if "assignment.active_fraction" in overrides:
        # a recipe's modules_per_expert would win over the fraction; None puts it back to its default
        overrides["assignment.modules_per_expert"] = None
    if source is not None:
        overrides["source"] = str(source)
    if isinstance(recipe, Recipe):
        return make_recipe({**flat_recipe(recipe), **overrides}) if overrides else recipe
    return make_recipe(overrides) if recipe is None else load_recipe(recipe, overrides, allow_code=allow_code)


def analyze(
    source: Recipe | str | Path | None = None,
    output: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    report: str | None = None,
    overwrite: bool = False,
    allow_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Run the tasks' text through the dense model and cut its FFNs into modules; write what was measured to ``output``.

    Returns what ``modmoe analyze --json`` prints. Raises ModmoeError kinds for what the caller can mend.
    """
    resolved = resolve_recipe("analyze", source, recipe, keywords, allow_code=allow_code)
    need_source_and_tasks("analyze", resolved)
    check_there([resolved.source], resolved.tasks, takes_adapters=False)
    out = _output("analyze", output)
    check_places(out, overwrite=overwrite, report=report, inputs=recipe_inputs(resolved, source, recipe))
    from modmoe.analysis.run import analyze as run
    from modmoe.analysis.source import with_num_modules
    from modmoe.conversion.modular.settled import count_clusters
    from modmoe.reports.report import write_report

    resolved = with_num_modules(resolved, revision)
    return run(
        resolved,
        out,
        num_clusters=count_clusters(resolved),
        report=report,
        write_report=write_report,
        overwrite=overwrite,
        revision=revision,
        progress=progress,
    )


def convert(
    source: Recipe | str | Path | None = None,
    output: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    fit_bytes: int | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    estimate_for: str | None = None,
    allow_code: bool = False,
    revision: str | None = None,
    report: str | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Convert a dense checkpoint into a parameter-sharing mixture of experts, or prune either; whole or not at all.

    ``fit_bytes`` chooses the most modules an expert may have for the weights to fit, whatever the experts' overlap.
    Returns what ``modmoe convert --json`` prints; with ``dry_run`` the plan and what it will cost, on the device
    ``estimate_for`` (a name in ``modmoe.cost.devices.DEVICES``) or on this machine.
    """
    check_device(estimate_for, dry_run)
    options: dict[str, Any] = {"overwrite": overwrite, "dry_run": dry_run, "revision": revision, "progress": progress}
    resolved, result = _convert(source, output, recipe, keywords, fit_bytes, report, options, allow_code)
    if not dry_run:
        return result
    from modmoe.cost.estimate import add_estimate

    return add_estimate(result, resolved, estimate_for, revision)


def check_device(estimate_for: str | None, dry_run: bool) -> None:
    """Refuse a device where nothing is estimated, or one that is not known, before anything is read."""
    if estimate_for is None:
        return
    if not dry_run:
        raise RecipeError("--estimate-for", "belongs to --dry-run", "add that")
    from modmoe.cost.devices import check_name

    check_name(estimate_for)


def _convert(
    source: Recipe | str | Path | None,
    output: str | Path | None,
    recipe: Recipe | str | Path | None,
    keywords: Mapping[str, Any],
    fit_bytes: int | None,
    report: str | None,
    options: dict[str, Any],
    allow_code: bool,
) -> tuple[Recipe, dict[str, Any]]:
    """Convert by the recipe's method, and return the recipe that was run as well."""
    resolved = resolve_recipe("convert", source, recipe, keywords, allow_code=allow_code)
    conversion = find_conversion(resolved.method)
    conversion.refuse(resolved.method, {**keywords, "fit_bytes": fit_bytes, "report": report})
    need_source_and_tasks("convert", resolved, reads_text=conversion.reads_text)
    check_there(
        [resolved.source],
        resolved.tasks if conversion.reads_text and not options["dry_run"] else {},
        takes_adapters=False,
        reads_text=conversion.reads_text,
    )
    inputs = recipe_inputs(resolved, source, recipe)
    out = _output("convert", output)
    check_places(out, overwrite=options["overwrite"], report=report, inputs=inputs)
    if conversion.places:
        placed = {conversion.places.get(name, name): value for name, value in keywords.items()}
        resolved = resolve_recipe("convert", source, recipe, placed, allow_code=allow_code)
    counts = {name: keywords[name] for name in ADAPTER_COUNTS if keywords.get(name) is not None}
    if conversion.takes_adapter and counts:
        resolved = resolve_recipe(
            "convert", resolved, None, {"adapter_settings": {**resolved.adapter.settings, **counts}}
        )
    if fit_bytes is not None:
        from modmoe.models.counts import modules_that_fit

        modules = modules_that_fit(resolved, fit_bytes, revision=options["revision"])
        resolved = resolve_recipe("convert", resolved, None, {"modules_per_expert": modules})
    from modmoe.conversion.driver import convert as run
    from modmoe.reports.report import write_report

    return resolved, run(resolved, out, report=report, write_report=write_report, **options)


def finetune(
    source: Recipe | str | Path | None = None,
    output: str | Path | None = None,
    recipe: Recipe | str | Path | None = None,
    *,
    eval_tasks: Mapping[str, str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    estimate_for: str | None = None,
    allow_code: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
    **keywords: Any,
) -> dict[str, Any]:
    """Train a converted model, or attached adapters, on the tasks' text.

    ``source`` is the converted checkpoint. ``resume`` goes on from the last state in ``output``. Returns what
    ``modmoe finetune --json`` prints; with ``dry_run`` what learns and what it will cost, as for ``convert``.
    """
    check_device(estimate_for, dry_run)
    resolved = resolve_recipe("finetune", source, recipe, keywords, allow_code=allow_code)
    for flag in ("adapter", "budget"):
        if keywords.get(flag) is not None and resolved.finetune.train != "adapters":
            raise RecipeError(f"--{flag}", "belongs to --train adapters", "leave it out or train them")
    need_source_and_tasks("finetune", resolved)
    assert resolved.source is not None
    teacher = resolved.finetune.distill_from if resolved.finetune.distill_weight > 0 else None
    texts = () if dry_run else (resolved.tasks, eval_tasks or {})
    check_there([resolved.source], *texts, needs_tokenizer=not dry_run)
    check_there([teacher], reads_text=False)
    out = _output("finetune", output)
    inputs = recipe_inputs(resolved, source, recipe, eval_tasks)
    check_places(out, overwrite=overwrite, trains=True, resume=resume or dry_run, inputs=inputs)
    if dry_run:
        from modmoe.cost.estimate import plan_finetune

        return plan_finetune(resolved, _local(resolved.source, revision), estimate_for)
    from modmoe.training.run import finetune as run

    return run(
        _local(resolved.source, revision),
        out,
        resolved,
        eval_tasks=dict(eval_tasks or {}),
        resume=resume,
        overwrite=overwrite,
        progress=progress,
    )


def export(
    source: str | Path,
    output: str | Path,
    *,
    form: str = "tied",
    target: str = "auto",
    client: str = "transformers",
    expert: str | None = None,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    verify: bool = True,
    revision: str | None = None,
    approximate: bool = False,
    tasks: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a converted model or an adapter in a form that is given away. Returns what ``modmoe export --json`` prints.

    ``form`` is tied, packed, native, dense or adapter; ``expert`` names the one that a dense export keeps.
    ``client`` is the program that a native export is for: transformers, vllm, sglang or llama.cpp.
    ``approximate`` folds an adapter that depends on the token, its experts' weights held at their means over ``tasks``.
    """
    check_places(str(output), overwrite=overwrite, inputs=input_words(source, tasks or {}))
    from modmoe.exports.converted import export as run

    return run(
        _local(source, revision),
        str(output),
        form=form,
        target=target,
        client=client,
        expert=expert,
        dtype=dtype,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        verify=verify,
        approximate=approximate,
        tasks=dict(tasks or {}),
        progress=progress,
    )


def inspect(directory: str | Path) -> dict[str, Any]:
    """Return counts, sparsity and the experts of a checkpoint: what ``modmoe inspect --json`` prints."""
    from modmoe.models.inspection import inspect as run

    return run(str(directory))


def evaluate(
    source: str | Path,
    tasks: Mapping[str, str] | None = None,
    *,
    baseline: str | None = None,
    tokens: int = 32768,
    sequence_length: int = 256,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
    expert: str | None = None,
    seed: int | None = None,
    revision: str | None = None,
    harness: Sequence[str] | None = None,
    harness_path: str | Path | None = None,
    limit: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure loss, perplexity, bits per byte and tokens a second of each task, or run tasks of lm-eval.

    With a ``baseline``, each number has the ratio to the dense model's beside it. ``expert`` fixes the expert of a
    model with task routing; by default a task is run with the expert of its name. ``harness`` names tasks of lm-eval,
    which are run in place of ``tasks``; ``harness_path`` is a folder with more of them, and ``limit`` the most samples
    of each. ``seed`` is 0 by default, and lm-eval's own where it runs. Returns what ``modmoe eval --json`` prints.
    """
    if bool(tasks) == bool(harness):
        raise RecipeError(
            "eval", "give tasks with their text, or harness with names of lm-eval's tasks, one of the two"
        )
    if tasks and (harness_path is not None or limit is not None):
        raise RecipeError("eval", "harness_path and limit go with harness", "leave them out or name tasks of lm-eval")
    if tasks:
        check_there([source, baseline], tasks)
    options: dict[str, Any] = {
        "baseline": baseline,
        "batch_size": batch_size,
        "device": device,
        "trust_remote_code": trust_remote_code,
        "expert": expert,
        "progress": progress,
    }
    if harness:
        from modmoe.training.evaluation.lm_eval import evaluate_harness

        options["path"] = None if harness_path is None else str(harness_path)
        return evaluate_harness(_local(source, revision), harness, limit=limit, seed=seed, **options)
    from modmoe.training.evaluation.task_loss import evaluate as run

    return run(
        _local(source, revision),
        dict(tasks or {}),
        tokens=tokens,
        sequence_length=sequence_length,
        seed=seed or 0,
        **options,
    )


def _local(source: str | Path, revision: str | None) -> str:
    if revision is None:
        return str(source)
    from modmoe.storage.checkpoint import resolve_source

    return str(resolve_source(source, revision))


def _output(step: str, output: str | Path | None) -> str:
    if output is None:
        raise RecipeError(str(step), "no output directory is given")
    return str(output)
