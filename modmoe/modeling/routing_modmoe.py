"""What the layers of one model share while it runs: settings of its owner, and what each call says and remembers.

RoutingState   settings of the model: they hold for every call until they are changed.
Pass           one call: named experts, where sequences begin, what was chosen before. A thread runs a pass of its
               own, so that calls at the same time know nothing of each other.
"""

# Shapes: B batch, T tokens (of one sequence), N tokens of all of them in a row, E experts, K chosen at once

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .sequences_modmoe import SequenceMemory


@dataclass
class RoutingState:
    """The settings of a model by its owner, shared by all its layers. What one call says is in its ``Pass``."""

    expert_names: list[str]
    """Names of the experts, for errors."""
    expert: int | None = None
    """The expert that ``set_expert`` named for every token."""
    way: str = "auto"
    """auto, masked, runs or gather: how FFNs are computed; all are equal."""
    active_modules: int | None = None
    """The modules of each expert that count, its best; None is all of them."""
    all_on: bool = False
    """Every stored module counts, whatever the router says: the dense model."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """Where ``record_router_logits`` has them put, by layer."""
    waiting: Any = field(default_factory=weakref.WeakSet, repr=False, compare=False)
    """Passes whose gradients are still to come: layers that are recomputed run in one of them."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what belongs to passes: a copy of a model has made none."""
        return {**self.__dict__, "logits": {}, "waiting": None}

    def __setstate__(self, values: dict[str, Any]) -> None:
        """Take over the settings."""
        self.__dict__.update(values, waiting=weakref.WeakSet())


