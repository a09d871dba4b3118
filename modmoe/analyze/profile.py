"""What each FFN does on each task: one streaming pass in bounded memory. Padding never counts.

Per layer and task a few vectors are kept, and one small sketch of token rows. A sketch of 256 rows (1 KB a neuron)
gives the geometry of neurons to a few hundredths of a cosine at no measurable cost; a Gram matrix costs over half a
forward.
"""

# Shapes: P tasks, T tokens, D model width, F neurons, M modules, m neurons of a module, S rows of the sketch

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from modmoe.analyze.calibration import Batch
from modmoe.analyze.modules import Partition
from modmoe.analyze.storage import read_tensors, write_tensors
from modmoe.analyze.stream import (
    count_tokens,
    down_weight,
    draw_positions,
    frozen,
    num_layers,
    real_rows,
    run_body,
    watched,
)
from modmoe.errors import CalibrationError, CheckpointError, PartitionError
from modmoe.families import Family

_CHUNK_NUMBERS = 1 << 20
_VECTORS = ("sum_PF", "abs_PF", "square_PF", "active_PF")


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
    active_PF: Tensor
    """Number of tokens where |h| exceeds that token's mean |h| over the neurons."""
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
                    f"profile: {field} differs in kind between the two; profile both in the same way."
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
            active_PF=add_all("active_PF"),
            taylor_PF=add("taylor_PF"),
            rows_SF=_merge_rows(self, other),
            rows_seen=self.rows_seen + other.rows_seen,
            norm_PM=add("norm_PM"),
        )


def profile_model(
    model: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    *,
    partitions: Sequence[Partition] | None = None,
    gradients: bool = False,
    sketch_rows: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> list[ActivationProfile]:
    """Run the tasks' batches through a causal LM and return one profile a layer.

    Args:
        model: a transformers causal LM; runs in eval mode and is left as it was.
        family: where its FFNs lie.
        batches: the batches of each task.
        partitions: one a layer; with them the norms of the modules' outputs are summed too.
        gradients: run the backward pass too and sum |h dL/dh|; parameters stay frozen. Several times slower.
        sketch_rows: token rows kept of each layer; the same tokens in every layer.
        seed: decides which tokens the sketch holds.
        progress: called with the tokens of each batch when it is done.

    Raises:
        CalibrationError: a task has no tokens, or activations are not finite.
        PartitionError: not one partition a layer, or of another number of neurons.
    """
    counts = count_tokens(batches)
    layers = [_Sums(len(batches)) for _ in range(num_layers(model, family))]
    if partitions is not None:
        _check_partitions(model, family, partitions, len(layers))
    position_S = draw_positions(sum(counts.values()), sketch_rows, seed)
    task, offset, mask_BT = 0, 0, torch.empty(0)

    def watch(layer: int, hidden: Tensor) -> Tensor | None:
        rows_TF = real_rows(hidden.detach(), mask_BT)
        inside = (position_S >= offset) & (position_S < offset + len(rows_TF))
        partition = None if partitions is None else partitions[layer]
        down_DF = None if partitions is None else down_weight(model, family, layer)
        layers[layer].add(task, rows_TF, position_S[inside] - offset, partition, down_DF)
        if not gradients:
            return None
        tracked = hidden if hidden.requires_grad else hidden.detach().requires_grad_()
        # the lambda runs in this batch's backward pass, before task and mask_BT are bound anew
        tracked.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: layers[layer].add_taylor(task, rows_TF, real_rows(gradient, mask_BT))
        )
        return tracked

    with frozen(model), torch.set_grad_enabled(gradients), watched(model, family, on_hidden=watch):
        for index, name in enumerate(batches):
            for batch in batches[name]:
                task, mask_BT = index, batch.attention_mask_BT
                if gradients:
                    _backward(model, batch)
                else:
                    run_body(model, batch)
                offset += batch.num_tokens
                if progress is not None:
                    progress(batch.num_tokens)
    tokens_P = torch.tensor(list(counts.values()))
    return [sums.finish(tuple(batches), tokens_P, layer) for layer, sums in enumerate(layers)]


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
        return [
            ActivationProfile(
                task_names=tuple(facts["task_names"]),
                tokens_P=tensors[f"layers.{layer}.tokens_P"],
                sum_PF=tensors[f"layers.{layer}.sum_PF"],
                abs_PF=tensors[f"layers.{layer}.abs_PF"],
                square_PF=tensors[f"layers.{layer}.square_PF"],
                active_PF=tensors[f"layers.{layer}.active_PF"],
                taylor_PF=tensors.get(f"layers.{layer}.taylor_PF"),
                rows_SF=tensors[f"layers.{layer}.rows_SF"],
                rows_seen=int(tensors[f"layers.{layer}.rows_seen"]),
                norm_PM=tensors.get(f"layers.{layer}.norm_PM"),
            )
            for layer in range(int(facts["num_layers"]))
        ]
    except KeyError as error:
        raise CheckpointError(f"{path}: {error} is missing; run the analysis again.") from error


