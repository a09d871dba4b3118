"""The ways of choosing each expert's modules, by name."""

from __future__ import annotations

from dataclasses import dataclass

from modmoe.conversion.modular.assignment import ScoreAssigner, assign_at_random, assign_top_score
from modmoe.conversion.modular.from_outputs import OutputAssigner, assign_greedy, assign_modules, assign_tokens
from modmoe.errors import RecipeError, did_you_mean

__all__ = ["ASSIGNMENTS", "AssignmentMethod", "find_assignment"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AssignmentMethod:
    """One way of choosing each expert's modules: by scores or by outputs, one of the two."""

    by_scores: ScoreAssigner | None = None
    """Chooses by the score that each module has on each task, all layers at once."""
    by_outputs: OutputAssigner | None = None
    """Chooses by what leaving modules out does to a layer's output, layer after layer."""
    is_by_task: bool = True
    """Whether an expert stands for a task, or for a cluster of sequences where there is one task."""
    is_by_module: bool = False
    """Whether each module that is not shared is an expert of its own."""
    has_coverage: bool = True
    """Whether it can see to it that every module is in an expert."""


ASSIGNMENTS: dict[str, AssignmentMethod] = {
    "top_score": AssignmentMethod(by_scores=assign_top_score),
    "random": AssignmentMethod(by_scores=assign_at_random),
    "greedy": AssignmentMethod(by_outputs=assign_greedy),
    "tokens": AssignmentMethod(by_outputs=assign_tokens, is_by_task=False, has_coverage=False),
    "modules": AssignmentMethod(by_outputs=assign_modules, is_by_task=False, is_by_module=True),
}
"""Name, the recipe's ``assignment.method``, to the way."""


def find_assignment(name: str) -> AssignmentMethod:
    """Return a way of choosing modules by its name; RecipeError where there is none."""
    if name not in ASSIGNMENTS:
        raise RecipeError("assignment.method", f"no method '{name}'", did_you_mean(name, ASSIGNMENTS))
    return ASSIGNMENTS[name]
