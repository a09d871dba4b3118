"""Modules cut out of the graph of co-activations, and by what gradients say, against plain loops."""

# Shapes: P tasks, F neurons, M modules, S rows of the sketch

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from modmoe import api
from modmoe.analysis.modules import load_partitions
from modmoe.analysis.partitions.activations import activation_features
from modmoe.analysis.partitions.coactivation import coactivation_graph, cut_by_coactivation, exchange
from modmoe.analysis.partitions.gradient import cut_by_gradients, deal
from modmoe.analysis.partitions.kmeans import balanced_kmeans
from modmoe.analysis.profile import ActivationProfile, load_profiles
from modmoe.analysis.source import needs_gradients
from modmoe.conversion.modular.settled import count_clusters
from modmoe.errors import CalibrationError, RecipeError
from modmoe.models.ffn_layout import FFNWeights
from modmoe.recipe.schema import make_recipe
from tests.support.tiny import NEURONS, save_dense, write_tasks

NONE = FFNWeights(None, torch.zeros(1, 1), torch.zeros(1, 1))


def profile_of(rows_SF: Tensor, taylor_PF: Tensor | None = None, tokens: tuple[int, ...] = (10,)) -> ActivationProfile:
    names = tuple(f"t{number}" for number in range(len(tokens)))
    zeros_PF = torch.zeros(len(tokens), rows_SF.shape[1], dtype=torch.float64)
    sums = (zeros_PF, zeros_PF, zeros_PF, taylor_PF)
    return ActivationProfile(names, torch.tensor(tokens), *sums, rows_SF, len(rows_SF))


