"""How a router starts: from what is known of which expert a token needs.

The best expert of a token is the one whose missing modules matter least: it has the least squared error
``|down (h * (1 - mask_e))|^2`` against the dense FFN's output.

    logistic        multinomial logistic regression from the FFN's input to the best expert, each token weighted by what
                    choosing the second best would cost
    least_squares   ridge regression to the best expert's indicator
    centroid        mean input of the tokens that an expert is best for, less the mean of all (LLaMA-MoE-v2,
                    https://arxiv.org/abs/2411.15708)
    average_key     mean key row of the expert's modules (EMoE, https://arxiv.org/abs/2310.10908)
    zero            nothing

No start has an intercept, since the formats that routers are exported to have none.
"""

# Shapes: T tokens, N rows kept (tokens, or sequences), D model width, H hidden width of an mlp router, F neurons,
# M modules, E experts, K top_k

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from modmoe.analyze.calibration import Batch
from modmoe.analyze.modules import Partition
from modmoe.analyze.stream import count_tokens, draw_positions, frozen, real_rows, run_body, watched
from modmoe.convert.assignment import Assignment
from modmoe.families import Family
from modmoe.ffn import FFNWeights
from modmoe.recipe import RouterRecipe

KEPT_ROWS = 2048
"""Tokens, or sequences, of each layer that a router is fitted to."""
_MOST_PROBABILITY = 0.8
_MLP_STEPS = 300


@dataclass(frozen=True, slots=True, eq=False)
class RouterStart:
    """One layer's router to begin with; no weights at all where tasks are named."""

    weight_ED: Tensor | None = None
    """float32; a linear router."""
    hidden_HD: Tensor | None = None
    """float32; the first layer of an mlp router."""
    output_EH: Tensor | None = None
    """float32; its second layer."""
    means_MD: Tensor | None = None
    """float32; mean output of each module given that it is skipped; None without compensation."""
    agreement: float = 1.0
    """Share of rows kept out of the fit for which the router chooses the best expert, 0 to 1."""
    chance: float = 1.0
    """What always choosing the expert that is best most often would reach."""


def start_routers(
    model: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    ffns: Sequence[FFNWeights],
    partitions: Sequence[Partition],
    assignments: Sequence[Assignment],
    router: RouterRecipe,
    seed: int,
    progress: Callable[[int], None] | None = None,
) -> list[RouterStart]:
    """Fit one router a layer in one streaming pass, and with compensation measure the skipped modules in another.

    Args:
        model: the dense model.
        family: where its FFNs lie.
        batches: the batches of each task.
        ffns: the layers' weights.
        partitions: one a layer.
        assignments: one a layer; task e is expert e's where routing is by task.
        router: what was asked for.
        seed: decides which tokens are kept and how an mlp router starts.
        progress: called with the tokens of each batch when it is done.

    Raises:
        CalibrationError: a task has no tokens.
    """
    masks_EF = [a.membership_EM[:, p.module_F] for a, p in zip(assignments, partitions, strict=True)]
    starts = [RouterStart()] * len(ffns)
    if router.routing != "task":
        rows = _collect(model, family, batches, ffns, masks_EF, router, seed, progress)
        starts = [
            _fit(x_ND, error_NE, weights, assignment, partition, router, seed)
            for (x_ND, error_NE), weights, assignment, partition in zip(
                rows, ffns, assignments, partitions, strict=True
            )
        ]
    if router.compensation:
        means = _skipped_means(model, family, batches, ffns, partitions, assignments, starts, router, progress)
        starts = [
            RouterStart(s.weight_ED, s.hidden_HD, s.output_EH, means_MD, s.agreement, s.chance)
            for s, means_MD in zip(starts, means, strict=True)
        ]
    return starts


def route(start: RouterStart, x_ND: Tensor) -> Tensor:
    """Return logits_NE of a start for FFN inputs."""
    if start.weight_ED is not None:
        return x_ND.float() @ start.weight_ED.T
    assert start.hidden_HD is not None and start.output_EH is not None
    return (x_ND.float() @ start.hidden_HD.T).relu() @ start.output_EH.T


