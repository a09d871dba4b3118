"""Experts, routers and repairs, layer after layer: each is fitted to what the converted layers before it leave.

Three things are known of a layer when it is fitted that a pass over the dense model does not tell: the inputs that it
will really get, which modules the router will really skip, and so what is missing. The means of skipped modules and the
least squares for ``down`` are taken on them.
"""

# Shapes: T tokens, N rows kept, D model width, F neurons, M modules, E experts, K top_k, R modules of an expert

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.analysis.passes.by_layer import ByLayer, Stage
from modmoe.analysis.passes.stream import Turn, count_tokens, draw_positions, starts_of
from modmoe.analysis.text.calibration import Batch
from modmoe.conversion.modular.assignment import Assignment
from modmoe.conversion.modular.least_squares import hold_out
from modmoe.conversion.modular.module_outputs import ModuleOutputs, module_outputs
from modmoe.conversion.modular.ridge import RidgeSums
from modmoe.conversion.modular.routers import RouterStart, fit_router, judge, route
from modmoe.models.ffn_layout import FFNWeights
from modmoe.recipe.schema import RouterRecipe
from modmoe.runtime import ranks

KEPT_ROWS = 4096
"""Rows of each layer that experts and routers are fitted to."""
_RIDGE = 1e-2
"""How much a refitted ``down`` is held to what it was, as a share of the mean squared activation."""


@dataclass(frozen=True, slots=True, eq=False)
class LayerFit:
    """One layer as it is converted."""

    assignment: Assignment
    """Its experts."""
    start: RouterStart
    """Its router, and the means of skipped modules."""
    down_DF: Tensor | None = None
    """float32; the down projection fitted anew, neurons in the dense order; None where it stays."""
    partition: Partition | None = None
    """Its modules where they were made with the fit; None where they are the analysis'."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Some tokens of all tasks."""

    x_ND: Tensor
    """float32; FFN inputs."""
    hidden_NF: Tensor
    """float32; activations."""
    task_N: Tensor
    """int64; the task of each."""
    sequence_N: Tensor
    """int64; the sequence of each, numbered over all batches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How layers are fitted: the parts of a settled recipe that say so."""

    router: RouterRecipe
    shared_modules: int
    """Modules that every expert has."""
    refit: bool
    """Whether ``down`` is fitted anew."""
    seed: int
    """Decides which rows are kept, and how a router of two layers starts."""


Assign = Callable[[int, ModuleOutputs], Assignment]
"""Called with a layer and its module outputs."""
SplitLayer = Callable[[Rows, Partition, FFNWeights, FitOptions], LayerFit]
"""Called with a layer's rows, its modules, its weights and the options; what it returns has no repairs yet."""


