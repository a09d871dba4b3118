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

import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from .configuration_modmoe import config_class
from .generation_modmoe import methods_over
from .modular_ffn import ModularFFN
from .routing_modmoe import Recording, RoutingState, begin_pass, check_expert_ids, end_pass, in_this_pass, run_of
from .sequences_modmoe import check_prompt, read_call

WAYS = ("auto", "masked", "runs", "gather")
"""The ways of computing FFNs that ``set_ffn_way`` takes."""


def is_whole(value: Any) -> bool:
    """Return whether a value is a whole number, which true and false are not."""
    return isinstance(value, int) and not isinstance(value, bool)


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
        backbone.register_forward_hook(_end_pass, always_call=True)

    def set_expert(self, expert: str | int | None) -> None:
        """Send every token to one expert, by name or number; None lets the router decide again."""
        names = self.routing_state.expert_names
        if isinstance(expert, str):
            if expert not in names:
                raise ValueError(f"no expert '{expert}'; this model has {names}")
            expert = names.index(expert)
        if expert is not None and not (is_whole(expert) and 0 <= expert < self.config.num_experts):
            raise ValueError(f"no expert {expert!r}; this model has {self.config.num_experts}")
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
        """Keep router logits_NE, by layer, of the last pass that this thread ran in the ``with`` block."""
        with Recording() as logits:
            self.routing_state.logits = logits
            yield logits

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
        if modules is not None and not (is_whole(modules) and 1 <= modules <= most):
            raise ValueError(f"active modules: {modules!r} is not between 1 and {most}, the modules of an expert")
        self.routing_state.active_modules = None if modules == most else modules

    def _initialize_missing_keys(self, *args: Any, **kwargs: Any) -> None:
        """Rank modules where the checkpoint does not; what it has is loaded by now."""
        super()._initialize_missing_keys(*args, **kwargs)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        for module in self.modules():
            if isinstance(module, ModularFFN) and not module.membership.is_meta:
                module.check_ranking()

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Refuse a checkpoint that does not say what the experts are: others at random would go unnoticed."""
        super()._adjust_missing_and_unexpected_keys(loading_info)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        ours = [name for name, module in self.named_modules() if isinstance(module, ModularFFN)]
        own = tuple(f"{name}.{part}" for name in ours for part in ("membership", "router.", "means"))
        missing = sorted(key for key in loading_info.missing_keys if key.startswith(own))
        if missing:
            raise ValueError(
                f"'{missing[0]}' is missing in the checkpoint, of {len(missing)} tensors that say what the experts are "
                "and how they are chosen; fetch it again, or convert again."
            )

    def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> Any:
        """Have each layer recomputed in the pass that it belongs to."""
        found = super()._set_gradient_checkpointing(*args, **kwargs)  # type: ignore[misc]
        assert isinstance(self, nn.Module)
        for module in self.modules():
            function = module.__dict__.get("_gradient_checkpointing_func")
            if function is not None and getattr(function, "func", None) is not in_this_pass:
                module._gradient_checkpointing_func = functools.partial(in_this_pass, function)  # type: ignore[assignment]
        return found

    def initialize_weights(self) -> None:
        """Give values to what has none yet; the backbone inside passes over what is not of its family."""
        assert isinstance(self, nn.Module)
        ffns = [module for module in self.modules() if isinstance(module, ModularFFN)]
        waiting = [ffn for ffn in ffns if not getattr(ffn, "_is_hf_initialized", False)]
        super().initialize_weights()  # type: ignore[misc]
        for ffn in waiting:
            if not ffn.membership.is_meta:
                ffn.init_own(getattr(self.config, "initializer_range", None) or 0.02)


def _begin_pass(backbone: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Tell the layers about the pass that begins; takes out the keywords ``expert_ids`` and ``routing_prompt``.

    A hook of the backbone rather than of the model with its head, since some trainers call the backbone alone.
    """
    config = backbone.config
    run = begin_pass(backbone.routing_state)
    expert_ids, prompt = kwargs.pop("expert_ids", None), kwargs.pop("routing_prompt", None)
    given = {**dict(zip(backbone.routing_parameters, args, strict=False)), **kwargs}
    tokens = given.get("input_ids")
    tokens = given.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        # the family says so better than we could
        return args, kwargs
    run.shape = (tokens.shape[0], tokens.shape[1])
    asked = kwargs.pop("output_router_logits", None)
    if _is_wanted(config) if asked is None else asked:
        run.is_asked = True
        run.logits = {} if run.logits is None else run.logits
    if expert_ids is not None:
        run.expert_ids_N = check_expert_ids(expert_ids, run.shape, config.num_experts)
    if config.routing != "sequence":
        check_prompt(prompt, run.shape)
    else:
        read_call(run, backbone, given, kwargs, prompt)
    return args, kwargs


