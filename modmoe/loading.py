"""Models and tokenizers from a checkpoint: dense ones by transformers, tied ones by the classes in this package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modmoe.checkpoint import Checkpoint, read_config, resolve_source
from modmoe.errors import CheckpointError, RecipeError
from modmoe.modeling import modeling_modmoe

TIED_PREFIX = "modmoe_"


def pick_device(device: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``; RecipeError where there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device: no CUDA device here; pass --device cpu.")
    return torch.device(device)


def is_tied(directory: Path) -> bool:
    """Return whether a directory holds a ModularMoE checkpoint."""
    return str(read_config(directory).get("model_type", "")).startswith(TIED_PREFIX)


def load(
    source: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    revision: str | None = None,
) -> PreTrainedModel:
    """Load a causal LM, dense or tied, in evaluation mode.

    A tied model is built from this package's classes: the code that lies beside its weights is not executed. Code of
    an architecture of the checkpoint's own is executed with ``trust_remote_code`` only. ``dtype`` None keeps the
    checkpoint's.

    Raises:
        CheckpointError: the checkpoint is damaged, unknown, or has own code and is not trusted.
        RecipeError: ``device`` is not to be had.
    """
    where = pick_device(device)
    directory = resolve_source(source, revision)
    Checkpoint(directory)  # damage is told in one line before transformers sees it
    config = read_config(directory)
    _check_code(directory, config, trust_remote_code)
    kwargs: dict[str, Any] = {"dtype": dtype or "auto"}
    try:
        if is_tied(directory):
            model_type, config_type = _tied_classes(directory, config)
            model = model_type.from_pretrained(directory, config=config_type.from_pretrained(directory), **kwargs)
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=trust_remote_code, **kwargs)
    except (ValueError, KeyError, RuntimeError, OSError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: transformers cannot load it: {reason[:300]}") from error
    loaded: PreTrainedModel = model.eval().to(where)
    return loaded


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load the tokenizer that lies beside a checkpoint; CheckpointError where there is none."""
    directory = resolve_source(source, revision)
    config = read_config(directory)
    if str(config.get("model_type", "")).startswith(TIED_PREFIX) and not own_code(config):
        # transformers asks for the configuration of the type, and warns where it knows none
        kind = _tied_classes(directory, config)[1]
        AutoConfig.register(kind.model_type, kind, exist_ok=True)
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{directory}: no usable tokenizer: {reason[:200]}") from error


def own_code(config: dict[str, Any]) -> dict[str, str]:
    """Return the auto_map of an architecture that transformers does not know, else nothing."""
    dense = config.get("dense_config") if str(config.get("model_type", "")).startswith(TIED_PREFIX) else config
    dense = dense if isinstance(dense, dict) else {}
    auto_map = dense.get("auto_map")
    if dense.get("model_type") in CONFIG_MAPPING or not isinstance(auto_map, dict):
        return {}
    return {key: value for key, value in auto_map.items() if isinstance(value, str)}


def _check_code(directory: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    model_type = config.get("model_type")
    code = own_code(config)
    if code and "AutoConfig" not in code:
        raise CheckpointError(f"{directory}/config.json: auto_map lacks AutoConfig.")
    if code and "AutoModelForCausalLM" not in code:
        raise CheckpointError(
            f"{directory}/config.json: auto_map lacks AutoModelForCausalLM; only causal LMs are known."
        )
    if code and not trust_remote_code:
        raise CheckpointError(
            f"{directory}: '{model_type}' is defined by Python files in the checkpoint "
            f"({code.get('AutoModelForCausalLM')}); "
            "read them, then pass --trust-remote-code to execute them."
        )
    if not code and not str(model_type).startswith(TIED_PREFIX) and model_type not in CONFIG_MAPPING:
        raise CheckpointError(f"{directory}: transformers does not know model_type '{model_type}'.")


def _tied_classes(directory: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    code = own_code(config)
    if code:
        base = get_class_from_dynamic_module(code["AutoModelForCausalLM"], directory)
        model_type: Any = modeling_modmoe.model_class(base)
        return model_type, model_type.config_class
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not str(names[0]).startswith("ModMoE"):
        raise CheckpointError(f"{directory}/config.json: architectures is {names!r}; it must name one causal LM.")
    model_type = getattr(modeling_modmoe, str(names[0]))
    return model_type, model_type.config_class


@dataclass(frozen=True, slots=True)
class DenseClasses:
    """The classes of a dense architecture."""

    config: Any
    model: Any
    """The model without a head; None where own code names none."""
    causal_lm: Any


def dense_classes(source: Path, *, trust_remote_code: bool) -> DenseClasses:
    """Return a dense checkpoint's classes, executing own code only if trusted; CheckpointError otherwise."""
    config = read_config(source)
    _check_code(source, config, trust_remote_code)
    code = own_code(config)
    if code:
        found = {key: get_class_from_dynamic_module(value, source) for key, value in code.items()}
        return DenseClasses(found["AutoConfig"], found.get("AutoModel"), found["AutoModelForCausalLM"])
    kind = type(AutoConfig.from_pretrained(source))
    if kind not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(f"{source}: '{config.get('model_type')}' has no causal language model in transformers.")
    return DenseClasses(kind, AutoModel._model_mapping[kind], AutoModelForCausalLM._model_mapping[kind])
