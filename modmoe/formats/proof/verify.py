"""The proof of an export: reloaded in a fresh process without modmoe, it computes what the model it was made from does.

An adapter alone is reloaded with PEFT instead, which needs modmoe for its methods.
"""

# Shapes: B batch, T tokens, G tokens generated, V vocabulary

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from modmoe.errors import ExportError
from modmoe.formats.proof import child, reload
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.scratch import scratch_directory

TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits by what it was computed in, as a share of the largest logit."""
_HALVES = (torch.float16, torch.bfloat16)

ROWS, TOKENS, NEW_TOKENS = 3, 12, 20
_LEAST_POSITIONS = 4


def verify(
    reference: Callable[[torch.dtype], Any],
    directory: Path,
    *,
    stored: torch.dtype | None = None,
    expert: str | None = None,
    set_expert: bool = False,
    execute_code: bool = False,
    options: dict[str, Any] | None = None,
    base: Path | None = None,
    is_rounded: bool = False,
    tolerance: float | None = None,
) -> dict[str, Any]:
    """Compare the export in ``directory`` with the model it was made from, on a few short rows without padding.

    Logits are compared in the export's type and in float32, both from the weights as they were written. In half
    precision a router may stand so near a tie that rounding decides, so there the tolerance is for the mean.

    Args:
        reference: returns that model on the CPU, with its weights in a type; it may be changed.
        directory: the export.
        stored: the type that its weights have; None for that of most of them.
        expert: the expert to force in the tied model; None lets it route.
        set_expert: force ``expert`` in the export too; only a tied one can.
        execute_code: let the export's own code run in the fresh process.
        options: further keywords of ``from_pretrained``.
        base: where the export is an adapter alone: the directory of its base model.
        is_rounded: whether the export's weights were rounded where the model's are not; then one in half precision is
            compared in its own type alone.
        tolerance: for an export that is known to differ: bound of the mean difference in float32, as a share of the
            largest logit. Such an export may choose another expert where two are nearly equal, so the mean counts.

    Returns ``reloaded_without_modmoe``, ``max_abs_logit_diff`` and ``greedy_tokens_equal`` (both in float32, or in
    float64 where the weights are) and the same for each type under ``by_dtype``; for an adapter also
    ``reloaded_with_peft``.

    Raises:
        ExportError: it does not reload, or differs by more than the tolerance.
    """
    stored = stored or weights_dtype(Checkpoint(directory))
    dtypes = [stored] if is_rounded or stored not in _HALVES else [stored, torch.float32]
    model: Any = reference(stored)
    ids_BT, new_tokens = sample_ids(model)
    if expert is not None:
        model.set_expert(expert)
    wanted = reload.compute(model, ids_BT, new_tokens, dtypes)
    del model  # before the fresh process loads as much again
    job = {
        "directory": str(directory.resolve()),
        "base": None if base is None else str(base.resolve()),
        "input_ids": ids_BT.tolist(),
        "new_tokens": new_tokens,
        "dtypes": [_name(dtype) for dtype in dtypes],
        "expert": expert if set_expert else None,
        "options": {"trust_remote_code": execute_code, **(options or {})},
    }
    found = _reload(job)
    by_dtype = {
        name: _compare(computed, (found[f"{name}.logits"], found[f"{name}.tokens"]), getattr(torch, name), tolerance)
        for name, computed in zip(map(_name, dtypes), wanted, strict=True)
    }
    exact = by_dtype[_name(dtypes[-1])]
    return {
        "reloaded_without_modmoe": base is None,
        **({} if base is None else {"reloaded_with_peft": True}),
        "max_abs_logit_diff": exact["max_abs_logit_diff"],
        "greedy_tokens_equal": exact["greedy_tokens_equal"],
        "greedy_tokens": ROWS * new_tokens,
        "tokens": ids_BT.numel(),
        "expert": expert,
        "by_dtype": by_dtype,
    }


def sample_ids(model: Any) -> tuple[Tensor, int]:
    """Return ids_BT spread over the vocabulary, always the same, and how many tokens may be generated behind them."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    positions = getattr(model.config, "max_position_embeddings", None) or TOKENS + NEW_TOKENS
    tokens = max(_LEAST_POSITIONS, min(TOKENS, positions // 2))
    numbers = torch.arange(ROWS * tokens).reshape(ROWS, tokens)
    # a step prime to nothing in particular: neighbours lie far apart, and rows begin differently
    return (numbers * 7919 + 13) % vocabulary, max(1, min(NEW_TOKENS, positions - tokens))


def weights_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """Return the type that most of a checkpoint's weights have; ExportError where none are floating-point numbers."""
    counts: dict[torch.dtype, int] = {}
    for name in checkpoint:
        dtype = checkpoint.dtype(name)
        if dtype.is_floating_point:
            counts[dtype] = counts.get(dtype, 0) + torch.Size(checkpoint.shape(name)).numel()
    if not counts or max(counts, key=counts.__getitem__) not in TOLERANCES:
        raise ExportError(str(checkpoint.directory), "its weights are not floating-point numbers of 16 to 64 bits")
    return max(counts, key=counts.__getitem__)


def _reload(job: dict[str, Any]) -> dict[str, Tensor]:
    """Run the job in a fresh process and return the tensors it wrote."""
    with scratch_directory("verify") as scratch:
        output = scratch / "computed.safetensors"
        job_file = scratch / "job.json"
        job_file.write_text(json.dumps({**job, "output": str(output)}), encoding="utf-8")
        environment = {key: value for key, value in os.environ.items() if "TOKEN" not in key.upper()}
        environment.update(
            HF_HUB_OFFLINE="1",
            HF_MODULES_CACHE=str(scratch / "modules"),  # the user's cache stays as it is
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            TRANSFORMERS_VERBOSITY="error",
            TOKENIZERS_PARALLELISM="false",
            PYTHONDONTWRITEBYTECODE="1",
            PYTHONUTF8="1",  # what it says is read as such, whatever the locale
        )
        # -P: neither this package's directory nor the working directory can be imported from
        scripts = [str(Path(str(script.__file__)).resolve()) for script in (child, reload)]
        command = [sys.executable, "-P", scripts[0], str(scratch), scripts[1], str(job_file)]
        done = _run_child(command, cwd=scratch, env=environment)
        if done.returncode or not output.is_file():
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
            reason = lines[-1][:400] if lines else f"the process ended with {done.returncode}"
            tool = "plain transformers" if job["base"] is None else "peft"
            raise ExportError(f"the export does not reload with {tool}", reason)
        return load_file(output)


def _run_child(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a process that ends at once where this one is interrupted or killed, and return what it said."""
    ours, theirs = os.pipe()[::-1]
    pipes: dict[str, Any] = {"stdin": theirs, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    try:
        process = subprocess.Popen(command, text=True, encoding="utf-8", errors="replace", **pipes, **options)
        try:
            out, said = process.communicate()
        except BaseException:
            # waited for, which subprocess.run does not after Ctrl-C: nothing is left of it when this process ends
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(command, process.returncode, out, said)
    finally:
        os.close(ours)
        os.close(theirs)


def _compare(
    wanted: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor], dtype: torch.dtype, tolerance: float | None = None
) -> dict[str, Any]:
    logits_BTV, tokens_BG = found
    high = torch.promote_types(dtype, torch.float32)
    wanted_BTV = wanted[0].to(high)
    if logits_BTV.shape != wanted_BTV.shape:
        raise ExportError(f"the export has logits of {list(logits_BTV.shape)}, the model {list(wanted_BTV.shape)}.")
    difference_BTV = (logits_BTV.to(high) - wanted_BTV).abs()
    scale, largest = float(wanted_BTV.abs().max()), float(difference_BTV.max())
    limit = max(TOLERANCES[dtype], tolerance or 0) * scale
    held = float(difference_BTV.mean()) if dtype in _HALVES or tolerance is not None else largest
    # written so that a NaN fails
    if not held <= limit:
        raise ExportError(
            f"the reloaded export's logits differ from the model's by {held:.3g} in {_name(dtype)}, where {limit:.3g} "
            "is allowed; nothing was written. Values that are not finite point at a type too narrow for the weights."
        )
    return {
        "max_abs_logit_diff": largest,
        "mean_abs_logit_diff": float(difference_BTV.mean()),
        "max_abs_logit": scale,
        "tolerance": limit,
        "greedy_tokens_equal": bool(torch.equal(tokens_BG, wanted[1])),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
