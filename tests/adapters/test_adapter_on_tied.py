"""Routed adapters on a ModularMoE: whatever way its FFNs are computed, the adapters count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import modmoe
from modmoe.adapters import CONFIGS
from modmoe.errors import AdapterError
from tests.support.adapted import base_model, config_for, logits_of, shake, token_ids
from tests.support.planned import write_tied
from tests.support.tied import tied_model

NEED_EXPERTS = ("perft_e", "expert_lora", "mixlora")


def tied(**changes: Any) -> Any:
    return tied_model(base_model("llama"), **changes)


def linear_config(method: str) -> Any:
    """A method's configuration; where it sits on linear layers, on those of the FFN too."""
    if "target_modules" in vars(config_for(method)) and "down_proj" in (config_for(method).target_modules or ()):
        return config_for(method, target_modules=["q_proj", "gate_proj", "up_proj", "down_proj"])
    return config_for(method)


@pytest.mark.parametrize("method", [name for name in CONFIGS if name not in NEED_EXPERTS])
def test_an_adapter_on_a_modular_moe_counts_in_every_way_of_computing(method: str, tmp_path: Path) -> None:
    model = tied()
    model.set_ffn_way("masked")
    before = logits_of(model)
    attached = get_peft_model(model, linear_config(method))
    assert torch.equal(logits_of(attached), before)
    shake(attached)
    found = {}
    for way in ("masked", "auto", "runs", "gather"):
        attached.base_model.model.set_ffn_way(way)
        found[way] = logits_of(attached)
        torch.testing.assert_close(found[way], found["masked"], atol=1e-5, rtol=1e-5)
    assert (found["auto"] - before).abs().max() > 1e-3
    attached.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tied(), str(tmp_path))
    torch.testing.assert_close(logits_of(again), found["auto"], atol=1e-5, rtol=1e-5)


def test_a_lora_counts_in_every_way_of_computing() -> None:
    attached = get_peft_model(tied(), LoraConfig(r=3, target_modules=["gate_proj", "up_proj", "down_proj"]))
    with torch.no_grad():
        for name, weight in attached.named_parameters():
            if "lora_" in name:
                weight.normal_(std=0.2)
    found = {}
    for way in ("masked", "auto", "runs", "gather"):
        attached.base_model.model.set_ffn_way(way)
        found[way] = logits_of(attached)
        one = logits_of(attached, token_ids(1, 1))
        torch.testing.assert_close(found[way], found["masked"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one, found.setdefault("one", one), atol=1e-5, rtol=1e-5)


def test_adapters_of_a_linear_layer_learn_on_a_modular_moe() -> None:
    attached = get_peft_model(tied(), config_for("molora", target_modules=["down_proj"]))
    ids_BT = token_ids()
    optimizer = torch.optim.AdamW([weight for weight in attached.parameters() if weight.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = attached(ids_BT, labels=ids_BT).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1


@pytest.mark.parametrize("method", NEED_EXPERTS)
def test_methods_that_need_experts_of_their_own_are_refused_in_one_line(method: str) -> None:
    with pytest.raises(AdapterError, match=rf"\A(?=.*{method})[^\n]*\Z"):
        get_peft_model(tied(), config_for(method))


def test_a_model_routed_by_task_takes_an_adapter_without_an_expert_named(tmp_path: Path) -> None:
    _, tied_directory = write_tied(tmp_path, routing="task")
    made = modmoe.convert(str(tied_directory), str(tmp_path / "out"), method="adapters", adapter="perft_r")
    assert made["verified"]["max_abs_logit_diff"] == 0
