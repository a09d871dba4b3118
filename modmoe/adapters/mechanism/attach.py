"""Attaching adapters to the layers of a model, without moving or renaming anything that is there.

A site is a submodule that hangs below the layer it serves and changes its output by hooks, so every weight of the base
model keeps its name and its class, and sites of several methods do not see each other.
"""

# Shapes: B batch, T tokens, D input width, O output width

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from modmoe.modeling.generation_modmoe import read_no_prompts, read_prompts

from .base import RoutedAdapter
from .passes import Context, Frame, LayerHook, first_tensor
from .targets import find_base_router, find_targets, layer_number, layer_path, measure

CONTEXT = "routed_context"
"""Attribute of a model with adapters: what they share."""


class Site(nn.Module):
    """The adapters of one method at one layer, by name."""

    def __init__(self, target: nn.Module, adapter_class: type[RoutedAdapter], path: str, context: Context) -> None:
        """Hang below ``target``, which lies at ``path``; ``attach_site`` does it."""
        super().__init__()
        self.adapter_class, self.path, self.context = adapter_class, path, context
        self.layer = layer_number(path)
        self.container = f"modmoe_{adapter_class.method}"
        self._key = f"{path} {self.container}"
        self.add_module(self.container, nn.ModuleDict())
        self._handles: list[Any] = []
        self.install(target)

    @property
    def adapters(self) -> nn.ModuleDict:
        """The adapters by name."""
        return cast(nn.ModuleDict, getattr(self, self.container))

    def active(self) -> list[RoutedAdapter]:
        """Return the adapters that run now."""
        return [cast(RoutedAdapter, adapter) for adapter in self.adapters.values()]

    def install(self, target: nn.Module) -> None:
        """Put the hooks on ``target`` that its kind of adapter needs."""
        kind = self.adapter_class.kind
        if not self.path:
            return  # below the model itself lies only what sites share
        if kind == "experts":
            # the base computation would be thrown away, so it does not run at all
            self._base_forward = target.forward
            target.forward = self.run_instead
            return
        if kind == "layer":
            self._handles += self.adapter_class.install(self, target)  # type: ignore[attr-defined]
            return
        if kind == "block":
            self._handles.append(target.register_forward_pre_hook(self.before, with_kwargs=True))
        router = find_base_router(target) if self.adapter_class.needs_base_router else None
        if router is not None:
            self._handles.append(router.register_forward_hook(self.routed))
        self._handles.append(target.register_forward_hook(self.after, with_kwargs=True))

    def remove(self, target: nn.Module) -> None:
        """Take the hooks off ``target`` again."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if self.path and self.adapter_class.kind == "experts":
            del target.forward

    def frame(self) -> Frame:
        """Return the frame of the decoder layer that this site lies in."""
        frame = self.context.frame(self.layer)
        if (self.training or torch.is_grad_enabled()) and self.trains_router():
            frame.run.trained.add(self.path)
        return frame

    def trains_router(self) -> bool:
        """Return whether a gradient is asked for by a router of an active adapter."""
        return any(
            weight.requires_grad
            for adapter in self.active()
            for name, weight in adapter.named_parameters(recurse=False)
            if "router" in name
        )

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the block's input as it is before the block runs: Mixtral multiplies it in place by jitter."""
        x = first_tensor(args, kwargs)
        assert x is not None
        jitters = module.training and getattr(module, "jitter_noise", 0.0) > 0
        self.context.between[self._key] = x.clone() if jitters and self.active() else x

    def routed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Keep what the base model's router chose: its weights and its experts, each [T, K]."""
        _, weights_TK, ids_TK = output
        self.frame().values[f"{self.path} base router"] = (weights_TK, ids_TK)

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Add the active adapters' deltas to the layer's output."""
        is_block = self.adapter_class.kind == "block"
        x = self.context.between.pop(self._key) if is_block else None
        adapters = self.active()
        if not adapters:
            return output
        first = output[0] if isinstance(output, tuple) else output
        if self.adapter_class.kind == "output":
            x = first
        elif x is None:
            x = first_tensor(args, kwargs)
        assert x is not None
        total = first
        for adapter in adapters:
            total = total + apply_delta(adapter, x, self.frame()).to(first.dtype).reshape(first.shape)
        return (total, *output[1:]) if isinstance(output, tuple) else total

    def run_instead(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the layer's output with the active adapter, or as the base model does where there is none."""
        adapters: list[Any] = self.active()
        if not adapters:
            return self._base_forward(*args, **kwargs)
        if len(adapters) > 1:
            raise ValueError(f"{self.path}: several {self.adapter_class.method} adapters are active; choose one.")
        return adapters[0].mix(cast(Any, self._base_forward).__self__, self.frame(), *args, **kwargs)


def apply_delta(adapter: RoutedAdapter, x: Tensor, frame: Frame) -> Tensor:
    """Return an adapter's delta for x of any leading shape, [T, O], computed in the parameters' type."""
    dtype = next(adapter.parameters()).dtype
    return adapter.delta(x.reshape(-1, x.shape[-1]).to(dtype), frame)


