"""The plan of a new checkpoint: one op for each tensor it will have, checked from headers before any tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from modmoe.checkpoint import Checkpoint, CheckpointWriter
from modmoe.errors import PlanError

Shape = tuple[int, ...]


class Op(Protocol):
    """How one output tensor is made from the source's."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        ...

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the output's shape from the inputs' shapes; raise ValueError where they do not fit."""
        ...

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Read the inputs and return the output."""
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """The source tensor as it is."""

    name: str

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return (self.name,)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the source's shape."""
        return shapes[self.name]

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the source tensor."""
        return source[self.name]


@dataclass(frozen=True, slots=True, eq=False)
class Take:
    """Rows or columns of a source tensor in a new order, transposed afterwards where the layouts differ."""

    name: str
    index: Tensor
    dim: int = 0
    transpose: bool = False

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return (self.name,)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the source's shape with the taken dimension as long as the index."""
        shape = list(shapes[self.name])
        if self.dim >= len(shape):
            raise ValueError(f"has {len(shape)} dimensions, not {self.dim + 1}")
        if len(self.index) and int(self.index.max()) >= shape[self.dim]:
            raise ValueError(f"has {shape[self.dim]} entries where {int(self.index.max()) + 1} are needed")
        shape[self.dim] = len(self.index)
        return tuple(reversed(shape)) if self.transpose else tuple(shape)

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the rows or columns taken."""
        taken = source[self.name].index_select(self.dim, self.index)
        return taken.T.contiguous() if self.transpose else taken


@dataclass(frozen=True, slots=True)
class Stack:
    """Other ops' outputs one after another along the first dimension."""

    parts: tuple[Op, ...]

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return tuple(name for part in self.parts for name in part.inputs)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the shape of the whole."""
        found = [part.shape(shapes) for part in self.parts]
        if len({shape[1:] for shape in found}) != 1:
            raise ValueError(f"cannot put {found} one after another")
        return (sum(shape[0] for shape in found), *found[0][1:])

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the parts one after another."""
        return torch.cat([part.make(source) for part in self.parts])


@dataclass(frozen=True, slots=True, eq=False)
class Const:
    """A tensor that is not in the source: a router, a membership."""

    value: Tensor

    @property
    def inputs(self) -> tuple[str, ...]:
        """Nothing."""
        return ()

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the value's shape."""
        return tuple(self.value.shape)

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the value."""
        return self.value


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A whole checkpoint to be: its configuration, an op for each tensor, and the source tensors left out."""

    config: dict[str, Any]
    ops: dict[str, Op]
    dropped: frozenset[str] = field(default_factory=frozenset)

    def check(self, source: Checkpoint) -> dict[str, Shape]:
        """Return each output's shape, from headers alone.

        Raises PlanError where an input is missing or does not fit, or a source tensor is neither used nor dropped.
        """
        shapes = {name: source.shape(name) for name in source}
        used = {name for op in self.ops.values() for name in op.inputs}
        for name in sorted(used - shapes.keys()):
            raise PlanError(f"{source.directory}: '{name}' is not in the checkpoint; does its family's row fit it?")
        for name in sorted(self.dropped - shapes.keys()):
            raise PlanError(f"{source.directory}: '{name}' is to be left out but is not in the checkpoint.")
        for name in sorted(shapes.keys() - used - self.dropped):
            raise PlanError(f"{source.directory}: '{name}' is neither used nor left out by the plan.")
        made: dict[str, Shape] = {}
        for name, op in self.ops.items():
            try:
                made[name] = op.shape(shapes)
            except ValueError as error:
                raise PlanError(
                    f"{source.directory}: {op.inputs[0]!r} {error}; does config.json fit the weights?"
                ) from error
        return made

    def run(self, source: Mapping[str, Tensor], writer: CheckpointWriter, dtype: torch.dtype | None = None) -> None:
        """Make and write one tensor at a time; floating-point ones as ``dtype`` where it is given."""
        for name, op in self.ops.items():
            tensor = op.make(source)
            writer.write(name, tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor)

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain data for a file or a screen: what becomes of what, without the tensors."""
        return {
            "tensors": {name: [type(op).__name__.lower(), *op.inputs] for name, op in self.ops.items()},
            "dropped": sorted(self.dropped),
        }
