"""A pass over text for models that do not fit in memory: one decoder layer at a time.

The backbone's own forward runs for every batch and layer, with all layers but the one at hand letting their input
through, so that masks, positions and rotations are what the architecture makes them. Weights are views of the
memory-mapped checkpoint: the system reads them when they are used and drops them when it needs the room. The hidden
states of all batches lie in a memory-mapped file between two layers.
"""

# Shapes: B sequences of a batch, T tokens, D model width, V vocabulary

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.passes.stream import (
    Turn,
    Watch,
    WholeModel,
    logits_of,
    my_turns,
    num_layers,
    run_body,
    turns_of,
    watched,
)
from modmoe.analysis.text.calibration import Batch
from modmoe.errors import CalibrationError, CheckpointError
from modmoe.models.families import Family
from modmoe.models.loading import causal_lm_classes, read_settings
from modmoe.models.opened import OpenedModel
from modmoe.storage.checkpoint import Checkpoint

__all__ = ["ByLayer", "fits", "free_bytes", "leaves_half", "model_bytes", "open_model"]


def open_model(
    model: OpenedModel,
    family: Family,
    *,
    by_layer: bool,
    device: torch.device,
    scratch: Path | None = None,
    dtype: torch.dtype | None = None,
) -> WholeModel | ByLayer:
    """Return what runs a model, dense or tied; ``dtype`` None keeps the checkpoint's.

    Raises CheckpointError where the checkpoint cannot be loaded, or not in this way.
    """
    if by_layer:
        return ByLayer(model, family, device=device, scratch=scratch, dtype=dtype)
    return WholeModel(model.load(dtype=dtype, device=device.type), family)


