"""The fast ways of the tied FFN: only modules that are on are read, each once, and as they are stored.

    runs     Modules that lie together are one slice of each matrix, so an expert of few runs costs few products and no
             copy. (Of one token with many short runs ``down`` is read whole, which is faster than in such pieces.) One
             choice for all tokens: its runs. Few tokens that choose apart: the runs of all modules in use,
             the hidden values of a token's other modules made 0, since reading weights is what costs. Many tokens:
             they are sorted by what they chose; modules that all chose are computed for all, then each choice's others
             for its rows, a slice. Where a choice has too few rows for that, every set of modules with the same
             holders is computed once for the rows of them all, brought together where they are no neighbours. Where
             there are many choices, as when a router picks modules one by one, each module gets the rows that have it.
    gather   One token, its modules' numbers in a tensor: sums of products that a compiler turns into loops over the
             matrices as they lie. No shape here depends on a value, and nothing is asked of the host.

Which is fastest where was measured (benchmarks/runtime.py).
"""

# Shapes: T tokens, D model width, S stored modules, F neurons stored, m neurons of a module, E experts, K chosen at
# once, C different choices, N tokens that a set of modules is computed for, A modules of one token, L rows side by side

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

Run: TypeAlias = tuple[int, int]
"""A range of stored modules, begin and end."""

FEW_TOKENS = 32
"""Up to here reading weights costs more than computing with them, and tokens need not be sorted."""
LEFT_ROWS = 128
"""Up to here weights are the left operand, ``W x^T``: mostly faster in bfloat16, up to 1.8 times; level above."""
MANY_RUNS = 8
"""With fewer, ``down`` of one token is always read in slices."""
BYTES_OF_A_RUN = 1024
"""What one more slice of each row of ``down`` costs, in bytes that are read where one is: 0.1 microseconds a row."""
ROWS_APART = 16
"""With fewer rows a choice reading weights once outweighs bringing rows together."""
MOST_CHOICES = 32
"""With more different choices nothing is gained by looking for what they have in common."""
_KEYS = 2**62
"""What a token chose is made one integer of 64 bits where tokens are sorted, if there are no more choices than this."""
_KEPT = 512
"""Plans that a layer remembers before it begins anew."""


class Layout:
    """What the experts of one layer are, on the host, and what follows from it, worked out once."""

    def __init__(self, modules_EA: Sequence[Sequence[int]], stored: int) -> None:
        """Take the modules of each expert and the number of stored ones. A set of modules is kept as bits."""
        self.stored = stored
        self.set_E = [sum(1 << module for module in modules) for modules in modules_EA]
        self.order_E = _neighbours(self.set_E)
        self.place_E = torch.tensor(self.order_E).argsort()
        self._runs: dict[int, tuple[Run, ...]] = {}
        self._plans: dict[tuple[bool, tuple[int, ...]], list[tuple[tuple[Run, ...], tuple[Run, ...]]]] = {}

    def union(self, experts: Sequence[int]) -> int:
        """Return the set of modules that any of the experts has."""
        return functools.reduce(int.__or__, [self.set_E[expert] for expert in experts])

    def runs(self, modules: int) -> tuple[Run, ...]:
        """Return the runs that a set of modules lies in."""
        if modules not in self._runs:
            if len(self._runs) >= _KEPT:
                self._runs.clear()
            self._runs[modules] = _runs(modules, self.stored)
        return self._runs[modules]

    def plan(self, set_C: tuple[int, ...], *, is_apart: bool) -> list[tuple[tuple[Run, ...], tuple[Run, ...]]]:
        """Return, for choices in the order of their tokens, what is computed for whom: ranges of choices, and runs.

        Modules of all choices are computed once, for all. The others are choice by choice where ``is_apart``, else each
        once, for all choices that have it.
        """
        key = (is_apart, set_C)
        if key not in self._plans:
            if len(self._plans) >= _KEPT:
                self._plans.clear()
            all_of_them = (1 << len(set_C)) - 1
            modules_of: dict[int, int] = {all_of_them: 0}
            for module in range(self.stored):
                holders = sum((chosen >> module & 1) << number for number, chosen in enumerate(set_C))
                is_split = is_apart and holders != all_of_them
                for who in [1 << number for number in range(len(set_C))] if is_split else [holders]:
                    if who & holders:
                        modules_of[who] = modules_of.get(who, 0) | 1 << module
            self._plans[key] = [(_runs(who, len(set_C)), self.runs(what)) for who, what in modules_of.items() if what]
        return self._plans[key]


