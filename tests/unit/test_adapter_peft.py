"""Every method as a PEFT method: what we use of PEFT, saving and loading, and what is refused."""

from __future__ import annotations

import copy
import inspect
import json
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, PeftType, get_peft_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from safetensors.torch import load_file, save_file
from torch import Tensor

from modmoe.adapters import CONFIGS, solve_budget
from modmoe.adapters.budget import make_config
from modmoe.adapters.fingerprint import fingerprint, same_base
from modmoe.adapters.methods import METHODS
from modmoe.adapters.peft import LAYOUT
from modmoe.errors import AdapterError
from tests.adapted import (
    CASES,
    MOE,
    ONE_EACH,
    PAIRS,
    REFUSED,
    adapted_model,
    adapter_parameters,
    adapters_of,
    base_model,
    config_for,
    from_config,
    logits_of,
    shake,
    token_ids,
    train,
)

FILE = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


# What we use of PEFT

PRIVATE = {
    # BaseTuner calls these, and we override them
    "BaseTuner.inject_adapter": (
        BaseTuner.inject_adapter,
        ["self", "model", "adapter_name", "autocast_adapter_dtype", "low_cpu_mem_usage", "state_dict"],
    ),
    "BaseTuner._prepare_adapter_config": (BaseTuner._prepare_adapter_config, ["self", "peft_config", "model_config"]),
    "BaseTuner._prepare_model": (BaseTuner._prepare_model, ["self", "peft_config", "model"]),
    "BaseTuner._check_target_module_exists": (BaseTuner._check_target_module_exists, ["peft_config", "key"]),
    "BaseTuner._create_and_replace": (
        BaseTuner._create_and_replace,
        ["self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key", "parameter_name"],
    ),
    "BaseTuner._remove_adapter_name_from_key": (BaseTuner._remove_adapter_name_from_key, ["key", "adapter_name"]),
    "BaseTuner._remap_adapter_state_dict_for_load": (
        BaseTuner._remap_adapter_state_dict_for_load,
        ["model", "config", "adapter_name", "state_dict"],
    ),
    "BaseTuner.merge_and_unload": (
        BaseTuner.merge_and_unload,
        ["self", "progressbar", "safe_merge", "adapter_names"],
    ),
    "BaseTuner.unload": (BaseTuner.unload, ["self"]),
    # we call this
    "BaseTuner._unload_and_optionally_merge": (
        BaseTuner._unload_and_optionally_merge,
        ["self", "merge", "progressbar", "safe_merge", "adapter_names"],
    ),
    "BaseTunerLayer._move_adapter_to_device_of_base_layer": (
        BaseTunerLayer._move_adapter_to_device_of_base_layer,
        ["self", "adapter_name", "device"],
    ),
    "BaseTunerLayer.get_base_layer": (BaseTunerLayer.get_base_layer, ["self"]),
    "register_peft_method": (
        register_peft_method,
        ["name", "config_cls", "model_cls", "prefix", "is_mixed_compatible"],
    ),
}


@pytest.mark.parametrize("name", PRIVATE)
def test_peft_still_has_the_private_functions_that_we_override(name: str) -> None:
    function, expected = PRIVATE[name]
    found = list(inspect.signature(function).parameters)
    assert found == expected, f"peft {peft.__version__}: {name} takes {found} now, and the binding expects {expected}"


def test_peft_still_calls_what_we_override() -> None:
    source = inspect.getsource(BaseTuner.__init__) + inspect.getsource(BaseTuner.inject_adapter)
    for name in ("inject_adapter", "_prepare_adapter_config", "_prepare_model", "_check_target_module_exists"):
        assert f"self.{name}(" in source, f"peft {peft.__version__}: BaseTuner calls {name} no more"
    assert "self._create_and_replace(" in source
    load = inspect.getsource(peft.set_peft_model_state_dict)
    assert "._remap_adapter_state_dict_for_load(" in load, "a damaged adapter would be loaded without a word"
    save = inspect.getsource(peft.get_peft_model_state_dict)
    assert "._get_adapter_state_dict(" in save and "_remove_adapter_name_from_key" in save


def test_the_attributes_of_a_tuner_layer_are_those_that_we_set() -> None:
    for name, value in {"_disable_adapters": False, "_active_adapter": "default", "merged_adapters": []}.items():
        assert getattr(BaseTunerLayer, name) == value, f"peft {peft.__version__}: BaseTunerLayer.{name} has changed"
    for name in ("disable_adapters", "active_adapter", "active_adapters", "weight", "bias"):
        assert isinstance(getattr(BaseTunerLayer, name), property), f"peft {peft.__version__}: {name} is no property"
    assert BaseTunerLayer.adapter_layer_names == ()


