"""Parameters and bytes from headers alone: stored, active, materialised, and what fits into a budget.

With n the parameters of a neuron, m the neurons of a module and S_e the modules of expert e, a layer costs

    stored        n m |union of all S_e|           every module once
    materialised  n m sum_e |S_e|                  a copy in every expert, as a conventional mixture of them has
    active        n m |union of the chosen S_e|    what one token needs; a module of two chosen experts counts once

Embeddings, attention and the router are added to each of these. Where a token has the union of several experts, the
modules that all experts have, C, are computed once. A conventional mixture would hold them in one shared expert, and so
they are counted once in what is materialised too: |C| + sum_e |S_e - C|. Where every module is an expert, that is what
is stored.
"""

from __future__ import annotations

import itertools
import math
import re
import types
import typing
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from modmoe.errors import CheckpointError, PartitionError, RecipeError
from modmoe.modeling.configuration_modmoe import ModularFields
from modmoe.models.families import Family, family_of, layers_of, neurons_of
from modmoe.models.ffn_layout import check_ffns, dense_layout, plain_layout, prefix_of
from modmoe.recipe.schema import Recipe
from modmoe.storage.checkpoint import Checkpoint, resolve_source

MOST_SUBSETS = 20_000
"""Above this many choices of top_k experts their largest union is bounded, not searched."""

