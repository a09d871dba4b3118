"""Static structured pruning: a plain dense checkpoint of the source's family whose FFNs have fewer neurons.

The neurons of the highest score stay, whatever the token. Scores are those of ``modmoe.analysis.score``, over the text
of all tasks together, and ``random`` is the control. With K the neurons kept, h the activations and m their mean:

    y = down_K h_K + bias
    wanda          Wanda-sp, the control in          FLAP, https://arxiv.org/abs/2312.11983
    wifv           the fluctuation metric of         FLAP
    compensation   bias + sum_{i not in K} down_i m_i            FLAP's bias, from the dense model's activations
    refit          min |down'_K h_K + b - down h|^2 + r |down'_K - down_K|^2     on what pruned layers before it leave;
                   b is 0 without compensation, and is not held by r

All layers have one width. FLAP lets the scores of all layers compete and SEAP (https://arxiv.org/abs/2503.07605) lets
the share follow a curve over depth; a family's config.json has one width for all layers, so that neither could be
loaded by anything else, and neither is built.
"""

# Shapes: T tokens, D model width, F neurons of the source, N neurons kept

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.analysis.passes.by_layer import Stage
from modmoe.analysis.passes.stream import Turn, count_tokens
from modmoe.analysis.profile import ActivationProfile, save_profiles
from modmoe.analysis.run import Analysis, analyze_source, tokens_by_task
from modmoe.analysis.score import NEURON_SCORES, neuron_scores
from modmoe.analysis.source import Source, open_source
from modmoe.analysis.tables import write_tensors
from modmoe.conversion.modular.layerwise import solve_held
from modmoe.conversion.modular.steps import layered
from modmoe.conversion.proof import compare_logits
from modmoe.conversion.steps import Draft, Steps
from modmoe.errors import RecipeError, did_you_mean
from modmoe.formats.tied_code import own_files
from modmoe.models.counts import dense_neurons, tensor_parameters
from modmoe.models.families import Family
from modmoe.models.ffn_layout import FFNWeights, dense_layout, neuron_ops
from modmoe.models.loading import own_code
from modmoe.models.opened import OpenedModel
from modmoe.recipe.schema import PartitionRecipe, Recipe
from modmoe.runtime import ranks
from modmoe.runtime.progress import Progress, counter
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Const, Copy, Op, Plan

SCORES = (*NEURON_SCORES, "random")
"""Names of the scores."""
_MLP_BIAS = ("granite", "llama")
"""Families whose configuration key ``mlp_bias`` gives all three projections a bias."""


@dataclass(frozen=True, slots=True, eq=False)
class PrunedFFN:
    """What is left of one FFN; weights are in the checkpoint's type."""

    kept_N: Tensor
    """int64; the neurons kept, in their own order."""
    down_DN: Tensor | None = None
    """Their down projection fitted anew; None where it stays."""
    bias_D: Tensor | None = None
    """The bias behind it; None where it stays, or there is none."""


@dataclass(frozen=True, slots=True, eq=False)
class _Opened:
    """A dense source, and how many neurons of each FFN stay."""

    source: Source
    count: int

    @property
    def model(self) -> OpenedModel:
        return self.source.model

    @property
    def size_bytes(self) -> int:
        return self.source.size_bytes


def settle(recipe: Recipe) -> Recipe:
    """Return the recipe; RecipeError where there is no such score of neurons.

    Of the recipe count ``assignment.score``, ``active_fraction`` and ``refit``, ``router.compensation``, the tasks and
    their calibration.
    """
    score = recipe.assignment.score
    if score not in SCORES:
        raise RecipeError("assignment.score", f"no score of neurons '{score}'", did_you_mean(score, SCORES))
    return recipe


def open_prunable(recipe: Recipe, revision: str | None, progress: Progress, *, headers_only: bool) -> _Opened:
    """Open the dense source; RecipeError for a compensation that the family has no bias for."""
    source = open_source(_for_analysis(recipe), revision, progress, headers_only=headers_only)
    if recipe.router.compensation:
        check_bias(source.checkpoint, source.family)
    return _Opened(source, max(1, round(recipe.assignment.active_fraction * source.neurons)))


