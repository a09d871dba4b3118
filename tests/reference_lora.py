"""Mixtures of LoRA at one linear layer as loops over tokens and experts: what each method's equations say."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: T tokens, D input width, O output width, E experts, R rank


def molora(adapter, x_TD: Tensor) -> Tensor:
    """Soft, or over each token's top k."""
    rows = []
    for x_D in x_TD:
        p_E = (adapter.router_ED @ x_D).softmax(-1)
        chosen = range(len(p_E))
        total = 1.0
        if adapter.settings.top_k is not None:
            chosen = sorted(chosen, key=lambda e, p_E=p_E: -p_E[e].item())[: adapter.settings.top_k]
            total = sum(p_E[e] for e in chosen)
        rows.append(_loras(adapter, x_D, {e: p_E[e] / total for e in chosen}))
    return torch.stack(rows)


def hydralora(adapter, x_TD: Tensor) -> Tensor:
    """One A, heads B by softmax."""
    rows = []
    for x_D in x_TD:
        p_E = (adapter.router_ED @ x_D).softmax(-1)
        y_O = torch.zeros(adapter.up_OER.shape[0], dtype=x_D.dtype)
        for e, p in enumerate(p_E):
            y_O = y_O + p * (adapter.up_OER[:, e] @ (adapter.down_RD @ x_D))
        rows.append(adapter.settings.lora_alpha / adapter.settings.r * y_O)
    return torch.stack(rows)


def adamole(adapter, x_TD: Tensor) -> Tensor:
    """What exceeds the token's threshold; the largest shares everything where nothing does."""
    rows = []
    experts = adapter.settings.num_experts
    tau_max = adapter.settings.tau_max if adapter.settings.tau_max is not None else 1 / experts
    for x_D in x_TD:
        g_E = (adapter.router_ED @ x_D).softmax(-1)
        tau = tau_max * torch.sigmoid(adapter.threshold_1D[0] @ x_D + adapter.threshold_1[0])
        over = {e: g_E[e] - tau for e in range(experts) if g_E[e] > tau}
        if not over:
            over = {e: g_E[e] for e in range(experts) if g_E[e] == g_E.max()}
        total = sum(over.values())
        rows.append(_loras(adapter, x_D, {e: value / total for e, value in over.items()}))
    return torch.stack(rows)


def ldmole(adapter, x_TD: Tensor) -> Tensor:
    """Sparsegen weights, lambda by the net of this input width."""
    net, prefix = adapter.shared[0], f"lambda{adapter.shape.inputs}_"
    hidden_HD, hidden_H = getattr(net, prefix + "hidden_HD"), getattr(net, prefix + "hidden_H")
    out_1H, out_1 = getattr(net, prefix + "out_1H"), getattr(net, prefix + "out_1")
    rows = []
    for x_D in x_TD:
        u_E = adapter.router_ED @ x_D
        sharpness = F.logsigmoid(out_1H[0] @ (hidden_HD @ x_D + hidden_H).relu() + out_1[0]) + 1 - 0.01
        p_E = sparsegen(u_E, sharpness)
        rows.append(_loras(adapter, x_D, {e: p_E[e] for e in range(len(p_E))}))
    return torch.stack(rows)


def sparsegen(u_E: Tensor, sharpness: Tensor) -> Tensor:
    """The closed form of one token: k by the condition on the sorted logits, then tau, then what exceeds it."""
    sorted_E = u_E.sort(descending=True).values
    size = max(
        j
        for j in range(1, len(u_E) + 1)
        if j == 1 or 1 - sharpness + j * sorted_E[j - 1] > sum(sorted_E[i] for i in range(j))
    )
    tau = (sum(sorted_E[i] for i in range(size)) - 1 + sharpness) / size
    return (u_E - tau).relu() / (1 - sharpness)


def moslora(adapter, x_TD: Tensor) -> Tensor:
    """A mixer in the middle."""
    scale = adapter.settings.lora_alpha / adapter.settings.r
    return torch.stack([scale * (adapter.up_OR @ (adapter.mixer_RS @ (adapter.down_RD @ x_D))) for x_D in x_TD])


def comol(adapter, x_TD: Tensor) -> Tensor:
    """Each token's own core; dropout, where it is on, on the input, on that core and in front of B."""
    settings = adapter.settings
    share = settings.lora_dropout if adapter.training else 0.0
    read_TD = F.dropout(x_TD, share) if share else x_TD
    z_TS = torch.stack([adapter.down_RD @ x_D for x_D in read_TD])
    cores = []
    for x_D, z_S in zip(x_TD, z_TS, strict=True):
        p_E = (adapter.router_EX @ (z_S if settings.core_routing else x_D)).softmax(-1)
        cores.append(sum(p_E[e] * adapter.cores_ERS[e] for e in range(settings.num_experts)))
    core_TRS = torch.stack(cores)
    if share:
        core_TRS = F.dropout(core_TRS.flatten(1), share).view_as(core_TRS)
    y_TR = torch.stack([core_RS @ z_S for core_RS, z_S in zip(core_TRS, z_TS, strict=True)])
    if share:
        y_TR = F.dropout(y_TR, share)
    return settings.lora_alpha / settings.r * torch.stack([adapter.up_OR @ y_R for y_R in y_TR])


def _loras(adapter, x_D: Tensor, weights: dict[int, Tensor]) -> Tensor:
    y_O = torch.zeros(adapter.up_OER.shape[0], dtype=x_D.dtype)
    for e, weight in weights.items():
        y_O = y_O + weight * (adapter.up_OER[:, e] @ (adapter.down_ERD[e] @ x_D))
    return adapter.settings.lora_alpha / adapter.settings.r * y_O
