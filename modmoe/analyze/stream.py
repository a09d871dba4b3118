"""One pass of calibration text through a model, with the FFNs' inputs and activations handed out on the way."""

# Shapes: B sequences of a batch, T tokens, D model width, F neurons, X any width

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from modmoe.analyze.calibration import Batch
from modmoe.errors import CalibrationError
from modmoe.families import Family

Watch = Callable[[int, Tensor], Tensor | None]
"""Called with the layer and a tensor as the model made it; may return a tensor to go on with in its place."""


def num_layers(model: nn.Module, family: Family) -> int:
    """Return the number of decoder layers of a causal LM."""
    return len(list(model.get_submodule(family.layers).children()))


def down_weight(model: nn.Module, family: Family, layer: int) -> Tensor:
    """Return the down projection of an FFN as down_DF, whatever its layout."""
    weight = model.get_submodule(f"{family.layers}.{layer}.{family.down}").weight
    assert isinstance(weight, Tensor)
    return weight.T if family.transposed else weight


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Put ``model`` in eval mode with frozen parameters, and back as it was at the end."""
    training = {submodule: submodule.training for submodule in model.modules()}
    learning = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for submodule, was_training in training.items():
            submodule.training = was_training
        for parameter, was_learning in learning.items():
            parameter.requires_grad_(was_learning)


@contextlib.contextmanager
def watched(
    model: nn.Module, family: Family, *, on_input: Watch | None = None, on_hidden: Watch | None = None
) -> Iterator[None]:
    """Hand out each FFN's input x and its activations h, the input of the down projection; hooks are gone at the end.

    Some families flatten the tokens before the FFN: both tensors are [B, T, X] or [B * T, X].
    """

    def hook(watch: Watch, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = next(iter(kwargs)) if not args else ""
            new = watch(layer, args[0] if args else kwargs[name])
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, name: new})

        return before

    handles = []
    try:
        for layer in range(num_layers(model, family)):
            for watch, path in ((on_input, family.ffn), (on_hidden, family.down)):
                if watch is not None:
                    submodule = model.get_submodule(f"{family.layers}.{layer}.{path}")
                    handles.append(submodule.register_forward_pre_hook(hook(watch, layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_body(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """Run a batch through a causal LM without its head: logits over a large vocabulary would be most of the memory."""
    body = getattr(model, "base_model", model)
    device = next(model.parameters()).device
    return body(
        input_ids=batch.input_ids_BT.to(device),
        attention_mask=batch.attention_mask_BT.to(device),
        use_cache=False,
        **options,
    )


def real_rows(tensor: Tensor, mask_BT: Tensor) -> Tensor:
    """Return the rows of tokens that are not padding, in order: [B, T, X] or [B * T, X] becomes [tokens, X]."""
    rows = tensor.reshape(-1, tensor.shape[-1])
    kept = mask_BT.reshape(-1).to(rows.device).bool()
    return rows if bool(kept.all()) else rows[kept]


def draw_positions(total: int, limit: int, seed: int) -> Tensor:
    """Draw ``limit`` of ``total`` positions without replacement; all if there are no more. Sorted int64.

    The number of tokens is known before a pass, so a uniform draw needs no reservoir that is rewritten on the way.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(total, generator=generator)[:limit].sort().values


def count_tokens(batches: Mapping[str, Sequence[Batch]]) -> dict[str, int]:
    """Return the tokens of each task; CalibrationError for a task without any."""
    counts = {name: sum(batch.num_tokens for batch in task) for name, task in batches.items()}
    if not counts:
        raise CalibrationError("tasks: no task is given; name at least one file of text.")
    for name, count in counts.items():
        if not count:
            raise CalibrationError(f"tasks.{name}: no tokens; name a file with text in it.")
    return counts
