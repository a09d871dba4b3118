"""Pruning or merging the experts of a native mixture of experts, as the driver calls it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from modmoe.analysis.run import tokenize, tokens_by_task
from modmoe.analysis.text.calibration import load_task, warn_of_length
from modmoe.analysis.text.reading import Reading, tell
from modmoe.analysis.text.rows import TaskRows
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
from modmoe.conversion.steps import Draft, Steps
from modmoe.errors import CheckpointError, RecipeError
from modmoe.formats.card.experts import write_experts_card
from modmoe.formats.proof.verify import verify
from modmoe.models.counts import count_sizes, tensor_bytes, tensor_parameters
from modmoe.models.families import layers_of
from modmoe.models.loading import read_settings
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.progress import Progress, counter
from modmoe.storage.checkpoint import Checkpoint, write_json
from modmoe.storage.plan import Plan

LOG = logging.getLogger(__name__)


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe; RecipeError where it does not say how many experts are left, or what cannot be."""
    if recipe.experts.num_experts is None:
        raise RecipeError("experts.num_experts", "is not given", "say how many experts each layer keeps")
    if recipe.calibration.by_layer:
        raise RecipeError(
            "calibration.by_layer", "experts are measured with the whole model in memory", "set it to false"
        )
    check_score(recipe.experts.score)
    return recipe


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """A native mixture of experts that passed every check that needs no calibration."""

    model: OpenedModel
    blocks: list[MoEBlock]
    texts: dict[str, TaskRows]
    num_experts: int
    """Experts that are to be left."""
    top_k: int
    """Experts of a token, then."""
    warnings: list[str]

    @property
    def checkpoint(self) -> Checkpoint:
        return self.model.checkpoint

    @property
    def size_bytes(self) -> int:
        return tensor_bytes(self.checkpoint)


def make(recipe: Recipe, source: _Opened, directory: Path, progress: Progress) -> Draft | None:
    """Return the draft of the same model with fewer experts, on the first process.

    The model is in memory as a whole, once for calibration and again for the proof. The facts are ``method``,
    ``assignment``, ``score``, ``num_experts_before``, ``parameters_before``, ``warnings`` and ``layers``: each with the
    experts it ``kept``, or the groups that became one, and the share of the routed tokens that had gone to these.
    """
    for line in source.warnings:
        LOG.warning("%s", line)
    readings: dict[str, Reading] = {}
    stats = _measure(recipe, source, progress, readings)
    choices = [choose(stats[block.layer], recipe.experts, recipe.seed + block.layer) for block in source.blocks]
    if not ranks.is_first():
        return None
    by_layer = {block.layer: choice for block, choice in zip(source.blocks, choices, strict=True)}

    def write(output: Path) -> None:
        write_json(output / "analysis" / "experts.json", {"layers": _numbers(recipe, source, stats)})

    def reduced(dtype: torch.dtype) -> Any:
        return reduce_model(_load(source, dtype=dtype, device="cpu"), by_layer, source.top_k)

    def prove(output: Path) -> dict[str, Any]:
        progress("verifying in a process of its own")
        return verify(reduced, output)

    return Draft(
        plan=experts_plan(source.checkpoint, source.blocks, choices, source.top_k),
        write=write,
        prove=prove,
        facts={**_facts(recipe, source), "layers": _describe_layers(recipe, source.blocks, choices, stats)},
        readings=readings,
        finish=lambda output, result: write_experts_card(output, result, source.model.directory, recipe.source),
    )


def open_experts(recipe: Recipe, revision: str | None, progress: Progress, *, headers_only: bool) -> _Opened:
    """Check all that can be known before calibration; with ``headers_only`` without reading a weight."""
    assert recipe.source is not None
    model = OpenedModel.at(recipe.source, revision, trust_remote_code=recipe.trust_remote_code)
    directory, checkpoint = str(model.directory), model.checkpoint
    blocks = read_blocks(checkpoint)
    config = read_settings(model.directory, model.classes.config)
    model_type = str(checkpoint.config["model_type"])
    left, top_k = recipe.experts.num_experts, int(config.num_experts_per_tok)
    assert left is not None, "settle asks for it"
    check_number(left, blocks[0].num_experts, model_type)
    if (getattr(config, "n_group", 1) or 1) > 1:
        raise CheckpointError(directory, "its experts are chosen by groups, out of which none can be taken alone")
    if blocks[-1].layer >= config.num_hidden_layers:
        raise CheckpointError(
            directory,
            f"layer {blocks[-1].layer} predicts later tokens and does not run here, so that its experts cannot be "
            "measured",
            f"take out the layers from {config.num_hidden_layers} on first",
        )
    model.check()
    warnings = []
    if top_k > left:
        warnings.append(f"a token had {top_k} experts and has {left} from now on, all that are left.")
    progress("reading the tasks")
    texts = {name: load_task(name, file) for name, file in recipe.tasks.items()}
    if ranks.is_first() and not headers_only:
        checkpoint.check_finite(partial(progress, "checking the source, bytes"))
    return _Opened(model, blocks, texts, left, min(top_k, left), warnings)


def _load(source: _Opened, **options: Any) -> Any:
    model = source.model.load(**options)
    if model.device.type == "cpu":
        # the default way of computing experts is for GPUs
        model.set_experts_implementation("eager")
    return model


def _measure(
    recipe: Recipe, source: _Opened, progress: Progress, readings: dict[str, Reading]
) -> dict[int, ExpertStats]:
    size = source.checkpoint.config.get("vocab_size")
    warn_of_length(source.checkpoint.config, recipe.calibration.sequence_length, "calibration.sequence_length")
    batches = tokenize(recipe, source.texts, source.model.tokenizer, progress, num_embeddings=size, readings=readings)
    tell(readings)
    progress("opening the model whole")
    return measure_experts(
        _load(source, device=recipe.device),
        batches,
        outputs=recipe.experts.assignment == "merge",
        progress=counter(progress, "measuring experts, tokens", sum(tokens_by_task(batches).values())),
    )


def _facts(recipe: Recipe, source: _Opened) -> dict[str, Any]:
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


def _describe_layers(
    recipe: Recipe, blocks: Sequence[MoEBlock], choices: Sequence[Choice], stats: dict[int, ExpertStats]
) -> list[dict[str, Any]]:
    layers = []
    for block, choice in zip(blocks, choices, strict=True):
        count_E = stats[block.layer].count_E
        left = sorted({expert for group in choice.groups for expert in group})
        share = float(count_E[left].sum() / count_E.sum().clamp_min(1))
        kept: list[Any] = [list(group) for group in choice.groups]
        if recipe.experts.assignment == "prune":
            kept = left
        layers.append({"layer": block.layer, "routed_share": round(share, 6), "kept": kept})
    return layers


def _numbers(recipe: Recipe, source: _Opened, stats: dict[int, ExpertStats]) -> list[dict[str, Any]]:
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


def describe(recipe: Recipe, source: _Opened) -> dict[str, Any]:
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
        "model_type": config.get("model_type"),
        "num_layers": layers_of(config),
        "num_experts": source.num_experts,
        "top_k": source.top_k,
        **_facts(recipe, source),
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


STEPS = Steps(settle=settle, open=open_experts, describe=describe, make=make)
"""Pruning or merging experts."""
