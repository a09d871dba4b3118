"""What the binding refuses, in one line: bad settings, damaged files, adapters of other base models."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from modmoe.adapters import CONFIGS, solve_budget
from modmoe.adapters.budget import make_config
from modmoe.adapters.fingerprint import fingerprint, same_base
from modmoe.adapters.peft_binding import LAYOUT
from modmoe.errors import AdapterError
from tests.support.adapted import (
    ADAPTER_FILE,
    CONFIG_FILE,
    LAYOUTS,
    ONE_EACH,
    REFUSED,
    Saved,
    adapted_model,
    base_model,
    config_for,
    from_config,
    load_base,
    logits_of,
    read_base,
)


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
    tensors = load_file(made.directory / ADAPTER_FILE)
    change(tensors)
    save_file(tensors, directory / ADAPTER_FILE, metadata={"format": "pt"})
    held = json.loads((made.directory / CONFIG_FILE).read_text())
    (directory / CONFIG_FILE).write_text(json.dumps({**held, **config}))
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
DAMAGED = [(method, kind) for kind in DAMAGE for method in (CONFIGS if kind == "a missing router" else dict(LAYOUTS))]
"""What is missing for every method, since each has names of its own; the rest for each way of keeping tensors."""


@pytest.mark.parametrize(("method", "kind"), DAMAGED)
def test_a_damaged_file_is_refused(method: str, kind: str, saved: Any, tmp_path: Path) -> None:
    made, (change, words) = saved(method, dict(ONE_EACH)[method]), DAMAGE[kind]
    directory = damage(made, tmp_path / "damaged", change)
    with refused(words):
        PeftModel.from_pretrained(load_base(made.base, dict(ONE_EACH)[method]), directory)
    model = PeftModel.from_pretrained(load_base(made.base, dict(ONE_EACH)[method]), made.directory)
    with refused(words.replace("default", "second")):
        model.load_adapter(directory, adapter_name="second")


@pytest.mark.parametrize(("method", "kind"), [case for case in DAMAGED if case[1] in ("a missing router", "a NaN")])
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