def _runs(bits: int, length: int) -> tuple[Run, ...]:
    found: list[Run] = []
    for number in range(length):
        if bits >> number & 1:
            begin = found.pop()[0] if found and found[-1][1] == number else number
            found.append((begin, number + 1))
    return tuple(found)


def _neighbours(set_E: Sequence[int]) -> list[int]:
    """Return an order of experts in which neighbours share modules: always the nearest that is left."""
    order, left = [0], set(range(1, len(set_E)))
    while left:
        last = set_E[order[-1]]
        order.append(min(left, key=lambda expert: ((last ^ set_E[expert]).bit_count(), expert)))
        left.remove(order[-1])
    return order


def by_runs(
    ffn: Any, x_ND: Tensor, runs: Sequence[Run], scale_NS: Tensor | None = None, y_ND: Tensor | None = None
) -> Tensor:
    """Return the summed outputs of some runs of modules, each module's times its scale, without ``down``'s bias.

    They are added to ``y_ND`` in place where it is given. Up to LEFT_ROWS rows weights are the left operand and hidden
    values lie neurons first; a single row is a vector, but for ``down``, whose slices ``mv`` is slow at in bfloat16.
    Where those would be many and short, hidden values of skipped neurons are 0 and ``down`` is one product.
    """
    size, is_gated, activate, rows = ffn.module_size, ffn.gated, ffn.act_fn, x_ND.shape[0]
    up, down_DF = ffn.up_proj, ffn.down_proj.weight
    up_FD, up_bias_F = up.weight, up.bias
    if is_gated:
        gate = ffn.gate_proj
        gate_FD, gate_bias_F = gate.weight, gate.bias
    is_one, is_many = rows == 1, rows > LEFT_ROWS
    is_left = not is_one and not is_many
    x = x_ND if is_many else x_ND[0] if is_one else x_ND.T
    skipped = down_DF.shape[1] - size * sum(last - first for first, last in runs)
    is_whole = is_one and len(runs) >= MANY_RUNS and skipped * down_DF.itemsize < BYTES_OF_A_RUN * len(runs)
    parts, done = [], 0

    def project(weight_OD: Tensor, bias_O: Tensor | None) -> Tensor:
        found = F.linear(x, weight_OD) if is_many else torch.mv(weight_OD, x) if is_one else torch.mm(weight_OD, x).T
        return found if bias_O is None else found + bias_O

    for first, last in runs:
        begin, end = first * size, last * size
        hidden_NF = project(up_FD[begin:end], None if up_bias_F is None else up_bias_F[begin:end])
        if is_gated:
            gate_NF = project(gate_FD[begin:end], None if gate_bias_F is None else gate_bias_F[begin:end])
            hidden_NF = activate(gate_NF) * hidden_NF
        else:
            hidden_NF = activate(hidden_NF)
        if is_one:
            hidden_NF = hidden_NF.unsqueeze(0)
        if scale_NS is not None:
            hidden_NF = hidden_NF * scale_NS[:, first:last].repeat_interleave(size, 1)
        if is_whole:
            parts += [hidden_NF.new_zeros(begin - done), hidden_NF[0]]
            done = end
            continue
        part_DF = down_DF[:, begin:end]
        if y_ND is None:
            y_ND = torch.mm(part_DF, hidden_NF.T).T if is_left else torch.mm(hidden_NF, part_DF.T)
        elif is_left:
            y_ND.T.addmm_(part_DF, hidden_NF.T)
        else:
            y_ND.addmm_(hidden_NF, part_DF.T)
    if is_whole:
        y_D = torch.mv(down_DF, torch.cat([*parts, x_ND.new_zeros(down_DF.shape[1] - done)]))
        y_ND = y_D.unsqueeze(0) if y_ND is None else y_ND.add_(y_D)
    # rows in memory again: reductions behind this round otherwise where values lie otherwise
    return torch.zeros_like(x_ND) if y_ND is None else y_ND.contiguous()


