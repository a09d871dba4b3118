"""ModularMoE: one dense FFN becomes experts that are sets of shared modules.

    ModularMoE (Liu et al., Findings of ACL 2026, 2026.findings-acl.174): the feed-forward layers are split into
    disjoint modules, and each expert is a combination of such modules. The abstract says no more; how modules are
    found, scored and given to experts is this package's choice and stands in the recipe.

The tied layout is the dense FFN with its neurons reordered: the modules that every expert has first, then an order in
which each expert's modules form few runs. Modules that no expert has are left out.
"""

# Shapes: F neurons, M modules, S modules stored, E experts

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.partitions.table import Partition
from modmoe.analysis.source import Source
from modmoe.conversion.modular.assignment import seriate
from modmoe.conversion.modular.layerwise import LayerFit
from modmoe.models.families import Family, neurons_of
from modmoe.models.ffn_layout import dense_layout, neuron_ops, plain_layout
from modmoe.recipe.schema import RouterRecipe
from modmoe.storage.plan import Const, Copy, Op, Plan
from modmoe.version import __version__


def modular_plan(
    opened: Source,
    router: RouterRecipe,
    partitions: Sequence[Partition],
    fits: Sequence[LayerFit],
    *,
    shared_modules: int,
    method: str,
) -> Plan:
    """Return the plan of the tied checkpoint; reads headers only.

    Args:
        opened: the dense model.
        router: how the model chooses.
        partitions: one for each layer.
        fits: one for each layer: the experts over the partition's modules, the router to begin with, and repairs.
        shared_modules: modules that every expert has by the recipe.
        method: the conversion's name, which the configuration records.
    """
    source, family = opened.checkpoint, opened.family
    orders = [seriate(fit.assignment.membership_EM) for fit in fits]
    ops: dict[str, Op] = {}
    replaced: set[str] = set()
    dropped: set[str] = set()
    has_constant = leaves_constant(fits)
    for layer, (partition, fit, order_S) in enumerate(zip(partitions, fits, orders, strict=True)):
        assignment = fit.assignment
        target = f"{family.layers}.{layer}.{family.ffn}"
        dense, tied = dense_layout(family, layer), plain_layout(f"{target}.", has_gate=family.gate is not None)
        index_F = neuron_order(partition, order_S)
        layer_ops = neuron_ops(source, dense, tied, index_F)
        replaced.update(name for op in layer_ops.values() for name in op.inputs)
        dtype = source.dtype(dense.name("down"))
        if fit.down_DF is not None:
            dropped.add(dense.name("down"))
            layer_ops[tied.name("down")] = Const(tied.as_stored(fit.down_DF[:, index_F].to(dtype)))
        layer_ops[f"{target}.membership"] = Const(assignment.membership_EM[:, order_S].clone())
        # int32, since collectives that bring buffers to other processes know no int16
        place_M = torch.zeros(partition.num_modules, dtype=torch.int32)
        place_M[order_S] = torch.arange(len(order_S), dtype=torch.int32)
        layer_ops[f"{target}.ranking"] = Const(place_M[assignment.ranking_ER])
        layer_ops.update(_router_ops(target, fit, order_S, dtype, has_constant))
        ops.update(layer_ops)
    kept: dict[str, Op] = {_kept_name(name, family): Copy(name) for name in source if name not in replaced}
    config = copy.deepcopy(source.config)
    config.update(_fields(opened, router, partitions[0], fits[0], shared_modules, method))
    config["left_out_means"] = has_constant
    config["stored_modules"] = [len(order_S) for order_S in orders]
    return Plan(config, {**kept, **ops}, frozenset(dropped))


def leaves_constant(fits: Sequence[LayerFit]) -> bool:
    """Whether there are means of modules that no expert has: then their sum is one more row of each layer's means."""
    return fits[0].start.means_MD is not None and not all(bool(fit.assignment.used_M.all()) for fit in fits)


def neuron_order(partition: Partition, order_S: Tensor) -> Tensor:
    """Return the dense neuron that each stored neuron is, module after module."""
    return partition.permutation_F.reshape(partition.num_modules, -1)[order_S].flatten()


def _kept_name(name: str, family: Family) -> str:
    head = f"{family.head}."
    return f"lm_head.{name.removeprefix(head)}" if name.startswith(head) else name


def _router_ops(target: str, fit: LayerFit, order_S: Tensor, dtype: torch.dtype, has_constant: bool) -> dict[str, Op]:
    ops: dict[str, Op] = {}
    start = fit.start
    if start.weight_ED is not None:
        ops[f"{target}.router.weight"] = Const(start.weight_ED.to(dtype))
    if start.hidden_HD is not None and start.output_EH is not None:
        ops[f"{target}.router.hidden.weight"] = Const(start.hidden_HD.to(dtype))
        ops[f"{target}.router.output.weight"] = Const(start.output_EH.to(dtype))
    if start.means_MD is not None:
        means_SD = start.means_MD[order_S]
        if has_constant:
            means_SD = torch.cat([means_SD, start.means_MD[~fit.assignment.used_M].sum(0, keepdim=True)])
        ops[f"{target}.means"] = Const(means_SD.to(dtype))
    return ops


def _fields(
    opened: Source, router: RouterRecipe, partition: Partition, fit: LayerFit, shared_modules: int, method: str
) -> dict[str, Any]:
    source, family, settings, classes = opened.checkpoint, opened.family, opened.settings, opened.model.classes
    assignment, start = fit.assignment, fit.start
    auto_map = {
        "AutoConfig": f"configuration_modmoe.ModMoE{classes.config.__name__}",
        "AutoModelForCausalLM": f"modeling_modmoe.ModMoE{classes.causal_lm.__name__}",
    }
    if classes.model is not None:
        auto_map["AutoModel"] = f"modeling_modmoe.ModMoE{classes.model.__name__}"
    dense = {key: source.config[key] for key in ("model_type", "architectures", "auto_map") if key in source.config}
    return {
        "model_type": f"modmoe_{source.config['model_type']}",
        "architectures": [f"ModMoE{classes.causal_lm.__name__}"],
        "auto_map": auto_map,
        "num_modules": partition.num_modules,
        "module_size": partition.module_size,
        "num_experts": len(assignment.expert_names),
        "num_experts_per_tok": router.top_k,
        "expert_names": list(assignment.expert_names),
        "modules_per_expert": assignment.modules_per_expert,
        "shared_modules": shared_modules,
        "routing": router.routing,
        "combine": router.combine,
        "routing_chunk": router.routing_chunk,
        "router_kind": router.kind,
        "router_hidden": 0 if start.hidden_HD is None else start.hidden_HD.shape[0],
        "compensation": router.compensation,
        "default_expert": None,
        "ffn_layers": family.layers,
        "ffn_path": family.ffn,
        "ffn_bypass": list(family.bypass),
        "ffn_gated": family.gate is not None,
        "ffn_biases": dense_layout(family, 0).biased_roles(source),
        "ffn_activation": settings[family.activation],
        "ffn_dropout": float(settings[family.dropout]) if family.dropout else 0.0,
        "dense_intermediate_size": neurons_of(settings, family),
        "dense_config": {**dense, "family": {**dataclasses.asdict(family), "bypass": list(family.bypass)}},
        "modmoe_method": method,
        "modmoe_version": __version__,
    }
