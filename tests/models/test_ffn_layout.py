"""FFNs are read from, taken out of and written into every layout: fused, transposed, biased, without a gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from modmoe.models.families import FAMILIES, Family
from modmoe.models.ffn_layout import (
    PLAIN,
    ROLES,
    FFNLayout,
    FFNWeights,
    dense_layout,
    neuron_ops,
    plain_layout,
    prefix_of,
    read_ffn,
)
from modmoe.storage.checkpoint import Checkpoint
from modmoe.storage.plan import Copy, Op, Stack, Take, pieces_of

WIDTH, NEURONS = 3, 5
TAKEN_N = torch.tensor([4, 0, 2])
FUSED = {"gate": "mlp.both", "up": "mlp.both"}
CASES: dict[str, tuple[Family, bool]] = {
    "plain": (FAMILIES["llama"], False),
    "biased": (FAMILIES["llama"], True),
    "fused": (FAMILIES["phi3"], False),
    "fused and biased": (Family(model_type="x", **FUSED), True),
    "transposed": (Family(model_type="x", transposed=True), False),
    "transposed and biased, no gate": (FAMILIES["gpt2"], True),
    "no gate": (FAMILIES["gpt_neox"], True),
    "beside each other": (FAMILIES["opt"], True),
    "all at once": (Family(model_type="x", layers="h", transposed=True, **FUSED), True),
}
"""A family's row, and whether its FFNs have biases."""
cases = pytest.mark.parametrize("case", CASES)


def ffn(family: Family, is_biased: bool) -> FFNWeights:
    """Return a random FFN of the kind that a family has."""
    draw = torch.Generator().manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    has_gate = family.gate is not None
    return FFNWeights(
        gate_FD=tensor(NEURONS, WIDTH) if has_gate else None,
        up_FD=tensor(NEURONS, WIDTH),
        down_DF=tensor(WIDTH, NEURONS),
        gate_bias_F=tensor(NEURONS) if has_gate and is_biased else None,
        up_bias_F=tensor(NEURONS) if is_biased else None,
        down_bias_D=tensor(WIDTH) if is_biased else None,
    )


def tensors_of(family: Family, weights: FFNWeights, layer: int) -> dict[str, Tensor]:
    """Return an FFN's tensors as a checkpoint of the family has them, spelt out from its row."""
    prefix = f"{family.layers}.{layer}."
    tensors: dict[str, Tensor | None] = {
        f"{family.up}.weight": weights.up_FD,
        f"{family.up}.bias": weights.up_bias_F,
        f"{family.down}.weight": weights.down_DF,
        f"{family.down}.bias": weights.down_bias_D,
    }
    if family.gate == family.up:
        assert weights.gate_FD is not None
        tensors[f"{family.up}.weight"] = torch.cat([weights.gate_FD, weights.up_FD])
        if weights.gate_bias_F is not None and weights.up_bias_F is not None:
            tensors[f"{family.up}.bias"] = torch.cat([weights.gate_bias_F, weights.up_bias_F])
    elif family.gate is not None:
        tensors |= {f"{family.gate}.weight": weights.gate_FD, f"{family.gate}.bias": weights.gate_bias_F}
    return {
        prefix + name: tensor.T.contiguous() if family.transposed and tensor.ndim == 2 else tensor
        for name, tensor in tensors.items()
        if tensor is not None
    }


def some_neurons(weights: FFNWeights, neurons_N: Tensor) -> FFNWeights:
    """Return an FFN of some of the neurons."""

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[neurons_N]

    up_ND = weights.up_FD[neurons_N]
    down_DN = weights.down_DF[:, neurons_N]
    return FFNWeights(
        rows(weights.gate_FD), up_ND, down_DN, rows(weights.gate_bias_F), rows(weights.up_bias_F), weights.down_bias_D
    )


def checkpoint(directory: Path, tensors: dict[str, Tensor]) -> Checkpoint:
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "x"}), encoding="utf-8")
    return Checkpoint(directory)


def outputs_of(ops: dict[str, Op], source: Checkpoint) -> dict[str, Tensor]:
    """Return what ops make, once it is seen that their shapes and their pieces say the same."""
    shapes = {name: source.shape(name) for name in source}
    tensors = {name: op.make(source) for name, op in ops.items()}
    for name, op in ops.items():
        assert op.shape(shapes) == tuple(tensors[name].shape)
        assert op.dtype_of({key: source.dtype(key) for key in source}) == tensors[name].dtype
        assert tensors[name].is_contiguous()
        assert torch.equal(torch.cat([piece.reshape(-1) for piece in pieces_of(op, source)]), tensors[name].reshape(-1))
    return tensors


def assert_same(tensors: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)


@cases
def test_an_ffn_is_read_as_plain_matrices(case: str) -> None:
    family, is_biased = CASES[case]
    weights = ffn(family, is_biased)
    same = read_ffn(tensors_of(family, weights, 7), family, 7)
    for field in FFNWeights.__slots__:
        one, other = getattr(same, field), getattr(weights, field)
        assert (one is None) == (other is None), field
        assert one is None or torch.equal(one, other), field


def test_an_ffn_that_lacks_a_matrix_is_named() -> None:
    family = FAMILIES["llama"]
    tensors = tensors_of(family, ffn(family, False), 0)
    del tensors["model.layers.0.mlp.gate_proj.weight"]
    with pytest.raises(KeyError, match=r"^'model\.layers\.0\.mlp\.gate_proj\.weight'$"):
        read_ffn(tensors, family, 0)


