"""A partition: which module each neuron of a layer is in."""

# Shapes: F neurons, M modules

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from modmoe.analysis.tables import read_tensors, write_tensors
from modmoe.errors import CheckpointError, PartitionError, reason_of


@dataclass(frozen=True, slots=True, eq=False)
class Partition:
    """Disjoint modules of equal size that make up the neurons of one layer."""

    module_F: Tensor
    """int64; the module of each neuron, 0 to num_modules - 1."""
    num_modules: int
    """Modules M."""

    def __post_init__(self) -> None:
        """Refuse modules that are empty, unequal or out of range."""
        if self.module_F.ndim != 1 or self.module_F.dtype != torch.int64:
            raise PartitionError(
                f"module_F is {self.module_F.dtype} of {self.module_F.ndim} dimensions; it is int64 of one."
            )
        if not 1 <= self.num_modules <= len(self.module_F):
            raise PartitionError(
                f"{self.num_modules} modules of {len(self.module_F)} neurons; there must be one at least, and no more "
                "than neurons."
            )
        low, high = int(self.module_F.min()), int(self.module_F.max())
        if low < 0 or high >= self.num_modules:
            raise PartitionError(f"modules {low} to {high} are not all within 0 to {self.num_modules - 1}.")
        sizes = torch.bincount(self.module_F, minlength=self.num_modules)
        if int(sizes.min()) != int(sizes.max()):
            raise PartitionError(
                f"modules have {int(sizes.min())} to {int(sizes.max())} neurons; all must have as many."
            )

    @property
    def permutation_F(self) -> Tensor:
        """int64; the neurons in order of their module, in their own order within it."""
        return torch.argsort(self.module_F, stable=True)

    @property
    def module_size(self) -> int:
        """Neurons of a module."""
        return len(self.module_F) // self.num_modules


def check_num_modules(neurons: int, num_modules: int) -> None:
    """Raise PartitionError, with the nearest right numbers, where ``num_modules`` does not divide ``neurons``."""
    if 0 < num_modules <= neurons and neurons % num_modules == 0:
        return
    small = [number for number in range(1, math.isqrt(neurons) + 1) if neurons % number == 0]
    divisors = sorted({*small, *(neurons // number for number in small)})
    below = [number for number in divisors if number < num_modules][-1:]
    above = [number for number in divisors if number > num_modules][:1]
    nearest = ", ".join(map(str, below + above))
    raise PartitionError(
        "num_modules", f"{num_modules} does not divide {neurons} neurons", f"nearest that do: {nearest} (--num-modules)"
    )


def save_partitions(path: str | Path, partitions: Sequence[Partition]) -> Path:
    """Write the partitions of all layers to one safetensors file, whole or not at all, and return its path.

    ``path`` is the file, or a directory that gets ``partition.safetensors``.
    """
    tensors = {f"layers.{layer}.module_F": partition.module_F for layer, partition in enumerate(partitions)}
    facts = {"kind": "partition", "num_modules": [partition.num_modules for partition in partitions]}
    return write_tensors(path, "partition.safetensors", tensors, facts)


def load_partitions(path: str | Path) -> list[Partition]:
    """Read what ``save_partitions`` wrote; CheckpointError where the file is missing, damaged or of another kind."""
    tensors, facts = read_tensors(path, "partition.safetensors", "partition")
    try:
        return [
            Partition(tensors[f"layers.{layer}.module_F"], int(num_modules))
            for layer, num_modules in enumerate(facts["num_modules"])
        ]
    except KeyError as error:
        raise CheckpointError(str(path), f"{error} is missing", "run the analysis again") from error
    except (TypeError, ValueError, OverflowError) as error:  # a PartitionError is one of them
        raise CheckpointError(str(path), f"damaged: {reason_of(error)}", "run the analysis again") from error
