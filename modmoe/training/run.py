"""Training a converted model, or a dense one for comparison: from a checkpoint to a checkpoint of the same form."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from trl.trainer.sft_config import SFTConfig

from modmoe.analysis.text.calibration import padding_of, warn_of_length
from modmoe.analysis.text.reading import Reading, summaries, tell
from modmoe.errors import RankError, RecipeError, is_out_of_memory
from modmoe.formats.tied_code import check_auto_map, own_files, write_code
from modmoe.models.counts import tensor_bytes
from modmoe.models.loading import check_models, is_adapted, is_adapter, is_tied_type, load, load_tokenizer, pick_device
from modmoe.recipe.record import save_recipe
from modmoe.recipe.schema import Recipe
from modmoe.runtime import ranks
from modmoe.runtime.launch import check_precision
from modmoe.runtime.memory import names_what_to_lower
from modmoe.runtime.preflight import check_states
from modmoe.runtime.progress import Progress, silent
from modmoe.storage.checkpoint import (
    Checkpoint,
    CheckpointWriter,
    copy_companions,
    read_config,
    resolve_source,
    write_json,
)
from modmoe.storage.seal import clear, is_marked
from modmoe.storage.staging import check_output, check_space
from modmoe.training import curves
from modmoe.training.adapters import load_with_adapter, write_trained
from modmoe.training.data import Collator, keeps_rows_apart, rows_of, training_set
from modmoe.training.evaluation.task_loss import evaluate_model
from modmoe.training.resume import all_states, describe_run, disk_bytes, find_state, states_of, step_of
from modmoe.training.teacher import load_teacher
from modmoe.training.trainable import choose_what_learns, is_routed_by_task
from modmoe.training.trainer import DivergedError, ModularTrainer, Report, WholeRun

LOG = logging.getLogger(__name__)
_EVAL_TOKENS = 16384
_SHOWN_ROWS = 8


def finetune(
    source: str,
    output: str,
    recipe: Recipe,
    *,
    eval_tasks: dict[str, str],
    resume: bool,
    overwrite: bool,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train a checkpoint on the recipe's tasks and write one of the same form, whole or not at all.

    Weights learn in float32 (with bfloat16 products on a GPU that has them) and are written in the source's own type.
    Under torchrun or accelerate launch the ranks share each batch; the first alone writes.

    Args:
        source: a tied checkpoint, a dense one with ``train: full`` or ``lora``, or another's mixture of experts with
            ``full`` or ``router``.
        output: a directory that is free; states lie in ``<output>.states`` until it is whole.
        recipe: its ``finetune`` part, tasks, seed, device and trust.
        eval_tasks: task name to file; each is measured before and after.
        resume: go on from the last state that an interrupted run left, bit for bit; without one, begin anew.
        overwrite: replace what is in ``output``.
        progress: called with a message and, where they are known, the steps done and the steps in all.

    Returns ``steps``, ``tokens`` seen, ``seconds`` of this call, ``parameters: {trainable, total}``, ``loss: {first,
    last}``, ``output``, and ``tasks: {NAME: {before, after}}`` of mean losses where there are ``eval_tasks``.

    Raises:
        RecipeError: the model cannot be trained in this way, a task is no expert, the recipe is not that of the run to
            go on with, or the loss is not finite.
        CheckpointError, CalibrationError: a model or a file cannot be read.
    """
    progress = progress or silent
    started_s = time.monotonic()
    check_output(output, overwrite=overwrite)
    curves.check_tracker(recipe.finetune.report_to)
    directory = resolve_source(source)
    states = states_of(output)
    if ranks.is_first():
        check_states(states, overwrite=overwrite, resume=resume)
    with _quiet(), ranks.joined(), ranks.open_first_output(output, overwrite=overwrite, spent=states) as partial:
        kind, count = (RankError if ranks.num_ranks() > 1 else RecipeError), ranks.num_ranks()
        try:
            with names_what_to_lower(recipe, "finetune", kind, count):
                result = _run(directory, partial, states, recipe, eval_tasks, resume, progress)
            ranks.meet()
        except BaseException as error:
            if ranks.is_first():
                _say_what_is_left(error, states)
            raise
    return {**result, "output": str(output), "seconds": round(time.monotonic() - started_s, 2)}


def _say_what_is_left(error: BaseException, states: Path) -> None:
    left = all_states(states)
    if not left and is_marked(states):
        clear(states)
    elif left and not isinstance(error, DivergedError):
        # a lower batch or length would be another run, which cannot resume these states
        where = " where there is more memory" if is_out_of_memory(error.__cause__ or error) else ""
        error.add_note(f"Training up to step {step_of(left[-1])} is kept in {states}; go on with --resume{where}.")


