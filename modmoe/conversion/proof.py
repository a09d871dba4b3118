"""The proof of a conversion: with all modules on, the checkpoint that was written is the dense model."""

# Shapes: B sequences, T tokens, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.passes.by_layer import ByLayer, model_bytes, open_model
from modmoe.analysis.passes.by_layer import fits as has_room
from modmoe.analysis.passes.stream import Turn, Watch
from modmoe.analysis.run import Analysis
from modmoe.analysis.text.calibration import Batch
from modmoe.conversion.modular.layerwise import LayerFit
from modmoe.conversion.modular.plan import neuron_order
from modmoe.errors import PlanError
from modmoe.models.ffn_layout import dense_layout
from modmoe.models.opened import OpenedModel
from modmoe.runtime.progress import silent

# above this many parameters the proof runs in float32: a float64 copy of two models would not fit beside them
_FLOAT64_PARAMETERS = 200_000_000
# of the largest logit. Norms and rotary positions of most models compute in float32 whatever the model's type, where a
# difference in the last bit of float64 may become one of float32
_FLOAT64_LIMIT, _FLOAT32_LIMIT = 1e-5, 1e-3


def verify_all_on(
    directory: Path,
    analysis: Analysis,
    fits: Sequence[LayerFit],
    *,
    report: Callable[[int, int], None] = silent,
) -> dict[str, Any]:
    """Compare the checkpoint just written, all modules on, with the dense model; PlanError where they differ.

    Where modules were left out, their neurons are silent in the dense model for the comparison, and where ``down`` was
    fitted anew, it has that one. Both run layer by layer where the analysis did, or where a copy in the precision of
    the comparison would not fit. ``report`` is called with the models run and the models in all.
    """
    source, family = analysis.source.checkpoint, analysis.source.family
    unused = [
        neuron_order(partition, (~fit.assignment.used_M).nonzero().squeeze(-1))
        for partition, fit in zip(analysis.partitions, fits, strict=True)
    ]

    def without(layer: int, hidden: Tensor, _: Turn) -> Tensor:
        return hidden.index_fill(-1, unused[layer], 0)

    def repaired(layer: int, hidden: Tensor, _: Turn) -> Tensor:
        # as it was rounded when it was written
        dtype, ffn = source.dtype(dense_layout(family, layer).name("down")), analysis.ffns[layer]
        refitted_DF = fits[layer].down_DF
        down_DF = ffn.down_DF if refitted_DF is None else refitted_DF.to(dtype)
        y = hidden @ down_DF.to(hidden).T
        return y if ffn.down_bias_D is None else y + ffn.down_bias_D.to(hidden)

    difference, facts = compare_logits(
        directory,
        analysis,
        on_hidden=without,
        on_down=None if fits[0].down_DF is None else repaired,
        what="all modules on",
        report=report,
    )
    left_out = sum(int((~fit.assignment.used_M).sum()) for fit in fits)
    return {"max_abs_logit_diff_all_on": difference, "modules_left_out": left_out, **facts}


def compare_logits(
    directory: Path,
    analysis: Analysis,
    *,
    on_hidden: Watch,
    on_down: Watch | None,
    what: str,
    report: Callable[[int, int], None] = silent,
) -> tuple[float, dict[str, Any]]:
    """Return how far a checkpoint's logits are from those of the dense model with its FFNs changed by the watches.

    A tied checkpoint has all its modules on. PlanError, with ``what`` the two have, where they differ by more than
    rounding. Beside it are the ``dtype`` they ran in and the ``max_abs_logit``.
    """
    source, family, device = analysis.source.model, analysis.source.family, torch.device("cpu")
    small = sum(parameter.numel() for parameter in analysis.runner.model.parameters()) <= _FLOAT64_PARAMETERS
    dtype = torch.float64 if small else torch.float32
    batch = next(iter(analysis.batches.values()))[0]
    rows = Batch(batch.input_ids_BT[:2], batch.attention_mask_BT[:2])
    options: dict[str, Any] = {
        "by_layer": isinstance(analysis.runner, ByLayer) or not has_room(model_bytes(source.checkpoint, dtype), device),
        "device": device,
        "scratch": directory,
        "dtype": dtype,
    }
    report(0, 2)
    written: Any = open_model(OpenedModel(directory, trust_remote_code=source.trust_remote_code), family, **options)
    with getattr(written.model, "all_modules", nullcontext)():
        logits_BTV = written.logits(rows)
    del written
    report(1, 2)
    dense_BTV = open_model(source, family, **options).logits(rows, on_hidden=on_hidden, on_down=on_down)
    report(2, 2)
    is_real_BT = rows.attention_mask_BT.bool()
    difference = float((logits_BTV - dense_BTV)[is_real_BT].abs().max())
    scale = float(dense_BTV[is_real_BT].abs().max())
    limit = (_FLOAT64_LIMIT if small else _FLOAT32_LIMIT) * max(scale, 1.0)
    if not difference <= limit:
        raise PlanError(str(directory), f"with {what} the logits differ from the dense model's by {difference:.3g}")
    return difference, {"dtype": str(dtype).removeprefix("torch."), "max_abs_logit": scale}
