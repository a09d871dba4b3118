"""The first half of a conversion: from tokens to statistics to modules."""

# Shapes: P tasks, F neurons, M modules

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.partitions.table import Partition, check_num_modules, cut_layers, find_partitioner, save_partitions
from modmoe.analysis.passes.by_layer import fits, free_bytes, model_bytes, open_model
from modmoe.analysis.passes.clusters import cluster_sequences
from modmoe.analysis.passes.stream import Runner
from modmoe.analysis.profile import ActivationProfile, profile_model, save_profiles
from modmoe.analysis.score import SCORES, module_scores
from modmoe.analysis.text.calibration import Batch, load_task, token_batches, warn_of_length
from modmoe.analysis.text.reading import Reading, summaries, tell
from modmoe.analysis.text.rows import TaskRows
from modmoe.errors import CheckpointError, RecipeError, did_you_mean
from modmoe.models.families import Family, family_of, layers_of, neurons_of
from modmoe.models.ffn_layout import FFNWeights, LazyFFNs, check_ffns
from modmoe.models.loading import (
    DenseClasses,
    dense_classes,
    is_tied_type,
    load_tokenizer,
    pick_device,
    read_settings,
    skeleton,
)
from modmoe.recipe.schema import Recipe, dump_recipe, needs_gradients
from modmoe.runtime import ranks
from modmoe.runtime.memory import calibrates
from modmoe.runtime.preflight import noting_output, place_report
from modmoe.storage.checkpoint import Checkpoint, resolve_source, write_json
from modmoe.storage.staging import check_output
from modmoe.version import __version__

LOG = logging.getLogger(__name__)
# a task with less than this part of the calibration tokens is pointed out
_FEW = 4

Progress = Callable[..., None]


@dataclass(frozen=True, slots=True, eq=False)
class Source:
    """A dense checkpoint that passed every check that needs no calibration."""

    checkpoint: Checkpoint
    family: Family
    settings: dict[str, Any]
    """The configuration with its defaults filled in; config.json may leave them out."""
    classes: DenseClasses
    num_layers: int
    neurons: int
    texts: dict[str, TaskRows]
    """The rows of each task."""


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


def open_source(
    recipe: Recipe, revision: str | None = None, progress: Progress | None = None, *, headers_only: bool = False
) -> Source:
    """Check all that can be known before calibration and return the dense source; the first process reads its bytes.

    With ``headers_only`` no weight is read, and values that are not finite are not found.

    Raises the kinds of ModmoeError: an unusable checkpoint, an unknown family, values that are not finite, a number of
    modules that does not divide the neurons, unknown methods, task files that cannot be read.
    """
    if recipe.source is None:
        raise RecipeError("source: name the dense checkpoint.")
    if not recipe.tasks:
        raise RecipeError("tasks: name at least one task and its file, as in --task math=math.jsonl.")
    if recipe.assignment.score not in SCORES:
        raise RecipeError(
            f"assignment.score: no score '{recipe.assignment.score}'.{did_you_mean(recipe.assignment.score, SCORES)}"
        )
    if recipe.calibration.by_layer and needs_gradients(recipe):
        what, other = (
            ("score taylor", "wanda") if recipe.assignment.score == "taylor" else ("partition gradient", "kmeans")
        )
        raise RecipeError(
            f"calibration.by_layer: {what} needs the whole model; choose another, such as {other}, or set it to false."
        )
    find_partitioner(recipe.partition.method)
    source = open_dense(recipe, revision)
    check_num_modules(source.neurons, recipe.partition.num_modules)
    progress = progress or silent
    progress("reading the tasks")
    texts = {name: load_task(name, file) for name, file in recipe.tasks.items()}
    if ranks.is_first() and not headers_only:
        source.checkpoint.check_finite(partial(progress, "checking the source, bytes"))
    return replace(source, texts=texts)


def open_dense(recipe: Recipe, revision: str | None = None) -> Source:
    """Return the recipe's dense source without any text, from its headers; raises as ``open_source`` does."""
    assert recipe.source is not None
    directory = resolve_source(recipe.source, revision)
    checkpoint = Checkpoint(directory)
    if is_tied_type(checkpoint.config.get("model_type")):
        raise CheckpointError(f"{directory}: is a ModularMoE checkpoint already; name the dense one.")
    family = family_of(checkpoint.config, recipe.family, str(directory / "config.json"))
    classes = dense_classes(directory, trust_remote_code=recipe.trust_remote_code)
    settings = read_settings(directory, classes.config).to_dict()
    skeleton(directory, trust_remote_code=recipe.trust_remote_code)  # whose tensors these have to be
    checkpoint.add_prefix(family.layers)
    neurons, num_layers = neurons_of(settings, family), layers_of(settings)
    check_ffns(checkpoint, family, num_layers, neurons)
    return Source(checkpoint, family, settings, classes, num_layers, neurons, {})


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
        source.checkpoint,
        source.family,
        by_layer=by_layer,
        device=device,
        scratch=scratch if scratch is not None and scratch.is_dir() else None,
        trust_remote_code=recipe.trust_remote_code,
    )