@dataclass(eq=False)
class Pass:
    """One forward run of the model's backbone."""

    settings: RoutingState
    """The model's."""
    shape: tuple[int, int] = (0, 0)
    """Sequences and tokens of each."""
    expert_ids_N: Tensor | None = None
    """The expert that the caller named for each token."""
    position_BT: Tensor | None = None
    """Position of each token in its document."""
    valid_BT: Tensor | None = None
    """False at padding."""
    prompt_tokens: int | Tensor = 0
    """Leading tokens that are the prompt, or which tokens are, [B, T]; 0 where none is marked."""
    memory: dict[int, SequenceMemory] | None = None
    """What sequence routing keeps with the cache, by layer."""
    logits: dict[int, Tensor] | None = None
    """Where router logits_NE go, by layer, if they are recorded."""
    is_asked: bool = False
    """Whether the output is to have the router logits."""
    before: Pass | None = None
    """The pass that this one began in, if a model runs inside of another."""

    def record(self, layer: int, logits_NE: Tensor) -> None:
        """Keep logits once a pass; recomputation in the backward pass does not change them."""
        if self.logits is not None and layer not in self.logits:
            self.logits[layer] = logits_NE

    @property
    def is_marked(self) -> bool:
        """Whether a prompt is marked in this pass."""
        return isinstance(self.prompt_tokens, Tensor) or self.prompt_tokens > 0

    @property
    def is_said(self) -> bool:
        """Whether the caller said what the input of a layer does not."""
        return not (self.expert_ids_N is None and self.position_BT is None and self.valid_BT is None)

    def kept_choice(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the experts and weights of each token, [N, K], where a prompt fixed them and no one asks for more."""
        memory = None if self.memory is None else self.memory.get(layer)
        if memory is None or memory.choice_BK is None or self.is_marked:
            return None
        ids_BK, weights_BK = memory.choice_BK
        batch, tokens = self.shape
        if len(ids_BK) != batch or self.logits is not None or torch.is_grad_enabled():
            return None
        if tokens == 1:
            return ids_BK, weights_BK
        return ids_BK.repeat_interleave(tokens, 0), weights_BK.repeat_interleave(tokens, 0)

    def keep_choice(self, layer: int, ids_NK: Tensor, weights_NK: Tensor) -> None:
        """Keep with the cache what a prompt fixed, so that tokens after it need no router."""
        memory = None if self.memory is None else self.memory.get(layer)
        batch, tokens = self.shape
        if memory is not None and memory.is_fixed and len(memory.feature_BD) == batch:
            memory.choice_BK = (ids_NK[::tokens].clone(), weights_NK.detach()[::tokens].clone())

    def named_experts(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return the expert named for each of ``tokens``, or None where the router decides."""
        if self.expert_ids_N is not None:
            return self.expert_ids_N.to(device)
        if self.settings.expert is not None:
            return torch.full((tokens,), self.settings.expert, dtype=torch.long, device=device)
        return None


class _Thread(threading.local):
    """What runs in a thread; a context variable would be the same, but compilers cannot trace one."""

    run: Pass | None = None
    """The pass under way."""
    recorder: dict[int, Tensor] | None = None
    """Where the passes of this thread record their router logits."""


_THREAD = _Thread()


def run_of(settings: RoutingState) -> Pass | None:
    """Return the pass of a model that is under way in this thread, if one is."""
    run = _THREAD.run
    return run if run is not None and run.settings is settings else None


def pass_of(settings: RoutingState, x: Tensor) -> Pass:
    """Return the pass that a layer of the model runs in; of its own accord a layer runs in one that says nothing."""
    run = _THREAD.run
    if run is not None and run.settings is settings:
        return run
    if not torch.compiler.is_compiling() and settings.waiting and _is_in_backward():
        # a layer that is recomputed by other means than the model's own
        waiting: list[Pass] = list(settings.waiting)
        if len(waiting) == 1:
            return waiting[0]
        if any(run.is_said for run in waiting):
            raise RuntimeError(
                f"a layer is recomputed in the backward pass, and the gradients of {len(waiting)} calls are to come: "
                "it cannot be known which one it belongs to. Checkpoint with activation_checkpointing_enable(), or "
                "go backward after each call."
            )
    return Pass(settings, (1, x.shape[0]) if x.dim() == 2 else (x.shape[0], x.shape[1]))


def _is_in_backward() -> bool:
    # what torch.utils.checkpoint itself asks
    return bool(torch._C._current_graph_task_id() != -1)


def begin_pass(settings: RoutingState) -> Pass:
    """Begin a pass in this thread; ``end_pass`` ends it."""
    run = _THREAD.run = Pass(settings, before=_THREAD.run, logits=_THREAD.recorder)
    if run.logits is not None:
        run.logits.clear()
    return run


def end_pass(settings: RoutingState, output: Tensor | None) -> None:
    """End the pass of this thread; ``output`` is a tensor that it made, with the graph that leads to it."""
    run = _THREAD.run
    if run is None or run.settings is not settings:
        return
    _THREAD.run = run.before
    run.before = run.logits = None
    if output is not None and output.grad_fn is not None and not torch.compiler.is_compiling():
        # it lives as long as the graph does
        metadata: Any = output.grad_fn.metadata
        metadata["modmoe_pass"] = run
        settings.waiting.add(run)


class Within:
    """Run what stands in the ``with`` block as part of a pass, or of none."""

    def __init__(self, run: Pass | None) -> None:
        """Take the pass."""
        self.run = run

    def __enter__(self) -> Pass | None:
        """Begin."""
        self.before, _THREAD.run = _THREAD.run, self.run
        return self.run

    def __exit__(self, *error: object) -> None:
        """Go back to what ran before."""
        _THREAD.run = self.before


class Recording:
    """Have the passes of this thread record router logits_NE by layer; each pass begins anew."""

    def __enter__(self) -> dict[int, Tensor]:
        """Begin."""
        self.before = _THREAD.recorder
        found: dict[int, Tensor] = {}
        _THREAD.recorder = found
        return found

    def __exit__(self, *error: object) -> None:
        """End."""
        _THREAD.recorder = self.before


def in_this_pass(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Checkpoint a layer so that its recomputation, in whatever thread and after whatever calls, is in this pass."""
    if torch.compiler.is_compiling():
        # a compiler traces the layer once, here, and what it recomputes is what it traced
        return checkpoint(function, *args, **kwargs)
    run = _THREAD.run

    @functools.wraps(getattr(function, "func", function))
    def layer(*inputs: Any, **others: Any) -> Any:
        with Within(run):
            return function(*inputs, **others)

    return checkpoint(layer, *args, **kwargs)


def check_expert_ids(expert_ids: Any, shape: tuple[int, int], experts: int) -> Tensor:
    """Return ``expert_ids`` as a number for each token, [N]; ValueError where they are not what they must be.

    A compiled model cannot look at values without waiting for the device: there a number out of range stops the
    computation, with an error of torch's.
    """
    batch, tokens = shape
    if not isinstance(expert_ids, Tensor):
        raise ValueError(f"expert_ids: is of type {type(expert_ids).__name__}; it must be a tensor of whole numbers.")
    if expert_ids.is_floating_point() or expert_ids.is_complex() or expert_ids.dtype == torch.bool:
        raise ValueError(f"expert_ids: is of {expert_ids.dtype}; it must be of whole numbers, as torch.long.")
    found = tuple(expert_ids.shape)
    if found not in ((batch,), (batch, tokens)):
        raise ValueError(
            f"expert_ids: has the shape {found}; it must be {(batch,)}, one expert a sequence, or {(batch, tokens)}, "
            "one a token."
        )
    ids_N = expert_ids.reshape(-1) if expert_ids.dim() == 2 else expert_ids.repeat_interleave(tokens)
    if torch.compiler.is_compiling():
        is_known = ((ids_N >= 0) & (ids_N < experts)).all()
        torch._assert_async(is_known, f"expert_ids: a number is not between 0 and {experts - 1}.")
    elif ids_N.numel() and ids_N.device.type != "meta":
        least, most = ids_N.aminmax()
        wrong = int(least) if int(least) < 0 else int(most)
        if not 0 <= wrong < experts:
            raise ValueError(f"expert_ids: there is no expert {wrong}; the model's are 0 to {experts - 1}.")
    return ids_N.long()
