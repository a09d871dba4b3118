"""The native export: experts written out in full for an MoE architecture that transformers and other engines know.

A tied layer is `sum_j c_j(x) F_j(x)`. With the core, the modules that all experts have, taken out, it is

    core(x) + sum_k w_k own_k(x)

exactly where the weights w of the chosen sum to 1 (``combine: sum``), where one expert is chosen, and, with w = 1,
where experts have nothing but the core in common. The core goes into the target's shared expert, or where it has none,
into every expert. ``native_targets`` says what each target computes, ``native_gates`` how it gets these weights.
"""

# Shapes: S modules stored, E experts, N neurons of an expert

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modmoe.errors import ExportError, did_you_mean
from modmoe.formats.dense import dense_config
from modmoe.formats.names import CLIENTS
from modmoe.formats.native.gates import COLDEST, Gate, Pile, Scaled, router_factor, shared_gate
from modmoe.formats.native.model import TiedModel, gate_of, why_not
from modmoe.formats.native.targets import TARGETS, Projections, Target
from modmoe.models.families import layers_of
from modmoe.models.ffn_layout import ROLES, plain_layout, prefix_of
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Const, Copy, Op, Plan, Stack, Take

# what all targets' configurations have in common with their sources'; read resolved, since config.json may leave out
# defaults
CARRIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "use_cache",
    "vocab_size",
)
_HEAD, _EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"
EMPTY_SHARED = 32
"""Neurons, all zero, of a shared expert that a target must have where the model has no core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Native:
    """A native export to be."""

    plan: Plan
    target: str
    client: str
    why: str
    """Why this target, and what becomes of core and gates."""
    tolerance: float | None
    """Bound of the proof in float32, as a share of the largest logit; None for that of exact exports."""
    warnings: list[str]


def native_export(
    tied: Checkpoint,
    target: str = "auto",
    client: str = "transformers",
    dtype: torch.dtype | None = None,
    *,
    take: Callable[[str, Tensor, int], Op] = Take,
    instead: str = "; forms that work: tied, dense",
) -> Native:
    """Return the plan of the same model as an MoE of ``target``'s architecture, under the names used on the Hub.

    Reads headers, memberships and routers.

    Args:
        tied: a ModularMoE checkpoint.
        target: a name in TARGETS, or ``auto``: the first that holds the model, those with a shared expert before those
            without where the experts have modules in common.
        client: one of CLIENTS, who will run it.
        dtype: the type that weights will be written in; None keeps theirs.
        take: makes the op that reads some neurons of a stored projection: its name, the neurons, their dimension.
        instead: what an error says that the user can do.

    Raises:
        ExportError: no such target or client, or the target cannot hold the model; says why and which forms can.
    """
    if target not in ("auto", *TARGETS):
        raise ExportError("target", f"no target '{target}'", did_you_mean(target, ["auto", *TARGETS]))
    if client not in CLIENTS:
        raise ExportError("client", f"no client '{client}'", did_you_mean(client, CLIENTS))
    model_type = str((tied.config.get("dense_config") or {}).get("model_type"))
    names = [name for name, row in TARGETS.items() if model_type in row.sources] if target == "auto" else [target]
    if not names:
        known = sorted({source for row in TARGETS.values() for source in row.sources})
        raise ExportError(
            str(tied.directory), f"no native target holds a '{model_type}' model (only {', '.join(known)}){instead}"
        )
    model = TiedModel(tied, dtype, take)
    names.sort(key=lambda name: bool(model.shared_modules) and TARGETS[name].shared is None)
    refused: dict[str, str] = {}
    for name in names:
        reason = why_not(model, TARGETS[name], client)
        if not reason:
            return _export(model, name, client, refused if target == "auto" else {})
        refused[name] = reason
    said = "; ".join(f"{name} can't hold {reason}" for name, reason in _by_reason(refused))
    raise ExportError(str(tied.directory), f"{said}{instead}")


def _by_reason(refused: dict[str, str]) -> list[tuple[str, str]]:
    """Return names and reasons, those with one reason together."""
    names: dict[str, list[str]] = {}
    for name, reason in refused.items():
        names.setdefault(reason, []).append(name)
    return [(" and ".join(held), reason) for reason, held in names.items()]


def native_warnings(plan: Plan, client: str = "transformers") -> list[str]:
    """Return what a user of other engines should know of a native plan, one line each."""
    width = int(plan.config.get("moe_intermediate_size") or plan.config["intermediate_size"])
    if width % 32:
        return [
            f"experts are {width} neurons wide, no multiple of 32: block quantization (such as Q8_0) leaves them "
            "unquantized and grouped kernels may refuse them; choose modules_per_expert so that it is."
        ]
    if client == "llama.cpp" and width % 256:
        return [
            f"experts are {width} neurons wide, no multiple of 256: K-quants (such as Q4_K_M) fall back to larger "
            "types for them; choose modules_per_expert so that it is, or Q8_0."
        ]
    return []


def _export(model: TiedModel, name: str, client: str, refused: dict[str, str]) -> Native:
    target, tied = TARGETS[name], model.tied
    gate = gate_of(model, target, client)
    assert isinstance(gate, Gate)
    ops: dict[str, Op] = {}
    replaced: set[str] = set()
    for layer in range(layers_of(model.config)):
        stored = prefix_of(model.config, layer)
        ops.update(_layer_ops(model, target, gate, layer))
        replaced.update(key for key in tied if key.startswith(stored))
    config = _config(model, target, client, gate)
    kept: dict[str, Op] = {key: Copy(key) for key in tied if key not in replaced}
    if model.resolved.tie_word_embeddings and not config["tie_word_embeddings"]:
        kept[_HEAD] = Copy(_EMBEDDINGS)
        replaced |= {_HEAD} & tied.keys()
    used = {key for op in ops.values() for key in op.inputs}
    plan = Plan(config, {**kept, **ops}, frozenset(replaced - used))
    return Native(
        plan=plan,
        target=name,
        client=client,
        why=_why(model, name, client, gate, refused),
        tolerance=target.tolerance if gate.is_relative or gate.rounds_in(model.dtype) else None,
        warnings=[*native_warnings(plan, client), *_warnings(model, client, gate)],
    )


def _warnings(model: TiedModel, client: str, gate: Gate) -> list[str]:
    lines = []
    if model.slides and client != "transformers":
        lines.append(f"{client} is not known to keep the sliding window of {model.resolved.sliding_window} tokens.")
    if gate.exponent == COLDEST:
        lines.append(
            "these routers are for transformers alone: a softmax over all experts, as others take, sees ties in them; "
            "export --for the program that will run it."
        )
    return lines


def _layer_ops(model: TiedModel, target: Target, gate: Gate, layer: int) -> dict[str, Op]:
    tied, stored = model.tied, prefix_of(model.config, layer)
    made = f"model.layers.{layer}."
    member_ES, core_S = model.members_ES[layer], model.cores[layer]
    shared_S = torch.zeros_like(core_S)
    if target.shared is not None:
        shared_S[core_S.nonzero().squeeze(-1)[: model.shared_modules]] = True
    router_ED = tied[f"{stored}router.weight"]
    norm = None if target.input_norm is None else tied[f"{made}{target.input_norm}.weight"]
    factor = router_factor(gate, router_ED, norm)
    router: Op = Copy(f"{stored}router.weight")
    ops: dict[str, Op] = {f"{made}{target.router}": router if factor == 1 else Scaled(router, factor)}
    experts = []
    for expert in range(model.num_experts):
        own_S = member_ES[expert] & ~shared_S
        # a copy of the core in every expert counts as often as experts are chosen
        scale_S = torch.where(core_S & ~shared_S, float(gate.core), float(gate.own))
        scale_N = scale_S[own_S].repeat_interleave(model.module_size)
        experts.append(_projections(model, stored, model.neurons(own_S), scale_N))
    is_pile = "{expert}" not in target.experts.down
    ops.update({f"{made}{key}": op for key, op in _named(target.experts, experts, is_pile=is_pile).items()})
    width = target.shared and _shared_neurons(model, target)
    if target.shared is not None and width:
        core_N = model.neurons(shared_S)
        scale_N = torch.full((len(core_N),), 2.0 if target.shared_gate else 1.0)
        # what is missing is filled with any neuron, whose column of down is zero
        filled = width - len(core_N)
        core_N = torch.cat([core_N, core_N.new_zeros(filled)])
        scale_N = torch.cat([scale_N, scale_N.new_zeros(filled)])
        shared = _projections(model, stored, core_N, scale_N)
        ops.update({f"{made}{key}": op for key, op in _named(target.shared, [shared]).items()})
    hidden = int(model.resolved.hidden_size)
    if target.shared_gate is not None:
        ops[f"{made}{target.shared_gate}"] = Const(shared_gate(hidden, layer).to(model.dtype))
    if target.selection_bias is not None:
        ops[f"{made}{target.selection_bias}"] = Const(torch.zeros(model.num_experts))
    if target.always_biased:
        for role in set(target.biases) - set(model.biases):
            rows = tied.shape(f"{made}self_attn.{role}_proj.weight")[0]
            ops[f"{made}self_attn.{role}_proj.bias"] = Const(torch.zeros(rows, dtype=model.dtype))
    return ops


def _projections(model: TiedModel, stored: str, neurons_N: Tensor, scale_N: Tensor) -> tuple[Op, Op, Op]:
    """Return gate, up and down of some neurons, down multiplied by a number for each."""
    ffn = plain_layout(stored)
    gate, up, down = (model.take(ffn.name(role), neurons_N, ffn.neuron_dim(role)) for role in ROLES)
    return gate, up, down if bool((scale_N == 1).all()) else Scaled(down, scale_N, model.dtype)


def _named(names: Projections, experts: list[tuple[Op, Op, Op]], *, is_pile: bool = False) -> dict[str, Op]:
    """Return the ops under their names on disk, put together as those say."""
    made: dict[str, Op] = {}
    fused = names.gate == names.up
    if is_pile:
        made[names.gate] = Pile(tuple(Stack((gate, up)) for gate, up, _ in experts))
        made[names.down] = Pile(tuple(down for _, _, down in experts))
        return made
    for expert, (gate, up, down) in enumerate(experts):
        if fused:
            made[names.gate] = Stack((gate, up))
        else:
            made[names.gate.format(expert=expert)] = gate
            made[names.up.format(expert=expert)] = up
        made[names.down.format(expert=expert)] = down
    return made


def _own_width(model: TiedModel, target: Target) -> int:
    modules = int(model.members_ES[0][0].sum()) - (model.shared_modules if target.shared else 0)
    return modules * model.module_size


def _shared_neurons(model: TiedModel, target: Target) -> int:
    """Return the width of the shared expert, filled up where the target asks for more than the core has."""
    core, own = model.shared_modules * model.module_size, _own_width(model, target)
    if target.shared_in_experts:
        return max(1, -(-core // own)) * own
    return core if core or target.is_shared_optional else EMPTY_SHARED


def _config(model: TiedModel, target: Target, client: str, gate: Gate) -> dict[str, Any]:
    resolved = model.resolved
    values = {key: getattr(resolved, key) for key in (*CARRIED, *target.carried) if hasattr(resolved, key)}
    values["head_dim"] = model.head_dim
    if not target.any_head_dim:
        values.pop("head_dim")  # its configuration has no such key
    if "attention_multiplier" in target.carried:
        values.setdefault("attention_multiplier", model.head_dim**-0.5)
    if client not in target.ties:
        values["tie_word_embeddings"] = False
    values |= {target.num_experts: model.num_experts, "num_experts_per_tok": model.top_k}
    own = _own_width(model, target)
    # some engines want a width even where no layer is dense
    values |= {"intermediate_size": int(model.config["dense_intermediate_size"]), target.width: own}
    if target.shared is not None:
        width = _shared_neurons(model, target)
        values[target.shared_width] = width // own if target.shared_in_experts else width
    if target.bias_key:
        values[target.bias_key] = target.always_biased or bool(model.biases)
    if target.qk_norm_key:
        values[target.qk_norm_key] = "model.layers.0.self_attn.q_norm.weight" in model.tied
    written: dict[str, Any] = target.config(**{**values, **target.settings, **gate.settings}).to_dict()
    written["architectures"] = [target.architecture]
    plain = dense_config(model.config)
    dtype = plain.get("dtype", plain.get("torch_dtype"))
    written.pop("dtype", None)
    return {**written, "dtype": dtype} if dtype is not None else written


def _why(model: TiedModel, name: str, client: str, gate: Gate, refused: dict[str, str]) -> str:
    target = TARGETS[name]
    words = [f"continues {model.model_type}"]
    if model.shared_modules:
        where = "are copied into every expert"
        if target.shared is not None:
            filled = _shared_neurons(model, target) - model.shared_modules * model.module_size
            where = "are its shared expert" + (f", filled up with {filled} zero neurons" if filled else "")
        words.append(f"the {model.shared_modules} shared modules {where}")
    rounds = f", rounded to {str(model.dtype).removeprefix('torch.')}" if gate.rounds_in(model.dtype) else ""
    words.append(f"gates: {gate.note}{rounds}")
    if client not in target.ties and bool(model.resolved.tie_word_embeddings):
        words.append(f"the output matrix is written out, since {client} is not known to tie it")
    words += [f"not {other}: it can't hold {reason}" for other, reason in refused.items()]
    return f"{name} for {client}: {'; '.join(words)}"
