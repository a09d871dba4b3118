"""The weights of a model that a run trains, and the LoRA that it attaches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import PreTrainedModel

from modmoe.adapters.mechanism.targets import find_base_router
from modmoe.errors import RecipeError
from modmoe.modeling.modeling_modmoe import ModularMixin
from modmoe.models.families import family_of, layers_of
from modmoe.models.ffn_layout import dense_layout, plain_layout, prefix_of
from modmoe.recipe.schema import Recipe


def is_routed_by_task(model: PreTrainedModel) -> bool:
    """Return whether a model is tied and routed by task, so that it has no router."""
    return isinstance(model, ModularMixin) and model.config.routing == "task"


def choose_what_learns(model: PreTrainedModel, source: Path, recipe: Recipe) -> LoraConfig | None:
    """Freeze the weights that are not trained; return the LoRA to attach, if any.

    Raises RecipeError where routers shall be trained and there are none.
    """
    train = recipe.finetune.train
    routers = _routers(model)
    if train == "router" and not routers:
        why = "is routed by task and has no router" if is_routed_by_task(model) else "is dense and has no router"
        raise RecipeError("finetune.train", f"{source} {why}", "train lora or full")
    if train == "lora":
        embeddings: Any = model.get_input_embeddings()
        width = embeddings.weight.shape[1]
        if recipe.finetune.lora_rank > width:
            raise RecipeError(
                "finetune.lora_rank",
                f"{recipe.finetune.lora_rank} is more than the model's width, {width}",
                "choose less",
            )
        return LoraConfig(
            task_type="CAUSAL_LM",
            r=recipe.finetune.lora_rank,
            lora_alpha=2 * recipe.finetune.lora_rank,
            target_modules=_ffn_matrices(model, recipe),
            modules_to_save=["router"] if routers and isinstance(model, ModularMixin) else None,
            fan_in_fan_out=not isinstance(model, ModularMixin)
            and family_of(model.config.to_dict(), recipe.family).transposed,
        )
    for name, weight in model.named_parameters():
        weight.requires_grad_(train == "full" or name in routers)
    return None


def _routers(model: PreTrainedModel) -> list[str]:
    """Return the names of the routers' parameters, of a tied model or of a mixture of experts of transformers."""
    if isinstance(model, ModularMixin):
        is_routed = model.config.routing != "task"
        return [name for name, _ in model.named_parameters() if is_routed and ".router." in name]
    routers = {id(router) for block in model.modules() if (router := find_base_router(block)) is not None}
    return [
        f"{path}.{name}"
        for path, submodule in model.named_modules()
        if id(submodule) in routers
        for name, _ in submodule.named_parameters()
    ]


def _ffn_matrices(model: PreTrainedModel, recipe: Recipe) -> list[str]:
    """Return the full names of the linear layers of all FFNs: in a tied model those of the shared modules."""
    config = model.config.to_dict()
    if isinstance(model, ModularMixin):
        layouts = [plain_layout(prefix_of(config, layer)) for layer in range(layers_of(config))]
    else:
        family = family_of(config, recipe.family)
        layouts = [dense_layout(family, layer) for layer in range(layers_of(config))]
    paths = {path for path, _ in model.named_modules()}
    return [path for layout in layouts for path in sorted({*map(layout.path, layout.roles)} & paths)]
