"""The conversions by name: what each can be told, reads and costs, and where its code lies.

A new conversion is its file and a row here. Nothing else compares a conversion's name with a text. The table itself
imports no torch, since the command line asks it before anything is loaded.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from modmoe.errors import RecipeError, did_you_mean

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

    run: str
    """Dotted path of what makes it: called with the recipe, the output and the options of ``driver.convert``."""
    check: str = ""
    """Dotted path of what refuses a recipe before anything is read; it is called with the recipe."""
    options: frozenset[str] | None = None
    """Keywords of the step that say something here; None for all but those of adapters."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Keywords that set another place of the recipe here than elsewhere."""
    takes_adapter: bool = False
    """Whether the keywords of adapters say something here; then ADAPTER_COUNTS are settings of the adapter."""
    clashes: tuple[tuple[str, Any, str, str], ...] = ()
    """A keyword and its value, the keyword that says nothing beside it, and why."""
    reads_text: bool = True
    """Whether the tasks' text is run through the model."""
    is_modular: bool = False
    """Whether it cuts FFNs into modules and fits routers, so that the recipe's parts on both say something."""
    unsized: str = ""
    """Why ``fit_bytes`` says nothing here, as a sentence; empty where it does, or where ``options`` refuse it."""
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

    def refuse(self, name: str, given: Mapping[str, Any]) -> None:
        """Raise RecipeError for a keyword of the step that says nothing here; None and nothing are not given."""
        for keyword, value in given.items():
            if value is None or value == {} or "." in keyword:
                continue
            flag = "task" if keyword == "tasks" else keyword.replace("_", "-")
            if keyword in _OF_ADAPTERS and not self.takes_adapter:
                raise RecipeError(f"--{flag}: belongs to --method adapters; leave it out or name that method.")
            if (self.options is not None and keyword not in self.options) or (
                keyword == "report" and not self.is_modular
            ):
                raise RecipeError(f"--{flag}: does not go with --method {name}; leave it out.")
        for keyword, value, other, why in self.clashes:
            if given.get(keyword) == value and given.get(other) is not None:
                raise RecipeError(f"--{other}: {why}")
        if given.get("fit_bytes") is None:
            return
        if self.unsized:
            raise RecipeError(f"--fit-bytes: {self.unsized}")
        if given.get("modules_per_expert") is not None or given.get("active_fraction") is not None:
            raise RecipeError("assignment: give modules_per_expert, active_fraction or fit_bytes, one of them.")


def _split(name: str) -> Conversion:
    return Conversion(
        run="modmoe.conversion.modular.run.convert_modular",
        check="modmoe.conversion.modular.run.check_settled",
        is_modular=True,
        unsized=f"{name} keeps every module; leave it out.",
    )


CONVERSIONS: dict[str, Conversion] = {
    "modular": Conversion(
        run="modmoe.conversion.modular.run.convert_modular",
        check="modmoe.conversion.modular.run.check_tasks",
        is_modular=True,
    ),
    **{name: _split(name) for name in ("cmoe", "moefication", "emoe", "llama_moe")},
    "prune": Conversion(
        run="modmoe.conversion.prune.prune",
        options=_ALWAYS | _TEXT | {"family", "by_layer", "score", "active_fraction", "refit", "compensation"},
        scores="neurons",
    ),
    "upcycle": Conversion(
        run="modmoe.conversion.upcycle.upcycle",
        check="modmoe.conversion.upcycle.check_counts",
        options=frozenset({"method", "family", "seed", "trust_remote_code", "num_experts", "top_k"}),
        reads_text=False,
        copies=lambda recipe: recipe.assignment.num_experts or 1,
        body="active",
    ),
    "experts": Conversion(
        run="modmoe.conversion.reduce_experts.run.reduce_experts",
        check="modmoe.conversion.reduce_experts.run.check_count",
        options=_ALWAYS | _TEXT | {"num_experts", "assignment", "score"},
        places={"num_experts": "experts.num_experts", "assignment": "experts.assignment", "score": "experts.score"},
        clashes=(
            ("assignment", "merge", "score", "merging weighs experts by their frequency; leave it out or prune."),
        ),
        has_by_layer=False,
        passes=2,
        has_short_proof=True,
        body="same",
    ),
    "adapters": Conversion(
        run="modmoe.conversion.attach_adapters.attach_adapters",
        check="modmoe.conversion.attach_adapters.check_method",
        takes_adapter=True,
        reads_text=False,
        unsized="adapters are sized by --budget, a number of parameters.",
    ),
}
"""Name, the recipe's ``method``, to the conversion."""


def find_conversion(name: str) -> Conversion:
    """Return a conversion by its name; RecipeError where there is none."""
    if name not in CONVERSIONS:
        raise RecipeError(f"method: no method '{name}'.{did_you_mean(name, CONVERSIONS)}")
    return CONVERSIONS[name]


def function_at(path: str) -> Callable[..., Any]:
    """Return the function that a row names, and import its file."""
    module, _, name = path.rpartition(".")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function
