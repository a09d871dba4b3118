"""How well a model predicts each task's text, and how fast."""

# Shapes: B sequences of a batch, T tokens of a sequence, N counted tokens, V vocabulary

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from modmoe.analysis.text.calibration import load_task, padding_of, warn_of_length
from modmoe.analysis.text.encoding import EncodedRow, encode_rows
from modmoe.analysis.text.reading import Reading, summaries
from modmoe.analysis.text.rows import TaskRows
from modmoe.errors import CheckpointError, RecipeError, did_you_mean
from modmoe.modeling.modeling_modmoe import ModularMixin
from modmoe.models.loading import check_models, load, load_tokenizer
from modmoe.runtime import ranks
from modmoe.runtime.progress import Progress
from modmoe.training.data import IGNORED, Collator
from modmoe.training.losses import token_losses


@ranks.joined()
def evaluate(
    source: str,
    tasks: dict[str, str],
    *,
    baseline: str | None = None,
    tokens: int = 32768,
    sequence_length: int = 256,
    batch_size: int = 8,
    device: str = "auto",
    trust_remote_code: bool = False,
    expert: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a checkpoint on each task's text, as ``modmoe eval --json`` prints it.

    Returns ``tasks: {NAME: {loss, perplexity, bits_per_byte, tokens, tokens_per_second}}``, and more where rows have a
    prompt, see ``evaluate_model``; and ``read``, what ``source`` read of each task.
    Processes that torchrun or accelerate launch started share the batches; all get the same, but for the speed's noise.
    With a ``baseline``, measured on the same rows with its own tokenizer, ``baseline`` holds the same for it, and each
    task has ``ratio``, its loss over the baseline's.

    Raises:
        RecipeError: no such device or expert, or a model routed by task is not told which expert a task is for.
        CheckpointError, CalibrationError: a model or a file cannot be read.
    """

    readings: dict[str, Reading] = {}

    def measure(place: str, expert: str | None, read: dict[str, Reading] | None) -> dict[str, dict[str, float]]:
        if progress is not None:
            progress(f"loading {place}")
        model = load(place, trust_remote_code=trust_remote_code, device=device)
        tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
        return evaluate_model(
            model,
            tokenizer,
            tasks,
            tokens=tokens,
            sequence_length=sequence_length,
            batch_size=batch_size,
            expert=expert,
            seed=seed,
            progress=progress,
            readings=read,
        )

    check_models([source, baseline], trust_remote_code=trust_remote_code)
    found = measure(source, expert, readings)
    read = summaries(readings)
    if baseline is None:
        return {"tasks": found, "read": read}
    wanted = measure(baseline, None, None)
    for name, numbers in found.items():
        numbers["ratio"] = numbers["loss"] / wanted[name]["loss"] if wanted[name]["loss"] else math.inf
    return {"tasks": found, "baseline": wanted, "read": read}


def evaluate_model(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: Mapping[str, str],
    *,
    tokens: int = 32768,
    sequence_length: int = 256,
    batch_size: int = 8,
    expert: str | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    readings: dict[str, Reading] | None = None,
) -> dict[str, dict[str, float]]:
    """Measure a model in memory on each task's text; it is left as it was.

    What counts is every token of a text but its first, the completion of a prompt, and the assistant's turns of
    messages, as ``modmoe.analysis.text.encoding.encode_tasks`` tells; rows without any of it are left out. Rows are cut
    to ``sequence_length`` tokens and drawn in an order from ``seed`` until ``tokens`` of them count. A sequence router
    decides anew every ``routing_chunk`` tokens here, also where a prompt is known.

    Args:
        model: a dense or tied causal LM.
        tokenizer: its tokenizer.
        tasks: task name to file.
        tokens: at most so many counted tokens of a task, but for the first row.
        sequence_length: tokens of a row.
        batch_size: rows of a batch; moves no result but by rounding.
        expert: name of the expert that a tied model uses throughout; None leaves it to the router, or to the expert of
            the task's name where the model is routed by task.
        seed: of the order of the rows.
        progress: called with a message, the tokens read and the tokens in all.
        readings: filled with what is read of each task, which then is told too.

    Returns, for each task, ``loss`` in nats a counted token, ``perplexity``, ``bits_per_byte`` of the counted text in
    UTF-8, ``tokens`` counted, and ``tokens_per_second`` of the forward passes, counted or not, without padding. Where
    rows have a prompt also ``exact_match``, the share of them, 0 to 1, whose completion greedy decoding would give word
    for word, as far as it lies within ``sequence_length``.

    Raises:
        RecipeError: no such expert, or none is named for a task that has no expert of its own.
        CalibrationError: a file cannot be read, or none of its tokens counts.
        CheckpointError: a loss is not a finite number.
    """
    for name in tasks:
        expert_of(model, name, expert)  # before the first task has taken its time
    results = {}
    warn_of_length(model.config, sequence_length, "sequence_length")
    size = _rows_of(model)
    for name, file in tasks.items():
        rows, read = _draw(load_task(name, file), tokenizer, tokens, sequence_length, seed, size)
        if readings is not None:
            readings[name] = read
            read.tell()
        with reading(model, expert_of(model, name, expert)):
            report = None if progress is None else partial(progress, f"measuring {name}, tokens")
            try:
                results[name] = _measure(model, tokenizer, rows, batch_size, report)
            except CheckpointError as error:
                raise CheckpointError(f"{model.config.name_or_path}: task {name}", str(error)) from None
    return results


def decode_speed(model: Any, tokenizer: Any, prompt: str, new_tokens: int = 64, *, repeats: int = 3) -> float:
    """Return tokens a second of greedy generation with a cache: the median of ``repeats``, the prompt's pass included.

    Exactly ``new_tokens`` tokens are made each time. A model routed by task must have its expert set.
    """
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    settings: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True}
    settings.update(min_new_tokens=new_tokens, max_new_tokens=new_tokens)
    if getattr(model.generation_config, "pad_token_id", None) is None:
        settings["pad_token_id"] = padding_of(tokenizer, _rows_of(model))
    keys = ("input_ids", "attention_mask")
    arguments = {key: inputs[key] for key in keys if key in inputs}
    taken_s = []
    with reading(model, None), torch.no_grad():
        model.generate(**arguments, **{**settings, "min_new_tokens": 1, "max_new_tokens": 1})
        for _ in range(repeats):
            start_s = _now(model)
            model.generate(**arguments, **settings)
            taken_s.append(_now(model) - start_s)
    return new_tokens / statistics.median(taken_s)


def expert_of(model: PreTrainedModel, task: str, expert: str | None) -> str | None:
    """Return the expert that reads a task, None where the model itself decides.

    Raises:
        RecipeError: the model has no such expert, or it is routed by task and has none for this one.
    """
    tied = _tied_in(model)
    if tied is None:
        if expert is not None:
            raise RecipeError("--expert", f"'{expert}' is given, but the model is dense and has no experts")
        return None
    names = list(tied.config.expert_names)
    if expert is not None:
        if expert not in names:
            raise RecipeError("--expert", f"no expert '{expert}'", did_you_mean(expert, names))
        return expert
    if tied.config.routing != "task" or (tied.routing_state.expert is not None and task not in names):
        return None
    if task not in names:
        raise RecipeError(
            f"tasks.{task}",
            "is no expert of this model, which is routed by task",
            f"name the task as one of {', '.join(names)}, or pass --expert with one of them",
        )
    return task


@contextlib.contextmanager
def reading(model: Any, expert: str | None) -> Iterator[None]:
    """Put a model in evaluation mode, with one expert where it is named, and back as it was at the end."""
    was_training = model.training
    model.eval()
    tied = _tied_in(model)
    before = None if tied is None else tied.routing_state.expert
    if tied is not None and expert is not None:
        tied.set_expert(expert)
    try:
        yield
    finally:
        if tied is not None:
            tied.set_expert(before)
        model.train(was_training)


def _tied_in(model: Any) -> Any:
    """Return the tied model itself, or the one that an adapter is attached to; None where there is none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base if isinstance(base, ModularMixin) else None


def _draw(
    rows: TaskRows, tokenizer: Any, tokens: int, sequence_length: int, seed: int, num_embeddings: int
) -> tuple[list[EncodedRow], Reading]:
    """Return rows to measure, shortest first, and what was read."""
    reading = Reading(rows, tokenizer, learns=True, length=sequence_length)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = [index for index in order if reading.is_wanted(index)]
    drawn: list[EncodedRow] = []
    encoded = encode_rows(tokenizer, rows, wanted, longest=sequence_length, num_embeddings=num_embeddings)
    with contextlib.closing(encoded):  # type: ignore[type-var]
        for row in encoded:
            if drawn and reading.num_counted + sum(row.counted) > tokens:
                break
            if reading.add(row):
                drawn.append(row)
    reading.check()
    # rows of like length go together, so that little is padded
    return sorted(drawn, key=lambda row: len(row.input_ids)), reading


@torch.no_grad()
def _measure(
    model: PreTrainedModel,
    tokenizer: Any,
    rows: list[EncodedRow],
    batch_size: int,
    report: Callable[[int, int], None] | None,
) -> dict[str, float]:
    collator = Collator(padding=padding_of(tokenizer, _rows_of(model)), packing=False)
    losses, read, taken_s = [torch.zeros((), dtype=torch.float64)], 0, 0.0
    exact_prompted = torch.zeros(2, dtype=torch.float64)
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    total = sum(len(row.input_ids) for row in rows)
    if report is not None:
        report(0, total)
    mine = [batch for number, batch in enumerate(batches) if ranks.is_mine(number)]
    for number, batch in enumerate([*mine[:1], *mine]):
        inputs = collator([{"input_ids": row.input_ids, "labels": _labels(row)} for row in batch])
        ids_BT, mask_BT = inputs["input_ids"].to(model.device), inputs["attention_mask"].to(model.device)
        start_s = _now(model)
        logits_BTV: Tensor = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
        stop_s = _now(model)
        if number == 0:
            continue  # the first pass of a process prepares much that is not the model's speed
        taken_s += stop_s - start_s
        read += sum(len(row.input_ids) for row in batch)
        if report is not None:
            report(min(read * ranks.num_ranks(), total), total)
        labels_BT = inputs["labels"].to(model.device)
        counts_BT = labels_BT[:, 1:] != IGNORED
        logits_NV, target_N = logits_BTV[:, :-1][counts_BT], labels_BT[:, 1:][counts_BT]
        mean, _ = token_losses(logits_NV, target_N)
        wrong_BT = torch.zeros_like(counts_BT)
        wrong_BT[counts_BT] = logits_NV.argmax(-1) != target_N
        # the first token that can be told is told in plain text, and belongs to the prompt where there is one
        has_prompt_B = ~counts_BT[:, 0]
        exact_B = has_prompt_B & ~wrong_BT.any(1)
        exact_prompted += torch.stack([exact_B.sum(), has_prompt_B.sum()]).double().cpu()
        losses.append(mean.double().cpu() * int(counts_BT.sum()))
    loss_sum = float(ranks.from_steps(ranks.add_up(ranks.in_steps(torch.stack(losses)).sum(1))))
    speed = float(ranks.add_up(torch.tensor(read / max(taken_s, 1e-9), dtype=torch.float64)))
    exact, prompted = ranks.add_up(exact_prompted).tolist()
    counted = sum(sum(row.counted) for row in rows)
    num_bytes = sum(size for row in rows for size, counts in zip(row.num_bytes, row.counted, strict=True) if counts)
    loss = loss_sum / counted
    if not math.isfinite(loss):
        raise CheckpointError(
            f"the model's loss is {loss}, no number to compare: its weights or config.json are damaged, which modmoe "
            "doctor looks for, or its numbers are too large for its dtype."
        )
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "bits_per_byte": loss_sum / math.log(2) / max(num_bytes, 1),
        "tokens": counted,
        "tokens_per_second": speed,
        **({"exact_match": exact / prompted} if prompted else {}),
    }


def _labels(row: EncodedRow) -> list[int]:
    return [token if counts else IGNORED for token, counts in zip(row.input_ids, row.counted, strict=True)]


def _rows_of(model: Any) -> int:
    return int(model.get_input_embeddings().weight.shape[0])


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
