"""What each FFN does on each task: one streaming pass in bounded memory. Padding never counts.

Per layer and task a few vectors are kept, and one small sketch of token rows. A sketch of 256 rows (1 KB a neuron)
gives the geometry of neurons to a few hundredths of a cosine at no measurable cost; a Gram matrix costs over half a
forward.
"""

# Shapes: P tasks, T tokens, N some of them, D model width, F neurons, M modules, m neurons of a module,
# S rows of the sketch, V vectors

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.analysis.passes.stream import Runner, Turn, count_tokens, down_weight, draw_positions, starts_of, turns_of
from modmoe.analysis.tables import read_tensors, write_tensors
from modmoe.analysis.text.calibration import Batch
from modmoe.errors import CalibrationError, CheckpointError, PartitionError, reason_of
from modmoe.runtime import ranks

_CHUNK_NUMBERS = 1 << 17
_VECTORS = ("sum_PF", "abs_PF", "square_PF")


Function = TypeVar("Function", bound=Callable[..., Any])


def with_gradients(function: Function) -> Function:
    """Mark a partitioner or a score that reads ``taylor_PF``, so that the pass is made with gradients for it."""
    setattr(function, "needs_gradients", True)  # noqa: B010, mypy knows no attributes of functions
    return function


def reads_gradients(function: Callable[..., Any]) -> bool:
    """Return whether a partitioner or a score was marked by ``with_gradients``."""
    return bool(getattr(function, "needs_gradients", False))


@dataclass(frozen=True, slots=True, eq=False)
class ActivationProfile:
    """The statistics of one layer's neurons h (the input of the down projection), per task. Sums are float64."""

    task_names: tuple[str, ...]
    """The tasks, in the order of the rows."""
    tokens_P: Tensor
    """int64; tokens seen, padding not counted."""
    sum_PF: Tensor
    """Sum of h."""
    abs_PF: Tensor
    """Sum of |h|."""
    square_PF: Tensor
    """Sum of h squared."""
    taylor_PF: Tensor | None
    """Sum of |h dL/dh|, L the summed loss of the next tokens; None where the pass had no gradients."""
    rows_SF: Tensor
    """float32; rows h of S tokens drawn uniformly over all tasks."""
    rows_seen: int
    """Tokens that the sketch was drawn from."""
    norm_PM: Tensor | None = None
    """Sum of the norm of each module's output F_j(x) = down_j h_j, the bias not counted; None without a partition."""

    @property
    def num_neurons(self) -> int:
        """Neurons F of the layer."""
        return self.sum_PF.shape[1]

    def take(self, neurons_N: Tensor) -> ActivationProfile:
        """Return the profile of some of the neurons, in the order of their numbers given, without norms of modules."""
        return replace(
            self,
            sum_PF=self.sum_PF[:, neurons_N],
            abs_PF=self.abs_PF[:, neurons_N],
            square_PF=self.square_PF[:, neurons_N],
            taylor_PF=None if self.taylor_PF is None else self.taylor_PF[:, neurons_N],
            rows_SF=self.rows_SF[:, neurons_N],
            norm_PM=None,
        )

    def merge(self, other: ActivationProfile) -> ActivationProfile:
        """Return the profile of both texts: sums add exactly, tasks of one alone are kept, the sketch is drawn anew.

        Raises:
            CalibrationError: the two are of different widths, or one has gradients or module norms and the other not.
        """
        if self.num_neurons != other.num_neurons:
            raise CalibrationError(
                f"profiles of {self.num_neurons} and {other.num_neurons} neurons are of different layers."
            )
        names = tuple(dict.fromkeys(self.task_names + other.task_names))

        def add(field: str) -> Tensor | None:
            mine: Tensor | None = getattr(self, field)
            theirs: Tensor | None = getattr(other, field)
            if mine is None and theirs is None:
                return None
            if mine is None or theirs is None or mine.shape[1:] != theirs.shape[1:]:
                raise CalibrationError(
                    "profile", f"{field} differs in kind between the two", "profile both in the same way"
                )
            total = mine.new_zeros(len(names), *mine.shape[1:])
            for profile, part in ((self, mine), (other, theirs)):
                total[[names.index(name) for name in profile.task_names]] += part
            return total

        def add_all(field: str) -> Tensor:
            total = add(field)
            assert total is not None
            return total

        return ActivationProfile(
            task_names=names,
            tokens_P=add_all("tokens_P"),
            sum_PF=add_all("sum_PF"),
            abs_PF=add_all("abs_PF"),
            square_PF=add_all("square_PF"),
            taylor_PF=add("taylor_PF"),
            rows_SF=_merge_rows(self, other),
            rows_seen=self.rows_seen + other.rows_seen,
            norm_PM=add("norm_PM"),
        )


