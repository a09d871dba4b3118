"""LoRAs that PEFT trained become the experts of one CoMoL."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modmoe.adapters import CoMoLConfig, gather_loras
from modmoe.errors import AdapterError
from tests.support.adapted import adapters_of, base_model, logits_of

LORAS: list[dict[str, Any]] = [
    {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"]},
    {"r": 5, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"]},
    {"r": 4, "lora_alpha": 4, "target_modules": ["v_proj"], "use_rslora": True, "alpha_pattern": {"0.*v_proj": 9}},
]


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("loras")
    for number, values in enumerate(LORAS):
        torch.manual_seed(number)
        model = get_peft_model(base_model("llama"), LoraConfig(**values, init_lora_weights=False))
        model.save_pretrained(root / str(number))
    return [root / str(number) for number in range(len(LORAS))]


@pytest.mark.parametrize("expert", range(len(LORAS)))
def test_one_expert_alone_is_its_lora(directories: list[Path], expert: int) -> None:
    wanted = logits_of(PeftModel.from_pretrained(base_model("llama"), directories[expert]))

    gathered = gather_loras(base_model("llama"), directories)
    for adapter in adapters_of(gathered):
        # all the weight on one expert: in float32 the others' share is exactly zero
        core = adapter.cores_ERS[expert].detach().clone()
        adapter.cores_ERS.data.copy_(core.expand_as(adapter.cores_ERS))

    assert (wanted - logits_of(base_model("llama"))).abs().max() > 0.1
    torch.testing.assert_close(logits_of(gathered), wanted, atol=2e-5, rtol=1e-5)


def test_it_begins_as_the_mean_and_is_a_comol_like_any_other(directories: list[Path], tmp_path: Path) -> None:
    gathered = gather_loras(base_model("llama"), directories)
    base = base_model("llama")
    layer = base.model.layers[0].self_attn.q_proj.weight.detach().clone()
    with torch.no_grad():
        change = sum(
            PeftModel.from_pretrained(base_model("llama"), directory)
            .merge_and_unload()
            .model.layers[0]
            .self_attn.q_proj.weight
            - layer
            for directory in directories
        )
    adapter = gathered.get_base_model().model.layers[0].self_attn.q_proj.routed_comol.adapters["default"]
    torch.testing.assert_close(adapter.fixed_weight(torch.full((3,), 1 / 3)), change / 3, atol=1e-6, rtol=1e-5)

    gathered.save_pretrained(tmp_path / "comol")
    again = PeftModel.from_pretrained(base_model("llama"), tmp_path / "comol")
    assert isinstance(again.peft_config["default"], CoMoLConfig)
    assert torch.equal(logits_of(again), logits_of(gathered))


def test_what_is_no_plain_lora_is_refused(directories: list[Path], tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="none was given"):
        gather_loras(base_model("llama"), [])
    with pytest.raises(AdapterError, match=r"holds no adapter_model\.safetensors"):
        gather_loras(base_model("llama"), [tmp_path])
    dora = get_peft_model(base_model("llama"), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    dora.save_pretrained(tmp_path / "dora")
    with pytest.raises(AdapterError, match="is no plain LoRA on linear layers"):
        gather_loras(base_model("llama"), [directories[0], tmp_path / "dora"])
    with pytest.raises(AdapterError, match=r"the model has no layer model\.layers\.0\.mlp\.down_proj"):
        gather_loras(base_model("mixtral"), directories)
    half = load_file(directories[0] / "adapter_model.safetensors")
    half.pop(next(name for name in half if "lora_B" in name))
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "adapter_config.json").write_bytes((directories[0] / "adapter_config.json").read_bytes())
    save_file(half, tmp_path / "half" / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="is missing; the file is incomplete"):
        gather_loras(base_model("llama"), [tmp_path / "half"])
