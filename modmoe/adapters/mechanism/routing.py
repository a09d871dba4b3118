"""From a router's logits to the experts' weights and outputs: what several methods share, as functions.

Routers compute in float32 whatever the experts compute in (in float64 where everything is).
"""

# Shapes: T tokens, E experts, D input width, R rank, X = E R (the experts' ranks in a row), O output width, I input
#         width of a product that is used on either side, Y = X and E and what pads them

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .passes import Frame


def router_logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """Return logits_TE of a linear router, in float32 also under autocast."""
    dtype = torch.promote_types(x_TD.dtype, torch.float32)
    with torch.autocast(x_TD.device.type, enabled=False):
        if x_TD.dtype != dtype and x_TD.device.type == "cpu" and not torch.is_grad_enabled():
            # a whole copy of x in float32 costs more than the product: 128 tokens at a time stay in the cache
            rows_ED = router_ED.to(dtype)
            parts = [rows_ED @ part_TD.to(dtype).t() for part_TD in torch.split(x_TD, 128)]
            return torch.cat(parts, dim=1).t().contiguous()
        return F.linear(x_TD.to(dtype), router_ED.to(dtype))


def down_and_logits(x_TD: Tensor, down_XD: Tensor, router_ED: Tensor, dropout: float = 0.0) -> tuple[Tensor, Tensor]:
    """Return down x, [T, X], and the logits of a router of the same input, [T, E]; dropout is not for the router.

    In training the router's rows join the product, so that x is read once and gets one gradient. Where that product is
    in half precision, the logits' value still is the float32 one, and only their gradient goes through the product.
    """
    if dropout or not torch.is_grad_enabled():
        return narrow_linear(dropped(x_TD, dropout, True), down_XD), router_logits(x_TD, router_ED)
    rows, end = [down_XD, router_ED], len(down_XD) + len(router_ED)
    is_half = x_TD.dtype.itemsize == 2 or torch.is_autocast_enabled(x_TD.device.type)
    if is_half and end % 16:
        # a width of 136 is up to 1.6 times slower than 144 in bfloat16; in float32 zeros would only cost
        rows.append(down_XD.new_zeros(-end % 16, down_XD.shape[1]))
    # split, not indices: its gradient is one concatenation and not a sum of tensors filled up with zeros
    joined_TY = narrow_linear(x_TD, torch.cat(rows))
    z_TX, logits_TE, *_ = torch.split(joined_TY, [len(part) for part in rows], dim=1)
    if is_half:
        with torch.no_grad():
            exact_TE = router_logits(x_TD, router_ED)
        logits_TE = _Valued.apply(logits_TE, exact_TE)  # type: ignore[no-untyped-call]
    return z_TX, logits_TE


def narrow_linear(x_TI: Tensor, weight_OI: Tensor) -> Tensor:
    """Return ``F.linear`` of a weight that has a rank for one of its sides.

    On a CPU in half precision torch's gradient of such a weight, grad.t() @ x, takes two to three times the product
    forward. Laying the narrow one of the two out by columns first saves up to half of that.
    """
    device = x_TI.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TI.dtype
    if device != "cpu" or dtype.itemsize != 2 or not torch.is_grad_enabled():
        return F.linear(x_TI, weight_OI)
    y_TO: Tensor = _NarrowLinear.apply(x_TI.to(dtype), weight_OI.to(dtype))  # type: ignore[no-untyped-call]
    return y_TO


class _NarrowLinear(torch.autograd.Function):
    """F.linear with its weight's gradient by way of the narrow side."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, weight_OI)
        return F.linear(x_TI, weight_OI)

    @staticmethod
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TI, weight_OI = ctx.saved_tensors
        grad_TI = grad_TO @ weight_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return grad_TI, None
        if weight_OI.shape[0] < weight_OI.shape[1]:
            return grad_TI, grad_TO.t().contiguous() @ x_TI
        return grad_TI, (x_TI.t().contiguous() @ grad_TO).t()


class _Valued(torch.autograd.Function):
    """Has the value of the second tensor and the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, rough: Tensor, exact: Tensor) -> Tensor:
        ctx.dtype = rough.dtype
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype), None


