"""Training routed adapters: the frozen base model with an adapter that was attached before or is attached now."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from modmoe.conversion.attach_adapters import adapter_config, attach_to, write_adapters
from modmoe.errors import RecipeError
from modmoe.models.loading import is_adapter, load
from modmoe.recipe.schema import Recipe
from modmoe.storage.checkpoint import resolve_base

LOG = logging.getLogger(__name__)


def load_with_adapter(source: Path, name: str, recipe: Recipe, device: torch.device) -> Any:
    """Return a PeftModel whose adapter is trained: that of an adapter directory, or a fresh one on a model without one.

    Args:
        source: the directory.
        name: the base that a fresh adapter records: the Hub id or the path that the user gave.
        recipe: its ``adapter`` part says which one is attached; an adapter directory has its own.
        device: where the model runs.

    Raises:
        RecipeError: neither the directory nor the recipe has an adapter, or the two have different ones.
    """
    if is_adapter(source):
        model: Any = load(source, trust_remote_code=recipe.trust_remote_code, device=device.type, trainable=True)
        method = model.peft_config["default"].method
        if recipe.adapter.method not in (None, method):
            raise RecipeError("adapter.method", f"{source} has {method}, not {recipe.adapter.method}", "leave it out")
        return model
    if recipe.adapter.method is None:
        raise RecipeError(
            "finetune.train",
            f"{source} has no adapters",
            "name one with --adapter METHOD, or train router, lora or full",
        )
    model = load(source, trust_remote_code=recipe.trust_remote_code, device=device.type)
    torch.manual_seed(recipe.seed)
    return attach_to(model, adapter_config(recipe.adapter, model), name)


def write_trained(model: Any, source: Path, directory: Path, recipe: Recipe) -> None:
    """Write the trained adapter to ``directory``; the base model's weights have not changed and are not written."""
    write_adapters(model, resolve_base(source) if is_adapter(source) else source, directory, recipe)
