"""A whole run of ``--method experts``: checks, calibration, choice, plan, checkpoint, proof, card."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modmoe.analysis.run import Progress, counter, save_recipe, silent, tokenize, tokens_by_task
from modmoe.analysis.text.calibration import load_task, warn_of_length
from modmoe.analysis.text.reading import Reading, summaries, tell
from modmoe.analysis.text.rows import TaskRows
from modmoe.conversion.modular.run import peak_rss_bytes
from modmoe.conversion.reduce_experts.reduction import (
    SCORES,
    Choice,
    MoEBlock,
    check_number,
    check_score,
    choose,
    experts_plan,
    keep,
    read_blocks,
    reduce_model,
)
from modmoe.conversion.reduce_experts.statistics import ExpertStats, measure_experts
from modmoe.errors import CheckpointError, RecipeError
from modmoe.formats.card.experts import write_experts_card
from modmoe.formats.proof.verify import verify
from modmoe.models.counts import count_sizes, tensor_bytes, tensor_parameters
from modmoe.models.families import layers_of
from modmoe.models.inspection import inspect
from modmoe.models.loading import dense_classes, load, load_tokenizer, read_settings, skeleton
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.memory import calibrates
from modmoe.storage.checkpoint import Checkpoint, CheckpointWriter, copy_companions, resolve_source, write_json
from modmoe.storage.plan import Plan
from modmoe.storage.staging import check_output

LOG = logging.getLogger(__name__)
Prove = Callable[[Callable[[torch.dtype], Any], Path], dict[str, Any]]
"""Takes what returns the model in memory, its weights in a type, and the directory to compare it with."""
WriteCard = Callable[[Path, dict[str, Any], Path, str | None], None]
"""Takes the directory, the result, where the source lies and how it was named."""


def check_count(recipe: Recipe) -> None:
    """Raise RecipeError where a recipe does not say how many experts are left."""
    if recipe.experts.num_experts is None:
        raise RecipeError("experts.num_experts: is not given; say how many experts each layer keeps.")


@dataclass(frozen=True, slots=True, eq=False)
class _Source:
    """A native mixture of experts that passed every check that needs no calibration."""

    checkpoint: Checkpoint
    blocks: list[MoEBlock]
    texts: dict[str, TaskRows]
    num_experts: int
    """Experts that are to be left."""
    top_k: int
    """Experts of a token, then."""
    warnings: list[str]


@ranks.joined()
@calibrates
def reduce_experts(
    recipe: Recipe,
    output: str,
    *,
    prove: Prove = verify,
    write_card: WriteCard = write_experts_card,
    overwrite: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Prune or merge the experts of a native mixture of experts; write it in its own format, whole or not at all.

    The source is left unchanged. Its model is in memory as a whole, once for calibration and again for the proof.

    Args:
        recipe: its ``experts`` part, tasks, calibration, seed, device and trust.
        output: a directory that is free.
        prove: reloads what was written and compares it with the source reduced in memory.
        write_card: writes README.md.
        overwrite: replace what is in ``output``.
        dry_run: return the plan and what it costs, and write nothing.
        revision: of a source on the Hub.
        progress: called with a message and, where they are known, what is done and what there is in all.

    Returns the inspection of the new checkpoint with ``method``, ``assignment``, ``score``, ``num_experts_before``,
    ``parameters_before``, ``layers`` (each with the experts it ``kept``, or the groups that became one, and the share
    of the routed tokens that had gone to these), ``warnings``, ``verified``, ``seconds`` and ``peak_rss_bytes``.

    Raises:
        ModmoeError: a kind of it that says what to mend; nothing is left behind.
    """
    progress = progress or silent
    started_s = time.monotonic()
    check_output(output, overwrite=overwrite)
    source = _open_source(recipe, revision, progress, headers_only=dry_run)
    if dry_run:
        return _costs(recipe, source)
    for line in source.warnings:
        LOG.warning("%s", line)
    with ranks.open_first_output(output, overwrite=overwrite, size_bytes=tensor_bytes(source.checkpoint)) as directory:
        readings: dict[str, Reading] = {}
        stats = _measure(recipe, source, progress, readings)
        choices = [choose(stats[block.layer], recipe.experts, recipe.seed + block.layer) for block in source.blocks]
        if not ranks.is_first():
            return {"output": str(output)}
        checkpoint = source.checkpoint
        plan = experts_plan(checkpoint, source.blocks, choices, source.top_k)
        plan.check(checkpoint)
        writer = CheckpointWriter(directory, report=partial(progress, "writing, bytes"))
        plan.run(checkpoint, writer)
        writer.finish(plan.config)
        copy_companions(checkpoint.directory, directory)
        save_recipe(directory, recipe)
        layers = _describe(recipe, source.blocks, choices, stats)
        (directory / "analysis").mkdir()
        write_json(directory / "analysis" / "experts.json", {"layers": _numbers(recipe, source, stats)})
        write_json(directory / "analysis" / "plan.json", plan.describe())
        progress("verifying in a process of its own")
        by_layer = {block.layer: choice for block, choice in zip(source.blocks, choices, strict=True)}

        def reduced(dtype: torch.dtype) -> Any:
            return reduce_model(_load(recipe, source, dtype=dtype, device="cpu"), by_layer, source.top_k)

        result = {
            **inspect(str(directory)),
            **_about(recipe, source),
            "output": str(output),
            "read": summaries(readings),
            "layers": layers,
            "verified": prove(reduced, directory),
        }
        write_card(directory, result, checkpoint.directory, recipe.source)
        progress("putting it on the disk")
    return {**result, "seconds": round(time.monotonic() - started_s, 2), "peak_rss_bytes": peak_rss_bytes()}