def test_types_are_members_of_the_enumeration_like_its_own() -> None:
    for method in CONFIGS:
        name = f"MODMOE_{method.upper()}"
        member = PeftType(name)
        assert member is PeftType[name] is getattr(PeftType, name)
        assert member == name and member.value == member.name == name and isinstance(member, PeftType)
        assert member in list(PeftType) and list(PeftType).count(member) == 1
        assert copy.deepcopy(member) is member and json.dumps(member) == f'"{name}"'
    assert PeftType("LORA") is PeftType.LORA


def test_the_peft_that_runs_is_one_that_is_allowed(repository: Path) -> None:
    wanted = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["dependencies"]
    (bounds,) = [line for line in wanted if line.startswith("peft")]
    low, high = re.fullmatch(r"peft>=(\d+\.\d+),<(\d+\.\d+)", bounds).groups()
    installed = ".".join(version("peft").split(".")[:2])
    assert installed == low, f"tested with peft {installed}, and {bounds} is what pyproject.toml allows"
    assert int(high.split(".")[1]) == int(low.split(".")[1]) + 1, "its private parts may change with every minor"


def test_every_method_has_a_configuration() -> None:
    assert set(CONFIGS) == set(METHODS)
    assert all(config().peft_type == f"MODMOE_{method.upper()}" for method, config in CONFIGS.items())


# Saving and loading


class Saved(NamedTuple):
    directory: Path
    base: Path
    before: Tensor
    after: Tensor
    model: Any


def read_base(directory: Path, family: str, **more: Any) -> Any:
    implementation = {"experts_implementation": "eager"} if family in MOE else {}
    return transformers.AutoModelForCausalLM.from_pretrained(directory, **implementation, **more)


_READ: dict[Path, Any] = {}


def load_base(directory: Path, family: str) -> Any:
    """Return a copy of what was read from a directory, which is read once."""
    if directory not in _READ:
        _READ[directory] = read_base(directory, family)
    return copy.deepcopy(_READ[directory])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Saved]:
    """Return what makes, once, a trained and saved adapter of a method on a saved base model."""
    home = tmp_path_factory.mktemp("adapters")
    made: dict[tuple[str, str], Saved] = {}

    def make(method: str, family: str) -> Saved:
        if (method, family) not in made:
            base = home / family
            if not base.exists():
                base_model(family).save_pretrained(base)
            model = load_base(base, family)
            before = logits_of(model)
            torch.manual_seed(3)
            model = get_peft_model(model, config_for(method))
            train(model)
            directory = home / f"{method}-{family}"
            model.save_pretrained(directory)
            made[method, family] = Saved(directory, base, before, logits_of(model), model)
        return made[method, family]

    return make


def differ(first: Tensor, second: Tensor) -> float:
    return float((first - second).abs().max())


@pytest.mark.parametrize(("method", "family"), CASES)
def test_an_attached_adapter_changes_nothing_and_is_counted(method: str, family: str) -> None:
    config = config_for(method)
    expected = logits_of(base_model(family))
    model = get_peft_model(base_model(family), config)
    assert torch.equal(logits_of(model), expected)
    model.train()
    trainable = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trainable == {name for name, _ in adapter_parameters(model)}
    counted = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    with torch.device("meta"):
        on_meta = from_config(family)
        attached = get_peft_model(from_config(family), config)
    assert config.num_parameters(base_model(family)) == counted == config.num_parameters(on_meta)
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
    again = PeftModel.from_pretrained(load_base(made.base, family), made.directory, is_trainable=True)
    assert {name for name, weight in again.named_parameters() if weight.requires_grad} == {
        name for name, _ in adapter_parameters(again)
    }


def test_saved_adapters_load_in_a_new_process(saved: Any, tmp_path: Path) -> None:
    items = []
    for method, family in CASES:
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
    assert len(differences) == len(CASES)
    assert max(differences.values()) == 0, {name: value for name, value in differences.items() if value}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_the_file_holds_every_parameter_and_the_configuration_says_for_what(
    method: str, family: str, saved: Any
) -> None:
    made = saved(method, family)
    tensors = load_file(made.directory / FILE)
    expected = {
        name.replace(f".modmoe_{method}.default.", f".modmoe_{method}."): weight
        for name, weight in adapter_parameters(made.model)
    }
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], weight) for name, weight in expected.items())
    held = json.loads((made.directory / CONFIG).read_text())
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
    assert load_file(tmp_path / "again" / "second" / FILE).keys() == load_file(tmp_path / "second" / FILE).keys()
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


