"""Every method as a PEFT method: saving and loading, switching, merging, several adapters."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from modmoe.adapters import CONFIGS
from modmoe.adapters.fingerprint import fingerprint
from modmoe.adapters.peft_binding import LAYOUT
from modmoe.errors import AdapterError
from tests.support.adapted import (
    ADAPTER_FILE,
    CASES,
    CONFIG_FILE,
    LAYOUTS,
    MOE,
    ONE_EACH,
    PAIRS,
    adapted_model,
    adapter_parameters,
    adapters_of,
    base_model,
    config_for,
    from_config,
    load_base,
    logits_of,
    shake,
    token_ids,
    train,
)


def differ(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize(("method", "family"), CASES)
def test_an_attached_adapter_changes_nothing_and_is_counted(method: str, family: str) -> None:
    config = config_for(method)
    base = base_model(family)
    expected, predicted = logits_of(base), config.num_parameters(base)
    model = get_peft_model(base, config)
    assert torch.equal(logits_of(model), expected)
    model.train()
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, _ in adapter_parameters(model)}
    counted = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    with torch.device("meta"):
        on_meta = from_config(family)
        predicted_on_meta = config.num_parameters(on_meta)
        attached = get_peft_model(on_meta, config)
    assert predicted == counted == predicted_on_meta
    assert counted == sum(weight.numel() for weight in attached.parameters() if weight.requires_grad)
    assert all(weight.is_meta for weight in attached.parameters())
    assert all(weight.dtype == torch.float32 for _, weight in adapter_parameters(model))
    assert config.base_fingerprint is None, "the caller's configuration is left as it was"


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_saved_adapter_loads_in_every_way(method: str, family: str, saved: Any) -> None:
    made = saved(method, family)
    assert differ(made.before, made.after) > 1e-3
    loaded = PeftModel.from_pretrained(load_base(made.base, family), made.directory)
    assert torch.equal(logits_of(loaded), made.after)
    assert not any(weight.requires_grad for weight in loaded.parameters())
    if (method, family) in ONE_EACH:
        automatic = {"experts_implementation": "eager"} if family in MOE else {}
        assert torch.equal(logits_of(AutoPeftModelForCausalLM.from_pretrained(made.directory, **automatic)), made.after)
    native = load_base(made.base, family)
    native.load_adapter(made.directory)
    assert torch.equal(logits_of(native), made.after)
    native.disable_adapters()
    assert torch.equal(logits_of(native), made.before)
    if (method, family) in ONE_EACH:
        again = PeftModel.from_pretrained(load_base(made.base, family), made.directory, is_trainable=True)
        assert {name for name, weight in again.named_parameters() if weight.requires_grad} == {
            name for name, _ in adapter_parameters(again)
        }


def test_saved_adapters_load_in_a_new_process(saved: Any, tmp_path: Path) -> None:
    items = []
    for method, family in PAIRS:
        made = saved(method, family)
        save_file({"logits": made.after}, tmp_path / f"{made.directory.name}.safetensors")
        items.append([str(made.base), str(made.directory), str(tmp_path / f"{made.directory.name}.safetensors")])
    save_file({"ids": token_ids()}, tmp_path / "ids.safetensors")
    code = """
import copy, json, sys, torch, transformers, modmoe.adapters
from peft import PeftModel
from safetensors.torch import load_file
ids = load_file(sys.argv[1])["ids"]
differences, bases = {}, {}
for base, adapter, logits in json.loads(sys.argv[2]):
    if base not in bases:
        bases[base] = transformers.AutoModelForCausalLM.from_pretrained(base)
        if hasattr(bases[base].config, "num_experts_per_tok"):
            bases[base].set_experts_implementation("eager")
    model = copy.deepcopy(bases[base])
    with torch.no_grad():
        found = PeftModel.from_pretrained(model, adapter).eval()(input_ids=ids).logits
    differences[adapter] = float((found - load_file(logits)["logits"]).abs().max())
