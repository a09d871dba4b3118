"""How the tensors of feed-forward layers are named and laid out; nothing else interprets their names.

A dense family keeps its FFNs in a layout of its own, which its row says: gate and up in one tensor, weights transposed,
biases. Tied checkpoints and the experts of most mixtures have three plain linear layers. ``neuron_ops`` takes neurons
from any layout to any other, ``read_ffn`` reads an FFN of any layout.
"""

# Shapes: D model width, F neurons, N neurons taken

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from modmoe.errors import CheckpointError
from modmoe.models.families import Family
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Const, Copy, Op, Shape, Stack, Take

Role = Literal["gate", "up", "down"]
Kind = Literal["weight", "bias"]
ROLES: tuple[Role, ...] = ("gate", "up", "down")
"""What the projections of an FFN are for, in the order in which they are written."""
PLAIN: Mapping[Role, str] = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
"""Names of the projections where each is a linear layer of its own: in tied models, and in experts of most mixtures."""
_KINDS: tuple[Kind, ...] = ("weight", "bias")


@dataclass(frozen=True, slots=True, kw_only=True)
class FFNLayout:
    """Where the tensors of one FFN lie, and in which orientation."""

    prefix: str
    """What their names begin with, the last dot included."""
    paths: Mapping[Role, str]
    """Path of each projection behind the prefix, in the order of ROLES; without ``gate`` where the FFN has none. Gate
    and up of one path are the first and the second half of one tensor."""
    is_transposed: bool = False
    """Whether weights are [in, out] rather than [out, in]."""

    @property
    def roles(self) -> tuple[Role, ...]:
        """The projections that there are."""
        return tuple(self.paths)

    @property
    def is_fused(self) -> bool:
        """Whether gate and up are one tensor."""
        return self.paths.get("gate") == self.paths["up"]

    @property
    def tensors(self) -> tuple[tuple[Role, ...], ...]:
        """The projections tensor by tensor, in the order in which their neurons lie in it."""
        return (("gate", "up"), ("down",)) if self.is_fused else tuple((role,) for role in self.roles)

    def name(self, role: Role, kind: Kind = "weight") -> str:
        """Return the name of the tensor that has a projection's weight or bias; KeyError without that projection."""
        return f"{self.path(role)}.{kind}"

    def path(self, role: Role) -> str:
        """Return the path of a projection's layer in a model; KeyError without that projection."""
        return f"{self.prefix}{self.paths[role]}"

    def role_of(self, name: str) -> Role:
        """Return the projection that a weight is of; KeyError for any other name."""
        for role in self.roles:
            if name == self.name(role):
                return role
        raise KeyError(name)

    def neuron_dim(self, role: Role) -> int:
        """Return the dimension of a weight along which its neurons lie: 0 for rows, 1 for columns."""
        return int((role == "down") != self.is_transposed)

    def neuron_names(self) -> list[str]:
        """Return the names of all tensors that grow with the neurons: weights, then the biases that there may be."""
        weights = [self.name(roles[0]) for roles in self.tensors]
        return weights + [self.name(roles[0], "bias") for roles in self.tensors if roles != ("down",)]

    def biased_roles(self, names: Collection[str]) -> list[Role]:
        """Return the projections that have a bias in a checkpoint of these names."""
        return [role for role in self.roles if self.name(role, "bias") in names]

    def zero_biases(self, neurons: int, dtype: torch.dtype) -> dict[str, Op]:
        """Return the ops of gate and up biases that are zero, by their names; the one behind ``down`` is not there."""
        return {
            self.name(roles[0], "bias"): Const(torch.zeros(len(roles) * neurons, dtype=dtype))
            for roles in self.tensors
            if roles != ("down",)
        }

    def as_stored(self, weight: Tensor) -> Tensor:
        """Return a weight [out, in] as it lies here."""
        return weight.T.contiguous() if self.is_transposed else weight

    def as_plain(self, weight: Tensor) -> Tensor:
        """Return a weight that lies here as [out, in]; a view."""
        return weight.T if self.is_transposed else weight


