"""What the binding uses of PEFT, its private parts too."""

from __future__ import annotations

import copy
import inspect
import json
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import peft
import pytest
from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method

from modmoe.adapters import CONFIGS
from modmoe.adapters.table import METHODS

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
