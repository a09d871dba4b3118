"""A report with all its parts, made once from a tiny model, for the tests of what it says and of how it behaves."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modmoe.analysis.routing import RoutedText, RoutingView
from modmoe.analysis.run import Analysis, analyze_source
from modmoe.analysis.source import open_source
from modmoe.conversion.modular.steps import make_assignments
from modmoe.recipe.schema import Recipe, make_recipe
from modmoe.reports.report import write_report
from modmoe.runtime.progress import silent
from tests.support import tiny

NASTY = "<script>alert('x')</script>&\"]]>"

# made once in a run of the tests, by whichever file asks first
_ANALYSED: list[tuple[Recipe, Analysis]] = []
_WRITTEN: list[Path] = []


def analysed(factory: pytest.TempPathFactory) -> tuple[Recipe, Analysis]:
    """Return the analysis of a tiny model with three tasks."""
    if _ANALYSED:
        return _ANALYSED[0]
    folder = factory.mktemp("report")
    dense = tiny.save_dense(folder / "dense")
    recipe = make_recipe(
        {
            "source": str(dense),
            "tasks": tiny.write_tasks(folder / "tasks"),
            "calibration.tokens": 400,
            "calibration.sequence_length": 32,
            "partition.num_modules": 8,
        }
    )
    _ANALYSED.append((recipe, analyze_source(recipe, open_source(recipe), silent)))
    return _ANALYSED[0]


def full_report(factory: pytest.TempPathFactory) -> Path:
    """Return the path of a report with all that it can have, its names as nasty as can be."""
    if _WRITTEN:
        return _WRITTEN[0]
    recipe, analysis = analysed(factory)
    named = [
        SimpleNamespace(membership_EM=item.membership_EM, expert_names=(NASTY, "計算", "c"))
        for item in make_assignments(recipe, analysis)
    ]
    path = factory.mktemp("full") / "deep" / "report.html"
    write_report(
        path,
        recipe,
        analysis,
        assignments=named,
        summary=summary(),
        evaluation={NASTY: {"sums": 2.0, NASTY: 1.0}, "fine-tuned": {"sums": {"loss": 1.5}}},
        samples={NASTY: {"prompt": NASTY, NASTY: "one\ntwo"}},
        routing=routed_view(list(analysis.batches)),
    )
    _WRITTEN.append(path)
    return path


def summary() -> dict[str, Any]:
    """Return what a conversion tells of itself."""
    return {
        "output": NASTY,
        "parameters": {"dense": 1000, "stored": 900, "active": 700, "materialised": 1500},
        "sparsity": {"ffn": 0.5, "total": 0.3},
        "tensor_bytes": 3600,
        "routers": [{"agreement": 0.7, "chance": 0.4}] * 2,
    }


def routed_view(tasks: list[str], chosen: int = 1, layers: int = 2, experts: int = 3) -> RoutingView:
    """Return a view of routers that choose at random, whose text is nasty."""
    draw = torch.Generator().manual_seed(0)
    choices = torch.rand(layers, len(tasks), experts, generator=draw)
    pieces = (NASTY, "", "two", *"words\n")
    ids_LTK = torch.rand(layers, len(pieces), experts, generator=draw).topk(chosen).indices
    return RoutingView(
        tasks=tuple(tasks),
        tokens_P=tuple(range(100, 100 + len(tasks))),
        is_held_out=True,
        chosen_LPE=choices / choices.sum(2, keepdim=True),
        used_LPM=torch.rand(layers, len(tasks), 8, generator=draw),
        certainty_L=torch.tensor([0.25, 0.75]),
        balance_L=torch.tensor([0.9, 1.0]),
        sparsity_LQ=torch.tensor([[0.75, 0.5], [0.75, 0.5]]),
        kept_LQ=torch.tensor([[0.4, 0.625], [0.5, 0.875]]),
        samples=tuple(RoutedText(task=task, pieces=pieces, ids_LTK=ids_LTK) for task in tasks),
    )