def softmax_experts(logits_TE: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the softmax over experts for a mixture that computes in ``dtype``.

    In training in half precision in memory with tokens last, since torch's takes ten times longer over a short axis.
    The last bits then depend on the number of threads, which full precision and a model that is used are to be free of.
    """
    is_fast = dtype.itemsize == 2 and torch.is_grad_enabled()
    return logits_TE.t().softmax(0).t() if is_fast else logits_TE.softmax(-1)


def top_k_mask(probs_TE: Tensor, top_k: int, frame: Frame, key: str) -> Tensor:
    """Return True at the ``top_k`` largest of each token; decided once a pass, and replayed under checkpointing."""

    def choose() -> Tensor:
        ids_TK = probs_TE.detach().topk(top_k, dim=-1).indices
        return torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(-1, ids_TK, True)

    chosen: Tensor = frame.decide(key, choose)
    return chosen


def normalised(weights_TE: Tensor) -> Tensor:
    """Return the weights divided by their sum over experts; where all are zero they stay zero."""
    return weights_TE / weights_TE.sum(-1, keepdim=True).clamp_min(torch.finfo(weights_TE.dtype).tiny)


def mix_lora(x_TD: Tensor, down_ERD: Tensor, up_OER: Tensor, weights_TE: Tensor) -> Tensor:
    """Return sum_e weights_e up_e down_e x, [T, O].

    All experts' A are one matrix and all B another, weighted in between at rank width: two products instead of 2 E,
    also where most weights are zero, since gathering tokens costs more than the arithmetic it saves at these ranks.
    """
    return mix_up(F.linear(x_TD, down_ERD.flatten(0, 1)), up_OER, weights_TE)


def mix_up(z_TX: Tensor, up_OER: Tensor, weights_TE: Tensor) -> Tensor:
    """Return sum_e weights_e up_e z_e, [T, O]: the half of ``mix_lora`` behind the down projections."""
    # spread to full width first: a product that broadcasts over so short a last axis is several times slower
    weights_TE, rank = weights_TE.to(z_TX.dtype), up_OER.shape[-1]
    if z_TX.dtype.itemsize == 2:
        # a product with ones and zeros is exact here, and its gradient is a faster sum
        ones_EX = torch.eye(up_OER.shape[1], dtype=z_TX.dtype, device=z_TX.device).repeat_interleave(rank, dim=1)
        weights_TX = weights_TE @ ones_EX
    else:
        weights_TX = weights_TE.repeat_interleave(rank, dim=1)
    return narrow_linear(z_TX * weights_TX, up_OER.flatten(1))


def mixed_weight(down_ERD: Tensor, up_OER: Tensor, weights_E: Tensor | None) -> Tensor:
    """Return sum_e weights_e up_e down_e, [O, D]; None for weights of 1."""
    if weights_E is not None:
        up_OER = up_OER * weights_E.unsqueeze(-1)
    return up_OER.flatten(1) @ down_ERD.flatten(0, 1)


def kaiming_(weight: Tensor) -> None:
    """Fill [..., out, in] as ``nn.Linear`` begins: kaiming uniform with a = sqrt(5), each matrix of a stack alike."""
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Return x with dropout, or x itself where there is none."""
    return F.dropout(x, share, training) if share and training else x


def by_expert(ids_TK: Tensor, num_experts: int) -> tuple[Tensor, list[int]]:
    """Return the order that puts the K T choices in rows by expert, and how many rows each expert has.

    Choice c of the order is rank c // T of token c % T: within an expert ranks come first and then tokens, as in
    transformers' loop. Ids of ``num_experts``, which mark choices of another device, come last and are not counted.
    """
    ids_S = ids_TK.T.reshape(-1)
    return ids_S.argsort(stable=True), torch.bincount(ids_S, minlength=num_experts + 1)[:num_experts].tolist()
