"""An adapter directory is loaded as its base model with the adapter, or refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modmoe.errors import ModmoeError
from modmoe.models.inspection import inspect
from modmoe.models.loading import is_adapted, is_adapter, is_tied_type, load, load_tokenizer
from modmoe.storage.checkpoint import CheckpointError
from tests.support import adapted, tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("loading") / "base"
    torch.manual_seed(0)
    adapted.from_config("llama", vocab_size=tiny.VOCABULARY).to(torch.bfloat16).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def adapter(base, tmp_path):
    model = get_peft_model(load(base, device="cpu"), adapted.config_for("comol"))
    adapted.shake(model)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def change(directory: Path, **values: Any) -> None:
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**config, **values}))


@pytest.mark.parametrize("trainable", [False, True])
def test_an_adapter_is_loaded_on_its_base_model(adapter, trainable):
    assert is_adapter(adapter) and not is_adapted(adapter)
    model = load(adapter, device="cpu", trainable=trainable)
    assert isinstance(model, PeftModel) and not model.training
    weights = dict(model.named_parameters())
    ours = {name for name in weights if "modmoe_comol" in name}
    assert ours and {name for name, weight in weights.items() if weight.requires_grad} == (ours if trainable else set())
    assert {weights[name].dtype for name in ours} == {torch.float32}
    assert {weights[name].dtype for name in weights.keys() - ours} == {torch.bfloat16}
    stored = load_file(adapter / WEIGHTS)
    name = next(iter(stored))
    assert torch.equal(weights[name.replace("modmoe_comol.", "modmoe_comol.default.")], stored[name])
    wide = dict(load(adapter, device="cpu", dtype=torch.float32).named_parameters())
    assert {weight.dtype for weight in wide.values()} == {torch.float32}


def test_a_relative_base_counts_from_here_and_then_from_the_adapter(adapter, base, monkeypatch):
    change(adapter, base_model_name_or_path=os.path.relpath(base, adapter))
    load(adapter, device="cpu")
    monkeypatch.chdir(base.parent)
    change(adapter, base_model_name_or_path="base")
    load(adapter, device="cpu")


def test_the_tokenizer_is_the_adapters_or_else_the_bases(adapter, base):
    assert len(load_tokenizer(adapter)) == len(load_tokenizer(base))
    own = tiny.tokenizer()
    own.add_tokens(["<extra>"])
    own.save_pretrained(adapter)
    assert len(load_tokenizer(adapter)) == len(load_tokenizer(base)) + 1


def pickled(directory: Path) -> None:
    (directory / WEIGHTS).unlink()
    (directory / "adapter_model.bin").write_bytes(b"\x80\x04.")


def cut_short(directory: Path) -> None:
    (directory / WEIGHTS).write_bytes((directory / WEIGHTS).read_bytes()[:100])


def lacking(directory: Path) -> None:
    weights = load_file(directory / WEIGHTS)
    weights.pop(next(iter(weights)))
    save_file(weights, directory / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (pickled, "pickled weights"),
        (cut_short, "damaged or cut short"),
        (lacking, "lacks"),
        (lambda place: (place / WEIGHTS).unlink(), "no adapter_model.safetensors"),
        (lambda place: (place / CONFIG).write_text("[]"), "not an object"),
        (lambda place: change(place, base_model_name_or_path=None), "base_model_name_or_path is None"),
        (lambda place: change(place, base_model_name_or_path="gone/away"), "base_model_name_or_path: gone/away"),
        (lambda place: change(place, base_model_name_or_path="/no/such/place"), "no such directory"),
        (lambda place: change(place, base_model_name_or_path="."), "is an adapter itself"),
        (lambda place: change(place, peft_type="MODMOE_COMOLL"), "Did you mean 'comol'?"),
        (lambda place: change(place, r=5), "shape"),
        (lambda place: change(place, base_fingerprint="0-0"), "base model"),
    ],
)
def test_what_cannot_be_loaded_is_told_in_one_line(adapter, spoil, said, monkeypatch):
    monkeypatch.chdir(adapter)
    spoil(adapter)
    with pytest.raises(ModmoeError) as caught:
        load(adapter, device="cpu")
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_another_kind_of_adapter_is_refused(base, tmp_path):
    model = get_peft_model(load(base, device="cpu"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match="LORA is no routed adapter; merge it"):
        load(tmp_path / "lora", device="cpu")
    assert inspect(str(tmp_path / "lora"))["method"] == "lora"


def test_an_adapter_is_described_from_headers(adapter, base):
    found, before = inspect(str(adapter)), inspect(str(base))
    assert (found["model_type"], found["method"], found["num_layers"]) == ("llama", "comol", 2)
    assert (found["num_experts"], found["r"], found["top_k"]) == (3, 3, None)
    assert set(found["targets"]) == {"q_proj", "k_proj", "v_proj", "o_proj", "down_proj"}
    sizes = sum(weight.numel() for weight in load_file(adapter / WEIGHTS).values())
    assert found["parameters"]["adapter"] == sizes and found["parameters"]["base"] == before["parameters"]["stored"]
    assert found["parameters"]["total"] == sizes + before["parameters"]["stored"]
    assert found["bytes_on_disk"] == (adapter / WEIGHTS).stat().st_size and found["tensor_bytes"] == 4 * sizes
    assert before.keys() <= found.keys()
    change(adapter, base_model_name_or_path="someone/model")
    found = inspect(str(adapter))
    assert found["model_type"] is None and found["parameters"]["base"] is None
    assert found["parameters"]["adapter"] == sizes


def test_a_model_with_adapters_is_no_tied_one():
    assert is_tied_type("modmoe_llama") and not is_tied_type("modmoe_adapters_llama") and not is_tied_type("llama")
