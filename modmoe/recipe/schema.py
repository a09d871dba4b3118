"""The recipe: a tree of frozen dataclasses, made of a YAML file or flags. Unknown keys and wrong types are refused."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from modmoe.errors import RecipeError, did_you_mean
from modmoe.recipe.fields import build
from modmoe.storage.documents import MOST_YAML_BYTES, parse_yaml, read_text

Routing = Literal["token", "sequence", "task"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationRecipe:
    """How much text is run through the dense model."""

    tokens: int = 32768
    """Tokens of each task."""
    sequence_length: int = 256
    """Tokens of a sequence; longer documents are cut."""
    batch_size: int = 8
    """Sequences of a batch."""
    by_layer: bool | None = None
    """Hold one decoder layer in memory at a time; None: where the model takes over half of the memory that is free."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionRecipe:
    """How neurons are cut into modules."""

    method: str = "kmeans"
    """A name in PARTITIONERS of modmoe.analysis.partitions.table, or the dotted path of a partitioner."""
    num_modules: int = 16
    """Modules of each FFN; must divide its neurons."""
    module_size: int | None = None
    """Neurons of each module, in place of ``num_modules``; must divide the neurons of an FFN."""
    core_fraction: float = 0.0
    """Share of an expert's modules that hold the neurons that matter most over all tasks; the method cuts the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentRecipe:
    """Which modules make up which expert."""

    method: str = "top_score"
    """A name in ASSIGNMENTS of modmoe.conversion.modular.assignments."""
    score: str = "wanda"
    """Importance of a module for a task: magnitude, activation, wanda, wifv, taylor or output_norm."""
    num_experts: int | None = None
    """Experts; None means one a task. With one task they are clusters of its sequences."""
    modules_per_expert: int | None = None
    """Modules of each expert; None means ``active_fraction`` of all."""
    active_fraction: float = 0.5
    """Share of the modules that each expert has, where ``modules_per_expert`` is None."""
    shared_modules: int = 0
    """Modules that every expert has, counted in ``modules_per_expert``."""
    coverage: bool = False
    """Give every module to at least one expert, so that none is left out of the checkpoint."""
    refit: bool = False
    """Fit the down projections anew to the modules that are on, by least squares."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterRecipe:
    """How experts are chosen at run time, and what their outputs add up to."""

    routing: Routing = "token"
    """By token, by sequence, or by the task that the caller names (no router)."""
    top_k: int = 1
    """Experts chosen at once."""
    combine: Literal["union", "sum"] = "union"
    """``union``: a module counts once if any chosen expert has it. ``sum``: experts are weighted and added."""
    start: Literal["logistic", "ridge", "least_squares", "centroid", "average_key", "zero"] = "logistic"
    """What the router starts from."""
    kind: Literal["linear", "mlp"] = "linear"
    """One matrix, or two layers with a hidden width of 4 * num_experts, at least 16."""
    compensation: bool = False
    """Add, for each skipped module, the mean of its output given that it is skipped."""
    routing_chunk: int = 64
    """With sequence routing: tokens after which the choice is made anew where no prompt is marked."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsRecipe:
    """Which experts of an existing mixture of experts are left, where ``method`` is ``experts``."""

    num_experts: int | None = None
    """Experts that each layer keeps; it has no default."""
    assignment: Literal["prune", "merge"] = "prune"
    """``prune``: the experts of the highest score stay. ``merge``: experts of like outputs become one."""
    score: str = "reap"
    """Importance of an expert, a name in SCORES of modmoe.conversion.reduce_experts.reduction; merging has its own, the
    frequency."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpcycleRecipe:
    """How experts begin, where ``method`` is ``upcycle``; their number is ``assignment.num_experts``."""

    redrawn_fraction: float = 0.0
    """Share of each expert's neurons that are drawn anew: 0 copies the FFN, 0.5 is what Drop-Upcycling chose."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneRecipe:
    """How a model is trained after conversion."""

    train: Literal["router", "lora", "full", "adapters"] = "full"
    """What learns: routers, LoRA on the FFN's shared matrices (merged at the end), every weight, or adapters."""
    distill_from: str | None = None
    """The dense model whose next-token distributions are learned; None trains on the text alone."""
    distill_weight: float = 0.5
    """Share of the distillation loss in the sum with the loss on the text, 0 to 1."""
    temperature: float = 1.0
    """Temperature of both distributions in the distillation loss."""
    balance_weight: float = 0.01
    """Factor of the load-balance loss of token and sequence routers."""
    max_steps: int = 200
    """Optimiser steps."""
    learning_rate: float | None = None
    """Peak learning rate; None means 0.1 / hidden size (5e-5 to 1e-3), three times that for routers and LoRA."""
    batch_size: int = 8
    """Sequences of a step."""
    sequence_length: int = 256
    """Tokens of a training sequence."""
    packing: bool = True
    """Fill sequences with several rows where routing allows it."""
    warmup_fraction: float = 0.05
    """Share of the steps in which the learning rate rises."""
    lora_rank: int = 16
    """Rank of the LoRA matrices."""
    save_steps: int = 100
    """Steps between two states that ``--resume`` can go on from."""
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = "none"
    """What draws the curves of the losses and the routers as they grow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecipe:
    """Which routed adapter is attached, where ``method`` is ``adapters`` or adapters are trained."""

    method: str | None = None
    """A name in modmoe.adapters.CONFIGS."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Fields of the method's configuration, such as r, num_experts, top_k and target_modules."""
    budget: int | None = None
    """Trainable parameters to stay within; the rank (and the experts) that ``settings`` leaves open are solved for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All settings of a run; keys that are left out have their defaults."""

    source: str | None = None
    """A local directory or a Hub id of the dense checkpoint."""
    method: str = "modular"
    """modular; cmoe, moefication, emoe or llama_moe, the published splits; prune, to cut neurons; upcycle, to copy
    FFNs; experts, to prune or merge those of a mixture; adapters, to attach some."""
    tasks: dict[str, str] = field(default_factory=dict)
    """Task name to file; the name becomes the expert's name where experts are tasks."""
    calibration: CalibrationRecipe = CalibrationRecipe()
    """How much text is run through the dense model."""
    partition: PartitionRecipe = PartitionRecipe()
    """How neurons are cut into modules."""
    assignment: AssignmentRecipe = AssignmentRecipe()
    """Which modules make up which expert."""
    router: RouterRecipe = RouterRecipe()
    """How experts are chosen at run time."""
    experts: ExpertsRecipe = ExpertsRecipe()
    """Which experts of an existing mixture of experts are left."""
    upcycle: UpcycleRecipe = UpcycleRecipe()
    """How the experts of an upcycled model begin."""
    adapter: AdapterRecipe = AdapterRecipe()
    """Which routed adapter is attached."""
    finetune: FinetuneRecipe = FinetuneRecipe()
    """How the model is trained after conversion."""
    family: dict[str, Any] | None = None
    """Where an architecture that modmoe does not know keeps its FFNs: the fields of modmoe.models.families.Family."""
    seed: int = 0
    """Seed of all random numbers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where models run."""
    trust_remote_code: bool = False
    """Allow the checkpoint's own Python files to be executed."""

    def __post_init__(self) -> None:
        """Raise RecipeError for values that no run could use."""
        positive = {
            "calibration.tokens": self.calibration.tokens,
            "calibration.sequence_length": self.calibration.sequence_length,
            "calibration.batch_size": self.calibration.batch_size,
            "partition.num_modules": self.partition.num_modules,
            "router.top_k": self.router.top_k,
            "router.routing_chunk": self.router.routing_chunk,
            "finetune.max_steps": self.finetune.max_steps,
            "finetune.batch_size": self.finetune.batch_size,
            "finetune.sequence_length": self.finetune.sequence_length,
            "finetune.lora_rank": self.finetune.lora_rank,
            "finetune.save_steps": self.finetune.save_steps,
            "finetune.temperature": self.finetune.temperature,
        }
        may_be_none = {
            "assignment.num_experts": self.assignment.num_experts,
            "assignment.modules_per_expert": self.assignment.modules_per_expert,
            "experts.num_experts": self.experts.num_experts,
            "partition.module_size": self.partition.module_size,
            "adapter.budget": self.adapter.budget,
            "finetune.learning_rate": self.finetune.learning_rate,
        }
        positive |= {place: value for place, value in may_be_none.items() if value is not None}
        for place, value in positive.items():
            if not value > 0:
                raise RecipeError(place, f"{value} is not above 0")
            if value > _MOST.get(place, math.inf):
                raise RecipeError(place, f"{value:,} is more than the {_MOST[place]:,} that any model has use for")
        for part in ("calibration", "finetune"):
            sizes = getattr(self, part)
            if sizes.batch_size * sizes.sequence_length > _MOST_BATCH_TOKENS:
                raise RecipeError(
                    f"{part}.batch_size",
                    f"{sizes.batch_size:,} sequences of {sizes.sequence_length:,} tokens are more "
                    f"than {_MOST_BATCH_TOKENS:,} tokens at once",
                    "choose fewer",
                )
        self._check_shares()
        if self.assignment.shared_modules < 0:
            raise RecipeError("assignment.shared_modules", f"{self.assignment.shared_modules} is below 0")
        if self.finetune.balance_weight < 0:
            raise RecipeError("finetune.balance_weight", f"{self.finetune.balance_weight} is below 0")
        if not 0 <= self.seed < 2**31:
            raise RecipeError("seed", f"{self.seed} is not between 0 and {2**31 - 1}")
        for name in self.tasks:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
                raise RecipeError("tasks", f"'{name}' is no usable name", "use letters, digits, '_', '-' and '.'")

    def _check_shares(self) -> None:
        core, active = self.partition.core_fraction, self.assignment.active_fraction
        if not 0 <= core < 1:
            raise RecipeError("partition.core_fraction", f"{core} is not at least 0 and below 1")
        if not 0 < active <= 1:
            raise RecipeError("assignment.active_fraction", f"{active} is not above 0 and at most 1")
        for place, value in {
            "finetune.distill_weight": self.finetune.distill_weight,
            "finetune.warmup_fraction": self.finetune.warmup_fraction,
            "upcycle.redrawn_fraction": self.upcycle.redrawn_fraction,
        }.items():
            if not 0 <= value <= 1:
                raise RecipeError(place, f"{value} is not between 0 and 1")


