"""Loops that anyone can read: what adapters at FFN and MoE blocks mean, token by token and expert by expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: T tokens, D width, E experts, K top_k, R rank, F = 2 I gate and up rows


def expert_output(adapter, expert: int, h_D: Tensor) -> Tensor:
    """Return d_e(h) of a PERFT adapter, without dropout."""
    settings = adapter.settings
    z_R = adapter.down_ERD[expert] @ h_D
    if settings.expert == "parallel":
        return adapter.up_DER[:, expert] @ (z_R / (1 + torch.exp(-z_R)))
    return settings.lora_alpha / settings.r * (adapter.up_DER[:, expert] @ z_R)


def perft_always_on(adapter, x_TD: Tensor) -> Tensor:
    """Return what PERFT-S and PERFT-D add: the sum of all adapters' outputs."""
    return torch.stack([sum(expert_output(adapter, e, x_D) for e in range(len(adapter.down_ERD))) for x_D in x_TD])


def perft_r(adapter, x_TD: Tensor, *, renormalise: bool, base_weights_TK: Tensor | None = None) -> Tensor:
    """Return what PERFT-R adds; with ``base_weights_TK`` as the released code for OLMoE multiplies."""
    rows = []
    for token, x_D in enumerate(x_TD):
        p_E = (adapter.router_ED @ x_D).softmax(-1)
        chosen = sorted(range(len(p_E)), key=lambda e, p_E=p_E: -p_E[e].item())[: adapter.settings.top_k]
        total = sum(p_E[e] for e in chosen)
        y_D = torch.zeros_like(x_D)
        for k, e in enumerate(chosen):
            if base_weights_TK is not None:
                weight = sorted(base_weights_TK[token], key=Tensor.item, reverse=True)[k]
            elif not renormalise:
                weight = p_E[e]
            else:
                # of one expert alone: 1, with the gradient of log p
                weight = p_E[e] / (p_E[e].detach() if len(chosen) == 1 else total)
            y_D = y_D + weight * expert_output(adapter, e, x_D)
        rows.append(y_D)
    return torch.stack(rows)


def perft_e(adapter, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
    """Return what PERFT-E adds to a block whose router chose ``ids_TK``."""
    rows = []
    for x_D, weights_K, ids_K in zip(x_TD, weights_TK, ids_TK.tolist(), strict=True):
        y_D = torch.zeros_like(x_D)
        for weight, e in zip(weights_K, ids_K, strict=True):
            if e < len(adapter.down_ERD):
                y_D = y_D + weight * expert_output(adapter, e, x_D)
        rows.append(y_D)
    return torch.stack(rows)


def perft_e_inside(experts, adapter, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the output of base experts that each have PERFT-E's adapter inside: w_k (E_k(h) + d_k(h))."""
    rows = []
    for h_D, ids_K, weights_K in zip(hidden_TD, ids_TK.tolist(), weights_TK, strict=True):
        y_D = torch.zeros_like(h_D)
        for e, weight in zip(ids_K, weights_K, strict=True):
            gate_I, up_I = (experts.gate_up_proj[e] @ h_D).chunk(2)
            inner_D = experts.down_proj[e] @ (experts.act_fn(gate_I) * up_I)
            y_D = y_D + weight * (inner_D + expert_output(adapter, e, h_D))
        rows.append(y_D)
    return torch.stack(rows)


def sparmoe(adapter, h_TD: Tensor) -> Tensor:
    """Return h' of SparMoE as the paper writes it: the weighted sum of scaling path and bias path, without dropout."""
    rows = []
    for h_D in h_TD:
        p_E = (adapter.router_ED @ h_D).softmax(-1)
        y_D = torch.zeros_like(h_D)
        for e, p in enumerate(p_E):
            y_D = y_D + p * (h_D * adapter.scales_ED[e] + h_D + adapter.biases_ED[e])
        rows.append(y_D)
    return torch.stack(rows)


def expert_lora(adapter, gate_up_EFD, down_EDI, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the output of SwiGLU experts with a LoRA in each projection; ids of as many as there are are skipped."""
    scale = adapter.settings.lora_alpha / adapter.settings.r
    rows = []
    for h_D, ids_K, weights_K in zip(hidden_TD, ids_TK.tolist(), weights_TK, strict=True):
        y_D = torch.zeros_like(h_D)
        for e, weight in zip(ids_K, weights_K, strict=True):
            if e == len(gate_up_EFD):
                continue
            gate_up_FD = gate_up_EFD[e] + scale * adapter.gate_up_b_EFR[e] @ adapter.gate_up_a_ERD[e]
            down_DI = down_EDI[e] + scale * adapter.down_b_EDR[e] @ adapter.down_a_ERI[e]
            gate_I, up_I = (gate_up_FD @ h_D).chunk(2)
            y_D = y_D + weight * (down_DI @ (F.silu(gate_I) * up_I))
        rows.append(y_D)
    return torch.stack(rows)
