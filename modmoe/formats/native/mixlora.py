"""The native export of a MixLoRA: its experts written out in full, as an MoE that transformers and other engines know.

Expert e of a layer is the dense FFN with W + alpha / r B_e A_e in place of each of its three weights; the attention's
LoRAs are merged. Mixtral and Qwen3-MoE with ``norm_topk_prob`` compute softmax, top K, renormalise and sum as MixLoRA
does, so nothing is lost but the rounding of the written type. The FFNs grow as many times as there are experts.
"""

# Shapes: E experts, D model width

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from modmoe.adapters.mechanism.attach import Site
from modmoe.adapters.methods.mixlora import ATTENTION, FFN, MixLoRA
from modmoe.errors import ExportError, did_you_mean
from modmoe.formats.native.plan import CARRIED
from modmoe.formats.native.targets import TARGETS as NATIVE
from modmoe.formats.native.targets import Target
from modmoe.models.ffn_layout import PLAIN, ROLES, FFNLayout, plain_layout
from modmoe.storage.plan import Const, Op, Plan, Shape

# names that weights get where another adapter wraps their layer
_WRAPPED = ("base_layer", "modules_to_save", "original_module", "parametrizations")

TARGETS: dict[str, Target] = {name: NATIVE[name] for name in ("mixtral", "qwen3_moe")}
"""The architectures that compute softmax, top K, renormalise and sum, by ``model_type``."""


@dataclass(frozen=True, slots=True, eq=False)
class Add:
    """A weight with what an adapter changes about it, added in float32 at least; or the weight in another type."""

    name: str
    change: Callable[[], Tensor] | None = None
    dtype: torch.dtype | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return (self.name,)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the source's shape."""
        return shapes[self.name]

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the type asked for, or the source's."""
        kind = dtypes[self.name]
        return self.dtype or kind if kind.is_floating_point else kind

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the sum."""
        weight = source[self.name].detach()
        dtype = self.dtype or weight.dtype
        if self.change is not None:
            with torch.no_grad():
                change = self.change().to(weight.device)
                weight = weight.to(torch.promote_types(weight.dtype, change.dtype)) + change
        return weight.to(dtype) if weight.is_floating_point() else weight


def expand_mixlora(
    model: nn.Module,
    name: str = "default",
    target: str = "auto",
    dtype: torch.dtype | None = None,
    client: str = "transformers",
) -> Plan:
    """Return the plan of a native MoE checkpoint that computes what ``model`` does with a MixLoRA adapter.

    Its ops make one tensor at a time under the names used on the Hub; run it on ``base_weights(model)``. Nothing of
    the model is changed.

    Args:
        model: a causal LM with the adapter attached, plain or as PEFT wraps it.
        name: the adapter's name.
        target: a name in TARGETS, or ``auto``.
        dtype: type of the weights written; None for the base model's.
        client: the program that will run it, one of ``CLIENTS`` in ``modmoe.formats.names``.

    Raises:
        ExportError: no such adapter or target, or the target cannot hold the model; says why.
    """
    base: Any = _base(model)
    config = base.config
    adapters = _adapters(base, name)
    target_name = _choose(target, str(config.model_type))
    kind = TARGETS[target_name]
    weights = base_weights(model)
    reason = _why_not(kind, config, weights, adapters, client)
    if reason:
        raise ExportError(f"{target_name} can't hold {reason}")
    dtype_made = dtype or weights[_ffn(next(iter(adapters))).name("gate")].dtype
    ops: dict[str, Op] = {key: Add(key, dtype=dtype) for key in weights}
    for layer, adapter in adapters.items():
        prefix = f"model.layers.{layer}."
        for projection in adapter.settings.attention_modules:
            key = f"{prefix}{ATTENTION}.{projection}.weight"
            ops[key] = Add(key, partial(adapter.weight_change, projection), dtype)
        for role in ROLES:
            del ops[_ffn(layer).name(role)]
        ops[f"{prefix}{kind.router}"] = Const(adapter.router_ED.detach().to(dtype_made))
        for expert in range(adapter.settings.num_experts):
            for role, written in zip(ROLES, (kind.experts.gate, kind.experts.up, kind.experts.down), strict=True):
                ops[prefix + written.format(expert=expert)] = Add(
                    _ffn(layer).name(role), partial(adapter.weight_change, PLAIN[role], expert), dtype
                )
    made = _config(kind, config, adapters, dtype_made)
    if made["tie_word_embeddings"] and client not in kind.ties:
        made["tie_word_embeddings"] = False
        ops["lm_head.weight"] = Add("model.embed_tokens.weight", dtype=dtype)
    return Plan(made, ops)


def _ffn(layer: int) -> FFNLayout:
    return plain_layout(f"model.layers.{layer}.{FFN}.")


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the base model's weights by name, uncopied: without routed adapters, and without a head that is tied."""
    base: Any = _base(model)
    tied = bool(getattr(base.config, "tie_word_embeddings", False))
    return {
        name: tensor
        for name, tensor in base.state_dict().items()
        if "routed_" not in name and not (tied and name == "lm_head.weight")
    }


