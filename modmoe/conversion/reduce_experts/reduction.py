"""Pruning and merging the experts of a native mixture of experts, which stays one of its own format.

With X_e the calibration tokens routed to expert e, f_e(x) its output and g_e(x) what the router multiplies that with:

    reap          mean over X_e of g_e(x) |f_e(x)|     REAP, https://arxiv.org/abs/2510.13999, equation 9
    frequency     |X_e|                                as in MC-SMoE, https://arxiv.org/abs/2310.01334
    activation    mean over X_e of |f_e(x)|            MAN, https://arxiv.org/abs/2606.15716
    msan          mean over X_e of |f_e(x)|^2          MSAN, the same paper
    contribution  sum over X_e of g_e(x) |f_e(x)|      frequency, gate and norm together, which that paper's principle
                                                       allows where the tasks are those that the model will be used for
    random        a uniform number                     the control that every table needs

Pruning keeps the experts of the highest score, in their order, and their rows of the router (GLM-4-MoE's bias too). A
softmax then runs over those that are left, as in REAP.

Merging is HC-SMoE, https://arxiv.org/abs/2410.08589: average linkage on the experts' mean outputs over all tokens,
E[f_e(x)], until so many clusters are left; each cluster becomes the mean of its experts' weights, weighted by |X_e|.
HC-SMoE keeps the router whole and sends several of its rows to one expert, for which no native format has a place. Here
a cluster's row is the mean of its experts' rows with the same weights. The row of the most frequent expert alone was
worse each time on a model of 0.7 M parameters and eight experts, merged to six, four and two.
"""

# Shapes: E experts of the source, N experts that are left, D model width

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from modmoe.conversion.reduce_experts.statistics import ExpertStats
from modmoe.errors import CheckpointError, RecipeError, did_you_mean
from modmoe.models.loading import is_tied_type
from modmoe.recipe.schema import ExpertsRecipe
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Copy, Op, Plan, Shape, Stack, Take

FAMILIES = {"flex_olmo": 1, "glm4_moe": 2, "mixtral": 1, "olmoe": 1, "qwen2_moe": 1, "qwen3_moe": 1}
"""Architectures whose experts can be pruned and merged, and the fewest experts that their code runs with."""
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_BLOCK = re.compile(r"^(?P<block>.+\.layers\.(?P<layer>\d+)\.(?:mlp|block_sparse_moe)\.)(?P<rest>.+)$")
_OWN = re.compile(r"^experts\.(\d+)\.(.+)$")
_FUSED = re.compile(r"^experts\.[a-z_]+$")
_ROUTER = ("gate.weight", "gate.e_score_correction_bias")


def _mean(sum_E: Tensor, stats: ExpertStats) -> Tensor:
    # an expert that no token went to has nothing to show and goes first
    return sum_E / stats.count_E.clamp_min(1)


SCORES: dict[str, Callable[[ExpertStats, int], Tensor]] = {
    "reap": lambda stats, seed: _mean(stats.weighted_E, stats),
    "frequency": lambda stats, seed: stats.count_E,
    "activation": lambda stats, seed: _mean(stats.norm_E, stats),
    "msan": lambda stats, seed: _mean(stats.square_E, stats),
    "contribution": lambda stats, seed: stats.weighted_E,
    "random": lambda stats, seed: torch.rand(
        len(stats.count_E), generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ),
}
"""Name to the scores of a layer's experts, [E] float64, from its statistics and a seed."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of the experts of one layer."""

    groups: tuple[tuple[int, ...], ...]
    """For each expert that is left, the source's experts that it is made of."""
    shares: tuple[tuple[float, ...], ...]
    """The weight of each of them and of its row of the router, 1 in all."""


def choose(stats: ExpertStats, request: ExpertsRecipe, seed: int) -> Choice:
    """Return which experts of a layer are left, or become one; ties go to the lower number.

    Raises RecipeError for an unknown score.
    """
    assert request.num_experts is not None
    if request.assignment == "merge":
        return _merge(stats, request.num_experts)
    check_score(request.score)
    ranking_E = SCORES[request.score](stats, seed).sort(descending=True, stable=True).indices
    return keep(ranking_E[: request.num_experts].sort().values.tolist())


def keep(experts: Sequence[int]) -> Choice:
    """Return the choice that leaves the numbered experts as they are."""
    return Choice(tuple((expert,) for expert in experts), ((1.0,),) * len(experts))


