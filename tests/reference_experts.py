"""What experts are measured by, and what is left of them, one token and one expert at a time: slow and plain."""

# Shapes: T tokens, D model width, E experts

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def expert_output(block: Any, expert: int, x_D: Tensor) -> Tensor:
    """down (silu(gate x) * (up x))"""
    gate_D, up_D = (block.experts.gate_up_proj[expert] @ x_D).chunk(2)
    return block.experts.down_proj[expert] @ (F.silu(gate_D) * up_D)


def route(block: Any, x_D: Tensor, allowed: Sequence[int]) -> list[tuple[int, float]]:
    """The chosen experts and their weights; a softmax over the allowed ones, or sigmoids with a bias in the choice."""
    if hasattr(block.gate, "e_score_correction_bias"):
        probs = {expert: torch.sigmoid(block.gate.weight[expert] @ x_D).item() for expert in allowed}
        biased = {expert: prob + block.gate.e_score_correction_bias[expert].item() for expert, prob in probs.items()}
        chosen = sorted(allowed, key=lambda expert: -biased[expert])[: block.gate.top_k]
        divisor = sum(probs[expert] for expert in chosen) if block.gate.norm_topk_prob else 1.0
        return [(expert, block.gate.routed_scaling_factor * probs[expert] / divisor) for expert in chosen]
    logits = {expert: block.gate.weight[expert] @ x_D for expert in allowed}
    total = sum(logit.exp() for logit in logits.values())
    probs = {expert: (logit.exp() / total).item() for expert, logit in logits.items()}
    chosen = sorted(probs, key=lambda expert: -probs[expert])[: block.gate.top_k]
    # Mixtral always divides by the sum, and has no word for it
    divisor = sum(probs[expert] for expert in chosen) if getattr(block.gate, "norm_topk_prob", True) else 1.0
    return [(expert, probs[expert] / divisor) for expert in chosen]


def block_inputs(model: Any, layer: int, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The input of a layer's block for each token, each sequence run alone and unpadded."""
    rows: list[Tensor] = []
    hook = model.model.layers[layer].mlp.register_forward_pre_hook(lambda _, args: rows.extend(args[0][0]))
    with torch.no_grad():
        for sequence in sequences:
            model(torch.tensor([sequence]), use_cache=False)
    hook.remove()
    return rows


@torch.no_grad()
def measure(model: Any, layer: int, sequences: Sequence[Sequence[int]]) -> dict[str, Any]:
    """For each expert: the gates and the output norms of its tokens, and its mean output over all tokens."""
    block = model.model.layers[layer].mlp
    experts = range(len(block.gate.weight))
    gates: list[list[float]] = [[] for _ in experts]
    norms: list[list[float]] = [[] for _ in experts]
    rows = block_inputs(model, layer, sequences)
    for x_D in rows:
        for expert, gate in route(block, x_D, experts):
            gates[expert].append(gate)
            norms[expert].append(expert_output(block, expert, x_D).norm().item())
    means = [sum(expert_output(block, expert, x_D) for x_D in rows) / len(rows) for expert in experts]
    return {"gates": gates, "norms": norms, "means": means}


def score(name: str, gates: list[float], norms: list[float]) -> float:
    """One expert's score."""
    count = len(norms)
    return {
        "reap": sum(g * n for g, n in zip(gates, norms, strict=True)) / max(count, 1),
        "frequency": float(count),
        "activation": sum(norms) / max(count, 1),
        "msan": sum(n * n for n in norms) / max(count, 1),
        "contribution": sum(g * n for g, n in zip(gates, norms, strict=True)),
    }[name]


def clusters(means: Sequence[Tensor], number: int) -> list[list[int]]:
    """Average linkage: join the two clusters whose members lie nearest on average, until so many are left."""
    left = [[expert] for expert in range(len(means))]

    def distance(a: list[int], b: list[int]) -> float:
        return sum((means[i] - means[j]).norm().item() for i in a for j in b) / (len(a) * len(b))

    while len(left) > number:
        a, b = min(
            ((a, b) for a in range(len(left)) for b in range(a)),
            key=lambda pair: distance(left[pair[0]], left[pair[1]]),
        )
        left[b] = sorted(left[a] + left[b])
        del left[a]
    return sorted(left)


class LimitedBlock(torch.nn.Module):
    """A block in which only some experts can be chosen, each with the weights given: nothing is renumbered."""

    def __init__(self, block: Any, weights: dict[int, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.block, self.weights = block, weights

    def forward(self, x_BTD: Tensor) -> Tensor:
        output_BTD = torch.zeros_like(x_BTD)
        for row, tokens in enumerate(x_BTD):
            for place, x_D in enumerate(tokens):
                for expert, gate in route(self.block, x_D, sorted(self.weights)):
                    gate_up, down = self.weights[expert]
                    gate_F, up_F = (gate_up @ x_D).chunk(2)
                    output_BTD[row, place] += gate * (down @ (F.silu(gate_F) * up_F))
        if hasattr(self.block, "shared_experts"):
            output_BTD += self.block.shared_experts(x_BTD)
        if hasattr(self.block, "shared_expert"):
            shared_BTD = self.block.shared_expert(x_BTD)
            output_BTD += torch.sigmoid(self.block.shared_expert_gate(x_BTD)) * shared_BTD
        return output_BTD


@torch.no_grad()
def limit(model: Any, groups: dict[int, dict[int, dict[int, float]]], top_k: int) -> Any:
    """Leave, layer by layer, only some experts: the number of each, and the experts and shares that it is made of."""
    for layer, rows in groups.items():
        block = model.model.layers[layer].mlp
        block.gate.top_k = top_k
        weights = {
            row: tuple(
                sum(share * tensor[expert] for expert, share in shares.items())
                for tensor in (block.experts.gate_up_proj, block.experts.down_proj)
            )
            for row, shares in rows.items()
        }
        for tensor in (*block.gate.parameters(), *block.gate.buffers()):
            blended = {row: sum(share * tensor[expert] for expert, share in own.items()) for row, own in rows.items()}
            for row, value in blended.items():
                tensor[row] = value
        model.model.layers[layer].mlp = LimitedBlock(block, weights)
    return model
