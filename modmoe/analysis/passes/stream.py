"""Calibration text run through a model, with the FFNs' inputs and activations handed out on the way.

A ``Runner`` decides in what order: ``WholeModel`` takes one batch after the other, ``ByLayer`` of
``modmoe.analysis.passes.by_layer`` one layer after the other. What is handed out is the same.
"""

# Shapes: B sequences of a batch, T tokens, D model width, F neurons, V vocabulary, X any width

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from modmoe.analysis.text.calibration import Batch
from modmoe.errors import CalibrationError
from modmoe.models.families import Family
from modmoe.models.ffn_layout import dense_layout
from modmoe.runtime import ranks


@dataclass(frozen=True, slots=True, eq=False)
class Turn:
    """A batch and its place among all batches of all tasks."""

    index: int
    """Number of the batch."""
    task: int
    """Number of its task."""
    batch: Batch
    """The batch."""

    def real_rows(self, tensor: Tensor) -> Tensor:
        """Return the rows of tokens that are not padding, in order; see ``real_rows``."""
        return real_rows(tensor, self.batch.attention_mask_BT)


Watch = Callable[[int, Tensor, Turn], Tensor | None]
"""Called with the layer, a tensor as the model made it and the batch; may return a tensor to go on with instead."""


class Runner(Protocol):
    """Runs text through a causal LM."""

    model: nn.Module
    """The causal LM. The weights of a decoder layer need be there only while that layer runs."""
    family: Family
    """Where its FFNs lie."""
    num_layers: int
    """Decoder layers."""

    def run(
        self,
        batches: Mapping[str, Sequence[Batch]],
        *,
        on_input: Watch | None = None,
        on_hidden: Watch | None = None,
        on_output: Watch | None = None,
        on_layer: Callable[[int], None] | None = None,
        layers: int | None = None,
        gradients: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Run every batch of every task, once, in evaluation mode; of several processes each runs its share.

        Args:
            batches: the batches of each task.
            on_input: gets each FFN's input x, as ``watched`` hands it out.
            on_hidden: gets each FFN's activations h, the input of its down projection.
            on_output: gets each decoder layer's output, [B, T, D].
            on_layer: called with each layer, in order, when it has seen every batch.
            layers: the first so many layers are enough.
            gradients: run the backward pass of the summed loss too, so that a hook on a tensor gets its gradient.
            progress: called with tokens that are done; they add up to all tokens.

        Raises:
            CalibrationError: gradients are asked of a runner that has none to give.
        """
        ...

    def logits(self, batch: Batch, *, on_hidden: Watch | None = None, on_down: Watch | None = None) -> Tensor:
        """Return logits_BTV of one batch."""
        ...


class WholeModel:
    """A model that is in memory as a whole: one batch after the other."""

    def __init__(self, model: nn.Module, family: Family) -> None:
        """Run ``model``, a transformers causal LM, which is left as it was after each run."""
        self.model, self.family = model, family
        self.num_layers = num_layers(model, family)

    def run(
        self,
        batches: Mapping[str, Sequence[Batch]],
        *,
        on_input: Watch | None = None,
        on_hidden: Watch | None = None,
        on_output: Watch | None = None,
        on_layer: Callable[[int], None] | None = None,
        layers: int | None = None,
        gradients: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """See ``Runner``; all layers run whatever ``layers`` is."""
        with frozen(self.model), torch.set_grad_enabled(gradients):
            for turn in my_turns(batches):
                with watched(self.model, self.family, turn, on_input, on_hidden, on_output):
                    (_backward if gradients else run_body)(self.model, turn.batch)
                if progress is not None:
                    progress(turn.batch.num_tokens)
        for layer in range(self.num_layers):
            if on_layer is not None:
                on_layer(layer)

    def logits(self, batch: Batch, *, on_hidden: Watch | None = None, on_down: Watch | None = None) -> Tensor:
        """See ``Runner``."""
        hooks = watched(self.model, self.family, Turn(0, 0, batch), None, on_hidden, on_down=on_down)
        with frozen(self.model), torch.no_grad(), hooks:
            return logits_of(self.model, batch)


def turns_of(batches: Mapping[str, Sequence[Batch]]) -> list[Turn]:
    """Return the batches of all tasks, numbered."""
    pairs = [(task, batch) for task, items in enumerate(batches.values()) for batch in items]
    return [Turn(index, task, batch) for index, (task, batch) in enumerate(pairs)]


def my_turns(batches: Mapping[str, Sequence[Batch]]) -> list[Turn]:
    """Return this process's share of the batches, numbered among all; CalibrationError where there are too few."""
    turns = turns_of(batches)
    if len(turns) < ranks.num_ranks():
        raise CalibrationError(
            "calibration",
            f"{len(turns)} batches are too few for {ranks.num_ranks()} processes",
            "start fewer, or lower calibration.batch_size",
        )
    return [turn for turn in turns if ranks.is_mine(turn.index)]


def starts_of(sizes: Iterable[int]) -> list[int]:
    """Return where each of some parts begins when they lie one behind the other."""
    return list(itertools.accumulate(sizes, initial=0))[:-1]


def num_layers(model: nn.Module, family: Family) -> int:
    """Return the number of decoder layers of a causal LM."""
    return len(list(model.get_submodule(family.layers).children()))


def down_weight(model: nn.Module, family: Family, layer: int) -> Tensor:
    """Return the down projection of an FFN as down_DF, whatever its layout."""
    layout = dense_layout(family, layer)
    weight = model.get_submodule(layout.path("down")).weight
    assert isinstance(weight, Tensor)
    return layout.as_plain(weight)


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
    model: nn.Module,
    family: Family,
    turn: Turn,
    on_input: Watch | None = None,
    on_hidden: Watch | None = None,
    on_output: Watch | None = None,
    *,
    on_down: Watch | None = None,
    layers: Iterable[int] | None = None,
) -> Iterator[None]:
    """Hand out each FFN's input x, its activations h and each layer's output; hooks are gone at the end.

    ``on_down`` gets h as well, once the down projection has run, and may return another output of it.

    h is the input of the down projection. Some families flatten the tokens before the FFN: x and h are [B, T, X] or
    [B * T, X]. ``layers`` None watches all layers.
    """

    def before(watch: Watch, layer: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            name = next(iter(kwargs)) if not args else ""
            new = watch(layer, args[0] if args else kwargs[name], turn)
            if new is None:
                return None
            return ((new, *args[1:]), kwargs) if args else ((), {**kwargs, name: new})

        return hook

    def behind(watch: Watch, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        def hook(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if isinstance(output, tuple):
                new = watch(layer, output[0], turn)
                return None if new is None else (new, *output[1:])
            return watch(layer, output, turn)

        return hook

    def instead(watch: Watch, layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], Any]:
        return lambda _, args, output: watch(layer, args[0], turn)

    handles = []
    try:
        for layer in range(num_layers(model, family)) if layers is None else layers:
            place = f"{family.layers}.{layer}"
            for watch, path in ((on_input, family.ffn), (on_hidden, family.down)):
                if watch is not None:
                    submodule = model.get_submodule(f"{place}.{path}")
                    handles.append(submodule.register_forward_pre_hook(before(watch, layer), with_kwargs=True))
            if on_down is not None:
                down = model.get_submodule(f"{place}.{family.down}")
                handles.append(down.register_forward_hook(instead(on_down, layer)))
            if on_output is not None:
                handles.append(model.get_submodule(place).register_forward_hook(behind(on_output, layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_body(model: nn.Module, batch: Batch) -> Any:
    """Run a batch through a causal LM without its head: logits over a large vocabulary would be most of the memory."""
    return getattr(model, "base_model", model)(**_inputs(model, batch))


def logits_of(model: nn.Module, batch: Batch) -> Tensor:
    """Return logits_BTV of a batch."""
    logits_BTV: Tensor = model(**_inputs(model, batch)).logits
    return logits_BTV


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    device = next(model.parameters()).device
    return {
        "input_ids": batch.input_ids_BT.to(device),
        "attention_mask": batch.attention_mask_BT.to(device),
        "use_cache": False,
    }


def _backward(model: nn.Module, batch: Batch) -> None:
    """Run forward and backward of the summed loss, so that a sequence counts the same in any batch."""
    logits_BTV = logits_of(model, batch)
    ids_BT, mask_BT = batch.input_ids_BT.to(logits_BTV.device), batch.attention_mask_BT.to(logits_BTV.device)
    loss = nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32)),
        ids_BT.masked_fill(mask_BT == 0, -100)[:, 1:].flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    torch.autograd.backward(loss)


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
        raise CalibrationError("tasks", "no task is given", "name at least one file of text")
    for name, count in counts.items():
        if not count:
            raise CalibrationError(f"tasks.{name}", "no tokens", "name a file with text in it")
    return counts
