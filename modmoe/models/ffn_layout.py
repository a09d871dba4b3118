"""One feed-forward layer's weights, in the same orientation for every family."""

# Shapes: D model width, F neurons

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modmoe.errors import CheckpointError
from modmoe.models.families import Family
from modmoe.storage.checkpoint import Checkpoint


@dataclass(frozen=True, slots=True, eq=False)
class FFNWeights:
    """What one FFN computes: ``down (act(gate x + b) * (up x + b)) + b``; without a gate ``down act(up x + b) + b``."""

    gate_FD: Tensor | None
    up_FD: Tensor
    down_DF: Tensor
    gate_bias_F: Tensor | None = None
    up_bias_F: Tensor | None = None
    down_bias_D: Tensor | None = None

    @property
    def key_FD(self) -> Tensor:
        """The rows that decide when a neuron is active: gate rows, or up rows where there is no gate."""
        return self.up_FD if self.gate_FD is None else self.gate_FD


def read_ffn(tensors: Mapping[str, Tensor], family: Family, layer: int) -> FFNWeights:
    """Return the weights of FFN ``layer``, un-fused and un-transposed; views where the layout allows it.

    ``tensors`` is a Checkpoint or a state dict whose names carry the causal LM's full path.
    """
    prefix = f"{family.layers}.{layer}."

    def tensor(path: str, kind: str) -> Tensor | None:
        found = tensors.get(f"{prefix}{path}.{kind}")
        return found.T if found is not None and family.transposed and kind == "weight" else found

    up, up_bias = tensor(family.up, "weight"), tensor(family.up, "bias")
    down, down_bias = tensor(family.down, "weight"), tensor(family.down, "bias")
    if up is None or down is None:
        missing = family.up if up is None else family.down
        raise KeyError(f"{prefix}{missing}.weight")
    gate, gate_bias = None, None
    if family.fused:
        gate, up = up.chunk(2)
        if up_bias is not None:
            gate_bias, up_bias = up_bias.chunk(2)
    elif family.gate is not None:
        gate, gate_bias = tensor(family.gate, "weight"), tensor(family.gate, "bias")
        if gate is None:
            raise KeyError(f"{prefix}{family.gate}.weight")
    return FFNWeights(gate, up, down, gate_bias, up_bias, down_bias)


class LazyFFNs(Sequence[FFNWeights]):
    """The FFNs of all layers, each read when it is asked for and not kept."""

    def __init__(self, tensors: Mapping[str, Tensor], family: Family, num_layers: int) -> None:
        """Read from ``tensors``, a Checkpoint or a state dict."""
        self.tensors, self.family, self.num_layers = tensors, family, num_layers

    def __len__(self) -> int:
        """Return the number of layers."""
        return self.num_layers

    def __getitem__(self, layer: Any) -> Any:
        """Read one layer."""
        if not 0 <= layer < self.num_layers:
            raise IndexError(layer)
        return read_ffn(self.tensors, self.family, layer)


def check_ffns(checkpoint: Checkpoint, family: Family, num_layers: int, neurons: int) -> None:
    """Raise CheckpointError unless each layer has its FFN where the family's row says, in the shapes it says.

    The line names what was expected, what lies there instead, and the field of ``family:`` that says so.
    """
    for layer in range(num_layers):
        for role, path in (("gate", family.gate), ("up", family.up), ("down", family.down)):
            if path is not None:
                _check_matrix(checkpoint, family, layer, role, path, neurons)


def _check_matrix(checkpoint: Checkpoint, family: Family, layer: int, role: str, path: str, neurons: int) -> None:
    name = f"{family.layers}.{layer}.{path}.weight"
    if name not in checkpoint:
        row = f"where the row of family '{family.model_type}' has its {role} projection"
        lists = Counter(match[1] for match in map(_LAYER.match, checkpoint) if match is not None)
        longer = next((path for path in lists if path.endswith(f".{family.layers}")), None)
        if longer is not None and family.layers not in lists:
            front = longer.removesuffix(family.layers)
            raise CheckpointError(
                f"{checkpoint.directory}: names have '{front}' in front of '{family.layers}', where the row of family "
                f"'{family.model_type}' has the layers; take '{front}' out of the names, or save the model itself."
            )
        there = _what_is_there(checkpoint, family, layer, neurons, lists)
        raise CheckpointError(
            f"{checkpoint.directory}: '{name}' is missing, {row}; {there}; "
            "say under `family:` in a recipe where the FFNs lie (layers, gate, up, down, transposed)."
        )
    shape = checkpoint.shape(name)
    rows = neurons * (2 if family.fused and role != "down" else 1)
    # of [out, in], neurons are the outputs of gate and up, and the inputs of down
    axis = int((role == "down") != family.transposed)
    if len(shape) == 2 and shape[axis] == rows:
        return
    if len(shape) == 2 and shape[1 - axis] == rows:
        order, flag = ("[out, in]", "false") if family.transposed else ("[in, out]", "true")
        raise CheckpointError(
            f"{checkpoint.directory}: '{name}' has shape {list(shape)}, which is stored {order} and not as the row of "
            f"family '{family.model_type}' says; set transposed: {flag} under `family:` in a recipe."
        )
    what = f"{shape[axis]} {'columns' if axis else 'rows'}" if len(shape) == 2 else f"shape {list(shape)}"
    half = ", gate and up in one," if rows != neurons else ""
    raise CheckpointError(
        f"{checkpoint.directory}: '{name}' has {what}{half} where config.json says {neurons} neurons; restore "
        "config.json, or say under `family:` in a recipe where the FFNs lie."
    )


def _what_is_there(checkpoint: Checkpoint, family: Family, layer: int, neurons: int, lists: Counter[str]) -> str:
    """Return which matrices a layer has that could be an FFN's, or where the layers lie."""
    prefix = f"{family.layers}.{layer}."
    found = [name for name in checkpoint if name.startswith(prefix) and len(checkpoint.shape(name)) == 2]
    wide = [name for name in found if {neurons, 2 * neurons} & set(checkpoint.shape(name))] or found
    shown = [f"'{name.removeprefix(prefix)[:60]}' {list(checkpoint.shape(name))}" for name in wide[:4]]
    if shown:
        return f"layer {layer} has {', '.join(shown)}"
    if any(name.startswith(prefix) for name in checkpoint) or not lists:
        return f"layer {layer} has no matrix"
    if family.layers in lists:
        return f"there is no layer {layer}"
    return f"layers lie in '{lists.most_common(1)[0][0][:60]}'"


_LAYER = re.compile(r"(.*?[^\d.])\.\d+\.")
