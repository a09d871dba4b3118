"""All layers are cut at once, and come out as if they were cut one by one, whatever the threads and the order."""

# Shapes: F neurons, X features, S rows of the sketch, D model width

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from modmoe.analysis.partitions.kmeans import balanced_kmeans
from modmoe.analysis.partitions.table import PARTITIONERS, Partition, cut_layers
from modmoe.analysis.profile import ActivationProfile
from modmoe.models.ffn_layout import FFNWeights

LAYERS = 4


def layer_of(layer: int) -> tuple[ActivationProfile, FFNWeights]:
    """Return a layer of 192 neurons, keys of width 300 (so that they are projected) and a sketch of 40 rows."""
    generator = torch.Generator().manual_seed(layer)
    rows_SF = torch.randn(40, 192, generator=generator).relu()
    zeros_PF = torch.zeros(1, 192, dtype=torch.float64)
    sums = (zeros_PF, zeros_PF, zeros_PF, rows_SF.double().sum(0, keepdim=True))
    profile = ActivationProfile(("t",), torch.tensor([40]), *sums, rows_SF, rows_seen=40)
    up_FD = torch.randn(192, 300, generator=generator)
    return profile, FFNWeights(None, up_FD, up_FD.T)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", PARTITIONERS)
@pytest.mark.parametrize("threads", [1, 2, 4, None])
def test_the_number_of_threads_changes_nothing(name: str, threads: int | None, two_threads: None) -> None:
    cut = PARTITIONERS[name]
    wanted = [cut(*layer_of(layer), 12, 5).module_F for layer in range(LAYERS)]
    found = cut_layers(cut, layer_of, range(LAYERS), 12, 5, threads=threads)
    assert all(torch.equal(one.module_F, two_F) for one, two_F in zip(found, wanted, strict=True))
    assert torch.get_num_threads() == 2


def test_layers_that_end_in_another_order_come_back_in_theirs() -> None:
    over = [threading.Event() for _ in range(LAYERS)]
    steps: list[tuple[int, int]] = []

    def cut_last_first(profile: ActivationProfile, weights: FFNWeights, num_modules: int, seed: int) -> Partition:
        layer = int(profile.rows_SF[0, 0])
        assert layer == LAYERS - 1 or over[layer + 1].wait(60)
        over[layer].set()
        return Partition(torch.arange(8).roll(layer) % num_modules, num_modules)

    def read(layer: int) -> tuple[ActivationProfile, FFNWeights]:
        profile, weights = layer_of(layer)
        profile.rows_SF[0, 0] = layer
        return profile, weights

    layers = [2, 0, 3, 1]
    found = cut_layers(
        cut_last_first, read, layers, 4, 0, threads=LAYERS, progress=lambda done, total: steps.append((done, total))
    )
    assert [partition.module_F.tolist() for partition in found] == [
        (torch.arange(8).roll(layer) % 4).tolist() for layer in layers
    ]
    assert steps == [(done, LAYERS) for done in range(LAYERS + 1)]


@pytest.mark.parametrize("threads", [1, 2])
def test_no_more_layers_are_read_than_there_are_threads(threads: int) -> None:
    alive: weakref.WeakSet[Tensor] = weakref.WeakSet()
    most = 0

    def read(layer: int) -> tuple[ActivationProfile, FFNWeights]:
        nonlocal most
        profile, weights = layer_of(layer)
        alive.add(weights.up_FD)
        most = max(most, len(alive))
        return profile, weights

    cut_layers(PARTITIONERS["contiguous"], read, range(12), 4, 0, threads=threads)
    assert 1 <= most <= threads


def test_an_error_ends_the_cut_and_leaves_the_threads_as_they_were(two_threads: None) -> None:
    read: list[int] = []

    def read_layer(layer: int) -> tuple[ActivationProfile, FFNWeights]:
        read.append(layer)
        if layer == 1:
            raise KeyError("layer 1")
        return layer_of(layer)

    with pytest.raises(KeyError, match="layer 1"):
        cut_layers(PARTITIONERS["kmeans"], read_layer, range(200), 4, 0, threads=1)
    assert len(read) < 200
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("width", [32, 600])
def test_another_order_of_neurons_gives_the_same_modules(width: int) -> None:
    generator = torch.Generator().manual_seed(3)
    features_FX = torch.randn(240, width, generator=generator)
    order_F = torch.randperm(240, generator=generator)
    one_F = balanced_kmeans(features_FX, 10, seed=0)[order_F]
    two_F = balanced_kmeans(features_FX[order_F], 10, seed=0)
    assert torch.equal(one_F.unsqueeze(0) == one_F.unsqueeze(1), two_F.unsqueeze(0) == two_F.unsqueeze(1))
