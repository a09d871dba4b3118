"""What the adapters of one model share while it runs: whose tokens count, what was decided, which routes were taken.

A pass is one forward run of the model, a frame is one decoder layer in it. Each thread has passes of its own, so that
calls at the same time know nothing of each other. Under gradient checkpointing a layer runs again in the backward pass,
which may be in another thread; its frame is found again by the tensor that entered it, so that what was decided the
first time is decided the second time too, whatever else has run in between, and no route is counted twice.
"""

# Shapes: B batch, T tokens (of one sequence, or of all of them in a row), D model width, E experts

from __future__ import annotations

import copy
import inspect
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from modmoe.modeling.sequences_modmoe import find_valid, read_call

from .losses import Route, total_loss


@dataclass
class Pass:
    """One forward run of the model."""

    shape: tuple[int, int] | None = None
    """Sequences and tokens of each; None where the model was called with neither ids nor embeddings."""
    valid_BT: Tensor | None = None
    """False at padding; None where every token counts."""
    position_BT: Tensor | None = None
    """Position of each token in its document, where the caller gave it."""
    answer_BT: Tensor | None = None
    """True at tokens that are learned, where the caller gave labels."""
    prompt_tokens: int | Tensor = 0
    """Leading tokens that are the prompt of a generation, or which tokens are, [B, T]; 0 where none is marked."""
    memory: dict[Any, Any] | None = None
    """What lives as long as the cache, by adapter."""
    routes: list[Route] = field(default_factory=list)
    """What the routers of this pass decided, in order; without gradient once the pass is over."""
    trained: set[str] = field(default_factory=set)
    """Sites whose routers are trained."""

    @property
    def is_marked(self) -> bool:
        """Whether a prompt is marked in this pass."""
        return isinstance(self.prompt_tokens, Tensor) or self.prompt_tokens > 0