def by_choice(
    ffn: Any, x_TD: Tensor, layout: Layout, set_C: tuple[int, ...], count_C: Sequence[int], scale_TS: Tensor | None
) -> Tensor:
    """Return the outputs of tokens sorted by choice: the first ``count_C[0]`` chose the modules ``set_C[0]``."""
    starts = [0, *itertools.accumulate(count_C)]
    y_TD: Tensor | None = None
    for who, what in layout.plan(set_C, is_apart=len(x_TD) >= ROWS_APART * len(set_C)):
        rows = [slice(starts[begin], starts[end]) for begin, end in who]
        if y_TD is None:
            # the plan begins with what is for all tokens, if there is such
            if len(who) == 1 and who[0] == (0, len(set_C)):
                y_TD = by_runs(ffn, x_TD, what, scale_TS)
                continue
            y_TD = torch.zeros_like(x_TD)
        if len(rows) == 1:
            row = rows[0]
            by_runs(ffn, x_TD[row], what, None if scale_TS is None else scale_TS[row], y_TD[row])
            continue
        scale_NS = None if scale_TS is None else torch.cat([scale_TS[row] for row in rows])
        y_ND = by_runs(ffn, torch.cat([x_TD[row] for row in rows]), what, scale_NS)
        for row, part_ND in zip(rows, torch.split(y_ND, [row.stop - row.start for row in rows]), strict=True):
            y_TD[row] += part_ND
    return torch.zeros_like(x_TD) if y_TD is None else y_TD


def by_module(ffn: Any, x_TD: Tensor, active_TS: Tensor, scale_TS: Tensor | None) -> Tensor:
    """Return the outputs of tokens of which each has the modules that ``active_TS`` (bool) says.

    Modules that all tokens have are run for all, each other one for its own tokens. The numbers of tokens come to the
    host, once.
    """
    tokens, stored = active_TS.shape
    count_S = active_TS.sum(0).tolist()
    common = sum(1 << module for module, count in enumerate(count_S) if count == tokens)
    y_TD = by_runs(ffn, x_TD, _runs(common, stored), scale_TS)
    row_A = active_TS.T.nonzero()[:, 1]
    for module, rows_N in enumerate(torch.split(row_A, count_S)):
        if common >> module & 1 or not len(rows_N):
            continue
        scale_NS = None if scale_TS is None else scale_TS.index_select(0, rows_N)
        y_ND = by_runs(ffn, x_TD.index_select(0, rows_N), [(module, module + 1)], scale_NS)
        y_TD.index_add_(0, rows_N, y_ND)
    return y_TD


def _active_TS(ffn: Any, ids_TK: Tensor) -> Tensor:
    chosen_TE = torch.zeros(len(ids_TK), ffn.num_experts, device=ids_TK.device).scatter_(1, ids_TK, 1.0)
    active_TS: Tensor = (chosen_TE @ ffn.member_ES(chosen_TE.dtype)) > 0
    return active_TS


