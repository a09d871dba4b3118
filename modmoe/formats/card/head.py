"""The YAML head of a model card: what the Hub reads of it, after https://huggingface.co/docs/hub/model-cards."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCardData, try_to_load_from_cache

from modmoe.formats.pushed_files import CARD, RECIPES, hub_id
from modmoe.storage.documents import YamlError, parse_yaml

RESULTS = "modmoe_eval.json"
"""What ``modmoe eval DIR --task ... --json`` printed, where a user keeps it beside the model for its card."""
TRAINING = "modmoe_training.json"
"""What a fine-tuning writes beside its model."""
_INHERITED = {"license": r"[a-z0-9][a-z0-9.-]*", "license_name": r"[\w. -]+", "license_link": r"[^\s<>\"']+"}
_METRICS = {
    "loss": "Loss, nats a token",
    "perplexity": "Perplexity",
    "bits_per_byte": "Bits per byte",
    "exact_match": "Exact match",
}


def head(
    name: str,
    *,
    base: str | None,
    relation: str,
    library: str,
    tags: Sequence[str],
    sources: Sequence[Path],
    results: Mapping[str, Mapping[str, float]],
) -> ModelCardData:
    """Return the head of a card.

    Args:
        name: what the results are of.
        base: the Hub id of the model it came from; None where it has none.
        relation: how it came from there: ``finetune``, ``adapter``, ``merge`` or ``quantized``, as the Hub knows it.
        library: what loads it.
        tags: for the Hub's search.
        sources: directories from the nearest model to the first one; the first card with a licence gives it, and the
            first recipe the data sets.
        results: task to measure to value, see ``results_of``.
    """
    tasks = _tasks(sources)
    known = {task: _dataset(place) for task, place in tasks.items()}
    measured = [
        EvalResult(
            task_type="text-generation",
            dataset_type=known.get(task) or "text",
            dataset_name=task,
            metric_type=metric,
            metric_name=_METRICS[metric],
            metric_value=float(f"{value:.6g}"),
        )
        for task, numbers in results.items()
        for metric, value in numbers.items()
        if metric in _METRICS and isinstance(value, int | float) and math.isfinite(value)
    ]
    datasets = sorted({dataset for dataset in known.values() if dataset})
    return ModelCardData(
        base_model=base,
        base_model_relation=relation if base else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=list(tags),
        datasets=datasets or None,
        model_name=name if measured else None,
        eval_results=measured or None,
        **_licence(sources, base),
    )


def results_of(directory: Path) -> dict[str, dict[str, float]]:
    """Return task to measure to value: of the last ``modmoe eval`` kept beside a model, else of its fine-tuning."""
    found = {task: numbers for task, numbers in _read(directory / RESULTS).items() if isinstance(numbers, dict)}
    if found:
        return found
    trained = _read(directory / TRAINING)
    return {
        task: {"loss": item["after"]} for task, item in trained.items() if isinstance(item, dict) and "after" in item
    }


def _read(path: Path) -> dict[str, Any]:
    """Return a results file's tasks; nothing where there are none, since a card does without."""
    try:
        tasks = json.loads(path.read_text(encoding="utf-8"))["tasks"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    return tasks if isinstance(tasks, dict) else {}


def _tasks(sources: Sequence[Path]) -> dict[str, str]:
    for path in (source / name for source in sources for name in RECIPES):
        tasks = _yaml(path.read_text(encoding="utf-8", errors="replace")).get("tasks") if path.is_file() else None
        if isinstance(tasks, dict) and tasks:
            return {str(task): str(place) for task, place in tasks.items()}
    return {}


def _dataset(place: str) -> str | None:
    """Return the Hub id in a task's place: hub:ID[:CONFIG][:SPLIT]."""
    return hub_id(place.removeprefix("hub:").split(":")[0]) if place.startswith("hub:") else None


def _licence(sources: Sequence[Path], base: str | None) -> dict[str, Any]:
    cards = [source / CARD for source in sources]
    if base is not None:
        cached = try_to_load_from_cache(base, CARD)
        cards += [Path(cached)] if isinstance(cached, str) else []
    for card in cards:
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        match = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
        known = _yaml(match[1]) if match else {}
        if isinstance(known.get("license"), str):
            kept = {key: known[key] for key in _INHERITED if isinstance(known.get(key), str)}
            return {key: value for key, value in kept.items() if re.fullmatch(_INHERITED[key], value, re.ASCII)}
    return {}


def _yaml(text: str) -> dict[str, Any]:
    try:
        values = parse_yaml(text)
    except YamlError:
        return {}
    return values if isinstance(values, dict) else {}
