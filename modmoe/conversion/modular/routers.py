"""How a router starts: from what is known of which expert a token needs.

The best expert of a token is the one whose missing modules matter least: it has the least squared error
``|down (h * (1 - mask_e))|^2`` against the dense FFN's output.

    logistic        multinomial logistic regression from the FFN's input to the best expert, each token weighted by the
                    root of what choosing the second best would cost
    ridge           for experts that are single modules: ridge regression on every token to what each module puts out;
                    see ``modmoe.conversion.modular.ridge``
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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.analysis.passes.stream import Runner, Turn, count_tokens, draw_positions, starts_of, turns_of
from modmoe.analysis.text.calibration import Batch
from modmoe.conversion.modular.assignment import Assignment
from modmoe.conversion.modular.least_squares import (
    centroids,
    fit_logistic,
    fit_mlp,
    fit_ridge,
    fit_values,
    hidden_width,
    hold_out,
    soften,
)
from modmoe.conversion.modular.module_outputs import ModuleOutputs
from modmoe.models.ffn_layout import FFNWeights
from modmoe.recipe.schema import RouterRecipe
from modmoe.runtime import ranks

KEPT_ROWS = 2048
"""Rows of each layer that a router is fitted to."""


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

    @classmethod
    def of(cls, fitted: tuple[Tensor, ...]) -> RouterStart:
        """Return the start of one matrix, weight_ED, or of two, hidden_HD and output_EH."""
        return cls(fitted[0]) if len(fitted) == 1 else cls(hidden_HD=fitted[0], output_EH=fitted[1])


def start_routers(
    runner: Runner,
    batches: Mapping[str, Sequence[Batch]],
    ffns: Sequence[FFNWeights],
    partitions: Sequence[Partition],
    assignments: Sequence[Assignment],
    router: RouterRecipe,
    seed: int,
    progress: Callable[[int], None] | None = None,
    fitted: Callable[[int, int], None] | None = None,
) -> list[RouterStart]:
    """Fit one router a layer in one streaming pass, and with compensation measure the skipped modules in another.

    Args:
        runner: runs the dense model.
        batches: the batches of each task.
        ffns: the layers' weights.
        partitions: one a layer.
        assignments: one a layer; task e is expert e's where routing is by task.
        router: what was asked for.
        seed: decides which tokens are kept and how an mlp router starts.
        progress: called with tokens that are done; they add up to all tokens, in each pass.
        fitted: called with the layers whose router is fitted and the layers in all.

    Raises:
        CalibrationError: a task has no tokens.
    """
    masks_EF = [a.membership_EM[:, p.module_F] for a, p in zip(assignments, partitions, strict=True)]
    starts = [RouterStart()] * len(ffns)
    if router.routing != "task":

        def fit(layer: int, x_ND: Tensor, errors_NE: Tensor, sequence_N: Tensor) -> None:
            if not ranks.is_mine(layer):
                starts[layer] = _blank(x_ND.shape[1], errors_NE.shape[1], router.kind)
                return
            weights, assignment, partition = ffns[layer], assignments[layer], partitions[layer]
            starts[layer] = _fit(x_ND, errors_NE, sequence_N, weights, assignment, partition, router, seed)
            if fitted is not None:
                fitted(min(layer + ranks.num_ranks(), len(ffns)), len(ffns))

        _collect(runner, batches, ffns, masks_EF, router, seed, progress, fit)
        starts = [ranks.add_up_fields(start) for start in starts]
    if router.compensation:
        means = _skipped_means(runner, batches, ffns, partitions, assignments, starts, router, progress)
        starts = [replace(start, means_MD=means_MD) for start, means_MD in zip(starts, means, strict=True)]
    return starts


def _blank(width: int, experts: int, kind: str) -> RouterStart:
    """Return zeros in the place of a router that another process fits."""
    hidden = hidden_width(experts)
    if kind == "mlp":
        tensors = {"hidden_HD": torch.zeros(hidden, width), "output_EH": torch.zeros(experts, hidden)}
    else:
        tensors = {"weight_ED": torch.zeros(experts, width)}
    return RouterStart(**tensors, agreement=0.0, chance=0.0, recovered=0.0)


def fit_router(
    x_ND: Tensor,
    outputs: ModuleOutputs,
    sequence_N: Tensor,
    weights: FFNWeights,
    assignment: Assignment,
    partition: Partition,
    router: RouterRecipe,
    seed: int,
) -> RouterStart:
    """Return the router of one layer, fitted to the rows whose module outputs are known.

    Where a union of several is chosen the best single one says little: with ``logistic`` the router then learns how
    much each expert's own modules put out, on the scale of the root.
    """
    member_EM, is_union = assignment.membership_EM, router.top_k > 1 and router.combine == "union"
    if is_union and router.start == "logistic":
        fit_N, _ = hold_out(sequence_N, seed)
        value_NE = _own_values(outputs, member_EM)[fit_N]
        start = RouterStart.of(fit_values(x_ND[fit_N], value_NE, router.kind, seed))
    else:
        start = _fit(x_ND, outputs.errors_NE(member_EM), sequence_N, weights, assignment, partition, router, seed)
    return judge(start, x_ND, outputs, sequence_N, assignment, router.top_k, seed) if is_union else start


def judge(
    start: RouterStart,
    x_ND: Tensor,
    outputs: ModuleOutputs,
    sequence_N: Tensor,
    assignment: Assignment,
    top_k: int,
    seed: int,
) -> RouterStart:
    """Return the start with how well it finds the experts whose own modules put out most, on rows kept out of fits."""
    member_EM = assignment.membership_EM
    value_NE = _own_values(outputs, member_EM)
    fit_N, held_N = hold_out(sequence_N, seed)
    chosen_NK, best_NK = (values.topk(top_k, 1).indices for values in (route(start, x_ND[held_N]), value_NE[held_N]))
    one_NK = value_NE[fit_N].square().mean(0).topk(top_k).indices.expand_as(chosen_NK)
    gram_NMM = outputs.gram_NMM[held_N]
    error = [_union_error(gram_NMM, member_EM, ids_NK) for ids_NK in (chosen_NK, best_NK, one_NK)]
    return replace(
        start,
        agreement=_same(chosen_NK, best_NK),
        chance=_same(one_NK, best_NK),
        recovered=(error[2] - error[0]) / (error[2] - error[1]) if error[2] > error[1] else 1.0,
    )


def _own_values(outputs: ModuleOutputs, member_EM: Tensor) -> Tensor:
    own_EM = (member_EM & ~member_EM.all(0)).float()
    return (outputs.value_NM() @ own_EM.T).sqrt()


def _union_error(gram_NMM: Tensor, member_EM: Tensor, ids_NK: Tensor) -> float:
    skipped_NM = 1 - member_EM[ids_NK].any(1).to(gram_NMM.dtype)
    return float(torch.einsum("nij,ni,nj->n", gram_NMM, skipped_NM, skipped_NM).double().sum())


def _same(one_NK: Tensor, two_NK: Tensor) -> float:
    """Return the share of choices that are among the others."""
    return float((one_NK.unsqueeze(2) == two_NK.unsqueeze(1)).any(2).float().mean())


def route(start: RouterStart, x_ND: Tensor) -> Tensor:
    """Return logits_NE of a start for FFN inputs."""
    if start.weight_ED is not None:
        return x_ND.float() @ start.weight_ED.T
    assert start.hidden_HD is not None and start.output_EH is not None
    return (x_ND.float() @ start.hidden_HD.T).relu() @ start.output_EH.T


def _collect(
    runner: Runner,
    batches: Mapping[str, Sequence[Batch]],
    ffns: Sequence[FFNWeights],
    masks_EF: Sequence[Tensor],
    router: RouterRecipe,
    seed: int,
    progress: Callable[[int], None] | None,
    on_rows: Callable[[int, Tensor, Tensor, Tensor], None],
) -> None:
    """Call ``on_rows`` with each layer, x_ND, the experts' errors_NE and sequence_N, the sequence each row is of."""
    by_sequence = router.routing == "sequence"
    count_tokens(batches)
    masks = [turn.batch.attention_mask_BT for turn in turns_of(batches)]
    sizes = [int(mask_BT.sum()) for mask_BT in masks]
    if by_sequence:
        sizes = [int((_count_chunks(mask_BT.sum(1), router.routing_chunk) + 1).sum()) for mask_BT in masks]
    first_row, first_sequence = starts_of(sizes), starts_of(map(len, masks))
    position_N = draw_positions(sum(sizes), KEPT_ROWS, seed)
    kept: dict[int, tuple[Tensor, ...]] = {}
    inputs: dict[int, Tensor] = {}

    def watch_input(layer: int, x: Tensor, turn: Turn) -> None:
        inputs[layer] = turn.real_rows(x.detach())

    @lru_cache(maxsize=1)  # one layer after the other, its weights are read once
    def read_down(layer: int, device: torch.device) -> Tensor:
        return ffns[layer].down_DF.to(device, torch.float32)

    def watch_hidden(layer: int, hidden: Tensor, turn: Turn) -> None:
        x_TD, hidden_TF = inputs.pop(layer), turn.real_rows(hidden.detach())
        at_N = position_N - first_row[turn.index]
        places = torch.nonzero((at_N >= 0) & (at_N < sizes[turn.index])).flatten()
        if layer not in kept:
            shapes = (len(at_N), x_TD.shape[1]), (len(at_N), len(masks_EF[layer]))
            kept[layer] = (*map(torch.zeros, shapes), torch.zeros_like(at_N))
        if not len(places):
            return
        chosen_N = at_N[places]
        down_DF = read_down(layer, hidden_TF.device)
        length_B = turn.batch.attention_mask_BT.sum(1)
        sequence_N = torch.arange(len(length_B)).repeat_interleave(length_B)
        if by_sequence:
            x_TD = x_TD.float()
            chunk_CD, chunk_T = _read_chunks(x_TD, length_B, router.routing_chunk)
            errors_TE = _errors(hidden_TF, down_DF, masks_EF[layer])
            of_T, chunk_T = sequence_N.to(x_TD.device), chunk_T.to(x_TD.device)
            mean_BD = _sum_by(x_TD, of_T, len(length_B)) / length_B.clamp_min(1).unsqueeze(1).to(x_TD.device)
            x_TD = torch.cat([chunk_CD, mean_BD])
            errors_TE = torch.cat([_sum_by(errors_TE, chunk_T, len(chunk_CD)), _sum_by(errors_TE, of_T, len(length_B))])
            chunks_B = _count_chunks(length_B, router.routing_chunk)
            order_B = torch.arange(len(length_B))
            sequence_N = torch.cat([order_B.repeat_interleave(chunks_B), order_B])
        there_N = chosen_N.to(x_TD.device)
        # token by token, only the tokens that are kept are worth the products
        errors_NE = errors_TE[there_N] if by_sequence else _errors(hidden_TF[there_N], down_DF, masks_EF[layer])
        sequence_N = first_sequence[turn.index] + sequence_N[chosen_N]
        for all_N, rows_N in zip(kept[layer], (x_TD[there_N].float().cpu(), errors_NE.cpu(), sequence_N), strict=True):
            all_N[places] = rows_N

    def finish(layer: int) -> None:
        x_ND, errors_NE, sequence_N = map(ranks.add_up, kept.pop(layer))
        on_rows(layer, x_ND, errors_NE, sequence_N)

    runner.run(batches, on_input=watch_input, on_hidden=watch_hidden, on_layer=finish, progress=progress)


