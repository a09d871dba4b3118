"""What the routed experts of a mixture of experts do on calibration text: how often, how strongly, and what they say.

The text runs through the whole model once. At each block its own router is asked again and its own experts compute
each (token, expert) pair with weight 1, so that an output is what the architecture makes of it, whatever that is.
"""

# Shapes: T tokens that are not padding, D model width, E experts, K top_k, X pairs of a token and an expert of it

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from modmoe.analysis.passes.stream import Turn, WholeModel
from modmoe.analysis.text.calibration import Batch
from modmoe.models.families import Family
from modmoe.runtime import ranks

LAYERS, BLOCK = "model.layers", "mlp"
"""Where a model of transformers 5 in memory has its decoder layers and, in each, its MoE block."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertStats:
    """Sums over the tokens of one layer, float64; padding is not among them."""

    tokens: Tensor
    """Tokens seen; a scalar."""
    count_E: Tensor
    """Tokens routed to each expert."""
    norm_E: Tensor
    """Sum of |f_e(x)| over the tokens routed to e."""
    square_E: Tensor
    """Sum of |f_e(x)|^2 over the tokens routed to e."""
    weighted_E: Tensor
    """Sum of g_e(x) |f_e(x)| over the tokens routed to e; g is what multiplies the expert's output."""
    output_ED: Tensor | None
    """Sum of f_e(x) over all tokens, routed to e or not; None where it was not asked for."""


def moe_blocks(model: nn.Module) -> dict[int, Any]:
    """Return the MoE blocks of a model by decoder layer; dense layers have none."""
    layers = model.get_submodule(LAYERS).children()
    blocks = {number: getattr(layer, BLOCK, None) for number, layer in enumerate(layers)}
    return {number: block for number, block in blocks.items() if hasattr(block, "experts") and hasattr(block, "gate")}


@torch.no_grad()
def measure_experts(
    model: Any,
    batches: Mapping[str, Sequence[Batch]],
    *,
    outputs: bool = False,
    progress: Callable[[int], None] | None = None,
) -> dict[int, ExpertStats]:
    """Run the tasks' text through a model in memory and return the sums of each MoE layer; the model is left as it was.

    Of several processes each runs its share of the batches, and all return the sums of all. With ``outputs`` every
    expert computes every token, which costs E / K times as much. ``progress`` is called with tokens that are done.
    """
    blocks = moe_blocks(model)
    # each batch's sums become steps, which add to the same bits on any number of processes
    steps: dict[int, dict[str, Tensor]] = {layer: {} for layer in blocks}

    def watch(layer: int, x_BTD: Tensor, turn: Turn) -> None:
        if layer in blocks:
            for field, sums_X in _measure(blocks[layer], turn.real_rows(x_BTD), outputs).items():
                steps[layer][field] = steps[layer].get(field, 0) + ranks.in_steps(sums_X.cpu())

    family = Family(model_type=model.config.model_type, layers=LAYERS, ffn=BLOCK)
    WholeModel(model, family).run(batches, on_input=watch, progress=progress)
    totals = {
        layer: {field: ranks.from_steps(ranks.add_up(s)) for field, s in own.items()} for layer, own in steps.items()
    }
    return {layer: _stats(sums) for layer, sums in totals.items()}


def _stats(sums: Mapping[str, Tensor]) -> ExpertStats:
    return ExpertStats(output_ED=sums.get("output_ED"), **{name: sums[name] for name in sums if name != "output_ED"})


def _measure(block: Any, x_TD: Tensor, outputs: bool) -> dict[str, Tensor]:
    """Return the sums of ExpertStats over some tokens."""
    experts = block.gate.weight.shape[0]
    _, weights_TK, index_TK = block.gate(x_TD)
    tokens, top_k = index_TK.shape
    index_X = index_TK.reshape(-1)
    norm_X = _compute(block, x_TD.repeat_interleave(top_k, 0), index_X).double().norm(dim=1)

    def over_experts(value_X: Tensor) -> Tensor:
        return torch.zeros(experts, dtype=torch.float64, device=norm_X.device).index_add_(0, index_X, value_X)

    sums = {
        "tokens": torch.tensor(float(tokens), dtype=torch.float64),
        "count_E": over_experts(torch.ones_like(norm_X)),
        "norm_E": over_experts(norm_X),
        "square_E": over_experts(norm_X.square()),
        "weighted_E": over_experts(weights_TK.reshape(-1).double() * norm_X),
    }
    if outputs:
        # one expert after the other: all at once would be E copies of the tokens
        index_TE = torch.arange(experts, device=x_TD.device).expand(tokens, experts)
        each = [_compute(block, x_TD, index_T).sum(0, dtype=torch.float64) for index_T in index_TE.unbind(1)]
        sums["output_ED"] = torch.stack(each)
    return sums


def _compute(block: Any, x_XD: Tensor, expert_X: Tensor) -> Tensor:
    """Return f_e(x) for each row and its expert."""
    output_XD: Tensor = block.experts(x_XD, expert_X.unsqueeze(1), torch.ones_like(x_XD[:, :1]))
    return output_XD
