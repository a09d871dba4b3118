"""Upcycling: a dense model whose FFNs become experts that are copies of them, in a format that every engine knows.

    Sparse Upcycling, https://arxiv.org/abs/2212.05055
    Drop-Upcycling, https://arxiv.org/abs/2502.19261, section 3

    y = sum_{e in top_k} softmax_{top_k}(r_e x) FFN_e(x)       r drawn from N(0, 0.02^2)

All FFN_e begin as the dense FFN. The weights of the chosen sum to 1, so that y is what it was: the model that is
written is the dense model, and grows apart from it as it is trained. With ``upcycle.redrawn_fraction`` above 0 each
expert draws that share of its neurons anew, so that experts differ from the start and the model has to be trained
before it is of use: the same neurons of gate, up and down, each matrix from a normal distribution with the mean and the
deviation of the weights replaced in it.

Nothing is shared and no text is read. It is the peer that grows a model where the others cut it.
"""

# Shapes: T tokens, D model width, F neurons, E experts, K top_k, N neurons drawn anew, S modules stored

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modmoe.analysis.passes.by_layer import fits, free_bytes
from modmoe.analysis.source import Source, open_dense
from modmoe.conversion.steps import Draft, Steps
from modmoe.errors import RecipeError
from modmoe.formats.card.upcycled import write_upcycled_card
from modmoe.formats.native.plan import native_export
from modmoe.formats.proof.verify import verify
from modmoe.models.counts import count_sizes, tensor_parameters
from modmoe.models.ffn_layout import PLAIN, ROLES, dense_layout, plain_layout
from modmoe.models.inspection import inspect
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import Recipe
from modmoe.runtime.progress import Progress
from modmoe.storage.plan import Copy, Op, Plan, Shape, Take

LOG = logging.getLogger(__name__)

_ROUTER_STD = 0.02


@dataclass(frozen=True, slots=True, eq=False)
class Redrawn:
    """A source matrix with some of its rows or columns drawn anew, as ``N(mean, std)`` of what they replace."""

    name: str
    index_N: Tensor
    dim: int
    seed: int

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return (self.name,)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return the source's shape."""
        return shapes[self.name]

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the source's type."""
        return dtypes[self.name]

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the matrix; the same for the same seed."""
        matrix = source[self.name].detach().to("cpu")
        replaced = matrix.index_select(self.dim, self.index_N).float()
        std, mean = torch.std_mean(replaced, correction=0)
        drawn = torch.empty_like(replaced).normal_(generator=torch.Generator().manual_seed(self.seed))
        return matrix.index_copy(self.dim, self.index_N, drawn.mul_(std).add_(mean).to(matrix.dtype))


def check_counts(recipe: Recipe) -> tuple[int, int]:
    """Return the experts and how many of them are chosen; RecipeError where a router could not learn from them."""
    experts, top_k = recipe.assignment.num_experts or 0, recipe.router.top_k
    if top_k < 2:
        raise RecipeError(
            "router.top_k", "the one expert chosen would always weigh 1, and its router never learn", "choose 2 or more"
        )
    if top_k > experts:
        raise RecipeError("router.top_k", f"{top_k} is more than the {experts} experts there are")
    return experts, top_k


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """A dense source under which its experts are laid, and the plan of what is made of it."""

    source: Source
    plan: Plan
    target: str
    """The model type of the format."""
    shapes: dict[str, Shape]
    parameters_before: int
    size_bytes: int

    @property
    def model(self) -> OpenedModel:
        return self.source.model


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe; RecipeError for numbers of experts that cannot be.

    Of the recipe count ``assignment.num_experts``, ``router.top_k``, ``upcycle`` and ``seed``.
    """
    check_counts(recipe)
    return recipe


def open_upcyclable(recipe: Recipe, revision: str | None, progress: Progress, *, headers_only: bool) -> _Opened:
    """Open the dense source and plan the mixture of experts; nothing but headers is read."""
    source = open_dense(recipe, revision)
    before = sum(tensor_parameters(source.checkpoint).values())
    lay_out(recipe, source)
    export = native_export(source.checkpoint, take=partial(take, recipe, source), instead="")
    plan = export.plan
    plan.config["modmoe_method"] = "upcycle"
    shapes = plan.check(source.checkpoint)
    size_bytes = sum(tensor.size_bytes for tensor in plan.outputs(source.checkpoint).values())
    return _Opened(source, plan, export.target, shapes, before, size_bytes)