def _open_source(recipe: Recipe, revision: str | None, progress: Progress, *, headers_only: bool) -> _Source:
    """Check all that can be known before calibration; with ``headers_only`` without reading a weight."""
    assert recipe.source is not None
    if recipe.calibration.by_layer:
        raise RecipeError("calibration.by_layer: experts are measured with the whole model in memory; set it to false.")
    check_score(recipe.experts.score)
    directory = resolve_source(recipe.source, revision)
    checkpoint = Checkpoint(directory)
    blocks = read_blocks(checkpoint)
    classes = dense_classes(directory, trust_remote_code=recipe.trust_remote_code)
    config = read_settings(directory, classes.config)
    model_type = str(checkpoint.config["model_type"])
    left, top_k = check_number(recipe.experts, blocks[0].num_experts, model_type), int(config.num_experts_per_tok)
    if (getattr(config, "n_group", 1) or 1) > 1:
        raise CheckpointError(f"{directory}: its experts are chosen by groups, out of which none can be taken alone.")
    if blocks[-1].layer >= config.num_hidden_layers:
        raise CheckpointError(
            f"{directory}: layer {blocks[-1].layer} predicts later tokens and does not run here, so that its experts "
            f"cannot be measured; take out the layers from {config.num_hidden_layers} on first."
        )
    skeleton(directory, trust_remote_code=recipe.trust_remote_code)  # whose tensors these have to be
    warnings = []
    if top_k > left:
        warnings.append(f"a token had {top_k} experts and has {left} from now on, all that are left.")
    progress("reading the tasks")
    texts = {name: load_task(name, file) for name, file in recipe.tasks.items()}
    if ranks.is_first() and not headers_only:
        checkpoint.check_finite(partial(progress, "checking the source, bytes"))
    return _Source(checkpoint, blocks, texts, left, min(top_k, left), warnings)


def _load(recipe: Recipe, source: _Source, **options: Any) -> Any:
    model: Any = load(source.checkpoint.directory, trust_remote_code=recipe.trust_remote_code, **options)
    if model.device.type == "cpu":
        # the default way of computing experts is for GPUs
        model.set_experts_implementation("eager")
    return model


