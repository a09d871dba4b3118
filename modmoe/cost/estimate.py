"""Memory and time that a recipe's steps need on a device, whether they fit, and what to change where they do not."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from modmoe.analysis.source import needs_gradients, with_num_modules
from modmoe.conversion.attach_adapters import adapter_config, describe_adapter
from modmoe.conversion.table import find_conversion
from modmoe.cost.devices import DEVICES, Device, find_device
from modmoe.cost.formulas import Need, Sizes, estimate_convert, estimate_finetune, sizes_of
from modmoe.errors import RecipeError
from modmoe.models.loading import is_adapter, skeleton
from modmoe.recipe.schema import FinetuneRecipe, Recipe
from modmoe.storage.checkpoint import adapter_headers, resolve_base, resolve_source
from modmoe.training.trainable import choose_what_learns

Estimate = Callable[[Recipe, Device], Need]
Changes = Callable[[Recipe], list[list[tuple[str, Recipe]]]]


def add_estimate(
    plan: dict[str, Any], recipe: Recipe, name: str | None = None, revision: str | None = None
) -> dict[str, Any]:
    """Return a conversion's plan with ``device`` and ``estimate``: what it needs, and the training behind it.

    Training is estimated where the recipe sets any of its keys.

    Args:
        plan: what a dry run returned.
        recipe: the resolved recipe.
        name: a device as for ``modmoe.cost.devices.find_device``; None is this machine's.
        revision: of a source on the Hub.

    Raises:
        RecipeError: there is no such device.
        CheckpointError: the source cannot be read.
    """
    device, recipe = find_device(name or "auto"), with_num_modules(recipe, revision)
    assert recipe.source is not None
    sizes = _sizes(recipe.source, recipe, revision)
    estimate: dict[str, Any] = {
        "convert": _stage(recipe, device, lambda r, d: estimate_convert(r, sizes, d), _converting)
    }
    if recipe.finetune != FinetuneRecipe():
        made = sizes_after(recipe, sizes, plan)
        teacher = _teacher(recipe)

        def train(recipe: Recipe, device: Device) -> Need:
            count = count_trainable(recipe, made, plan)
            return estimate_finetune(recipe.finetune, made, device, trainable=count, teacher=teacher)

        estimate["finetune"] = _stage(recipe, device, train, _training)
    return {**plan, **_about(device), "estimate": estimate}


def plan_finetune(recipe: Recipe, directory: str, name: str | None = None) -> dict[str, Any]:
    """Return what training would do and need, from config.json alone: its steps, tokens, and what learns.

    Raises:
        RecipeError: the model cannot be trained in this way, or there is no such device.
        CheckpointError: it cannot be read.
    """
    source, device = resolve_source(directory), find_device(name or "auto")
    if is_adapter(source) and recipe.finetune.train == "full":
        recipe = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, train="adapters"))
    base, trust = resolve_base(source) if is_adapter(source) else source, recipe.trust_remote_code
    sizes, teacher = _sizes(str(base), recipe), _teacher(recipe)

    def learning(recipe: Recipe) -> int:
        if is_adapter(source):
            return sum(math.prod(shape) for shape, _ in adapter_headers(source).values())
        model = skeleton(base, trust_remote_code=trust)
        if recipe.finetune.train == "adapters":
            return int(describe_adapter(adapter_config(recipe.adapter, model), model)["parameters"]["adapter"])
        lora = choose_what_learns(model, base, recipe)
        if lora is None:
            return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        kept = sum(
            weight.numel()
            for name, weight in model.named_parameters()
            if any(f".{part}." in name for part in lora.modules_to_save or ())
        )
        layers: list[Any] = [model.get_submodule(path) for path in lora.target_modules or ()]
        added: int = sum(lora.r * sum(layer.weight.shape) for layer in layers)
        return kept + added

    def train(recipe: Recipe, device: Device) -> Need:
        return estimate_finetune(recipe.finetune, sizes, device, trainable=learning(recipe), teacher=teacher)

    wanted = recipe.finetune
    return {
        "dry_run": True,
        "train": wanted.train,
        "parameters": {"trainable": learning(recipe), "total": sizes.parameters},
        "steps": wanted.max_steps,
        "tokens": wanted.max_steps * wanted.batch_size * wanted.sequence_length,
        **_about(device),
        "estimate": {"finetune": _stage(recipe, device, train, _training)},
    }


def sizes_after(recipe: Recipe, sizes: Sizes, plan: Mapping[str, Any]) -> Sizes:
    """Return the sizes of the model that a conversion writes: at their most, since the overlap is not known yet."""
    counts = plan["parameters"]
    stored = counts.get("stored_at_most", counts.get("stored", sizes.parameters))
    body = sizes.body  # a mixture keeps what a token computes with
    keeps = find_conversion(recipe.method).body
    if keeps == "active":
        body += counts["active"] - sizes.parameters
    elif keeps == "stored":
        # training computes every stored module and masks what is off
        body += stored - sizes.parameters
    layer = sizes.layer + (stored - sizes.parameters) // sizes.layers
    neurons = round(sizes.neurons * body / sizes.body) if body > sizes.body else sizes.neurons
    return dataclasses.replace(sizes, parameters=stored, body=body, layer=layer, neurons=neurons)


def count_trainable(recipe: Recipe, sizes: Sizes, plan: Mapping[str, Any]) -> int:
    """Return the trainable parameters of the model that a plan writes; a LoRA is on the FFNs' three matrices."""
    train, experts = recipe.finetune.train, int(plan.get("num_experts", 0))
    if train == "full":
        return sizes.parameters
    if train == "adapters":
        return int(plan["parameters"].get("adapter", 0))
    hidden = max(16, 4 * experts)
    router = hidden * (sizes.width + experts) if recipe.router.kind == "mlp" else experts * sizes.width
    routers = 0 if recipe.router.routing == "task" else sizes.layers * router
    if train == "router":
        return routers
    return routers + 3 * recipe.finetune.lora_rank * (sizes.width + sizes.neurons) * sizes.layers


