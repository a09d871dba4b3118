"""Modules as ordinary experts, for engines that run mixtures of experts through transformers' experts interface.

    y = sum_a weights_a F_{modules_a}(x)

A router scores the experts and returns the modules that the chosen ones have, the same number for every token; where a
token needs fewer, the rest have weight 0. Every module is stored and computed once, however many experts have it.

What vLLM's and SGLang's Transformers backends ask of a model, and where that is written down:

* ``auto_map.AutoModel``, ``_supports_attention_backend``, a block with an attribute ``experts`` whose parameters all
  have three dimensions, called with (hidden_states, top_k_index, top_k_weights): docs/models/supported_models.md of
  vllm-project/vllm and vllm/model_executor/models/transformers/moe.py there;
  python/sglang/srt/models/transformers.py of sgl-project/sglang
* one ``num_experts``, ``num_experts_per_tok`` and ``moe_intermediate_size`` for all layers, under these names: the same
  files, and vllm/transformers_utils/model_arch_config_convertor.py
* weights under one name an expert (``experts.3.gate_proj.weight``): SGLang's loader and vLLM's before its pull request
  36997 know no others, and SGLang's passes over them with no more than a warning
* tensors that are loaded are parameters: vLLM's loader knows no buffers. So the table of modules is one, of zeros and
  ones, which every type of weights holds exactly
* vLLM puts its own router in the place of one that it takes for `topk(softmax(linear))`, because its only tensor is
  called ``weight`` (vllm/model_executor/models/transformers/fusers/moe.py); ours must not be taken for one
* tensor-parallel styles that both know; SGLang refuses to load where the plan has another

For engines: on its own this way of computing is slower than the tied form, and it has no gradient for the router.
"""

# Shapes: T tokens, D model width, S modules stored by the layer, m neurons of a module, E experts, K chosen of them,
# H hidden width of the router, A modules that a token is given, N tokens of one module

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming
from transformers.integrations.moe import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

PREFIX = "ModMoEPacked"
TYPE_PREFIX = "modmoe_packed_"
STYLES = ("colwise", "rowwise", "colwise_rep", "rowwise_rep", "replicated_with_grad_allreduce")
"""Tensor-parallel styles of a dense family that both engines and transformers know."""
_EXPERTS = "layers.*.mlp.experts"


@dataclass(kw_only=True, repr=False)
class PackedFields:
    """The fields that a packed configuration adds to its dense family's."""

    num_experts: int = 1
    """What engines call experts: the modules of the layer that stores most."""
    num_experts_per_tok: int = 1
    """Modules that every token is given."""
    moe_intermediate_size: int = 1
    """Neurons of a module."""
    norm_topk_prob: bool = False
    """False: the router's weights are final."""
    default_expert: str | None = None
    """The expert that every token goes to; None where the router chooses."""
    modular: dict[str, Any] = field(default_factory=dict)
    """The fields of the tied model it was made from, among them its experts: ``num_experts``, ``stored_modules``..."""
    dense_config: dict[str, Any] = field(default_factory=dict)
    """The dense model's values of the keys that conversion changed."""


class _Thread(threading.local):
    """What a thread records; a context variable would be the same, but compilers cannot trace one."""

    logits: dict[int, Tensor] | None = None
    """Router logits [T, E] of the pass under way, by layer, where the caller asks for them."""


_THREAD = _Thread()