def model_bytes(checkpoint: Checkpoint, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a checkpoint's tensors once they are loaded in ``dtype``, None for the checkpoint's."""
    numbers = sum(torch.Size(checkpoint.shape(name)).numel() for name in checkpoint)
    return numbers * (dtype or _model_dtype(checkpoint)).itemsize


def fits(model_bytes: int, device: torch.device) -> bool:
    """Return whether a model of ``model_bytes`` leaves half of the memory to all else."""
    return leaves_half(model_bytes, free_bytes(device))


def leaves_half(model_bytes: int, free_bytes: int) -> bool:
    """Return whether a model of ``model_bytes`` takes no more than half of ``free_bytes``."""
    return 2 * model_bytes <= free_bytes


def free_bytes(device: torch.device) -> int:
    """Return the bytes that can be had on a device, memory that caches hold for files counted as free."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError):  # where there is a /proc, it knows better
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    with contextlib.suppress(OSError, ValueError):  # a container's limit, or "max"
        free = min(free, int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii")))
    return free


class ByLayer:
    """A checkpoint's model whose decoder layers are in memory one at a time. A ``Runner``."""

    def __init__(
        self,
        model: OpenedModel,
        family: Family,
        *,
        device: torch.device | None = None,
        scratch: Path | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build the model without weights, but for what lies outside its decoder layers.

        Args:
            model: dense or tied; its own code runs only where it is trusted.
            family: its row.
            device: where it runs; None is the CPU.
            scratch: the directory whose disk holds the hidden states; None is the system's for temporary files.
            dtype: the weights' type; None is the checkpoint's.

        Raises:
            CheckpointError: a tensor that the model needs is missing.
        """
        from accelerate import init_empty_weights

        checkpoint = model.checkpoint
        self.checkpoint, self.family, self.scratch = checkpoint, family, scratch
        self.device = device or torch.device("cpu")
        kind, config_kind = causal_lm_classes(model.directory, trust_remote_code=model.trust_remote_code)
        config = read_settings(checkpoint.directory, config_kind)
        with init_empty_weights(include_buffers=False):
            self.model = kind._from_config(config, dtype=dtype or _model_dtype(checkpoint))
        self.model.eval().requires_grad_(False)
        self.num_layers = num_layers(self.model, family)
        self._layers = [self.model.get_submodule(f"{family.layers}.{i}") for i in range(self.num_layers)]
        self._empty = [layer.state_dict() for layer in self._layers]
        for index, layer in enumerate(self._layers):
            layer.forward = partial(self._stand, index, layer.forward)
        self._at, self._wraps = 0, False
        self._hidden_BTD: Tensor | None = None
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(self.device)
        self._fill_outside()

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
        """See ``Runner``. Gradients need the whole model: CalibrationError."""
        if gradients:
            raise CalibrationError(
                "calibration.by_layer",
                "gradients need the whole model",
                "choose another score than taylor, such as wanda, or set it to false",
            )
        self._walk(my_turns(batches), on_input, on_hidden, on_output, on_layer, layers, progress)

    def logits(self, batch: Batch, *, on_hidden: Watch | None = None, on_down: Watch | None = None) -> Tensor:
        """See ``Runner``."""
        states = self._walk([Turn(0, 0, batch)], None, on_hidden, on_down=on_down)
        self._at, self._hidden_BTD = self.num_layers, states[0].to(self.device)
        with torch.no_grad():
            return logits_of(self.model, batch)

    def _walk(
        self,
        turns: Sequence[Turn],
        on_input: Watch | None,
        on_hidden: Watch | None,
        on_output: Watch | None = None,
        on_layer: Callable[[int], None] | None = None,
        layers: int | None = None,
        progress: Callable[[int], None] | None = None,
        on_down: Watch | None = None,
    ) -> list[Tensor]:
        """Run the layers one after the other and return each batch's hidden states, views of the file."""
        layers = layers or self.num_layers
        done, reported = 0, 0
        for stage in self._stages(turns, layers):

            def count(tokens: int) -> None:
                nonlocal done, reported
                # a layer is its share of the way: all layers of a token count as one token
                done += tokens
                if progress is not None:
                    progress(done // layers - reported)
                reported = done // layers

            stage.run(
                on_input=on_input,
                on_hidden=on_hidden,
                on_down=on_down,
                on_output=on_output,
                goes_on=True,
                progress=count,
            )
            if on_layer is not None:
                on_layer(stage.layer)
        return stage.states

    def stages(self, batches: Mapping[str, Sequence[Batch]]) -> Iterator[Stage]:
        """Yield the decoder layers one after the other, each with its weights and with what the ones before it left.

        The last run of each has to go on (see ``Stage.run``). Of several processes each runs its share.
        """
        return self._stages(my_turns(batches), self.num_layers, turns_of(batches))

    def _stages(self, turns: Sequence[Turn], layers: int, all_turns: Sequence[Turn] = ()) -> Iterator[Stage]:
        states: list[Tensor] = []
        for layer in range(layers):
            with self._filled(layer), torch.no_grad():
                yield Stage(self, layer, turns, all_turns or turns, states)

    def _step(self, layer: int, batch: Batch) -> Tensor:
        """Return the output of the layer at hand; its input is what was kept, or the embedding's output."""
        self._at = layer
        try:
            run_body(self.model, batch)
        except _Reached as reached:
            hidden_BTD: Tensor = reached.args[0]
            return hidden_BTD
        raise CheckpointError(
            str(self.checkpoint.directory),
            f"its forward pass goes past layer {layer}",
            "set calibration.by_layer to false",
        )

    def _stand(self, index: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """What a decoder layer does: the one at hand its own forward on the states kept, the others nothing."""
        name = next(iter(kwargs)) if not args else ""
        given_BTD = args[0] if args else kwargs[name]
        if index == min(self._at, self.num_layers - 1) and self._hidden_BTD is not None:
            given_BTD = self._hidden_BTD
        if index != self._at:
            return (given_BTD,) if self._wraps else given_BTD
        output = forward(given_BTD, *args[1:], **kwargs) if args else forward(**{**kwargs, name: given_BTD})
        self._wraps = isinstance(output, tuple)
        raise _Reached(output[0] if self._wraps else output)

    def _fill_outside(self) -> None:
        """Take all that is in no decoder layer from the checkpoint."""
        inside, embedding = f"{self.family.layers}.", self.model.get_input_embeddings().weight
        outside = {name: like for name, like in self.model.state_dict().items() if not name.startswith(inside)}
        names = {name: [name] for name in outside}
        if "lm_head.weight" in outside:
            names["lm_head.weight"].append(f"{self.family.head}.weight")
            if getattr(self.model.config, "tie_word_embeddings", False):
                names["lm_head.weight"] += [name for name, like in self.model.named_parameters() if like is embedding]
        weights = {name: self._read(names[name], like) for name, like in outside.items()}
        self.model.load_state_dict(weights, strict=False, assign=True)

    def _read(self, names: Sequence[str], like: Tensor) -> Tensor:
        for name in names:
            if name in self.checkpoint:
                return self.checkpoint[name].to(self.device, like.dtype)
        if not like.is_meta:  # a buffer that the checkpoint lacks is as the model makes it
            return like
        raise CheckpointError(
            str(self.checkpoint.directory),
            f"'{names[0]}' is missing",
            "if transformers renames it when it loads, set calibration.by_layer to false",
        )

    @contextlib.contextmanager
    def _filled(self, layer: int) -> Iterator[None]:
        """Hold a layer's weights."""
        prefix, empty = f"{self.family.layers}.{layer}.", self._empty[layer]
        weights = {name: self._read([prefix + name], like) for name, like in empty.items()}
        try:
            self._layers[layer].load_state_dict(weights, assign=True)
            yield
        finally:
            self._layers[layer].load_state_dict(empty, assign=True)

    def _open_file(self, turns: Sequence[Turn], like_BTD: Tensor) -> list[Tensor]:
        """Return one tensor a batch, all in one file that has no name and is gone with them."""
        width = like_BTD.shape[-1]
        numbers = [turn.batch.input_ids_BT.numel() * width for turn in turns]
        size_bytes = sum(numbers) * like_BTD.element_size()
        home = self.scratch or Path(tempfile.gettempdir())
        try:
            with tempfile.NamedTemporaryFile(prefix=".hidden-", dir=home) as file:
                if sys.platform == "linux":
                    # without it a full disk would end the process rather than raise
                    os.posix_fallocate(file.fileno(), 0, size_bytes)
                flat = torch.from_file(file.name, shared=True, size=sum(numbers), dtype=like_BTD.dtype)
        except OSError as error:
            raise CalibrationError(
                str(home),
                f"{error.strerror}",
                f"the hidden states need {size_bytes / 1000000000.0:.1f} GB there: make room, or "
                "lower calibration.tokens",
            ) from error
        parts = torch.split(flat, numbers)
        return [part.view(*turn.batch.input_ids_BT.shape, width) for part, turn in zip(parts, turns, strict=True)]


@dataclass(frozen=True, slots=True, eq=False)
class Stage:
    """One decoder layer of a model that runs layer by layer, and its inputs."""

    runner: ByLayer
    """Whose layer it is."""
    layer: int
    """Its number."""
    turns: Sequence[Turn]
    """The batches of this process."""
    all_turns: Sequence[Turn]
    """The batches of all processes."""
    states: list[Tensor]
    """Each batch's hidden states, views of one file; empty before the first layer."""

    def run(
        self,
        *,
        on_input: Watch | None = None,
        on_hidden: Watch | None = None,
        on_down: Watch | None = None,
        on_output: Watch | None = None,
        goes_on: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Run every batch through the layer; see ``watched``.

        With ``goes_on`` the outputs become the next layer's inputs, and this layer cannot run again.
        """
        runner = self.runner
        for number, turn in enumerate(self.turns):
            # a copy, since products may round differently where their input is not aligned
            runner._hidden_BTD = self.states[number].to(runner.device, copy=True) if self.layer else None
            with watched(runner.model, runner.family, turn, on_input, on_hidden, on_down=on_down, layers=[self.layer]):
                hidden_BTD = runner._step(self.layer, turn.batch)
            if on_output is not None:
                new = on_output(self.layer, hidden_BTD, turn)
                hidden_BTD = hidden_BTD if new is None else new
            if goes_on:
                if not self.states:
                    self.states.extend(runner._open_file(self.turns, hidden_BTD))
                self.states[number].copy_(hidden_BTD)
            if progress is not None:
                progress(turn.batch.num_tokens)


class _Reached(Exception):  # noqa: N818 (it is no error)
    """The layer at hand has run; holds its output."""


def _model_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the type that transformers would load a checkpoint in: the configuration's, else the first weight's."""
    named = checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype")
    found = getattr(torch, str(named).removeprefix("torch."), None)
    if isinstance(found, torch.dtype):
        return found
    dtypes = (checkpoint.dtype(name) for name in checkpoint)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.float32)