def attach(
    model: nn.Module,
    adapter_class: type[RoutedAdapter],
    settings: Any,
    *,
    targets: str | Iterable[str] | None = None,
    layers: Sequence[int] | int | None = None,
    name: str = "default",
) -> list[str]:
    """Attach an adapter to every layer that ``targets`` names and freeze nothing; return the layers' paths.

    Args:
        model: the base model; its modules and weights stay where they are.
        adapter_class: a method of METHODS.
        settings: the method's dataclass.
        targets: names of layers (matched as PEFT does: the whole path or its end), or one regular expression of whole
            paths; None for the method's own.
        layers: decoder layers to keep to; None for all.
        name: the adapter's name.

    Raises:
        ValueError: nothing matches, or the settings do not fit a layer.
    """
    paths = find_targets(model, adapter_class, targets, layers)
    for path in paths:
        site = attach_site(model, path, adapter_class)
        add_adapter(site, model, path, settings, name)
    return paths


def attach_site(model: nn.Module, path: str, adapter_class: type[RoutedAdapter], site_class: type[Site] = Site) -> Site:
    """Return the method's site at ``path``, made where there is none yet."""
    target = model.get_submodule(path)  # the model itself for an empty path
    child = f"routed_{adapter_class.method}"
    if not hasattr(target, child):
        site = site_class(target, adapter_class, path, context_of(model, path))
        target.add_module(child, site)
    return cast(Site, getattr(target, child))


def add_adapter(site: Site, model: nn.Module, path: str, settings: Any, name: str) -> RoutedAdapter:
    """Make an adapter at a site, on the device of the layer it serves."""
    target = model.get_submodule(path)
    shape = measure(model, target, path, site.adapter_class)
    try:
        adapter = site.adapter_class(settings, shape, path)
    except ValueError as error:
        raise ValueError(f"{site.adapter_class.method} at {path}: {error}") from None
    adapter.train(target.training)
    weight = next((value for key, value in target.named_parameters() if "routed_" not in key), None)
    made = next(adapter.parameters())
    if weight is not None and not made.is_meta and not weight.is_meta:
        adapter.to(weight.device)
    site.adapters[name] = adapter
    if adapter.reads_sequences:
        site.context.reads_sequences = True
        read_prompts(model)
    shared = site.adapter_class.shared_shapes(settings, shape)
    if shared:
        adapter.shared = [
            _share(attach_site(model, "", site.adapter_class, type(site)), settings, shared, adapter, name)
        ]
    return adapter


def _share(site: Site, settings: Any, shapes: dict[str, tuple[int, ...]], adapter: nn.Module, name: str) -> nn.Module:
    """Return the module with an adapter's shared parameters, after adding those that are new."""
    if name not in site.adapters:
        site.adapters[name] = nn.Module()
    module = site.adapters[name]
    like = next(adapter.parameters())
    for key, shape in shapes.items():
        if not hasattr(module, key):
            weight = torch.empty(shape, dtype=torch.float32, device=like.device)
            if not weight.is_meta:
                site.adapter_class.reset_shared(settings, key, weight)
            module.register_parameter(key, nn.Parameter(weight))
    return module


def detach(model: nn.Module) -> None:
    """Take every site and hook off a model; its weights are left as they are."""
    for path, module in list(model.named_modules()):
        if isinstance(module, Site):
            parent, _, child = path.rpartition(".")
            target = model.get_submodule(parent)
            module.remove(target)
            delattr(target, child)
    for handle in getattr(model, f"{CONTEXT}_handles", {}).values():
        for one in handle:
            one.remove()
    read_no_prompts(model)
    for name in (CONTEXT, f"{CONTEXT}_handles"):
        if hasattr(model, name):
            delattr(model, name)


def context_of(model: nn.Module, path: str | None = None) -> Context:
    """Return what the adapters of ``model`` share, with hooks on the model and on the decoder layer of ``path``."""
    if not hasattr(model, CONTEXT):
        context = Context()
        setattr(model, CONTEXT, context)
        backbone: Any = getattr(model, "base_model", model)
        setattr(
            model,
            f"{CONTEXT}_handles",
            {
                "": [
                    model.register_forward_pre_hook(context.begin_model, with_kwargs=True),
                    # before a tied model's own, which takes out what both read
                    backbone.register_forward_pre_hook(context.begin_pass, prepend=True, with_kwargs=True),
                    backbone.register_forward_hook(context.end_pass, with_kwargs=True),
                ]
            },
        )
    context, handles = getattr(model, CONTEXT), getattr(model, f"{CONTEXT}_handles")
    layer = layer_path(path or "")
    if layer is not None and layer not in handles:
        hook = LayerHook(context, cast(int, layer_number(layer)))
        module = model.get_submodule(layer)
        handles[layer] = [module.register_forward_pre_hook(hook.enter, with_kwargs=True)]
        handles[layer] += [
            child.register_forward_pre_hook(hook.enter_child, with_kwargs=True) for child in module.children()
        ]
    return cast(Context, context)
