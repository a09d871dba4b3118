"""The native export: experts written out in full for an MoE architecture that transformers and other engines know.

Mixtral's layer is `sum_k w_k E_k(x)`, with the softmax over all experts renormalised over the chosen. That is
`combine: sum` exactly, and at top_k 1 either way of combining: the weight is then 1.
"""

# Shapes: N neurons of an expert

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import LlamaConfig, MistralConfig, MixtralConfig

from modmoe.checkpoint import Checkpoint
from modmoe.convert.plan import Copy, Op, Plan, Take
from modmoe.errors import ExportError, did_you_mean
from modmoe.export.dense import dense_config, expert_neurons, ffn_prefix
from modmoe.families import layers_of

_SOURCES: dict[str, Any] = {"llama": LlamaConfig, "mistral": MistralConfig}
# what Mixtral's configuration has in common with its sources'; read resolved, since config.json may leave out defaults
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


def native_plan(tied: Checkpoint, target: str = "auto") -> Plan:
    """Return the plan of the same model as an MoE of ``target``'s architecture, under the names used on the Hub.

    Reads headers and the memberships.

    Args:
        tied: a ModularMoE checkpoint.
        target: a name in TARGETS, or ``auto``.

    Raises:
        ExportError: no such target, or the target cannot hold the model; says why and which forms can.
    """
    name = "mixtral" if target == "auto" else target
    if name not in TARGETS:
        raise ExportError(f"target: no target '{target}'.{did_you_mean(target, ['auto', *TARGETS])}")
    return TARGETS[name](tied)


def native_warnings(plan: Plan) -> list[str]:
    """Return what a user of other engines should know of a native plan, one line each."""
    width = int(plan.config.get("moe_intermediate_size") or plan.config["intermediate_size"])
    if width % 32 == 0:
        return []
    return [
        f"experts are {width} neurons wide, no multiple of 32: block quantization (such as Q8_0) leaves them "
        "unquantized and grouped kernels may refuse them; choose modules_per_expert so that it is."
    ]


def _mixtral_plan(tied: Checkpoint) -> Plan:
    config = tied.config
    model_type = (config.get("dense_config") or {}).get("model_type")
    reason = _why_not_mixtral(config, str(model_type))
    if reason:
        raise ExportError(f"{tied.directory}: mixtral can't hold {reason}; forms that work: tied, dense.")
    ops: dict[str, Op] = {}
    replaced: set[str] = set()
    widths: set[int] = set()
    for layer in range(layers_of(config)):
        stored = ffn_prefix(config, layer)
        moe = f"model.layers.{layer}.block_sparse_moe."
        ops[f"{moe}gate.weight"] = Copy(f"{stored}router.weight")
        for expert in range(int(config["num_experts"])):
            neurons_N = expert_neurons(tied, layer, expert)
            widths.add(len(neurons_N))
            ops[f"{moe}experts.{expert}.w1.weight"] = Take(f"{stored}gate_proj.weight", neurons_N)
            ops[f"{moe}experts.{expert}.w3.weight"] = Take(f"{stored}up_proj.weight", neurons_N)
            ops[f"{moe}experts.{expert}.w2.weight"] = Take(f"{stored}down_proj.weight", neurons_N, dim=1)
        replaced.update(name for name in tied if name.startswith(stored))
    if len(widths) != 1:
        raise ExportError(
            f"{tied.directory}: mixtral can't hold experts of {sorted(widths)} neurons; all must be equal."
        )
    kept: dict[str, Op] = {name: Copy(name) for name in tied if name not in replaced}
    used = {name for op in ops.values() for name in op.inputs}
    return Plan(_mixtral_config(config, str(model_type), widths.pop()), {**kept, **ops}, frozenset(replaced - used))


def _why_not_mixtral(config: dict[str, Any], model_type: str) -> str:
    """Return what about the model Mixtral has no place for, or nothing."""
    top_k = int(config.get("num_experts_per_tok", 1))
    if model_type not in _SOURCES:
        return f"a '{model_type}' model (only {', '.join(sorted(_SOURCES))})"
    if config.get("routing", "token") != "token":
        return f"routing by {config['routing']} (only by token)"
    if config.get("router_kind", "linear") != "linear":
        return "a two-layer router (only a linear one)"
    if config.get("compensation", False):
        return "the compensation of skipped modules"
    if config.get("ffn_biases"):
        return f"biases in the FFN ({', '.join(config['ffn_biases'])})"
    if config.get("attention_bias", False):
        return "biases in the attention"
    if top_k > 1 and config.get("combine", "union") != "sum":
        return f"a union of {top_k} experts, in which a module counts once (only top_k 1, or combine: sum)"
    if config.get("default_expert") is not None:
        return f"a default expert ('{config['default_expert']}')"
    return ""


def _mixtral_config(config: dict[str, Any], model_type: str, width: int) -> dict[str, Any]:
    plain = dense_config(config)
    resolved = _SOURCES[model_type].from_dict(plain)
    carried = {key: getattr(resolved, key) for key in CARRIED if hasattr(resolved, key)}
    made = MixtralConfig(
        **carried,
        intermediate_size=width,
        num_local_experts=int(config["num_experts"]),
        num_experts_per_tok=int(config.get("num_experts_per_tok", 1)),
        sliding_window=getattr(resolved, "sliding_window", None),
    )
    written: dict[str, Any] = made.to_dict()
    written["architectures"] = ["MixtralForCausalLM"]
    dtype = plain.get("dtype", plain.get("torch_dtype"))
    written.pop("dtype", None)
    return {**written, "dtype": dtype} if dtype is not None else written


TARGETS: dict[str, Callable[[Checkpoint], Plan]] = {"mixtral": _mixtral_plan}
"""Name of an architecture to the function that plans an export to it."""