def dense_layout(family: Family, layer: int) -> FFNLayout:
    """Return how a dense checkpoint of a family keeps the FFN of a layer."""
    paths: dict[Role, str | None] = {"gate": family.gate, "up": family.up, "down": family.down}
    return FFNLayout(
        prefix=f"{family.layers}.{layer}.",
        paths={role: path for role, path in paths.items() if path is not None},
        is_transposed=family.transposed,
    )


def plain_layout(prefix: str, *, has_gate: bool = True) -> FFNLayout:
    """Return the layout of plain linear layers behind a prefix, such as ``prefix_of`` gives for a tied checkpoint."""
    return FFNLayout(prefix=prefix, paths={role: PLAIN[role] for role in ROLES if has_gate or role != "gate"})


def prefix_of(config: Mapping[str, Any], layer: int) -> str:
    """Return what the names of a tied layer's FFN tensors start with, its dot included."""
    return f"{config.get('ffn_layers', 'model.layers')}.{layer}.{config.get('ffn_path', 'mlp')}."


def neuron_ops(checkpoint: Checkpoint, source: FFNLayout, target: FFNLayout, neurons_N: Tensor) -> dict[str, Op]:
    """Return the ops that make an FFN of some neurons of another, by the names that it has in ``target``.

    Args:
        checkpoint: what ``source`` lies in; headers are read. Biases are written where it has them.
        source: the layout there.
        target: the layout of what is written, with the same projections.
        neurons_N: int64, numbers of the source's neurons in the order in which the target has them.
    """
    # up lies behind all neurons of gate where both are one tensor; down has each neuron once
    up_begins = checkpoint.shape(source.name("down"))[source.neuron_dim("down")] if source.is_fused else 0

    def take(kind: Kind, *roles: Role, transpose: bool) -> Op:
        name, dim = source.name(roles[0], kind), source.neuron_dim(roles[0])
        index = torch.cat([neurons_N + up_begins if role == "up" else neurons_N for role in roles])
        return Take(name, index) if kind == "bias" else Take(name, index, dim=dim, transpose=transpose)

    def op(kind: Kind, roles: tuple[Role, ...]) -> Op:
        if kind == "bias" and roles == ("down",):
            return Copy(source.name("down", "bias"))
        if len(roles) == 1 or source.is_fused:
            return take(kind, *roles, transpose=source.is_transposed != target.is_transposed)
        halves = Stack(tuple(take(kind, role, transpose=source.is_transposed) for role in roles))
        return Transposed(halves) if kind == "weight" and target.is_transposed else halves

    return {
        target.name(roles[0], kind): op(kind, roles)
        for roles in target.tensors
        for kind in _KINDS
        if kind == "weight" or source.name(roles[0], kind) in checkpoint
    }


