"""Which modules make up which expert."""

# Shapes: P tasks, M modules, E experts (one a task), R modules of an expert, Q modules that are not shared

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from modmoe.analysis.balance import shortest_path
from modmoe.errors import PartitionError


@dataclass(frozen=True, slots=True, eq=False)
class Assignment:
    """Expert times module membership of one layer; experts may share modules and all have as many."""

    membership_EM: Tensor
    """bool; whether an expert has a module."""
    expert_names: tuple[str, ...]
    """One name an expert."""
    best_ER: Tensor | None = None
    """int64; each expert's modules, the best first, so that its first few are an expert as well."""

    def __post_init__(self) -> None:
        """Refuse experts that are empty, of unequal size, or not named one by one."""
        if self.membership_EM.ndim != 2 or self.membership_EM.dtype != torch.bool:
            raise PartitionError(f"membership is {self.membership_EM.dtype}; it is a bool tensor, experts by modules.")
        if len(self.expert_names) != len(self.membership_EM) or not self.expert_names:
            raise PartitionError(f"{len(self.expert_names)} names for {len(self.membership_EM)} experts; name each.")
        if len(set(self.expert_names)) != len(self.expert_names):
            raise PartitionError(f"experts {', '.join(self.expert_names)}", "a name appears twice", "rename one")
        size_E = self.membership_EM.sum(1)
        for name, size in zip(self.expert_names, size_E.tolist(), strict=True):
            if not size:
                raise PartitionError(f"expert '{name}' has no modules; give each at least one.")
        if int(size_E.min()) != int(size_E.max()):
            raise PartitionError(f"experts have {int(size_E.min())} to {int(size_E.max())} modules; give all as many.")
        held_ER = self.membership_EM.nonzero()[:, 1].reshape(len(self.membership_EM), -1)
        if self.best_ER is not None and not torch.equal(self.best_ER.sort(1).values, held_ER):
            raise PartitionError("modules are ranked that are not those of the experts; rank each expert's own.")

    @property
    def ranking_ER(self) -> Tensor:
        """int64; ``best_ER``, or where nothing says what is best each expert's modules by number."""
        held_ER = self.membership_EM.nonzero()[:, 1].reshape(len(self.membership_EM), -1)
        return held_ER if self.best_ER is None else self.best_ER

    @property
    def modules_per_expert(self) -> int:
        """Modules of each expert."""
        return int(self.membership_EM[0].sum())

    @property
    def used_M(self) -> Tensor:
        """bool; modules that at least one expert has."""
        return self.membership_EM.any(0)

    @property
    def shared_M(self) -> Tensor:
        """bool; modules that every expert has."""
        return self.membership_EM.all(0)

    def overlap_EE(self) -> Tensor:
        """Return |S_a and S_b| / modules_per_expert for each two experts, float64; 1 on the diagonal."""
        membership_EM = self.membership_EM.double()
        return membership_EM @ membership_EM.T / self.modules_per_expert


class ScoreAssigner(Protocol):
    """A way of choosing each expert's modules by the modules' scores."""

    def __call__(
        self,
        scores_PM: Tensor,
        expert_names: tuple[str, ...],
        *,
        modules_per_expert: int,
        shared_modules: int,
        coverage: bool,
        seed: int,
    ) -> Assignment:
        """Return the assignment; the same for the same arguments."""
        ...


