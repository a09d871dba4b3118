"""ModularMoE models: any dense causal LM of transformers with its FFNs replaced by tied ones.

``ModMoELlamaForCausalLM`` is ``LlamaForCausalLM`` whose FFNs are ``ModularFFN``. Classes are made from the dense
family's when they are first asked for by name, so this file serves every architecture.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import transformers
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from .configuration_modmoe import config_class
from .modular_ffn import ModularFFN
from .routing_modmoe import RoutingState, begin_pass

WAYS = ("auto", "masked", "runs", "gather")
"""The ways of computing FFNs that ``set_ffn_way`` takes."""


class ModularMixin:
    """What every ModularMoE model can do beside its family's own methods."""

    _keys_to_ignore_on_load_missing: Any = (r"\.ranking$",)
    routing_state: RoutingState
    config: Any

    def _install_modular_ffns(self) -> None:
        config = self.config
        self.routing_state = RoutingState(expert_names=list(config.expert_names))
        if config.default_expert is not None:
            self.set_expert(config.default_expert)
        path = config.ffn_layers
        prefix = getattr(self, "base_model_prefix", "")
        if not hasattr(self, prefix):
            path = path.removeprefix(prefix + ".")
        assert isinstance(self, nn.Module)
        layers = self.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)
        for index, layer in enumerate(layers):
            for bypassed in config.ffn_bypass:
                layer.set_submodule(bypassed, nn.Identity())
            layer.set_submodule(config.ffn_path, ModularFFN(config, index, self.routing_state))
        backbone: Any = getattr(self, prefix, self)
        backbone.routing_state = self.routing_state
        backbone.routing_parameters = list(inspect.signature(backbone.forward).parameters)
        backbone.register_forward_pre_hook(_begin_pass, with_kwargs=True)

    def set_expert(self, expert: str | int | None) -> None:
        """Send every token to one expert, by name or number; None lets the router decide again."""
        names = self.routing_state.expert_names
        if isinstance(expert, str):
            if expert not in names:
                raise ValueError(f"no expert '{expert}'; this model has {names}")
            expert = names.index(expert)
        if expert is not None and not 0 <= expert < self.config.num_experts:
            raise ValueError(f"no expert {expert}; this model has {self.config.num_experts}")
        self.routing_state.expert = expert

    @contextlib.contextmanager
    def all_modules(self) -> Iterator[None]:
        """Run with every stored module on: the dense model, less the modules that no expert has."""
        self.routing_state.all_on = True
        try:
            yield
        finally:
            self.routing_state.all_on = False

    @contextlib.contextmanager
    def record_router_logits(self) -> Iterator[dict[int, Tensor]]:
        """Keep each pass's router logits_TE; read them by layer from ``routing_state.logits``."""
        self.routing_state.is_recording = True
        try:
            yield self.routing_state.logits
        finally:
            self.routing_state.is_recording = False

    def set_ffn_way(self, way: str) -> None:
        """Choose how FFNs are computed; the result is the same to rounding.

        Args:
            way: ``auto``, by shape; ``masked``, the dense product; ``runs``, slices of the matrices; ``gather``, where
                there is a single token, compiled loops over its modules (the first token waits for the compiler).
                Under LoRA, quantized weights, hooks or autocast it is ``masked`` whatever is asked for.
        """
        if way not in WAYS:
            raise ValueError(f"no way '{way}'; there are {', '.join(WAYS)}")
        self.routing_state.way = way

    def set_active_modules(self, modules: int | None) -> None:
        """Cut every expert to its ``modules`` best, 1 to ``modules_per_expert``; None brings all of them back.

        Modules that all experts have come first, then an expert's own, each by its score at conversion.
        """
        most = self.config.modules_per_expert
        if modules is not None and not 1 <= modules <= most:
            raise ValueError(f"active modules: {modules} is not between 1 and {most}, the modules of an expert")
        self.routing_state.active_modules = None if modules == most else modules

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        """Rank modules where the checkpoint does not; what it has is loaded by now."""
        super()._initialize_missing_keys(*args, **kwargs)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        for module in self.modules():
            if isinstance(module, ModularFFN) and not module.membership.is_meta:
                module.check_ranking()

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Mark the prefill as the prompt, so that a sequence router reads all of it and keeps its choice."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(*args, **kwargs)  # type: ignore[misc]
        if self.config.routing == "sequence":
            tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
            if kwargs.get("is_first_iteration", False):
                self._prompt_tokens = tokens.shape[1]
                inputs["routing_prompt"] = tokens.shape[1]
            elif inputs.get("past_key_values") is None:
                inputs["routing_prompt"] = getattr(self, "_prompt_tokens", 0)
        return inputs


def _begin_pass(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell the layers about the pass that begins; takes out the keywords ``expert_ids`` and ``routing_prompt``.

    A hook of the backbone rather than of the model with its head, since some trainers call the backbone alone.
    """
    config = backbone.config
    expert_ids, prompt_tokens = kwargs.pop("expert_ids", None), kwargs.pop("routing_prompt", None) or 0
    given = {**dict(zip(backbone.routing_parameters, args, strict=False)), **kwargs}
    tokens = given.get("input_ids")
    cache, use_cache = given.get("past_key_values"), given.get("use_cache")
    use_cache = config.use_cache if use_cache is None else use_cache
    is_sequence = config.routing == "sequence"
    if is_sequence and cache is None and use_cache and not backbone.training:
        # made here rather than in the dense model, since what the router keeps goes with it
        cache = kwargs["past_key_values"] = DynamicCache(config=config)
    begin_pass(
        backbone.routing_state,
        tokens=given["inputs_embeds"] if tokens is None else tokens,
        attention_mask=given.get("attention_mask"),
        position_ids=given.get("position_ids"),
        cache=cache,
        expert_ids=expert_ids,
        prompt_tokens=int(prompt_tokens),
        needs_positions=is_sequence,
    )
    return args, kwargs


def _with_keywords(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a dense forward that says it takes ``expert_ids`` and ``routing_prompt`` too; see ``_begin_pass``."""

    @functools.wraps(forward)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    signature, keyword = inspect.signature(forward), inspect.Parameter.KEYWORD_ONLY
    parameters = list(signature.parameters.values())
    last = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    added = [inspect.Parameter(name, keyword, default=None) for name in ("expert_ids", "routing_prompt")]
    routed.__signature__ = signature.replace(parameters=[*parameters, *added, *last])  # type: ignore[attr-defined]
    return routed


_MADE: dict[type, type] = {}


def model_class(base: type) -> type:
    """Return the ModularMoE class over a dense model class, ``<Family>Model`` or ``<Family>ForCausalLM``."""
    if base not in _MADE:

        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
            self._install_modular_ffns()
            self.post_init()

        made = config_class(base.config_class)  # type: ignore[attr-defined]
        _MADE[base] = type(
            f"ModMoE{base.__name__}",
            (ModularMixin, base),
            {
                "__module__": __name__,
                "__doc__": f"{base.__name__} with FFNs whose experts share modules.",
                "__init__": __init__,
                "forward": _with_keywords(base.forward),  # type: ignore[attr-defined]
                "config_class": made,
                "__annotations__": {"config": made},
            },
        )
        globals()[_MADE[base].__name__] = _MADE[base]
    return _MADE[base]


def __getattr__(name: str) -> Any:
    """Make ``ModMoE<Family>ForCausalLM`` and ``ModMoE<Family>Model`` from transformers' classes."""
    if name.startswith("ModMoE"):
        base = getattr(transformers, name.removeprefix("ModMoE"), None)
        if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
            return model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