print(json.dumps(differences))
"""
    command = [sys.executable, "-c", code, str(tmp_path / "ids.safetensors"), json.dumps(items)]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent.parent, timeout=300)
    assert ran.returncode == 0, ran.stderr[-2000:]
    differences = json.loads(ran.stdout.splitlines()[-1])
    assert len(differences) == len(PAIRS)
    # the same arithmetic, but tensors lie elsewhere in memory, where a kernel may round otherwise
    assert max(differences.values()) <= 1e-5, differences


@pytest.mark.parametrize(("method", "family"), CASES)
def test_the_file_holds_every_parameter_and_the_configuration_says_for_what(
    method: str, family: str, saved: Any
) -> None:
    made = saved(method, family)
    tensors = load_file(made.directory / ADAPTER_FILE)
    expected = {
        name.replace(f".modmoe_{method}.default.", f".modmoe_{method}."): weight
        for name, weight in adapter_parameters(made.model)
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in expected.items())
    held = json.loads((made.directory / CONFIG_FILE).read_text())
    assert held["peft_type"] == f"MODMOE_{method.upper()}"
    assert held["layout"] == LAYOUT
    assert held["base_fingerprint"] == fingerprint(base_model(family))
    read = PeftConfig.from_pretrained(made.directory)
    assert type(read) is CONFIGS[method]
    assert read.settings() == config_for(method).settings()


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_switched_off_or_taken_off_it_is_the_base_model(method: str, family: str) -> None:
    base = base_model(family)
    expected, structure = logits_of(base), [name for name, _ in base.named_modules()]
    model = adapted_model(method, family)
    adapted = logits_of(model)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), expected)
    assert torch.equal(logits_of(model), adapted) and differ(adapted, expected) > 1e-3
    plain = model.unload()
    assert torch.equal(logits_of(plain), expected)
    assert [name for name, _ in plain.named_modules()] == structure
    assert not hasattr(plain, "peft_config")
    for module in plain.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks and "forward" not in vars(module)
    assert torch.equal(logits_of(get_peft_model(plain, config_for(method))), expected)


@pytest.mark.parametrize(("method", "family"), ONE_EACH)
def test_several_adapters_on_one_model(method: str, family: str, tmp_path: Path) -> None:
    alone = {}
    for name, seed in (("first", 1), ("second", 2)):
        model = get_peft_model(base_model(family), config_for(method), adapter_name=name)
        shake(model, seed)
        alone[name] = logits_of(model)
        model.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(base_model(family), tmp_path / "first", adapter_name="first")
    model.load_adapter(tmp_path / "second", adapter_name="second")
    assert torch.equal(logits_of(model), alone["first"])
    model.set_adapter("second")
    assert torch.equal(logits_of(model), alone["second"])
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == {
        name for name, _ in adapter_parameters(model) if ".second." in name
    }
    with pytest.raises(AdapterError, match="add_weighted_adapter"):
        model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "both")
    model.save_pretrained(tmp_path / "again", selected_adapters=["second"])
    assert (
        load_file(tmp_path / "again" / "second" / ADAPTER_FILE).keys()
        == load_file(tmp_path / "second" / ADAPTER_FILE).keys()
    )
    with pytest.warns(UserWarning, match="Setting active adapter to first"):
        model.delete_adapter("second")
    assert torch.equal(logits_of(model), alone["first"])
    assert not any(".second." in name for name, _ in model.named_parameters())
    model.delete_adapter("first")
    assert torch.equal(logits_of(model.base_model.model), logits_of(base_model(family)))
    assert not list(adapter_parameters(model))

    native = base_model(family)
    native.load_adapter(tmp_path / "first", adapter_name="first")
    with pytest.warns(UserWarning, match="Already found a `peft_config`"):
        native.load_adapter(tmp_path / "second", adapter_name="second")
    native.set_adapter("first")
    assert torch.equal(logits_of(native), alone["first"])
    native.set_adapter("second")
    assert torch.equal(logits_of(native), alone["second"])
    native.delete_adapter("first")
    assert torch.equal(logits_of(native), alone["second"])


@pytest.mark.parametrize(("method", "family"), ONE_EACH)
def test_the_status_of_a_model_is_told(method: str, family: str) -> None:
    model = get_peft_model(base_model(family), config_for(method))
    status = model.get_model_status()
    assert status.peft_types == {"default": f"MODMOE_{method.upper()}"}
    assert status.trainable_params == config_for(method).num_parameters(base_model(family))
    assert status.enabled is True and status.active_adapters == ["default"] == status.available_adapters
    assert status.merged_adapters == [] and status.requires_grad == {"default": True}
    layers = model.get_layer_status()
    assert len(layers) >= len(adapters_of(model)) > 0
    with model.disable_adapter():
        assert model.get_model_status().enabled is False


FOLDING = {"comol": {"num_experts": 1}}
"""Settings under which a method folds exactly, where it does not by itself."""


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_merging_is_exact_or_refused(method: str, family: str) -> None:
    for settings in ({}, FOLDING.get(method, {})):
        model = adapted_model(method, family, **settings)
        expected = logits_of(model)
        if all(adapter.fold_kind == "exact" for adapter in adapters_of(model)):
            merged = model.merge_and_unload()
            torch.testing.assert_close(logits_of(merged), expected, rtol=1e-4, atol=1e-4)
            assert differ(expected, logits_of(base_model(family))) > 1e-3
            assert not any("routed_" in name for name, _ in merged.named_modules())
            assert merged.state_dict().keys() == base_model(family).state_dict().keys()
        else:
            with pytest.raises(AdapterError, match=f"{method}: .*merged"):
                model.merge_and_unload()
            assert torch.equal(logits_of(model), expected), "a refused merge leaves the model as it was"
        assert method not in FOLDING or not settings or "merged" in locals()
    with pytest.raises(AdapterError, match="merge_and_unload"):
        adapted_model(method, family).merge_adapter()


def test_merging_takes_the_adapters_that_are_named() -> None:
    model = adapted_model("comol", "llama", num_experts=1)
    model.add_adapter("other", config_for("comol", num_experts=1))
    shake(model, seed=4)
    model.set_adapter("other")
    expected = logits_of(model)
    model.set_adapter("default")
    with pytest.raises(AdapterError, match=r"adapter_names: no adapter 'othr'\. Did you mean 'other'\?"):
        model.merge_and_unload(adapter_names=["othr"])
    torch.testing.assert_close(logits_of(model.merge_and_unload(adapter_names=["other"])), expected)


def test_nothing_is_merged_into_quantized_weights_or_from_broken_ones() -> None:
    model = adapted_model("comol", "llama", num_experts=1)
    with torch.no_grad():
        adapters_of(model)[-1].cores_ERS[0, 0, 0] = torch.inf
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with pytest.raises(AdapterError, match="down_proj: cores_ERS has values that are not finite"):
        model.merge_and_unload()
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    model = adapted_model("comol", "llama", num_experts=1)
    layer = model.get_base_model().model.layers[1].mlp.down_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(AdapterError, match=r"weight is quantized \(torch\.int8\)"):
        model.merge_and_unload()


@pytest.mark.parametrize(("method", "family"), LAYOUTS)
def test_layers_that_are_trained_whole_are_saved_and_taken_off(method: str, family: str, tmp_path: Path) -> None:
    model = get_peft_model(base_model(family), config_for(method, modules_to_save=["lm_head"]))
    train(model, steps=1)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(base_model(family), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    trained, expected = loaded.get_base_model().lm_head.modules_to_save["default"].weight, base_model(family)
    with torch.no_grad():
        expected.lm_head.weight.copy_(trained)
    plain = loaded.unload()
    assert type(plain.lm_head) is torch.nn.Linear
    assert torch.equal(logits_of(plain), logits_of(expected)), "as with PEFT's own methods, what was trained stays"


@pytest.mark.parametrize(("method", "family"), ONE_EACH)
def test_an_adapter_is_float32_on_a_half_precision_base(method: str, family: str, tmp_path: Path) -> None:
    base = base_model(family).to(torch.bfloat16)
    expected = logits_of(base)
    model = get_peft_model(base, config_for(method))
    assert torch.equal(logits_of(model), expected)
    assert {weight.dtype for _, weight in adapter_parameters(model)} == {torch.float32}
    train(model, steps=1)
    after = logits_of(model)
    assert after.dtype == torch.bfloat16 and differ(after, expected) > 1e-3
    model.save_pretrained(tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / ADAPTER_FILE).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(base_model(family).to(torch.bfloat16), tmp_path)
    assert torch.equal(logits_of(loaded), after)
    native = base_model(family).to(torch.bfloat16)
    native.load_adapter(tmp_path)
    assert {weight.dtype for _, weight in adapter_parameters(native)} == {torch.float32}
    assert torch.equal(logits_of(native), after)