def _errors(hidden_TF: Tensor, down_DF: Tensor, mask_EF: Tensor) -> Tensor:
    """Return errors_TE, each expert's squared distance to the dense FFN's output."""
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
    fit_N, held_N = hold_out(sequence_N, seed)
    two_NK = error_NE.topk(min(2, experts), dim=1, largest=False).values
    # the root: a few tokens have nearly all of the error and would decide alone
    stake_N = (two_NK[:, -1] - two_NK[:, 0]).sqrt()
    stake_N = stake_N / stake_N[fit_N].mean().clamp_min(1e-30)
    args = (x_ND[fit_N], best_N[fit_N], stake_N[fit_N], experts)
    if router.kind == "mlp":
        if router.start != "zero":
            hidden_HD, output_EH = fit_mlp(*args, seed)
            start = RouterStart(hidden_HD=hidden_HD, output_EH=output_EH)
        else:
            hidden = hidden_width(experts)
            # a first layer of zeros would keep the second from ever learning
            drawn_HD = torch.randn(hidden, x_ND.shape[1], generator=torch.Generator().manual_seed(seed))
            start = RouterStart(hidden_HD=drawn_HD / x_ND.shape[1] ** 0.5, output_EH=torch.zeros(experts, hidden))
    elif router.start == "logistic":
        start = RouterStart(weight_ED=fit_logistic(*args))
    elif router.start == "least_squares":
        start = RouterStart(weight_ED=fit_ridge(*args))
    elif router.start == "centroid":
        start = RouterStart(weight_ED=centroids(*args))
    elif router.start == "average_key":
        key_FD = weights.key_FD.detach().float().cpu()
        member_EF = assignment.membership_EM[:, partition.module_F].float()
        start = RouterStart(weight_ED=member_EF @ key_FD / member_EF.sum(1, keepdim=True))
    else:
        start = RouterStart(weight_ED=torch.zeros(experts, x_ND.shape[1]))
    scale = soften(route(start, x_ND[fit_N])) if router.start != "zero" else 1.0
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
    routed = held_NE.gather(1, chosen_N.unsqueeze(1)).double().sum()
    return float((one - routed) / (one - best)) if one > best else 1.0


