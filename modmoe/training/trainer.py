"""TRL's SFTTrainer with the losses of this package, states that restore every weight, and no chatter."""

# Shapes: B sequences of a batch, T tokens of a sequence, N counted tokens, V vocabulary

from __future__ import annotations

import contextlib
import copy
import logging
import math
import pickle
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from trl.trainer.sft_trainer import SFTTrainer

from modmoe.errors import CheckpointError, RecipeError, reason_of
from modmoe.modeling.modeling_modmoe import ModularMixin
from modmoe.recipe.schema import FinetuneRecipe
from modmoe.runtime.progress import Progress
from modmoe.storage.seal import empty
from modmoe.training.curves import Curves
from modmoe.training.data import IGNORED
from modmoe.training.losses import balance_loss, token_losses
from modmoe.training.resume import publish_state

LOG = logging.getLogger(__name__)


class DivergedError(RecipeError):
    """The loss or the gradient is not a finite number; resuming from a state would fail in the same way."""

    def __init__(self, message: str, step: int, good_step: int) -> None:
        """Take the step, and the last step after which the weights are known to be good."""
        super().__init__(message)
        self.step, self.good_step = step, good_step


class ModularTrainer(SFTTrainer):
    """Trains a tied or dense model on a batch of ``modmoe.training.data.Collator``.

    The loss is (1 - distill_weight) text + distill_weight distill + balance_weight balance, see
    ``modmoe.training.losses``; each part is logged.
    """

    model: Any
    # one batch is one step here, so nothing is accumulated
    loss_is_scaled_for_ga: Any = True

    def __init__(
        self, *args: Any, recipe: FinetuneRecipe, teacher: PreTrainedModel | None = None, **kwargs: Any
    ) -> None:
        """Take what SFTTrainer takes, the recipe of the losses, and the dense model to learn from."""
        super().__init__(*args, **kwargs)
        self.recipe, self.teacher = recipe, teacher
        base: Any = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        self.routed = base if isinstance(base, ModularMixin) and base.config.routing != "task" else None
        self.top_k = 0 if self.routed is None else int(self.routed.config.num_experts_per_tok)
        # where every expert is always chosen there is nothing to balance
        self.balances = self.routed is not None and self.top_k < self.routed.config.num_experts
        # routed adapters add their routers' losses to the backbone's output themselves; here they get the factors
        self.adapters = getattr(base, "routed_context", None)
        self.curves = Curves(base)
        self.num_ranks = int(self.accelerator.num_processes)
        self._states = Path(str(self.args.output_dir))
        self._beside = self._states / "unfinished"
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        # both print to stdout, which belongs to the command's result
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def train_from(self, state: Path | None) -> None:
        """Train to the last step, from the beginning or from a state.

        Raises CheckpointError where the state is damaged, or holds what only unpickling would bring back.
        """
        if state is not None:
            saved = TrainerState.load_from_json(str(state / "trainer_state.json"))
            if saved.global_step >= self.args.max_steps:
                # the trainer would take one step too many
                self._load_from_checkpoint(str(state))
                self.state = saved
                return
        try:
            # it reads states with weights_only=True alone, which makes tensors and plain values and executes nothing
            self.train(resume_from_checkpoint=None if state is None else str(state))
        except (pickle.UnpicklingError, EOFError) as error:
            raise CheckpointError(
                str(state),
                f"is damaged, or not a state that was saved here ({reason_of(error, 60)})",
                "delete it and go on from the one before, or start anew without --resume",
            ) from error

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Return one order for the whole run, so that ranks that share its batches read what one alone would."""
        wanted = self.args.max_steps * self.args.train_batch_size * self.num_ranks
        rows: Any = self.train_dataset
        return WholeRun(len(rows), wanted, self.args.seed)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch.

        With several ranks it is this one's part of the loss over all ranks' tokens, times their number, since their
        gradients are averaged: a rank with more tokens counts for more.

        The logits come from the model's own forward: TRL's loss calls the backbone directly and skips the part of a
        tied model's forward that tells its layers which tokens count.

        Raises:
            DivergedError: the loss is not a finite number.
        """
        inputs = dict(inputs)
        labels_BT, mask_BT = inputs.pop("labels"), inputs.pop("token_mask")
        if self.adapters is not None:
            self.adapters.mark_answers(labels_BT)
        nothing: contextlib.nullcontext[dict[int, Tensor]] = contextlib.nullcontext({})
        with nothing if self.routed is None else self.routed.record_router_logits() as found:
            outputs = model(**inputs, use_cache=False)
        router_logits = dict(found)
        counts_BT = labels_BT[:, 1:] != IGNORED
        logits_NV, target_N = outputs.logits[:, :-1][counts_BT], labels_BT[:, 1:][counts_BT]
        teacher_NV = None
        if self.teacher is not None:
            inputs.pop("expert_ids", None)
            with torch.no_grad():
                teacher_NV = self.teacher(**inputs, use_cache=False).logits[:, :-1][counts_BT]
        text, distill = token_losses(logits_NV, target_N, teacher_NV, self.recipe.temperature)
        counted, seen = self._add_up(torch.tensor([len(target_N), int(mask_BT.sum())], device=text.device)).tolist()
        scale = len(target_N) * self.num_ranks / max(counted, 1) if self.num_ranks > 1 else 1.0
        loss = text = text * scale
        parts = {"loss/text": text}
        if distill is not None:
            distill = distill * scale
            loss = (1 - self.recipe.distill_weight) * text + self.recipe.distill_weight * distill
            parts["loss/distillation"] = distill
        if self.adapters is not None and self.adapters.loss is not None:
            parts["loss/routers"] = self.adapters.loss
        if router_logits and self.balances:
            add_up = self._add_up if self.num_ranks > 1 else None
            balance = balance_loss(router_logits, mask_BT.flatten(), self.top_k, add_up) * self.num_ranks
            parts["loss/balance"] = balance
            if self.recipe.balance_weight > 0:
                loss = loss + self.recipe.balance_weight * balance
        # all ranks stop together: one that continued alone would wait for the others' gradients
        joint = self._add_up(loss.detach().double()) / self.num_ranks
        if not bool(torch.isfinite(joint)):
            # this loss comes from the weights after the step before
            step = self.state.global_step + 1
            raise DivergedError(f"the loss is {joint.item()}", step, step - 2)
        if self.model.training:
            for name, part in parts.items():
                self._parts[name].append(part.detach())
            # a field of the trainer's state, so that it goes on after a resume
            self.state.num_input_tokens_seen += seen
            if (self.state.global_step + 1) % self.args.logging_steps == 0:
                self.curves.read(router_logits, mask_BT.flatten())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of the loss's parts since the last time, over all ranks, and what the routers do now."""
        for name, values in self._parts.items():
            logs[name] = (self._add_up(torch.stack(values).mean()) / self.num_ranks).item()
        self._parts.clear()
        logs.update(self.curves.take(self._add_up))
        super().log(logs, start_time)

    def _clip_grad_norm(self, model: Any) -> Any:
        """Raise DivergedError for a gradient that is not finite, before it reaches the weights."""
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        if norm is not None and not math.isfinite(float(norm)):
            step = self.state.global_step + 1
            raise DivergedError(f"the gradient is {float(norm)}", step, step - 1)
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._beside)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write a state beside the others, which it joins when all of it is on the disk."""
        if self.args.should_save:
            empty(self._states, f"{self._beside.name}/")
        try:
            super()._save_checkpoint(model, trial)  # type: ignore[no-untyped-call]
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                publish_state(self._beside / f"checkpoint-{self.state.global_step}", self._states)
        finally:
            # the remains of a state that could not be written take up space
            if self.args.should_save:
                empty(self._states, f"{self._beside.name}/")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore every weight, whatever names the checkpoint has.

        transformers 5.23 loads a state's tensors by the names in the file and passes over those that do not fit, which
        leaves the experts of its own MoE models as they were (https://github.com/huggingface/transformers/issues/48805).
        """
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        config = copy.deepcopy(self.model.config)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, config=config, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def _add_up(self, tensor: Tensor) -> Tensor:
        """Return the sum over all ranks; no gradient flows through it."""
        total: Tensor = self.accelerator.reduce(tensor.detach(), "sum") if self.num_ranks > 1 else tensor
        return total

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write no card: a state is not published."""

    def _send_telemetry(self) -> None:
        """Send no telemetry."""


class WholeRun(Sampler[int]):
    """The rows of a run in their order: the whole text again and again, each time in an order drawn anew."""

    def __init__(self, num_rows: int, wanted: int, seed: int) -> None:
        """Yield ``wanted`` numbers below ``num_rows``."""
        self.num_rows, self.wanted, self.seed = num_rows, wanted, seed

    def __len__(self) -> int:
        """Return how many numbers there are."""
        return self.wanted

    def __iter__(self) -> Iterator[int]:
        """Yield the numbers."""
        for start in range(0, self.wanted, self.num_rows):
            generator = torch.Generator().manual_seed(self.seed + start // self.num_rows)
            yield from torch.randperm(self.num_rows, generator=generator)[: self.wanted - start].tolist()


class Report(TrainerCallback):
    """Tells the caller how far training is, and logs the losses."""

    def __init__(self, progress: Progress) -> None:
        """Call ``progress(message, done, total)`` after each step."""
        self.progress = progress
        self._since: tuple[float, int] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self._since = (time.monotonic(), state.num_input_tokens_seen)
        self.progress("training, steps", state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a step; the last one ends the stage, and waits until its losses are said, if they are."""
        if state.global_step < state.max_steps or not control.should_log:
            self.progress("training, steps", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Say the losses and the speed since the last time in one line."""
        if not logs or "loss" not in logs:
            return
        if state.is_world_process_zero and self._since is not None:
            self._say(state, logs, self._since)
        if state.global_step == state.max_steps:
            self.progress("training, steps", state.global_step, state.max_steps)

    def _say(self, state: Any, logs: dict[str, float], since: tuple[float, int]) -> None:
        now_s, seen = time.monotonic(), state.num_input_tokens_seen
        speed = (seen - since[1]) / max(now_s - since[0], 1e-9)
        self._since = (now_s, seen)
        names = {"loss/text": "text", "loss/distillation": "distill", "loss/balance": "balance"}
        names["loss/routers"] = "routers"
        parts = ", ".join(f"{short} {logs[name]:.3f}" for name, short in names.items() if name in logs)
        place = (state.global_step, state.max_steps)
        LOG.info("step %d/%d: loss %.3f (%s), %s tokens/s", *place, logs["loss"], parts, f"{speed:,.0f}")
