"""The first half of a conversion: from tokens to statistics to modules."""

# Shapes: P tasks, F neurons, M modules

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.partitions.core import with_core
from modmoe.analysis.partitions.table import Partition, cut_layers, find_partitioner, save_partitions
from modmoe.analysis.passes.by_layer import fits, free_bytes, model_bytes, open_model
from modmoe.analysis.passes.clusters import cluster_sequences
from modmoe.analysis.passes.stream import Runner
from modmoe.analysis.profile import ActivationProfile, profile_model, save_profiles
from modmoe.analysis.score import module_scores
from modmoe.analysis.source import Source, core_modules, needs_gradients, open_source, with_num_modules
from modmoe.analysis.text.calibration import Batch, token_batches, warn_of_length
from modmoe.analysis.text.reading import Reading, summaries, tell
from modmoe.analysis.text.rows import TaskRows
from modmoe.models.ffn_layout import FFNWeights, LazyFFNs
from modmoe.models.loading import pick_device
from modmoe.recipe.record import save_recipe
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.memory import names_what_to_lower
from modmoe.runtime.preflight import noting_output, place_report
from modmoe.runtime.progress import Progress, counter, silent
from modmoe.storage.checkpoint import write_json
from modmoe.storage.staging import check_output

LOG = logging.getLogger(__name__)
# a task with less than this part of the calibration tokens is pointed out
_FEW = 4


@dataclass(frozen=True, slots=True, eq=False)
class Analysis:
    """What calibration found: one profile, partition and set of scores a layer."""

    source: Source
    runner: Runner
    tokenizer: Any
    batches: dict[str, list[Batch]]
    ffns: Sequence[FFNWeights]
    profiles: list[ActivationProfile]
    partitions: list[Partition]
    scores_PM: list[Tensor]
    readings: dict[str, Reading] = field(default_factory=dict)
    """What was read of each task."""


def open_runner(recipe: Recipe, source: Source, scratch: Path | None, progress: Progress) -> Runner:
    """Return what runs the dense model: layer by layer where it takes more than half of the memory that is free."""
    device, size_bytes = pick_device(recipe.device), model_bytes(source.checkpoint)
    by_layer = recipe.calibration.by_layer
    if by_layer is None:
        # on a CPU the processes of a machine share its memory; all of them decide alike
        copies = ranks.num_ranks_here() if device.type == "cpu" else 1
        too_large = not fits(size_bytes * copies, device)
        by_layer = not needs_gradients(recipe) and bool(ranks.add_up(torch.tensor(int(too_large))))
    size = f"{size_bytes / 1e9:.1f} GB" if size_bytes >= 1e8 else f"{size_bytes / 1e6:.0f} MB"
    sizes = f"{size}, {free_bytes(device) / 1e9:.1f} GB free"
    progress(f"opening the model {'layer by layer' if by_layer else 'whole'} ({sizes})")
    return open_model(
        source.model,
        source.family,
        by_layer=by_layer,
        device=device,
        scratch=scratch if scratch is not None and scratch.is_dir() else None,
    )


def analyze_source(
    recipe: Recipe, source: Source, progress: Progress, scratch: Path | None = None, *, num_clusters: int = 1
) -> Analysis:
    """Run the tasks' text through the dense model and cut every FFN into modules.

    ``scratch`` is the directory whose disk holds the hidden states of a model run layer by layer. Where there is one
    task, ``num_clusters`` clusters of its sequences stand for tasks.
    """
    runner = open_runner(recipe, source, scratch, progress)
    tokenizer = source.model.tokenizer
    readings: dict[str, Reading] = {}
    size = source.settings.get("vocab_size")
    warn_of_length(source.settings, recipe.calibration.sequence_length, "calibration.sequence_length")
    batches = tokenize(recipe, source.texts, tokenizer, progress, num_embeddings=size, readings=readings)
    tell(readings)
    if len(batches) == 1 and num_clusters > 1:
        report = counter(progress, "clustering sequences, tokens", sum(tokens_by_task(batches).values()))
        batches = cluster_sequences(runner, next(iter(batches.values())), num_clusters, recipe.seed, report)
    total = sum(tokens_by_task(batches).values())
    profiles = profile_model(
        runner,
        batches,
        gradients=needs_gradients(recipe),
        seed=recipe.seed,
        progress=counter(progress, "profiling, tokens", total),
    )
    ffns = LazyFFNs(source.checkpoint, source.family, source.num_layers)
    layers = [layer for layer in range(source.num_layers) if ranks.is_mine(layer)]
    cuts = cut_layers(
        with_core(find_partitioner(recipe.partition.method), core_modules(recipe)),
        lambda layer: (profiles[layer], ffns[layer]),
        layers,
        recipe.partition.num_modules,
        recipe.seed,
        progress=lambda done, all_layers: progress("partitioning, layers", done, all_layers),
    )
    modules_LF = torch.zeros(source.num_layers, source.neurons, dtype=torch.int64)
    for layer, partition in zip(layers, cuts, strict=True):
        modules_LF[layer] = partition.module_F
    partitions = [Partition(module_F, recipe.partition.num_modules) for module_F in ranks.add_up(modules_LF)]
    if recipe.assignment.score == "output_norm":
        profiles = profile_model(
            runner,
            batches,
            partitions=partitions,
            seed=recipe.seed,
            progress=counter(progress, "measuring modules, tokens", total),
        )
    scores_PM = [
        module_scores(recipe.assignment.score, profile, weights, partition)
        for profile, weights, partition in zip(profiles, ffns, partitions, strict=True)
    ]
    return Analysis(source, runner, tokenizer, batches, ffns, profiles, partitions, scores_PM, readings)