@pytest.mark.parametrize(("method", "family"), ONE_EACH)
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
    assert {weight.dtype for weight in load_file(tmp_path / FILE).values()} == {torch.float32}
    loaded = PeftModel.from_pretrained(base_model(family).to(torch.bfloat16), tmp_path)
    assert torch.equal(logits_of(loaded), after)
    native = base_model(family).to(torch.bfloat16)
    native.load_adapter(tmp_path)
    assert {weight.dtype for _, weight in adapter_parameters(native)} == {torch.float32}
    assert torch.equal(logits_of(native), after)


# What is refused, in one line


def refused(words: str) -> Any:
    """Expect an AdapterError of one line that has ``words``; it is a ValueError too."""
    assert issubclass(AdapterError, ValueError)
    return pytest.raises(AdapterError, match=rf"\A(?=.*{words})[^\n]*\Z")


@pytest.mark.parametrize("method", CONFIGS)
def test_names_that_match_nothing_are_told_what_there_is(method: str) -> None:
    family = dict(ONE_EACH)[method]
    for target in (["q_porj"], "q_porj"):
        with refused(r"target_modules: 'q_porj' names no layer.*there are \w+"):
            get_peft_model(base_model(family), config_for(method, target_modules=target))
    with refused("layers_to_transform|target_modules"):
        get_peft_model(base_model(family), config_for(method, layers_to_transform=[7]))


@pytest.mark.parametrize(("method", "family"), REFUSED)
def test_a_model_of_the_wrong_kind_is_refused(method: str, family: str) -> None:
    with refused(method):
        get_peft_model(base_model(family), config_for(method))


@pytest.mark.parametrize("method", CONFIGS)
def test_settings_that_contradict_each_other_are_refused(method: str) -> None:
    family, settings = dict(ONE_EACH)[method], config_for(method).settings()
    wrong: dict[str, Any] = {"r": 0, "num_experts": -1, "lora_dropout": 1.5}
    if hasattr(settings, "top_k"):
        wrong["top_k"] = 99
    for name, value in wrong.items():
        if hasattr(settings, name):
            base = base_model(family)
            with refused(f"{method}.*{name}: {value}"):
                get_peft_model(base, config_for(method, **{name: value}))
            assert not hasattr(base, "peft_config") and torch.equal(logits_of(base), logits_of(base_model(family)))
    with refused("exclude_modules"):
        config_for(method, exclude_modules=["q_proj"])


def test_unknown_methods_settings_and_small_budgets_are_refused() -> None:
    model = base_model("llama")
    with refused(r"adapter\.method: no method 'comoll'\. Did you mean 'comol'\?"):
        solve_budget("comoll", model, 1000)
    with refused(r"adapter\.method: no method 'comoll'"):
        make_config("comoll", {})
    with refused(r"adapter\.settings\.num_expert: comol has no such setting\. Did you mean 'num_experts'\?"):
        make_config("comol", {"num_expert": 3})
    with refused("adapter.settings.rank"):
        solve_budget("comol", model, 1000, rank=3)
    with refused("budget: 10 parameters are too few for comol; its smallest has [0-9]+"):
        solve_budget("comol", model, 10)


@pytest.mark.parametrize("method", CONFIGS)
def test_a_budget_is_kept(method: str) -> None:
    model = base_model(dict(ONE_EACH)[method])
    most = 3 * config_for(method).num_parameters(model)
    config = solve_budget(method, model, most)
    assert 0.8 * most <= config.num_parameters(model) <= most


def other_base(family: str) -> Any:
    """Return a model of the same shapes with other weights."""
    model = base_model(family)
    with torch.no_grad():
        model.model.layers[1].self_attn.o_proj.weight.mul_(1.5)
    return model


@pytest.mark.parametrize("method", CONFIGS)
def test_an_adapter_of_another_base_is_refused(method: str, saved: Any) -> None:
    family = dict(ONE_EACH)[method]
    made = saved(method, family)
    with refused("base model: the adapter was made for .*not for this model"):
        PeftModel.from_pretrained(other_base(family), made.directory)
    native = other_base(family)
    with refused("base model: the adapter was made for .*not for this model"):
        native.load_adapter(made.directory)
    assert torch.equal(logits_of(native), logits_of(other_base(family)))
    # beside an adapter that belongs there
    model = get_peft_model(other_base(family), config_for(method))
    with refused("base model: the adapter was made for .*not for this model"):
        model.load_adapter(made.directory, adapter_name="foreign")
    assert list(model.peft_config) == ["default"]
    native.add_adapter(config_for(method))
    with warnings.catch_warnings(), refused("base model: the adapter was made for"):
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        native.load_adapter(made.directory, adapter_name="foreign")
    assert list(native.peft_config) == ["default"]


def test_an_adapter_of_another_method_is_refused() -> None:
    model = adapted_model("comol", "llama")
    with pytest.raises(ValueError, match="different peft types"):
        model.add_adapter("other", LoraConfig(target_modules=["q_proj"]))