def make(recipe: Recipe, opened: _Opened, directory: Path, progress: Progress) -> Draft | None:
    """Return the draft of the model whose FFNs have ``opened.count`` neurons, on the first process."""
    source = opened.source
    analysis = analyze_source(_for_analysis(recipe), source, progress, directory)
    pruned = prune_layers(recipe, analysis, opened.count, directory, progress)
    if not ranks.is_first():
        return None
    plan = prune_plan(source, pruned)

    def write(output: Path) -> None:
        for name, text in own_files(plan.config, source.model.directory).items():
            (output / name).write_text(text, encoding="utf-8")
        save_profiles(output / "analysis", analysis.profiles)
        kept = {f"layers.{layer}.kept_N": ffn.kept_N for layer, ffn in enumerate(pruned)}
        write_tensors(output / "analysis", "neurons.safetensors", kept, {"kind": "neurons"})

    return Draft(
        plan=plan,
        write=write,
        prove=lambda output: verify_silenced(output, analysis, pruned, progress),
        facts=_facts(recipe, source, opened.count),
        readings=analysis.readings,
    )


def check_bias(checkpoint: Checkpoint, family: Family) -> None:
    """Raise RecipeError where a family has no bias behind its FFNs to hold what is added."""
    if dense_layout(family, 0).name("down", "bias") not in checkpoint and family.model_type not in _MLP_BIAS:
        raise RecipeError(
            "router.compensation",
            f"'{family.model_type}' has no bias in its FFNs to hold it",
            f"leave it out, or prune one that has (gpt2, gpt_neox, opt, {', '.join(_MLP_BIAS)})",
        )


def _for_analysis(recipe: Recipe) -> Recipe:
    """Return the recipe whose analysis is no more than the profile: it asks for neither modules nor experts."""
    score = recipe.assignment.score
    assignment = replace(
        recipe.assignment, method="top_score", score="wanda" if score == "random" else score, num_experts=None
    )
    return replace(recipe, partition=PartitionRecipe(method="contiguous", num_modules=1), assignment=assignment)


def pool_tasks(profile: ActivationProfile) -> ActivationProfile:
    """Return the profile of all tasks' tokens as one task."""
    summed = {field: getattr(profile, field).sum(0, keepdim=True) for field in ("tokens_P", *_SUMS)}
    taylor_PF = None if profile.taylor_PF is None else profile.taylor_PF.sum(0, keepdim=True)
    return replace(profile, task_names=("all",), taylor_PF=taylor_PF, norm_PM=None, **summed)


_SUMS = ("sum_PF", "abs_PF", "square_PF")


def choose_neurons(profile: ActivationProfile, weights: FFNWeights, score: str, count: int, seed: int) -> Tensor:
    """Return the ``count`` neurons of the highest score over all tasks together, int64, in their own order.

    Of neurons that score alike the first stays; ``random`` draws them by ``seed``.
    """
    if score == "random":
        drawn_F = torch.randperm(profile.num_neurons, generator=torch.Generator().manual_seed(seed))
        return drawn_F[:count].sort().values
    score_F = neuron_scores(score, pool_tasks(profile), weights)[0]
    return score_F.sort(descending=True, stable=True).indices[:count].sort().values


