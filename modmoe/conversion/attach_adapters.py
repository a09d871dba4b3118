"""Attaching routed adapters to a checkpoint: what comes out is a PEFT directory, ready to be trained."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modmoe.conversion.steps import Draft, Steps
from modmoe.errors import AdapterError, RecipeError
from modmoe.models.opened import OpenedModel
from modmoe.recipe.record import save_recipe
from modmoe.recipe.schema import AdapterRecipe, Recipe
from modmoe.runtime import ranks
from modmoe.runtime.progress import Progress
from modmoe.storage.checkpoint import copy_companions


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """A model, and the adapter that fits it."""

    model: OpenedModel
    revision: str | None
    config: Any
    """The PEFT configuration."""
    facts: dict[str, Any]

    @property
    def size_bytes(self) -> int:
        return int(self.facts["parameters"]["adapter"]) * torch.float32.itemsize


_ROUNDING = 16
"""How far logits may be apart that differ in nothing but rounding: in units of rounding of the largest."""


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe; RecipeError where it names no adapter to attach."""
    if recipe.adapter.method is None:
        raise RecipeError("adapter.method", "is not given", "name one with --adapter METHOD")
    return recipe


def open_base(recipe: Recipe, revision: str | None, progress: Progress, *, headers_only: bool) -> _Opened:
    """Open the model to attach to; its config.json is enough.

    Raises:
        AdapterError: an unknown method or setting, layers that are not there, a budget too small.
        RecipeError, CheckpointError: no method; a source that cannot be read.
    """
    assert recipe.source is not None
    model = OpenedModel.at(recipe.source, revision, trust_remote_code=recipe.trust_remote_code)
    progress("checking the source")
    outline = model.outline()
    config = adapter_config(recipe.adapter, outline)
    return _Opened(model, revision, config, describe_adapter(config, outline))


def make(recipe: Recipe, opened: _Opened, directory: Path, progress: Progress) -> Draft | None:
    """Return the draft of a fresh adapter as PEFT writes it; the model is not copied, the adapter names it.

    The facts are ``method``, ``settings``, ``targets``, ``layers`` attached to and ``parameters: {adapter, base,
    share}``; the proof is ``max_abs_logit_diff`` between the model with the fresh adapter and without, which is 0 but
    for rounding.

    Raises AdapterError where it is more.
    """
    if not ranks.is_first():
        return None
    assert recipe.source is not None
    progress("attaching")
    torch.manual_seed(recipe.seed)
    model = opened.model.load(device="cpu")
    if hasattr(model, "set_ffn_way"):
        model.set_ffn_way("masked")  # the way that adapters inside its FFNs need, so that nothing else differs
        if model.config.routing == "task" and model.config.default_expert is None:
            model.set_expert(model.config.expert_names[0])  # any will do for the comparison below
    # some tokens spread over the vocabulary, always the same
    ids_BT = (torch.arange(24).reshape(2, 12) * 7919 + 13) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        before = model(ids_BT, use_cache=False).logits
        attached = attach_to(model, opened.config, recipe.source, opened.revision)
        difference = float((attached(ids_BT, use_cache=False).logits - before).abs().max())
    # the adapter adds zero, but a library may choose another kernel for the same product, which rounds otherwise
    if not difference <= _ROUNDING * torch.finfo(before.dtype).eps * max(1.0, float(before.abs().max())):
        raise AdapterError(
            opened.config.method, f"the fresh adapter changes the logits by {difference:.3g}; it must not"
        )
    return Draft(
        plan=None,
        write=lambda output: write_adapters(attached, opened.model.directory, output, recipe),
        prove=lambda output: {"max_abs_logit_diff": difference},
        facts=opened.facts,
    )


def adapter_config(adapter: AdapterRecipe, model: PreTrainedModel) -> Any:
    """Return the PEFT configuration that a recipe asks for; its rank is solved where there is a budget."""
    from modmoe.adapters.budget import make_config, solve_budget

    if adapter.method is None:
        raise RecipeError("adapter.method", "is not given", "name one with --adapter METHOD")
    config = make_config(adapter.method, adapter.settings)
    if adapter.budget is not None:
        return solve_budget(adapter.method, model, adapter.budget, **adapter.settings)
    count, base = config.num_parameters(model), model.num_parameters()
    if count > _MOST_TIMES * base:
        raise AdapterError(
            "adapter.settings",
            f"{adapter.method} would have {count:,} parameters with these, and the model has {base:,}",
            "choose a smaller r or fewer experts",
        )
    return config


_MOST_TIMES = 100
"""An adapter with more parameters than so many of its models is a mistake, and fills the memory."""


def attach_to(model: PreTrainedModel, config: Any, source: str, revision: str | None = None) -> Any:
    """Return the PeftModel of ``model`` with a fresh adapter, which names ``source`` as its base."""
    from peft import get_peft_model

    attached = get_peft_model(model, config)
    written = attached.peft_config["default"]
    written.base_model_name_or_path = str(Path(source).resolve()) if os.path.exists(source) else source
    written.revision = revision
    return attached


def write_adapters(model: Any, base: Path, directory: Path, recipe: Recipe) -> None:
    """Write a PeftModel's adapter, the base's tokenizer and the recipe to ``directory``."""
    model.save_pretrained(str(directory))
    (directory / "README.md").unlink(missing_ok=True)  # a form to fill in; the export writes one that says something
    copy_companions(base, directory)
    save_recipe(directory, recipe)


def describe_adapter(config: Any, model: PreTrainedModel) -> dict[str, Any]:
    """Return what an adapter comes to on a model: its settings, where it is attached, and the parameters."""
    from modmoe.adapters.peft_binding import parameter_shapes

    shapes = parameter_shapes(config, model)
    paths = {name.rpartition(".")[0] for name in shapes}
    count = sum(torch.Size(shape).numel() for shape in shapes.values())
    base = model.num_parameters()
    return {
        "method": config.method,
        "model_type": model.config.model_type,
        "settings": dataclasses.asdict(config.settings()),
        "targets": sorted({path.rpartition(".")[2] for path in paths}),
        "layers": len(paths),
        "parameters": {"adapter": count, "base": base, "share": round(count / base, 6)},
    }


STEPS = Steps(settle=settle, open=open_base, describe=lambda recipe, opened: dict(opened.facts), make=make)
"""Attaching routed adapters."""
