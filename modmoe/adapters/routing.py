"""From a router's logits to the experts' weights: what several methods share, as functions. All compute in float32."""

# Shapes: T tokens, E experts, D input width, R rank, O output width

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .passes import Frame


def router_logits(x_TD: Tensor, router_ED: Tensor) -> Tensor:
    """Return logits_TE of a linear router, in float32 also under autocast."""
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), router_ED.float())


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
    experts, rank, _ = down_ERD.shape
    z_TER = F.linear(x_TD, down_ERD.flatten(0, 1)).view(-1, experts, rank)
    weighted_TER = z_TER * weights_TE.to(z_TER.dtype).unsqueeze(-1)
    return F.linear(weighted_TER.flatten(1), up_OER.flatten(1))


def kaiming_(weight: Tensor) -> None:
    """Fill [..., out, in] as ``nn.Linear`` begins: kaiming uniform with a = sqrt(5), each matrix of a stack alike."""
    bound = 1 / math.sqrt(weight.shape[-1])
    nn.init.uniform_(weight, -bound, bound)


def dropped(x: Tensor, share: float, training: bool) -> Tensor:
    """Return x with dropout, or x itself where there is none."""
    return F.dropout(x, share, training) if share and training else x