@dataclass(frozen=True, slots=True, eq=False)
class _Subject:
    """The model that is trained, and what it is trained on."""

    model: Any
    lora: LoraConfig | None
    """The LoRA to attach; None where there is none."""
    tokenizer: Any
    teacher: Any
    """The dense model whose predictions are learned; None where there is none."""
    packing: bool
    read: Callable[..., Dataset]
    """Reads the tasks anew; with ``marked`` each sequence says of which rows it is."""


def _run(
    source: Path,
    partial: Path,
    states: Path,
    recipe: Recipe,
    eval_tasks: dict[str, str],
    resume: bool,
    progress: Progress,
) -> dict[str, Any]:
    recipe = _settle(source, recipe)
    progress("loading")
    device = pick_device(recipe.device)
    subject = _open_subject(source, recipe, device)
    progress("reading the tasks")
    readings: dict[str, Reading] = {}
    dataset = subject.read(readings=readings)
    tell(readings)
    state = _state_to_go_on_from(states, describe_run(recipe, str(source), dataset), resume)
    losses: dict[str, dict[str, float]] = {}
    eval_readings: dict[str, Reading] = {}
    if eval_tasks:
        before = _losses(subject.model, subject.tokenizer, eval_tasks, recipe, progress, eval_readings)
        losses = {name: {"before": loss} for name, loss in before.items()}
    total = subject.model.num_parameters()
    trainer = _trainer_of(subject, dataset, recipe, states, device, progress)
    sizes = {
        "trainable": sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad),
        "total": total,
    }
    if ranks.is_first():
        _check_room(trainer.model, source, partial, states, recipe, sizes["trainable"])
    ranks.meet()
    try:
        reported = recipe.finetune.report_to if ranks.is_first() else "none"
        with curves.tracked(trainer, reported, states, goes_on=state is not None), ranks.in_step():
            trainer.train_from(state)
    except DivergedError as error:
        raise DivergedError(_explain(error, subject.read, recipe, states), error.step, error.good_step) from error
    progress("writing")
    model, is_sharded = _collect(trainer, source, recipe, subject.lora)
    if ranks.is_first() and recipe.finetune.train == "adapters":
        write_trained(model, source, partial, recipe)
    elif ranks.is_first():
        _write(model, source, partial, recipe)
    ranks.meet()
    if eval_tasks:
        if is_sharded:
            model = load(partial, trust_remote_code=recipe.trust_remote_code, device=device.type)
        for name, loss in _losses(model, subject.tokenizer, eval_tasks, recipe, progress).items():
            losses[name]["after"] = loss
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    result = {
        "steps": trainer.state.global_step,
        "tokens": trainer.state.num_input_tokens_seen,
        "parameters": sizes,
        "loss": {"first": history[0]["loss"], "last": history[-1]["loss"]},
        **({"tasks": losses} if losses else {}),
        "read": summaries(readings),
        **({"read_eval": summaries(eval_readings)} if losses else {}),
    }
    if ranks.is_first():
        # states keep the keys of entries sorted; sorted here too, resumed and unbroken runs write the same bytes
        log = [dict(sorted(entry.items())) for entry in history]
        write_json(partial / "modmoe_training.json", {**result, "log": log})
    return result


def _settle(source: Path, recipe: Recipe) -> Recipe:
    """Return the recipe with what follows from the source; RecipeError for what cannot be trained."""
    if is_adapted(source):
        raise RecipeError(str(source), "was exported with its adapter inside", "train the adapter it was made from")
    if is_adapter(source) and recipe.finetune.train == "full":
        # the base model's weights are elsewhere, so only the adapter can be trained
        recipe = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, train="adapters"))
    if recipe.finetune.batch_size % ranks.num_ranks():
        raise RecipeError(
            "finetune.batch_size",
            f"{recipe.finetune.batch_size} sequences do not divide among {ranks.num_ranks()} processes",
            "give a multiple",
        )
    return recipe


