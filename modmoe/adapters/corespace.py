"""From a collection of trained LoRAs to the cores of a CoMoL, without loss.

    Core space, https://arxiv.org/abs/2509.17786

    V = an orthonormal basis of all A's rows, [R, D];  U = one of all B's columns, [O, R];  R = the sum of the ranks
    C_e = s_e (U^T B_e) (A_e V^T)
    U C_e V = s_e B_e A_e, since U U^T B_e = B_e and A_e V^T V = A_e

The paper takes singular vectors for the bases; a QR decomposition spans the same. Where the ranks sum to more than D or
O that basis is D or O wide, so the cores would not be square: the narrower side is padded with zeros.
"""

# Shapes: D input width, O output width, E LoRAs, K one LoRA's rank, R rank of the core space, S = R (a core's input)

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .mechanism.base import SiteShape
from .methods.comol import CoMoL, CoMoLSettings

LoRAWeights = tuple[Tensor, Tensor, float]
"""A, [K, D]; B, [O, K]; and the factor of B A, which is lora_alpha / r."""


def stack_loras(loras: Sequence[LoRAWeights]) -> dict[str, Tensor]:
    """Return down_RD, up_OR and cores_ERS of the CoMoL whose expert e is LoRA e, for lora_alpha = r = R.

    Computed in float64 and returned in the LoRAs' type, float32 at least. The ranks need not be equal.

    Raises:
        ValueError: there are no LoRAs, or their widths differ.
    """
    if not loras:
        raise ValueError("loras: none was given; a core space needs one at least.")
    downs = [down_KD.detach().double() for down_KD, _, _ in loras]
    ups = [up_OK.detach().double() for _, up_OK, _ in loras]
    for number, (down_KD, up_OK) in enumerate(zip(downs, ups, strict=True)):
        same = down_KD.shape[1] == downs[0].shape[1] and up_OK.shape[0] == ups[0].shape[0]
        if not same or down_KD.shape[0] != up_OK.shape[1]:
            raise ValueError(
                f"loras: number {number} is {tuple(up_OK.shape)} times {tuple(down_KD.shape)}, which does not go with "
                f"{tuple(ups[0].shape)} times {tuple(downs[0].shape)}; stack LoRAs of one layer."
            )
    right_DS = torch.linalg.qr(torch.cat(downs).T).Q
    left_OR = torch.linalg.qr(torch.cat(ups, dim=1)).Q
    rank = max(right_DS.shape[1], left_OR.shape[1])
    # zero columns in the basis and zeros in the cores change no product
    right_DS = F.pad(right_DS, (0, rank - right_DS.shape[1]))
    left_OR = F.pad(left_OR, (0, rank - left_OR.shape[1]))
    scales = [scale for _, _, scale in loras]
    cores = [
        scale * (left_OR.T @ up_OK) @ (down_KD @ right_DS)
        for down_KD, up_OK, scale in zip(downs, ups, scales, strict=True)
    ]
    dtype = torch.promote_types(loras[0][0].dtype, torch.float32)
    made = {"down_RD": right_DS.T, "up_OR": left_OR, "cores_ERS": torch.stack(cores)}
    return {name: tensor.to(dtype).contiguous() for name, tensor in made.items()}


def comol_from_loras(loras: Sequence[LoRAWeights], *, core_routing: bool = True, site: str = "") -> CoMoL:
    """Return a CoMoL whose experts are the LoRAs; its router is zero, so that it begins as their mean.

    Errors as in ``stack_loras``.
    """
    weights = stack_loras(loras)
    rank = weights["down_RD"].shape[0]
    settings = CoMoLSettings(r=rank, lora_alpha=rank, num_experts=len(loras), core_routing=core_routing)
    shape = SiteShape(inputs=weights["down_RD"].shape[1], outputs=weights["up_OR"].shape[0])
    adapter = CoMoL(settings, shape, site)
    router_EX = torch.zeros_like(adapter.router_EX)
    adapter.load_state_dict({**weights, "router_EX": router_EX})
    return adapter