@use_experts_implementation
class ModuleExperts(nn.Module):
    """The modules of a layer, packed; ``experts_implementation`` chooses how they are computed."""

    def __init__(self, config: Any, num_experts: int) -> None:
        """Make ``num_experts`` modules of zeros."""
        super().__init__()
        size, width = config.moe_intermediate_size, config.hidden_size
        self.num_experts = num_experts
        self.gate_up_proj = nn.Parameter(torch.zeros(num_experts, 2 * size, width))
        self.down_proj = nn.Parameter(torch.zeros(num_experts, width, size))
        self.act_fn = ACT2FN[config.modular["ffn_activation"]]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Map [T, D], the modules [T, A] and their weights [T, A] to [T, D]; ``eager``: one module after another."""
        y_TD = torch.zeros_like(hidden_states)
        for module in range(self.num_experts):
            rows_N, slots_N = ((top_k_index == module) & (top_k_weights != 0)).nonzero(as_tuple=True)
            gate_Nm, up_Nm = F.linear(hidden_states[rows_N], self.gate_up_proj[module]).chunk(2, dim=-1)
            part_ND = F.linear(self.act_fn(gate_Nm) * up_Nm, self.down_proj[module])
            part_ND = part_ND * top_k_weights[rows_N, slots_N, None]
            y_TD.index_add_(0, rows_N, part_ND.to(y_TD.dtype))
        return y_TD


class ModuleRouter(nn.Module):
    """Scores experts and returns modules."""

    def __init__(self, config: Any, stored: int, layer: int = 0) -> None:
        """Make the router of a layer with ``stored`` modules."""
        super().__init__()
        self.layer = layer
        modular = config.modular
        experts, hidden = modular["num_experts"], modular["router_hidden"]
        self.top_k = min(modular["num_experts_per_tok"], experts)
        self.is_sum = modular["combine"] == "sum" and self.top_k > 1
        # a layer may store fewer modules than another gives to a token: the count is the same everywhere
        self.given = min(config.num_experts_per_tok, stored)
        self.padding = config.num_experts_per_tok - self.given
        self.membership = nn.Parameter(torch.ones(experts, stored), requires_grad=False)
        self.expert = None
        if config.default_expert is not None:
            self.expert = modular["expert_names"].index(config.default_expert)
        if modular["routing"] != "task":
            self.hidden = nn.Parameter(torch.zeros(hidden, config.hidden_size)) if hidden else None
            self.scores = nn.Parameter(torch.zeros(experts, hidden or config.hidden_size))

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return which modules are on [T, S], and of those that are computed the weights [T, A] and numbers [T, A]."""
        active_TS, shares_TS = self._choose(x_TD)
        weights_TA, modules_TA = shares_TS.topk(self.given, dim=-1)
        return active_TS, F.pad(weights_TA, (0, self.padding)), F.pad(modules_TA, (0, self.padding))

    def _choose(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return which modules a chosen expert has, and what multiplies each, both [T, S]."""
        high = torch.promote_types(x_TD.dtype, torch.float32)
        member_ES = self.membership.to(high)
        if self.expert is not None:
            shares_TS = member_ES[self.expert].expand(x_TD.shape[0], -1)
            return shares_TS > 0, shares_TS
        if self.hidden is not None:
            x_TD = torch.relu(F.linear(x_TD, self.hidden))
        logits_TE = F.linear(x_TD, self.scores)
        if _THREAD.logits is not None:
            _THREAD.logits.setdefault(self.layer, logits_TE)
        probs_TE = logits_TE.softmax(-1, dtype=high)
        probs_TK, experts_TK = probs_TE.topk(self.top_k, dim=-1)
        none_TE = torch.zeros_like(probs_TE)
        active_TS = none_TE.scatter(1, experts_TK, 1.0) @ member_ES > 0
        if not self.is_sum:
            # a union counts a module once, however many of the chosen experts have it
            return active_TS, active_TS.to(high)
        weights_TK = probs_TK / probs_TK.sum(-1, keepdim=True)
        return active_TS, none_TE.scatter(1, experts_TK, weights_TK) @ member_ES


class ModuleMoE(nn.Module):
    """A feed-forward layer as engines know a mixture of experts: a router beside ``experts``."""

    def __init__(self, config: Any, layer: int) -> None:
        """Make the block of a layer."""
        super().__init__()
        stored = config.modular["stored_modules"][layer]
        self.router = ModuleRouter(config, stored, layer)
        self.experts = ModuleExperts(config, stored)
        self.means, self.left_out = None, int(config.modular["left_out_means"])
        if config.modular["compensation"]:
            self.means = nn.Parameter(torch.zeros(stored + self.left_out, config.hidden_size))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        active_TS, weights_TA, modules_TA = self.router(x_TD)
        y_TD: Tensor = self.experts(x_TD, modules_TA, weights_TA)
        if self.means is not None:
            # what makes up for modules that no expert has, if there are such, is the last row
            y_TD = y_TD + F.pad((~active_TS).to(y_TD.dtype), (0, self.left_out), value=1.0) @ self.means
        return y_TD.reshape(hidden_states.shape)


def _recorded(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a dense forward that takes ``output_router_logits``: the logits of the experts, [T, E] by layer."""
    signature = inspect.signature(forward)
    names = list(signature.parameters)[1:]

    @functools.wraps(forward)
    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.pop("output_router_logits", None)
        if not (getattr(self.config, "output_router_logits", False) if asked is None else asked):
            return forward(self, *args, **kwargs)
        as_given = kwargs.pop("return_dict", None)
        found: dict[int, Tensor] = {}
        before, _THREAD.logits = _THREAD.logits, found
        try:
            output = forward(self, *args, **{**kwargs, "return_dict": True})
        finally:
            _THREAD.logits = before
        mask = {**dict(zip(names, args, strict=False)), **kwargs}.get("attention_mask")
        made = _with_logits(self.config, output, tuple(found[layer] for layer in sorted(found)), mask)
        return made if (self.config.return_dict if as_given is None else as_given) else made.to_tuple()

    parameters = list(signature.parameters.values())
    last = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    if "output_router_logits" not in signature.parameters:
        last = [inspect.Parameter("output_router_logits", inspect.Parameter.KEYWORD_ONLY, default=None), *last]
    recorded.__signature__ = signature.replace(parameters=[*parameters, *last])  # type: ignore[attr-defined]
    return recorded


def _with_logits(config: Any, output: Any, router_logits: Any, mask: Any) -> Any:
    """Return an output with router logits, and with the balance loss if the configuration has its factor."""
    if "logits" not in output:
        return MoeModelOutputWithPast(**output, router_logits=router_logits)
    made = MoeCausalLMOutputWithPast(**output, router_logits=router_logits)
    factor, batch = getattr(config, "router_aux_loss_coef", None), output.logits.shape[0]
    if factor is not None and router_logits:
        is_of_keys = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch
        mask_BT = mask[:, -(len(router_logits[0]) // batch) :] if is_of_keys else None
        modular = config.modular
        top_k = min(modular["num_experts_per_tok"], modular["num_experts"])
        aux_loss: Any = load_balancing_loss_func(router_logits, modular["num_experts"], top_k, mask_BT)
        made.aux_loss = aux_loss
        if made.loss is not None:
            made.loss = made.loss + factor * aux_loss.to(made.loss.device)
    return made


_CONFIGS: dict[type, type] = {}
_MODELS: dict[type, type] = {}


def config_class(base: type) -> type:
    """Return the packed configuration class over a dense family's; one class for each base."""
    if base not in _CONFIGS:
        tp_plan = getattr(base, "base_model_tp_plan", None) or {}
        kept = {key: style for key, style in tp_plan.items() if ".mlp." not in key and style in STYLES}
        model_type = f"{TYPE_PREFIX}{getattr(base, 'model_type', '')}"
        _CONFIGS[base] = type(
            f"{PREFIX}{base.__name__}",
            (PackedFields, base),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} with the fields of modules as experts.",
                "model_type": model_type,
                # engines look for one name or the other, in different orders: one value cannot contradict itself
                "attribute_map": {**(getattr(base, "attribute_map", None) or {}), "num_local_experts": "num_experts"},
                "base_model_tp_plan": {
                    **kept,
                    f"{_EXPERTS}.gate_up_proj": "packed_colwise",
                    f"{_EXPERTS}.down_proj": "rowwise",
                    _EXPERTS: "moe_tp_experts",
                },
                "base_model_ep_plan": {
                    f"{_EXPERTS}.gate_up_proj": "grouped_gemm",
                    f"{_EXPERTS}.down_proj": "grouped_gemm",
                    _EXPERTS: "ep_dispatch_experts",
                },
            },
        )
        globals()[_CONFIGS[base].__name__] = _CONFIGS[base]
        register_checkpoint_conversion_mapping(model_type, _conversions(), overwrite=True)
    return _CONFIGS[base]


def _conversions() -> list[WeightConverter | WeightRenaming]:
    """Return how transformers packs one tensor an expert, as files have them, when it loads; saving undoes it."""
    stored = "mlp.experts.*.{}.weight"
    return [
        WeightConverter(
            source_patterns=[stored.format("gate_proj"), stored.format("up_proj")],
            target_patterns="mlp.experts.gate_up_proj",
            operations=[MergeModulelist(dim=0), Concatenate(dim=1)],
        ),
        WeightConverter(
            source_patterns=stored.format("down_proj"),
            target_patterns="mlp.experts.down_proj",
            operations=[MergeModulelist(dim=0)],
        ),
    ]


def model_class(base: type) -> type:
    """Return the packed class over a dense model class, ``<Family>Model`` or ``<Family>ForCausalLM``."""
    if base not in _MODELS:

        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            wanted = config._experts_implementation
            # the dense model is built first, and would refuse every other
            config._experts_implementation = "eager"
            base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
            # by default the one that computes every width and type; engines replace it
            config._experts_implementation = self.get_correct_experts_implementation(wanted or "eager")
            backbone = getattr(self, self.base_model_prefix, self)
            for index, layer in enumerate(backbone.layers):
                layer.mlp = ModuleMoE(config, index)
            self.post_init()

        made = config_class(base.config_class)  # type: ignore[attr-defined]
        _MODELS[base] = type(
            f"{PREFIX}{base.__name__}",
            (base,),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} with modules as experts.",
                "__init__": __init__,
                "forward": _recorded(base.forward),  # type: ignore[attr-defined]
                # transformers would ask the dense class, which has none
                "_can_set_experts_implementation": classmethod(lambda cls: True),
                "config_class": made,
                "__annotations__": {"config": made},
            },
        )
        globals()[_MODELS[base].__name__] = _MODELS[base]
    return _MODELS[base]


def __getattr__(name: str) -> Any:
    """Make ``ModMoEPacked<Family>Config``, ``...Model`` and ``...ForCausalLM`` from transformers' classes."""
    if name.startswith(PREFIX):
        base = getattr(transformers, name.removeprefix(PREFIX), None)
        if isinstance(base, type) and issubclass(base, transformers.PreTrainedConfig):
            return config_class(base)
        if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
            return model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
