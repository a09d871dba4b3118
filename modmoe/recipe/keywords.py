"""The keywords and flags of each step, and the place in the recipe that each of them sets."""

from __future__ import annotations

_COMMON = {
    "tasks": "tasks",
    "method": "method",
    "family": "family",
    "seed": "seed",
    "device": "device",
    "trust_remote_code": "trust_remote_code",
}
_CALIBRATION = {
    "tokens": "calibration.tokens",
    "sequence_length": "calibration.sequence_length",
    "batch_size": "calibration.batch_size",
    "by_layer": "calibration.by_layer",
    "partition": "partition.method",
    "num_modules": "partition.num_modules",
    "score": "assignment.score",
}
_CONVERSION = {
    "assignment": "assignment.method",
    "num_experts": "assignment.num_experts",
    "modules_per_expert": "assignment.modules_per_expert",
    "active_fraction": "assignment.active_fraction",
    "shared_modules": "assignment.shared_modules",
    "coverage": "assignment.coverage",
    "refit": "assignment.refit",
    "routing": "router.routing",
    "top_k": "router.top_k",
    "combine": "router.combine",
    "router_start": "router.start",
    "router_kind": "router.kind",
    "compensation": "router.compensation",
    "routing_chunk": "router.routing_chunk",
}
_ADAPTER = {"adapter": "adapter.method", "adapter_settings": "adapter.settings", "budget": "adapter.budget"}
_FINETUNING = {
    name: f"finetune.{name}"
    for name in (
        "train",
        "distill_from",
        "distill_weight",
        "temperature",
        "balance_weight",
        "max_steps",
        "learning_rate",
        "batch_size",
        "sequence_length",
        "packing",
        "warmup_fraction",
        "lora_rank",
        "save_steps",
        "report_to",
    )
}

KEYWORDS: dict[str, dict[str, str]] = {
    "analyze": {**_COMMON, **_CALIBRATION},
    "convert": {**_COMMON, **_CALIBRATION, **_CONVERSION, **_ADAPTER},
    "finetune": {**_COMMON, **_ADAPTER, **_FINETUNING},
}
"""For each step: keyword (as a flag with dashes for underscores) to the place in the recipe that it sets."""