@dataclass(frozen=True, slots=True)
class Transposed:
    """Another op's matrix with its rows as columns."""

    op: Op

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return self.op.inputs

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the op's shape, reversed."""
        return tuple(reversed(self.op.shape(shapes)))

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the op's type."""
        return self.op.dtype_of(dtypes)

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the transposed matrix."""
        return self.op.make(source).T.contiguous()


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

    def take(self, neurons_N: Tensor) -> FFNWeights:
        """Return the FFN of some of the neurons, in the order of their numbers given."""
        return FFNWeights(
            gate_FD=None if self.gate_FD is None else self.gate_FD[neurons_N],
            up_FD=self.up_FD[neurons_N],
            down_DF=self.down_DF[:, neurons_N],
            gate_bias_F=None if self.gate_bias_F is None else self.gate_bias_F[neurons_N],
            up_bias_F=None if self.up_bias_F is None else self.up_bias_F[neurons_N],
            down_bias_D=self.down_bias_D,
        )


def read_ffn(tensors: Mapping[str, Tensor], family: Family, layer: int) -> FFNWeights:
    """Return the weights of FFN ``layer``, un-fused and un-transposed; views where the layout allows it.

    ``tensors`` is a Checkpoint or a state dict whose names carry the causal LM's full path.
    """
    layout = dense_layout(family, layer)
    # a tensor that is gate and up is read once, as up
    roles = [role for role in layout.roles if role != "gate" or not layout.is_fused]
    weights = {role: layout.as_plain(tensors[layout.name(role)]) for role in roles}
    biases = {role: tensors.get(layout.name(role, "bias")) for role in roles}
    if layout.is_fused:
        weights["gate"], weights["up"] = weights["up"].chunk(2)
        if (bias := biases["up"]) is not None:
            biases["gate"], biases["up"] = bias.chunk(2)
    return FFNWeights(
        gate_FD=weights.get("gate"),
        up_FD=weights["up"],
        down_DF=weights["down"],
        gate_bias_F=biases.get("gate"),
        up_bias_F=biases["up"],
        down_bias_D=biases["down"],
    )


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
        for role in dense_layout(family, layer).roles:
            _check_matrix(checkpoint, family, layer, role, neurons)


def _check_matrix(checkpoint: Checkpoint, family: Family, layer: int, role: Role, neurons: int) -> None:
    layout = dense_layout(family, layer)
    name, axis = layout.name(role), layout.neuron_dim(role)
    if name not in checkpoint:
        row = f"where the row of family '{family.model_type}' has its {role} projection"
        lists = Counter(match[1] for match in map(_LAYER.match, checkpoint) if match is not None)
        longer = next((path for path in lists if path.endswith(f".{family.layers}")), None)
        if longer is not None and family.layers not in lists:
            front = longer.removesuffix(family.layers)
            raise CheckpointError(
                str(checkpoint.directory),
                f"names have '{front}' in front of '{family.layers}', where the row of "
                f"family '{family.model_type}' has the layers",
                f"take '{front}' out of the names, or save the model itself",
            )
        there = _what_is_there(checkpoint, family, layer, neurons, lists)
        raise CheckpointError(
            str(checkpoint.directory),
            f"'{name}' is missing, {row}; {there}",
            "say under `family:` in a recipe where the FFNs lie (layers, gate, up, down, transposed)",
        )
    shape = checkpoint.shape(name)
    rows = neurons * (2 if layout.is_fused and role != "down" else 1)
    if len(shape) == 2 and shape[axis] == rows:
        return
    if len(shape) == 2 and shape[1 - axis] == rows:
        order, flag = ("[out, in]", "false") if layout.is_transposed else ("[in, out]", "true")
        raise CheckpointError(
            str(checkpoint.directory),
            f"'{name}' has shape {list(shape)}, which is stored {order} and not as the "
            f"row of family '{family.model_type}' says",
            f"set transposed: {flag} under `family:` in a recipe",
        )
    what = f"{shape[axis]} {'columns' if axis else 'rows'}" if len(shape) == 2 else f"shape {list(shape)}"
    half = ", gate and up in one," if rows != neurons else ""
    raise CheckpointError(
        str(checkpoint.directory),
        f"'{name}' has {what}{half} where config.json says {neurons} neurons",
        "restore config.json, or say under `family:` in a recipe where the FFNs lie",
    )


def _what_is_there(checkpoint: Checkpoint, family: Family, layer: int, neurons: int, lists: Counter[str]) -> str:
    """Return which matrices a layer has that could be an FFN's, or where the layers lie."""
    prefix = f"{family.layers}.{layer}."
    matrices = [name for name in checkpoint if name.startswith(prefix) and len(checkpoint.shape(name)) == 2]
    wide = [name for name in matrices if {neurons, 2 * neurons} & set(checkpoint.shape(name))] or matrices
    shown = [f"'{name.removeprefix(prefix)[:60]}' {list(checkpoint.shape(name))}" for name in wide[:4]]
    if shown:
        return f"layer {layer} has {', '.join(shown)}"
    if any(name.startswith(prefix) for name in checkpoint) or not lists:
        return f"layer {layer} has no matrix"
    if family.layers in lists:
        return f"there is no layer {layer}"
    return f"layers lie in '{lists.most_common(1)[0][0][:60]}'"


_LAYER = re.compile(r"(.*?[^\d.])\.\d+\.")
