"""The conversions by name: the options that each takes, what it reads and costs, and where its code lies.

A new conversion is its file and a row here. Nothing else compares a conversion's name with a text. The table itself
imports no torch, since the command line asks it before anything is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modmoe.errors import RecipeError, did_you_mean
from modmoe.recipe.dotted import object_at

if TYPE_CHECKING:
    from modmoe.recipe.schema import Recipe

_ALWAYS = frozenset({"tasks", "method", "seed", "device", "trust_remote_code"})
_TEXT = frozenset({"tokens", "sequence_length", "batch_size"})
_OF_ADAPTERS = ("adapter", "budget")
ADAPTER_COUNTS = ("num_experts", "top_k")
"""Keywords that are of the model elsewhere, and of the adapter where one is attached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversion:
    """One way of making a model of another."""

    steps: str
    """Dotted path of its ``modmoe.conversion.steps.Steps``; the file is imported when the conversion runs."""
    output: str = ""
    """What it writes, for the documentation."""
    brief: str = ""
    """What it does, in a line for the documentation."""
    options: frozenset[str] | None = None
    """Keywords of the step that say something here; None for all but those of adapters."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Keywords that set another place of the recipe here than elsewhere."""
    takes_adapter: bool = False
    """Whether the keywords of adapters say something here; then ADAPTER_COUNTS are settings of the adapter."""
    clashes: tuple[tuple[str, Any, str, str, str], ...] = ()
    """A keyword and its value, the keyword that says nothing beside it, why, and the remedy."""
    reads_text: bool = True
    """Whether the tasks' text is run through the model."""
    is_modular: bool = False
    """Whether it cuts FFNs into modules and fits routers, so that the recipe's parts on both say something."""
    unsized: tuple[str, ...] = ()
    """Why ``fit_bytes`` says nothing here, and the remedy; empty where it does, or where ``options`` refuse it."""
    scores: Literal["modules", "neurons"] = "modules"
    """What ``assignment.score`` ranks."""
    has_by_layer: bool = True
    """Whether the model can be run a decoder layer at a time."""
    passes: int | None = None
    """How often the text is run through the model, where that does not follow from the recipe."""
    has_short_proof: bool = False
    """Whether what was written is proved on a few tokens, which takes no time to speak of."""
    copies: Callable[[Recipe], int] = lambda recipe: 0
    """How many copies of the FFNs are written, where no text is read."""
    body: Literal["stored", "active", "same"] = "stored"
    """What training computes with afterwards: all that is stored, what is active, or as much as before."""

    def refuse(self, name: str, keywords: Mapping[str, Any]) -> None:
        """Raise RecipeError for a keyword of the step that says nothing here; None and an empty mapping say nothing."""
        for keyword, value in keywords.items():
            if value is None or value == {} or "." in keyword:
                continue
            flag = "--task" if keyword == "tasks" else f"--{keyword.replace('_', '-')}"
            if keyword in _OF_ADAPTERS and not self.takes_adapter:
                raise RecipeError(flag, "belongs to --method adapters", "leave it out or name that method")
            if (self.options is not None and keyword not in self.options) or (
                keyword == "report" and not self.is_modular
            ):
                raise RecipeError(flag, f"does not go with --method {name}", "leave it out")
        for keyword, value, other, problem, remedy in self.clashes:
            if keywords.get(keyword) == value and keywords.get(other) is not None:
                raise RecipeError(f"--{other}", problem, remedy)
        if keywords.get("fit_bytes") is None:
            return
        if self.unsized:
            raise RecipeError("--fit-bytes", *self.unsized)
        if keywords.get("modules_per_expert") is not None or keywords.get("active_fraction") is not None:
            raise RecipeError("assignment", "give modules_per_expert, active_fraction or fit_bytes, one of them")


def _split(name: str, brief: str) -> Conversion:
    return Conversion(
        steps="modmoe.conversion.modular.steps.STEPS",
        output="the same format",
        brief=brief,
        is_modular=True,
        unsized=(f"{name} keeps every module", "leave it out"),
    )


CONVERSIONS: dict[str, Conversion] = {
    "modular": Conversion(
        steps="modmoe.conversion.modular.steps.STEPS",
        output="a tied mixture of experts",
        brief="experts are sets of modules that they share: the main job",
        is_modular=True,
    ),
    "cmoe": _split("cmoe", "some modules always on, the rest clustered by which tokens they are on for"),
    "moefication": _split("moefication", "clusters of keys, a small network as the router"),
    "emoe": _split("emoe", "clusters of keys, mean keys as the router"),
    "llama_moe": _split("llama_moe", "a random split and a router that starts from nothing"),
    "prune": Conversion(
        steps="modmoe.conversion.prune.STEPS",
        output="a smaller dense model",
        brief="one mask for all tokens: the baseline that each of the above has to beat",
        options=_ALWAYS | _TEXT | {"family", "by_layer", "score", "active_fraction", "refit", "compensation"},
        scores="neurons",
    ),
    "upcycle": Conversion(
        steps="modmoe.conversion.upcycle.STEPS",
        output="a larger mixture of experts",
        brief="experts are copies of the FFN",
        options=frozenset({"method", "family", "seed", "trust_remote_code", "num_experts", "top_k"}),
        reads_text=False,
        copies=lambda recipe: recipe.assignment.num_experts or 1,
        body="active",
    ),
    "experts": Conversion(
        steps="modmoe.conversion.reduce_experts.steps.STEPS",
        output="a mixture of fewer experts",
        brief="of a mixture of experts, experts are left out or merged",
        options=_ALWAYS | _TEXT | {"num_experts", "assignment", "score"},
        places={"num_experts": "experts.num_experts", "assignment": "experts.assignment", "score": "experts.score"},
        clashes=(
            ("assignment", "merge", "score", "merging weighs experts by their frequency", "leave it out or prune"),
        ),
        has_by_layer=False,
        passes=2,
        has_short_proof=True,
        body="same",
    ),
    "adapters": Conversion(
        steps="modmoe.conversion.attach_adapters.STEPS",
        output="the model as it was, and a PEFT directory",
        brief="routed adapters hang on frozen weights",
        takes_adapter=True,
        reads_text=False,
        unsized=("adapters are sized by --budget, a number of parameters",),
    ),
}
"""Name, the recipe's ``method``, to the conversion."""


def find_conversion(name: str) -> Conversion:
    """Return a conversion by its name in the table, or by the dotted path of a ``Conversion`` of one's own.

    RecipeError where there is none; a dotted path is imported.
    """
    if name in CONVERSIONS:
        return CONVERSIONS[name]
    if "." not in name:
        raise RecipeError("method", f"no method '{name}'", did_you_mean(name, CONVERSIONS))
    conversion = object_at(name, "method")
    if not isinstance(conversion, Conversion):
        raise RecipeError("method", f"'{name}' is not a modmoe.conversion.table.Conversion", "name the row itself")
    return conversion
