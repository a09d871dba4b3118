"""The loop that anyone can read: MixLoRA token by token, each chosen expert a whole FFN with weights of its own."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: T tokens, D model width, F neurons, E experts, K top_k


def lora(adapter, name: str, x: Tensor, expert: int | None = None) -> Tensor:
    """Return alpha / r B A x of one expert, or of an attention projection."""
    parts = dict(adapter.named_parameters())
    if expert is None:
        a, b = parts[f"{name}_a_RD"], parts[f"{name}_b_OR"]
    else:
        a = next(value for key, value in parts.items() if key.startswith(f"{name}_a_"))[expert]
        b = next(value for key, value in parts.items() if key.startswith(f"{name}_b_"))[:, expert]
    return adapter.settings.lora_alpha / adapter.settings.r * (b @ (a @ x))


def choices(adapter, x_D: Tensor) -> list[tuple[int, Tensor]]:
    """Return the experts of one token and their weights: the likeliest, renormalised."""
    probs_E = F.softmax(adapter.router_ED @ x_D, dim=-1)
    kept_K, ids_K = probs_E.topk(adapter.settings.top_k)
    weights_K = kept_K / kept_K.sum()
    return list(zip(ids_K.tolist(), weights_K, strict=True))


def ffn(adapter, mlp, x_TD: Tensor) -> Tensor:
    """Return the FFN's output with the experts in its place: each expert's three projections in full."""
    rows = []
    for x_D in x_TD:
        y_D = torch.zeros_like(x_D)
        for expert, weight in choices(adapter, x_D):
            gate_F = mlp.gate_proj(x_D) + lora(adapter, "gate", x_D, expert)
            up_F = mlp.up_proj(x_D) + lora(adapter, "up", x_D, expert)
            hidden_F = mlp.act_fn(gate_F) * up_F
            y_D = y_D + weight * (mlp.down_proj(hidden_F) + lora(adapter, "down", hidden_F, expert))
        rows.append(y_D)
    return torch.stack(rows)


def linear(adapter, name: str, layer, x_TD: Tensor) -> Tensor:
    """Return an attention projection's output with its plain LoRA."""
    return torch.stack([layer(x_D) + lora(adapter, name, x_D) for x_D in x_TD])
