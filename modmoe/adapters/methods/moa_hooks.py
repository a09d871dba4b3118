"""The hooks of MoA on a decoder layer: where each type of adapter reads and what it is added to.

A site's hooks are put on once and look up its active adapters whenever they run. What they keep lies in the layer's
frame and never on a layer, so passes do not see each other's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from ..mechanism.attach import Site
from ..mechanism.passes import first_tensor
from .moa_prefix import AttentionPrefix

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""Linear layers of an attention that can have a LoRA; with all four of them it can have a prompt."""
TYPES = (*ATTENTION, "down_proj", "parallel", "prompt")
"""The types of adapters, in the router's order."""
BLOCKS = ("mlp", "block_sparse_moe", "feed_forward", "ffn")
"""Names of a decoder layer's FFN or MoE block."""


def block_of(paths: Iterable[str]) -> str:
    """Return the name of the FFN or MoE block among paths in a decoder layer, or nothing."""
    heads = {path.partition(".")[0] for path in paths}
    return next((name for name in BLOCKS if name in heads), "")


def type_path(name: str, block: str) -> str:
    """Return the path, in a decoder layer, of the linear layer whose LoRA a type is."""
    return f"{block}.{name}" if name == "down_proj" else f"self_attn.{name}"


def layer_hooks(site: Site, layer: nn.Module) -> list[Any]:
    """Put the hooks of all types on a decoder layer's submodules and return their handles."""
    handles: list[Any] = []
    children = dict(layer.named_children())
    block = block_of(children)
    if "input_layernorm" in children:
        handles.append(children["input_layernorm"].register_forward_hook(NormHook(site)))
    for name in (*ATTENTION, "down_proj"):
        parent, _, leaf = type_path(name, block).rpartition(".")
        linear = getattr(children.get(parent), leaf, None)
        if isinstance(linear, nn.Module):
            handles.append(linear.register_forward_hook(LoraHook(site, name), with_kwargs=True))
    if block:
        hooks = BlockHooks(site)
        handles.append(children[block].register_forward_pre_hook(hooks.before, with_kwargs=True))
        handles.append(children[block].register_forward_hook(hooks.after))
    attention = children["self_attn"]
    if all(hasattr(attention, name) for name in ATTENTION):
        handles += AttentionPrefix(site, attention).install()
    return handles


class LoraHook:
    """Adds the LoRAs of a site's active adapters to one linear layer's output."""

    def __init__(self, site: Site, name: str) -> None:
        """Serve the layer of this type."""
        self.site, self.name = site, name

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Return the layer's output with the LoRAs'."""
        for adapter in _with_type(self.site, self.name):
            x = cast(Tensor, first_tensor(args, kwargs))
            output = _added(output, adapter.lora(self.name, _flat(x, adapter), self.site.frame()))
        return output


class NormHook:
    """Computes the weights of the active adapters whose router reads the normed input, so that it need not be kept."""

    def __init__(self, site: Site) -> None:
        """Serve the site's decoder layer."""
        self.site = site

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Hand the norm's output to the routers."""
        for adapter in cast(list[Any], self.site.active()):
            if adapter.settings.router_input == "norm":
                adapter.weights(self.site.frame(), output)


class BlockHooks:
    """Adds the parallel adapters of a site's active adapters to the output of the FFN or MoE block."""

    def __init__(self, site: Site) -> None:
        """Serve the site's decoder layer."""
        self.site, self.key = site, f"{site.path} {site.container} block"

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the block's input as it is before the block runs: Mixtral multiplies it in place by jitter."""
        if _with_type(self.site, "parallel"):
            x = cast(Tensor, first_tensor(args, kwargs))
            jitters = module.training and getattr(module, "jitter_noise", 0.0) > 0
            self.site.frame().values[self.key] = x.clone() if jitters else x

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Return the block's output with the adapters'."""
        adapters = _with_type(self.site, "parallel")
        if not adapters:
            return output
        frame = self.site.frame()
        x = frame.values.pop(self.key)
        first = output[0] if isinstance(output, tuple) else output
        for adapter in adapters:
            first = _added(first, adapter.parallel(_flat(x, adapter), frame))
        return (first, *output[1:]) if isinstance(output, tuple) else first


def _with_type(site: Site, name: str) -> list[Any]:
    adapters: list[Any] = site.active()
    return [adapter for adapter in adapters if name in adapter.types]


def _flat(x: Tensor, adapter: nn.Module) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(next(adapter.parameters()).dtype)


def _added(output: Tensor, delta_TO: Tensor) -> Tensor:
    return output + delta_TO.to(output.dtype).reshape(output.shape)