def _sizes(source: str, recipe: Recipe, revision: str | None = None) -> Sizes:
    return sizes_of(skeleton(resolve_source(source, revision), trust_remote_code=recipe.trust_remote_code))


def _teacher(recipe: Recipe) -> Sizes | None:
    wanted = recipe.finetune
    if wanted.distill_from is None or wanted.distill_weight == 0:
        return None
    return _sizes(wanted.distill_from, recipe)


def _about(device: Device) -> dict[str, Any]:
    return {"device": device.name, "device_memory_bytes": device.memory_bytes}


def _stage(recipe: Recipe, device: Device, estimate: Estimate, changes: Changes) -> dict[str, Any]:
    """Return one step's numbers, whether it fits, and in words what to change where it does not."""
    need = estimate(recipe, device)
    fits, verdict = need.device_bytes <= device.memory_bytes, "fits"
    if not fits:
        kinds = [[words for words, other in kind if _holds(estimate, other, device)] for kind in changes(recipe)]
        larger = [f"take {name}" for name, other in DEVICES.items() if _holds(estimate, recipe, other)]
        remedies = [words[0] for words in (*kinds, larger) if words]
        verdict = (
            f"does not fit: about {need.device_bytes / 1e9:.1f} GB of {device.memory_bytes / 1e9:.1f} GB; "
            f"{', or '.join(remedies) if remedies else 'take several devices or a smaller model'}"
        )
    return {
        "device_bytes": round(need.device_bytes),
        "host_bytes": round(need.host_bytes),
        "seconds_low": round(sum(need.low_s.values()), 1),
        "seconds_high": round(sum(need.high_s.values()), 1),
        "bound_by": max(need.high_s, key=lambda bound: need.high_s[bound]),
        "fits": fits,
        "verdict": verdict,
    }


def _holds(estimate: Estimate, recipe: Recipe, device: Device) -> bool:
    try:
        return estimate(recipe, device).device_bytes <= device.memory_bytes
    except RecipeError:  # a dense model has no router that could learn
        return False


def _converting(recipe: Recipe) -> list[list[tuple[str, Recipe]]]:
    """Return what can be changed to convert with less memory: of each kind the least change first."""
    text, kinds = recipe.calibration, [_smaller(recipe, "calibration")]
    if not needs_gradients(recipe) and find_conversion(recipe.method).has_by_layer and not text.by_layer:
        by_layer = dataclasses.replace(recipe, calibration=dataclasses.replace(text, by_layer=True))
        kinds.append([("set calibration.by_layer to true", by_layer)])
    return kinds


def _training(recipe: Recipe) -> list[list[tuple[str, Recipe]]]:
    """Return what can be changed to train with less memory: of each kind the least change first."""
    kinds = [_smaller(recipe, "finetune")]
    for train in ("lora", "router") if recipe.finetune.train == "full" else ():
        other = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, train=train))
        words = f"set finetune.train to {train}"
        kinds.append([(words, other), *((f"{words} and {more}", less) for more, less in _smaller(other, "finetune"))])
    return kinds


def _smaller(recipe: Recipe, part: str) -> list[tuple[str, Recipe]]:
    """Return recipes of ever smaller batches, down to one sequence."""
    values: Any = getattr(recipe, part)
    sizes = [values.batch_size >> halvings for halvings in range(1, values.batch_size.bit_length())]
    return [
        (
            f"lower {part}.batch_size to {size}",
            dataclasses.replace(recipe, **{part: dataclasses.replace(values, batch_size=size)}),
        )
        for size in sizes
    ]
