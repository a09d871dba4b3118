"""Telling one base model from another by a few of its weights."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

_SAMPLES = 64


def fingerprint(model: nn.Module) -> str | None:
    """Return ``<small>-<all>``, two hashes of a model's own weights; None where they hold no values (meta device).

    ``small`` is over vectors alone, which quantizers leave as they are; ``all`` over every floating-point weight but
    the embeddings, which may grow. Of each tensor some values are read, rounded to bfloat16, so that it does not
    matter in which type the model was loaded.
    """
    embeddings = {id(weight) for module in _embeddings(model) for weight in module.parameters()}
    small, every = hashlib.sha256(), hashlib.sha256()
    quantized = False
    for name, weight in sorted(model.named_parameters(remove_duplicate=False)):
        if "routed_" in name or id(weight) in embeddings:
            continue
        if weight.is_meta:
            return None
        if not weight.is_floating_point() or weight.element_size() < 2:
            quantized = True
            continue
        told = f"{name} {tuple(weight.shape)}".encode() + _sample(weight)
        every.update(told)
        if weight.dim() == 1:
            small.update(told)
    return f"{small.hexdigest()[:16]}-{'quantized' if quantized else every.hexdigest()[:16]}"


def same_base(first: str, second: str) -> bool:
    """Return whether two fingerprints may be of one model; of a quantized one the vectors decide."""
    if "quantized" in first or "quantized" in second:
        return first.partition("-")[0] == second.partition("-")[0]
    return first == second


def _sample(weight: Tensor) -> bytes:
    flat = weight.detach().reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return bytes(flat[::step][:_SAMPLES].to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy())


def _embeddings(model: nn.Module) -> list[nn.Module]:
    found = []
    for ask in ("get_input_embeddings", "get_output_embeddings"):
        module = getattr(model, ask)() if hasattr(model, ask) else None
        if isinstance(module, nn.Module):
            found.append(module)
    return found
