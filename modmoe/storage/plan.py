"""The plan of a new checkpoint: one op for each tensor it will have, checked from headers before any tensor is read.

Ops say from headers what they will make, so that whole shards can be laid out, and make it a piece at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial, reduce
from typing import Any, Protocol

import torch
from torch import Tensor

from modmoe.errors import PlanError
from modmoe.storage.checkpoint import Checkpoint, CheckpointWriter
from modmoe.storage.shards import PIECE_BYTES, Made

Shape = tuple[int, ...]

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Op(Protocol):
    """How one output tensor is made from the source's."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        ...

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the output's shape from the inputs' shapes; raise ValueError where they do not fit."""
        ...

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the output's type from the inputs' types."""
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

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the source's type."""
        return dtypes[self.name]

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
        if len(self.index) and int(self.index.min()) < 0:
            raise ValueError(f"has no entry {int(self.index.min())}")
        shape[self.dim] = len(self.index)
        return tuple(reversed(shape)) if self.transpose else tuple(shape)

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the source's type."""
        return dtypes[self.name]

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the rows or columns taken."""
        taken = source[self.name].index_select(self.dim, self.index)
        return taken.T.contiguous() if self.transpose else taken

    def pieces(self, source: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield what ``make`` returns, some rows at a time.

        By NumPy, which takes columns three times as fast as torch does and knows no bfloat16: bits are bits.
        """
        tensor = source[self.name].detach().to("cpu")
        bits, index = tensor.view(_BITS[tensor.element_size()]).numpy(), self.index.numpy()
        # the dimension of the source that becomes the rows of the output
        cut = 1 if self.transpose else 0
        count = len(index) if self.dim == cut else bits.shape[cut]
        step = max(1, PIECE_BYTES * bits.shape[cut] // max(1, bits.nbytes))
        for begin in range(0, count, step):
            rows = slice(begin, begin + step)
            if self.dim == cut:
                taken = bits.take(index[rows], axis=self.dim)
            else:
                taken = (bits[:, rows] if cut else bits[rows]).take(index, axis=self.dim)
            yield torch.from_numpy(taken.T if self.transpose else taken).view(tensor.dtype)


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

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the type that holds all parts."""
        return reduce(torch.promote_types, [part.dtype_of(dtypes) for part in self.parts])

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the parts one after another."""
        return torch.cat([part.make(source) for part in self.parts])

    def pieces(self, source: Mapping[str, Tensor]) -> Iterator[Tensor]:
        """Yield what ``make`` returns, piece by piece."""
        for part in self.parts:
            yield from pieces_of(part, source)


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

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the value's type."""
        return self.value.dtype

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
            raise PlanError(
                str(source.directory),
                f"'{name}' is not in the checkpoint, and the plan reads it",
                "say under `family:` in a recipe where the FFNs lie",
            )
        for name in sorted(self.dropped - shapes.keys()):
            raise PlanError(str(source.directory), f"'{name}' is to be left out but is not in the checkpoint")
        for name in sorted(shapes.keys() - used - self.dropped):
            raise PlanError(str(source.directory), f"'{name}' is neither used nor left out by the plan")
        made: dict[str, Shape] = {}
        for name, op in self.ops.items():
            try:
                made[name] = op.shape(shapes)
            except ValueError as error:
                raise PlanError(
                    str(source.directory), f"{op.inputs[0]!r} {error}; does config.json fit the weights?"
                ) from error
        return made

    def run(self, source: Mapping[str, Tensor], writer: CheckpointWriter, dtype: torch.dtype | None = None) -> None:
        """Make and write all tensors, pieces of two at a time; floating-point ones as ``dtype`` where it is given.

        Raises CheckpointError where the disk is full or cannot be written.
        """
        writer.stream(self.outputs(source, dtype))

    def outputs(self, source: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> dict[str, Made]:
        """Return the type, the shape and the making of each tensor, before any is made; ``dtype`` as for ``run``."""
        if isinstance(source, Checkpoint):
            shapes = {name: source.shape(name) for name in source}
            dtypes = {name: source.dtype(name) for name in source}
        else:
            shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
            dtypes = {name: tensor.dtype for name, tensor in source.items()}
        made: dict[str, Made] = {}
        for name, op in self.ops.items():
            kind = op.dtype_of(dtypes)
            kind = dtype if dtype is not None and kind.is_floating_point else kind
            made[name] = Made(kind, op.shape(shapes), partial(_cast, op, source, kind))
        return made

    def describe(self) -> dict[str, Any]:
        """Return the plan as plain data for a file or a screen: what becomes of what, without the tensors."""
        return {
            "tensors": {name: [type(op).__name__.lower(), *op.inputs] for name, op in self.ops.items()},
            "dropped": sorted(self.dropped),
        }


def pieces_of(op: Op, source: Mapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield what an op makes: some rows at a time where it has a method ``pieces``, else the whole."""
    pieces = getattr(op, "pieces", None)
    if pieces is not None:
        yield from pieces(source)
    else:
        yield op.make(source).detach()


def _cast(op: Op, source: Mapping[str, Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in pieces_of(op, source):
        if piece.dtype == dtype:
            yield piece
        else:
            flat, step = piece.reshape(-1), PIECE_BYTES // dtype.itemsize
            for begin in range(0, len(flat), step):
                yield flat[begin : begin + step].to(dtype)