def _collect(
    model: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    ffns: Sequence[FFNWeights],
    masks_EF: Sequence[Tensor],
    router: RouterRecipe,
    seed: int,
    progress: Callable[[int], None] | None,
) -> list[tuple[Tensor, Tensor]]:
    """Return x_ND and the experts' errors_NE of each layer, for tokens drawn at random or for whole sequences."""
    by_sequence = router.routing == "sequence"
    position_N = draw_positions(sum(count_tokens(batches).values()), KEPT_ROWS, seed)
    kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in ffns]
    inputs: dict[int, Tensor] = {}
    offset, mask_BT = 0, torch.empty(0)

    def watch_input(layer: int, x: Tensor) -> None:
        inputs[layer] = real_rows(x.detach(), mask_BT)

    def watch_hidden(layer: int, hidden: Tensor) -> None:
        x_TD, hidden_TF = inputs.pop(layer), real_rows(hidden.detach(), mask_BT)
        lengths = mask_BT.sum(1).tolist()
        if not by_sequence:
            inside = (position_N >= offset) & (position_N < offset + len(x_TD))
            chosen = (position_N[inside] - offset).to(x_TD.device)
            x_TD, hidden_TF = x_TD[chosen], hidden_TF[chosen]
        down_DF = ffns[layer].down_DF.to(hidden_TF.device, torch.float32)
        errors_TE = torch.stack(
            [
                ((hidden_TF.float() * ~mask_F.to(hidden_TF.device)) @ down_DF.T).square().sum(1)
                for mask_F in masks_EF[layer]
            ],
            1,
        )
        x_TD = x_TD.float()
        if by_sequence:
            x_TD = torch.stack([part.mean(0) for part in torch.split(x_TD, lengths) if len(part)])
            errors_TE = torch.stack([part.sum(0) for part in torch.split(errors_TE, lengths) if len(part)])
        kept[layer].append((x_TD.cpu(), errors_TE.cpu()))

    with frozen(model), torch.no_grad(), watched(model, family, on_input=watch_input, on_hidden=watch_hidden):
        for task in batches.values():
            for batch in task:
                mask_BT = batch.attention_mask_BT
                run_body(model, batch)
                offset += batch.num_tokens
                if progress is not None:
                    progress(batch.num_tokens)
    return [(torch.cat([x for x, _ in rows]), torch.cat([e for _, e in rows])) for rows in kept]


