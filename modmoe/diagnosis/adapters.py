"""An adapter alone, as PEFT writes it: its file, its values, and whether it fits a base model on this disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from modmoe.diagnosis.companions import check_use
from modmoe.diagnosis.contents import check_values
from modmoe.diagnosis.expected import implied_model
from modmoe.diagnosis.files import FETCH, Weights, open_file, read_json
from modmoe.diagnosis.findings import Findings
from modmoe.errors import ModmoeError, reason_of
from modmoe.models.adapter_config import adapter_method
from modmoe.models.loading import TOKENIZER, open_tokenizer, own_code
from modmoe.storage.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, is_adapter, local_base, read_config


def check_adapter(directory: Path, findings: Findings, report: Any = None) -> None:
    """Check an adapter directory; nothing of the base model is read but its configuration."""
    place = directory / ADAPTER_CONFIG
    settings = read_json(place, findings)
    weights = Weights()
    if not (directory / ADAPTER_WEIGHTS).is_file():
        findings.fault(directory / ADAPTER_WEIGHTS, "is missing", FETCH)
    elif open_file(directory / ADAPTER_WEIGHTS, weights, findings):
        check_values(directory, weights, None, findings, report)
    findings.checked["tensors"] = len(weights.where)
    if settings is None:
        return
    if any((directory / name).is_file() for name in TOKENIZER):
        check_use(directory, findings, open_tokenizer)
    try:
        base = local_base(directory)
        if base is None:
            findings.note(
                f"{place}: the base model {settings['base_model_name_or_path']} is not on this disk, so "
                "names and shapes were not checked against it"
            )
        elif is_adapter(base):
            findings.fault(f"{place}: base_model_name_or_path", f"{base} is an adapter itself", "name its base model")
            base = None
    except ModmoeError as error:
        findings.fault(place, str(error).removeprefix(f"{place}: "), "write the base model's directory or Hub id there")
        return
    if str(settings.get("peft_type")).startswith("MODMOE_"):
        try:
            adapter_method(directory)
        except ModmoeError as error:
            findings.fault(f"{place}: peft_type", str(error).removeprefix(f"{place}: "), "update modmoe, or mend it")
            return
    if base is not None and weights.where:
        _check_fit(directory, base, weights, findings)


def _check_fit(directory: Path, base: Path, weights: Weights, findings: Findings) -> None:
    """Compare names and shapes with those that the settings imply on the base model."""
    place = directory / ADAPTER_CONFIG
    try:
        config = read_config(base)
        if own_code(config):
            findings.note(f"{base}: is defined by Python files of its own, so names were not checked against it")
            return
        expected = _implied(directory, base)
    except Exception as error:  # any kind of error: both configurations may hold anything
        wrong = f"it cannot be attached to {base} ({reason_of(error)})"
        findings.fault(place, wrong, "name the base model it was made for")
        return
    remedy = "restore adapter_config.json, or fetch the adapter again"
    missing = [name for name in expected if name not in weights.where]
    findings.fault_of_each(place, missing, "is implied here and not in the file", remedy)
    for name in weights.where:
        where = f"{directory / ADAPTER_WEIGHTS}: '{name}'"
        if name not in expected:
            findings.fault(where, "is no tensor of the adapter that adapter_config.json describes", remedy)
        elif weights.shape(name) != expected[name]:
            wrong = f"has shape {list(weights.shape(name))}, and {list(expected[name])} is implied"
            findings.fault(where, wrong, remedy)
    findings.checked["names and shapes"] = len(expected)


def _implied(directory: Path, base: Path) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of the adapter's tensors as PEFT would save them; no memory is allocated."""
    import torch
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    import modmoe.adapters  # noqa: F401 (makes the methods known to peft)

    settings = PeftConfig.from_pretrained(str(directory))
    model = implied_model(base)
    model.name_or_path = (
        settings.base_model_name_or_path
    )  # the name that the adapter records, not that of the model built here
    with torch.device("meta"):
        state = get_peft_model_state_dict(get_peft_model(model, settings))
    return {name: tuple(tensor.shape) for name, tensor in state.items()}
