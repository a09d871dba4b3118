"""How a router starts: from what is known of which expert a token needs.

The best expert of a token is the one whose missing modules matter least: it has the least squared error
``|down (h * (1 - mask_e))|^2`` against the dense FFN's output.

    logistic        multinomial logistic regression from the FFN's input to the best expert, each token weighted by the
                    root of what choosing the second best would cost
    least_squares   ridge regression to the best expert's indicator
    centroid        mean input of the tokens that an expert is best for, less the mean of all (LLaMA-MoE-v2,
                    https://arxiv.org/abs/2411.15708)
    average_key     mean key row of the expert's modules (EMoE, https://arxiv.org/abs/2310.10908)
    zero            nothing

An mlp router is trained on the aim of ``logistic``, whatever the start but ``zero``. With sequence routing the rows are
what the model will read: at each chunk the mean of what came before it (the first token at the first), and, as for a
marked prompt, the mean of all.

No start has an intercept, since the formats that routers are exported to have none.
"""

# Shapes: T tokens, B sequences, C chunks, N rows kept (tokens, or chunks and sequences), D model width,
# H hidden width of an mlp router, F neurons, M modules, E experts, K top_k

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

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
"""Rows of each layer that a router is fitted to."""
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
    recovered: float = 1.0
    """Of the squared error that one expert for all has over the best expert of each row, the share that the router
    saves on rows kept out of the fit: 1 is a perfect router, below 0 is worse than one expert for all."""


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
            _fit(*kept, weights, assignment, partition, router, seed)
            for kept, weights, assignment, partition in zip(rows, ffns, assignments, partitions, strict=True)
        ]
    if router.compensation:
        means = _skipped_means(model, family, batches, ffns, partitions, assignments, starts, router, progress)
        starts = [replace(start, means_MD=means_MD) for start, means_MD in zip(starts, means, strict=True)]
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
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return x_ND, the experts' errors_NE and sequence_N, the sequence each row is of, for each layer."""
    by_sequence = router.routing == "sequence"
    total = sum(count_tokens(batches).values())
    if by_sequence:
        lengths = torch.cat([batch.attention_mask_BT.sum(1) for task in batches.values() for batch in task])
        total = int((_count_chunks(lengths, router.routing_chunk) + 1).sum())
    position_N = draw_positions(total, KEPT_ROWS, seed)
    kept: list[list[tuple[Tensor, Tensor, Tensor]]] = [[] for _ in ffns]
    inputs: dict[int, Tensor] = {}
    offset, first, rows, mask_BT = 0, 0, 0, torch.empty(0)

    def watch_input(layer: int, x: Tensor) -> None:
        inputs[layer] = real_rows(x.detach(), mask_BT)

    def watch_hidden(layer: int, hidden: Tensor) -> None:
        nonlocal rows
        x_TD, hidden_TF = inputs.pop(layer), real_rows(hidden.detach(), mask_BT)
        length_B = mask_BT.sum(1)
        sequence_N = torch.arange(len(length_B)).repeat_interleave(length_B)
        rows = len(x_TD)
        if by_sequence:
            x_TD = x_TD.float()
            chunk_CD, chunk_T = _read_chunks(x_TD, length_B, router.routing_chunk)
            errors_TE = _errors(hidden_TF, ffns[layer], masks_EF[layer])
            of_T, chunk_T = sequence_N.to(x_TD.device), chunk_T.to(x_TD.device)
            mean_BD = _sum_by(x_TD, of_T, len(length_B)) / length_B.clamp_min(1).unsqueeze(1).to(x_TD.device)
            x_TD = torch.cat([chunk_CD, mean_BD])
            errors_TE = torch.cat([_sum_by(errors_TE, chunk_T, len(chunk_CD)), _sum_by(errors_TE, of_T, len(length_B))])
            chunks_B = _count_chunks(length_B, router.routing_chunk)
            order_B = torch.arange(len(length_B))
            sequence_N = torch.cat([order_B.repeat_interleave(chunks_B), order_B])
            rows = len(x_TD)
        inside = (position_N >= offset) & (position_N < offset + rows)
        chosen_N = position_N[inside] - offset
        there_N = chosen_N.to(x_TD.device)
        # token by token, only the tokens that are kept are worth the products
        errors_NE = errors_TE[there_N] if by_sequence else _errors(hidden_TF[there_N], ffns[layer], masks_EF[layer])
        kept[layer].append((x_TD[there_N].float().cpu(), errors_NE.cpu(), first + sequence_N[chosen_N]))

    with frozen(model), torch.no_grad(), watched(model, family, on_input=watch_input, on_hidden=watch_hidden):
        for task in batches.values():
            for batch in task:
                mask_BT = batch.attention_mask_BT
                run_body(model, batch)
                offset += rows
                first += len(mask_BT)
                if progress is not None:
                    progress(batch.num_tokens)
    return [(torch.cat(x), torch.cat(e), torch.cat(s)) for x, e, s in (zip(*parts, strict=True) for parts in kept)]


