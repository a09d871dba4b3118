"""CMoE: what is on for most tokens is shared, the rest is clustered by which tokens it is on for.

CMoE, https://arxiv.org/abs/2502.04416, sections 3 and 4

    c_ti = 1 where |h_ti| is among the ten largest of token t          markers
    mu_i = mean_t c_ti                                                 rate
    shared = the neurons of highest rate
    routed = balanced clusters of the columns c_i of the others, in L1 distance; centres are the columns of highest rate
    R_e = argmin_{i in e} |c_i - centre of e|_1                        representative
    s_e(x) = |h_{R_e}(x)|                                              analytic router
    y = sum of the shared and of the top_k experts, each with weight 1

Layers are carved one after the other, on the activations that carved ones leave.

What differs   published                               here
shared expert  N_s times as large as a routed one      ``shared_modules`` modules, each as large as a routed expert;
                                                       where the recipe has 0, half of the active ones, as in S3A3E8
router         gate and up rows of R_e, multiplied     a tied model's router, one or two matrices, fitted to s_e(x)
h              of normalised inputs, gate and up rows  the model's own, in markers and in s_e(x)
k-means        one step in the released code           until nothing moves, STEPS at most
rows           16,384 tokens of WikiText-2             KEPT_ROWS tokens of all tasks
weights        1 + s_e u, u = 0 at the start           1, which is the same until fine-tuning
load balance   a bias on s_e that follows the load     none in the model; fine-tuning has its own loss
"""

# Shapes: N rows, D model width, F neurons, M modules, E routed experts, I neurons that are not shared

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from modmoe.analysis.balance import assign_balanced
from modmoe.analysis.modules import Partition
from modmoe.conversion.modular.from_outputs import single_modules
from modmoe.conversion.modular.layerwise import FitOptions, LayerFit, Rows
from modmoe.conversion.modular.least_squares import fit_values, hold_out
from modmoe.conversion.modular.routers import RouterStart
from modmoe.models.ffn_layout import FFNWeights
from modmoe.recipe.schema import Recipe

MARKED = 10
"""Neurons that are marked for each token."""
STEPS = 10
"""Steps of k-means, at most."""


def markers(hidden_NF: Tensor) -> Tensor:
    """Return marker_NF, float32: 1 at the neurons of largest activation in each row, else 0."""
    marked_NK = hidden_NF.abs().topk(min(MARKED, hidden_NF.shape[1]), dim=1).indices
    return torch.zeros(hidden_NF.shape).scatter_(1, marked_NK, 1.0)


def carve(hidden_NF: Tensor, num_modules: int, shared_modules: int, steps: int = STEPS) -> tuple[Partition, Tensor]:
    """Return modules, the shared ones first, and the representative neuron of each that is not shared, int64.

    Args:
        hidden_NF: activations.
        num_modules: a divisor of F.
        shared_modules: fewer than ``num_modules``.
        steps: of k-means, at most.
    """
    marker_NF = markers(hidden_NF)
    neurons = marker_NF.shape[1]
    size, experts = neurons // num_modules, num_modules - shared_modules
    order_F = marker_NF.sum(0).sort(descending=True, stable=True).indices
    module_F = torch.empty(neurons, dtype=torch.int64)
    shared = size * shared_modules
    module_F[order_F[:shared]] = torch.arange(shared) // size
    own_I = order_F[shared:]
    marker_NI = marker_NF[:, own_I]
    centre_NE = marker_NI[:, :experts]
    expert_I, price_E = torch.full_like(own_I, -1), None
    for _ in range(steps):
        before_I = expert_I
        expert_I, price_E = assign_balanced(_distances(marker_NI, centre_NE).double(), price_E)
        one_hot_IE = F.one_hot(expert_I, experts).float()
        centre_NE = marker_NI @ one_hot_IE / size
        if torch.equal(expert_I, before_I):
            break
    module_F[own_I] = shared_modules + expert_I
    to_own_IE = _distances(marker_NI, centre_NE)
    nearest_E = to_own_IE.masked_fill(one_hot_IE == 0, torch.inf).argmin(0)
    return Partition(module_F, num_modules), own_I[nearest_E]


def _distances(marker_NI: Tensor, centre_NE: Tensor) -> Tensor:
    """Return the L1 distance of each column to each centre: a centre's p where the column is 0, 1 - p where it is 1."""
    return marker_NI.sum(0).unsqueeze(1) + centre_NE.sum(0) - 2 * marker_NI.T @ centre_NE


def split_cmoe(rows: Rows, partition: Partition, weights: FFNWeights, options: FitOptions) -> LayerFit:
    """Return the layer carved anew; the partition that it had is not used. See ``SplitLayer``."""
    shared = options.shared_modules
    partition, neuron_E = carve(rows.hidden_NF, partition.num_modules, shared)
    fit_N, _ = hold_out(rows.sequence_N, options.seed)
    value_NE = rows.hidden_NF[:, neuron_E].abs()
    matrices = fit_values(rows.x_ND[fit_N], value_NE[fit_N], options.router.kind, options.seed)
    return LayerFit(
        single_modules(torch.arange(partition.num_modules), shared), RouterStart.of(matrices), partition=partition
    )


def share_half(recipe: Recipe) -> Recipe:
    """Return the recipe with half of the active modules shared where it has none."""
    assignment = recipe.assignment
    active = assignment.modules_per_expert or max(1, round(assignment.active_fraction * recipe.partition.num_modules))
    return (
        recipe
        if assignment.shared_modules
        else replace(recipe, assignment=replace(assignment, shared_modules=active // 2))
    )
