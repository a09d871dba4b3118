"""Fits of a router to rows of which the best expert is known; see ``modmoe.conversion.modular.routers``.

Each row counts as much as its stake: the root of what choosing the second best expert would cost.
"""

# Shapes: N rows, D model width, H hidden width of an mlp router, E experts

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.nn import functional as F

_MOST_PROBABILITY = 0.8
_MLP_STEPS = 300


def hold_out(sequence_N: Tensor, seed: int) -> tuple[Tensor, Tensor]:
    """Return the rows to fit and those to judge by: a fifth of the sequences, whole, since rows of one are alike."""
    names = torch.unique(sequence_N)
    names = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    is_held_N = torch.isin(sequence_N, names[: len(names) // 5])
    fit_N = torch.nonzero(~is_held_N).flatten()
    return fit_N, torch.nonzero(is_held_N).flatten() if bool(is_held_N.any()) else fit_N


def fit_logistic(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int) -> Tensor:
    """Return weight_ED: multinomial logistic regression without intercept."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = torch.unique(best_N)
    weight_ED = torch.zeros(experts, x_ND.shape[1])
    if len(present) == 1:
        # one expert is best for every row: point the router at what the rows have in common
        weight_ED[present[0]] = x_ND.mean(0)
        return weight_ED
    spread = float(x_ND.square().mean().sqrt().clamp_min(1e-12))
    fitted = LogisticRegression(C=0.1, fit_intercept=False, max_iter=200)
    with warnings.catch_warnings():
        # a start need not be the optimum to the last digit
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted.fit((x_ND / spread).numpy(), best_N.numpy(), sample_weight=stake_N.numpy())
    found = torch.as_tensor(fitted.coef_, dtype=torch.float32) / spread
    # for two classes sklearn returns the one row of their difference
    weight_ED[present] = torch.cat([-found, found]) / 2 if len(found) == 1 else found
    if len(present) < experts:
        # experts that were never best stay below the others
        absent = [expert for expert in range(experts) if expert not in present.tolist()]
        weight_ED[absent] = weight_ED[present].mean(0) - x_ND.mean(0) / x_ND.mean(0).norm().clamp_min(1e-12)
    return weight_ED


def fit_ridge(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int) -> Tensor:
    """Return weight_ED: ridge regression to the best expert's indicator."""
    wide_ND, stake_N1 = x_ND.double(), stake_N.double().unsqueeze(1)
    gram_DD = wide_ND.T @ (wide_ND * stake_N1)
    ridge = 1e-2 * gram_DD.diagonal().mean().clamp_min(1e-12)
    target_NE = F.one_hot(best_N, experts).double()
    right_DE = wide_ND.T @ (target_NE * stake_N1)
    regular_DD = gram_DD + ridge * torch.eye(len(gram_DD), dtype=torch.float64)
    solved_DE: Tensor = torch.linalg.solve(regular_DD, right_DE)
    return solved_DE.T.float()


def centroids(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int) -> Tensor:
    """Return weight_ED: the mean row that an expert is best for, less the mean of all."""
    one_hot_NE = F.one_hot(best_N, experts).float()
    count_E1 = one_hot_NE.sum(0).clamp_min(1).unsqueeze(1)
    return one_hot_NE.T @ x_ND / count_E1 - x_ND.mean(0)


def fit_mlp(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return hidden_HD and output_EH: two layers with a ReLU between them, by gradient descent on the cross-entropy."""
    hidden, width = hidden_width(experts), x_ND.shape[1]
    draw = torch.Generator().manual_seed(seed)
    spread = x_ND.square().mean().sqrt().clamp_min(1e-12)
    scaled_ND = x_ND / spread
    hidden_HD = (torch.randn(hidden, width, generator=draw) / width**0.5).requires_grad_()
    output_EH = (torch.randn(experts, hidden, generator=draw) / hidden**0.5).requires_grad_()
    optimizer = torch.optim.AdamW([hidden_HD, output_EH], lr=1e-2, weight_decay=1e-2)
    with torch.enable_grad():
        for _ in range(_MLP_STEPS):
            batch_N = torch.randint(len(x_ND), (min(512, len(x_ND)),), generator=draw)
            logits_NE = (scaled_ND[batch_N] @ hidden_HD.T).relu() @ output_EH.T
            loss_N = F.cross_entropy(logits_NE, best_N[batch_N], reduction="none")
            optimizer.zero_grad()
            (loss_N * stake_N[batch_N]).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return hidden_HD.detach() / spread, output_EH.detach()


def fit_values(x_ND: Tensor, value_NE: Tensor, kind: str, seed: int) -> tuple[Tensor, ...]:
    """Return weight_ED, or hidden_HD and output_EH, whose outputs are nearest to the values, up to one scale.

    A linear router by ridge regression, one of two layers by gradient descent.
    """
    value_NE = value_NE / value_NE.mean().clamp_min(1e-30)
    if kind == "linear":
        wide_ND = x_ND.double()
        gram_DD = wide_ND.T @ wide_ND
        ridge = 1e-3 * gram_DD.diagonal().mean().clamp_min(1e-12)
        regular_DD = gram_DD + ridge * torch.eye(len(gram_DD), dtype=torch.float64)
        solved_DE: Tensor = torch.linalg.solve(regular_DD, wide_ND.T @ value_NE.double())
        return (solved_DE.T.float(),)
    experts, width = value_NE.shape[1], x_ND.shape[1]
    draw = torch.Generator().manual_seed(seed)
    spread = x_ND.square().mean().sqrt().clamp_min(1e-12)
    scaled_ND = x_ND / spread
    hidden_HD = (torch.randn(hidden_width(experts), width, generator=draw) / width**0.5).requires_grad_()
    output_EH = (torch.randn(experts, len(hidden_HD), generator=draw) / len(hidden_HD) ** 0.5).requires_grad_()
    optimizer = torch.optim.AdamW([hidden_HD, output_EH], lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2 * _MLP_STEPS)
    with torch.enable_grad():
        for _ in range(2 * _MLP_STEPS):
            batch_N = torch.randint(len(x_ND), (min(512, len(x_ND)),), generator=draw)
            found_NE = (scaled_ND[batch_N] @ hidden_HD.T).relu() @ output_EH.T
            optimizer.zero_grad()
            F.mse_loss(found_NE, value_NE[batch_N]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return hidden_HD.detach() / spread, output_EH.detach()


def hidden_width(experts: int) -> int:
    """Return the width H of an mlp router's first layer."""
    return max(16, 4 * experts)


def soften(logits_NE: Tensor) -> float:
    """Return a factor, at most 1, that leaves the softmax room: a saturated router has no gradient at top_k 1."""

    def probability(factor: float) -> float:
        return float((logits_NE * factor).softmax(1).max(1).values.mean())

    if probability(1.0) <= _MOST_PROBABILITY:
        return 1.0
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        low, high = (low, middle) if probability(middle) > _MOST_PROBABILITY else (middle, high)
    return low
