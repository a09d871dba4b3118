"""EMoE: neurons of like keys are an expert, and an expert's mean key is its row of the router.

EMoE, https://arxiv.org/abs/2310.10908, section 3

    experts = balanced k-means of the key rows, each of unit length
    s_e(x) = mean_{i in e} k_i . x         avg-k gating; k_i is the gate row of a neuron, or its up row without a gate
    y = sum of the top_k experts, each with weight 1

The published router has no parameters. Here the means are kept as its rows, and fine-tuning may move them away from the
keys.

What differs      published                               here
layers            some of the upper half                  all
bias of keys      part of s_e(x) in models that have one  left out: a router has no intercept
bias behind down  divided by top_k                        added once, as in the dense model
clusters          k-means-constrained                     ``partition.method``, by default this package's kmeans
num_experts       64, a quarter or half of them chosen    ``num_modules``, and ``active_fraction`` of them
"""

# Shapes: D model width, F neurons, E experts

from __future__ import annotations

import torch
from torch import Tensor

from modmoe.analysis.modules import Partition
from modmoe.conversion.modular.from_outputs import single_modules
from modmoe.conversion.modular.layerwise import FitOptions, LayerFit, Rows
from modmoe.conversion.modular.routers import RouterStart
from modmoe.models.ffn_layout import FFNWeights


def mean_keys(key_FD: Tensor, partition: Partition) -> Tensor:
    """Return the mean key of each module, float32."""
    mean_ED = torch.zeros(partition.num_modules, key_FD.shape[1])
    mean_ED.index_add_(0, partition.module_F, key_FD.detach().float().cpu())
    return mean_ED / partition.module_size


def split_emoe(rows: Rows, partition: Partition, weights: FFNWeights, options: FitOptions) -> LayerFit:
    """Return an expert for each module of the partition, chosen by its mean key. See ``SplitLayer``."""
    start = RouterStart(weight_ED=mean_keys(weights.key_FD, partition))
    return LayerFit(single_modules(torch.arange(partition.num_modules), 0), start)
