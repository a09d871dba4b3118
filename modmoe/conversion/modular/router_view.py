"""A look at a conversion's routers for its report: the checkpoint just written, run over a little text."""

# Shapes: E experts, M modules

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from modmoe.analysis.passes.by_layer import ByLayer, model_bytes, open_model
from modmoe.analysis.passes.by_layer import fits as has_room
from modmoe.analysis.routing import RoutingView, view_routing
from modmoe.analysis.run import Analysis
from modmoe.models.loading import pick_device
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import Recipe


def view_converted(
    recipe: Recipe, directory: Path, analysis: Analysis, members_EM: Sequence[Tensor], *, scratch: Path | None = None
) -> RoutingView:
    """Return what the routers of the tied checkpoint in ``directory`` do with text that calibration left unread.

    Where a task's file has no such text, it is the text of calibration; the view says so. The model runs as the dense
    one did, whole or layer by layer; ``scratch`` is where its hidden states lie in the latter case.
    """
    model = OpenedModel(directory, trust_remote_code=recipe.trust_remote_code)
    device = pick_device(recipe.device)
    by_layer = isinstance(analysis.runner, ByLayer) or not has_room(model_bytes(model.checkpoint), device)
    runner = open_model(model, analysis.source.family, by_layer=by_layer, device=device, scratch=scratch)
    texts = analysis.source.texts
    rows = {name: sum(len(batch.input_ids_BT) for batch in batches) for name, batches in analysis.batches.items()}
    # clusters of one task's sequences are that task's
    read = {name: rows.get(name, sum(rows.values())) for name in texts}
    return view_routing(runner, texts, analysis.tokenizer, analysis.ffns, members_EM, read=read, seed=recipe.seed)
