"""The tensors that config.json implies: the model is built without memory, from installed classes.

No code of the checkpoint is executed: an architecture with code of its own is not built, which the result says.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modmoe.diagnosis.files import FETCH, Weights
from modmoe.diagnosis.findings import Findings
from modmoe.errors import ModmoeError, reason_of
from modmoe.models.counts import routed_of
from modmoe.models.families import layers_of
from modmoe.models.implied import Fit, compare, model_names, quiet
from modmoe.models.loading import TIED_PREFIX, own_code, skeleton
from modmoe.storage.kinds.faults import find_problems
from modmoe.storage.kinds.headers import Headers
from modmoe.storage.scratch import scratch_directory

_RESTORE = "restore config.json, or the weights that belong to it"


def check_expected(directory: Path, config: dict[str, Any], weights: Weights, findings: Findings) -> None:
    """Compare names and shapes of the tensors with those of the model that ``config`` describes."""
    place = directory / "config.json"
    reason = _why_not(directory, config, weights.headers())
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
        with quiet():
            model = implied_model(directory)
        fit = compare(directory, model, weights.shape, weights.where)
    except Exception as error:  # any kind of error: the configuration may hold anything
        findings.checked["names and shapes"] = "no: config.json describes no model"
        if not any(fault.place.startswith(str(place)) for fault in findings.faults):
            findings.fault(place, f"no model can be built from it ({reason_of(error)})", _RESTORE)
        return
    _compare(directory, model, fit, weights, findings)


def _why_not(directory: Path, config: dict[str, Any], headers: Headers) -> str:
    if own_code(config):
        return "the architecture is defined by Python files of its own, which are not executed"
    if any(find_problems(directory, config, headers)):
        return "its tensors are not those of a model that can be used"
    return ""


def _too_large(config: Mapping[str, Any], weights: Weights) -> str:
    """Return why the tensors cannot be of the model that config.json describes, before such a model is built."""
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
    with scratch_directory("doctor") as alone:
        shutil.copyfile(directory / "config.json", alone / "config.json")
        return skeleton(alone)


def _compare(directory: Path, model: Any, fit: Fit, weights: Weights, findings: Findings) -> None:
    lost = model_names(weights.lost, fit.implied, str(getattr(model, "base_model_prefix", "")))
    missing = [name for name in fit.missing if name not in lost]
    place = directory / "config.json"
    if weights.is_whole:
        names = [name for name in missing if name not in findings.told]
        findings.fault_of_each(place, sorted(names), "is implied here and in no file", FETCH)
    wrong = dict.fromkeys(fit.extra, "is no tensor of the model that config.json describes")
    for name in fit.misshapen:
        stored, shape = fit.found[name], list(fit.implied[name])
        wrong[stored] = f"has shape {list(weights.shape(stored))}, and config.json implies {shape}"
    alike: dict[tuple[str, str], list[str]] = {}
    for stored, text in sorted(wrong.items()):
        if stored not in findings.told:
            alike.setdefault((weights.where[stored], text), []).append(stored)
    for (file, text), names in alike.items():
        findings.fault_of_each(directory / file, names, text, _RESTORE)
    findings.checked["names and shapes"] = len(fit.implied)
    _check_types(directory, model, fit.found, weights, findings)


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