_MOST = {
    "calibration.tokens": 10**10,
    "calibration.sequence_length": 2**22,
    "calibration.batch_size": 2**16,
    "partition.num_modules": 2**16,
    "router.top_k": 2**16,
    "router.routing_chunk": 2**22,
    "finetune.max_steps": 10**8,
    "finetune.batch_size": 2**16,
    "finetune.sequence_length": 2**22,
    "finetune.lora_rank": 2**14,
    "finetune.save_steps": 10**8,
    "assignment.num_experts": 2**16,
    "assignment.modules_per_expert": 2**16,
    "experts.num_experts": 2**16,
}
"""Bounds far beyond all existing models and texts; the bounds of one model are known when it is opened."""
_MOST_BATCH_TOKENS = 2**24
METHOD_DEFAULTS: dict[str, dict[str, Any]] = {
    "cmoe": {"router.kind": "mlp"},
    "moefication": {"router.kind": "mlp"},
    "llama_moe": {"router.kind": "mlp", "router.combine": "sum", "partition.method": "random"},
    "upcycle": {"assignment.num_experts": 8, "router.top_k": 2, "router.combine": "sum"},
}
"""Defaults of a method that differ from the recipe's."""


DOTTED = ("method", "partition.method")
"""Places that may hold the dotted path of a user's own code, which a run then imports."""


