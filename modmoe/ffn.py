"""One feed-forward layer's weights, in the same orientation for every family."""

# Shapes: D model width, F neurons

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from modmoe.families import Family


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