def make(recipe: Recipe, opened: _Opened, directory: Path, progress: Progress) -> Draft:
    """Return the draft; no more than a few tensors are in memory at a time, but for the proof.

    The proof compares with the dense model where experts are copies, else with the same experts made in memory. It is
    left out, with a warning, where the model would take over half of the memory that is free.
    """
    checkpoint = opened.source.checkpoint
    checkpoint.check_finite(partial(progress, "checking the source, bytes"))
    warnings: list[str] = []

    def finish(output: Path, result: dict[str, Any]) -> None:
        for line in warnings:
            LOG.warning("%s", line)
        result["parameters"]["dense"] = opened.parameters_before
        write_upcycled_card(output, result, checkpoint.directory, recipe.source)

    return Draft(
        plan=opened.plan,
        prove=lambda output: _verify(recipe, opened.source, output, warnings, progress),
        facts=_facts(recipe, opened, warnings),
        finish=finish,
    )


def describe(recipe: Recipe, opened: _Opened) -> dict[str, Any]:
    """Return what a run would make, from headers alone."""
    experts, top_k = check_counts(recipe)
    counts = count_sizes({name: torch.Size(shape).numel() for name, shape in opened.shapes.items()}, experts, top_k)
    return {
        "model_type": opened.target,
        "num_layers": opened.source.num_layers,
        "num_experts": experts,
        "top_k": top_k,
        **_facts(recipe, opened, []),
        "parameters": {"dense": opened.parameters_before, "stored": counts.stored, "active": counts.active},
        "bytes": opened.size_bytes,
        "tensors": len(opened.plan.ops),
    }


def _facts(recipe: Recipe, opened: _Opened, warnings: list[str]) -> dict[str, Any]:
    return {
        "method": "upcycle",
        "redrawn_fraction": recipe.upcycle.redrawn_fraction,
        "target": opened.target,
        "parameters_before": opened.parameters_before,
        "warnings": warnings,
    }


def lay_out(recipe: Recipe, source: Source) -> None:
    """Make the source look like a tied model with a module for each expert: all that differs is laid over it.

    Each expert's module is the whole FFN; ``take`` makes its neurons.
    """
    checkpoint, family = source.checkpoint, source.family
    experts, top_k = check_counts(recipe)
    dense = {key: checkpoint.config[key] for key in ("model_type", "architectures") if key in checkpoint.config}
    checkpoint.config = {
        **copy.deepcopy(checkpoint.config),
        "dense_config": dense,
        "num_experts": experts,
        "num_experts_per_tok": top_k,
        "combine": "sum",
        "module_size": source.neurons,
        "dense_intermediate_size": source.neurons,
        "ffn_biases": dense_layout(family, 0).biased_roles(checkpoint),
        "ffn_activation": source.settings[family.activation],
    }
    width = int(source.settings.get("hidden_size") or 0)
    for layer in range(source.num_layers):
        prefix = f"{family.layers}.{layer}."
        draw = torch.Generator().manual_seed(_seed(recipe, layer))
        router_ED = torch.empty(experts, width).normal_(std=_ROUTER_STD, generator=draw)
        dtype = checkpoint.dtype(dense_layout(family, layer).name("up"))
        checkpoint.add(
            {
                f"{prefix}{family.ffn}.router.weight": router_ED.to(dtype),
                f"{prefix}{family.ffn}.membership": torch.eye(experts, dtype=torch.bool),
            }
        )