def together(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return kind_F and rows_SF of ReLU neurons of four kinds, one of which is on at each token, and some noise."""
    draw = torch.Generator().manual_seed(seed)
    kind_F = torch.randperm(32, generator=draw) % 4
    topic_S = torch.randint(0, 4, (96,), generator=draw)
    is_on_SF = (kind_F == topic_S.unsqueeze(1)) | (torch.rand(96, 32, generator=draw) < 0.05)
    return kind_F, is_on_SF * (0.5 + torch.rand(96, 32, generator=draw))


def weight_within(weight_FF: Tensor, module_F: Tensor) -> float:
    return float(weight_FF[module_F.unsqueeze(1) == module_F].sum())


def test_the_graph_is_that_of_the_loop() -> None:
    rows_SF = together()[1]
    rows_SF[:, ::2] *= -1
    rows, scale = rows_SF.tolist(), float(rows_SF.square().mean().sqrt())
    meet = torch.zeros(32, 32)
    for first in range(0, 96, 8):
        for i, j in itertools.permutations(range(32), 2):
            products = [abs(row[i] * row[j]) / scale**2 for row in rows[first : first + 8]]
            meet[i, j] += min(sum(products), 1.0)
    levels = [level for level in np.percentile(meet, range(10, 101, 10)) if level > 0]
    wanted_FF = (meet / (0.99 * levels[0])).floor()
    found_FF = coactivation_graph(rows_SF)
    assert torch.equal(found_FF, found_FF.T) and not found_FF.diagonal().any()
    # a sum may be rounded to the other side of a whole number
    assert (found_FF - wanted_FF).abs().max() <= 1
    assert float((found_FF == wanted_FF).float().mean()) > 0.99
    assert len(found_FF.unique()) > 3
    assert torch.equal(coactivation_graph(8 * rows_SF), found_FF)


def test_neurons_that_are_on_together_make_a_module() -> None:
    kind_F, rows_SF = together()
    found_F = cut_by_coactivation(profile_of(rows_SF), NONE, 4, 0).module_F
    assert torch.equal(found_F.unsqueeze(0) == found_F.unsqueeze(1), kind_F.unsqueeze(0) == kind_F.unsqueeze(1))


@pytest.mark.parametrize("modules", [2, 5, 10])
def test_no_exchange_is_left_that_raises_the_weight(modules: int) -> None:
    draw = torch.Generator().manual_seed(modules)
    upper_FF = torch.randint(0, 9, (30, 30), generator=draw).triu(1).float()
    weight_FF = upper_FF + upper_FF.T
    start_F = torch.randperm(30, generator=draw) % modules
    found_F = exchange(weight_FF, start_F)
    assert found_F.bincount().tolist() == [30 // modules] * modules
    best = weight_within(weight_FF, found_F)
    assert best > 1.05 * weight_within(weight_FF, start_F)
    for one, two in itertools.combinations(range(30), 2):
        moved_F = found_F.clone()
        moved_F[[one, two]] = found_F[[two, one]]
        assert weight_within(weight_FF, moved_F) <= best


def test_a_cut_starts_from_activations_and_is_no_worse() -> None:
    rows_SF = torch.randn(64, 48, generator=torch.Generator().manual_seed(2)).relu()
    profile, weight_FF = profile_of(rows_SF), coactivation_graph(rows_SF)
    start_F = balanced_kmeans(activation_features(profile), 6, 3)
    found_F = cut_by_coactivation(profile, NONE, 6, 3).module_F
    assert weight_within(weight_FF, found_F) > weight_within(weight_FF, start_F)
    assert torch.equal(found_F, exchange(weight_FF, start_F))


def test_neurons_that_are_never_on_are_cut_too() -> None:
    assert not coactivation_graph(torch.zeros(9, 12)).any()
    assert cut_by_coactivation(profile_of(torch.zeros(9, 12)), NONE, 3, 0).module_F.bincount().tolist() == [4, 4, 4]


def loop(score_MF: list[list[float]]) -> list[int]:
    """The published split: the expert with room whose best neuron left scores highest takes it."""
    modules, neurons = len(score_MF), len(score_MF[0])
    found, room = [-1] * neurons, [neurons // modules] * modules
    for _ in range(neurons):
        left = [(m, j) for m in range(modules) if room[m] for j in range(neurons) if found[j] < 0]
        module, neuron = max(left, key=lambda pair: score_MF[pair[0]][pair[1]])
        found[neuron], room[module] = module, room[module] - 1
    return found


@pytest.mark.parametrize("seed", range(4))
def test_the_deal_is_the_published_loop(seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    score_MF = torch.rand(4, 24, generator=draw, dtype=torch.float64)
    if seed % 2:
        score_MF = (score_MF * 3).floor()  # ties
    assert deal(score_MF).tolist() == loop(score_MF.tolist())


def test_each_text_has_its_modules() -> None:
    draw = torch.Generator().manual_seed(0)
    taylor_PF = torch.rand(2, 24, generator=draw, dtype=torch.float64)
    taylor_PF[0, ::2] += 5
    # a longer text does not matter more
    tokens = torch.tensor([10, 1000])
    profile = profile_of(torch.zeros(3, 24), taylor_PF * tokens.unsqueeze(1), tuple(tokens.tolist()))
    assert cut_by_gradients(profile, NONE, 2, 0).module_F.tolist() == [0, 1] * 12
    four_F = cut_by_gradients(profile, NONE, 4, 0).module_F
    assert (four_F % 2).tolist() == [0, 1] * 12
    # of the modules of one text the first has what matters most to it
    assert taylor_PF[0, four_F == 0].min() > taylor_PF[0, four_F == 2].max()
    one_F = cut_by_gradients(profile, NONE, 1, 0).module_F
    assert one_F.tolist() == [0] * 24
    assert four_F.tolist() == loop(taylor_PF[[0, 1, 0, 1]].tolist())


def test_gradients_have_to_be_there() -> None:
    with pytest.raises(CalibrationError, match="needs gradients"):
        cut_by_gradients(profile_of(torch.zeros(3, 24)), NONE, 2, 0)


@pytest.mark.parametrize(
    ("values", "clusters"),
    [
        ({}, 1),
        ({"assignment.num_experts": 3}, 3),
        ({"assignment.num_experts": 3, "partition.method": "gradient"}, 3),
        ({"assignment.method": "modules"}, 1),
        ({"assignment.method": "modules", "partition.method": "gradient", "partition.num_modules": 6}, 6),
    ],
)
def test_sequences_stand_for_tasks(values: dict[str, Any], clusters: int) -> None:
    recipe = make_recipe(values)
    assert count_clusters(recipe) == clusters
    assert needs_gradients(recipe) == ("partition.method" in values)


def test_llama_moe_is_split_by_gradients_over_clusters(tmp_path: Path) -> None:
    source = save_dense(tmp_path / "dense")
    tasks = write_tasks(tmp_path / "tasks")
    options: dict[str, Any] = {"tokens": 400, "sequence_length": 16, "num_modules": 4, "partition": "gradient"}
    options |= {"method": "llama_moe", "tasks": {"words": tasks["words"]}}
    result = api.convert(source, tmp_path / "out", **options)
    assert result["num_experts"] == 4 and result["verified"]["max_abs_logit_diff_all_on"] < 1e-8
    profiles = load_profiles(tmp_path / "out" / "analysis")
    partitions = load_partitions(tmp_path / "out" / "analysis")
    for profile, partition in zip(profiles, partitions, strict=True):
        assert profile.taylor_PF is not None and profile.taylor_PF.shape == (4, NEURONS)
        score_PF = profile.taylor_PF / profile.tokens_P.unsqueeze(1)
        assert partition.module_F.tolist() == loop(score_PF.tolist())
    with pytest.raises(RecipeError, match="partition gradient needs the whole model"):
        api.convert(source, tmp_path / "other", **options, by_layer=True)