def profile_model(
    runner: Runner,
    batches: Mapping[str, Sequence[Batch]],
    *,
    partitions: Sequence[Partition] | None = None,
    gradients: bool = False,
    sketch_rows: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[ActivationProfile]:
    """Run the tasks' batches through a causal LM and return one profile a layer.

    It is the same whatever the runner, and of several processes each gets the same as one alone would.

    Args:
        runner: ``WholeModel``, or ``ByLayer`` for a model that does not fit in memory.
        batches: the batches of each task.
        partitions: one a layer; with them the norms of the modules' outputs are summed too.
        gradients: run the backward pass too and sum |h dL/dh|; parameters stay frozen. Several times slower.
        sketch_rows: token rows kept of each layer; the same tokens in every layer.
        seed: decides which tokens the sketch holds.
        progress: called with tokens that are done; they add up to all tokens.

    Raises:
        CalibrationError: a task has no tokens, activations are not finite, or the runner has no gradients.
        PartitionError: not one partition a layer, or of another number of neurons.
    """
    counts = count_tokens(batches)
    tokens_P = torch.tensor(list(counts.values()))
    profiles: list[ActivationProfile] = []
    if partitions is not None:
        _check_partitions(runner, partitions)
    position_S = draw_positions(sum(counts.values()), sketch_rows, seed)
    layers = [_Sums(len(batches), len(position_S)) for _ in range(runner.num_layers)]
    starts = starts_of(turn.batch.num_tokens for turn in turns_of(batches))

    def watch(layer: int, hidden: Tensor, turn: Turn) -> Tensor | None:
        rows_TF = turn.real_rows(hidden.detach())
        at_S = position_S - starts[turn.index]
        kept = torch.nonzero((at_S >= 0) & (at_S < len(rows_TF))).flatten()
        partition = None if partitions is None else partitions[layer]
        down_DF = None if partitions is None else down_weight(runner.model, runner.family, layer)
        layers[layer].keep(kept, rows_TF, at_S[kept])
        layers[layer].add(turn.task, rows_TF, partition, down_DF)
        if not gradients:
            return None
        tracked = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        tracked.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: layers[layer].add_taylor(turn.task, rows_TF, turn.real_rows(gradient))
        )
        return tracked

    def finish(layer: int) -> None:
        profiles.append(layers[layer].finish(tuple(batches), tokens_P, layer))
        layers[layer] = _Sums(0, 0)  # what it held is in the profile or of no more use

    runner.run(batches, on_hidden=watch, on_layer=finish, gradients=gradients, progress=progress)
    return profiles


def save_profiles(path: str | Path, profiles: Sequence[ActivationProfile]) -> Path:
    """Write the profiles of all layers to one safetensors file, whole or not at all, and return its path.

    ``path`` is the file, or a directory that gets ``profile.safetensors``.
    """
    tensors: dict[str, Tensor] = {}
    for layer, profile in enumerate(profiles):
        tensors[f"layers.{layer}.tokens_P"] = profile.tokens_P
        tensors[f"layers.{layer}.rows_SF"] = profile.rows_SF
        tensors[f"layers.{layer}.rows_seen"] = torch.tensor(profile.rows_seen)
        for field in (*_VECTORS, "taylor_PF", "norm_PM"):
            if (tensor := getattr(profile, field)) is not None:
                tensors[f"layers.{layer}.{field}"] = tensor
    facts = {"kind": "profile", "task_names": list(profiles[0].task_names), "num_layers": len(profiles)}
    return write_tensors(path, "profile.safetensors", tensors, facts)