def assign_top_score(
    scores_PM: Tensor,
    expert_names: tuple[str, ...],
    *,
    modules_per_expert: int,
    shared_modules: int = 0,
    coverage: bool = False,
    seed: int = 0,
) -> Assignment:
    """Give every expert the modules that matter most over all tasks, and then those that matter most for its own.

    In this order they are ranked, too: first the shared ones by their mean, then an expert's own by their score for it.

    Args:
        scores_PM: how much each module matters for each task; standardised here, so that no task's scale outweighs.
        expert_names: one name a task.
        modules_per_expert: modules of each expert, the shared ones counted.
        shared_modules: modules that every expert has.
        coverage: give every module to at least one expert, at the least total loss of standardised score.
        seed: not used; of two modules that score alike the first is taken.

    Raises:
        PartitionError: numbers that do not fit; names the least ``modules_per_expert`` that covers.
    """
    _check_numbers(scores_PM, expert_names, modules_per_expert, shared_modules, coverage)
    scores_PM = scores_PM.double()
    scores_PM = scores_PM - scores_PM.mean(1, keepdim=True)
    scores_PM = scores_PM / scores_PM.std(1, keepdim=True, correction=0).clamp_min(1e-12)
    order_M = scores_PM.mean(0).sort(descending=True, stable=True).indices
    membership_EM = torch.zeros(scores_PM.shape, dtype=torch.bool)
    membership_EM[:, order_M[:shared_modules]] = True
    own = order_M[shared_modules:].sort().values
    best_EQ = (
        scores_PM[:, own].sort(dim=1, descending=True, stable=True).indices[:, : modules_per_expert - shared_modules]
    )
    own_EQ = torch.zeros(len(expert_names), len(own), dtype=torch.bool).scatter_(1, best_EQ, True)
    if coverage:
        own_EQ = cover(scores_PM[:, own], own_EQ)
    membership_EM[:, own] = own_EQ
    last_EQ = torch.where(own_EQ, scores_PM[:, own], -torch.inf)
    ranked_EQ = own[last_EQ.sort(dim=1, descending=True, stable=True).indices]
    shared_ES = order_M[:shared_modules].repeat(len(expert_names), 1)
    return Assignment(membership_EM, expert_names, torch.cat([shared_ES, ranked_EQ], 1)[:, :modules_per_expert])


def assign_at_random(
    scores_PM: Tensor,
    expert_names: tuple[str, ...],
    *,
    modules_per_expert: int,
    shared_modules: int = 0,
    coverage: bool = False,
    seed: int = 0,
) -> Assignment:
    """Draw modules with no regard to the scores: the control, with as many shared modules and as many an expert.

    Their ranking is as random: shared ones first, then in the order in which they were drawn.

    Arguments and errors are those of ``assign_top_score``.
    """
    _check_numbers(scores_PM, expert_names, modules_per_expert, shared_modules, coverage)
    experts, modules = scores_PM.shape
    generator = torch.Generator().manual_seed(seed)
    order_M = torch.randperm(modules, generator=generator)
    own = order_M[shared_modules:]
    count = modules_per_expert - shared_modules
    membership_EM = torch.zeros(experts, modules, dtype=torch.bool)
    membership_EM[:, order_M[:shared_modules]] = True
    best_ER = order_M[:modules_per_expert].repeat(experts, 1)
    for expert in range(experts):
        # dealt out in turn, every module goes to someone; what is free is then drawn
        dealt = own[expert::experts][:count] if coverage else own[:0]
        rest = own[~torch.isin(own, dealt)]
        drawn = rest[torch.randperm(len(rest), generator=generator)[: count - len(dealt)]]
        best_ER[expert, shared_modules:] = torch.cat([dealt, drawn])
        membership_EM[expert, best_ER[expert]] = True
    return Assignment(membership_EM, expert_names, best_ER)


_PATH_STEPS = 1 << 26
"""Distances that the search for a path looks at, about."""