def _base(model: nn.Module) -> nn.Module:
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model


def _adapters(base: nn.Module, name: str) -> dict[int, MixLoRA]:
    """Return the adapter of each decoder layer that has one."""
    found: dict[int, MixLoRA] = {}
    names: set[str] = set()
    for path, module in base.named_modules():
        if not isinstance(module, Site) or not len(module.adapters):
            continue
        if not issubclass(module.adapter_class, MixLoRA):
            raise ExportError(
                str(path), f"a {module.adapter_class.method} adapter lies beside the MixLoRA", "remove it"
            )
        names.update(module.adapters.keys())
        if name in module.adapters:
            found[cast(int, module.layer)] = cast(MixLoRA, module.adapters[name])
    if not names:
        raise ExportError("the model has no MixLoRA adapter; attach or load one first.")
    if not found:
        raise ExportError("name", f"no MixLoRA adapter '{name}'", did_you_mean(name, names))
    return dict(sorted(found.items()))


def _choose(target: str, model_type: str) -> str:
    if target != "auto" and target not in TARGETS:
        raise ExportError("target", f"no target '{target}'", did_you_mean(target, ["auto", *TARGETS]))
    fitting = [name for name, kind in TARGETS.items() if model_type in kind.sources]
    if not fitting or target not in ("auto", *fitting):
        known = ", ".join(f"{name} for {' and '.join(kind.sources)}" for name, kind in TARGETS.items())
        wanted = "no target continues" if target == "auto" else f"{target} does not continue"
        raise ExportError("target", f"{wanted} a '{model_type}' model", f"there is {known}")
    return fitting[0] if target == "auto" else target


def _why_not(
    kind: Target, config: Any, weights: Mapping[str, Tensor], adapters: Mapping[int, MixLoRA], client: str
) -> str:
    """Return what about the model the target has no place for, or nothing."""
    biases = kind.biases if client in kind.bias_clients else ""
    for name, tensor in weights.items():
        parts = name.split(".")
        if any(part in _WRAPPED or part.startswith("lora_") for part in parts):
            return f"another adapter ({name}); merge or remove it first."
        if tensor.is_meta:
            return f"weights that are not in memory ({name}); load the model without offloading."
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            return f"quantized weights ({name}); load the base model unquantized."
        if parts[-1] == "bias" and FFN in parts:
            return f"biases in the FFN ({name})."
        if parts[-1] == "bias" and ATTENTION in parts and not biases:
            return f"biases in the attention ({name})."
    chosen = {(adapter.settings.num_experts, adapter.settings.top_k) for adapter in adapters.values()}
    if len(chosen) > 1:
        return f"layers of different num_experts and top_k {sorted(chosen)}."
    dense = [layer for layer in range(int(config.num_hidden_layers)) if layer not in adapters]
    if dense and ("mlp_only_layers" not in kind.settings or client == "llama.cpp"):
        return f"layers without experts ({', '.join(map(str, dense))}); it needs the adapter at every layer."
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope != "default" and client not in kind.scaled_rope:
        return f"rotary positions of type '{rope}' for {client}, which drops them there."
    layer_types = set(getattr(config, "layer_types", None) or ())
    if len(layer_types) > 1:
        return f"layers of several kinds of attention ({', '.join(sorted(layer_types))})."
    return ""


def _config(kind: Target, config: Any, adapters: Mapping[int, MixLoRA], dtype: torch.dtype) -> dict[str, Any]:
    settings = next(iter(adapters.values())).settings
    values = {
        key: getattr(config, key) for key in (*CARRIED, "intermediate_size", "sliding_window") if hasattr(config, key)
    }
    if "mlp_only_layers" in kind.settings:
        values |= {
            "attention_bias": config.attention_bias,
            "use_sliding_window": "sliding_attention" in (config.layer_types or ()),
            "moe_intermediate_size": config.intermediate_size,
            "mlp_only_layers": [layer for layer in range(config.num_hidden_layers) if layer not in adapters],
            "num_experts": settings.num_experts,
            "norm_topk_prob": True,
        }
    else:
        values["num_local_experts"] = settings.num_experts
    written: dict[str, Any] = kind.config(**values, num_experts_per_tok=settings.top_k).to_dict()
    written["architectures"] = [kind.architecture]
    written["dtype"] = str(dtype).removeprefix("torch.")
    return written
