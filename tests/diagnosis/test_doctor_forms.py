"""The doctor on every other form: adapters alone and with their base model, packed, dense, native and pruned models."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import modmoe
from modmoe.storage.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, SINGLE
from tests.support import moes, planned, tiny
from tests.support.packed_models import write_packed

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of one of each form, and the dense model that they are of."""
    home = tmp_path_factory.mktemp("forms")
    dense, tied = planned.write_tied(home, "mistral")
    modmoe.convert(dense, home / "adapter", method="adapters", adapter="perft_r", num_experts=3, top_k=2)
    modmoe.export(home / "adapter", home / "adapted", form="tied", verify=False)
    modmoe.export(tied, home / "kept", form="dense", expert="words", verify=False)
    modmoe.export(tied, home / "packed", form="packed", verify=False)
    modmoe.export(tied, home / "native", form="native", verify=False)
    moes.moe_model("qwen2_moe").save_pretrained(home / "moe")
    tiny.tokenizer().save_pretrained(home / "moe")
    lora = get_peft_model(tiny.dense_model("mistral"), LoraConfig(target_modules=["up_proj"], r=2))
    lora.peft_config["default"].base_model_name_or_path = str(dense)
    lora.save_pretrained(home / "lora")
    return home


@pytest.mark.parametrize("form", ["adapter", "adapted", "kept", "packed", "native", "moe", "lora"])
def test_what_is_whole_is_healthy(room: Path, form: str) -> None:
    found = modmoe.doctor(room / form)
    assert found["faults"] == []
    assert found["checked"]["names and shapes"] >= found["checked"]["tensors"] > 0


def edit(**changes: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        path = directory / ADAPTER_CONFIG
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor], str], object], file: str = ADAPTER_WEIGHTS) -> Any:
    def spoil(directory: Path) -> None:
        values = load_file(directory / file)
        change(values, sorted(values)[0])
        save_file({name: value.contiguous() for name, value in values.items()}, directory / file)

    return spoil


def pickled(directory: Path) -> None:
    (directory / ADAPTER_WEIGHTS).rename(directory / "adapter_model.bin")


CASES: list[tuple[str, Any, str, str]] = [
    ("adapter", tensors(lambda v, n: v.update(other=v.pop(n))), "", "is implied here and not in the file"),
    ("adapter", tensors(lambda v, n: v.update(other=v[n].clone())), "'other'", "is no tensor of the adapter"),
    ("adapter", tensors(lambda v, n: v.update({n: v[n][:1]})), "'", "is implied"),
    ("adapter", tensors(lambda v, n: v.update({n: v[n] * torch.nan})), "'", "not finite"),
    ("adapter", pickled, ADAPTER_WEIGHTS, "is missing"),
    ("adapter", edit(peft_type="MODMOE_PERFT_Q"), "peft_type", "knows no method 'perft_q'"),
    ("adapter", edit(num_experts=4), "'", "is implied"),
    ("adapter", edit(base_model_name_or_path=None), ADAPTER_CONFIG, "base_model_name_or_path is None"),
    ("adapter", edit(target_modules=["nowhere"]), ADAPTER_CONFIG, "cannot be attached"),
    ("lora", edit(r=3), "'", "is implied"),
    ("packed", tensors(lambda v, n: v.pop(n), SINGLE), "'", "in no file"),
    ("packed", lambda d: (d / "packed_modmoe.py").write_text("pass"), "packed_modmoe.py", "is not the code that"),
    ("adapted", lambda d: (d / "perft.py").write_text("pass"), "perft.py", "is not the code that"),
    ("native", tensors(lambda v, n: v.update({n: v[n][:-1]}), SINGLE), "'", "in the manifest"),
]


@pytest.mark.parametrize(("form", "spoil", "place", "wrong"), CASES)
def test_a_fault_is_named(room: Path, tmp_path: Path, form: str, spoil: Any, place: str, wrong: str) -> None:
    shutil.copytree(room / form, tmp_path / "it")
    spoil(tmp_path / "it")
    faults = modmoe.doctor(tmp_path / "it")["faults"]
    assert any(fault["place"].endswith(place) and wrong in fault["wrong"] for fault in faults), faults
    assert all(str(tmp_path) in fault["place"] and fault["remedy"] for fault in faults)


def test_a_base_model_that_is_not_here_is_said(room: Path, tmp_path: Path) -> None:
    shutil.copytree(room / "adapter", tmp_path / "it")
    edit(base_model_name_or_path="someone/else")(tmp_path / "it")
    found = modmoe.doctor(tmp_path / "it")
    assert found["healthy"] and "someone/else is not on this disk" in found["notes"][0]


def test_a_model_beside_an_adapter_is_told(room: Path, tmp_path: Path) -> None:
    shutil.copytree(room / "kept", tmp_path / "it")
    shutil.copy(room / "adapter" / ADAPTER_CONFIG, tmp_path / "it")
    (fault,) = modmoe.doctor(tmp_path / "it")["faults"]
    assert "beside a whole model" in fault["wrong"]


@pytest.mark.parametrize("changes", [{"means": True}, {"routing": "task"}, {"kind": "mlp", "top_k": 2}], ids=str)
def test_every_kind_of_router_is_known(tmp_path: Path, changes: dict[str, Any]) -> None:
    tied, _ = write_packed(tmp_path, **changes)
    assert modmoe.doctor(tied)["faults"] == []