def _skipped_means(
    runner: Runner,
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
    steps_GF = [ranks.in_steps(torch.zeros(count)) for count in neurons]
    skips_M = [torch.zeros(partition.num_modules, dtype=torch.float64) for partition in partitions]
    inputs: dict[int, Tensor] = {}

    def watch_input(layer: int, x: Tensor, turn: Turn) -> None:
        inputs[layer] = turn.real_rows(x.detach()).float().cpu()

    def watch_hidden(layer: int, hidden: Tensor, turn: Turn) -> None:
        x_TD, hidden_TF = inputs.pop(layer), turn.real_rows(hidden.detach()).double().cpu()
        member_EM = assignments[layer].membership_EM
        if router.routing == "task":
            active_TM = member_EM[turn.task].expand(len(x_TD), -1)
        else:
            if router.routing == "sequence":
                length_B = turn.batch.attention_mask_BT.sum(1)
                chunk_CD, chunk_T = _read_chunks(x_TD, length_B, router.routing_chunk)
                x_TD = chunk_CD[chunk_T]
            chosen_TK = route(starts[layer], x_TD).topk(router.top_k, dim=1).indices
            active_TM = member_EM[chosen_TK].any(1)
        skipped_TM = (~active_TM).double()
        skips_M[layer] += skipped_TM.sum(0)
        steps_GF[layer] += ranks.in_steps((hidden_TF * skipped_TM[:, partitions[layer].module_F]).sum(0))

    runner.run(batches, on_input=watch_input, on_hidden=watch_hidden, progress=progress)
    means = []
    for layer, partition in enumerate(partitions):
        sum_F = ranks.from_steps(ranks.add_up(steps_GF[layer]))
        mean_F = sum_F / ranks.add_up(skips_M[layer]).clamp_min(1)[partition.module_F]
        down_DF = ffns[layer].down_DF.detach().double().cpu()
        order_F = partition.permutation_F
        parts_DMm = (down_DF * mean_F)[:, order_F].reshape(len(down_DF), partition.num_modules, -1)
        means.append(parts_DMm.sum(2).T.float())
    return means