def seriate(membership_EM: Tensor) -> Tensor:
    """Return order_M, int64: the used modules in an order in which each expert's form few runs.

    Modules that every expert has come first, those that none has are left out. The number of runs is half the length of
    the path through the patterns of membership, in Hamming distance, from the core to nothing: nearest neighbours from
    each start, and the modules' own order, are improved by reversals until none helps. Deterministic; at one pattern a
    module or less it takes well under a second for 256 modules; single neurons of a few tasks have few patterns.
    """
    core = membership_EM.all(0)
    rest = torch.nonzero(membership_EM.any(0) & ~core).flatten()
    first = torch.nonzero(core).flatten()
    if not len(rest):
        return first
    pattern_UE, pattern_of = torch.unique(membership_EM[:, rest].T, dim=0, return_inverse=True)
    # two more nodes, where the path begins and where it ends
    start_E = torch.full((1, len(membership_EM)), bool(len(first)))
    ends_E = torch.cat([start_E, torch.zeros_like(start_E)])
    node_UE = torch.cat([pattern_UE, ends_E]).double()
    distance_UU = torch.cdist(node_UE, node_UE, p=1).round().to(torch.int64).numpy()
    own_order = list(dict.fromkeys(pattern_of.tolist()))
    begin, end = len(pattern_UE), len(pattern_UE) + 1
    # a path takes time in proportion to the square of the patterns: of thousands not each is a start
    step = min(max(1, begin**3 // _PATH_STEPS), max(1, begin // 4))
    paths = [own_order, *(_nearest_path(distance_UU, start) for start in range(0, begin, step))]

    def length(path: list[int]) -> int:
        return int(sum(distance_UU[a, b] for a, b in pairwise([begin, *path, end])))

    # only the shortest are worth the improvement
    paths.sort(key=length)
    best = min((_reverse_pieces([begin, *path, end], distance_UU)[1:-1] for path in paths[:4]), key=length)
    return torch.cat([first, *(rest[pattern_of == pattern] for pattern in best)])


def _nearest_path(distance_UU: np.ndarray, start: int) -> list[int]:
    count = len(distance_UU) - 2
    path, left = [start], np.ones(count, dtype=bool)
    left[start] = False
    while left.any():
        step = int(np.where(left, distance_UU[path[-1], :count], np.iinfo(np.int64).max).argmin())
        path.append(step)
        left[step] = False
    return path


def _reverse_pieces(path: list[int], distance_UU: np.ndarray) -> list[int]:
    """Improve a path with fixed ends by reversing pieces of it (2-opt)."""
    nodes = np.array(path)
    improved = True
    while improved:
        improved = False
        for i in range(1, len(nodes) - 2):
            j = np.arange(i + 1, len(nodes) - 1)
            before = distance_UU[nodes[i - 1], nodes[i]] + distance_UU[nodes[j], nodes[j + 1]]
            after = distance_UU[nodes[i - 1], nodes[j]] + distance_UU[nodes[i], nodes[j + 1]]
            gain = before - after
            if gain.max() > 0:
                cut = int(j[gain.argmax()])
                nodes[i : cut + 1] = nodes[i : cut + 1][::-1]
                improved = True
    return [int(node) for node in nodes]


def cover(scores_EQ: Tensor, own_EQ: Tensor) -> Tensor:
    """Give each module that nobody has to an expert, at the least total loss of score; experts keep their size.

    An expert that takes a module gives up another; if nobody has that one now, some expert takes it, and so on, until
    one is given up that a further expert has. The cheapest such chain is a shortest path between modules; successive
    shortest paths end at the optimum, as in any flow problem.
    """
    own = own_EQ.clone().numpy()
    scores = scores_EQ.numpy()
    count = own.shape[1]
    for _ in range(count):
        holders_Q = own.sum(0)
        if holders_Q.all():
            break
        # edge a -> b: the cheapest expert to take a and give up b
        loss_EQQ = np.where(~own[:, :, None] & own[:, None, :], scores[:, None, :] - scores[:, :, None], np.inf)
        expert_QQ = loss_EQQ.argmin(0)
        missing = np.arange(count) == int((holders_Q == 0).argmax())
        path = shortest_path(loss_EQQ.min(0), missing, holders_Q > 1, 1e-12)
        for new, old in pairwise(path):
            expert = expert_QQ[new, old]
            own[expert, new], own[expert, old] = True, False
    return torch.from_numpy(own)


def _check_numbers(
    scores_PM: Tensor, expert_names: tuple[str, ...], modules_per_expert: int, shared_modules: int, coverage: bool
) -> None:
    tasks, modules = scores_PM.shape
    if tasks != len(expert_names):
        raise PartitionError(f"scores of {tasks} tasks for {len(expert_names)} experts; there is one expert a task.")
    if not bool(torch.isfinite(scores_PM).all()):
        raise PartitionError("scores are not all finite; run the model in bfloat16 or float32.")
    if not 1 <= modules_per_expert <= modules:
        raise PartitionError(
            "assignment.modules_per_expert", f"{modules_per_expert} is not between 1 and num_modules, {modules}"
        )
    if not 0 <= shared_modules <= modules_per_expert:
        raise PartitionError(
            "assignment.shared_modules", f"{shared_modules} is not between 0 and the {modules_per_expert} of an expert"
        )
    least = shared_modules + -(-(modules - shared_modules) // tasks)
    if coverage and modules_per_expert < least:
        raise PartitionError(
            "assignment.coverage",
            f"{tasks} experts of {modules_per_expert} modules, {shared_modules} of them shared, "
            f"cannot cover {modules} modules",
            f"the least modules_per_expert that does is {least}",
        )