def tokenize(
    recipe: Recipe,
    texts: Mapping[str, TaskRows],
    tokenizer: Any,
    progress: Progress,
    *,
    num_embeddings: int | None = None,
    readings: dict[str, Reading] | None = None,
) -> dict[str, list[Batch]]:
    """Return the batches of each task's rows, as many tokens as the recipe's calibration says.

    ``num_embeddings`` is as for ``encode_tasks``; ``readings`` is filled with what is read.
    """
    calibration, batches = recipe.calibration, {}
    for number, (name, rows) in enumerate(texts.items()):
        progress("tokenizing, tasks", number, len(texts))
        reading = Reading(rows, tokenizer, learns=False, length=calibration.sequence_length)
        batches[name] = token_batches(
            tokenizer,
            name,
            rows,
            tokens=calibration.tokens,
            sequence_length=calibration.sequence_length,
            batch_size=calibration.batch_size,
            seed=recipe.seed,
            num_embeddings=num_embeddings,
            reading=reading,
        )
        if readings is not None:
            readings[name] = reading
    progress("tokenizing, tasks", len(texts), len(texts))
    for name, count in tokens_by_task(batches).items():
        if count < calibration.tokens // _FEW:
            LOG.info(
                f"{name}: only {count:,} tokens of text, {calibration.tokens:,} were asked for; more would tell more"
            )
    return batches


def save_analysis(directory: Path, analysis: Analysis) -> None:
    """Write profile.safetensors, partition.safetensors and scores.json into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    save_profiles(directory / "profile.safetensors", analysis.profiles)
    save_partitions(directory / "partition.safetensors", analysis.partitions)
    tasks = list(analysis.batches)
    scores = [dict(zip(tasks, scores_PM.tolist(), strict=True)) for scores_PM in analysis.scores_PM]
    write_json(directory / "scores.json", {"layers": scores})


@ranks.joined()
def analyze(
    recipe: Recipe,
    output: str,
    *,
    num_clusters: int = 1,
    report: str | None = None,
    write_report: Callable[..., None] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profile a dense model and cut its FFNs into modules; write the statistics to ``output``, whole or not at all.

    Processes that torchrun or accelerate launch started share the text and the layers; the first alone writes.
    ``num_clusters`` is as for ``analyze_source``. ``write_report`` writes ``report``, which is not written without it.

    Returns what ``modmoe analyze --json`` prints: the sizes, the tokens of each task, and where things were written.
    """
    progress = progress or silent
    check_output(output, overwrite=overwrite)
    recipe = with_num_modules(recipe, revision)
    source = open_source(recipe, revision, progress)
    lowering = names_what_to_lower(recipe, "calibration", needs_whole_model=needs_gradients(recipe))
    with lowering, ranks.open_first_output(output, overwrite=overwrite) as partial_directory:
        analysis = analyze_source(recipe, source, progress, partial_directory, num_clusters=num_clusters)
        inside = place_report(report, output, partial_directory)
        if ranks.is_first():
            save_analysis(partial_directory, analysis)
            save_recipe(partial_directory, recipe)
            if inside is not None and write_report is not None:
                write_report(inside, recipe, analysis)
    if report is not None and write_report is not None and inside is None and ranks.is_first():
        with noting_output(output):
            write_report(Path(report), recipe, analysis, overwrite=overwrite)
    return {
        "output": str(output),
        "report": report,
        "model_type": source.family.model_type,
        "num_layers": source.num_layers,
        "num_modules": recipe.partition.num_modules,
        "module_size": source.neurons // recipe.partition.num_modules,
        "tasks": tokens_by_task(analysis.batches),
        "read": summaries(analysis.readings),
    }


def tokens_by_task(batches: Mapping[str, list[Batch]]) -> dict[str, int]:
    """Return the tokens of each task's batches, padding not counted."""
    return {name: sum(int(batch.attention_mask_BT.sum()) for batch in items) for name, items in batches.items()}