@cases
def test_neurons_are_taken_into_plain_layers(case: str, tmp_path: Path) -> None:
    family, is_biased = CASES[case]
    weights, layout = ffn(family, is_biased), dense_layout(family, 1)
    plain = plain_layout("tied.", has_gate=family.gate is not None)
    ops = neuron_ops(checkpoint(tmp_path, tensors_of(family, weights, 1)), layout, plain, TAKEN_N)
    as_llama = Family(
        model_type="llama",
        layers="tied",
        gate=None if family.gate is None else "gate_proj",
        up="up_proj",
        down="down_proj",
    )
    expected = tensors_of(as_llama, some_neurons(weights, TAKEN_N), 0)
    expected = {name.replace("tied.0.", "tied."): tensor for name, tensor in expected.items()}
    assert_same(outputs_of(ops, Checkpoint(tmp_path)), expected)
    # one op a tensor, and the bias behind down belongs to no neuron
    kinds = {name: Copy if name == "tied.down_proj.bias" else Take for name in expected}
    assert {name: type(op) for name, op in ops.items()} == kinds


@cases
def test_neurons_of_plain_layers_are_written_into_every_layout(case: str, tmp_path: Path) -> None:
    family, is_biased = CASES[case]
    weights = ffn(family, is_biased)
    paths = {"gate": None if family.gate is None else "mlp.gate_proj"}
    tied = checkpoint(tmp_path, tensors_of(Family(model_type="llama", **paths), weights, 0))
    ops = neuron_ops(tied, plain_layout("model.layers.0.mlp."), dense_layout(family, 0), TAKEN_N)
    assert_same(outputs_of(ops, tied), tensors_of(family, some_neurons(weights, TAKEN_N), 0))


@cases
def test_fewer_neurons_stay_in_their_layout(case: str, tmp_path: Path) -> None:
    family, is_biased = CASES[case]
    weights, layout = ffn(family, is_biased), dense_layout(family, 0)
    source = checkpoint(tmp_path, tensors_of(family, weights, 0))
    ops = neuron_ops(source, layout, layout, TAKEN_N)
    assert_same(outputs_of(ops, source), tensors_of(family, some_neurons(weights, TAKEN_N), 0))
    # a tensor that is gate and up is taken from in one go
    assert not any(isinstance(op, Stack) for op in ops.values())


@cases
def test_no_neurons_are_an_ffn_too(case: str, tmp_path: Path) -> None:
    family, is_biased = CASES[case]
    weights, layout = ffn(family, is_biased), dense_layout(family, 0)
    source, none_N = checkpoint(tmp_path, tensors_of(family, weights, 0)), TAKEN_N[:0]
    tensors = {name: op.make(source) for name, op in neuron_ops(source, layout, layout, none_N).items()}
    assert_same(tensors, tensors_of(family, some_neurons(weights, none_N), 0))


@cases
def test_tensors_that_grow_with_the_neurons_are_named(case: str) -> None:
    family, is_biased = CASES[case]
    weights, layout = ffn(family, is_biased), dense_layout(family, 2)
    tensors = tensors_of(family, weights, 2)
    smaller = tensors_of(family, some_neurons(weights, TAKEN_N), 2)
    growing = {name for name in tensors if tensors[name].shape != smaller[name].shape}
    names = layout.neuron_names()
    assert len(names) == len(set(names))
    assert set(names) & tensors.keys() == growing
    for role in layout.roles:
        name, dim = layout.name(role), layout.neuron_dim(role)
        assert tensors[name].shape[dim] != smaller[name].shape[dim]
        assert layout.name(layout.role_of(name)) == name
    assert layout.biased_roles(tensors) == ([role for role in ROLES if role in layout.roles] if is_biased else [])


@cases
def test_biases_that_are_added_are_as_long_as_those_that_are_there(case: str) -> None:
    family, _ = CASES[case]
    tensors = tensors_of(family, ffn(family, True), 0)
    zeros = dense_layout(family, 0).zero_biases(NEURONS, torch.float16)
    behind = f"{family.layers}.0.{family.down}.bias"
    assert zeros.keys() == {name for name in tensors if name.endswith(".bias")} - {behind}
    for name, op in zeros.items():
        assert op.make({}).equal(torch.zeros(tensors[name].shape, dtype=torch.float16))


def test_a_weight_is_stored_as_the_layout_has_it() -> None:
    down_DF = torch.arange(6.0).view(2, 3)
    assert dense_layout(FAMILIES["llama"], 0).as_stored(down_DF) is down_DF
    turned_FD = dense_layout(FAMILIES["gpt2"], 0).as_stored(down_DF)
    assert turned_FD.is_contiguous()
    assert torch.equal(turned_FD, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]))


def test_names_of_plain_layers() -> None:
    layout = plain_layout(prefix_of({"ffn_layers": "transformer.h", "ffn_path": "ffn"}, 3))
    assert [layout.name(role) for role in ROLES] == [
        "transformer.h.3.ffn.gate_proj.weight",
        "transformer.h.3.ffn.up_proj.weight",
        "transformer.h.3.ffn.down_proj.weight",
    ]
    assert layout.name("down", "bias") == "transformer.h.3.ffn.down_proj.bias"
    assert prefix_of({}, 0) == "model.layers.0.mlp."
    without = plain_layout("ffn.", has_gate=False)
    assert without.roles == ("up", "down")
    assert not without.is_fused
    with pytest.raises(KeyError, match="gate"):
        without.name("gate")
    for name in ("ffn.up_proj.bias", "ffn.gate_proj.weight", "up_proj.weight"):
        with pytest.raises(KeyError, match=name):
            without.role_of(name)
    # Llama's own names are plain ones
    assert dense_layout(FAMILIES["llama"], 0) == FFNLayout(
        prefix="model.layers.0.", paths={role: f"mlp.{name}" for role, name in PLAIN.items()}
    )