def prune_layers(recipe: Recipe, analysis: Analysis, count: int, scratch: Path, progress: Progress) -> list[PrunedFFN]:
    """Choose ``count`` neurons of each layer and make the repairs that are asked for."""
    source, refit = analysis.source, recipe.assignment.refit
    kept_LN = [
        choose_neurons(profile, weights, recipe.assignment.score, count, recipe.seed + layer)
        for layer, (profile, weights) in enumerate(zip(analysis.profiles, analysis.ffns, strict=True))
    ]
    if not refit and not recipe.router.compensation:
        return [PrunedFFN(kept_N) for kept_N in kept_LN]
    if not refit:
        pairs = zip(kept_LN, analysis.profiles, analysis.ffns, strict=True)
        return [PrunedFFN(kept_N, None, mean_bias(profile, weights, kept_N)) for kept_N, profile, weights in pairs]
    total = sum(tokens_by_task(analysis.batches).values())
    report = counter(progress, "fitting layers, tokens", total)
    done = reported = 0

    def count_done(tokens: int) -> None:
        nonlocal done, reported
        done += tokens  # each layer runs twice
        report(done // (2 * source.num_layers) - reported)
        reported = done // (2 * source.num_layers)

    pruned = []
    for stage in layered(analysis, scratch).stages(analysis.batches):
        weights, tokens = analysis.ffns[stage.layer], sum(count_tokens(analysis.batches).values())
        fit = partial(refit_layer, stage, weights, kept_LN[stage.layer], tokens)
        pruned.append(fit(has_bias=recipe.router.compensation, progress=count_done))
        stage.run(on_down=partial(_output, weights, pruned[-1]), goes_on=True, progress=count_done)
    return pruned


def mean_bias(profile: ActivationProfile, weights: FFNWeights, kept_N: Tensor) -> Tensor:
    """Return the bias_D behind ``down`` with the mean output of the neurons left out added, in the weights' type."""
    pooled = pool_tasks(profile)
    mean_F = (pooled.sum_PF / pooled.tokens_P)[0].index_fill(0, kept_N, 0)
    return _add_bias(weights, weights.down_DF.detach().double() @ mean_F)


def _add_bias(weights: FFNWeights, added_D: Tensor) -> Tensor:
    before_D = 0 if weights.down_bias_D is None else weights.down_bias_D.detach().double()
    return (before_D + added_D).to(weights.down_DF.dtype)


def refit_layer(
    stage: Stage,
    weights: FFNWeights,
    kept_N: Tensor,
    tokens: int,
    *,
    has_bias: bool,
    progress: Callable[[int], None] | None = None,
) -> PrunedFFN:
    """Return one layer with ``down`` by least squares on the neurons kept, and with ``has_bias`` the bias too."""
    width, count = len(weights.down_DF), len(kept_N)
    down_DF = weights.down_DF.detach().float()
    gram_NN = torch.zeros(count, count, dtype=torch.float64)
    cross_ND = torch.zeros(count, width, dtype=torch.float64)
    hidden_N, missing_D = torch.zeros(count, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)

    def watch_hidden(_: int, hidden: Tensor, turn: Turn) -> None:
        hidden_TF = turn.real_rows(hidden.detach()).float().cpu()
        kept_TN = hidden_TF[:, kept_N]
        # what is fitted is what is missing, so that the ridge holds down to what it was
        missing_TD = hidden_TF.index_fill(1, kept_N, 0) @ down_DF.T
        gram_NN.add_(kept_TN.T @ kept_TN)
        cross_ND.add_(kept_TN.T @ missing_TD)
        hidden_N.add_(kept_TN.double().sum(0))
        missing_D.add_(missing_TD.double().sum(0))

    stage.run(on_hidden=watch_hidden, progress=progress)
    gram_NN, cross_ND = ranks.add_up(gram_NN), ranks.add_up(cross_ND)
    mean_N, mean_D = ranks.add_up(hidden_N) / tokens, ranks.add_up(missing_D) / tokens
    if has_bias:
        # a bias takes the means out of the fit
        gram_NN = gram_NN - tokens * torch.outer(mean_N, mean_N)
        cross_ND = cross_ND - tokens * torch.outer(mean_N, mean_D)
    change_ND = solve_held(gram_NN, cross_ND, count)
    down_DN = (down_DF[:, kept_N].double() + change_ND.T).to(weights.down_DF.dtype)
    bias_D = _add_bias(weights, mean_D - mean_N @ change_ND) if has_bias else None
    return PrunedFFN(kept_N, down_DN, bias_D)


def _output(weights: FFNWeights, pruned: PrunedFFN, _: int, hidden: Tensor, __: Turn) -> Tensor:
    """Return what the pruned FFN puts out, for the source's activations."""
    kept_N = pruned.kept_N.to(hidden.device)
    down_DN = weights.down_DF.detach()[:, pruned.kept_N] if pruned.down_DN is None else pruned.down_DN
    y = hidden.index_select(-1, kept_N) @ down_DN.to(hidden).T
    bias_D = weights.down_bias_D if pruned.bias_D is None else pruned.bias_D
    return y if bias_D is None else y + bias_D.detach().to(hidden)


def prune_plan(source: Source, pruned: Sequence[PrunedFFN]) -> Plan:
    """Return the plan of the same model with the neurons that are kept, in the names and the layout of the source."""
    checkpoint, family = source.checkpoint, source.family
    ops: dict[str, Op] = {name: Copy(name) for name in checkpoint}
    adds_bias = pruned[0].bias_D is not None and "down" not in dense_layout(family, 0).biased_roles(checkpoint)
    for layer, ffn in enumerate(pruned):
        layout = dense_layout(family, layer)
        if adds_bias:
            # Llama's mlp_bias gives all three projections one
            ops.update(layout.zero_biases(len(ffn.kept_N), checkpoint.dtype(layout.name("up"))))
        ops.update(neuron_ops(checkpoint, layout, layout, ffn.kept_N))
        if ffn.down_DN is not None:
            ops[layout.name("down")] = Const(layout.as_stored(ffn.down_DN))
        if ffn.bias_D is not None:
            ops[layout.name("down", "bias")] = Const(ffn.bias_D)
    used = {name for op in ops.values() for name in op.inputs}
    return Plan(_config(source, len(pruned[0].kept_N), adds_bias), ops, frozenset(checkpoint.keys() - used))


def _config(source: Source, count: int, adds_bias: bool) -> dict[str, Any]:
    config = copy.deepcopy(source.checkpoint.config)
    if not own_code(config):
        # some checkpoints name files for an architecture that transformers knows as well
        config.pop("auto_map", None)
    config[source.family.width] = count
    if adds_bias:
        config["mlp_bias"] = True
    before = sum(tensor_parameters(source.checkpoint).values())
    config["modmoe_method"] = "prune"
    # what the sparsity is measured against; nothing else reads it
    config["modmoe_pruned"] = {"neurons": count, "neurons_before": source.neurons, "parameters_before": before}
    return config


def verify_silenced(
    directory: Path, analysis: Analysis, pruned: Sequence[PrunedFFN], progress: Progress
) -> dict[str, Any]:
    """Compare what was written with the dense model whose neurons that are left out are silent; PlanError if unlike."""
    is_repaired = pruned[0].down_DN is not None or pruned[0].bias_D is not None

    def silenced(layer: int, hidden: Tensor, _: Turn) -> Tensor:
        is_left_out_F = torch.ones(hidden.shape[-1], dtype=torch.bool, device=hidden.device)
        is_left_out_F[pruned[layer].kept_N] = False
        return hidden.masked_fill(is_left_out_F, 0)

    def repaired(layer: int, hidden: Tensor, turn: Turn) -> Tensor:
        return _output(analysis.ffns[layer], pruned[layer], layer, hidden, turn)

    difference, facts = compare_logits(
        directory,
        analysis,
        on_hidden=silenced,
        on_down=repaired if is_repaired else None,
        what="silenced neurons",
        report=partial(progress, "verifying, models"),
    )
    return {"max_abs_logit_diff_silenced": difference, **facts}


def _facts(recipe: Recipe, source: Source, count: int) -> dict[str, Any]:
    return {
        "method": "prune",
        "score": recipe.assignment.score,
        "neurons": count,
        "neurons_before": source.neurons,
        "compensation": recipe.router.compensation,
        "refit": recipe.assignment.refit,
    }


def describe(recipe: Recipe, opened: _Opened) -> dict[str, Any]:
    """Return what a run would make and cost, from headers alone; which neurons are kept changes no size."""
    source, count = opened.source, opened.count
    checkpoint = source.checkpoint
    sizes = tensor_parameters(checkpoint)
    neurons = dense_neurons(checkpoint, source.family, source.num_layers)
    ffn = sum(sizes[name] for name in neurons)
    tokens = recipe.calibration.tokens * len(recipe.tasks)
    dense = sum(sizes.values())
    return {
        "model_type": source.family.model_type,
        "num_layers": source.num_layers,
        **_facts(recipe, source, count),
        # without the biases that a compensation may add
        "parameters": {"dense": dense, "stored": dense - ffn + ffn * count // source.neurons},
        "calibration_tokens": tokens,
        # a forward pass is two operations a parameter and token; a refit runs each layer twice more
        "calibration_flops": 2 * dense * tokens * (3 if recipe.assignment.refit else 1),
        "tensors": len(checkpoint),
    }


STEPS = Steps(settle=settle, open=open_prunable, describe=describe, make=make)
"""Static structured pruning."""