def _open_subject(source: Path, recipe: Recipe, device: torch.device) -> _Subject:
    """Load the model, its tokenizer and its teacher, and prepare the reading of the tasks."""
    options, trust = recipe.finetune, recipe.trust_remote_code
    distills_from = options.distill_from if options.distill_weight > 0 else None
    check_models([source, distills_from], trust_remote_code=trust)
    model, lora = _open(source, recipe, device)
    tokenizer = load_tokenizer(source, trust_remote_code=trust)
    teacher = None
    if distills_from is not None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        dtype = torch.bfloat16 if has_bfloat16 else torch.float32
        teacher = load_teacher(distills_from, model, tokenizer, trust_remote_code=trust, dtype=dtype)
    packing = options.packing and all(map(keeps_rows_apart, [model, *([teacher] if teacher is not None else [])]))
    if options.packing and not packing:
        LOG.info("packing is off: this architecture would read other rows of a packed sequence")
    warn_of_length(model.config, options.sequence_length, "finetune.sequence_length")
    read = functools.partial(
        training_set,
        tokenizer,
        recipe.tasks,
        sequence_length=options.sequence_length,
        num_sequences=options.max_steps * options.batch_size,
        seed=recipe.seed,
        experts=model.config.expert_names if is_routed_by_task(model) else None,
        packing=packing,
        num_embeddings=model.get_input_embeddings().weight.shape[0],
    )
    return _Subject(model, lora, tokenizer, teacher, packing, read)


def _state_to_go_on_from(states: Path, description: dict[str, Any], resume: bool) -> Path | None:
    """Return to all processes the state that the first one found; None where the run begins anew."""
    state = find_state(states, description, resume) if ranks.is_first() else None
    step = int(ranks.from_first(torch.tensor(0 if state is None else step_of(state))))
    return states / f"checkpoint-{step}" if step else None


def _trainer_of(
    subject: _Subject, dataset: Dataset, recipe: Recipe, states: Path, device: torch.device, progress: Progress
) -> Any:
    rows, width = subject.model.get_input_embeddings().weight.shape
    return ModularTrainer(
        model=subject.model,
        args=training_arguments(states, recipe, device, width),
        data_collator=Collator(padding=padding_of(subject.tokenizer, rows), packing=subject.packing),
        train_dataset=dataset,
        processing_class=subject.tokenizer,
        peft_config=subject.lora,
        callbacks=[Report(progress)],
        recipe=recipe.finetune,
        teacher=subject.teacher,
    )


def _check_room(model: Any, source: Path, partial: Path, states: Path, recipe: Recipe, trainable: int) -> None:
    """Raise RecipeError where the states and the output do not fit on the disk."""
    states_bytes = disk_bytes(model, recipe, not isinstance(model, PeftModel), len(all_states(states)))
    output_bytes = 4 * trainable if recipe.finetune.train == "adapters" else tensor_bytes(Checkpoint(source))
    check_space(partial, states_bytes + output_bytes)


def _collect(trainer: Any, source: Path, recipe: Recipe, lora: LoraConfig | None) -> tuple[Any, bool]:
    """Return the trained model, whole on the first process and any LoRA merged, and whether it was sharded."""
    model, is_sharded = trainer.model, trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
    if is_sharded:
        weights = trainer.accelerator.get_state_dict(model)  # all ranks give, the first gets
        if ranks.is_first():
            model = _open(source, recipe, torch.device("cpu"))[0]
            model = model if lora is None else get_peft_model(model, lora)
            model.load_state_dict(weights)
    is_merged = recipe.finetune.train != "adapters" and isinstance(model, PeftModel)
    if is_merged and (ranks.is_first() or not is_sharded):
        model = model.merge_and_unload()
    return model, is_sharded


def _open(source: Path, recipe: Recipe, device: torch.device) -> tuple[Any, LoraConfig | None]:
    """Return the model with what learns marked, and the LoRA to attach where there is one."""
    if recipe.finetune.train == "adapters":
        return load_with_adapter(source, str(recipe.source or source), recipe, device), None
    if is_adapter(source):
        raise RecipeError("finetune.train", f"{source} is an adapter, so its weights are not here", "train adapters")
    config = read_config(source)
    if is_tied_type(config.get("model_type")):
        check_auto_map(config)  # checked now rather than after the training, when the code is written
    model = load(source, trust_remote_code=recipe.trust_remote_code, dtype=torch.float32, device=device.type)
    return model, choose_what_learns(model, source, recipe)