def run_tokens(ffn: Any, x_TD: Tensor, layout: Layout, ids_TK: Tensor, scale_TS: Tensor | None) -> Tensor:
    """Return the outputs of tokens that chose ``ids_TK``; ``scale_TS`` multiplies modules where it is given.

    Only the choices come to the host, once.
    """
    tokens, chosen = ids_TK.shape
    if tokens <= FEW_TOKENS:
        rows = ids_TK.tolist()
        sets = [layout.union(row) for row in rows]
        union = functools.reduce(int.__or__, sets)
        if scale_TS is None and any(one != union for one in sets):
            scale_TS = ffn.member_ES(x_TD.dtype)[ids_TK].amax(1)
        return by_runs(ffn, x_TD, layout.runs(union), scale_TS)
    if len(layout.set_E) ** chosen >= _KEYS:
        return by_module(ffn, x_TD, _active_TS(ffn, ids_TK), scale_TS)
    # experts renumbered so that neighbours share modules, and a choice made one number: digits in the base of experts
    experts = len(layout.set_E)
    digits_TK = layout.place_E.to(ids_TK.device)[ids_TK].sort(-1).values
    key_T = digits_TK[:, 0]
    for digit in range(1, chosen):
        key_T = key_T * experts + digits_TK[:, digit]
    sorted_T, order_T = key_T.sort(stable=True)
    keys, counts = torch.unique_consecutive(sorted_T, return_counts=True)
    if len(keys) > MOST_CHOICES:
        return by_module(ffn, x_TD, _active_TS(ffn, ids_TK), scale_TS)
    key_C, count_C = torch.stack([keys, counts]).tolist()
    set_C = []
    for key in key_C:
        picked = [layout.order_E[key // experts**digit % experts] for digit in range(chosen)]
        set_C.append(layout.union(picked))
    if len(set_C) == 1:
        return by_runs(ffn, x_TD, layout.runs(set_C[0]), scale_TS)
    scale_TS = None if scale_TS is None else scale_TS[order_T]
    sorted_TD = by_choice(ffn, x_TD.index_select(0, order_T), layout, tuple(set_C), count_C, scale_TS)
    return torch.empty_like(sorted_TD).index_copy_(0, order_T, sorted_TD)


def gather_token(
    x_1D: Tensor,
    gate_FD: Tensor | None,
    up_FD: Tensor,
    down_DF: Tensor,
    gate_bias_F: Tensor | None,
    up_bias_F: Tensor | None,
    modules_A: Tensor,
    scale_A: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    size: int,
    lanes: int,
) -> Tensor:
    """Return the output of one token, [1, D], for the modules whose numbers stand in ``modules_A``.

    Compiled, the weights are neither copied nor read but where they are on. ``lanes`` rows of a matrix, see
    ``lanes_of``, are summed side by side.
    """
    width = x_1D.shape[1]
    x_D = x_1D[0]

    def project(weight_FD: Tensor, bias_F: Tensor | None) -> list[Tensor]:
        rows_SmLD = weight_FD.view(-1, size // lanes, lanes, width)[modules_A]
        found = [(rows_SmLD[:, :, lane] * x_D).sum(-1) for lane in range(lanes)]
        if bias_F is None:
            return found
        bias_AmL = bias_F.view(-1, size // lanes, lanes)[modules_A]
        return [part + bias_AmL[:, :, lane] for lane, part in enumerate(found)]

    up = project(up_FD, up_bias_F)
    if gate_FD is not None:
        gate = project(gate_FD, gate_bias_F)
        hidden_AmL = torch.stack([activation(one) * two for one, two in zip(gate, up, strict=True)], -1)
    else:
        hidden_AmL = torch.stack([activation(one) for one in up], -1)
    hidden_Am = hidden_AmL.flatten(1)
    if scale_A is not None:
        hidden_Am = hidden_Am * scale_A.unsqueeze(-1)
    down_DLSm = down_DF.view(width // lanes, lanes, -1, size)
    parts = [(down_DLSm[:, lane][:, modules_A] * hidden_Am).sum((1, 2)) for lane in range(lanes)]
    return torch.stack(parts, -1).reshape(1, width)


def lanes_of(size: int, width: int, device: torch.device) -> int:
    """Return the rows that ``gather_token`` sums side by side: on a processor one alone leaves the memory idle.

    Worked out outside of it: what is compiled for modules of several sizes has sizes that are no numbers yet.
    """
    return math.gcd(math.gcd(size, width), 4) if device.type == "cpu" else 1


@functools.cache
def compiled_gather() -> Callable[..., Tensor]:
    """Return ``gather_token`` compiled. What differs from layer to layer, the modules stored, is left open in it."""
    return torch.compile(gather_token, fullgraph=True)
