"""Tiny tied models of every family, written to disk through the real plan with random modules, experts and routers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from modmoe.analyze.partition import Partition
from modmoe.checkpoint import Checkpoint, CheckpointWriter, copy_companions
from modmoe.convert.assignment import Assignment
from modmoe.convert.code import write_code
from modmoe.convert.modular import modular_plan
from modmoe.convert.routers import RouterStart
from modmoe.families import FAMILIES
from modmoe.loading import dense_classes, load
from modmoe.recipe import make_recipe
from tests.tiny import NEURONS, dense_config, save_dense

NUM_MODULES = 8
EXPERTS = ("sums", "words", "code")


def write_tied(
    directory: Path,
    model_type: str = "llama",
    *,
    seed: int = 0,
    means: bool = False,
    leave_out: bool = False,
    changes: dict[str, Any] | None = None,
    **router: Any,
) -> tuple[Path, Path]:
    """Write a dense model and a tied one made of it; return both directories.

    Every module is in some expert, but with ``leave_out`` no expert has the last one, so that it is not stored.
    ``changes`` go to the dense configuration, and ``router`` holds keys such as ``routing`` and ``top_k``.
    """
    dense = save_dense(directory / "dense", model_type, **(changes or {}))
    source = Checkpoint(dense)
    family = FAMILIES[model_type]
    settings = {**dense_config(model_type, **(changes or {})).to_dict(), **source.config}
    source.add_prefix(family.layers)
    draw = torch.Generator().manual_seed(seed)
    keys = {f"router.{key}": value for key, value in router.items()}
    recipe = make_recipe({"partition.num_modules": NUM_MODULES, "router.compensation": means, **keys})
    partitions, assignments, starts = [], [], []
    for _ in range(2):
        module_F = torch.arange(NEURONS) % NUM_MODULES
        partitions.append(Partition(module_F[torch.randperm(NEURONS, generator=draw)], NUM_MODULES))
        assignments.append(Assignment(_membership(leave_out, draw), EXPERTS))
        starts.append(_start(recipe.router.kind, recipe.router.routing, means, draw))
    classes = dense_classes(dense, trust_remote_code=False)
    plan = modular_plan(source, family, recipe, partitions, assignments, starts, classes, settings)
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


def _start(kind: str, routing: str, means: bool, draw: torch.Generator) -> RouterStart:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw)

    has_router = routing != "task"
    return RouterStart(
        weight_ED=normal(len(EXPERTS), 32) if has_router and kind == "linear" else None,
        hidden_HD=normal(16, 32) if has_router and kind == "mlp" else None,
        output_EH=normal(len(EXPERTS), 16) if has_router and kind == "mlp" else None,
        means_MD=normal(NUM_MODULES, 32) if means else None,
    )