def damage(made: Saved, directory: Path, change: Callable[[dict[str, Tensor]], None], **config: Any) -> Path:
    """Write a changed copy of a saved adapter."""
    directory.mkdir()
    tensors = load_file(made.directory / FILE)
    change(tensors)
    save_file(tensors, directory / FILE, metadata={"format": "pt"})
    held = json.loads((made.directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**held, **config}))
    return directory


def lose(tensors: dict[str, Tensor], word: str) -> None:
    del tensors[next((name for name in tensors if word in name), next(iter(tensors)))]


def spoil(tensors: dict[str, Tensor]) -> None:
    name = sorted(tensors)[-1]
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[-1] = torch.nan


def rename(tensors: dict[str, Tensor]) -> None:
    tensors[f"{next(iter(tensors))}X"] = torch.zeros(2)


def widen(tensors: dict[str, Tensor]) -> None:
    name = next(iter(tensors))
    tensors[name] = torch.cat([tensors[name], tensors[name]])


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], None], str]] = {
    "a missing router": (lambda tensors: lose(tensors, ".router_"), "adapter 'default': lacks 1 of [0-9]+ tensors"),
    "an extra tensor": (rename, "adapter 'default': has .*X, which this adapter does not"),
    "a stranger": (lambda tensors: tensors.update(banana=torch.zeros(2)), "adapter 'default': has banana"),
    "a wrong shape": (widen, "adapter 'default': .* has the shape .*, not "),
    "a NaN": (spoil, "adapter 'default': .* not finite"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("method", CONFIGS)
def test_a_damaged_file_is_refused(method: str, kind: str, saved: Any, tmp_path: Path) -> None:
    made, (change, words) = saved(method, dict(ONE_EACH)[method]), DAMAGE[kind]
    directory = damage(made, tmp_path / "damaged", change)
    with refused(words):
        PeftModel.from_pretrained(load_base(made.base, dict(ONE_EACH)[method]), directory)
    model = PeftModel.from_pretrained(load_base(made.base, dict(ONE_EACH)[method]), made.directory)
    with refused(words.replace("default", "second")):
        model.load_adapter(directory, adapter_name="second")


@pytest.mark.parametrize("kind", ["a missing router", "a NaN"])
@pytest.mark.parametrize("method", CONFIGS)
def test_transformers_own_loading_refuses_a_damaged_file_too(
    method: str, kind: str, saved: Any, tmp_path: Path
) -> None:
    made, (change, _) = saved(method, dict(ONE_EACH)[method]), DAMAGE[kind]
    model = load_base(made.base, dict(ONE_EACH)[method])
    with refused("adapter 'default': .* has values that are not finite; the file lacks it or is damaged"):
        model.load_adapter(damage(made, tmp_path / "damaged", change))


def test_an_unknown_layout_is_refused(saved: Any, tmp_path: Path) -> None:
    made = saved("comol", "llama")
    directory = damage(made, tmp_path / "newer", lambda tensors: None, layout="modmoe-adapters-9")
    words = f"layout: the adapter's tensors are laid out as 'modmoe-adapters-9'; this version reads {LAYOUT}"
    with refused(words):
        PeftModel.from_pretrained(load_base(made.base, "llama"), directory)
    with refused(words):
        load_base(made.base, "llama").load_adapter(directory)


# Telling one base model from another


@pytest.mark.parametrize("family", ["llama", "olmoe"])
def test_a_fingerprint_does_not_depend_on_how_the_model_was_loaded(family: str, tmp_path: Path) -> None:
    base_model(family).to(torch.bfloat16).save_pretrained(tmp_path)
    narrow = read_base(tmp_path, family, dtype=torch.bfloat16)
    wide = read_base(tmp_path, family, dtype=torch.float32)
    found = fingerprint(wide)
    assert found is not None and found == fingerprint(narrow)
    wide.resize_token_embeddings(80)
    assert fingerprint(wide) == found
    get_peft_model(narrow, config_for("comol"))
    assert fingerprint(narrow) == found
    assert not same_base(found, fingerprint(base_model("qwen3")))
    for name in ("model.norm.weight", "model.layers.1.self_attn.v_proj.weight"):
        other = read_base(tmp_path, family)
        with torch.no_grad():
            other.get_parameter(name).mul_(1.5)
        assert not same_base(found, fingerprint(other)), name
    with torch.device("meta"):
        assert fingerprint(from_config(family)) is None


def test_a_quantized_base_is_told_by_its_vectors() -> None:
    model = base_model("llama")
    found = fingerprint(model)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    quantized = fingerprint(model)
    assert quantized.endswith("-quantized") and same_base(found, quantized)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    assert not same_base(found, fingerprint(model))