@dataclass
class Frame:
    """One decoder layer in one pass."""

    layer: int | None
    run: Pass
    entered: Callable[[], Tensor | None] = lambda: None
    """The tensor that entered the layer, while it lives."""
    decisions: dict[str, Any] = field(default_factory=dict)
    """What was decided, by site; kept for the layer's second run under gradient checkpointing."""
    values: dict[str, Any] = field(default_factory=dict)
    """What sites of the layer tell each other; made anew in each run."""
    is_replay: bool = False
    """Whether this is the second run."""

    def decide(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what was decided under ``key`` in the layer's first run, or decide: for choices without gradient."""
        if key not in self.decisions:
            # what a first run kept for its gradient and a second run does not make would be an error
            with torch.no_grad():
                self.decisions[key] = make()
        return self.decisions[key]

    def share(self, key: str, make: Callable[[], Any]) -> Any:
        """Return the value that a site of this layer made in this run, or make it: for values with gradient."""
        if key not in self.values:
            self.values[key] = make()
        return self.values[key]

    def record(self, route: Route) -> None:
        """Keep a route for losses and reports; once, however often the layer runs."""
        if not self.is_replay:
            route.lost = not torch.is_grad_enabled()
            self.run.routes.append(route)

    def input(self) -> Tensor:
        """Return what entered the decoder layer, [B, T, D]."""
        x_BTD = self.entered()
        if x_BTD is None:
            raise RuntimeError("an adapter reads its decoder layer's input, and was run outside of the layer.")
        return x_BTD


class _Thread(threading.local):
    """What one model runs in a thread."""

    def __init__(self) -> None:
        """Begin with no pass, in each thread that asks."""
        self.run = Pass()
        self.loss: Tensor | None = None
        self.answer_BT: Tensor | None = None
        self.frames: dict[int, Frame] = {}
        self.last: Frame | None = None
        self.between: dict[str, Any] = {}


_KEPT = threading.Lock()
"""Held while frames are put away for the backward pass, which any thread may look for."""


class Context:
    """Follows the passes of one model; made once a model by ``context_of``, and copied with it."""

    def __init__(self) -> None:
        """Begin with no pass."""
        self.loss_scope = "layer"
        """layer: the mean of the layers' losses. all: one loss over the tokens of all layers, as in transformers."""
        self.counts = "tokens"
        """tokens: every token but padding enters the balance. answers: learned tokens alone, where labels are given."""
        self.more_losses: dict[str, float] = {}
        """Factors of further losses of LOSSES, for every router."""
        self.loss_factor = 1.0
        """What the losses are multiplied by: one over the number of passes whose gradients a trainer adds up."""
        self.reads_sequences = False
        """Whether an adapter is weighted by what the sequence said before, which is kept with the cache."""
        self._parameters: list[str] = []
        self._begin()

    def _begin(self) -> None:
        self._here = _Thread()
        self._kept: dict[int, list[tuple[Any, Frame]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Return the settings: a pass under way belongs to the original, not to a copy."""
        return {name: copy.copy(value) for name, value in self.__dict__.items() if name not in ("_here", "_kept")}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(values)
        self._begin()

    @property
    def run(self) -> Pass:
        """This thread's pass, the last one if none is under way."""
        return self._here.run

    @property
    def loss(self) -> Tensor | None:
        """The routers' loss in this thread's last pass, detached; None where no router learned."""
        return self._here.loss

    @property
    def between(self) -> dict[str, Any]:
        """What a site's hooks of this thread's pass keep for those behind them, by a name that has the site's path."""
        return self._here.between

    def frame(self, layer: int | None) -> Frame:
        """Return the frame under way in a layer; a new one where the site lies in no layer."""
        found = None if layer is None else self._here.frames.get(layer)
        return found if found is not None else Frame(layer, self.run)

    def begin_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the labels that the causal LM was called with; a forward pre-hook."""
        labels_BT = kwargs.get("labels")
        if isinstance(labels_BT, Tensor) and labels_BT.dim() == 2:
            self.mark_answers(labels_BT)

    def mark_answers(self, labels_BT: Tensor) -> None:
        """Note the labels of the pass to come, -100 where nothing is learned, for whoever computes the loss itself."""
        self._here.answer_BT = labels_BT != -100

    def begin_pass(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Begin a pass; a forward pre-hook of the backbone, since some trainers call it without its head.

        The keyword ``routing_prompt`` marks a prompt, and is taken out unless the backbone has a use for it too.
        """
        if not self._parameters:
            self._parameters = list(inspect.signature(type(backbone).forward).parameters)[1:]
        has_own = hasattr(backbone, "routing_state")
        prompt = kwargs.get("routing_prompt") if has_own else kwargs.pop("routing_prompt", None)
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        tokens = given.get("inputs_embeds") if given.get("input_ids") is None else given.get("input_ids")
        run, here = Pass(), self._here
        if isinstance(tokens, Tensor):
            run.shape = (tokens.shape[0], tokens.shape[1])
            run.valid_BT = find_valid(given.get("attention_mask"), given.get("past_key_values"), run.shape)
            if here.answer_BT is not None and here.answer_BT.shape == run.shape:
                run.answer_BT = here.answer_BT
            if self.reads_sequences:
                read_call(run, backbone, given, kwargs, prompt)
        here.run, here.answer_BT, here.frames, here.between = run, None, {}, {}
        return args, kwargs

    def enter_layer(self, layer: int, x_BTD: Tensor, *, keep: bool) -> None:
        """Begin a layer's frame; ``keep`` it for a second run in the backward pass."""
        frame = Frame(layer, self.run, weakref.ref(x_BTD))
        self._begin_layer(layer, frame)  # first, so that what only the values of an old frame hold is let go
        with _KEPT:
            kept = [(ref, old) for ref, old in self._kept.get(layer, []) if ref() is not None]
            self._kept[layer] = [*kept, (frame.entered, frame)] if keep else kept

    def enter_again(self, layer: int, x_BTD: Tensor) -> None:
        """Go back to the frame that ``x_BTD`` entered in its first run, where this is the backward pass."""
        if not _in_backward():
            return
        for ref, frame in self._kept.get(layer, []):
            first = ref()
            # checkpointing of the older kind runs on a detached tensor of the same memory
            if first is not None and (first is x_BTD or first.data_ptr() == x_BTD.data_ptr()):
                frame.values, frame.is_replay, frame.entered = {}, True, weakref.ref(x_BTD)
                self._begin_layer(layer, frame)
                return

    def _begin_layer(self, layer: int, frame: Frame) -> None:
        here = self._here
        if here.last is not None and here.last is not frame:
            here.last.values = {}  # they may hold a graph
        here.frames[layer] = here.last = frame

    def end_pass(self, backbone: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Hang the routers' losses on the backbone's output, so that whatever trains it minimises them too."""
        here, loss = self._here, None
        here.loss = None
        if torch.is_grad_enabled():
            trained = [route for route in here.run.routes if route.site in here.run.trained]
            wanted = any(self.more_losses.values())
            if any((route.has_loss or wanted) and route.lost for route in trained):
                raise ValueError(
                    "gradient checkpointing: a router's loss has no gradient with use_reentrant=True; pass "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}."
                )
            loss = total_loss(trained, self.counted(), scope=self.loss_scope, more=self.more_losses)
        # they would keep the graph, and with it what entered the layers, until the next pass
        here.run.routes = [route.detached() for route in here.run.routes]
        if loss is None:
            return output
        here.loss = loss.detach()
        loss = self.loss_factor * loss
        if isinstance(output, Tensor):
            return _with_loss(output, loss)
        if isinstance(output, tuple):
            return (_with_loss(output[0], loss), *output[1:])
        output["last_hidden_state"] = _with_loss(output["last_hidden_state"], loss)
        return output

    def counted(self) -> Tensor | None:
        """Return which tokens of the last pass enter the routers' losses, [B T]; None where all do."""
        run = self.run
        counted_BT = run.valid_BT
        if self.counts == "answers" and run.answer_BT is not None:
            counted_BT = run.answer_BT if counted_BT is None else counted_BT & run.answer_BT
        return None if counted_BT is None else counted_BT.reshape(-1)


class LayerHook:
    """Tells the context that a decoder layer begins: the hook of one layer, and of its children for the second run."""

    def __init__(self, context: Context, layer: int) -> None:
        """Follow layer number ``layer``."""
        self.context, self.layer = context, layer

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the layer's input."""
        x = first_tensor(args, kwargs)
        if x is not None:
            self.context.enter_layer(self.layer, x, keep=module.training)

    def enter_child(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Find the layer's frame again: in the backward pass its own hook may not run, but its first child's does."""
        x = first_tensor(args, kwargs)
        if x is not None:
            self.context.enter_again(self.layer, x)


class _WithLoss(torch.autograd.Function):
    """Passes a tensor on unchanged; in the backward pass the loss gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.dtype, loss.device
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.loss
        return grad, torch.ones((), dtype=dtype, device=device)


def _with_loss(tensor: Tensor, loss: Tensor) -> Tensor:
    joined: Tensor = _WithLoss.apply(tensor, loss)  # type: ignore[no-untyped-call]
    return joined


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor among a call's arguments; decoder layers and FFNs take their input there."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            return value
    return None


def _in_backward() -> bool:
    # what torch.utils.checkpoint itself asks
    return bool(torch._C._current_graph_task_id() != -1)