_ROUTED = re.compile(r"\.experts\.|\.block_sparse_moe\.(input|output)_linear\.")
_FFN = re.compile(r"\.(experts|mlp|block_sparse_moe|shared_mlp|feed_forward|ffn)\.")
"""Routed and shared experts, and the FFNs of dense layers, as mixtures of experts of other formats name them."""
_GATES = re.compile(r"\.(gate|router|shared_expert_gate)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCounts:
    """What one modular FFN holds."""

    stored_modules: int
    """Modules in the checkpoint."""
    active_modules: float
    """Modules of a token, the mean over all choices of top_k experts."""
    active_modules_max: int
    """The most modules that a token can need."""
    materialised_modules: int
    """Modules of all experts added up; see ``count_copies``."""
    module_parameters: int
    """Parameters of one module."""
    router_parameters: int
    """Parameters of the router."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Parameters of a whole model; embeddings that are tied count once."""

    dense: int | None
    """Of the dense model it came from; None where that is not known."""
    stored: int
    """In the checkpoint."""
    active: int
    """Of one token, the mean over all choices of top_k experts, routers included."""
    active_max: int
    """Of one token, at most."""
    materialised: int
    """If every expert had its own copy of its modules; see ``count_copies``."""
    ffn_sparsity: float
    """Share of the dense FFN neurons that a token does not use; for another's MoE, of the FFN weights it stores."""
    total_sparsity: float
    """Share of all dense parameters that a token does not use."""


def mean_union(experts: Sequence[Collection[int]], top_k: int) -> float:
    """Return the mean size of the union of ``top_k`` of the sets, over all choices.

    Set by set it is a sum: module j is missed by the choices that avoid all n_j experts that have it,
    ``C(E - n_j, k) / C(E, k)`` of them.
    """
    holders: dict[int, int] = {}
    for expert in experts:
        for module in expert:
            holders[module] = holders.get(module, 0) + 1
    choices = math.comb(len(experts), top_k)
    if choices == 0:
        return float(len(holders))
    return sum(1 - math.comb(len(experts) - held, top_k) / choices for held in holders.values())


def largest_union(experts: Sequence[Collection[int]], top_k: int) -> int:
    """Return the size of the largest union of ``top_k`` of the sets; beyond MOST_SUBSETS choices an upper bound."""
    everything = len(set().union(*experts)) if experts else 0
    if top_k >= len(experts):
        return everything
    # what all have counts once, so the bound is the size itself where experts share nothing else
    core = len(set(experts[0]).intersection(*experts))
    own = sorted((len(set(expert)) - core for expert in experts), reverse=True)
    bound = min(everything, core + sum(own[:top_k]))
    if math.comb(len(experts), top_k) > MOST_SUBSETS:
        return bound
    masks = [sum(1 << module for module in set(expert)) for expert in experts]
    largest = 0
    for chosen in itertools.combinations(masks, top_k):
        union = 0
        for mask in chosen:
            union |= mask
        largest = max(largest, union.bit_count())
        if largest == bound:
            break
    return largest


def count_copies(own: int, shared: int, num_experts: int, top_k: int, combine: str) -> int:
    """Return the modules of a conventional mixture of the same experts.

    Args:
        own: modules of all experts added up, without those that every expert has.
        shared: modules that every expert has.
        num_experts: experts.
        top_k: experts of a token.
        combine: ``sum``, or ``union``, which has the shared modules once however many experts are chosen.
    """
    return own + shared * (1 if combine == "union" and top_k > 1 else num_experts)


def tensor_parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Return the parameters of each floating-point tensor; an output matrix tied to the embeddings is left out.

    So is the table of a packed export, which is stored in the weights' type.
    """
    floats = (name for name in checkpoint if checkpoint.dtype(name).is_floating_point)
    sizes = {name: math.prod(checkpoint.shape(name)) for name in floats if not name.endswith(".membership")}
    if checkpoint.config.get("tie_word_embeddings") and "lm_head.weight" in sizes and len(sizes) > 1:
        shape = checkpoint.shape("lm_head.weight")
        if any(name.endswith(_EMBEDDINGS) and checkpoint.shape(name) == shape for name in sizes):
            del sizes["lm_head.weight"]
    return sizes


_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "embed_in.weight")


def tensor_bytes(checkpoint: Checkpoint, names: Iterable[str] | None = None) -> int:
    """Return the bytes of the named tensors (all by default), without the headers of their files."""
    chosen = checkpoint if names is None else names
    return sum(math.prod(checkpoint.shape(name)) * checkpoint.dtype(name).itemsize for name in chosen)


def read_experts(checkpoint: Checkpoint) -> list[list[list[int]]]:
    """Return, for each layer and expert of a tied or packed checkpoint, the stored modules that the expert has.

    Raises CheckpointError where a layer has no membership or one of the wrong shape.
    """
    config, layers = checkpoint.config, []
    for layer, stored in enumerate(stored_of(config)):
        name = f"{prefix_of(config, layer)}membership"
        if name not in checkpoint and "modular" in config:
            name = f"{prefix_of(config, layer)}router.membership"
        if name not in checkpoint:
            raise CheckpointError(str(checkpoint.directory), f"'{name}' is missing", "the checkpoint is not whole")
        membership_ES = checkpoint[name]
        if tuple(membership_ES.shape) != (config["num_experts"], stored):
            raise CheckpointError(
                str(checkpoint.directory),
                f"'{name}' has shape {tuple(membership_ES.shape)}, but config.json says "
                f"{(config['num_experts'], stored)}",
            )
        layers.append([[j for j, has in enumerate(row) if has] for row in membership_ES.bool().tolist()])
    return layers


def stored_of(config: Mapping[str, Any]) -> list[int]:
    """Return the modules stored by each layer of a tied checkpoint; CheckpointError where config.json lacks a key."""
    for key in ("num_modules", "module_size", "num_experts", "num_experts_per_tok", "dense_intermediate_size"):
        if not isinstance(config.get(key), int) or config[key] < 1:
            raise CheckpointError("config.json", f"{key} is {config.get(key)!r}", "it must be a positive number")
    if "stored_modules" not in config:
        raise CheckpointError("config.json", "stored_modules is missing", "it must list the modules of each layer")
    for key, kind in typing.get_type_hints(ModularFields).items():
        if key in config and not _is_of(config[key], kind):
            named = kind.__name__ if kind in (int, float, bool, str) else str(kind).replace("typing.", "")
            raise CheckpointError("config.json", f"{key} is {config[key]!r:.60}", f"it must be of the type {named}")
    stored: list[int] = config["stored_modules"]
    return stored


def _is_of(value: Any, kind: Any) -> bool:
    """Return whether a value of a JSON file is of a type, as that of a field of ``ModularFields``."""
    if isinstance(kind, types.UnionType):
        return any(_is_of(value, one) for one in kind.__args__)
    whole = typing.get_origin(kind) or kind
    if whole is float:
        whole = int | float
    if not isinstance(value, whole) or (isinstance(value, bool) and kind is not bool):
        return False
    return not isinstance(value, list) or all(_is_of(item, kind.__args__[0]) for item in value)


def count_layers(checkpoint: Checkpoint, experts: Sequence[Sequence[Sequence[int]]]) -> list[LayerCounts]:
    """Return what each modular FFN of a tied checkpoint holds, given ``read_experts``."""
    config, sizes, counts = checkpoint.config, tensor_parameters(checkpoint), []
    for layer, (stored, chosen) in enumerate(zip(stored_of(config), experts, strict=True)):
        prefix = prefix_of(config, layer)
        neurons = sum(sizes.get(name, 0) for name in plain_layout(prefix).neuron_names())
        neurons += sum(size for name, size in sizes.items() if name.startswith(f"{prefix}experts."))
        if stored and neurons % stored:
            raise CheckpointError(
                str(checkpoint.directory),
                f"layer {layer} has {neurons} FFN parameters, which {stored} modules cannot share",
            )
        top_k = min(config["num_experts_per_tok"], len(chosen))
        core = len(set(chosen[0]).intersection(*chosen)) if chosen else 0
        own = sum(len(expert) - core for expert in chosen)
        counts.append(
            LayerCounts(
                stored_modules=stored,
                active_modules=mean_union(chosen, top_k),
                active_modules_max=largest_union(chosen, top_k),
                materialised_modules=count_copies(own, core, len(chosen), top_k, config.get("combine", "union")),
                module_parameters=neurons // stored if stored else 0,
                router_parameters=sum(size for name, size in sizes.items() if name.startswith(prefix + "router.")),
            )
        )
    return counts


def count_tied(checkpoint: Checkpoint, layers: Sequence[LayerCounts]) -> Counts:
    """Return the parameters of a tied checkpoint, given ``count_layers``."""
    config, stored = checkpoint.config, sum(tensor_parameters(checkpoint).values())
    other = stored - sum(layer.stored_modules * layer.module_parameters for layer in layers)
    routers = sum(layer.router_parameters for layer in layers)
    # a mean output of a skipped module is a cost of conversion, as the router is; the dense model has neither
    means = sum(size for name, size in tensor_parameters(checkpoint).items() if name.endswith(".means"))
    per_neuron = [layer.module_parameters // config["module_size"] for layer in layers]
    dense_ffn = sum(config["dense_intermediate_size"] * size for size in per_neuron)
    active_ffn = sum(layer.active_modules * layer.module_parameters for layer in layers)
    dense = other - routers - means + dense_ffn
    neurons = config["dense_intermediate_size"] * len(layers)
    active_neurons = sum(layer.active_modules for layer in layers) * config["module_size"]
    return Counts(
        dense=dense,
        stored=stored,
        active=round(other + active_ffn),
        active_max=other + sum(layer.active_modules_max * layer.module_parameters for layer in layers),
        materialised=other + sum(layer.materialised_modules * layer.module_parameters for layer in layers),
        ffn_sparsity=1 - active_neurons / neurons if neurons else 0.0,
        total_sparsity=(dense_ffn - active_ffn) / dense if dense else 0.0,
    )


def count_other(checkpoint: Checkpoint) -> Counts:
    """Return the parameters of a checkpoint that is dense, or a mixture of experts of another format.

    One whose neurons were pruned is measured against the dense model it came from.
    """
    counts = count_sizes(tensor_parameters(checkpoint), *routed_of(checkpoint.config))
    pruned = checkpoint.config.get("modmoe_pruned")
    if checkpoint.config.get("modmoe_method") != "prune" or not isinstance(pruned, dict):
        return counts
    neurons, before, dense = (pruned.get(key) for key in ("neurons", "neurons_before", "parameters_before"))
    if not (isinstance(neurons, int) and isinstance(before, int) and isinstance(dense, int) and 0 < neurons <= before):
        return counts
    total = 1 - counts.stored / dense if dense > 0 else 0.0
    return replace(counts, dense=dense, ffn_sparsity=1 - neurons / before, total_sparsity=total)


def count_sizes(sizes: Mapping[str, int], num_experts: int, top_k: int) -> Counts:
    """Return the parameters of such a checkpoint from its tensors' sizes by name; 0 experts are a dense one.

    Layers may be dense: what skips nothing is what is in no routed expert.
    """
    stored = sum(sizes.values())
    routed = sum(size for name, size in sizes.items() if _ROUTED.search(name)) if num_experts else 0
    skipped = round(routed * (1 - min(top_k, num_experts) / num_experts)) if routed else 0
    ffn = sum(size for name, size in sizes.items() if _FFN.search(name) and not _GATES.search(name))
    return Counts(
        dense=None if routed else stored,
        stored=stored,
        active=stored - skipped,
        active_max=stored - skipped,
        materialised=stored,
        ffn_sparsity=skipped / ffn if skipped else 0.0,
        total_sparsity=skipped / stored if skipped else 0.0,
    )


def routed_of(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return the routed experts and the experts of a token that the configuration of any MoE names; else (0, 0)."""
    for key in ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"):
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            chosen = config.get("num_experts_per_tok", config.get("moe_k", 1))
            return value, chosen if isinstance(chosen, int) else 1
    return 0, 0


def modules_that_fit(recipe: Recipe, budget_bytes: int, *, revision: str | None = None) -> int:
    """Return the most modules an expert may have so that the tied checkpoint's tensors take at most ``budget_bytes``.

    Experts may turn out to share nothing but the shared modules, so ``shared + E (R - shared)`` stored modules are
    reckoned with: what is written fits whatever the calibration says, and is smaller where experts overlap.

    Raises:
        RecipeError: not even one module an expert fits.
        PartitionError: the modules do not divide the neurons.
        CheckpointError: the source cannot be read.
    """
    assert recipe.source is not None
    checkpoint = Checkpoint(resolve_source(recipe.source, revision))
    family = family_of(checkpoint.config, recipe.family)
    checkpoint.add_prefix(family.layers)
    layers, neurons = layers_of(checkpoint.config), neurons_of(checkpoint.config, family)
    num_modules, shared = recipe.partition.num_modules, recipe.assignment.shared_modules
    if neurons % num_modules:
        raise PartitionError("partition.num_modules", f"{num_modules} does not divide the {neurons} neurons of an FFN")
    num_experts = recipe.assignment.num_experts or max(1, len(recipe.tasks))
    check_ffns(checkpoint, family, layers, neurons)
    ffn_bytes = tensor_bytes(checkpoint, dense_neurons(checkpoint, family, layers))
    module_bytes = ffn_bytes // num_modules
    fixed_bytes = tensor_bytes(checkpoint) - ffn_bytes
    fixed_bytes += _added_bytes(checkpoint, recipe, family, layers, num_experts)
    rank_bytes = 4 * layers * num_experts  # a module's place among an expert's
    least = max(1, shared)
    for modules in range(num_modules, least - 1, -1):
        stored = (
            num_modules if recipe.assignment.coverage else min(num_modules, shared + num_experts * (modules - shared))
        )
        if fixed_bytes + modules * rank_bytes + stored * module_bytes <= budget_bytes:
            return modules
    stored = num_modules if recipe.assignment.coverage else min(num_modules, shared + num_experts * (least - shared))
    needed_bytes = fixed_bytes + least * rank_bytes + stored * module_bytes
    raise RecipeError(
        "fit_bytes",
        f"{budget_bytes} bytes do not hold this model with {least} of {num_modules} modules "
        f"an expert, which may take {needed_bytes}. Allow that, or use fewer experts or "
        "more modules",
    )


def dense_neurons(checkpoint: Checkpoint, family: Family, layers: int) -> list[str]:
    """Return the names of a dense checkpoint's tensors that grow with its neurons.

    Raises CheckpointError where a layer lacks its up or down projection.
    """
    names: list[str] = []
    for layer in range(layers):
        layout = dense_layout(family, layer)
        needed = {layout.name(role) for role in layout.roles}
        for name in layout.neuron_names():
            if name in checkpoint:
                names.append(name)
            elif name in needed:
                raise CheckpointError(
                    str(checkpoint.directory),
                    f"'{name}' is missing, which is of an FFN as the row of family '{family.model_type}' says",
                    "say under `family:` in a recipe where the FFNs lie",
                )
    return names


def _added_bytes(checkpoint: Checkpoint, recipe: Recipe, family: Family, layers: int, num_experts: int) -> int:
    """Return the bytes of membership, routers and means at their largest."""
    layout, modules = dense_layout(family, 0), recipe.partition.num_modules
    width = checkpoint.shape(layout.name("up"))[1 - layout.neuron_dim("up")]
    hidden = max(16, 4 * num_experts) if recipe.router.kind == "mlp" else 0
    router = hidden * (width + num_experts) if hidden else num_experts * width
    means = modules * width if recipe.router.compensation else 0
    # routers and means may be kept in float32 whatever the weights are
    return layers * (4 * ((router if recipe.router.routing != "task" else 0) + means) + num_experts * modules)