def _errors(hidden_TF: Tensor, weights: FFNWeights, mask_EF: Tensor) -> Tensor:
    """Return errors_TE, each expert's squared distance to the dense FFN's output."""
    down_DF = weights.down_DF.to(hidden_TF.device, torch.float32)
    skip_EF = (~mask_EF).to(hidden_TF.device)
    return torch.stack([((hidden_TF.float() * skip_F) @ down_DF.T).square().sum(1) for skip_F in skip_EF], 1)


def _count_chunks(length_B: Tensor, chunk: int) -> Tensor:
    return (length_B + chunk - 1) // chunk


def _read_chunks(x_TD: Tensor, length_B: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """Return what a sequence router reads at each chunk, chunk_CD, and chunk_T, the chunk each token is in."""
    read, chunk_of = [], []
    for part_TD in torch.split(x_TD, length_B.tolist()):
        before_TD = part_TD.cumsum(0)
        ends = torch.tensor(range(chunk, len(part_TD), chunk), dtype=torch.int64)
        read.append(torch.cat([part_TD[:1], before_TD[ends - 1] / ends.unsqueeze(1).to(x_TD.device)]))
        chunk_of.append(torch.arange(len(part_TD)) // chunk + sum(map(len, read[:-1])))
    return torch.cat(read), torch.cat(chunk_of)


def _sum_by(rows_TX: Tensor, group_T: Tensor, groups: int) -> Tensor:
    return rows_TX.new_zeros(groups, rows_TX.shape[1]).index_add_(0, group_T, rows_TX)


def _fit(
    x_ND: Tensor,
    error_NE: Tensor,
    sequence_N: Tensor,
    weights: FFNWeights,
    assignment: Assignment,
    partition: Partition,
    router: RouterRecipe,
    seed: int,
) -> RouterStart:
    """Fit on four fifths of the sequences, choose the scale, and judge the router on the last fifth."""
    experts = error_NE.shape[1]
    best_N = error_NE.argmin(1)
    # rows of one sequence are alike, so a sequence is kept out as a whole
    names = torch.unique(sequence_N)
    names = names[torch.randperm(len(names), generator=torch.Generator().manual_seed(seed))]
    is_held_N = torch.isin(sequence_N, names[: len(names) // 5])
    fit_N = torch.nonzero(~is_held_N).flatten()
    held_N = torch.nonzero(is_held_N).flatten() if bool(is_held_N.any()) else fit_N
    two_NK = error_NE.topk(min(2, experts), dim=1, largest=False).values
    # the root: a few tokens have nearly all of the error and would decide alone
    stake_N = (two_NK[:, -1] - two_NK[:, 0]).sqrt()
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
        chance=float((best_N[held_N] == best_N[fit_N].mode().values).float().mean()),
        recovered=_recovered(error_NE[fit_N], error_NE[held_N], chosen_N),
    )


def _recovered(fit_NE: Tensor, held_NE: Tensor, chosen_N: Tensor) -> float:
    """Return the share of the avoidable error that the choice avoids, against the expert best for all fitted rows."""
    one = held_NE[:, fit_NE.mean(0).argmin()].double().sum()
    best = held_NE.min(1).values.double().sum()
    found = held_NE.gather(1, chosen_N.unsqueeze(1)).double().sum()
    return float((one - found) / (one - best)) if one > best else 1.0


def _fit_logistic(x_ND: Tensor, best_N: Tensor, stake_N: Tensor, experts: int) -> Tensor:
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
                chunk_CD, chunk_T = _read_chunks(x_TD, mask_BT.sum(1), router.routing_chunk)
                x_TD = chunk_CD[chunk_T]
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