def check_score(score: str) -> None:
    """Raise RecipeError where there is no such score."""
    if score not in SCORES:
        raise RecipeError("experts.score", f"no score '{score}'", did_you_mean(score, SCORES))


def _merge(stats: ExpertStats, num_experts: int) -> Choice:
    from sklearn.cluster import AgglomerativeClustering

    assert stats.output_ED is not None
    mean_ED = stats.output_ED / stats.tokens.clamp_min(1)
    label_E = list(range(len(mean_ED)))
    if num_experts < len(mean_ED):
        label_E = AgglomerativeClustering(num_experts, linkage="average").fit_predict(mean_ED.numpy()).tolist()
    members: dict[int, list[int]] = {}
    for expert, label in enumerate(label_E):
        members.setdefault(label, []).append(expert)
    groups = tuple(tuple(group) for group in members.values())
    shares = []
    for group in groups:
        # experts that no token went to count alike
        count_G = stats.count_E[list(group)]
        count_G = count_G if bool(count_G.any()) else torch.ones_like(count_G)
        shares.append(tuple((count_G / count_G.sum()).tolist()))
    return Choice(groups, tuple(shares))


@dataclass(frozen=True, slots=True, eq=False)
class Blend:
    """A weighted sum of tensors of one shape, or of experts of one tensor; computed in float64."""

    names: tuple[str, ...]
    shares: tuple[float, ...]
    experts: tuple[int, ...] | None = None
    """With one name: places in its first dimension; the output is [1, ...]."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return self.names

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the shape of one of them."""
        found = [shapes[name] for name in self.names]
        if len(set(found)) != 1:
            raise ValueError(f"cannot be added to the others, their shapes are {found}")
        return found[0] if self.experts is None else (1, *found[0][1:])

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the source's type."""
        return dtypes[self.names[0]]

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the sum, one term at a time."""
        if self.experts is None:
            parts: Sequence[Tensor] = [source[name] for name in self.names]
        else:
            tensor = source[self.names[0]]
            parts = [tensor[expert : expert + 1] for expert in self.experts]
        return _weighted_sum(parts, self.shares)


def _weighted_sum(parts: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = parts[0].double() * shares[0]
    for part, share in zip(parts[1:], shares[1:], strict=True):
        total += part.double() * share
    return total.to(parts[0].dtype)


@dataclass(frozen=True, slots=True)
class MoEBlock:
    """The routed experts of one layer as they lie in a checkpoint."""

    layer: int
    prefix: str
    """What the names begin with, the last dot included."""
    num_experts: int
    own: tuple[str, ...]
    """Names behind ``experts.N.`` where every expert has tensors of its own."""
    stacked: tuple[str, ...]
    """Names of the tensors whose first dimension is the experts: the router, and fused experts."""


def read_blocks(checkpoint: Checkpoint) -> list[MoEBlock]:
    """Return the blocks of a native mixture of experts in the order of its layers, from headers alone.

    Raises CheckpointError where there are none, of a kind that is not known here, or not all of one number of experts.
    """
    where, model_type = checkpoint.directory, checkpoint.config.get("model_type")
    if is_tied_type(model_type):
        raise CheckpointError(
            str(where),
            "its experts share modules, none can be taken out alone",
            "convert the dense model with fewer, or name a native export of it",
        )
    names: dict[tuple[int, str], list[str]] = {}
    for name in checkpoint:
        if found := _BLOCK.match(name):
            names.setdefault((int(found["layer"]), found["block"]), []).append(found["rest"])
    blocks = [
        block for (layer, prefix), rest in sorted(names.items()) if (block := _block(checkpoint, layer, prefix, rest))
    ]
    if not blocks:
        raise CheckpointError(
            str(where),
            f"has no experts ('{model_type}' is dense)",
            f"name a mixture of experts ({', '.join(FAMILIES)})",
        )
    if model_type not in FAMILIES:
        raise CheckpointError(
            str(where), f"the experts of '{model_type}' cannot be reduced here, those of {', '.join(FAMILIES)} can"
        )
    if len({block.num_experts for block in blocks}) != 1:
        raise CheckpointError(str(where), "its layers differ in their number of experts", "all must have one number")
    return blocks


def _block(checkpoint: Checkpoint, layer: int, prefix: str, rest: Sequence[str]) -> MoEBlock | None:
    own = [match for name in rest if (match := _OWN.match(name))]
    fused = [name for name in rest if _FUSED.match(name)]
    stacked = tuple(sorted([*fused, *(name for name in rest if name in _ROUTER)]))
    if not own and not fused:
        return None
    counts = {checkpoint.shape(prefix + name)[0] for name in stacked}
    parts = tuple(sorted({match[2] for match in own}))
    if own:
        counts.add(len({int(match[1]) for match in own}))
        counts.add(max(int(match[1]) for match in own) + 1)
    if len(counts) != 1 or len(own) != len(parts) * (min(counts) if own else 0):
        raise CheckpointError(
            str(checkpoint.directory),
            f"'{prefix}experts' and its router differ in their number of experts ("
            f"{', '.join(map(str, sorted(counts)))})",
            "the checkpoint is not whole",
        )
    return MoEBlock(layer, prefix, counts.pop(), parts, stacked)


def experts_plan(source: Checkpoint, blocks: Sequence[MoEBlock], choices: Sequence[Choice], top_k: int) -> Plan:
    """Return the plan of the same model with fewer experts, in the names and the layout of the source.

    Args:
        source: a native mixture of experts; headers are read.
        blocks: its ``read_blocks``.
        choices: one a block, all of as many experts.
        top_k: experts of a token, at most those that are left.
    """
    ops: dict[str, Op] = {}
    replaced: set[str] = set()
    for block, choice in zip(blocks, choices, strict=True):
        made, taken = _block_ops(block, choice)
        ops.update(made)
        replaced |= taken
    kept: dict[str, Op] = {name: Copy(name) for name in source if name not in replaced}
    used = {name for op in ops.values() for name in op.inputs}
    config = copy.deepcopy(source.config)
    named = [key for key in _COUNTS if key in config] or ["num_experts"]
    config.update(dict.fromkeys(named, len(choices[0].groups)), num_experts_per_tok=top_k)
    return Plan(config, {**kept, **ops}, frozenset(replaced - used))


def _block_ops(block: MoEBlock, choice: Choice) -> tuple[dict[str, Op], set[str]]:
    """Return what a block's tensors are made of, and the source's names that they take the place of."""
    ops: dict[str, Op] = {}
    for name in block.stacked:
        place = block.prefix + name
        if all(len(group) == 1 for group in choice.groups):
            ops[place] = Take(place, torch.tensor(choice.groups).flatten())
        else:
            pairs = zip(choice.groups, choice.shares, strict=True)
            ops[place] = Stack(tuple(Blend((place,), shares, group) for group, shares in pairs))
    for number, (group, shares) in enumerate(zip(choice.groups, choice.shares, strict=True)):
        for part in block.own:
            names = tuple(f"{block.prefix}experts.{expert}.{part}" for expert in group)
            ops[f"{block.prefix}experts.{number}.{part}"] = Copy(names[0]) if len(names) == 1 else Blend(names, shares)
    taken = {f"{block.prefix}experts.{expert}.{part}" for expert in range(block.num_experts) for part in block.own}
    return ops, taken | {block.prefix + name for name in block.stacked}


@torch.no_grad()
def reduce_model(model: Any, choices: Mapping[int, Choice], top_k: int) -> Any:
    """Prune or merge the experts of a model in memory and return it.

    The written checkpoint is compared with it. ``choices`` is by decoder layer.
    """
    from modmoe.conversion.reduce_experts.statistics import moe_blocks

    for layer, block in moe_blocks(model).items():
        choice, experts, router = choices[layer], block.experts, block.gate
        count = len(choice.groups)
        pairs = list(zip(choice.groups, choice.shares, strict=True))
        for tensor in (*experts.parameters(), *router.parameters(), *router.buffers()):
            tensor.data = torch.stack([_weighted_sum(tensor[list(group)], shares) for group, shares in pairs])
        experts.num_experts = router.num_experts = count
        router.top_k = top_k
        if hasattr(block, "top_k"):
            block.top_k = top_k
    config = model.config
    config.num_experts = config.num_local_experts = config.n_routed_experts = len(next(iter(choices.values())).groups)
    config.num_experts_per_tok = top_k
    return model


def check_number(left: int, num_experts: int, model_type: str) -> None:
    """Raise RecipeError where ``left`` of ``num_experts`` experts cannot be what is left."""
    if left > num_experts:
        raise RecipeError("experts.num_experts", f"{left} is more than the {num_experts} experts there are")
    if left < FAMILIES[model_type]:
        raise RecipeError("experts.num_experts", f"{model_type} needs {FAMILIES[model_type]} at least")
