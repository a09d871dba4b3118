"""LLaMA-MoE: neurons dealt out to experts, which a router that begins with nothing known weighs.

LLaMA-MoE, https://arxiv.org/abs/2406.16554, sections 3 and 4; their released models have the random split

    experts = neurons in equal parts                        independent, by ``partition.method``
    y = E / k * sum_{e in top_k} softmax_e(s(x)) E_e(x),    s(x) = W2 tanh(W1 x)

What differs    published                               here
W1, W2          drawn, tanh                             drawn, ReLU: a tied model's router has no other
E / k           on the sum                              in the down projection, so all modules on are E / k dense FFNs
noise of s(x)   while training                          left out
random          neurons in random order                 ``partition.method`` random, the default
clusters        k-means of up or gate rows              ``partition.method`` kmeans: gate rows
gradient        neurons to experts by what gradients    ``partition.method`` gradient; see there
                over clusters of text say
sharing-inner   each cluster's own best neurons, of     left out: experts overlap by single neurons, while a split has
                which several have the same             each neuron in one. ``method`` modular is that construction
                                                        where modules are single neurons (``num_modules``), experts
                                                        clusters (``num_experts``), and ``score`` is taylor; only E / k
                                                        and the router differ
sharing-inter   the same beside a part that all have:   the same with ``shared_modules``, there the neurons of the
                neurons that most clusters want         highest mean score rather than those wanted by most
num_experts     8 or 16, 2 or 4 of them chosen          ``num_modules``, and ``active_fraction`` of them
"""

# Shapes: D model width, F neurons, E experts, H hidden width

from __future__ import annotations

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.conversion.modular.from_outputs import single_modules
from modmoe.conversion.modular.layerwise import FitOptions, LayerFit, Rows
from modmoe.conversion.modular.routers import RouterStart
from modmoe.models.ffn_layout import FFNWeights


def split_llama_moe(rows: Rows, partition: Partition, weights: FFNWeights, options: FitOptions) -> LayerFit:
    """Return an expert for each module of the partition, a router drawn at random and ``down`` times E / k.

    See ``SplitLayer``.
    """
    experts = partition.num_modules
    draw = torch.Generator().manual_seed(options.seed)

    def linear(outputs: int, inputs: int) -> Tensor:
        return torch.empty(outputs, inputs).uniform_(-(inputs**-0.5), inputs**-0.5, generator=draw)

    start = RouterStart(hidden_HD=linear(experts, rows.x_ND.shape[1]), output_EH=linear(experts, experts))
    down_DF = weights.down_DF.detach().float().cpu() * (experts / options.router.top_k)
    return LayerFit(single_modules(torch.arange(experts), 0), start, down_DF)
