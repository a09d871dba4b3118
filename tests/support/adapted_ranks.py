"""Train adapters in two processes and in one, and print how far they are apart; run by torchrun.

python -m torch.distributed.run --nproc_per_node 2 tests/support/adapted_ranks.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from modmoe.adapters import CONFIGS
from tests.support.adapted import BALANCED, ONE_EACH, adapted_model, adapter_parameters, token_ids

STEPS = 4
PLAIN, CHECKPOINTED = "fsdp", "fsdp, checkpointing"
FSDP = {
    **dict.fromkeys(("perft_e", "soft_moa", "expert_lora", "comol"), (CHECKPOINTED,)),
    **dict.fromkeys(BALANCED, (PLAIN, CHECKPOINTED)),
}
"""Those whose shards are compared too: the ones that decide, share parameters or reach into the layer."""


def fresh(method: str, family: str) -> Any:
    """Return the method's model in float64 and in training; without router loss, which is no mean over tokens."""
    off = {"balance_weight": 0.0} if method in BALANCED else {}
    return adapted_model(method, family, **off).double().train()


def run(model: Any, optimizer: Any, rows: slice) -> list[float]:
    """Train on some rows of each step's batch and return the losses, averaged over the processes."""
    losses = []
    for step in range(STEPS):
        ids_BT = token_ids(4, 9, seed=step)[rows]
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        mean = loss.detach().clone()
        if rows != slice(None):
            dist.all_reduce(mean)
            mean /= dist.get_world_size()
        losses.append(float(mean))
    return losses


def optimizer_of(model: Any) -> Any:
    return torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.05)


def compare(method: str, family: str) -> dict[str, float]:
    """Return the largest differences of losses and of weights from those of one process with the joint batch."""
    rank = dist.get_rank()
    rows = slice(2 * rank, 2 * rank + 2)
    alone = fresh(method, family)
    expected = run(alone, optimizer_of(alone), slice(None))
    weights = dict(adapter_parameters(alone))
    found = {}

    model = fresh(method, family)
    losses = run(DistributedDataParallel(model), optimizer_of(model), rows)
    found["ddp loss"] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    found["ddp weights"] = max(
        float((weight - weights[name]).detach().abs().max()) for name, weight in adapter_parameters(model)
    )

    for name in FSDP.get(method, ()):
        model = fresh(method, family)
        if name == CHECKPOINTED:
            base = model.get_base_model()
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        for layer in model.get_base_model().model.layers:
            fully_shard(layer)
        fully_shard(model)
        losses = run(model, optimizer_of(model), rows)
        found[f"{name} loss"] = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
        found[f"{name} weights"] = max(
            float((weight.full_tensor() - weights[key]).detach().abs().max())
            for key, weight in adapter_parameters(model)
        )
    found["moved"] = abs(expected[0] - expected[-1])
    return found


def main() -> None:
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for method, family in ONE_EACH:
        if sys.argv[1:] and method not in sys.argv[1:]:
            continue
        found[method] = compare(method, family)
    assert sys.argv[1:] or set(found) == set(CONFIGS)
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    # gloo's threads now and then abort a busy machine's process while its interpreter ends, when all is said
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
