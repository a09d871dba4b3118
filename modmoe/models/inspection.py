"""What a checkpoint is: parameters, sparsity, experts and their overlap, from its configuration and headers."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modmoe.errors import CheckpointError
from modmoe.models.counts import (
    Counts,
    LayerCounts,
    count_layers,
    count_other,
    count_tied,
    read_experts,
    routed_of,
    tensor_bytes,
    tensor_parameters,
)
from modmoe.models.families import layers_of
from modmoe.storage.checkpoint import (
    ADAPTER_WEIGHTS,
    INDEX,
    SINGLE,
    Checkpoint,
    adapter_headers,
    is_adapter,
    local_base,
    read_adapter_config,
)
from modmoe.storage.documents import check_files


def inspect(directory: str) -> dict[str, Any]:
    """Return what a checkpoint is, in the keys of ``modmoe inspect --json``; weights are not loaded.

    A dense directory has 0 experts and modules, and one count throughout. For a mixture of experts of another format
    ``parameters.dense`` is None, since nothing says what it came from. An adapter, alone or with its base model in one
    checkpoint, has ``method``, ``num_experts``, ``r``, ``top_k``, ``targets``, and ``parameters`` with ``adapter``,
    ``base`` and ``total``; alone, what needs its base model is None where that is not on this disk.

    Raises:
        CheckpointError: the directory is no checkpoint, or a damaged one.
    """
    path = Path(directory)
    if not os.path.isdir(path):
        raise CheckpointError(str(directory), "no such directory")
    check_files(path)
    if is_adapter(path):
        return _inspect_adapter(path)
    checkpoint = Checkpoint(path)
    if isinstance(checkpoint.config.get("modular"), dict):
        # a packed export names modules as engines name experts; what the tied model's keys say is kept beside
        checkpoint.config.update(checkpoint.config["modular"])
    config = checkpoint.config
    if str(config.get("model_type", "")).startswith("modmoe_") and "stored_modules" in config:
        experts = read_experts(checkpoint)
        layers = count_layers(checkpoint, experts)
        counts = count_tied(checkpoint, layers)
        about = _describe_tied(config, layers, experts)
    else:
        counts = count_other(checkpoint)
        about = _describe_other(config)
    adapted = _describe_adapted(checkpoint) if "adapter_method" in config else {}
    added = adapted.pop("parameters", {})
    return {
        "model_type": config.get("model_type"),
        **about,
        **adapted,
        "parameters": {
            **added,
            "dense": counts.dense,
            "stored": counts.stored,
            "active": counts.active,
            "active_max": counts.active_max,
            "materialised": counts.materialised,
        },
        "bytes_on_disk": _file_bytes(path),
        "tensor_bytes": tensor_bytes(checkpoint),
        "sparsity": _sparsity(counts),
        "experts": about["experts"],
    }


def _inspect_adapter(path: Path) -> dict[str, Any]:
    """Return what an adapter alone is, and what its base model is where that is on this disk."""
    config, headers = read_adapter_config(path), adapter_headers(path)
    sizes = {name: math.prod(shape) for name, (shape, _) in headers.items()}
    # layers that were trained whole take the place of the base model's
    added = sum(size for name, size in sizes.items() if _ADAPTER in name)
    base = local_base(path)
    about: dict[str, Any] = {"model_type": None, **_describe_other({}), "num_layers": None}
    numbers: dict[str, Any] = dict.fromkeys(("base", "total", "dense", "stored", "active", "materialised"))
    sparsity: dict[str, float] | None = None
    if base is not None:
        checkpoint = Checkpoint(base)
        counts = count_other(checkpoint)
        about = {"model_type": checkpoint.config.get("model_type"), **_describe_other(checkpoint.config)}
        numbers = {"base": counts.stored, "total": counts.stored + added, "dense": counts.dense}
        numbers |= {"stored": counts.stored + added, "active": counts.active + added}
        numbers |= {"materialised": counts.materialised + added}
        sparsity = _sparsity(counts)
    return {
        **about,
        **_describe_adapter(str(config.get("peft_type")).removeprefix("MODMOE_").lower(), config),
        "base_model": config.get("base_model_name_or_path"),
        "targets": config.get("target_modules"),
        "parameters": {"adapter": sum(sizes.values()), **numbers},
        "bytes_on_disk": (path / ADAPTER_WEIGHTS).stat().st_size,
        "tensor_bytes": sum(sizes[name] * dtype.itemsize for name, (_, dtype) in headers.items()),
        "sparsity": sparsity,
    }


_ADAPTER = ".modmoe_"


def _describe_adapter(method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    described = {"method": method, "num_experts": settings.get("num_experts") or 0}
    return {**described, "r": settings.get("r"), "top_k": settings.get("top_k")}


def _describe_adapted(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the adapters are that a checkpoint holds beside its base model."""
    config = checkpoint.config
    paths = [str(path) for path in config.get("adapter_targets") or []]
    sizes = tensor_parameters(checkpoint)
    adapter = sum(size for name, size in sizes.items() if _ADAPTER in name)
    total = sum(sizes.values())
    return {
        **_describe_adapter(str(config["adapter_method"]), config.get("adapter_settings") or {}),
        "targets": sorted({path.rpartition(".")[2] for path in paths}),
        "parameters": {"adapter": adapter, "base": total - adapter, "total": total},
    }