def load_profiles(path: str | Path) -> list[ActivationProfile]:
    """Read what ``save_profiles`` wrote, bit for bit.

    Raises CheckpointError where the file is missing, damaged or of another kind.
    """
    tensors, facts = read_tensors(path, "profile.safetensors", "profile")
    try:
        profiles = [
            ActivationProfile(
                task_names=tuple(map(str, facts["task_names"])),
                tokens_P=tensors[f"layers.{layer}.tokens_P"],
                sum_PF=tensors[f"layers.{layer}.sum_PF"],
                abs_PF=tensors[f"layers.{layer}.abs_PF"],
                square_PF=tensors[f"layers.{layer}.square_PF"],
                taylor_PF=tensors.get(f"layers.{layer}.taylor_PF"),
                rows_SF=tensors[f"layers.{layer}.rows_SF"],
                rows_seen=int(tensors[f"layers.{layer}.rows_seen"]),
                norm_PM=tensors.get(f"layers.{layer}.norm_PM"),
            )
            for layer in range(int(facts["num_layers"]))
        ]
    except KeyError as error:
        raise CheckpointError(str(path), f"{error} is missing", "run the analysis again") from error
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(str(path), f"damaged: {reason_of(error)}", "run the analysis again") from error
    for layer, profile in enumerate(profiles):
        _check_shapes(path, layer, profile)
    return profiles


def _check_shapes(path: str | Path, layer: int, profile: ActivationProfile) -> None:
    """Refuse a layer whose tensors are not of the tasks and neurons that it says, or are no numbers."""
    tasks, neurons = len(profile.task_names), profile.sum_PF.shape[-1] if profile.sum_PF.ndim else 0
    modules = None if profile.norm_PM is None else profile.norm_PM.shape[-1] if profile.norm_PM.ndim else 0
    expected = {
        "tokens_P": (tasks,),
        "rows_SF": (len(profile.rows_SF) if profile.rows_SF.ndim else 0, neurons),
        "norm_PM": (tasks, modules),
        **dict.fromkeys((*_VECTORS, "taylor_PF"), (tasks, neurons)),
    }
    for field, shape in expected.items():
        tensor = getattr(profile, field)
        if tensor is not None and not (tensor.is_floating_point() or tensor.dtype == torch.int64):
            raise CheckpointError(str(path), f"layers.{layer}.{field} is of {tensor.dtype}", "run the analysis again")
        if tensor is not None and (tuple(tensor.shape) != shape or not bool(torch.isfinite(tensor).all())):
            raise CheckpointError(
                str(path),
                f"layers.{layer}.{field} is {tuple(tensor.shape)} where {shape} finite numbers belong",
                "run the analysis again",
            )


