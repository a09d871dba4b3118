"""Attaching routed adapters to a checkpoint: what comes out is a PEFT directory, ready to be trained."""

from __future__ import annotations

import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from modmoe.analysis.run import save_recipe, silent
from modmoe.errors import AdapterError, RecipeError
from modmoe.models.loading import load, skeleton
from modmoe.recipe.schema import AdapterRecipe, Recipe
from modmoe.storage.checkpoint import copy_companions, resolve_source
from modmoe.storage.staging import check_output, open_output


def check_method(recipe: Recipe) -> None:
    """Raise RecipeError where a recipe names no adapter to attach."""
    if recipe.adapter.method is None:
        raise RecipeError("adapter.method: is not given; method adapters needs one.")


def attach_adapters(
    recipe: Recipe, output: str, *, overwrite: bool, dry_run: bool, revision: str | None, progress: Any = None
) -> dict[str, Any]:
    """Attach the recipe's adapter to its source and write it to ``output`` as PEFT does, whole or not at all.

    The source is left unchanged and is not copied: the adapter names it. With ``dry_run`` nothing is written, and
    the source's config.json is enough.

    Returns ``method``, ``settings``, ``targets``, ``layers`` attached to, ``parameters: {adapter, base, share}``,
    and ``verified: {max_abs_logit_diff}`` between the model with the fresh adapter and without, which is 0.

    Raises:
        AdapterError: an unknown method or setting, layers that are not there, a budget too small.
        RecipeError, CheckpointError: no method; a source that cannot be read.
    """
    progress = progress or silent
    started_s = time.monotonic()
    check_output(output, overwrite=overwrite)
    assert recipe.source is not None
    source = resolve_source(recipe.source, revision)
    progress("checking the source")
    outline = skeleton(source, trust_remote_code=recipe.trust_remote_code)
    config = adapter_config(recipe.adapter, outline)
    plan = describe(config, outline)
    if dry_run:
        return {"dry_run": True, **plan}
    progress("attaching")
    torch.manual_seed(recipe.seed)
    model: Any = load(source, trust_remote_code=recipe.trust_remote_code, device="cpu")
    if hasattr(model, "set_ffn_way"):
        model.set_ffn_way("masked")  # the way that adapters inside its FFNs need, so that nothing else differs
        if model.config.routing == "task" and model.config.default_expert is None:
            model.set_expert(model.config.expert_names[0])  # any will do for the comparison below
    # some tokens spread over the vocabulary, always the same
    ids_BT = (torch.arange(24).reshape(2, 12) * 7919 + 13) % model.get_input_embeddings().weight.shape[0]
    with torch.no_grad():
        before = model(ids_BT, use_cache=False).logits
        attached = attach_to(model, config, recipe.source, revision)
        difference = float((attached(ids_BT, use_cache=False).logits - before).abs().max())
    if difference:
        raise AdapterError(f"{config.method}: the fresh adapter changes the logits by {difference:.3g}; it must not.")
    adapter_bytes = plan["parameters"]["adapter"] * torch.float32.itemsize
    with open_output(output, overwrite=overwrite, size_bytes=adapter_bytes) as partial:
        progress("writing")
        write_adapters(attached, source, partial, recipe)
    return {
        **plan,
        "output": str(output),
        "verified": {"max_abs_logit_diff": difference},
        "seconds": round(time.monotonic() - started_s, 2),
    }


def adapter_config(wanted: AdapterRecipe, model: PreTrainedModel) -> Any:
    """Return the PEFT configuration that a recipe asks for; its rank is solved where there is a budget."""
    from modmoe.adapters.budget import make_config, solve_budget

    if wanted.method is None:
        raise RecipeError("adapter.method: is not given; name one with --adapter METHOD.")
    config = make_config(wanted.method, wanted.settings)
    if wanted.budget is not None:
        return solve_budget(wanted.method, model, wanted.budget, **wanted.settings)
    count, base = config.num_parameters(model), model.num_parameters()
    if count > _MOST_TIMES * base:
        raise AdapterError(
            f"adapter.settings: {wanted.method} would have {count:,} parameters with these, and the model has "
            f"{base:,}; choose a smaller r or fewer experts."
        )
    return config


_MOST_TIMES = 100
"""An adapter with more parameters than so many of its models is a mistake, and fills the memory."""


def attach_to(model: PreTrainedModel, config: Any, source: str, revision: str | None = None) -> Any:
    """Return the PeftModel of ``model`` with a fresh adapter, which names ``source`` as its base."""
    from peft import get_peft_model

    attached = get_peft_model(model, config)
    made = attached.peft_config["default"]
    made.base_model_name_or_path = str(Path(source).resolve()) if os.path.exists(source) else source
    made.revision = revision
    return attached


def write_adapters(model: Any, base: Path, directory: Path, recipe: Recipe) -> None:
    """Write a PeftModel's adapter, the base's tokenizer and the recipe to ``directory``."""
    model.save_pretrained(str(directory))
    (directory / "README.md").unlink(missing_ok=True)  # a form to fill in; the export writes one that says something
    copy_companions(base, directory)
    save_recipe(directory, recipe)


def describe(config: Any, model: PreTrainedModel) -> dict[str, Any]:
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
