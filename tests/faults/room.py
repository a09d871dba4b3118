"""The tiny models and texts that the runs of this folder read, made in a child of the server."""

from __future__ import annotations

from pathlib import Path

from tests.support import planned, tiny


def make(root: Path) -> None:
    """Write ``dense``, ``tied``, ``adapter`` and ``tasks`` into ``root``."""
    from modmoe import api

    # no biases, so that every form can hold it
    planned.write_tied(root, "llama", changes={"mlp_bias": False, "initializer_range": 0.05})
    tiny.write_tasks(root / "tasks", rows=11)
    api.convert(str(root / "dense"), str(root / "adapter"), method="adapters", adapter="molora")