class _Sums:
    """The sums of one layer while the pass runs; allocated where the activations are."""

    def __init__(self, num_tasks: int, num_rows: int) -> None:
        self.num_tasks, self.num_rows = num_tasks, num_rows
        self.steps: dict[str, Tensor] = {}
        self.rows_SF: Tensor | None = None
        self.gram_Mmm: Tensor | None = None

    def keep(self, places: Tensor, rows_TF: Tensor, chosen: Tensor) -> None:
        """Put the chosen rows into the sketch at their places."""
        if self.rows_SF is None:
            self.rows_SF = torch.zeros(self.num_rows, rows_TF.shape[1])
        self.rows_SF[places] = rows_TF[chosen.to(rows_TF.device)].float().cpu()

    def _add(self, field: str, task: int, sums_X: Tensor) -> None:
        """Add the sums of one batch, so that the order of the batches does not matter."""
        if field not in self.steps:
            self.steps[field] = sums_X.new_zeros(len(ranks.STEPS), self.num_tasks, len(sums_X))
        self.steps[field][:, task] += ranks.in_steps(sums_X)

    @torch.no_grad()
    def add(self, task: int, rows_TF: Tensor, partition: Partition | None, down_DF: Tensor | None) -> None:
        width, device = rows_TF.shape[1], rows_TF.device
        sums_VF = torch.zeros(len(_VECTORS), width, dtype=torch.float64, device=device)
        sum_F, abs_F, square_F = sums_VF
        norm_M = torch.zeros(0 if partition is None else partition.num_modules, dtype=torch.float64, device=device)
        # In pieces that stay in the cache, in two buffers that stay there too, and summed by BLAS: each piece in
        # float32 (float64 where the model is), the pieces in float64.
        size, dtype = max(1, _CHUNK_NUMBERS // width), torch.promote_types(rows_TF.dtype, torch.float32)
        one_NF, two_NF = torch.empty(2, min(size, len(rows_TF)), width, dtype=dtype, device=device)
        ones_1N = one_NF.new_ones(1, size)
        for part_NF in torch.split(rows_TF, size):
            free_NF, size_NF = one_NF[: len(part_NF)], two_NF[: len(part_NF)]
            add_1N = ones_1N[:, : len(part_NF)]
            wide_NF = part_NF if part_NF.dtype == dtype else free_NF.copy_(part_NF)
            sum_F += (add_1N @ wide_NF)[0]
            torch.abs(wide_NF, out=size_NF)
            abs_F += (add_1N @ size_NF)[0]
            square_F += (add_1N @ size_NF.square_())[0]
            if partition is not None and down_DF is not None:
                norm_M += self._module_norms(part_NF, partition, down_DF).double().sum(0)
        for field, sums_F in zip(_VECTORS, sums_VF, strict=True):
            self._add(field, task, sums_F)
        if partition is not None:
            self._add("norm_PM", task, norm_M)

    def _module_norms(self, rows_TF: Tensor, partition: Partition, down_DF: Tensor) -> Tensor:
        """Return the norms of F_j(x) = down_j h_j through h' (down_j' down_j) h: T F m products, no T M D numbers."""
        order_F = partition.permutation_F.to(rows_TF.device)
        wide = torch.promote_types(rows_TF.dtype, torch.float32)
        if self.gram_Mmm is None:
            down_MDm = down_DF.detach()[:, order_F].to(wide).view(len(down_DF), partition.num_modules, -1).movedim(1, 0)
            self.gram_Mmm = down_MDm.mT @ down_MDm
        hidden_MTm = rows_TF[:, order_F].to(wide).view(len(rows_TF), partition.num_modules, -1).movedim(1, 0)
        square_MT: Tensor = torch.linalg.vecdot(hidden_MTm @ self.gram_Mmm, hidden_MTm)
        return square_MT.clamp_min(0).sqrt().T

    @torch.no_grad()
    def add_taylor(self, task: int, rows_TF: Tensor, gradient_TF: Tensor) -> None:
        taylor_F = torch.zeros(rows_TF.shape[1], dtype=torch.float64, device=rows_TF.device)
        size = max(1, _CHUNK_NUMBERS // rows_TF.shape[1])
        for part_TF, slope_TF in zip(torch.split(rows_TF, size), torch.split(gradient_TF, size), strict=True):
            taylor_F += (part_TF.double() * slope_TF.double()).abs_().sum(0)
        self._add("taylor_PF", task, taylor_F)

    def finish(self, names: tuple[str, ...], tokens_P: Tensor, layer: int) -> ActivationProfile:
        assert self.rows_SF is not None
        vectors = {field: ranks.from_steps(ranks.add_up(steps.cpu())) for field, steps in self.steps.items()}
        for field, vector in vectors.items():
            if not bool(torch.isfinite(vector).all()):
                raise CalibrationError(
                    f"layer {layer}",
                    f"{field} is not finite: activations overflow, or the weights or config.json are damaged",
                    "run the model in bfloat16 or float32, and modmoe doctor",
                )
        return ActivationProfile(
            names,
            tokens_P,
            vectors["sum_PF"],
            vectors["abs_PF"],
            vectors["square_PF"],
            vectors.get("taylor_PF"),
            ranks.add_up(self.rows_SF),
            int(tokens_P.sum()),
            vectors.get("norm_PM"),
        )


def _check_partitions(runner: Runner, partitions: Sequence[Partition]) -> None:
    if len(partitions) != runner.num_layers:
        raise PartitionError(f"{len(partitions)} partitions for {runner.num_layers} layers; give one a layer.")
    for layer, partition in enumerate(partitions):
        neurons = down_weight(runner.model, runner.family, layer).shape[1]
        if len(partition.module_F) != neurons:
            raise PartitionError(f"layer {layer}", f"a partition of {len(partition.module_F)} neurons for {neurons}")


def _merge_rows(one: ActivationProfile, two: ActivationProfile) -> Tensor:
    """Draw a uniform sample of both texts' tokens from the two sketches; the same for the same two profiles."""
    full = [len(profile.rows_SF) for profile in (one, two) if len(profile.rows_SF) < profile.rows_seen]
    # a sketch that holds all it saw has not met its limit yet
    limit = min(full) if full else max(256, len(one.rows_SF), len(two.rows_SF))
    left = [one.rows_seen, two.rows_seen]
    generator = torch.Generator().manual_seed((one.rows_seen * 1_000_003 + two.rows_seen) % 2**63)
    take = [0, 0]
    for draw in torch.rand(min(limit, sum(left)), generator=generator, dtype=torch.float64).tolist():
        source = 0 if draw * sum(left) < left[0] else 1
        left[source] -= 1
        take[source] += 1
    parts = []
    for profile, count in zip((one, two), take, strict=True):
        order = torch.randperm(len(profile.rows_SF), generator=generator)[:count].sort().values
        parts.append(profile.rows_SF[order])
    return torch.cat(parts)