class _Sums:
    """The sums of one layer while the pass runs; allocated where the activations are."""

    def __init__(self, num_tasks: int) -> None:
        self.num_tasks = num_tasks
        self.vectors: dict[str, Tensor] = {}
        self.rows: list[Tensor] = []
        self.gram_Mmm: Tensor | None = None

    def _vector(self, field: str, like: Tensor, width: int) -> Tensor:
        if field not in self.vectors:
            self.vectors[field] = torch.zeros(self.num_tasks, width, dtype=torch.float64, device=like.device)
        return self.vectors[field]

    @torch.no_grad()
    def add(
        self, task: int, rows_TF: Tensor, chosen: Tensor, partition: Partition | None, down_DF: Tensor | None
    ) -> None:
        width = rows_TF.shape[1]
        self.rows.append(rows_TF[chosen.to(rows_TF.device)].float().cpu())
        sum_PF, abs_PF, square_PF, active_PF = (self._vector(field, rows_TF, width) for field in _VECTORS)
        # in pieces that stay in the cache: float64 copies of a whole batch would be the largest tensors of the pass
        for part_TF in torch.split(rows_TF, max(1, _CHUNK_NUMBERS // width)):
            wide_TF = part_TF.double()
            sum_PF[task] += wide_TF.sum(0)
            square_PF[task] += torch.linalg.vecdot(wide_TF, wide_TF, dim=0)
            size_TF = wide_TF.abs()
            abs_PF[task] += size_TF.sum(0)
            active_PF[task] += (size_TF > size_TF.mean(1, keepdim=True)).sum(0)
            if partition is not None and down_DF is not None:
                norm_PM = self._vector("norm_PM", rows_TF, partition.num_modules)
                norm_PM[task] += self._module_norms(part_TF, partition, down_DF).double().sum(0)

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
        taylor_PF = self._vector("taylor_PF", rows_TF, rows_TF.shape[1])
        size = max(1, _CHUNK_NUMBERS // rows_TF.shape[1])
        for part_TF, slope_TF in zip(torch.split(rows_TF, size), torch.split(gradient_TF, size), strict=True):
            taylor_PF[task] += (part_TF.double() * slope_TF.double()).abs_().sum(0)

    def finish(self, names: tuple[str, ...], tokens_P: Tensor, layer: int) -> ActivationProfile:
        vectors = {field: vector.cpu() for field, vector in self.vectors.items()}
        for field, vector in vectors.items():
            if not bool(torch.isfinite(vector).all()):
                raise CalibrationError(
                    f"layer {layer}: {field} is not finite; activations overflow; run the model in bfloat16 or float32."
                )
        return ActivationProfile(
            names,
            tokens_P,
            vectors["sum_PF"],
            vectors["abs_PF"],
            vectors["square_PF"],
            vectors["active_PF"],
            vectors.get("taylor_PF"),
            torch.cat(self.rows),
            int(tokens_P.sum()),
            vectors.get("norm_PM"),
        )


def _backward(model: nn.Module, batch: Batch) -> None:
    """Run forward and backward of the summed loss, so that a sequence counts the same in any batch."""
    device = next(model.parameters()).device
    ids_BT, mask_BT = batch.input_ids_BT.to(device), batch.attention_mask_BT.to(device)
    logits_BTV = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False).logits
    target_BT = ids_BT.masked_fill(mask_BT == 0, -100)[:, 1:]
    loss = nn.functional.cross_entropy(
        logits_BTV[:, :-1].flatten(0, 1).to(torch.promote_types(logits_BTV.dtype, torch.float32)),
        target_BT.flatten(),
        ignore_index=-100,
        reduction="sum",
    )
    torch.autograd.backward(loss)


def _check_partitions(model: nn.Module, family: Family, partitions: Sequence[Partition], layers: int) -> None:
    if len(partitions) != layers:
        raise PartitionError(f"{len(partitions)} partitions for {layers} layers; give one a layer.")
    for layer, partition in enumerate(partitions):
        neurons = down_weight(model, family, layer).shape[1]
        if len(partition.module_F) != neurons:
            raise PartitionError(f"layer {layer}: a partition of {len(partition.module_F)} neurons for {neurons}.")


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
