"""The dense model that a converted one learns from."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

from modmoe.errors import ModmoeError, RecipeError
from modmoe.modeling.modeling_modmoe import ModularMixin
from modmoe.models.loading import load, load_tokenizer


def load_teacher(
    source: str, student: Any, tokenizer: Any, *, trust_remote_code: bool, dtype: torch.dtype
) -> PreTrainedModel:
    """Load the dense model, frozen and in evaluation mode, onto the student's device.

    Raises:
        RecipeError: its vocabulary is not the student's, or it is routed by task.
        CheckpointError: it cannot be loaded.
    """
    teacher: Any = load(source, trust_remote_code=trust_remote_code, dtype=dtype, device=student.device.type)
    place = f"finetune.distill_from: {source}"
    if isinstance(teacher, ModularMixin) and teacher.config.routing == "task":
        raise RecipeError(str(place), "is routed by task", "name the dense model")
    sizes = [model.get_output_embeddings().weight.shape[0] for model in (teacher, student)]
    if sizes[0] != sizes[1]:
        raise RecipeError(
            str(place),
            f"predicts {sizes[0]} tokens, the model that learns {sizes[1]}",
            "name a model of the same vocabulary",
        )
    try:
        known = load_tokenizer(source, trust_remote_code=trust_remote_code).get_vocab()
    except ModmoeError:
        known = None  # without a tokenizer beside the teacher, only the size of the vocabulary can be compared
    if known is not None and known != tokenizer.get_vocab():
        raise RecipeError(str(place), "its tokenizer's vocabulary is another", "name a model of the same vocabulary")
    teacher.requires_grad_(False)
    frozen: PreTrainedModel = teacher
    return frozen
