"""Which layers of a model an adapter can be attached to, and how large they are; works on the meta device."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, cast

from torch import Tensor, nn

from .base import RoutedAdapter, SiteShape

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def layer_path(path: str) -> str | None:
    """Return the decoder layer that a path lies in: all up to its first number."""
    found = _LAYER.match(path)
    return found.group(1) if found else None


def layer_number(path: str) -> int | None:
    """Return the number of the decoder layer that a path lies in, or None."""
    layer = layer_path(path)
    return None if layer is None else int(layer.rpartition(".")[2])


def find_targets(
    model: nn.Module,
    adapter_class: type[RoutedAdapter],
    targets: str | Iterable[str] | None = None,
    layers: Sequence[int] | int | None = None,
) -> list[str]:
    """Return the paths of the layers that ``targets`` names, in the model's order.

    Raises:
        ValueError: a name matches nothing, or something that this kind of adapter cannot be attached to; the message
            names what there is.
    """
    wanted_layers = None if layers is None else {layers} if isinstance(layers, int) else set(layers)
    fitting = [path for path, module in _modules(model) if fits(module, path, adapter_class)]
    if wanted_layers is not None:
        fitting = [path for path in fitting if layer_number(path) in wanted_layers]
    chosen = adapter_class.targets if targets is None else targets
    if chosen == "all-linear":  # PEFT's word for every layer
        chosen = ()
    if isinstance(chosen, str):
        matched = [path for path in fitting if re.fullmatch(chosen, path)]
        lacking = [] if matched else [chosen]
    else:
        names = list(chosen)
        is_default = targets is None
        matched = [path for path in fitting if not names or any(_ends(path, name) for name in names)]
        lacking = [name for name in names if not any(_ends(path, name) for path in fitting)]
        if is_default and matched:
            lacking = []
    if lacking or not matched:
        there = sorted({path.rpartition(".")[2] if not path.rpartition(".")[2].isdigit() else path for path in fitting})
        kind = adapter_class.kind + (" with a router" if adapter_class.needs_base_router is True else "")
        if not there:
            raise ValueError(
                f"target_modules: this model has no layer that {adapter_class.method} can be attached to; it needs one "
                f"of the kind {kind}."
            )
        raise ValueError(
            f"target_modules: {', '.join(map(repr, lacking))} names no layer that {adapter_class.method} can be "
            f"attached to; there are {', '.join(there)}."
        )
    return matched


def fits(module: nn.Module, path: str, adapter_class: type[RoutedAdapter]) -> bool:
    """Return whether this kind of adapter can be attached to a layer."""
    kind, leaf = adapter_class.kind, path.rpartition(".")[2]
    if kind == "linear":
        return linear_sizes(module) is not None and layer_path(path) is not None
    if kind == "output":
        return layer_path(path) is not None and (linear_sizes(module) is not None or is_block(module, leaf))
    if kind == "block":
        has_router = find_base_router(module) is not None
        return is_block(module, leaf) and (has_router or adapter_class.needs_base_router is not True)
    if kind == "experts":
        return isinstance(getattr(module, "gate_up_proj", None), nn.Parameter)
    return path == layer_path(path) and hasattr(module, "self_attn")


def is_block(module: nn.Module, leaf: str) -> bool:
    """Return whether a submodule is the FFN or the MoE block of a decoder layer."""
    return leaf in ("mlp", "block_sparse_moe", "feed_forward", "ffn") and not isinstance(module, nn.Linear)


def linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """Return input and output width of a linear layer, quantized or GPT-2's; None for anything else."""
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return int(cast(Any, module).nx), int(cast(Any, module).nf)
    sizes = getattr(module, "in_features", None), getattr(module, "out_features", None)
    return None if None in sizes else (int(sizes[0]), int(sizes[1]))  # type: ignore[arg-type]


def is_tied_ffn(module: nn.Module) -> bool:
    """Return whether a submodule is the FFN of a ModularMoE, whose experts are sets of modules in one dense layer."""
    return hasattr(module, "membership")


def find_base_router(block: nn.Module) -> nn.Module | None:
    """Return the router of an MoE block of transformers 5, or None in a dense one and in one of shared modules."""
    if is_tied_ffn(block):
        return None
    for child in block.children():
        if type(child).__name__.endswith("Router") and isinstance(getattr(child, "weight", None), Tensor):
            return child
    return None


def measure(model: nn.Module, target: nn.Module, path: str, adapter_class: type[RoutedAdapter]) -> SiteShape:
    """Return the sizes of a layer; works on the meta device."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    width = int(getattr(config, "hidden_size", 0))
    sizes = linear_sizes(target)
    inputs, outputs = sizes if sizes is not None else (width, width)
    if adapter_class.kind == "output":
        inputs = outputs
    router = find_base_router(target)
    experts = 0 if router is None else int(cast(Tensor, router.weight).shape[0])
    parts: dict[str, tuple[int, int]] = {}
    form = ""
    if adapter_class.kind == "layer":
        form = "shared modules" if any(map(is_tied_ffn, target.modules())) else ""
        for inner, module in target.named_modules():
            inner_sizes = linear_sizes(module)
            if is_block(module, inner):
                inner_sizes = width, width
            if inner_sizes is not None and "routed_" not in inner:
                parts[inner] = inner_sizes
    if adapter_class.kind == "experts":
        gate_up, down = cast(Tensor, target.gate_up_proj), cast(Tensor, target.down_proj)
        experts = gate_up.shape[0]
        sizes_of = [tuple(weight.shape[1:]) for weight in (gate_up, down)]
        # transposed, gate_up ends in 2 I and down begins with I
        swap = sizes_of[0][1] != sizes_of[1][0]
        flat = [(a, b) if swap else (b, a) for a, b in sizes_of]
        parts = {"gate_up_proj": flat[0], "down_proj": flat[1]}
        signs = {"transposed": swap}
        signs |= {word: bool(getattr(target, f"has_{word}", False)) for word in ("bias", "post_expert_norm")}
        form = " and ".join(word for word, is_so in signs.items() if is_so)
        inputs, outputs = flat[0][0], flat[1][1]
    heads = int(getattr(config, "num_attention_heads", 0) or 0)
    return SiteShape(
        inputs=inputs,
        outputs=outputs,
        num_experts=experts,
        base_top_k=0 if router is None else int(_first("top_k", (router, target), 0)),
        renormalises=router is None or bool(_first("norm_topk_prob", (router, target, config), True)),
        expert_form=form,
        parts=parts,
        num_heads=heads,
        head_dim=int(getattr(config, "head_dim", None) or (width // heads if heads else 0)),
        init_range=float(getattr(config, "initializer_range", 0.02) or 0.02),
    )


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(path, module) for path, module in model.named_modules() if path and "routed_" not in path]


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _first(name: str, holders: Iterable[Any], default: Any) -> Any:
    return next((getattr(holder, name) for holder in holders if hasattr(holder, name)), default)
