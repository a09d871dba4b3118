"""An adapter directory that is exported: its base model, the options, and the result of writing one form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from modmoe.adapters.mechanism.attach import Site
from modmoe.errors import ExportError
from modmoe.formats.tied_code import own_files
from modmoe.models.loading import load
from modmoe.storage.checkpoint import Checkpoint

NAME_IN_PEFT = "default"
"""The name that PEFT gives to an adapter that it loads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """An adapter directory and the options of its export."""

    directory: Path
    base: Checkpoint
    """The model that the adapter belongs to."""
    method: str
    dtype: torch.dtype | None
    """Type of the base model's weights in the export; None for their own."""
    trust_remote_code: bool

    def load(self, dtype: torch.dtype | None = None) -> Any:
        """Return the PeftModel on the CPU, in a type that holds its weights exactly; None for their own."""
        return load(self.directory, dtype=dtype, device="cpu", trust_remote_code=self.trust_remote_code)

    def reference(self, dtype: torch.dtype) -> Any:
        """Return the causal LM with its adapters, the base model's weights rounded to ``dtype``."""
        return cast_base(self.load().get_base_model(), dtype)


@dataclass(slots=True, kw_only=True)
class Written:
    """The result of writing one form, and how it is proved."""

    target: str
    reference: Callable[[torch.dtype], Any]
    stored: torch.dtype
    """Type of the weights that are not the adapters'."""
    options: dict[str, Any] = field(default_factory=dict)
    """Keywords of the proof."""
    warnings: list[str] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    """Keys that this form adds to the result."""


def sites_of(base: nn.Module) -> list[Site]:
    """Return the sites that have the adapter, in the model's order."""
    return [site for site in base.modules() if isinstance(site, Site) and site.path and NAME_IN_PEFT in site.adapters]


def put_saved_in(base: Any) -> Any:
    """Put the layers that were trained whole (PEFT's ``modules_to_save``) where they belong; return the model."""
    for path, wrapper in list(base.named_modules()):
        if isinstance(wrapper, ModulesToSaveWrapper):
            dtype = next(wrapper.original_module.parameters()).dtype
            base.set_submodule(path, wrapper.modules_to_save[NAME_IN_PEFT].to(dtype))
    return base


def untied_state(base: Any) -> dict[str, Tensor]:
    """Return a model's tensors by name; tensors that are tied appear once.

    Raises ExportError where the base model ties tensors that training has made different.
    """
    state: dict[str, Tensor] = base.state_dict()
    for name, other in (getattr(base, "all_tied_weights_keys", None) or {}).items():
        if name in state and other in state:
            if not torch.equal(state[name], state[other]):
                raise ExportError(
                    "modules_to_save",
                    f"'{name}' was trained apart from '{other}', to which the base model ties it",
                    "only --form adapter can hold that",
                )
            del state[name]
    return state


def cast_base(base: Any, dtype: torch.dtype) -> Any:
    """Round the base model's weights to ``dtype``; adapters and buffers stay as they are. Return the model."""
    for name, weight in base.named_parameters():
        if "routed_" not in name and weight.is_floating_point():
            weight.data = weight.data.to(dtype)
    return base


def write_own_files(source: Source, partial: Path) -> None:
    """Write the Python files of the base model's architecture, if it has its own."""
    for name, text in own_files(source.base.config, source.base.directory).items():
        (partial / name).write_text(text, encoding="utf-8")


def stored_type(base: Checkpoint) -> torch.dtype:
    """Return the type that the base model is loaded in."""
    named = base.config.get("dtype", base.config.get("torch_dtype"))
    found = getattr(torch, str(named).removeprefix("torch."), None) if named else None
    return found if isinstance(found, torch.dtype) else base.dtype(next(iter(base)))
