"""The packed export: modules as ordinary experts, with a router that returns modules; for engines alone.

Every module is stored once, under names that vLLM's and SGLang's loaders know; see ``modmoe/modeling/packed_modmoe.py``
for what they ask of a model. Layers may store different numbers of modules: nothing is padded on disk.
"""

# Shapes: S modules stored, E experts, m neurons of a module

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import transformers

from modmoe.errors import ExportError
from modmoe.formats.dense import dense_config, expert_number
from modmoe.modeling.configuration_modmoe import ModularFields
from modmoe.modeling.packed_modmoe import PREFIX, TYPE_PREFIX
from modmoe.models.counts import largest_union, read_experts
from modmoe.models.families import layers_of
from modmoe.models.ffn_layout import neuron_ops, plain_layout, prefix_of
from modmoe.models.loading import own_code
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Const, Copy, Op, Plan

_SILU = ("silu", "swish")
ALIGNMENT = 8
"""Neurons of a module should be a multiple: 16 bytes in half precision, which grouped products want."""


def packed_plan(tied: Checkpoint, expert: str | None = None) -> Plan:
    """Return the plan of the same model with its modules as experts.

    Reads headers and the memberships.

    Args:
        tied: a ModularMoE checkpoint routed by token or by task.
        expert: the one that every token goes to; a model routed by task needs one.

    Raises:
        ExportError: the form, or the engines it is for, cannot hold the model; says why and which forms can.
    """
    config = tied.config
    reason = _why_not(config)
    if reason:
        raise ExportError(str(tied.directory), f"packed can't hold {reason}", "forms that work: tied, dense")
    fixed = expert or config.get("default_expert")
    if fixed is None and config.get("routing") == "task":
        names = ", ".join(config.get("expert_names") or [])
        raise ExportError("expert", "engines cannot name one per request", f"name the one to begin with, of {names}")
    if fixed is not None:
        expert_number(config, fixed)
    size = int(config["module_size"])
    ops: dict[str, Op] = {}
    replaced: set[str] = set()
    for layer in range(layers_of(config)):
        stored = prefix_of(config, layer)
        ops.update(_layer_ops(tied, stored, int(config["stored_modules"][layer]), size))
        replaced.update(name for name in tied if name.startswith(stored))
    kept: dict[str, Op] = {name: Copy(name) for name in tied if name not in replaced}
    used = {name for op in ops.values() for name in op.inputs}
    return Plan(_config(tied, fixed), {**kept, **ops}, frozenset(replaced - used))


def packed_warnings(plan: Plan) -> list[str]:
    """Return what a user of engines should know of a packed plan, one line each."""
    config = plan.config
    lines = ["the packed form is for engines; anywhere else the tied form is faster"]
    if config["moe_intermediate_size"] % ALIGNMENT:
        lines.append(
            f"modules are {config['moe_intermediate_size']} neurons wide, no multiple of {ALIGNMENT}: grouped kernels "
            "may refuse them; choose num_modules so that it is."
        )
    return lines


def _why_not(config: Mapping[str, Any]) -> str:
    """Return what about the model has no place in the form or in the engines it is for, or nothing."""
    dense = str((config.get("dense_config") or {}).get("model_type"))
    if own_code(dict(config)):
        return f"'{dense}', whose code is its own (only architectures of transformers)"
    if config.get("routing", "token") == "sequence":
        return "routing by sequence (its choice is kept with the cache, and engines keep caches of their own)"
    if not config.get("ffn_gated", True):
        return "an FFN without a gate projection (engines pack gate and up in one tensor)"
    if config.get("ffn_biases"):
        return f"biases in the FFN ({', '.join(config['ffn_biases'])}; engines want weights of three dimensions only)"
    if config.get("ffn_activation", "silu") not in _SILU:
        return f"the activation '{config['ffn_activation']}' (engines compute experts with SiLU, whatever config says)"
    if (config.get("ffn_layers"), config.get("ffn_path")) != ("model.layers", "mlp"):
        return f"FFNs at {config.get('ffn_layers')}.*.{config.get('ffn_path')} (only model.layers.*.mlp)"
    if not getattr(_class_of(config, "AutoModelForCausalLM"), "_supports_attention_backend", False):
        return f"'{dense}', whose attention engines cannot replace"
    return ""


def _class_of(config: Mapping[str, Any], key: str) -> Any:
    return getattr(transformers, _dense_name(config, key), None)


def _dense_name(config: Mapping[str, Any], key: str) -> str:
    """Return the name of a dense class from the tied one's that auto_map gives: ``mod.ModMoELlamaModel``."""
    return str((config.get("auto_map") or {}).get(key)).rpartition(".")[2].removeprefix("ModMoE")


def _layer_ops(tied: Checkpoint, stored: str, modules: int, size: int) -> dict[str, Op]:
    ops: dict[str, Op] = {}
    ffn = plain_layout(stored)
    for module in range(modules):
        neurons_m = torch.arange(module * size, (module + 1) * size)
        ops.update(neuron_ops(tied, ffn, plain_layout(f"{stored}experts.{module}."), neurons_m))
    # zeros and ones, exact in every type; read as a parameter, since engines load no buffers
    member_ES = tied[f"{stored}membership"].to(tied.dtype(ffn.name("up")))
    ops[f"{stored}router.membership"] = Const(member_ES)
    renamed = {"router.weight": "router.scores", "router.hidden.weight": "router.hidden"}
    renamed |= {"router.output.weight": "router.scores", "means": "means"}
    ops.update({stored + new: Copy(stored + old) for old, new in renamed.items() if stored + old in tied})
    return ops


def _config(tied: Checkpoint, fixed: str | None) -> dict[str, Any]:
    config = tied.config
    # one count for all tokens and layers, whichever experts are chosen; a fixed expert is one of them
    top_k = 1 if fixed is not None else int(config["num_experts_per_tok"])
    given = max(largest_union(experts, min(top_k, len(experts))) for experts in read_experts(tied))
    fields = {field.name for field in dataclasses.fields(ModularFields)} - {"dense_config"}
    dense = config.get("dense_config") or {}
    keys = [key for key in ("AutoConfig", "AutoModel", "AutoModelForCausalLM") if _class_of(config, key) is not None]
    return {
        **dense_config(config),
        "model_type": f"{TYPE_PREFIX}{dense['model_type']}",
        "architectures": [f"{PREFIX}{_dense_name(config, 'AutoModelForCausalLM')}"],
        "auto_map": {key: f"packed_modmoe.{PREFIX}{_dense_name(config, key)}" for key in keys},
        "num_experts": max(config["stored_modules"]),
        "num_experts_per_tok": given,
        "moe_intermediate_size": int(config["module_size"]),
        "norm_topk_prob": False,
        "default_expert": fixed,
        "modular": {key: copy.deepcopy(value) for key, value in config.items() if key in fields},
        "dense_config": copy.deepcopy(dense),
    }
