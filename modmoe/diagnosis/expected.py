"""The tensors that config.json implies: the model is built without memory, from classes that are known here.

No code of the checkpoint is executed: an architecture that brings its own is not built, and that is said.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modmoe.accounting import routed_of
from modmoe.checkpoint import ADAPTER_CONFIG, MANIFEST
from modmoe.diagnosis.files import FETCH, Weights
from modmoe.diagnosis.findings import Findings
from modmoe.errors import ModmoeError, reason_of
from modmoe.families import layers_of
from modmoe.loading import TIED_PREFIX, own_code, skeleton

_RESTORE = "restore config.json, or the weights that belong to it"


def check_expected(directory: Path, config: dict[str, Any], weights: Weights, findings: Findings) -> None:
    """Compare names and shapes of the tensors with those of the model that ``config`` describes."""
    place = directory / "config.json"
    reason = _why_not(config)
    if reason:
        findings.checked["names and shapes"] = f"no: {reason}"
        findings.note(f"{place}: {reason}, so names and shapes were not checked against it")
        return
    model_type = config.get("model_type")
    if not str(model_type).startswith(TIED_PREFIX) and model_type not in CONFIG_MAPPING:
        findings.fault(f"{place}: model_type", f"transformers knows no '{model_type}'", "restore it, or update")
        return
    size = _too_large(config, weights)
    if size:
        findings.fault(place, size, _RESTORE)
        return
    try:
        with _quiet():
            model = implied_model(directory)
            state = revert_weight_conversion(model, model.state_dict())
        expected = {name: tuple(tensor.shape) for name, tensor in state.items()}
    except Exception as error:  # of every kind: the configuration may say anything
        findings.checked["names and shapes"] = "no: config.json describes no model"
        if not any(fault.place.startswith(str(place)) for fault in findings.faults):
            findings.fault(place, f"no model can be built from it ({reason_of(error)})", _RESTORE)
        return
    _compare(directory, model, expected, weights, findings)


def _why_not(config: dict[str, Any]) -> str:
    if own_code(config):
        return "the architecture is defined by Python files of its own, which are not executed"
    if "quantization_config" in config:
        return "the weights are quantized"
    return ""


def _too_large(config: Mapping[str, Any], weights: Weights) -> str:
    """Return what no tensors here can be of, before a model of that size is built."""
    largest = max((size for name in weights.where for size in weights.shape(name)), default=0)
    text = config.get("text_config")
    try:
        layers = layers_of(text if isinstance(text, dict) and "num_hidden_layers" not in config else dict(config))
    except ModmoeError as error:
        return str(error)
    if not 0 < layers <= len(weights.where):
        return f"says {layers} layers, and there are {len(weights.where)} tensors"
    experts = routed_of(config)[0]
    if experts > max(largest, len(weights.where)):
        return f"says {experts} experts, more than any tensor has rows"
    return ""


def implied_model(directory: Path) -> Any:
    """Return the model that config.json describes, without values; nothing else of the directory is read."""
    with tempfile.TemporaryDirectory(prefix="modmoe-doctor-") as alone:
        shutil.copyfile(directory / "config.json", Path(alone) / "config.json")
        return skeleton(Path(alone))


def _compare(
    directory: Path, model: Any, expected: dict[str, tuple[int, ...]], weights: Weights, findings: Findings
) -> None:
    prefix = str(getattr(model, "base_model_prefix", ""))
    found = _model_names(weights.where, expected, prefix)
    lost = _model_names(weights.lost, expected, prefix)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    # what a model fills in itself: rankings of checkpoints that were written without them
    missing = [name for name in expected.keys() - found.keys() - lost.keys() - tied if not name.endswith(".ranking")]
    extra = found.keys() - expected.keys() - tied - {name for name, _ in model.named_buffers()}
    misshapen = [name for name in expected.keys() & found.keys() if weights.shape(found[name]) != expected[name]]
    if (missing or extra) and not misshapen and not (directory / MANIFEST).is_file() and _loads(directory, model):
        missing, extra = [], set()  # names of an older convention, which transformers translates
    place = directory / "config.json"
    if weights.is_whole:
        names = [name for name in missing if name not in findings.told]
        findings.fault_of_each(place, sorted(names), "is implied here and in no file", FETCH)
    wrong = {found[name]: "is no tensor of the model that config.json describes" for name in extra}
    for name in misshapen:
        stored, shape = found[name], list(expected[name])
        wrong[stored] = f"has shape {list(weights.shape(stored))}, and config.json implies {shape}"
    alike: dict[tuple[str, str], list[str]] = {}
    for stored, text in sorted(wrong.items()):
        if stored not in findings.told:
            alike.setdefault((weights.where[stored], text), []).append(stored)
    for (file, text), names in alike.items():
        findings.fault_of_each(directory / file, names, text, _RESTORE)
    findings.checked["names and shapes"] = len(expected)
    _check_types(directory, model, found, weights, findings)


def _model_names(stored: Iterable[str], expected: Mapping[str, Any], prefix: str) -> dict[str, str]:
    """Return the model's name of each tensor to the stored one: a base model may be saved without its prefix."""
    names = list(stored)
    if not prefix or any(name.startswith(f"{prefix}.") for name in names):
        return {name: name for name in names}
    return {f"{prefix}.{name}" if f"{prefix}.{name}" in expected else name: name for name in names}


def _loads(directory: Path, model: Any) -> bool:
    """Return whether transformers itself finds every tensor; nothing is read but headers."""
    if (directory / ADAPTER_CONFIG).is_file():
        return False  # it would load that adapter too
    try:
        with _quiet():
            _, info = type(model).from_pretrained(
                directory, config=model.config, device_map="meta", output_loading_info=True
            )
    except Exception:  # of every kind: then it does not load
        return False
    return not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


def _check_types(directory: Path, model: Any, found: Mapping[str, str], weights: Weights, findings: Findings) -> None:
    """Report tensors that hold whole numbers where the model has fractions, or the reverse."""
    wanted = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    named = str(model.config.dtype or "").removeprefix("torch.")
    other: dict[str, list[str]] = {}
    for name, stored in found.items():
        dtype = weights.dtype(stored)
        if name not in wanted or dtype is None:
            continue
        should = wanted[name].dtype
        place = f"{directory / weights.where[stored]}: '{stored}'"
        if should.is_floating_point != dtype.is_floating_point or (should == torch.bool) != (dtype == torch.bool):
            findings.fault(place, f"has type {_word(dtype)}, where the model has {_word(should)}", _RESTORE)
        elif dtype.is_floating_point and named and _word(dtype) != named:
            other.setdefault(_word(dtype), []).append(stored)
    for kind, names in other.items():
        findings.note(f"{directory}: {len(names)} tensors are {kind}, and dtype in config.json is {named}")


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' reports of what it misses off the terminal: they are told here, one line each."""
    logger = logging.getLogger("transformers")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)
