"""Trained LoRAs of one base model become the experts of one CoMoL, without loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from modmoe.adapters.corespace import LoRAWeights, stack_loras
from modmoe.adapters.peft_configs import CoMoLConfig
from modmoe.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."


def gather_loras(model: nn.Module, directories: Sequence[str | Path], *, core_routing: bool = True) -> Any:
    """Return a PeftModel of ``model`` with one CoMoL whose expert e is the LoRA in the e-th directory.

    Each layer's LoRAs are stacked in core space (https://arxiv.org/abs/2509.17786), so that expert e alone computes
    what its LoRA does. The routers begin at zero, which is the LoRAs' mean; train them to choose. Ranks and targets
    may differ: a LoRA that leaves a layer alone has a zero core there.

    Args:
        model: the base model of all of them; it is changed in place as by ``get_peft_model``.
        directories: PEFT directories of plain LoRAs on linear layers.
        core_routing: whether routers read the token in core space, or the layer's input.

    Raises:
        AdapterError: one is not a plain LoRA, or has weights for layers that the model lacks.
    """
    if not directories:
        raise AdapterError("loras", "none was given", "name the directories of trained LoRAs")
    collection = [_read(Path(directory)) for directory in directories]
    paths = sorted({path for loras in collection for path in loras})
    modules = dict(model.named_modules())
    for path in paths:
        if path not in modules:
            raise AdapterError("loras", f"the model has no layer {path}", "it is not the one that they were trained on")
    stacked = {}
    for path in paths:
        stacked[path] = stack_loras([loras.get(path) or _nothing(path, collection) for loras in collection])
    rank = max(weights["down_RD"].shape[0] for weights in stacked.values())
    config = CoMoLConfig(
        r=rank,
        lora_alpha=rank,
        lora_dropout=0.0,
        num_experts=len(directories),
        core_routing=core_routing,
        target_modules=paths,
    )
    attached = get_peft_model(model, config)
    with torch.no_grad():
        for path, weights in stacked.items():
            adapter: Any = modules[path].routed_comol.adapters["default"]
            missing = rank - weights["down_RD"].shape[0]
            adapter.down_RD.copy_(F.pad(weights["down_RD"], (0, 0, 0, missing)))
            adapter.up_OR.copy_(F.pad(weights["up_OR"], (0, missing)))
            adapter.cores_ERS.copy_(F.pad(weights["cores_ERS"], (0, missing, 0, missing)))
            adapter.router_EX.zero_()
    return attached


def _read(directory: Path) -> dict[str, LoRAWeights]:
    """Return A, B and the scale of each layer of a LoRA directory."""
    if not (directory / WEIGHTS).is_file():
        raise AdapterError(str(directory), f"holds no {WEIGHTS}")
    config = PeftConfig.from_pretrained(str(directory))
    if not isinstance(config, LoraConfig) or config.use_dora or config.modules_to_save or config.target_parameters:
        raise AdapterError(str(directory), "is no plain LoRA on linear layers, and only those become cores")
    tensors = load_file(directory / WEIGHTS)
    found: dict[str, LoRAWeights] = {}
    used = set()
    for name in tensors:
        path, mark, _ = name.removeprefix(_PREFIX).partition(".lora_A.weight")
        if not mark:
            continue
        other = name.replace(".lora_A.", ".lora_B.")
        if other not in tensors:
            raise AdapterError(str(directory), f"{other} is missing", "the file is incomplete")
        used |= {name, other}
        found[path] = tensors[name], tensors[other], _scale(config, path, tensors[name])
    if used != tensors.keys():
        raise AdapterError(str(directory), f"{sorted(tensors.keys() - used)[0]} is no part of a plain LoRA")
    return found


def _scale(config: LoraConfig, path: str, down_KD: Tensor) -> float:
    patterns = config.alpha_pattern or {}
    alpha = float(patterns.get(get_pattern_key(list(patterns), path), config.lora_alpha))
    rank = down_KD.shape[0]
    return alpha / (rank**0.5 if config.use_rslora else rank)


def _nothing(path: str, collection: Sequence[dict[str, LoRAWeights]]) -> LoRAWeights:
    down_KD, up_OK, _ = next(loras[path] for loras in collection if path in loras)
    return torch.zeros_like(down_KD[:1]), torch.zeros_like(up_OK[:, :1]), 1.0
