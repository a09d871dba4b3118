"""Counts from headers equal counts by hand, brute force over expert choices, and the bytes on disk."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from modmoe.errors import CheckpointError, PartitionError, RecipeError
from modmoe.models import counts
from modmoe.models.counts import largest_union, mean_union, modules_that_fit, tensor_bytes
from modmoe.models.inspection import inspect
from modmoe.recipe.schema import make_recipe
from modmoe.storage.checkpoint import Checkpoint

D, V, M, SIZE = 8, 20, 6, 3
NEURONS = M * SIZE


def write_tied(
    folder: Path,
    layers: list[list[list[int]]],
    *,
    top_k: int = 1,
    routing: str = "token",
    gated: bool = True,
    biased: bool = False,
    means: bool = False,
    shards: int = 1,
    **changes: Any,
) -> dict[str, Any]:
    """Write a tied checkpoint whose layers' experts have the given dense modules; return its configuration."""
    torch.manual_seed(0)
    tensors: dict[str, Tensor] = {"model.embed_tokens.weight": torch.randn(V, D), "model.norm.weight": torch.ones(D)}
    stored = []
    for layer, experts in enumerate(layers):
        used = sorted(set().union(*map(set, experts)))
        stored.append(len(used))
        neurons, place = len(used) * SIZE, f"model.layers.{layer}.mlp."
        for name in ("gate_proj", "up_proj") if gated else ("up_proj",):
            tensors[f"{place}{name}.weight"] = torch.randn(neurons, D)
            if biased:
                tensors[f"{place}{name}.bias"] = torch.randn(neurons)
        tensors[f"{place}down_proj.weight"] = torch.randn(D, neurons)
        if biased:
            tensors[f"{place}down_proj.bias"] = torch.randn(D)
        tensors[f"{place}membership"] = torch.tensor([[module in expert for module in used] for expert in experts])
        if routing != "task":
            tensors[f"{place}router.weight"] = torch.randn(len(experts), D)
        if means:
            tensors[f"{place}means"] = torch.randn(len(used), D)
        tensors[f"model.layers.{layer}.self_attn.q_proj.weight"] = torch.randn(D, D)
    config = {
        "model_type": "modmoe_llama",
        "num_hidden_layers": len(layers),
        "tie_word_embeddings": True,
        "num_modules": M,
        "module_size": SIZE,
        "stored_modules": stored,
        "num_experts": len(layers[0]),
        "num_experts_per_tok": top_k,
        "expert_names": [f"task{e}" for e in range(len(layers[0]))],
        "modules_per_expert": len(layers[0][0]),
        "shared_modules": 0,
        "routing": routing,
        "combine": "union",
        "ffn_layers": "model.layers",
        "ffn_path": "mlp",
        "dense_intermediate_size": NEURONS,
        "modmoe_method": "modular",
        **changes,
    }
    write(folder, config, tensors, shards)
    return config


