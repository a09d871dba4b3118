"""Convert, train and fail in several processes as a user would, and print what each came to; run by torchrun.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/support/ranked.py ROOM

ROOM holds ``dense``, ``tied`` and ``tasks``, as ``make_room`` writes them; the outputs land beside them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from modmoe.errors import CheckpointError, ModmoeError, RankError
from modmoe.recipe.schema import make_recipe
from modmoe.runtime import ranks
from tests.support import tied, tiny

STEPS = 6
CONVERSION = {
    "calibration.tokens": 300,
    "calibration.sequence_length": 32,
    "calibration.batch_size": 3,
    "partition.num_modules": 8,
    "router.compensation": True,
    "router.routing": "sequence",
    "router.routing_chunk": 8,
    "assignment.score": "output_norm",
}
TRAINING = {
    "finetune.batch_size": 8,
    "finetune.sequence_length": 24,
    "finetune.learning_rate": 3e-3,
    "finetune.max_steps": STEPS,
    "finetune.save_steps": 2,
    "finetune.balance_weight": 0.1,
}
KINDS: dict[str, dict[str, Any]] = {
    "full": {"finetune.train": "full"},
    "distilled": {"finetune.train": "lora", "finetune.distill_weight": 0.5},
    "adapters": {"finetune.train": "adapters", "adapter.method": "molora"},
}
"""Kinds of training, by what they change."""


def make_room(room: Path) -> Path:
    """Write the tiny models and texts that the runs read."""
    dense = tiny.dense_model("llama", initializer_range=0.05)
    tiny.save_dense(room / "dense", "llama", initializer_range=0.05)
    tied.save_tied(room / "tied", dense, room / "dense", routing="token")
    tiny.write_tasks(room / "tasks", rows=11)
    return room


def recipe_for(room: Path, source: str, **changes: Any) -> Any:
    """Return a recipe on the room's texts."""
    tasks = {path.stem: str(path) for path in sorted((room / "tasks").glob("*.jsonl"))}
    return make_recipe({"source": str(room / source), "tasks": tasks, "device": "cpu", **changes})


def convert_once(room: Path, output: Path, **changes: Any) -> None:
    """Convert the dense model."""
    from modmoe.conversion.driver import convert

    convert(recipe_for(room, "dense", **{**CONVERSION, **changes}), str(output))


def train_once(room: Path, kind: str, output: Path, *, resume: bool = False, stop_at: int | None = None) -> Any:
    """Train the tied model, or adapters on the dense one; ``stop_at`` a step fail as a full disk would."""
    from modmoe.training.run import finetune

    changes = {**TRAINING, **KINDS[kind]}
    if kind == "distilled":
        changes["finetune.distill_from"] = str(room / "dense")
    source = "dense" if kind == "adapters" else "tied"
    recipe = recipe_for(room, source, **changes)

    def progress(message: str, done: int = 0, total: int = 0) -> None:
        if message == "training, steps" and done == stop_at:
            raise CheckpointError("the disk is full.")

    evaluated = dict(recipe.tasks) if kind == "full" else {}
    return finetune(
        str(room / source),
        str(output),
        recipe,
        eval_tasks=evaluated,
        resume=resume,
        overwrite=False,
        progress=progress,
    )


def fail(room: Path, how: str, output: Path) -> str:
    """Fail on one rank while the other is in the middle of its work, and return what the other heard."""

    def progress(message: str, *_: Any) -> None:
        if how == "first" and ranks.is_first() and message.startswith("writing"):
            raise CheckpointError("the disk is full.")
        if how == "second" and not ranks.is_first() and message.startswith("profiling"):
            raise CheckpointError("no such file.")
        if how == "bug" and not ranks.is_first() and message.startswith("partitioning"):
            raise KeyError("oops")

    from modmoe.conversion.driver import convert

    try:
        convert(recipe_for(room, "dense", **CONVERSION), str(output), progress=progress)
    except (ModmoeError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def shard_on_cpu() -> None:
    """Have accelerate shard with FSDP2 as its configuration file would, which it does for GPUs alone."""
    from accelerate import state
    from accelerate.utils import DistributedType

    os.environ.update(
        ACCELERATE_USE_FSDP="true",
        ACCELERATE_TORCH_DEVICE="cpu",
        FSDP_VERSION="2",
        FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
        FSDP_STATE_DICT_TYPE="SHARDED_STATE_DICT",
        FSDP_RESHARD_AFTER_FORWARD="true",
        FSDP_CPU_RAM_EFFICIENT_LOADING="false",
    )
    state.PartialState._prepare_backend = lambda *_, **__: ("gloo", DistributedType.MULTI_GPU)  # type: ignore


def train_sharded(room: Path, kind: str, output: Path) -> Any:
    """Train with sharded weights; the result says how many of the weights a rank did not have whole."""
    from torch.distributed.tensor import DTensor

    from modmoe.training import trainer

    counts: list[int] = []
    train = trainer.ModularTrainer.train

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return train(self, *args, **kwargs)
        finally:
            counts.append(sum(isinstance(weight, DTensor) for weight in self.model.parameters()))

    trainer.ModularTrainer.train = counting  # type: ignore[method-assign]
    try:
        return {**train_once(room, kind, output), "sharded": counts[0]}
    finally:
        trainer.ModularTrainer.train = train  # type: ignore[method-assign]


def lose(output: Path) -> str:
    """End the second rank without a word, and return what the first says."""
    try:
        with ranks.joined(), ranks.open_first_output(output):
            if not ranks.is_first():
                os.kill(os.getpid(), signal.SIGKILL)
            ranks.meet()
    except RankError as error:
        return str(error)
    return "nothing"


def main() -> None:
    """Run all of it; each rank writes down what it found."""
    torch.set_num_threads(1)
    room = Path(sys.argv[1])
    found: dict[str, Any] = {}
    convert_once(room, room / "converted-2")
    for kind in KINDS:
        found[kind] = train_once(room, kind, room / f"{kind}-2")
    try:
        # both ranks fail, since both report; the first alone speaks
        train_once(room, "full", room / "resumed-2", stop_at=5)
    except CheckpointError as error:
        found["stopped"] = str(error)
    found["resumed"] = train_once(room, "full", room / "resumed-2", resume=True)
    found["failed"] = {how: fail(room, how, room / f"failed-{how}") for how in ("first", "second", "bug")}
    shard_on_cpu()
    for kind in KINDS:
        found[f"{kind}-sharded"] = train_sharded(room, kind, room / f"{kind}-sharded-2")
    name = f"found-{os.environ['RANK']}.json"
    (room / name).write_text(json.dumps(found))
    found["lost"] = lose(room / "lost")
    (room / name).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