def _explain(error: DivergedError, read: Any, recipe: Recipe, states: Path) -> str:
    """Return one line: what was not finite, at which step, in which rows, and the last state with good weights."""
    wanted = recipe.finetune
    last = error.step * wanted.batch_size
    dataset = read(marked=True)
    sequences = list(WholeRun(len(dataset), last, recipe.seed))[-wanted.batch_size :]
    rows = []
    for task, numbers in rows_of(dataset, sequences, list(recipe.tasks)).items():
        shown = ", ".join(map(str, numbers[:_SHOWN_ROWS])) + (", ..." if len(numbers) > _SHOWN_ROWS else "")
        rows.append(f"{task} {shown}")
    good = [state for state in all_states(states) if step_of(state) <= error.good_step]
    rate = wanted.learning_rate
    return (
        f"finetune: {error} at step {error.step} (rows of the batch: {'; '.join(rows)}); lower finetune.learning_rate "
        f"({'chosen by the width' if rate is None else f'now {rate:g}'}), or look for damage in the weights or the "
        f"text. The last good state is {good[-1] if good else 'the source itself'}."
    )


def default_learning_rate(train: str, width: int) -> float:
    """Return the peak learning rate where the recipe names none: 0.1 / width, between 5e-5 and 1e-3, for all weights.

    Wide models bear smaller steps; in between this runs through what is usual, 1e-3 at width 64 and 5e-5 at 2048.
    Routers and LoRA take three times as much.
    """
    return min(max(0.1 / width, 5e-5), 1e-3) * (1 if train == "full" else 3)


def training_arguments(states: Path, recipe: Recipe, device: torch.device, width: int) -> SFTConfig:
    """Return the arguments of TRL's trainer: one step a batch, cosine decay, float32, bfloat16 products on a GPU."""
    check_precision()
    wanted = recipe.finetune
    rate = wanted.learning_rate if wanted.learning_rate is not None else default_learning_rate(wanted.train, width)
    arguments = SFTConfig(
        output_dir=str(states),
        max_steps=wanted.max_steps,
        per_device_train_batch_size=wanted.batch_size // ranks.num_ranks(),
        gradient_accumulation_steps=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=round(wanted.warmup_fraction * wanted.max_steps),
        weight_decay=0.0,
        max_grad_norm=1.0,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        bf16=device.type == "cuda" and torch.cuda.is_bf16_supported(),
        save_steps=wanted.save_steps,
        logging_steps=max(1, wanted.max_steps // 20),
        logging_nan_inf_filter=False,
        report_to=wanted.report_to if ranks.is_first() else "none",
        project=curves.PROJECT,
        disable_tqdm=True,
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=wanted.sequence_length,
        activation_checkpointing=False,
        dataloader_pin_memory=device.type == "cuda",
        router_aux_loss_coef=0.0,
    )
    # with several GPUs in sight the trainer would split batches between copies of the model; one is used
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _losses(
    model: PreTrainedModel,
    tokenizer: Any,
    tasks: dict[str, str],
    recipe: Recipe,
    progress: Progress,
    readings: dict[str, Reading] | None = None,
) -> dict[str, float]:
    found = evaluate_model(
        model,
        tokenizer,
        tasks,
        tokens=_EVAL_TOKENS,
        sequence_length=recipe.finetune.sequence_length,
        batch_size=recipe.finetune.batch_size,
        seed=recipe.seed,
        progress=progress,
        readings=readings,
    )
    return {name: numbers["loss"] for name, numbers in found.items()}


@torch.no_grad()
def _write(model: PreTrainedModel, source: Path, partial: Path, recipe: Recipe) -> None:
    """Write weights, code and what belongs to them; the model in memory is rounded to what is written."""
    before = Checkpoint(source)
    kinds = [before.dtype(name) for name in before]
    floating = [kind for kind in kinds if kind.is_floating_point]
    usual = max(set(floating), key=floating.count)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    writer = CheckpointWriter(partial)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    for tensor in state.values():
        if tensor.is_floating_point() and usual.itemsize < tensor.element_size():
            tensor.copy_(tensor.to(usual))
    for name, tensor in revert_weight_conversion(model, state).items():
        kind = before.dtype(name) if name in before else usual
        writer.write(name, tensor.to(kind) if tensor.is_floating_point() else tensor)
    writer.finish(before.config)
    copy_companions(source, partial)
    if is_tied_type(before.config.get("model_type")):
        write_code(partial, before.config, source)
    else:
        for name, text in own_files(before.config, source).items():
            (partial / name).write_text(text, encoding="utf-8")
    if (source / "modmoe.yaml").is_file():
        shutil.copyfile(source / "modmoe.yaml", partial / "modmoe.source.yaml")
    save_recipe(partial, recipe)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' progress bars where there is no terminal; the caller reports progress itself."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging

    transformers_logging: Any = logging

    if sys.stderr.isatty():
        yield
        return
    shown = not are_progress_bars_disabled(), transformers_logging.is_progress_bar_enabled()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown[0]:
            enable_progress_bars()
        if shown[1]:
            transformers_logging.enable_progress_bar()