def load_recipe(path: str | Path, overrides: Mapping[str, Any] | None = None, *, allow_code: bool = False) -> Recipe:
    """Read a YAML recipe, lay ``overrides`` (dotted keys) over it and return it checked; nothing is imported.

    A file cannot allow code to run, since it may come from the author of the code. So ``trust_remote_code: true`` in a
    file is refused unless ``overrides`` set that key too, and a dotted path is refused unless ``allow_code`` is set or
    ``overrides`` replace it.

    Raises:
        RecipeError: the file cannot be read, is not a YAML mapping, has an unknown key or a value of the wrong type, or
            asks for trust or for code that was not allowed.
    """
    try:
        raw = parse_yaml(read_text(Path(path), MOST_YAML_BYTES))
    except OSError as error:
        raise RecipeError(str(path), f"{error.strerror or error}") from error
    except ValueError as error:
        line = getattr(error, "line", None)
        place = f"{path}:{line}" if line is not None else str(path)
        raise RecipeError(place, f"not valid YAML: {error}") from error
    if raw is None:
        raw = {}
    if not isinstance(raw, dict):
        raise RecipeError(str(path), f"a recipe is a mapping of keys, not a {type(raw).__name__}")
    if raw.get("trust_remote_code") is True and (overrides or {}).get("trust_remote_code") is None:
        raise RecipeError(
            str(path),
            "trust_remote_code: a file cannot allow code to be executed",
            "read the checkpoint's Python files, then pass --trust-remote-code yourself",
        )
    try:
        flat = _flatten(raw)
        for place in DOTTED:
            name, is_replaced = flat.get(place), (overrides or {}).get(place) is not None
            if isinstance(name, str) and "." in name and not (is_replaced or allow_code):
                raise RecipeError(
                    place,
                    f"'{name[:80]}' is code of somebody's, whose file would be imported and so executed",
                    "read it, then pass --allow-code",
                )
        return make_recipe({**flat, **(overrides or {})})
    except RecipeError as error:
        raise (error.at(f"{path}: {error.place}") if error.place else RecipeError(f"{path}: {error}")) from error