def _fit(
    x_ND: Tensor,
    error_NE: Tensor,
    weights: FFNWeights,
    assignment: Assignment,
    partition: Partition,
    router: RouterRecipe,
    seed: int,
) -> RouterStart:
    """Fit on four fifths of the rows, choose the scale, and count on the last fifth how often the best is chosen."""
    experts = error_NE.shape[1]
    best_N = error_NE.argmin(1)
    shuffled_N = torch.randperm(len(x_ND), generator=torch.Generator().manual_seed(seed))
    cut = max(1, len(x_ND) * 4 // 5)
    fit_N, held_N = shuffled_N[:cut], shuffled_N[cut:]
    held_N = held_N if len(held_N) else fit_N
    two_NK = error_NE.topk(min(2, experts), dim=1, largest=False).values
    stake_N = two_NK[:, -1] - two_NK[:, 0]
    stake_N = stake_N / stake_N[fit_N].mean().clamp_min(1e-30)
    args = (x_ND[fit_N], best_N[fit_N], stake_N[fit_N], experts)
    if router.kind == "mlp":
        start = RouterStart() if router.start == "zero" else _fit_mlp(*args, seed)
        if router.start == "zero":
            hidden = max(16, 4 * experts)
            # a first layer of zeros would keep the second from ever learning
            drawn_HD = torch.randn(hidden, x_ND.shape[1], generator=torch.Generator().manual_seed(seed))
            start = RouterStart(hidden_HD=drawn_HD / x_ND.shape[1] ** 0.5, output_EH=torch.zeros(experts, hidden))
    elif router.start == "logistic":
        start = RouterStart(weight_ED=_fit_logistic(*args))
    elif router.start == "least_squares":
        start = RouterStart(weight_ED=_fit_ridge(*args))
    elif router.start == "centroid":
        start = RouterStart(weight_ED=_centroids(*args))
    elif router.start == "average_key":
        key_FD = weights.key_FD.detach().float().cpu()
        member_EF = assignment.membership_EM[:, partition.module_F].float()
        start = RouterStart(weight_ED=member_EF @ key_FD / member_EF.sum(1, keepdim=True))
    else:
        start = RouterStart(weight_ED=torch.zeros(experts, x_ND.shape[1]))
    scale = _scale(route(start, x_ND[fit_N])) if router.start != "zero" else 1.0
    chosen_N = route(start, x_ND[held_N]).argmax(1)
    return RouterStart(
        weight_ED=None if start.weight_ED is None else start.weight_ED * scale,
        hidden_HD=start.hidden_HD,
        output_EH=None if start.output_EH is None else start.output_EH * scale,
        agreement=float((chosen_N == best_N[held_N]).float().mean()),
        chance=float(best_N[held_N].bincount(minlength=experts).max() / len(held_N)),
    )


def _fit_logistic(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int) -> Tensor:
    from sklearn.linear_model import LogisticRegression

    present = torch.unique(best_N)
    weight_ED = torch.zeros(experts, x_ND.shape[1])
    if len(present) == 1:
        # one expert is best for every row: point the router at what the rows have in common
        weight_ED[present[0]] = x_ND.mean(0)
        return weight_ED
    spread = float(x_ND.square().mean().sqrt().clamp_min(1e-12))
    fitted = LogisticRegression(C=1.0, fit_intercept=False, max_iter=200)
    fitted.fit((x_ND / spread).numpy(), best_N.numpy(), sample_weight=stake_N.numpy())
    found = torch.as_tensor(fitted.coef_, dtype=torch.float32) / spread
    # for two classes sklearn returns the one row of their difference
    weight_ED[present] = torch.cat([-found, found]) / 2 if len(found) == 1 else found
    if len(present) < experts:
        # experts that were never best stay below the others
        absent = [expert for expert in range(experts) if expert not in present.tolist()]
        weight_ED[absent] = weight_ED[present].mean(0) - x_ND.mean(0) / x_ND.mean(0).norm().clamp_min(1e-12)
    return weight_ED


def _fit_ridge(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int) -> Tensor:
    wide_ND, stake_N1 = x_ND.double(), stake_N.double().unsqueeze(1)
    gram_DD = wide_ND.T @ (wide_ND * stake_N1)
    ridge = 1e-2 * gram_DD.diagonal().mean().clamp_min(1e-12)
    target_NE = F.one_hot(best_N, experts).double()
    right_DE = wide_ND.T @ (target_NE * stake_N1)
    regular_DD = gram_DD + ridge * torch.eye(len(gram_DD), dtype=torch.float64)
    solved_DE: Tensor = torch.linalg.solve(regular_DD, right_DE)
    return solved_DE.T.float()


def _centroids(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int) -> Tensor:
    one_hot_NE = F.one_hot(best_N, experts).float()
    count_E1 = one_hot_NE.sum(0).clamp_min(1).unsqueeze(1)
    return one_hot_NE.T @ x_ND / count_E1 - x_ND.mean(0)


def _fit_mlp(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int, seed: int) -> RouterStart:
    """Fit two layers with a ReLU between them by gradient descent on the weighted cross-entropy."""
    hidden, width = max(16, 4 * experts), x_ND.shape[1]
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
    return RouterStart(hidden_HD=hidden_HD.detach() / spread, output_EH=output_EH.detach())


def _scale(logits_NE: Tensor) -> float:
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


def _skipped_means(
    model: nn.Module,
    family: Family,
    batches: Mapping[str, Sequence[Batch]],
    ffns: Sequence[FFNWeights],
    partitions: Sequence[Partition],
    assignments: Sequence[Assignment],
    starts: Sequence[RouterStart],
    router: RouterRecipe,
    progress: Callable[[int], None] | None,
) -> list[Tensor]:
    """Return means_MD of each layer: each module's mean output over the tokens that skip it, 0 where none does."""
    neurons = [len(partition.module_F) for partition in partitions]
    sums_F = [torch.zeros(count, dtype=torch.float64) for count in neurons]
    skips_M = [torch.zeros(partition.num_modules, dtype=torch.float64) for partition in partitions]
    inputs: dict[int, Tensor] = {}
    task, mask_BT = 0, torch.empty(0)

    def watch_input(layer: int, x: Tensor) -> None:
        inputs[layer] = real_rows(x.detach(), mask_BT).float().cpu()

    def watch_hidden(layer: int, hidden: Tensor) -> None:
        x_TD, hidden_TF = inputs.pop(layer), real_rows(hidden.detach(), mask_BT).double().cpu()
        member_EM = assignments[layer].membership_EM
        if router.routing == "task":
            active_TM = member_EM[task].expand(len(x_TD), -1)
        else:
            if router.routing == "sequence":
                lengths = mask_BT.sum(1).tolist()
                x_TD = torch.cat([part.mean(0).expand_as(part) for part in torch.split(x_TD, lengths) if len(part)])
            chosen_TK = route(starts[layer], x_TD).topk(router.top_k, dim=1).indices
            active_TM = member_EM[chosen_TK].any(1)
        skipped_TM = (~active_TM).double()
        skips_M[layer] += skipped_TM.sum(0)
        sums_F[layer] += (hidden_TF * skipped_TM[:, partitions[layer].module_F]).sum(0)

    with frozen(model), torch.no_grad(), watched(model, family, on_input=watch_input, on_hidden=watch_hidden):
        for index, batches_of_task in enumerate(batches.values()):
            for batch in batches_of_task:
                task, mask_BT = index, batch.attention_mask_BT
                run_body(model, batch)
                if progress is not None:
                    progress(batch.num_tokens)
    means = []
    for layer, partition in enumerate(partitions):
        mean_F = sums_F[layer] / skips_M[layer].clamp_min(1)[partition.module_F]
        down_DF = ffns[layer].down_DF.detach().double().cpu()
        order_F = partition.permutation_F
        parts_DMm = (down_DF * mean_F)[:, order_F].reshape(len(down_DF), partition.num_modules, -1)
        means.append(parts_DMm.sum(2).T.float())
    return means
