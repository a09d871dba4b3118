"""Sizes and random adapters for the tests of mixtures of LoRA at linear layers."""

from __future__ import annotations

import torch
from torch import nn

from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.passes import Frame, Pass

T, D, O, R, E = 13, 20, 28, 3, 5  # noqa: E741
SIZES = {"r": R, "lora_alpha": 7, "lora_dropout": 0.0}
MANY = {**SIZES, "num_experts": E}


def make(adapter_class, settings, *, random: bool = True, inputs: int = D, outputs: int = O, dtype=torch.float64):
    """Return an adapter, with what is zero at the start made random, and its shared parameters."""
    torch.manual_seed(0)
    shape = SiteShape(inputs=inputs, outputs=outputs)
    adapter = adapter_class(settings, shape, "model.layers.0.mlp.up_proj")
    shared = nn.Module()
    for name, size in adapter_class.shared_shapes(settings, shape).items():
        weight = torch.empty(size)
        adapter_class.reset_shared(settings, name, weight)
        shared.register_parameter(name, nn.Parameter(weight))
    adapter.shared = [shared.to(dtype)]
    if random:
        with torch.no_grad():
            for parameter in parameters(adapter).values():
                parameter.add_(0.4 * torch.randn_like(parameter))
    return adapter.to(dtype)


def parameters(adapter) -> dict[str, nn.Parameter]:
    return dict(adapter.named_parameters()) | dict(adapter.shared[0].named_parameters())


def run(adapter, x_TD):
    """Return an adapter's output and its route, if it has one."""
    frame = Frame(0, Pass())
    return adapter.delta(x_TD, frame), (frame.run.routes or [None])[0]


def gradients(output, adapter, x_TD):
    named = {"x": x_TD, **parameters(adapter)}
    torch.manual_seed(5)
    made = torch.autograd.grad(output, list(named.values()), torch.randn(output.shape).to(output.dtype))
    return dict(zip(named, made, strict=True))
