"""TRL's SFTTrainer with the losses of this package, states that restore every weight, and no chatter."""

# Shapes: B sequences of a batch, T tokens of a sequence, N counted tokens, V vocabulary

from __future__ import annotations

import contextlib
import copy
import logging
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from trl.trainer.sft_trainer import SFTTrainer

from modmoe.errors import RecipeError
from modmoe.finetune.data import IGNORED
from modmoe.finetune.losses import balance_loss, router_entropy, token_losses
from modmoe.modeling.modeling_modmoe import ModularMixin
from modmoe.recipe import FinetuneRecipe

LOG = logging.getLogger(__name__)


class DivergedError(RecipeError):
    """The loss is not a finite number; going on from a state would lead there again."""


class ModularTrainer(SFTTrainer):
    """Trains a tied or dense model on a batch of ``modmoe.finetune.data.Collator``.

    The sum that learns is (1 - distill_weight) text + distill_weight distill + balance_weight balance, see
    ``modmoe.finetune.losses``; each part is logged.
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
        # with every expert chosen always there is nothing to balance
        self.balances = self.routed is not None and self.top_k < self.routed.config.num_experts
        # routed adapters hang their routers' losses on the backbone's output themselves; here they are only told
        self.adapters = getattr(base, "routed_context", None)
        self._parts: dict[str, list[Tensor]] = defaultdict(list)
        # both print to stdout, which belongs to the command's result
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)

    def train_from(self, state: Path | None) -> None:
        """Train to the last step, from the beginning or from a state."""
        if state is not None:
            saved = TrainerState.load_from_json(str(state / "trainer_state.json"))
            if saved.global_step >= self.args.max_steps:
                # the trainer would go one step too far
                self._load_from_checkpoint(str(state))
                self.state = saved
                return
        self.train(resume_from_checkpoint=None if state is None else str(state))

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the loss of a batch.

        The logits are asked for as a user would: TRL's own loss calls the backbone inside the model, past the forward
        that tells a tied model's layers what they are to read.

        Raises:
            DivergedError: the loss is not a finite number.
        """
        inputs = dict(inputs)
        labels_BT, mask_BT = inputs.pop("labels"), inputs.pop("token_mask")
        if self.adapters is not None:
            self.adapters.mark_answers(labels_BT)
        with self.routed.record_router_logits() if self.routed is not None else contextlib.nullcontext():
            outputs = model(**inputs, use_cache=False)
        router_logits = dict(self.routed.routing_state.logits) if self.routed is not None else {}
        counts_BT = labels_BT[:, 1:] != IGNORED
        logits_NV, target_N = outputs.logits[:, :-1][counts_BT], labels_BT[:, 1:][counts_BT]
        teacher_NV = None
        if self.teacher is not None:
            inputs.pop("expert_ids", None)
            with torch.no_grad():
                teacher_NV = self.teacher(**inputs, use_cache=False).logits[:, :-1][counts_BT]
        text, distill = token_losses(logits_NV, target_N, teacher_NV, self.recipe.temperature)
        loss = text
        parts = {"loss_text": text}
        if distill is not None:
            loss = (1 - self.recipe.distill_weight) * text + self.recipe.distill_weight * distill
            parts["loss_distill"] = distill
        if self.adapters is not None and self.adapters.loss is not None:
            parts["loss_routers"] = self.adapters.loss
        if router_logits:
            mask_T = mask_BT.flatten()
            parts["router_entropy"] = router_entropy(router_logits, mask_T)
            if self.balances:
                balance = balance_loss(router_logits, mask_T, self.top_k)
                parts["loss_balance"] = balance
                if self.recipe.balance_weight > 0:
                    loss = loss + self.recipe.balance_weight * balance
        if not bool(torch.isfinite(loss)):
            rate = self.args.learning_rate
            raise DivergedError(
                f"finetune: the loss is {loss.item()} at step {self.state.global_step + 1}; lower "
                f"finetune.learning_rate (now {rate:g}), or look for damage in the weights or the text."
            )
        if self.model.training:
            for name, part in parts.items():
                self._parts[name].append(part.detach())
            # a field of the trainer's state, so that it goes on after a resume
            self.state.num_input_tokens_seen += int(mask_BT.sum())
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of the loss's parts since the last time."""
        for name, values in self._parts.items():
            logs[name] = torch.stack(values).mean().item()
        self._parts.clear()
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Restore every weight, whatever names the checkpoint has.

        transformers 5.23 loads a state's tensors by the names in the file and passes over those that do not fit, which
        leaves the experts of its own MoE models as they were (https://github.com/huggingface/transformers/issues/48805).
        """
        if isinstance(self.model, PeftModel):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        config = copy.deepcopy(self.model.config)
        saved = type(self.model).from_pretrained(resume_from_checkpoint, config=config, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict())

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: a state is no model that is given away."""

    def _send_telemetry(self) -> None:
        """Tell nobody that this was run."""


class Report(TrainerCallback):
    """Tells the caller how far training is, and logs the losses."""

    def __init__(self, progress: Any) -> None:
        """Call ``progress(message, done, total)`` after each step."""
        self.progress = progress

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a step."""
        self.progress("training", state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Say the losses in one line."""
        if not logs or "loss" not in logs:
            return
        names = {"loss_text": "text", "loss_distill": "distill", "loss_balance": "balance"}
        names |= {"loss_routers": "routers", "router_entropy": "entropy"}
        parts = ", ".join(f"{short} {logs[name]:.3f}" for name, short in names.items() if name in logs)
        LOG.info("step %d of %d: loss %.3f (%s)", state.global_step, state.max_steps, logs["loss"], parts)