def analyze_source(recipe: Recipe, source: Source, progress: Progress, scratch: Path | None = None) -> Analysis:
    """Run the tasks' text through the dense model and cut every FFN into modules.

    ``scratch`` is the directory whose disk holds the hidden states of a model run layer by layer.
    """
    directory = source.checkpoint.directory
    runner = open_runner(recipe, source, scratch, progress)
    tokenizer = load_tokenizer(directory, trust_remote_code=recipe.trust_remote_code)
    readings: dict[str, Reading] = {}
    size = source.settings.get("vocab_size")
    warn_of_length(source.settings, recipe.calibration.sequence_length, "calibration.sequence_length")
    batches = tokenize(recipe, source.texts, tokenizer, progress, num_embeddings=size, readings=readings)
    tell(readings)
    clusters = count_clusters(recipe)
    if len(batches) == 1 and clusters > 1:
        report = counter(progress, "clustering sequences, tokens", sum(tokens_by_task(batches).values()))
        batches = cluster_sequences(runner, next(iter(batches.values())), clusters, recipe.seed, report)
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
    found = cut_layers(
        find_partitioner(recipe.partition.method),
        lambda layer: (profiles[layer], ffns[layer]),
        layers,
        recipe.partition.num_modules,
        recipe.seed,
        progress=lambda done, all_layers: progress("partitioning, layers", done, all_layers),
    )
    modules_LF = torch.zeros(source.num_layers, source.neurons, dtype=torch.int64)
    for layer, partition in zip(layers, found, strict=True):
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


def count_clusters(recipe: Recipe) -> int:
    """Return how many clusters of sequences stand for tasks where there is one task; 1 leaves it as it is.

    They are as many as experts, or where every module is an expert and is cut by gradients, as modules.
    """
    if recipe.assignment.method not in ("tokens", "modules"):
        return recipe.assignment.num_experts or 1
    return recipe.partition.num_modules if recipe.partition.method == "gradient" else 1


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
    for name, found in tokens_by_task(batches).items():
        if found < calibration.tokens // _FEW:
            LOG.info(
                f"{name}: only {found:,} tokens of text, {calibration.tokens:,} were asked for; more would tell more"
            )
    return batches


def counter(progress: Progress, message: str, total: int) -> Callable[[int], None]:
    """Return a function that adds the tokens it is called with and reports the sum, as if all ranks were as far."""
    done = 0

    def add(tokens: int) -> None:
        nonlocal done
        done += tokens * ranks.num_ranks()
        progress(message, min(done, total), total)

    progress(message, 0, total)
    return add


def save_analysis(directory: Path, analysis: Analysis) -> None:
    """Write profile.safetensors, partition.safetensors and scores.json into ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    save_profiles(directory / "profile.safetensors", analysis.profiles)
    save_partitions(directory / "partition.safetensors", analysis.partitions)
    tasks = list(analysis.batches)
    scores = [dict(zip(tasks, scores_PM.tolist(), strict=True)) for scores_PM in analysis.scores_PM]
    write_json(directory / "scores.json", {"layers": scores})


def save_recipe(directory: Path, recipe: Recipe) -> None:
    """Write the resolved recipe with the versions it ran with as modmoe.yaml."""
    import torch
    import transformers

    versions = {"modmoe": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (directory / "modmoe.yaml").write_text(dump_recipe(recipe, versions), encoding="utf-8")


def silent(*_: Any) -> None:
    """Report no progress."""


@ranks.joined()
@calibrates
def analyze(
    recipe: Recipe,
    output: str,
    *,
    report: str | None = None,
    write_report: Callable[..., None] | None = None,
    overwrite: bool = False,
    revision: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Profile a dense model and cut its FFNs into modules; write the statistics to ``output``, whole or not at all.

    Processes that torchrun or accelerate launch started share the text and the layers; the first alone writes.
    ``write_report`` writes ``report``, which is not written without it.

    Returns what ``modmoe analyze --json`` prints: the sizes, the tokens of each task, and where things were written.
    """
    progress = progress or silent
    check_output(output, overwrite=overwrite)
    source = open_source(recipe, revision, progress)
    with ranks.open_first_output(output, overwrite=overwrite) as partial_directory:
        analysis = analyze_source(recipe, source, progress, partial_directory)
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