def _measure(
    recipe: Recipe, source: _Source, progress: Progress, readings: dict[str, Reading]
) -> dict[int, ExpertStats]:
    tokenizer = load_tokenizer(source.checkpoint.directory, trust_remote_code=recipe.trust_remote_code)
    size = source.checkpoint.config.get("vocab_size")
    warn_of_length(source.checkpoint.config, recipe.calibration.sequence_length, "calibration.sequence_length")
    batches = tokenize(recipe, source.texts, tokenizer, progress, num_embeddings=size, readings=readings)
    tell(readings)
    progress("opening the model whole")
    return measure_experts(
        _load(recipe, source, device=recipe.device),
        batches,
        outputs=recipe.experts.assignment == "merge",
        progress=counter(progress, "measuring experts, tokens", sum(tokens_by_task(batches).values())),
    )


def _about(recipe: Recipe, source: _Source) -> dict[str, Any]:
    sizes = tensor_parameters(source.checkpoint)
    merges = recipe.experts.assignment == "merge"
    return {
        "method": "experts",
        "assignment": recipe.experts.assignment,
        "score": "frequency" if merges else recipe.experts.score,
        "num_experts_before": source.blocks[0].num_experts,
        "parameters_before": sum(sizes.values()),
        "warnings": source.warnings,
    }


def _describe(
    recipe: Recipe, blocks: Sequence[MoEBlock], choices: Sequence[Choice], stats: dict[int, ExpertStats]
) -> list[dict[str, Any]]:
    described = []
    for block, choice in zip(blocks, choices, strict=True):
        count_E = stats[block.layer].count_E
        left = sorted({expert for group in choice.groups for expert in group})
        share = float(count_E[left].sum() / count_E.sum().clamp_min(1))
        kept: list[Any] = [list(group) for group in choice.groups]
        if recipe.experts.assignment == "prune":
            kept = left
        described.append({"layer": block.layer, "routed_share": round(share, 6), "kept": kept})
    return described


def _numbers(recipe: Recipe, source: _Source, stats: dict[int, ExpertStats]) -> list[dict[str, Any]]:
    """Return every score of every expert, so that another choice needs no second look."""
    return [
        {
            "layer": block.layer,
            "tokens": int(stats[block.layer].tokens),
            "scores": {
                name: score(stats[block.layer], recipe.seed + block.layer).tolist() for name, score in SCORES.items()
            },
        }
        for block in source.blocks
    ]


def _costs(recipe: Recipe, source: _Source) -> dict[str, Any]:
    """Return what a run would make and cost, from headers alone; which experts are left changes no size."""
    checkpoint, config = source.checkpoint, source.checkpoint.config
    choices = [keep(range(source.num_experts))] * len(source.blocks)
    plan = experts_plan(checkpoint, source.blocks, choices, source.top_k)
    shapes = plan.check(checkpoint)
    before = source.blocks[0].num_experts
    sizes = tensor_parameters(checkpoint)
    top_k = int(config.get("num_experts_per_tok") or source.top_k)
    left = count_sizes(_sizes_after(plan, shapes, sizes), source.num_experts, source.top_k)
    now = count_sizes(sizes, before, top_k)
    tokens = recipe.calibration.tokens * len(recipe.tasks)
    merges = recipe.experts.assignment == "merge"
    return {
        "dry_run": True,
        "model_type": config.get("model_type"),
        "num_layers": layers_of(config),
        "num_experts": source.num_experts,
        "top_k": source.top_k,
        **_about(recipe, source),
        "parameters": {"stored": left.stored, "active": left.active, "materialised": left.materialised},
        "calibration_tokens": tokens,
        # a forward pass is two operations a parameter and token; the experts run once more to be measured
        "calibration_flops": 2 * tokens * (now.active + (now.stored if merges else now.active)),
        "tensors": len(plan.ops),
    }


def _sizes_after(plan: Plan, shapes: dict[str, tuple[int, ...]], counted: dict[str, int]) -> dict[str, int]:
    """Return the parameters of the new checkpoint's tensors, of those that count in the source."""
    return {
        name: torch.Size(shape).numel()
        for name, shape in shapes.items()
        if all(given in counted for given in plan.ops[name].inputs)
    }