def make_recipe(values: Mapping[str, Any]) -> Recipe:
    """Build a recipe from dotted keys such as ``partition.num_modules``; None leaves the method's default.

    Raises RecipeError for an unknown key (with the nearest right one) or a value of the wrong type.
    """
    tree: dict[str, Any] = {}
    defaults = METHOD_DEFAULTS.get(str(values.get("method")), {})
    given = {key for key, value in values.items() if value is not None}
    values = {**values, **{key: value for key, value in defaults.items() if key not in given}}
    for key, value in values.items():
        if value is None:
            _check_key(key)
            continue
        *parents, leaf = key.split(".") if not key.startswith(("tasks", "family")) else [key]
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    recipe = build(Recipe, tree, "")
    assert isinstance(recipe, Recipe)
    return recipe


def dump_recipe(recipe: Recipe, extra: Mapping[str, Any] | None = None) -> str:
    """Return the resolved recipe as YAML, with ``extra`` keys (versions, command) as a comment block on top."""
    head = "".join(f"# {key}: {value}\n" for key, value in (extra or {}).items())
    return head + yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)


def flat_recipe(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe's values by the dotted keys that ``make_recipe`` takes."""
    flat: dict[str, Any] = {}
    for item in dataclasses.fields(recipe):
        value = getattr(recipe, item.name)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            flat.update(
                {f"{item.name}.{inner.name}": getattr(value, inner.name) for inner in dataclasses.fields(value)}
            )
        else:
            flat[item.name] = value
    return flat


_OPEN_MAPS = ("tasks", "family", "adapter.settings")


def _check_key(key: str) -> None:
    """Raise RecipeError for an unknown key without a value, such as a section without entries."""
    cls: Any = Recipe
    for part in key.split("."):
        known = {item.name for item in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
        if part not in known:
            raise RecipeError(str(key), "no such key", did_you_mean(part, known))
        cls = typing.get_type_hints(cls)[part]


def _flatten(raw: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if not isinstance(key, str):
            raise RecipeError(str(prefix or "recipe"), f"key {key!r} is not a word")
        place = f"{prefix}{key}"
        if isinstance(value, dict) and value and place not in _OPEN_MAPS:
            flat.update(_flatten(value, place + "."))
        else:
            flat[place] = value
    return flat
