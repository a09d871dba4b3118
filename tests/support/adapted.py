"""Tiny base models with every routed adapter on them: what the tests of the binding and of the passes share."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import get_peft_model
from torch import Tensor

from modmoe.adapters.mechanism.base import RoutedAdapter
from modmoe.adapters.peft_binding import RoutedConfig, RoutedLayer
from modmoe.adapters.peft_configs import CONFIGS
from modmoe.adapters.table import METHODS

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"

VOCABULARY = 64

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # weights this large make every layer matter, so that a wrong one shows in the logits
    "initializer_range": 0.25,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_EXPERTS: dict[str, Any] = {**_COMMON, "num_experts_per_tok": 2}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _COMMON),
    "qwen3": ("Qwen3Config", {**_COMMON, "head_dim": 8}),
    "olmoe": ("OlmoeConfig", {**_EXPERTS, "num_experts": 4}),
    "mixtral": ("MixtralConfig", {**_EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3MoeConfig", {**_EXPERTS, "head_dim": 8, "num_experts": 4, "moe_intermediate_size": 24}),
}
DENSE = ("llama", "qwen3")
MOE = ("olmoe", "mixtral", "qwen3_moe")

SMALL: dict[str, dict[str, Any]] = {
    "comol": {"r": 3, "num_experts": 3},
}
"""Settings of each method for the tiny models; a method that is not named gets what of ``_SMALL`` it has."""
_SMALL: dict[str, Any] = {"r": 3, "num_experts": 3}
_OFF: dict[str, Any] = {"lora_dropout": 0.0, "dropout": 0.0}

NEEDS_MOE = {"perft_e", "expert_lora"}
NEEDS_DENSE = {"mixlora"}


BALANCED = [method for method in CONFIGS if "balance_weight" in vars(METHODS[method].settings())]
"""Methods with a router loss."""


def refuses(method: str, family: str) -> bool:
    """Return whether the method cannot be attached to this kind of model."""
    return (method in NEEDS_MOE and family in DENSE) or (method in NEEDS_DENSE and family in MOE)


CASES = [(method, family) for method in CONFIGS for family in FAMILIES if not refuses(method, family)]
"""Every method on every family that takes it."""
REFUSED = [(method, family) for method in CONFIGS for family in FAMILIES if refuses(method, family)]
PAIRS = [(method, family) for method, family in CASES if family in ("llama", "olmoe")]
"""Every method on a dense model and on an MoE."""
ONE_EACH = [
    next((method, family) for family in ("llama", "olmoe") if not refuses(method, family)) for method in CONFIGS
]
"""Every method once, on a dense model where it takes one."""
LAYOUTS = [pair for pair in ONE_EACH if pair[0] in ("comol", "soft_moa", "ldmole", "perft_e")]
"""Each way of keeping tensors once: at many layers, all in one place a layer, shared by layers, in an MoE's experts."""


def with_balance(method: str) -> dict[str, Any]:
    """Return settings that make a method's router loss large enough to be seen; nothing where it has none."""
    if method not in BALANCED:
        return {}
    # where all experts are chosen, their shares are even whatever the router does
    return {"balance_weight": 0.5, **({"top_k": 2} if "top_k" in settings_of(method) else {})}


def settings_of(method: str) -> set[str]:
    """Return the names of a method's settings."""
    return {field.name for field in dataclasses.fields(METHODS[method].settings)}


def config_for(method: str, **changes: Any) -> RoutedConfig:
    """Return a small configuration of a method, without dropout."""
    kind = CONFIGS[method]
    known = settings_of(method)
    values = {name: value for name, value in _OFF.items() if name in known}
    values |= SMALL.get(method) or {name: value for name, value in _SMALL.items() if name in known}
    return kind(**{**values, **changes})


@functools.cache
def _base(family: str) -> Any:
    torch.manual_seed(0)
    return from_config(family).eval()


def from_config(family: str, **changes: Any) -> Any:
    """Return a randomly initialised model of a family; its experts run one by one."""
    name, values = FAMILIES[family]
    config = getattr(transformers, name)(**{**values, **changes})
    more = {"experts_implementation": "eager"} if family in MOE else {}
    return transformers.AutoModelForCausalLM.from_config(config, **more)


def base_model(family: str) -> Any:
    """Return the family's tiny model in evaluation mode; the same weights every time, and the caller's own."""
    return copy.deepcopy(_base(family))


def adapted_model(method: str, family: str, *, trained: bool = True, **changes: Any) -> Any:
    """Return a PeftModel of the method's small configuration, its adapter moved off its start where ``trained``."""
    base = base_model(family)
    torch.manual_seed(1)
    model = get_peft_model(base, config_for(method, **changes))
    if trained:
        shake(model)
    return model.eval()


def shake(model: Any, seed: int = 0, scale: float = 0.2) -> None:
    """Move every parameter of every adapter by something random, so that each one matters."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, weight in adapter_parameters(model):
            weight.add_(torch.randn(weight.shape, generator=draw).mul_(scale).to(weight))


def adapter_parameters(model: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yield the name and the tensor of every parameter below a site, shared ones too."""
    for name, weight in model.named_parameters():
        if ".modmoe_" in f".{name}":
            yield name, weight


def adapters_of(model: Any, name: str = "default") -> list[RoutedAdapter]:
    """Return the adapters of one name in a model's order."""
    return [
        layer.adapters[name]
        for layer in model.modules()
        if isinstance(layer, RoutedLayer) and layer.path and name in layer.adapters
    ]


def context(model: Any) -> Any:
    """Return what the adapters of a model share, under whatever wraps it."""
    for module in model.modules():
        if "routed_context" in module.__dict__:
            return module.routed_context
    raise AssertionError("no adapters on this model")


def token_ids(batch: int = 2, tokens: int = 9, seed: int = 1) -> torch.Tensor:
    """Return random token ids, no special ones."""
    return torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(seed))


def train(model: Any, steps: int = 3, learning_rate: float = 0.05, seed: int = 5) -> list[float]:
    """Train what trains on random tokens and return the losses; leaves the model in evaluation mode."""
    torch.manual_seed(seed)
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate)
    losses = []
    for step in range(steps):
        ids_BT = token_ids(seed=seed + step)
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval()
    return losses


@torch.no_grad()
def logits_of(model: Any, ids_BT: torch.Tensor | None = None, **more: Any) -> torch.Tensor:
    """Return a model's logits in evaluation mode."""
    return model.eval()(input_ids=token_ids() if ids_BT is None else ids_BT, **more).logits


def gradients(model: Any, loss: Callable[[], Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Return the gradient of every adapter parameter."""
    model.zero_grad()
    torch.manual_seed(seed)
    loss().backward()
    return {name: weight.grad.clone() for name, weight in adapter_parameters(model) if weight.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert that two sets of gradients are the same."""
    assert found.keys() == expected.keys() and expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: name + text)


class Saved(NamedTuple):
    """What the fixture ``saved`` made: a trained adapter in a directory, its base model, logits without and with it."""

    directory: Path
    base: Path
    before: Tensor
    after: Tensor
    model: Any


def read_base(directory: Path, family: str, **more: Any) -> Any:
    """Return the model of a family that lies in a directory."""
    implementation = {"experts_implementation": "eager"} if family in MOE else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **implementation, **more)


_READ: dict[Path, Any] = {}


def load_base(directory: Path, family: str) -> Any:
    """Return a copy of what was read from a directory, which is read once."""
    if directory not in _READ:
        _READ[directory] = read_base(directory, family)
    return copy.deepcopy(_READ[directory])
