"""Modules are disjoint, of exactly equal size, and the balanced assignment is the optimum."""

# Shapes: F neurons, X features, M modules, D model width, S rows of the sketch

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from modmoe.analysis.balance import assign_balanced
from modmoe.analysis.partitions.core import with_core
from modmoe.analysis.partitions.kmeans import balanced_kmeans
from modmoe.analysis.partitions.table import (
    PARTITIONERS,
    Partition,
    check_num_modules,
    find_partitioner,
    load_partitions,
    save_partitions,
)
from modmoe.analysis.profile import ActivationProfile, reads_gradients
from modmoe.analysis.source import core_modules
from modmoe.errors import CheckpointError, PartitionError, RecipeError
from modmoe.models.ffn_layout import FFNWeights
from modmoe.recipe.schema import make_recipe


def planted(neurons: int, num_modules: int, width: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Return the true module_F and features_FX that scatter around one direction a module."""
    generator = torch.Generator().manual_seed(seed)
    module_F = torch.arange(neurons)[torch.randperm(neurons, generator=generator)] % num_modules
    direction_MX = torch.randn(num_modules, width, generator=generator)
    return module_F, direction_MX[module_F] + noise * torch.randn(neurons, width, generator=generator)


def same_modules(one_F: Tensor, two_F: Tensor) -> bool:
    return torch.equal(one_F.unsqueeze(0) == one_F.unsqueeze(1), two_F.unsqueeze(0) == two_F.unsqueeze(1))


def layer_of(rows_SF: Tensor, up_FD: Tensor, gate_FD: Tensor | None = None) -> tuple[ActivationProfile, FFNWeights]:
    zeros_PF = torch.zeros(1, rows_SF.shape[1], dtype=torch.float64)
    tokens = torch.tensor([len(rows_SF)])
    taylor_PF = rows_SF.double().abs().sum(0, keepdim=True)
    profile = ActivationProfile(("t",), tokens, zeros_PF, zeros_PF, zeros_PF, taylor_PF, rows_SF, len(rows_SF))
    return profile, FFNWeights(gate_FD, up_FD, up_FD.T)


@pytest.mark.parametrize("kind", ["uniform", "skewed", "ties", "equal", "dead", "groups"])
@pytest.mark.parametrize(("points", "bins"), [(12, 3), (60, 4), (64, 16), (96, 48), (200, 10), (30, 30), (8, 1)])
def test_balanced_assignment_is_the_optimum(points: int, bins: int, kind: str) -> None:
    generator = torch.Generator().manual_seed(points)
    cost_FM = torch.rand(points, bins, generator=generator, dtype=torch.float64)
    if kind == "skewed":
        cost_FM = cost_FM.square() + 2 * torch.rand(bins, generator=generator, dtype=torch.float64)
    elif kind == "ties":
        cost_FM = (cost_FM * 3).floor()
    elif kind == "equal":
        cost_FM = torch.ones_like(cost_FM)
    elif kind == "dead":
        cost_FM[: points // 2] = cost_FM[0]
    elif kind == "groups":
        # far apart and of unequal size, so that prices must leap
        group_F = (torch.rand(points, generator=generator).square() * bins).long()
        cost_FM += 50 * (group_F.unsqueeze(1) != torch.arange(bins))
    bin_F, price_M = assign_balanced(cost_FM)
    assert bin_F.bincount(minlength=bins).tolist() == [points // bins] * bins
    # the same problem with every bin as many columns as it holds points
    slots = cost_FM.repeat_interleave(points // bins, dim=1).numpy()
    best = slots[linear_sum_assignment(slots)].sum()
    np.testing.assert_allclose(float(cost_FM.gather(1, bin_F.unsqueeze(1)).sum()), best, atol=1e-9)
    again_F, _ = assign_balanced(cost_FM, price_M)
    np.testing.assert_allclose(float(cost_FM.gather(1, again_F.unsqueeze(1)).sum()), best, atol=1e-9)


def test_kmeans_finds_planted_modules_of_equal_size() -> None:
    truth_F, features_FX = planted(240, 8, 32, 0.3)
    found_F = balanced_kmeans(features_FX, 8, seed=0)
    assert found_F.dtype == torch.int64
    assert same_modules(found_F, truth_F)
    assert torch.equal(found_F, balanced_kmeans(features_FX, 8, seed=0))


def test_kmeans_never_gets_worse_with_more_steps() -> None:
    features_FX = torch.randn(120, 6, generator=torch.Generator().manual_seed(2))

    def scatter(module_F: Tensor) -> float:
        parts = [features_FX[module_F == m] for m in range(6)]
        return float(sum((part - part.mean(0)).square().sum() for part in parts))

    found = [scatter(balanced_kmeans(features_FX, 6, 0, iterations)) for iterations in (1, 2, 4, 30)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.95 * scatter(torch.arange(120) % 6)


@pytest.mark.parametrize("num_modules", [2, 3, 5, 12, 60])
def test_kmeans_cuts_any_number_of_modules(num_modules: int) -> None:
    found_F = balanced_kmeans(torch.randn(120, 9, generator=torch.Generator().manual_seed(4)), num_modules, seed=0)
    assert found_F.bincount().tolist() == [120 // num_modules] * num_modules


def test_kmeans_of_wide_features_counts_all_columns() -> None:
    truth_F, features_FX = planted(240, 8, 700, 1.0)
    # the groups differ in a few columns of many
    features_FX[:, 20:] = torch.randn(240, 680, generator=torch.Generator().manual_seed(5)) * 0.2
    assert same_modules(balanced_kmeans(features_FX, 8, seed=0), truth_F)


def test_kmeans_does_better_than_lloyd() -> None:
    """Small modules of faint structure, where a neuron's pull on its own centre holds it back."""
    features_FX = torch.nn.functional.normalize(torch.randn(384, 48, generator=torch.Generator().manual_seed(6)))

    def centres(module_F: Tensor) -> Tensor:
        return torch.stack([features_FX[module_F == m].mean(0) for m in range(32)]).double()

    def scatter(module_F: Tensor) -> float:
        return float((features_FX - centres(module_F)[module_F]).square().sum())

    lloyd_F = torch.arange(384) % 32
    for _ in range(30):
        lloyd_F, _ = assign_balanced(torch.cdist(features_FX.double(), centres(lloyd_F)).square())
    assert scatter(balanced_kmeans(features_FX, 32, seed=0)) < 0.97 * scatter(lloyd_F)


@pytest.mark.parametrize("num_modules", [1, 24])
def test_kmeans_of_one_module_or_one_neuron_a_module(num_modules: int) -> None:
    found_F = balanced_kmeans(torch.randn(24, 3), num_modules, seed=0)
    assert found_F.bincount(minlength=num_modules).tolist() == [24 // num_modules] * num_modules


def test_kmeans_survives_neurons_that_are_alike() -> None:
    assert balanced_kmeans(torch.zeros(24, 3), 4, seed=0).bincount().tolist() == [6] * 4


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize("num_modules", [1, 6, 16, 96])
def test_every_partitioner_cuts_equal_modules_again_and_again(name: str, num_modules: int) -> None:
    generator = torch.Generator().manual_seed(1)
    profile, weights = layer_of(torch.randn(40, 96, generator=generator), torch.randn(96, 24, generator=generator))
    cut = find_partitioner(name)
    one, two = (cut(profile, weights, num_modules, 5) for _ in range(2))
    assert one.module_F.bincount().tolist() == [96 // num_modules] * num_modules
    assert torch.equal(one.module_F, two.module_F)
    with pytest.raises(PartitionError, match="num_modules: 7 does not divide 96 neurons; nearest that do: 6, 8"):
        cut(profile, weights, 7, 5)


def test_kmeans_reads_the_gate_and_not_the_length_of_its_rows() -> None:
    truth_F, gate_FD = planted(96, 6, 24, 0.2)
    other_F, up_FD = planted(96, 6, 24, 0.2, seed=9)
    gate_FD = gate_FD * (0.1 + 10 * torch.rand(96, 1, generator=torch.Generator().manual_seed(0)))
    profile, weights = layer_of(torch.zeros(4, 96), up_FD, gate_FD)
    assert same_modules(PARTITIONERS["kmeans"](profile, weights, 6, 0).module_F, truth_F)
    profile, weights = layer_of(torch.zeros(4, 96), up_FD)
    assert same_modules(PARTITIONERS["kmeans"](profile, weights, 6, 0).module_F, other_F)


def test_activations_finds_neurons_that_move_together() -> None:
    truth_F, column_FS = planted(96, 6, 200, 0.5)
    # neither a constant nor a scale is movement
    shifted_SF = (column_FS * (0.1 + torch.rand(96, 1)) + 5 * torch.randn(96, 1)).T
    profile, weights = layer_of(shifted_SF, torch.randn(96, 24))
    assert same_modules(PARTITIONERS["activations"](profile, weights, 6, 0).module_F, truth_F)


@pytest.mark.parametrize("method", ["kmeans", "activations", "importance", "random", "contiguous"])
def test_the_core_holds_what_matters_most_and_the_rest_is_cut_as_alone(method: str) -> None:
    draw = torch.Generator().manual_seed(3)
    rows_SF, up_FD = torch.randn(40, 24, generator=draw), torch.randn(24, 6, generator=draw)
    profile, weights = layer_of(rows_SF, up_FD)
    profile = replace(profile, square_PF=rows_SF.double().square().sum(0, keepdim=True))
    partitioner = find_partitioner(method)
    partition = with_core(partitioner, 2)(profile, weights, 8, 5)
    # the loop that anyone can read: root mean square of each neuron, times the length of its column
    tokens = int(profile.tokens_P.sum())
    score = [
        (sum(float(square) for square in profile.square_PF[:, neuron]) / tokens) ** 0.5
        * float(weights.down_DF[:, neuron].norm())
        for neuron in range(24)
    ]
    order = sorted(range(24), key=lambda neuron: -score[neuron])
    assert [int(partition.module_F[neuron]) for neuron in order[:6]] == [0, 0, 0, 1, 1, 1]
    rest = torch.tensor(sorted(order[6:]))
    alone = partitioner(profile.take(rest), weights.take(rest), 6, 5)
    assert torch.equal(partition.module_F[rest], 2 + alone.module_F)
    assert with_core(partitioner, 0) is partitioner


def test_a_core_leaves_modules_to_choose_from() -> None:
    shares = (0.0, 0.1, 0.25, 0.5, 0.99)
    recipes = [make_recipe({"partition.num_modules": 16, "partition.core_fraction": share}) for share in shares]
    assert [core_modules(recipe) for recipe in recipes] == [0, 1, 2, 4, 7]
    assert core_modules(make_recipe({"partition.core_fraction": 0.5, "assignment.modules_per_expert": 6})) == 3


def test_a_partition_by_gradients_stays_one_behind_a_core() -> None:
    assert reads_gradients(with_core(find_partitioner("gradient"), 1))
    assert not reads_gradients(with_core(find_partitioner("kmeans"), 1))


def test_a_partition_knows_its_permutation() -> None:
    partition = Partition(torch.tensor([1, 0, 2, 1, 0, 2]), 3)
    assert partition.permutation_F.tolist() == [1, 4, 0, 3, 2, 5]
    assert partition.module_size == 2


@pytest.mark.parametrize(
    ("modules", "num_modules", "said"),
    [
        ([0, 0, 1], 2, "modules have 1 to 2 neurons"),
        ([0, 0, 2, 2], 3, "modules have 0 to 2 neurons"),
        ([0, 1, 2, 3], 3, "modules 0 to 3 are not all within 0 to 2"),
        ([-1, 0], 2, "modules -1 to 0 are not"),
        ([], 1, "there must be one at least"),
        ([0], 0, "there must be one at least"),
    ],
)
def test_a_partition_refuses_unequal_modules(modules: list[int], num_modules: int, said: str) -> None:
    with pytest.raises(PartitionError, match=said):
        Partition(torch.tensor(modules, dtype=torch.int64), num_modules)
    with pytest.raises(PartitionError, match="it is int64"):
        Partition(torch.tensor([0.0, 1.0]), 2)


@pytest.mark.parametrize(
    ("neurons", "num_modules", "nearest"),
    [(512, 7, "4, 8"), (512, 1024, "512"), (172, 16, "4, 43"), (512, 0, "1"), (512, -3, "1"), (13, 2, "1, 13")],
)
def test_a_number_that_does_not_divide_names_the_nearest(neurons: int, num_modules: int, nearest: str) -> None:
    with pytest.raises(PartitionError) as error:
        check_num_modules(neurons, num_modules)
    wanted = (
        f"num_modules: {num_modules} does not divide {neurons} neurons; nearest that do: {nearest} (--num-modules)."
    )
    assert str(error.value) == wanted


def test_partitioners_are_found_by_name_or_path() -> None:
    assert find_partitioner("modmoe.analysis.partitions.random.cut_in_order") is PARTITIONERS["contiguous"]
    with pytest.raises(RecipeError, match=r"partition\.method: no method 'kmean'\. Did you mean 'kmeans'\?"):
        find_partitioner("kmean")
    with pytest.raises(RecipeError, match=r"'no\.such\.thing' cannot be imported"):
        find_partitioner("no.such.thing")
    with pytest.raises(RecipeError, match="cannot be imported"):
        find_partitioner("modmoe.analysis.partitions.random.cut")
    with pytest.raises(RecipeError, match="is a dict, not a function"):
        find_partitioner("modmoe.analysis.partitions.table.PARTITIONERS")


def test_round_trip_through_the_disk(tmp_path: Path) -> None:
    partitions = [Partition(torch.arange(6) % 3, 3), Partition(torch.arange(6) % 2, 2)]
    path = save_partitions(tmp_path, partitions)
    assert path == tmp_path / "partition.safetensors"
    for one, two in zip(partitions, load_partitions(tmp_path), strict=True):
        assert torch.equal(one.module_F, two.module_F)
        assert one.num_modules == two.num_modules
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="damaged or cut short"):
        load_partitions(tmp_path)
    path.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        load_partitions(tmp_path)


def test_importing_the_tables_imports_nothing_heavy() -> None:
    code = (
        "import sys, modmoe.analysis, modmoe.conversion.modular.assignment; "
        "print([m for m in ('sklearn', 'scipy', 'datasets', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
