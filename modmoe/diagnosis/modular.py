"""Checks inside a tied or packed checkpoint: its fields fit together, and its tables of modules fit the fields."""

# Shapes: E experts, S modules stored by the layer, R modules of an expert

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from modmoe.diagnosis.files import Weights
from modmoe.diagnosis.findings import Findings
from modmoe.errors import ModmoeError
from modmoe.models.families import layers_of
from modmoe.models.ffn_layout import prefix_of

_RESTORE = "restore config.json from the run that wrote it, or convert again"
_CONVERT = "fetch the weights again, or convert again"
_COUNTS = ("num_modules", "module_size", "num_experts", "num_experts_per_tok", "modules_per_expert")
_WORDS = {
    "routing": ("token", "sequence", "task"),
    "combine": ("union", "sum"),
    "router_kind": ("linear", "mlp"),
}


def check_modular(directory: Path, config: dict[str, Any], weights: Weights, findings: Findings) -> None:
    """Check the fields of ModularMoE, and then membership and ranking of every layer.

    A packed checkpoint keeps the fields under ``modular``, and its membership beside the router.
    """
    place = directory / "config.json"
    fields = config["modular"] if isinstance(config.get("modular"), dict) else config
    wrong = [key for key in _COUNTS if not _is_count(fields.get(key))]
    for key in wrong:
        findings.fault(f"{place}: {key}", f"is {fields.get(key)!r}, not a whole number above 0", _RESTORE)
    stored = fields.get("stored_modules")
    if not isinstance(stored, list) or not all(_is_count(item) for item in stored):
        findings.fault(f"{place}: stored_modules", "is no list of numbers above 0, one a layer", _RESTORE)
        stored = None
    if not wrong and stored is not None:
        for key, text in _misfits(config, fields, stored):
            findings.fault(f"{place}: {key}", text, _RESTORE)
        layers = min(len(stored), len(weights.where))
        for layer in range(layers):
            _check_layer(directory, {**config, **fields}, layer, stored[layer], weights, findings)
        findings.checked["layers of modules"] = layers


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _misfits(config: dict[str, Any], fields: Mapping[str, Any], stored: list[int]) -> Iterator[tuple[str, str]]:
    """Yield a key and the problem with it, one for each fault."""
    modules, size, experts = fields["num_modules"], fields["module_size"], fields["num_experts"]
    neurons, names, per_expert = fields.get("dense_intermediate_size"), fields.get("expert_names"), None
    if modules * size != neurons:
        yield "module_size", f"{modules} modules of {size} neurons are not the {neurons} of dense_intermediate_size"
    if fields["num_experts_per_tok"] > experts:
        yield "num_experts_per_tok", f"is {fields['num_experts_per_tok']}, more than the {experts} experts"
    per_expert, shared = fields["modules_per_expert"], fields.get("shared_modules", 0)
    if per_expert > max(stored, default=0):
        yield "modules_per_expert", f"is {per_expert}, more than any layer stores"
    if not isinstance(shared, int) or not 0 <= shared <= per_expert:
        yield "shared_modules", f"is {shared!r}, not between 0 and the {per_expert} modules of an expert"
    if max(stored, default=0) > modules:
        yield "stored_modules", f"a layer stores {max(stored)} of {modules} modules"
    try:
        layers = layers_of(config)
    except ModmoeError:
        layers = len(stored)  # reported where the model is built
    if layers != len(stored):
        yield "stored_modules", f"is of {len(stored)} layers, and the model has {layers}"
    if names is not None and (
        not isinstance(names, list) or len(names) != experts or len(set(map(str, names))) < experts
    ):
        yield "expert_names", f"does not give each of {experts} experts a name of its own"
    for key, words in _WORDS.items():
        if fields.get(key, words[0]) not in words:
            yield key, f"is {fields.get(key)!r}, none of {', '.join(words)}"
    if (fields.get("router_kind", "linear") == "mlp") != bool(fields.get("router_hidden", 0)):
        yield "router_hidden", f"is {fields.get('router_hidden')!r}, where router_kind is {fields.get('router_kind')!r}"
    default = fields.get("default_expert")
    if default is not None and isinstance(names, list) and default not in names:
        yield "default_expert", f"is {default!r}, none of expert_names"


def _check_layer(
    directory: Path, config: Mapping[str, Any], layer: int, stored: int, weights: Weights, findings: Findings
) -> None:
    prefix = prefix_of(config, layer)
    name = next((prefix + end for end in ("membership", "router.membership") if prefix + end in weights.where), None)
    if name is None:
        return  # reported where names are checked
    place, experts = f"{directory / weights.where[name]}: '{name}'", int(config["num_experts"])
    if weights.shape(name) != (experts, stored):
        wrong = f"has shape {list(weights.shape(name))}, and config.json says {experts} experts of {stored} modules"
        findings.fault(place, wrong, _RESTORE)
        return
    try:
        member_ES = weights[name]
    except Exception:  # of whatever kind, and told where values are read
        return
    if not bool(((member_ES == 0) | (member_ES == 1)).all()):
        findings.fault(place, "has values other than 0 and 1", _CONVERT)
        return
    member_ES = member_ES.bool()
    orphans = (~member_ES.any(0)).nonzero().flatten().tolist()
    if orphans:
        findings.fault(place, f"no expert has {_numbers('module', orphans)}, which are stored", _CONVERT)
    counts_E, each = member_ES.sum(1), min(int(config["modules_per_expert"]), stored)
    others = (counts_E != each).nonzero().flatten().tolist()
    if others:
        text = f"{_numbers('expert', others)}: {counts_E[others[0]]} modules, where modules_per_expert is {each}"
        findings.fault(place, text, _CONVERT)
    shared = config.get("shared_modules")
    if isinstance(shared, int) and int(member_ES.all(0).sum()) < shared:
        findings.fault(place, f"fewer modules than shared_modules, {shared}, are in every expert", _CONVERT)
    _check_ranking(directory, f"{prefix}ranking", member_ES, weights, findings)


def _check_ranking(directory: Path, name: str, member_ES: torch.Tensor, weights: Weights, findings: Findings) -> None:
    """Check that each expert's ranking is its own modules, each once."""
    if name not in weights.where:
        return
    place = f"{directory / weights.where[name]}: '{name}'"
    try:
        ranking_ER = weights[name].long()
    except Exception:  # of whatever kind, and told where values are read
        return
    if ranking_ER.dim() != 2 or len(ranking_ER) != len(member_ES):
        findings.fault(place, f"has shape {list(ranking_ER.shape)}, not one row an expert", _CONVERT)
        return
    stored = member_ES.shape[1]
    if ranking_ER.numel() and not 0 <= int(ranking_ER.min()) <= int(ranking_ER.max()) < stored:
        findings.fault(place, f"names modules outside 0 to {stored - 1}, those that are stored", _CONVERT)
        return
    held_ES = torch.zeros_like(member_ES).scatter(1, ranking_ER, True)
    others = (held_ES != member_ES).any(1).nonzero().flatten().tolist()
    if others:
        findings.fault(place, f"{_numbers('expert', others)}: other modules than in membership", _CONVERT)


def _numbers(word: str, numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:5])) + (", ..." if len(numbers) > 5 else "")
    return f"{word}{'s' if len(numbers) > 1 else ''} {shown}"