def write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], shards: int = 1) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return
    names = list(tensors)
    weight_map = {name: f"model-{number % shards:05d}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


LAYERS = [[[0, 1, 2], [0, 3, 4], [0, 1, 3]], [[0, 1, 2], [0, 1, 2], [1, 2, 5]]]


def test_counts_are_those_by_hand(tmp_path: Path) -> None:
    write_tied(tmp_path, LAYERS)
    found = inspect(str(tmp_path))
    other = V * D + D + 2 * D * D
    routers = 2 * 3 * D
    module = 3 * D * SIZE
    assert found["parameters"] == {
        "dense": other + 2 * M * module,
        "stored": other + routers + (5 + 4) * module,
        "active": other + routers + 2 * 3 * module,
        "active_max": other + routers + 2 * 3 * module,
        "materialised": other + routers + 2 * 9 * module,
    }
    assert found["sparsity"]["ffn"] == 0.5
    assert found["sparsity"]["total"] == pytest.approx(2 * 3 * module / (other + 2 * M * module), abs=1e-6)
    assert [expert["name"] for expert in found["experts"]] == ["task0", "task1", "task2"]
    assert [expert["modules_used"] for expert in found["experts"]] == [3, 3, 3]
    # layer 0: expert 0 shares 0 and 1 with others but not 2; layer 1: all of its modules
    assert found["experts"][0]["overlap"] == pytest.approx((2 / 3 + 1) / 2, abs=1e-6)
    assert found["experts"][2]["overlap"] == pytest.approx((1 + 2 / 3) / 2, abs=1e-6)


@pytest.mark.parametrize(
    ("top_k", "combine", "modules"), [(1, "union", 9 + 9), (2, "sum", 9 + 9), (2, "union", (1 + 6) + (2 + 3))]
)
def test_what_all_experts_have_is_one_shared_expert_where_a_token_has_their_union(
    top_k: int, combine: str, modules: int, tmp_path: Path
) -> None:
    write_tied(tmp_path, LAYERS, top_k=top_k, combine=combine)
    counts = inspect(str(tmp_path))["parameters"]
    module = 3 * D * SIZE
    # the first layer's experts all have module 0, the second's 1 and 2; 5 and 4 modules are stored
    assert counts["materialised"] - counts["stored"] == (modules - 5 - 4) * module


def test_where_every_module_is_an_expert_nothing_is_copied(tmp_path: Path) -> None:
    write_tied(tmp_path, [[[0, 1, own] for own in range(2, M)]], top_k=2)
    counts = inspect(str(tmp_path))["parameters"]
    assert counts["materialised"] == counts["stored"]


def test_the_contract_of_inspect(tmp_path: Path) -> None:
    write_tied(tmp_path, LAYERS, top_k=2, routing="sequence")
    found = inspect(str(tmp_path))
    keys = "model_type method num_layers num_modules num_experts modules_per_expert top_k routing bytes_on_disk"
    assert set(keys.split()) <= set(found)
    assert (found["model_type"], found["method"], found["top_k"], found["routing"]) == (
        "modmoe_llama",
        "modular",
        2,
        "sequence",
    )
    json.dumps(found, allow_nan=False)


def test_active_counts_a_shared_module_once(tmp_path: Path) -> None:
    write_tied(tmp_path, [LAYERS[0]], top_k=2)
    found = inspect(str(tmp_path))
    unions = [len(set(a) | set(b)) for a, b in itertools.combinations(LAYERS[0], 2)]
    module = 3 * D * SIZE
    fixed = V * D + D + D * D + 3 * D
    assert found["parameters"]["active"] == round(fixed + module * sum(unions) / 3)
    assert found["parameters"]["active_max"] == fixed + module * max(unions)


@pytest.mark.parametrize("seed", range(20))
def test_unions_are_those_of_brute_force(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(seed)
    count = draw.randint(1, 6)
    experts = [draw.sample(range(9), draw.randint(0, 5)) for _ in range(count)]
    top_k = draw.randint(1, count)
    sizes = [len(set().union(*map(set, chosen))) for chosen in itertools.combinations(experts, top_k)]
    assert mean_union(experts, top_k) == pytest.approx(sum(sizes) / len(sizes))
    assert largest_union(experts, top_k) == max(sizes)
    monkeypatch.setattr(counts, "MOST_SUBSETS", 0)
    assert largest_union(experts, top_k) >= max(sizes)


def test_the_largest_union_of_many_is_exact_where_experts_share_a_core_alone() -> None:
    experts = [[0, 1, 2, 3 + number] for number in range(60)]
    assert largest_union(experts, 30) == 33
    assert mean_union(experts, 30) == pytest.approx(33)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(("gated", "biased", "means"), [(True, True, True), (False, True, False), (True, False, True)])
def test_accounting_equals_bytes_on_disk(tmp_path: Path, shards: int, gated: bool, biased: bool, means: bool) -> None:
    write_tied(tmp_path, LAYERS, shards=shards, gated=gated, biased=biased, means=means)
    found, files = inspect(str(tmp_path)), sorted(tmp_path.glob("*.safetensors"))
    assert found["bytes_on_disk"] == sum(file.stat().st_size for file in files)
    headers = sum(8 + int.from_bytes(file.read_bytes()[:8], "little") for file in files)
    assert found["tensor_bytes"] == found["bytes_on_disk"] - headers
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    membership = sum(tensor.numel() for name, tensor in tensors.items() if name.endswith("membership"))
    assert found["tensor_bytes"] == 4 * found["parameters"]["stored"] + membership
    assert found["parameters"]["stored"] == sum(t.numel() for t in tensors.values() if t.is_floating_point())


def test_dense_parameters_leave_out_what_conversion_added(tmp_path: Path) -> None:
    write_tied(tmp_path / "a", [[[0, 1, 2, 3, 4, 5]]], means=True, biased=True)
    write_tied(tmp_path / "b", [[[0, 1, 2, 3, 4, 5]]], routing="task", biased=True)
    a, b = inspect(str(tmp_path / "a")), inspect(str(tmp_path / "b"))
    assert a["parameters"]["dense"] == b["parameters"]["dense"] == b["parameters"]["stored"]
    assert b["sparsity"] == {"ffn": 0.0, "total": 0.0}
    assert b["router_kind"] is None


def test_a_dense_directory(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(V, D), "model.layers.0.mlp.up_proj.weight": torch.zeros(4, D)}
    write(tmp_path, {"model_type": "llama", "num_hidden_layers": 1}, tensors)
    found = inspect(str(tmp_path))
    assert (found["num_experts"], found["num_modules"], found["top_k"], found["experts"]) == (0, 0, 0, [])
    assert set(found["parameters"].values()) == {V * D + 4 * D}
    assert found["sparsity"] == {"ffn": 0.0, "total": 0.0}


def test_a_head_tied_to_the_embeddings_counts_once(tmp_path: Path) -> None:
    shared = torch.randn(V, D)
    tensors = {"model.embed_tokens.weight": shared, "lm_head.weight": shared.clone()}
    write(tmp_path / "tied", {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": True}, tensors)
    write(tmp_path / "free", {"model_type": "llama", "num_hidden_layers": 1, "tie_word_embeddings": False}, tensors)
    assert inspect(str(tmp_path / "tied"))["parameters"]["stored"] == V * D
    assert inspect(str(tmp_path / "free"))["parameters"]["stored"] == 2 * V * D


def test_a_mixture_of_experts_of_another_format(tmp_path: Path) -> None:
    tensors = {"model.norm.weight": torch.zeros(D)}
    for expert in range(4):
        tensors[f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight"] = torch.zeros(5, D)
    config = {"model_type": "mixtral", "num_hidden_layers": 1, "num_local_experts": 4, "num_experts_per_tok": 1}
    write(tmp_path, config, tensors)
    found = inspect(str(tmp_path))
    assert (found["num_experts"], found["top_k"], found["num_modules"]) == (4, 1, 0)
    assert found["parameters"] | {"dense": None} == found["parameters"]
    assert (found["parameters"]["stored"], found["parameters"]["active"]) == (D + 20 * D, D + 5 * D)
    assert found["sparsity"]["ffn"] == 0.75


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        inspect(str(tmp_path / "none"))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"no adapter_model\.safetensors"):
        inspect(str(tmp_path))
    write_tied(tmp_path / "odd", LAYERS, num_experts=2)
    with pytest.raises(CheckpointError, match=r"membership.*has shape \(3, 5\)"):
        inspect(str(tmp_path / "odd"))
    write_tied(tmp_path / "lacking", LAYERS, module_size=None)
    with pytest.raises(CheckpointError, match="module_size is None"):
        inspect(str(tmp_path / "lacking"))


def write_dense(folder: Path) -> None:
    tensors = {"model.embed_tokens.weight": torch.zeros(V, D)}
    for layer in range(2):
        for name, shape in {"gate_proj": (NEURONS, D), "up_proj": (NEURONS, D), "down_proj": (D, NEURONS)}.items():
            tensors[f"model.layers.{layer}.mlp.{name}.weight"] = torch.zeros(*shape)
    write(folder, {"model_type": "llama", "num_hidden_layers": 2, "intermediate_size": NEURONS}, tensors)


def test_modules_that_fit_do_fit_and_one_more_does_not(tmp_path: Path) -> None:
    write_dense(tmp_path)
    tasks = {"a": "a.txt", "b": "b.txt"}
    recipe = make_recipe({"source": str(tmp_path), "tasks": tasks, "partition.num_modules": M})
    dense_bytes = tensor_bytes(Checkpoint(tmp_path))
    module_bytes = 2 * 4 * 3 * D * SIZE
    added = 2 * (4 * 2 * D + 2 * M)  # routers and membership; the ranking grows with the modules
    # two experts of R modules store at most 2 R
    for modules in (1, 2):
        budget = dense_bytes + added + 2 * 4 * 2 * modules - (M - 2 * modules) * module_bytes
        assert modules_that_fit(recipe, budget) == modules
        if modules > 1:
            assert modules_that_fit(recipe, budget - 1) == modules - 1
    assert modules_that_fit(recipe, 10**9) == M
    with pytest.raises(RecipeError, match=r"fit_bytes: 100 bytes do not hold .* 1 of 6 modules"):
        modules_that_fit(recipe, 100)


def test_modules_that_fit_with_shared_ones(tmp_path: Path) -> None:
    write_dense(tmp_path)
    values = {"source": str(tmp_path), "tasks": {"a": "a", "b": "b"}, "partition.num_modules": M}
    shared = make_recipe({**values, "assignment.shared_modules": 2, "router.routing": "task"})
    dense_bytes = tensor_bytes(Checkpoint(tmp_path))
    module_bytes = 2 * 4 * 3 * D * SIZE
    # 2 shared and 2 * (3 - 2) of their own
    assert modules_that_fit(shared, dense_bytes + 2 * (2 * M + 4 * 2 * 3) - 2 * module_bytes) == 3
    covered = make_recipe({**values, "assignment.coverage": True, "router.routing": "task"})
    with pytest.raises(RecipeError):
        modules_that_fit(covered, dense_bytes - 1)
    with pytest.raises(PartitionError, match="5 does not divide the 18 neurons"):
        modules_that_fit(make_recipe({**values, "partition.num_modules": 5}), 10**9)
