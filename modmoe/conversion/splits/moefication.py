"""MoEfication: neurons of like keys are an expert; a small network learns how active each will be.

MoEfication, https://arxiv.org/abs/2110.01786, sections 3.2 and 3.3

    experts = balanced k-means of the key rows, each of unit length
    similarity       s_e(x) = -|x / |x| - c_e|         c_e is the mean of the cluster's unit rows
    mlp              s(x) = W2 tanh(W1 x / |x|)        W1 begins as c, W2 as the identity, trained to sigmoid(s_e) near
                     sum_{i in e} h_i / (the largest of the batch), h >= 0
    y = sum of the top_k experts, each with weight 1

``router.kind`` linear is similarity, mlp is mlp.

What differs  published                              here
mlp           tanh, E wide                           ReLU, 2 E wide: rows c and -c and their difference, so that it
                                                     begins as W1 x, which orders experts as tanh(W1 x) does
x / |x|       in the router                          in training; without intercepts, length changes no choice
similarity    -|x / |x| - c_e|, which has |c_e|^2    c_e . x alone: a router has no intercept
h             of a ReLU, never negative              |h|, the same there, and of use for gated and GELU neurons
best epoch    by the mass of a fifth of the experts  by the mass of top_k experts
rows          200,000 of the task                    KEPT_ROWS tokens of all tasks, of layers already split
the graph     METIS on how often neurons are on      left out; ``partition.method`` activations stands in for it:
              together                               balanced k-means on what neurons do over a sketch of the text
num_experts   of 32 neurons, a fifth of them chosen  ``num_modules``, and ``active_fraction`` of them
"""

# Shapes: N rows, D model width, H hidden width, F neurons, E experts

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from modmoe.analysis.modules import Partition
from modmoe.analysis.partitions.kmeans import key_features
from modmoe.conversion.modular.from_outputs import single_modules
from modmoe.conversion.modular.layerwise import FitOptions, LayerFit, Rows
from modmoe.conversion.modular.least_squares import hold_out
from modmoe.conversion.modular.routers import RouterStart, route
from modmoe.conversion.splits.emoe import mean_keys
from modmoe.models.ffn_layout import FFNWeights

_EPOCHS = 30
_BATCH = 512
_LEARNING_RATE = 1e-2


def split_moefication(rows: Rows, partition: Partition, weights: FFNWeights, options: FitOptions) -> LayerFit:
    """Return an expert for each module of the partition and one of the two routers. See ``SplitLayer``."""
    centre_ED = mean_keys(key_features(weights), partition)
    start = RouterStart(weight_ED=centre_ED)
    if options.router.kind == "mlp":
        fit_N, _ = hold_out(rows.sequence_N, options.seed)
        mass_NE = active_mass(rows.hidden_NF[fit_N], partition)
        start = train_mlp(rows.x_ND[fit_N], mass_NE, centre_ED, options.router.top_k, options.seed)
    return LayerFit(single_modules(torch.arange(partition.num_modules), 0), start)


def active_mass(hidden_NF: Tensor, partition: Partition) -> Tensor:
    """Return mass_NE: how much each module's neurons are active in sum."""
    mass_NE = torch.zeros(len(hidden_NF), partition.num_modules)
    return mass_NE.index_add_(1, partition.module_F, hidden_NF.abs())


def begin_mlp(centre_ED: Tensor) -> RouterStart:
    """Return two layers that compute ``centre x``, as the difference of two halves of a ReLU."""
    one_EE = torch.eye(len(centre_ED))
    return RouterStart(
        hidden_HD=torch.cat([centre_ED, -centre_ED]).contiguous(), output_EH=torch.cat([one_EE, -one_EE], 1)
    )


def train_mlp(x_ND: Tensor, mass_NE: Tensor, centre_ED: Tensor, top_k: int, seed: int) -> RouterStart:
    """Return the epoch that captures most of the mass on a tenth of the rows, the start being one.

    Args:
        x_ND: FFN inputs.
        mass_NE: what is to be told, not negative.
        centre_ED: what the router begins with.
        top_k: experts that are chosen.
        seed: decides the order of rows.
    """
    draw = torch.Generator().manual_seed(seed)
    unit_ND = F.normalize(x_ND.float(), dim=1)
    order_N = torch.randperm(len(unit_ND), generator=draw)
    held_N, fit_N = order_N[: len(order_N) // 10], order_N[len(order_N) // 10 :]

    def captured(start: RouterStart) -> float:
        chosen_NK = route(start, unit_ND[held_N]).topk(top_k, dim=1).indices
        return float(mass_NE[held_N].gather(1, chosen_NK).sum())

    start = best = begin_mlp(centre_ED)
    most = captured(best)
    assert start.hidden_HD is not None and start.output_EH is not None
    hidden_HD, output_EH = start.hidden_HD.clone().requires_grad_(), start.output_EH.clone().requires_grad_()
    optimizer = torch.optim.Adam([hidden_HD, output_EH], lr=_LEARNING_RATE)
    for _ in range(_EPOCHS):
        with torch.enable_grad():
            for batch_N in torch.split(fit_N[torch.randperm(len(fit_N), generator=draw)], _BATCH):
                target_NE = mass_NE[batch_N] / mass_NE[batch_N].max().clamp_min(1e-30)
                found_NE = (unit_ND[batch_N] @ hidden_HD.T).relu() @ output_EH.T
                optimizer.zero_grad()
                F.binary_cross_entropy_with_logits(found_NE, target_NE).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        now = RouterStart(hidden_HD=hidden_HD.detach().clone(), output_EH=output_EH.detach().clone())
        if captured(now) > most:
            best, most = now, captured(now)
    return best