def _describe_tied(
    config: dict[str, Any], layers: Sequence[LayerCounts], experts: Sequence[Sequence[Sequence[int]]]
) -> dict[str, Any]:
    return {
        "method": config.get("modmoe_method", "modular"),
        "num_layers": len(layers),
        "num_modules": config["num_modules"],
        "module_size": config["module_size"],
        "stored_modules": [layer.stored_modules for layer in layers],
        "active_modules": [round(layer.active_modules, 4) for layer in layers],
        "num_experts": config["num_experts"],
        "modules_per_expert": config.get("modules_per_expert", 0),
        "shared_modules": config.get("shared_modules", 0),
        "top_k": config["num_experts_per_tok"],
        "routing": config.get("routing"),
        "combine": config.get("combine"),
        "router_kind": None if config.get("routing") == "task" else config.get("router_kind"),
        "router_parameters": sum(layer.router_parameters for layer in layers),
        "compensation": bool(config.get("compensation", False)),
        "experts": _describe_experts(config, experts),
    }


def _describe_experts(config: dict[str, Any], layers: Sequence[Sequence[Sequence[int]]]) -> list[dict[str, Any]]:
    """Return each expert's modules and the share of them that another expert has too, as means over the layers."""
    names = config.get("expert_names") or []
    described = []
    for expert in range(config["num_experts"]):
        used, shared = 0, 0.0
        for experts in layers:
            own = set(experts[expert])
            others = set().union(*(set(modules) for e, modules in enumerate(experts) if e != expert))
            used += len(own)
            shared += len(own & others) / len(own) if own else 0.0
        mean = used / len(layers) if layers else 0.0
        described.append(
            {
                "name": names[expert] if expert < len(names) else f"expert{expert}",
                "modules_used": int(mean) if mean == int(mean) else round(mean, 4),
                "overlap": round(shared / len(layers), 6) if layers else 0.0,
            }
        )
    return described


def _describe_other(config: dict[str, Any]) -> dict[str, Any]:
    num_experts, top_k = routed_of(config)
    inner = config.get("text_config")
    try:
        num_layers = layers_of(inner if isinstance(inner, dict) and "num_hidden_layers" not in config else config)
    except CheckpointError:
        num_layers = 0
    return {
        "method": config.get("modmoe_method"),
        "num_layers": num_layers,
        "num_modules": 0,
        "num_experts": num_experts,
        "modules_per_expert": 0,
        "top_k": top_k,
        "routing": "token" if num_experts else None,
        "experts": [],
    }


def _sparsity(counts: Counts) -> dict[str, float]:
    return {"ffn": round(counts.ffn_sparsity, 6), "total": round(counts.total_sparsity, 6)}


def _file_bytes(directory: Path) -> int:
    """Return the bytes of the weight files that belong to the checkpoint, headers included."""
    if (directory / INDEX).is_file():
        return sum(file.stat().st_size for file in directory.glob("*.safetensors") if file.name != SINGLE)
    return (directory / SINGLE).stat().st_size
