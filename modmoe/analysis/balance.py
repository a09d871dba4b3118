"""The balanced assignment: n points into k bins of exactly n / k, at the least total cost.

A transport problem with k equal demands. Prices of the bins are found first, as in entropic optimal transport
(https://arxiv.org/abs/1306.0895), but by Newton's method: with k prices its matrix is k x k. Each point then goes where
cost plus price is least, which is optimal for the bin sizes that come out, and those are nearly right. The excess moves
along shortest paths of the exchange graph: its nodes are the bins and its edge a -> b is the cheapest move of one point
from a to b. Successive shortest paths keep the assignment optimal for its sizes (Ahuja, Magnanti and Orlin, Network
Flows, section 9.7), so the result is the exact optimum, to rounding.
"""

# Shapes: F points (neurons), M bins (modules), K nodes of a graph

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]

# Temperatures of the prices over the spread of the costs. Far from the optimum Newton's method needs the high ones;
# below the lowest, finding prices costs more than moving the few points that are then in excess.
_TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01)
_WARM_TEMPERATURE = 0.1
_NEWTON_STEPS = 6


def assign_balanced(cost_FM: Tensor, price_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return bin_F, int64, of equal bins with the least total cost, and the prices that led there.

    Points that cost the same everywhere fill bins in their order. Which optimum is found does not depend on the order
    of points otherwise, unless two differ by less than rounding.

    Args:
        cost_FM: float64; finite.
        price_M: prices of a similar problem, for a quicker start.
    """
    price_M = _find_prices(cost_FM, price_M)
    cost = cost_FM.numpy()
    bin_F = (cost_FM + price_M).argmin(1).numpy()
    points, bins = cost.shape
    surplus = np.bincount(bin_F, minlength=bins) - points // bins
    if not surplus.any():
        return torch.from_numpy(bin_F), price_M
    edge_MM = np.empty((bins, bins))
    for node in range(bins):
        _refresh_edges(node, cost, bin_F, edge_MM)
    tolerance = 1e-12 * max(1.0, float(np.abs(cost).max()))
    while surplus.any():
        path = shortest_path(edge_MM, surplus > 0, surplus < 0, tolerance)
        _move(path, cost, bin_F, edge_MM, surplus, tolerance)
        for node in path:
            _refresh_edges(node, cost, bin_F, edge_MM)
    return torch.from_numpy(bin_F), price_M


def shortest_path(
    edge_KK: Floats, is_source_K: NDArray[np.bool_], is_target_K: NDArray[np.bool_], tolerance: float
) -> list[int]:
    """Return the nodes of a shortest path from any source to any target (Bellman and Ford, all edges at once).

    Edges may be negative, cycles may not, but for rounding below ``tolerance``; inf is no edge. A target must be in
    reach.
    """
    distance_K = np.where(is_source_K, 0.0, np.inf)
    parent_K = np.full(len(edge_KK), -1)
    changed = np.flatnonzero(is_source_K)
    while len(changed):
        reach = distance_K[changed, None] + edge_KK[changed]
        best_K = reach.argmin(0)
        value_K = reach[best_K, np.arange(len(edge_KK))]
        better_K = value_K < distance_K - tolerance
        distance_K[better_K] = value_K[better_K]
        parent_K[better_K] = changed[best_K[better_K]]
        changed = np.flatnonzero(better_K)
    node = int(np.where(is_target_K, distance_K, np.inf).argmin())
    path = [node]
    while parent_K[node] >= 0:
        node = int(parent_K[node])
        path.append(node)
    return path[::-1]


def _move(
    path: list[int],
    cost: Floats,
    bin_F: NDArray[np.int64],
    edge_MM: Floats,
    surplus: NDArray[np.int64],
    tolerance: float,
) -> None:
    """Move points along the path: as many as cost the same, for of dead neurons there may be thousands."""
    tied = []
    for start, end in pairwise(path):
        members = np.flatnonzero(bin_F == start)
        tied.append(members[cost[members, end] - cost[members, start] <= edge_MM[start, end] + tolerance])
    count = min(surplus[path[0]], -surplus[path[-1]], *map(len, tied))
    for points, end in zip(tied, path[1:], strict=True):
        bin_F[points[:count]] = end
    surplus[path[0]] -= count
    surplus[path[-1]] += count


def _refresh_edges(node: int, cost: Floats, bin_F: NDArray[np.int64], edge_MM: Floats) -> None:
    """Recompute the cost of the cheapest moves out of one bin; inf where it is empty."""
    members = cost[bin_F == node]
    edge_MM[node] = (members - members[:, node, None]).min(0, initial=np.inf)
    edge_MM[node, node] = np.inf


def _find_prices(cost_FM: Tensor, price_M: Tensor | None) -> Tensor:
    """Return prices under which about as many points choose each bin.

    A point's choice is a softmax of cost plus price; Newton's method makes the shares of the bins equal at one
    temperature after the other. What it misses, moves along paths later on.
    """
    points, bins = cost_FM.shape
    spread = float((cost_FM - cost_FM.mean(1, keepdim=True)).std(correction=0))
    cold_M = torch.zeros(bins, dtype=cost_FM.dtype)
    if spread == 0:
        return cold_M
    share_FM = torch.empty_like(cost_FM)
    temperatures = [factor * spread for factor in _TEMPERATURES]
    if price_M is not None:
        warm = _WARM_TEMPERATURE * spread
        if float(_excess(cost_FM, price_M, warm, share_FM).abs().sum()) < 0.1 * points:
            temperatures = [temperature for temperature in temperatures if temperature <= warm]
    price_M = cold_M if price_M is None else price_M
    for temperature in temperatures:
        for _ in range(_NEWTON_STEPS):
            excess_M = _excess(cost_FM, price_M, temperature, share_FM)
            if float(excess_M.abs().sum()) < 0.003 * points:
                break
            slope_MM = -(share_FM.T @ share_FM)
            # a little more than the diagonal: a price that all bins share changes nothing
            slope_MM.diagonal().add_((excess_M + points / bins) * 1.0001 + 1e-3)
            step_M = temperature * torch.linalg.solve(slope_MM, excess_M)
            # the shares are far from linear beyond a few temperatures
            price_M = price_M + step_M.clamp_(-3 * temperature, 3 * temperature)
    return price_M


def _excess(cost_FM: Tensor, price_M: Tensor, temperature: float, share_FM: Tensor) -> Tensor:
    """Write each point's shares of the bins into ``share_FM``; return the points that each bin has too many."""
    torch.add(cost_FM, price_M, out=share_FM)
    # exp of less than -60 adds nothing, and denormal numbers are slow
    share_FM.sub_(share_FM.amin(1, keepdim=True)).mul_(-1 / temperature).clamp_(min=-60).exp_()
    share_FM.div_(share_FM.sum(1, keepdim=True))
    return share_FM.sum(0) - share_FM.shape[0] / share_FM.shape[1]
