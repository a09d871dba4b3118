"""Configurations of ModularMoE models: the dense family's own, with the fields that experts need.

``ModMoELlamaConfig`` derives from ``LlamaConfig`` and has the ``model_type`` ``modmoe_llama``, so that tools find
``hidden_size`` and ``num_hidden_layers`` where they look, and nothing mistakes the model for a dense Llama. The class
for any other architecture of transformers is made the same way when it is first asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers


@dataclass(kw_only=True, repr=False)
class ModularFields:
    """The fields that a ModularMoE configuration adds to its dense family's."""

    num_modules: int = 1
    """Modules that the dense FFN was cut into."""
    module_size: int = 1
    """Neurons of a module."""
    stored_modules: list[int] = field(default_factory=list)
    """Modules that each layer stores: those that some expert has."""
    num_experts: int = 1
    """Experts of a layer."""
    num_experts_per_tok: int = 1
    """Experts chosen at once, top_k. (``top_k`` itself is a generation setting to transformers.)"""
    expert_names: list[str] = field(default_factory=list)
    """One name an expert; the tasks' names where experts are tasks."""
    modules_per_expert: int = 1
    """Modules of each expert."""
    shared_modules: int = 0
    """Modules that every expert has."""
    routing: str = "token"
    """token, sequence or task."""
    combine: str = "union"
    """union or sum."""
    routing_chunk: int = 64
    """With sequence routing: tokens after which the choice is made anew where no prompt is marked."""
    router_kind: str = "linear"
    """linear or mlp."""
    router_hidden: int = 0
    """Hidden width of an mlp router."""
    compensation: bool = False
    """Whether the mean output of a skipped module, given that it is skipped, is added."""
    left_out_means: bool = False
    """Whether the means have one more row: the sum for modules that no expert has, which is always added."""
    default_expert: str | None = None
    """The expert of a model routed by task until ``set_expert`` names another."""
    ffn_layers: str = "model.layers"
    """Path of the list of decoder layers from the causal LM."""
    ffn_path: str = "mlp"
    """Path of the FFN in a layer."""
    ffn_bypass: list[str] = field(default_factory=list)
    """Submodules of a layer that the FFN replaces beside itself."""
    ffn_gated: bool = True
    """Whether the FFN has a gate projection."""
    ffn_biases: list[str] = field(default_factory=list)
    """Which of gate, up and down have a bias."""
    ffn_activation: str = "silu"
    """Name of the activation function in transformers."""
    ffn_dropout: float = 0.0
    """Dropout behind the down projection."""
    dense_intermediate_size: int = 1
    """Neurons of the dense model's FFN."""
    dense_config: dict[str, Any] = field(default_factory=dict)
    """The dense model's values of the keys that conversion changed, for exports back to it."""
    modmoe_method: str = "modular"
    """The conversion method."""
    modmoe_version: str = ""
    """The version of modmoe that wrote the model."""


_MADE: dict[type, type] = {}


def config_class(base: type) -> type:
    """Return the ModularMoE configuration class over a dense family's; one class for each base."""
    if base not in _MADE:
        stem = base.__name__.removesuffix("Config")
        plan = getattr(base, "base_model_tp_plan", None) or {}
        _MADE[base] = type(
            f"ModMoE{stem}Config",
            (ModularFields, base),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} with the fields of ModularMoE.",
                "model_type": f"modmoe_{getattr(base, 'model_type', '')}",
                # cutting a matrix across devices would cut modules apart
                "base_model_tp_plan": {key: value for key, value in plan.items() if ".mlp." not in key},
            },
        )
        globals()[_MADE[base].__name__] = _MADE[base]
    return _MADE[base]


def __getattr__(name: str) -> Any:
    """Make ``ModMoE<Family>Config`` from transformers' ``<Family>Config``."""
    if name.startswith("ModMoE") and name.endswith("Config"):
        base = getattr(transformers, name.removeprefix("ModMoE"), None)
        if isinstance(base, type):
            return config_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
