"""The loop that anyone can read: what the tied FFN means, token by token and module by module."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Shapes: T tokens, D model width, S stored modules, E experts, K top_k


def module_outputs(ffn, x_D: Tensor) -> list[Tensor]:
    """Return the output F_j(x) of each stored module for one token, without the bias behind ``down``."""
    outputs = []
    for module in range(ffn.stored_modules):
        rows = slice(module * ffn.module_size, (module + 1) * ffn.module_size)

        def project(linear, rows=rows):
            bias = None if linear.bias is None else linear.bias[rows]
            return F.linear(x_D, linear.weight[rows], bias)

        up = project(ffn.up_proj)
        hidden = ffn.act_fn(project(ffn.gate_proj)) * up if ffn.gated else ffn.act_fn(up)
        outputs.append(ffn.down_proj.weight[:, rows] @ hidden)
    return outputs


def modules_of(ffn, expert: int) -> list[int]:
    """Return the modules of an expert that count: all that it has, or its best where it is cut."""
    held = [module for module in range(ffn.stored_modules) if ffn.membership[expert, module]]
    best = [module for module in ffn.ranking[expert].tolist() if module in held]
    return held if ffn.state.active_modules is None else best[: ffn.state.active_modules]


def tied_ffn(ffn, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the layer's output for the experts chosen: every module at most once a token.

    ``union``: a module counts as it is if any chosen expert has it; its gradient to the weights is that of the
    logarithm of their sum. ``sum`` with several experts: it counts with the sum of the weights of those that have it.
    """
    rows = []
    for x_D, ids_K, weights_K in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y_D = torch.zeros_like(x_D) if ffn.down_proj.bias is None else ffn.down_proj.bias.clone()
        for module, output_D in enumerate(module_outputs(ffn, x_D)):
            having = [k for k, expert in enumerate(ids_K) if module in modules_of(ffn, expert)]
            if not having:
                if ffn.means is not None:
                    y_D = y_D + ffn.means[module]
                continue
            weight = sum(weights_K[k] for k in having)
            if not (ffn.combine == "sum" and len(ids_K) > 1):
                weight = weight / weight.detach()
            y_D = y_D + weight * output_D
        if ffn.means is not None and ffn.left_out_means:
            y_D = y_D + ffn.means[-1]
        rows.append(y_D)
    return torch.stack(rows)
