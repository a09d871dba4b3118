"""transformers' own tests of models, of the version that is installed, pointed at the tied and the packed classes.

They come in no wheel. ``make test-clients`` takes ``test_modeling_common`` from the source distribution on PyPI; of a
checkout of transformers, named by MODMOE_TRANSFORMERS_TESTS as the folder ``tests``, the tests of generation too.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from modmoe.modeling import configuration_modmoe, modeling_modmoe, packed_modmoe

HOME = Path(os.environ.get("MODMOE_TRANSFORMERS_TESTS", "nowhere"))
PACKAGE = "transformers_tests"
pytestmark = [
    pytest.mark.clients,
    # theirs are written for other warnings
    pytest.mark.filterwarnings("ignore"),
]


def _their(module: str, *stubs: str) -> Any:
    """Import a module of theirs, or where the folder does not have it one with empty classes."""
    name = f"{PACKAGE}.{module}"
    if (HOME / f"{module.replace('.', '/')}.py").is_file():
        return importlib.import_module(name)
    stub = types.ModuleType(name)
    for kind in stubs:
        setattr(stub, kind, type(kind, (), {}))
    sys.modules[name] = stub
    return stub


def _load() -> tuple[Any, Any, Any]:
    if not (HOME / "test_modeling_common.py").is_file():
        why = "MODMOE_TRANSFORMERS_TESTS names no folder with test_modeling_common.py; make test-clients brings one"
        pytest.skip(why, allow_module_level=True)
    pytest.importorskip("parameterized")
    for folder in ("", ".generation", ".exporters"):
        package = types.ModuleType(PACKAGE + folder)
        package.__path__ = [str(HOME / folder.removeprefix("."))]
        sys.modules[PACKAGE + folder] = package
    _their("exporters.test_export", "ExportTesterMixin")
    generation = _their("generation.test_utils", "GenerationTesterMixin")
    training = _their("test_training_mixin", "TrainingTesterMixin")
    return _their("test_modeling_common"), generation, training


common, generation, training = _load()

DENSE = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
MODULAR = {
    "num_modules": 8,
    "module_size": 8,
    "stored_modules": [8, 8],
    "num_experts": 3,
    "expert_names": ["a", "b", "c"],
    "modules_per_expert": 4,
    "shared_modules": 2,
    "ffn_activation": "silu",
    "dense_intermediate_size": 64,
    "routing_chunk": 4,
}


class Inputs:
    """What their tests ask for: a configuration and inputs."""

    batch_size, seq_length, is_training = 3, 7, True
    num_hidden_layers, hidden_size, num_attention_heads = 2, 32, 4

    def __init__(self, parent: Any, config: Any, classes: tuple[Any, ...]) -> None:
        self.parent, self.config = parent, config
        self.causal_lm_class, self.base_model_class = classes

    def get_config(self) -> Any:
        return self.config()

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids_BT = torch.randint(3, DENSE["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids_BT, "attention_mask": torch.ones_like(ids_BT)}


def tied_config(**changes: Any) -> Any:
    return configuration_modmoe.ModMoELlamaConfig(**{**DENSE, **MODULAR, **changes})


def packed_config(**changes: Any) -> Any:
    modular = {**MODULAR, "num_experts_per_tok": 1, "routing": "token", "combine": "union", "router_hidden": 0}
    modular |= {"left_out_means": False, "compensation": False, **changes}
    sizes = {"num_experts": 8, "num_experts_per_tok": 4 if modular["num_experts_per_tok"] == 1 else 6}
    return packed_modmoe.ModMoEPackedLlamaConfig(**DENSE, **sizes, moe_intermediate_size=8, modular=modular)


TIED = (modeling_modmoe.ModMoELlamaForCausalLM, modeling_modmoe.ModMoELlamaModel)
PACKED = (packed_modmoe.ModMoEPackedLlamaForCausalLM, packed_modmoe.ModMoEPackedLlamaModel)
for _model, _config in ((TIED, tied_config()), (PACKED, packed_config())):
    # what they do with a causal LM they look up by its name
    transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_config.model_type] = _model[0].__name__
    transformers.models.auto.modeling_auto.MODEL_MAPPING_NAMES[_config.model_type] = _model[1].__name__
CASES = {
    "token": (tied_config, TIED, {}),
    "token_sum": (tied_config, TIED, {"combine": "sum", "num_experts_per_tok": 2}),
    "sequence": (tied_config, TIED, {"routing": "sequence"}),
    "sequence_sum": (tied_config, TIED, {"routing": "sequence", "combine": "sum", "num_experts_per_tok": 2}),
    "task": (tied_config, TIED, {"routing": "task", "default_expert": "b"}),
    "packed": (packed_config, PACKED, {}),
    "packed_sum": (packed_config, PACKED, {"combine": "sum", "num_experts_per_tok": 2}),
}
_NAMES = "test_model_weights_reload_no_missing_tied_weights"
_RECORDED = "test_moe_models_record_router_logits"
EXPECTED = {
    **{
        (case, _NAMES): "loads a file of one tensor: a checkpoint without the experts' tables is refused"
        for case in ("token", "token_sum", "sequence", "sequence_sum", "task")
    },
    **{
        (case, _RECORDED): "asks the dense backbone's class which outputs hooks can record; ours are given by forward"
        for case in ("packed", "packed_sum")
    },
}
"""Tests that do not pass, by case and name, and why; docs/reliability.md has them too."""


def _class_of(case: str) -> type:
    make, classes, changes = CASES[case]

    def set_up(self: Any) -> None:
        self.model_tester = Inputs(self, lambda: make(**changes), classes)

    content = {"setUp": set_up, "all_model_classes": classes, "test_all_params_have_gradient": False}
    content["model_tester"] = None
    mixins = (common.ModelTesterMixin, generation.GenerationTesterMixin, training.TrainingTesterMixin)
    parts = dict.fromkeys((*mixins, unittest.TestCase))
    made = type(f"Test_{case}", tuple(parts), content)
    for (where, name), reason in EXPECTED.items():
        if case == where:
            setattr(made, name, pytest.mark.xfail(strict=True, reason=reason)(getattr(made, name)))
    return made


for _case in CASES:
    globals()[f"Test_{_case}"] = _class_of(_case)
