"""Hostile tokenizers, adapters and measurements: refused in one line, or taken and right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from modmoe import api
from modmoe.analysis.modules import Partition, load_partitions, save_partitions
from modmoe.analysis.profile import ActivationProfile, load_profiles, save_profiles
from modmoe.models.loading import load, load_tokenizer
from modmoe.storage.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_headers
from tests.fuzz import oracle, spoil
from tests.fuzz.judge import judge, often
from tests.support.tiny import save_dense

TOKENIZER_KEYS = ("model", "vocab", "merges", "added_tokens", "pre_tokenizer", "decoder", "tokenizer_class", "id")
TOKENIZER_KEYS += (
    "chat_template",
    "bos_token",
    "model_max_length",
    "auto_map",
    "added_tokens_decoder",
    "extra_special",
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_dense(tmp_path_factory.mktemp("base") / "whole", num_hidden_layers=1)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, dense: Path) -> Path:
    home = tmp_path_factory.mktemp("adapter")
    api.convert(dense, home / "whole", method="adapters", adapter="comol")
    (home / "it").mkdir()
    return home


@often("tokenizer")
@given(data=st.data())
def test_tokenizer(tmp_path_factory: pytest.TempPathFactory, dense: Path, data: st.DataObject) -> None:
    directory = tmp_path_factory.getbasetemp() / "spoiled"
    directory.mkdir(exist_ok=True)
    whole = spoil.read_files(dense)
    name = data.draw(st.sampled_from(("tokenizer.json", "tokenizer_config.json")))
    spoil.lay_out(directory, whole, data.draw(spoil.documents(whole[name], name, TOKENIZER_KEYS)))
    (found,) = judge("tokenizer", directory, lambda: load_tokenizer(directory))
    assert found is None or callable(found)


@often("adapter")
@given(data=st.data())
def test_adapter(adapter: Path, data: st.DataObject) -> None:
    directory, whole = adapter / "it", spoil.read_files(adapter / "whole")
    if data.draw(st.booleans()):
        changed = data.draw(spoil.weights(whole[ADAPTER_WEIGHTS], ADAPTER_WEIGHTS))
    else:
        keys = ("r", "num_experts", "top_k", "target_modules", "peft_type", "base_model_name_or_path", "lora_alpha")
        changed = data.draw(spoil.documents(whole[ADAPTER_CONFIG], ADAPTER_CONFIG, keys))
    spoil.lay_out(directory, whole, changed)
    headers, _, _ = judge(
        "adapter",
        directory,
        lambda: adapter_headers(directory),
        lambda: api.inspect(directory),
        lambda: load(directory),
    )
    if headers is not None:
        real = oracle.read((directory / ADAPTER_WEIGHTS).read_bytes())
        assert real is not None
        assert {name: shape for name, (shape, _) in headers.items()} == {name: item[1] for name, item in real.items()}


@often("measured")
@given(data=st.data())
def test_measurements(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.getbasetemp() / "measured.safetensors"
    path.unlink(missing_ok=True)
    is_profile = data.draw(st.booleans())
    if is_profile:
        save_profiles(path, [_profile()])
    else:
        save_partitions(path, [Partition(torch.arange(8) % 4, 4)])
    path.write_bytes(data.draw(spoil.weights(path.read_bytes(), "it")).get("it") or path.read_bytes())
    (found,) = judge("measured", path, lambda: _check((load_profiles if is_profile else load_partitions)(path)))
    assert found is None or oracle.read(path.read_bytes()) is not None


def _profile() -> ActivationProfile:
    ones_PF = torch.ones(2, 6, dtype=torch.float64)
    return ActivationProfile(("a", "b"), torch.tensor([3, 4]), ones_PF, ones_PF, ones_PF, None, torch.ones(5, 6), 7)


def _check(found: list[Any]) -> list[Any]:
    """Use what was read as the steps do."""
    for one in found:
        if isinstance(one, Partition):
            assert sorted(one.permutation_F.tolist()) == list(range(len(one.module_F)))
        else:
            one.merge(one)
    return found
