"""Tiny tied models of every family, written to disk through the real plan with random modules, experts and routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modmoe.analysis.partitions.table import Partition
from modmoe.analysis.source import Source
from modmoe.conversion.modular.assignment import Assignment
from modmoe.conversion.modular.layerwise import LayerFit
from modmoe.conversion.modular.plan import modular_plan
from modmoe.conversion.modular.routers import RouterStart
from modmoe.formats.tied_code import write_code
from modmoe.models.families import FAMILIES, layers_of, neurons_of
from modmoe.models.loading import load
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import make_recipe
from modmoe.storage.checkpoint import CheckpointWriter, copy_companions
from tests.support.tiny import dense_config, save_dense

NUM_MODULES = 8
EXPERTS = ("sums", "words", "code")


def write_tied(
    directory: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    means: bool = False,
    leave_out: bool = False,
    members_EM: torch.Tensor | None = None,
    dense: Path | None = None,
    changes: dict[str, Any] | None = None,
    **router: Any,
) -> tuple[Path, Path]:
    """Write a dense model and a tied one made of it; return both directories.

    Every module is in some expert, but with ``leave_out`` no expert has the last one, so that it is not stored; or
    ``members_EM`` says which modules each expert has, in every layer. ``dense`` is a model to take in place of the tiny
    one.
    ``changes`` go to the dense configuration, and ``router`` holds keys such as ``routing`` and ``top_k``.
    """
    defaults = {} if dense else dense_config(model_type, **(changes or {})).to_dict()
    dense = dense or save_dense(directory / "dense", model_type, **(changes or {}))
    model, family = OpenedModel(dense), FAMILIES[model_type]
    source, settings = model.checkpoint, {**defaults, **model.checkpoint.config}
    num_modules = NUM_MODULES if members_EM is None else members_EM.shape[1]
    source.add_prefix(family.layers)
    draw = torch.Generator().manual_seed(seed)
    keys = {f"router.{key}": value for key, value in router.items()}
    recipe = make_recipe({"partition.num_modules": num_modules, "router.compensation": means, **keys})
    partitions, assignments, starts = [], [], []
    neurons, width = neurons_of(settings, family), int(settings.get("hidden_size", 32))
    for _ in range(layers_of(settings)):
        module_F = torch.arange(neurons) % num_modules
        partitions.append(Partition(module_F[torch.randperm(neurons, generator=draw)], num_modules))
        drawn_EM = _membership(leave_out, draw) if members_EM is None else members_EM
        names = EXPERTS if members_EM is None else tuple(f"expert{number}" for number in range(len(members_EM)))
        assignments.append(Assignment(drawn_EM, names))
        starts.append(_start(len(drawn_EM), width, recipe.router.kind, recipe.router.routing, means, draw))
    opened = Source(model, family, layers_of(settings), neurons)
    fits = [LayerFit(assignment, start) for assignment, start in zip(assignments, starts, strict=True)]
    plan = modular_plan(
        opened, recipe.router, partitions, fits, shared_modules=recipe.assignment.shared_modules, method=recipe.method
    )
    plan.check(source)
    tied = directory / "tied"
    tied.mkdir()
    writer = CheckpointWriter(tied)
    plan.run(source, writer)
    writer.finish(plan.config)
    copy_companions(dense, tied)
    write_code(tied, plan.config, dense)
    return dense, tied


def load_pair(directory: Path, model_type: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """Write and load a dense model and a tied one made of it, both in float64."""
    dense, tied = write_tied(directory, model_type, **settings)
    return load(dense, dtype=torch.float64), load(tied, dtype=torch.float64)


def _membership(leave_out: bool, draw: torch.Generator) -> torch.Tensor:
    choices = NUM_MODULES - 1 if leave_out else NUM_MODULES
    while True:
        membership_EM = torch.zeros(len(EXPERTS), NUM_MODULES, dtype=torch.bool)
        for expert in range(len(EXPERTS)):
            membership_EM[expert, torch.randperm(choices, generator=draw)[: NUM_MODULES // 2]] = True
        if membership_EM[:, :choices].any(0).all():
            return membership_EM


def _start(experts: int, width: int, kind: str, routing: str, means: bool, draw: torch.Generator) -> RouterStart:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    has_router = routing != "task"
    return RouterStart(
        weight_ED=normal(experts, width) if has_router and kind == "linear" else None,
        hidden_HD=normal(16, width) if has_router and kind == "mlp" else None,
        output_EH=normal(experts, 16) if has_router and kind == "mlp" else None,
        means_MD=normal(NUM_MODULES, width) if means else None,
    )