def _end_pass(backbone: Any, args: tuple[Any, ...], output: Any) -> Any:
    """End the pass, also where it was broken off."""
    run = run_of(backbone.routing_state)
    logits = run.logits if run is not None and run.is_asked and output is not None else None
    # what an output is asked for by number it makes a tuple of, which takes long
    hidden = output[0] if output and torch.is_grad_enabled() else None
    end_pass(backbone.routing_state, hidden if isinstance(hidden, Tensor) else None)
    if logits is None:
        return None
    router_logits: Any = tuple(logits[layer] for layer in sorted(logits))
    if isinstance(output, tuple):
        return (*output, router_logits)
    return MoeModelOutputWithPast(**output, router_logits=router_logits)


def _is_wanted(config: Any) -> bool:
    # a configuration takes long to say that it does not have a key: this runs for every token
    return bool(config.__dict__.get("output_router_logits", False))


def _routed(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a dense forward that takes ``expert_ids``, ``routing_prompt`` and ``output_router_logits`` too.

    What they say is the backbone's to hear, see ``_begin_pass``; a causal LM puts the router logits in its own output.
    """
    signature, keyword = inspect.signature(forward), inspect.Parameter.KEYWORD_ONLY
    names = list(signature.parameters)[1:]

    @functools.wraps(forward)
    def routed(self: Any, *args: Any, **kwargs: Any) -> Any:
        asked = kwargs.get("output_router_logits")
        asked = _is_wanted(self.config) if asked is None else asked
        if not asked or not hasattr(self, self.base_model_prefix):
            return forward(self, *args, **kwargs)
        as_given = kwargs.pop("return_dict", None)
        with Recording() as logits:
            output = forward(self, *args, **{**kwargs, "return_dict": True})
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        found = _with_router_logits(self.config, output, logits, given.get("attention_mask"))
        return found if (self.config.return_dict if as_given is None else as_given) else found.to_tuple()

    parameters = list(signature.parameters.values())
    last = [parameters.pop()] if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else []
    added = ("expert_ids", "routing_prompt", "output_router_logits")
    more = [inspect.Parameter(name, keyword, default=None) for name in added if name not in signature.parameters]
    routed.__annotations__ = {**forward.__annotations__, "return": MoeCausalLMOutputWithPast | tuple}
    routed.__signature__ = signature.replace(parameters=[*parameters, *more, *last])  # type: ignore[attr-defined]
    return routed


def _with_router_logits(config: Any, output: Any, logits: dict[int, Tensor], mask: Any) -> MoeCausalLMOutputWithPast:
    """Return a causal LM's output with router logits_NE by layer, and the balance loss if config has its factor."""
    router_logits: Any = tuple(logits[layer] for layer in sorted(logits))
    found = MoeCausalLMOutputWithPast(**output, router_logits=router_logits)
    factor = getattr(config, "router_aux_loss_coef", None)
    if factor is None or not router_logits:
        return found
    batch, tokens = output.logits.shape[0], len(router_logits[0]) // output.logits.shape[0]
    is_of_keys = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch
    aux_loss: Any = load_balancing_loss_func(
        router_logits, config.num_experts, config.num_experts_per_tok, mask[:, -tokens:] if is_of_keys else None
    )
    found.aux_loss = aux_loss
    if found.loss is not None:
        found.loss = found.loss + factor * aux_loss.to(found.loss.device)
    return found


def _with_signature(method: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that says it takes what another does, for who looks."""

    @functools.wraps(other)
    def call(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return call


_MADE: dict[type, type] = {}


def model_class(base: type) -> type:
    """Return the ModularMoE class over a dense model class, ``<Family>Model`` or ``<Family>ForCausalLM``."""
    if base not in _MADE:

        def __init__(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            base.__init__(self, config, *args, **kwargs)  # type: ignore[misc]
            self._install_modular_ffns()
            self.post_init()

        made = config_class(base.config_class)  # type: ignore[attr-defined]
        content: dict[str, Any] = {
            "__module__": __name__,
            "__doc__": f"{base.__name__} with FFNs whose experts share modules.",
            "__init__": __init__,
            "forward": _routed(base.forward),  # type: ignore[attr-defined]
            "config_class": made,
            "__annotations__": {"config": made},
        }
        old, new = base._set_gradient_checkpointing, ModularMixin._set_gradient_checkpointing  # type: ignore[attr-defined]
        content["_set_gradient_checkpointing"] = _with_signature(new, old)
        if hasattr(base, "generate"):
            content |= methods_over(base)
        _MADE[base] = type(f"ModMoE{base.__name__}", (ModularMixin, base), content)
        globals()[_MADE[base].__name__] = _MADE[base]
    return _MADE[base]


def __getattr__(name: str) -> Any:
    """Make ``ModMoE<Family>ForCausalLM`` and ``ModMoE<Family>Model`` from transformers' classes."""
    if name.startswith("ModMoE"):
        base = getattr(transformers, name.removeprefix("ModMoE"), None)
        if isinstance(base, type) and issubclass(base, transformers.PreTrainedModel):
            return model_class(base)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
