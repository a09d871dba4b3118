"""The balanced assignment: n points into k bins of exactly n / k, at the least total cost.

A transport problem with k equal demands. Prices of the bins are found first, as in entropic optimal transport
(Sinkhorn; https://arxiv.org/abs/1306.0895); each point then goes where cost plus price is least, which is optimal for
the bin sizes that come out, and those are nearly right. The excess moves along shortest paths of the exchange graph:
its nodes are the bins and its edge a -> b is the cheapest move of one point from a to b. Successive shortest paths keep
the assignment optimal for its sizes (Ahuja, Magnanti and Orlin, Network Flows, section 9.7), so the result is the exact
optimum, to rounding.
"""

# Shapes: F points (neurons), M bins (modules)

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float64]


def assign_balanced(cost_FM: Tensor, price_M: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return bin_F, int64, of equal bins with the least total cost, and the prices that led there.

    Args:
        cost_FM: float64; finite.
        price_M: prices of a similar problem, for a quicker start.
    """
    price_M = _find_prices(cost_FM, price_M)
    cost = cost_FM.numpy()
    bin_F = (cost_FM + price_M).argmin(1).numpy()
    points, bins = cost.shape
    size = points // bins
    surplus = np.bincount(bin_F, minlength=bins) - size
    edge_MM, point_MM = np.empty((bins, bins)), np.empty((bins, bins), dtype=np.int64)
    for node in range(bins):
        _refresh_edges(node, cost, bin_F, edge_MM, point_MM)
    tolerance = 1e-12 * max(1.0, float(np.abs(cost).max()))
    while surplus.any():
        path = shortest_path(edge_MM, surplus > 0, surplus < 0, tolerance)
        for start, end in pairwise(path):
            bin_F[point_MM[start, end]] = end
        surplus[path[0]] -= 1
        surplus[path[-1]] += 1
        for node in path:
            _refresh_edges(node, cost, bin_F, edge_MM, point_MM)
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


def _refresh_edges(
    node: int, cost: Floats, bin_F: NDArray[np.int64], edge_MM: Floats, point_MM: NDArray[np.int64]
) -> None:
    """Recompute the cheapest moves out of one bin."""
    members = np.flatnonzero(bin_F == node)
    if not len(members):
        edge_MM[node] = np.inf
        return
    extra = cost[members] - cost[members, node, None]
    extra[:, node] = np.inf
    cheapest = extra.argmin(0)
    edge_MM[node] = extra[cheapest, np.arange(len(edge_MM))]
    point_MM[node] = members[cheapest]


def _find_prices(cost_FM: Tensor, price_M: Tensor | None) -> Tensor:
    """Return prices under which about as many points choose each bin: Sinkhorn steps at a falling temperature."""
    points, bins = cost_FM.shape
    spread = float((cost_FM - cost_FM.mean(1, keepdim=True)).std(correction=0))
    if spread == 0:
        return torch.zeros(bins, dtype=cost_FM.dtype)
    temperatures = (0.3, 0.1, 0.03) if price_M is None else (0.03,)
    price = torch.zeros(bins, dtype=cost_FM.dtype) if price_M is None else price_M
    for temperature in (factor * spread for factor in temperatures):
        for _ in range(12):
            share_FM = (-(cost_FM + price) / temperature).softmax(1)
            price = price + temperature * (share_FM.sum(0).clamp_min(1e-9) * (bins / points)).log()
    return price