def take(recipe: Recipe, source: Source, name: str, neurons: Tensor, dim: int) -> Op:
    """Return the op of an expert's matrix, where ``neurons`` are those of its module, else of any neurons."""
    expert, index = int(neurons[0]) // source.neurons, neurons % source.neurons
    if not torch.equal(index, torch.arange(source.neurons)):
        return Take(name, index, dim=dim)
    drawn = round(recipe.upcycle.redrawn_fraction * source.neurons)
    if not drawn:
        return Copy(name)
    layer = int(name.removeprefix(f"{source.family.layers}.").partition(".")[0])
    draw = torch.Generator().manual_seed(_seed(recipe, layer, expert))
    index_N = torch.randperm(source.neurons, generator=draw)[:drawn].sort().values
    stored = plain_layout(f"{source.family.layers}.{layer}.{source.family.ffn}.")
    role = ROLES.index(stored.role_of(name)) + 1
    return Redrawn(name, index_N, dim, _seed(recipe, layer, expert, role))


def _seed(recipe: Recipe, layer: int, expert: int = -1, role: int = 0) -> int:
    """Return a seed of its own for each matrix that is drawn."""
    return (((recipe.seed * 4096 + layer) * 4096 + expert + 1) * 4 + role) % 2**63


def _verify(
    recipe: Recipe, source: Source, directory: Path, warnings: list[str], progress: Progress
) -> dict[str, Any] | None:
    """Compare what was written with the model in memory; None, and a warning more, where it does not fit there."""
    numbers = inspect(str(directory))["parameters"]["stored"]
    dtype = source.checkpoint.dtype(dense_layout(source.family, 0).name("up"))
    size_bytes = numbers * torch.promote_types(dtype, torch.float32).itemsize
    if not fits(size_bytes, torch.device("cpu")):
        free = free_bytes(torch.device("cpu"))
        warnings.append(f"not verified: that takes {size_bytes / 5e8:.1f} GB of memory, and {free / 1e9:.1f} are free.")
        return None
    progress("verifying in a process of its own")

    def in_memory(dtype: torch.dtype) -> Any:
        model: Any = source.model.load(device="cpu", dtype=dtype)
        if recipe.upcycle.redrawn_fraction:
            for layer in range(source.num_layers):
                place = model.get_submodule(f"{source.family.layers}.{layer}")
                place.set_submodule(source.family.ffn, Mixture(recipe, source, layer, place).to(dtype))
        return model

    # the default way of computing experts is for GPUs
    return verify(in_memory, directory, options={"experts_implementation": "eager"})


class Mixture(nn.Module):
    """The experts of one layer, in the slow and obvious way."""

    router_ED: Tensor

    def __init__(self, recipe: Recipe, source: Source, layer: int, decoder: nn.Module) -> None:
        """Make them from the FFN of the dense model's decoder layer."""
        super().__init__()
        family, tensors = source.family, source.checkpoint
        stored, ffn = plain_layout(f"{family.layers}.{layer}.{family.ffn}."), decoder.get_submodule(family.ffn)
        self.top_k = recipe.router.top_k
        self.register_buffer("router_ED", tensors[f"{stored.prefix}router.weight"])
        experts = []
        for expert in range(check_counts(recipe)[0]):
            neurons = torch.arange(source.neurons) + expert * source.neurons
            made: Any = copy.deepcopy(ffn)
            for role in stored.roles:
                op = take(recipe, source, stored.name(role), neurons, stored.neuron_dim(role))
                with torch.no_grad():
                    made.get_submodule(PLAIN[role]).weight.copy_(op.make(tensors))
            experts.append(made)
        self.experts = nn.ModuleList(experts)

    def forward(self, x: Tensor) -> Tensor:
        """Return the weighted sum of the experts chosen for each token."""
        logits_TE = x.flatten(0, -2) @ self.router_ED.T
        high = torch.promote_types(x.dtype, torch.float32)
        chosen_TK, ids_TK = logits_TE.softmax(-1, dtype=high).topk(self.top_k)
        weights_TK = (chosen_TK / chosen_TK.sum(-1, keepdim=True)).to(x.dtype)
        weights_TE = torch.zeros_like(logits_TE).scatter_(1, ids_TK, weights_TK)
        y = torch.zeros_like(x)
        for expert, weight_T in zip(self.experts, weights_TE.T, strict=True):
            y = y + expert(x) * weight_T.view(*x.shape[:-1], 1)
        return y


STEPS = Steps(settle=settle, open=open_upcyclable, describe=describe, make=make)
"""Upcycling."""
