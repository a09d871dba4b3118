"""Tied models whose experts are disjoint, share a core or overlap, and what their native exports compute."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modmoe.formats.native.plan import Native, native_export
from modmoe.formats.native.targets import TARGETS
from modmoe.formats.proof import reload
from modmoe.formats.tied import with_dtype
from modmoe.storage.checkpoint import Checkpoint, CheckpointWriter
from tests.support import planned

NO_BIAS = {"mlp_bias": False}
SOURCES: dict[str, dict[str, Any]] = {
    "llama": NO_BIAS,
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"tie_word_embeddings": True},
    "granite": NO_BIAS,
    "olmo2": {},
}
"""Source families, with what is changed about the tiny ones so that every target of theirs holds them."""
PAIRS = [(source, name) for name, target in TARGETS.items() for source in target.sources]
"""Every source family with each target that continues it."""

MEMBERS: dict[str, list[list[int]]] = {
    "disjoint": [[0, 1], [2, 3], [4, 5], [6, 7]],
    "core": [[5, 0, 1], [5, 2, 3], [5, 4, 6]],
    "wide core": [[5, 0, 7, 1], [5, 0, 7, 2], [5, 0, 7, 3]],
    "overlap": [[0, 1, 3], [1, 2, 4], [2, 3, 5]],
}
"""Modules of each expert, of 8: with nothing in common, with one or three modules that all have, with any."""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "one of disjoint": ("disjoint", {"top_k": 1}),
    "one with a core": ("core", {"top_k": 1}),
    "union of two with a core": ("core", {"top_k": 2}),
    "union of three": ("disjoint", {"top_k": 3}),
    "sum of two that overlap": ("overlap", {"top_k": 2, "combine": "sum"}),
    "sum of two with a core": ("wide core", {"top_k": 2, "combine": "sum"}),
}
"""Ways of sharing and routing that some target holds."""


def rows() -> list[tuple[str, str, str, str]]:
    """Return source, target, case and type of every export that is compared: all cases from a target's first source."""
    made = []
    for (source, target), case in itertools.product(PAIRS, CASES):
        is_first = source == TARGETS[target].sources[0]
        if is_first or case in ("one with a core", "union of three"):
            made.append((source, target, case, "float32"))
        if case == "union of three" or (is_first and case == "one with a core"):
            made.append((source, target, case, "bfloat16"))
    return made


def members(sharing: str, num_modules: int = planned.NUM_MODULES) -> torch.Tensor:
    """Return members_EM of a row of MEMBERS, each of its modules cut into as many as make ``num_modules`` or fewer."""
    experts = MEMBERS[sharing]
    members_EM = torch.zeros(len(experts), planned.NUM_MODULES, dtype=torch.bool)
    for expert, modules in enumerate(experts):
        members_EM[expert, modules] = True
    each = num_modules // planned.NUM_MODULES
    left = num_modules - planned.NUM_MODULES * each
    return torch.nn.functional.pad(members_EM.repeat_interleave(each, 1), (0, left))


def write_native_source(
    directory: Path, model_type: str, sharing: str, num_modules: int = planned.NUM_MODULES, **options: Any
) -> Path:
    """Write a tied model into a directory and return it; ``options`` are those of ``planned.write_tied``."""
    directory.mkdir(parents=True, exist_ok=True)
    changes = {**SOURCES[model_type], **options.pop("changes", {})}
    members_EM = members(sharing, num_modules)
    return planned.write_tied(directory, model_type, members_EM=members_EM, changes=changes, **options)[1]


def tied_models(home: Path) -> Callable[[str, str], Path]:
    """Return what writes, once, the tied model of a family and a row of CASES."""
    made: dict[tuple[str, str], Path] = {}

    def write(source: str, case: str) -> Path:
        if (source, case) not in made:
            sharing, router = CASES[case]
            made[source, case] = write_native_source(home / str(len(made)), source, sharing, **router)
        return made[source, case]

    return write


def write_export(directory: Path, tied: Path, target: str, dtype: torch.dtype | None = None) -> Native:
    """Write weights and configuration of a native export for transformers, and nothing beside them."""
    source = Checkpoint(tied)
    made = native_export(source, target, dtype=dtype)
    made.plan.check(source)
    directory.mkdir()
    writer = CheckpointWriter(directory)
    made.plan.run(source, writer, dtype)
    writer.finish(with_dtype(made.plan.config, dtype))
    return made


def compute_without_modmoe(directories: list[Path], dtypes: list[list[str]], scratch: Path) -> list[dict[str, Any]]:
    """Return logits and greedy tokens of native exports, all computed in one process that cannot import modmoe."""
    jobs = []
    for number, (directory, kinds) in enumerate(zip(directories, dtypes, strict=True)):
        job = {
            "directory": str(directory),
            "base": None,
            "input_ids": sample_ids().tolist(),
            "new_tokens": NEW_TOKENS,
            "dtypes": kinds,
            "expert": None,
            "options": {"experts_implementation": "eager"},
            "output": str(scratch / f"computed-{number}.safetensors"),
        }
        path = scratch / f"job-{number}.json"
        path.write_text(json.dumps(job))
        jobs.append(str(path))
    script = "import runpy, sys\nmain = runpy.run_path(sys.argv[1])['main']\nfor job in sys.argv[2:]: main(job)"
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    environment["OMP_NUM_THREADS"] = "1"  # models this small are slower on several
    command = [sys.executable, "-P", "-c", script, reload.__file__, *jobs]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(scratch / f"computed-{number}.safetensors") for number in range(len(jobs))]


NEW_TOKENS = 4


def sample_ids() -> torch.Tensor:
    """Return the rows that exports are compared on."""
    return (torch.arange(30).reshape(3, 10) * 7919 + 13) % 256