def fit_layers(
    runner: ByLayer,
    batches: Mapping[str, Sequence[Batch]],
    ffns: Sequence[FFNWeights],
    partitions: Sequence[Partition],
    assign: Assign,
    options: FitOptions,
    progress: Callable[[int], None] | None = None,
    split: SplitLayer | None = None,
) -> list[LayerFit]:
    """Fit every layer in turn; three passes a layer, two where nothing is compensated or refitted.

    Args:
        runner: runs the dense model, one layer at a time.
        batches: the batches of each task.
        ffns: the layers' weights.
        partitions: one a layer.
        assign: chooses experts.
        options: how they are fitted.
        progress: called with tokens that are done; they add up to all tokens.
        split: makes experts and router, and modules if it likes, instead of ``assign`` and a fitted router.

    Raises:
        CalibrationError: a task has no tokens.
    """
    count_tokens(batches)
    repairs = options.router.compensation or options.refit
    passes, done, reported = len(partitions) * (3 if repairs else 2), 0, 0

    def count(tokens: int) -> None:
        nonlocal done, reported
        done += tokens
        if progress is not None:
            progress(done // passes - reported)
        reported = done // passes

    fitted: list[LayerFit] = []
    for stage in runner.stages(batches):
        weights, partition = ffns[stage.layer], partitions[stage.layer]
        sums = RidgeSums(partition, weights) if options.router.start == "ridge" else None
        rows = collect_rows(stage, options.seed, count, None if sums is None else sums.add)
        fit = None if split is None else split(rows, partition, weights, options)
        partition = partition if fit is None or fit.partition is None else fit.partition
        is_centred = options.router.compensation
        outputs = module_outputs(rows.hidden_NF, weights.down_DF, partition, rows.task_N, is_centred=is_centred)
        if fit is None:
            fit = _choose(stage.layer, rows, outputs, weights, partition, assign, options, sums)
        else:
            args = (rows.x_ND, outputs, rows.sequence_N, fit.assignment, options.router.top_k, options.seed)
            fit = replace(fit, start=judge(fit.start, *args))
        if repairs:
            fit = _repair(stage, fit, weights, partition, options, count)
        _go_on(stage, fit, weights, partition, options, count)
        fitted.append(fit)
    return fitted


def _choose(
    layer: int,
    rows: Rows,
    outputs: ModuleOutputs,
    weights: FFNWeights,
    partition: Partition,
    assign: Assign,
    options: FitOptions,
    sums: RidgeSums | None,
) -> LayerFit:
    assignment = assign(layer, outputs)
    if options.router.routing == "task":
        return LayerFit(assignment, RouterStart())
    if sums is not None:
        own_EM = assignment.membership_EM & ~assignment.shared_M
        start = RouterStart(sums.router_of(own_EM.long().argmax(1)))
        args = (rows.x_ND, outputs, rows.sequence_N, assignment, options.router.top_k, options.seed)
        return LayerFit(assignment, judge(start, *args))
    start = fit_router(
        rows.x_ND, outputs, rows.sequence_N, weights, assignment, partition, options.router, options.seed
    )
    return LayerFit(assignment, start)


def collect_rows(
    stage: Stage,
    seed: int,
    progress: Callable[[int], None] | None = None,
    on_tokens: Callable[[Tensor, Tensor], None] | None = None,
) -> Rows:
    """Return tokens drawn uniformly from all batches, the same whatever the number of processes.

    ``on_tokens`` is called with the FFN's inputs and activations of all tokens, float32, but for those of the sequences
    by which routers are judged.
    """
    masks = [turn.batch.attention_mask_BT for turn in stage.all_turns]
    sizes = [int(mask_BT.sum()) for mask_BT in masks]
    first_row, first_sequence = starts_of(sizes), starts_of(map(len, masks))
    position_N = draw_positions(sum(sizes), KEPT_ROWS, seed)
    sequence_T = torch.arange(sum(map(len, masks))).repeat_interleave(torch.cat([mask.sum(1) for mask in masks]))
    fit_N, held_N = (sequence_T[position_N][rows_N] for rows_N in hold_out(sequence_T[position_N], seed))
    judged = held_N[~torch.isin(held_N, fit_N)]  # of very few sequences none is held out
    kept: dict[str, Tensor] = {}
    inputs: list[Tensor] = []

    def watch_input(_: int, x: Tensor, turn: Turn) -> None:
        inputs.append(turn.real_rows(x.detach()))

    def watch_hidden(_: int, hidden: Tensor, turn: Turn) -> None:
        x_TD, hidden_TF = inputs.pop(), turn.real_rows(hidden.detach())
        if not kept:
            count = len(position_N)
            kept["x_ND"] = torch.zeros(count, x_TD.shape[1])
            kept["hidden_NF"] = torch.zeros(count, hidden_TF.shape[1])
            kept["task_N"], kept["sequence_N"] = torch.zeros_like(position_N), torch.zeros_like(position_N)
        at_N = position_N - first_row[turn.index]
        places = torch.nonzero((at_N >= 0) & (at_N < sizes[turn.index])).flatten()
        there = at_N[places].to(x_TD.device)
        length_B = turn.batch.attention_mask_BT.sum(1)
        local_T = torch.arange(len(length_B)).repeat_interleave(length_B)
        if on_tokens is not None:
            is_fit_T = ~torch.isin(first_sequence[turn.index] + local_T, judged)
            on_tokens(x_TD.float().cpu()[is_fit_T], hidden_TF.float().cpu()[is_fit_T])
        kept["x_ND"][places] = x_TD[there].float().cpu()
        kept["hidden_NF"][places] = hidden_TF[there].float().cpu()
        kept["task_N"][places] = turn.task
        kept["sequence_N"][places] = first_sequence[turn.index] + local_T[at_N[places]]

    stage.run(on_input=watch_input, on_hidden=watch_hidden, progress=progress)
    return Rows(**{name: ranks.add_up(tensor) for name, tensor in kept.items()})


def coefficients_TM(fit: LayerFit, x_TD: Tensor, task: int, router: RouterRecipe) -> Tensor:
    """Return what multiplies each module's output for FFN inputs, float32; 0 where it is skipped."""
    member_EM = fit.assignment.membership_EM.float()
    if router.routing == "task":
        return member_EM[task].expand(len(x_TD), -1)
    weights_TK, ids_TK = route(fit.start, x_TD.cpu()).softmax(1).topk(router.top_k, dim=1)
    if router.combine == "sum" and router.top_k > 1:
        weights_TK = weights_TK / weights_TK.sum(1, keepdim=True)
        return torch.einsum("tk,tkm->tm", weights_TK, member_EM[ids_TK])
    return member_EM[ids_TK].amax(1)


def solve_held(gram_FF: Tensor, cross_FD: Tensor, neurons: int) -> Tensor:
    """Return change_FD, the least squares of what is missing, held to zero; ``gram_FF`` is added to.

    The ridge is in proportion to the mean square of the first ``neurons`` columns.
    """
    ridge = _RIDGE * gram_FF.diagonal()[:neurons].mean().clamp_min(1e-30)
    gram_FF.diagonal().add_(ridge)
    return torch.cholesky_solve(cross_FD, torch.linalg.cholesky(gram_FF))


def _repair(
    stage: Stage,
    fit: LayerFit,
    weights: FFNWeights,
    partition: Partition,
    options: FitOptions,
    progress: Callable[[int], None],
) -> LayerFit:
    """Return the fit with the means of what the router skips, and ``down`` by least squares, over all tokens."""
    neurons, modules = len(partition.module_F), partition.num_modules
    steps_GF = ranks.in_steps(torch.zeros(neurons))
    skips_M = torch.zeros(modules, dtype=torch.float64)
    # with the indicators of skipped modules as further columns, so that means and down are fitted together
    width = neurons + (modules if options.router.compensation else 0)
    gram_FF = torch.zeros(width, width, dtype=torch.float64) if options.refit else None
    cross_FD = torch.zeros(width, len(weights.down_DF), dtype=torch.float64) if gram_FF is not None else None
    down_DF = weights.down_DF.detach().float()
    inputs: list[Tensor] = []

    def watch_input(_: int, x: Tensor, turn: Turn) -> None:
        inputs.append(turn.real_rows(x.detach()).float().cpu())

    def watch_hidden(_: int, hidden: Tensor, turn: Turn) -> None:
        hidden_TF = turn.real_rows(hidden.detach()).float().cpu()
        coefficient_TM = coefficients_TM(fit, inputs.pop(), turn.task, options.router)
        skipped_TM = (coefficient_TM == 0).double()
        skips_M.add_(skipped_TM.sum(0))
        skipped_TF = skipped_TM[:, partition.module_F]
        steps_GF.add_(ranks.in_steps((hidden_TF.double() * skipped_TF).sum(0)))
        if gram_FF is not None and cross_FD is not None:
            kept_TF = hidden_TF * coefficient_TM[:, partition.module_F]
            # what is fitted is what is missing, so that the ridge holds down to what it was
            missing_TD = (hidden_TF - kept_TF) @ down_DF.T
            if options.router.compensation:
                kept_TF = torch.cat([kept_TF, skipped_TM.float()], 1)
            gram_FF.add_(kept_TF.T @ kept_TF)
            cross_FD.add_(kept_TF.T @ missing_TD)

    stage.run(on_input=watch_input, on_hidden=watch_hidden, progress=progress)
    means_MD = None
    if options.router.compensation:
        mean_F = ranks.from_steps(ranks.add_up(steps_GF)) / ranks.add_up(skips_M).clamp_min(1)[partition.module_F]
        parts_DMm = (down_DF.double() * mean_F)[:, partition.permutation_F].reshape(len(down_DF), modules, -1)
        means_MD = parts_DMm.sum(2).T
    new_DF = None
    if gram_FF is not None and cross_FD is not None:
        gram_FF, cross_FD = ranks.add_up(gram_FF), ranks.add_up(cross_FD)
        if means_MD is not None:
            # the least squares begin at the means
            cross_FD = cross_FD - gram_FF[:, neurons:] @ means_MD
        change_FD = solve_held(gram_FF, cross_FD, neurons)
        new_DF = (down_DF.double() + change_FD[:neurons].T).float()
        if means_MD is not None:
            means_MD = means_MD + change_FD[neurons:]
    start = replace(fit.start, means_MD=None if means_MD is None else means_MD.float())
    return replace(fit, start=start, down_DF=new_DF)


def _go_on(
    stage: Stage,
    fit: LayerFit,
    weights: FFNWeights,
    partition: Partition,
    options: FitOptions,
    progress: Callable[[int], None],
) -> None:
    """Run the layer as it is converted."""
    down_DF = weights.down_DF.detach() if fit.down_DF is None else fit.down_DF
    inputs: list[Tensor] = []

    def watch_input(_: int, x: Tensor, turn: Turn) -> None:
        inputs.append(x.detach())

    def watch_down(_: int, hidden: Tensor, turn: Turn) -> Tensor:
        x = inputs.pop()
        coefficient_TM = coefficients_TM(fit, x.reshape(-1, x.shape[-1]).float(), turn.task, options.router).to(
            hidden.device
        )
        scaled_TF = hidden.reshape(-1, hidden.shape[-1]) * coefficient_TM[:, partition.module_F].to(hidden.dtype)
        y_TD = scaled_TF @ down_DF.to(hidden).T
        if weights.down_bias_D is not None:
            y_TD = y_TD + weights.down_bias_D.to(hidden)
        if fit.start.means_MD is not None:
            y_TD = y_TD + (coefficient_TM == 0).to(hidden.dtype) @ fit.start.means_MD.to(hidden)
        return y_TD.reshape(*hidden.shape[:-1], -1)

    stage.run(on_input=watch_input, on_down=watch_down, goes_on=True, progress=progress)
