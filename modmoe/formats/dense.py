"""The dense export: one expert as a plain model of the source's own family, with fewer neurons.

At top_k 1 an expert is `sum_{j in S_e} F_j(x) + bias`, which is a dense FFN of those modules' neurons. The layout goes
back to the family's own: gate and up in one tensor, transposed weights, OPT's two linear layers in a decoder layer.
"""

# Shapes: D model width, F neurons stored, N neurons of the expert, S modules stored, E experts

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.errors import CheckpointError, ExportError, did_you_mean
from modmoe.modeling.configuration_modmoe import ModularFields
from modmoe.models.families import FAMILIES, Family, family_of, layers_of
from modmoe.models.ffn_layout import dense_layout, neuron_ops, plain_layout, prefix_of
from modmoe.models.loading import own_code
from modmoe.recipe.schema import load_recipe
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Copy, Op, Plan, Shape

RECIPE = "modmoe.yaml"
_RESTORED = ("model_type", "architectures", "auto_map")


@dataclass(frozen=True, slots=True, eq=False)
class FoldMeans:
    """A bias plus the mean outputs of the modules that are always skipped; ``bias`` None stands for zero."""

    bias: str | None
    means: str
    skipped: Tensor
    """int64; the modules of ``means`` to add."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the source tensors that it reads."""
        return (self.means,) if self.bias is None else (self.bias, self.means)

    def shape(self, shapes: Mapping[str, Shape]) -> Shape:
        """Return [D]; ValueError where bias and means differ in width."""
        width = shapes[self.means][1:]
        if self.bias is not None and shapes[self.bias] != width:
            raise ValueError(f"is {shapes[self.bias]} where the means are {width} wide")
        return width

    def dtype_of(self, dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
        """Return the means' type."""
        return dtypes[self.means]

    def make(self, source: Mapping[str, Tensor]) -> Tensor:
        """Return the bias with the means added, summed in float32 at least."""
        means_SD = source[self.means]
        high = torch.promote_types(means_SD.dtype, torch.float32)
        folded_D = means_SD.to(high)[self.skipped].sum(0)
        if self.bias is not None:
            folded_D = folded_D + source[self.bias].to(high)
        return folded_D.to(means_SD.dtype)


def dense_plan(tied: Checkpoint, family: Family, expert: str) -> Plan:
    """Return the plan of the dense model that computes what ``tied`` computes with ``expert`` alone.

    Reads headers and the memberships. Routers, the other experts' modules and our configuration keys are left out.

    Args:
        tied: a ModularMoE checkpoint, whatever its routing.
        family: the dense model's row, as ``family_of_tied`` gives it.
        expert: a name in ``expert_names``.

    Raises:
        ExportError: no such expert, experts of unequal width, or a compensation that the family has no bias for.
    """
    number = expert_number(tied.config, expert)
    ops: dict[str, Op] = {}
    replaced: set[str] = set()
    widths: set[int] = set()
    adds_bias = False
    for layer in range(layers_of(tied.config)):
        stored = plain_layout(prefix_of(tied.config, layer))
        neurons_N = expert_neurons(tied, layer, number)
        widths.add(len(neurons_N))
        ops.update(neuron_ops(tied, stored, dense_layout(family, layer), neurons_N))
        if tied.config.get("compensation", False):
            adds_bias |= "down" not in stored.biased_roles(tied)
            ops.update(_compensation_ops(tied, family, layer, number, len(neurons_N)))
        replaced.update(name for name in tied if name.startswith(stored.prefix))
    if len(widths) != 1:
        raise ExportError(str(tied.directory), f"expert '{expert}' has {sorted(widths)} neurons", "layers must agree")
    kept: dict[str, Op] = {_kept_name(name, family): Copy(name) for name in tied if name not in replaced}
    config = dense_config(tied.config)
    config[family.width] = widths.pop()
    if adds_bias:
        config["mlp_bias"] = True
    used = {name for op in ops.values() for name in op.inputs}
    return Plan(config, {**kept, **ops}, frozenset(replaced - used))


def expert_number(config: Mapping[str, Any], expert: str) -> int:
    """Return an expert's number by its name; ExportError, with the nearest name, where there is none."""
    names: list[str] = list(config.get("expert_names") or [])
    if expert not in names:
        raise ExportError("expert", f"no expert '{expert}'", did_you_mean(expert, names))
    return names.index(expert)


def expert_neurons(tied: Checkpoint, layer: int, expert: int) -> Tensor:
    """Return the numbers of the stored neurons that an expert has in a layer, in the order stored."""
    member_ES = tied[f"{prefix_of(tied.config, layer)}membership"]
    modules_R = member_ES[expert].nonzero().squeeze(-1)
    size = int(tied.config["module_size"])
    return (modules_R[:, None] * size + torch.arange(size)).flatten()


def dense_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration as it was before conversion, except for the width; dtype and token ids are kept."""
    ours = {field.name for field in dataclasses.fields(ModularFields)}
    plain = {key: copy.deepcopy(value) for key, value in config.items() if key not in ours}
    before = config.get("dense_config") or {}
    for key in _RESTORED:
        plain.pop(key, None)
        if before.get(key) is not None:
            plain[key] = copy.deepcopy(before[key])
    if not own_code(dict(config)):
        # some checkpoints name files for an architecture that transformers knows as well; exports do not carry those
        plain.pop("auto_map", None)
    if "model_type" not in plain:
        raise ExportError("config.json", "dense_config lacks model_type, so the dense architecture is not known")
    return plain


def family_of_tied(tied: Checkpoint) -> Family:
    """Return the dense family's row: from config.json, from the table, or from the recipe beside the weights.

    Raises ExportError where none of them says where the FFNs of the dense architecture lie.
    """
    before = tied.config.get("dense_config") or {}
    described = before.get("family")
    if isinstance(described, dict):
        return family_of(before, described)
    if before.get("model_type") in FAMILIES:
        return FAMILIES[before["model_type"]]
    recipe = tied.directory / RECIPE
    if recipe.is_file():
        described = load_recipe(recipe, {"trust_remote_code": False}, allow_code=True).family
        if described is not None:
            return family_of(before, described, str(recipe))
    raise ExportError(
        str(tied.directory),
        f"nothing says where '{before.get('model_type')}' keeps its FFNs",
        f"put `family:` of the recipe that converted it into {RECIPE} there, or use --form tied",
    )


def _kept_name(name: str, family: Family) -> str:
    """Return a name as the family's checkpoints have it: tied ones all call the output head ``lm_head``."""
    return f"{family.head}.{name.removeprefix('lm_head.')}" if name.startswith("lm_head.") else name


def _compensation_ops(tied: Checkpoint, family: Family, layer: int, expert: int, neurons: int) -> dict[str, Op]:
    """Return the down bias that holds the skipped modules' means, and the biases that a family wants with it."""
    stored, dense = plain_layout(prefix_of(tied.config, layer)), dense_layout(family, layer)
    means = f"{stored.prefix}means"
    member_S = tied[f"{stored.prefix}membership"][expert]
    # behind the modules' means, if it is there, stands what makes up for modules that no expert has
    never = tied.shape(means)[0] - len(member_S)
    skipped = torch.nn.functional.pad(~member_S, (0, never), value=True).nonzero().squeeze(-1)
    bias = stored.name("down", "bias")
    if bias in tied:
        return {dense.name("down", "bias"): FoldMeans(bias, means, skipped)}
    if family.model_type != "llama" or family.gate is None:
        raise ExportError(
            str(tied.directory),
            f"'{family.model_type}' has no bias to hold the compensation of skipped modules",
            "use --form tied, or convert again without compensation",
        )
    # Llama's mlp_bias gives all three projections a bias; those of gate and up are zero
    zeros = dense.zero_biases(neurons, tied.dtype(stored.name("up")))
    return {**zeros, dense.name("down", "bias"): FoldMeans(None, means, skipped)}


def source_of(directory: Path) -> str | None:
    """Return the dense checkpoint that the recipe beside a tied one names, or None."""
    recipe = directory / RECIPE
    if not recipe.is_file():
        return None
    try:
        return load_recipe(recipe, {"trust_remote_code": False}, allow_code=True).source
    except (CheckpointError, ValueError):
        return None
