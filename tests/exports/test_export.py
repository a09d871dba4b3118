"""What an export refuses, in one line, and what it writes beside the weights."""

from __future__ import annotations

import json

import pytest
import torch
from huggingface_hub import ModelCard

import modmoe
from modmoe.errors import CheckpointError, ExportError, ModmoeError, RecipeError
from modmoe.exports.converted import export
from modmoe.formats.card.converted import escape
from modmoe.formats.dense import FoldMeans, dense_config, dense_plan, family_of_tied
from modmoe.formats.native.plan import native_export, native_warnings
from modmoe.formats.proof import verify
from modmoe.formats.tied import CODE_FILES, with_dtype
from modmoe.formats.tied_code import own_files, write_code
from modmoe.models.families import FAMILIES
from modmoe.storage.checkpoint import Checkpoint
from tests.support.export_models import EXPERTS, write_config, write_own, write_tied


@pytest.fixture(scope="module")
def mistral(tmp_path_factory):
    return write_tied(tmp_path_factory.mktemp("mistral"), "mistral")


def check_one_line(error: Exception) -> str:
    text = str(error)
    assert "\n" not in text and text.endswith((".", "?")) and len(text) < 400
    return text


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"form": "nativ"}, "Did you mean 'native'?"),
        ({"form": "packed", "expert": "words"}, "--form dense"),
        ({"form": "packed", "target": "mixtral"}, "native form only"),
        ({"form": "adapter"}, "has no adapter"),
        ({"form": "dense", "expert": "words", "approximate": True}, "approximate: folds an adapter"),
        ({"form": "native", "target": "mixtrl"}, "Did you mean 'mixtral'?"),
        ({"form": "tied", "target": "mixtral"}, "native form only"),
        ({"form": "dense"}, "one of sums, words, code"),
        ({"form": "dense", "expert": "word"}, "Did you mean 'words'?"),
        ({"form": "native", "expert": "words"}, "--form dense"),
        ({"form": "tied", "expert": "words"}, "--form dense"),
        ({"form": "tied", "dtype": "bf16"}, "no dtype 'bf16'"),
        ({"form": "tied", "max_shard_size": "lots"}, "is no size"),
    ],
)
def test_what_cannot_be_asked_for_is_said_before_anything_is_written(mistral, tmp_path, options, said):
    with pytest.raises(ModmoeError) as caught:
        export(str(mistral), str(tmp_path / "out"), **options)
    assert said in check_one_line(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_dense_source_and_a_taken_output_are_refused(mistral, tmp_path):
    with pytest.raises(ExportError, match="no converted model"):
        export(str(mistral.parent / "dense"), str(tmp_path / "out"), form="tied")
    with pytest.raises(RecipeError, match="is the source"):
        modmoe.export(str(mistral), str(mistral), form="tied", overwrite=True)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "kept.txt").write_text("kept")
    with pytest.raises(RecipeError, match="is not empty"):
        export(str(mistral), str(tmp_path / "notes"), form="tied")
    assert (tmp_path / "notes" / "kept.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("model_type", "changes", "router", "said"),
    [
        ("qwen2", {}, {}, "a 'qwen2' model"),
        ("mistral", {}, {"routing": "sequence"}, "routing by sequence"),
        ("mistral", {}, {"routing": "task"}, "routing by task"),
        ("mistral", {}, {"kind": "mlp"}, "two-layer router"),
        ("mistral", {}, {"compensation": True}, "compensation"),
        ("mistral", {}, {"top_k": 2}, "union of 2 experts"),
        ("llama", {}, {}, "biases in the FFN (gate, up, down)"),
        ("llama", {"mlp_bias": False, "attention_bias": True}, {}, "biases in the attention"),
    ],
)
def test_what_mixtral_cannot_hold_is_named(model_type, changes, router, said, tmp_path):
    tied = write_tied(tmp_path, model_type, changes=changes, **router)
    with pytest.raises(ExportError) as caught:
        native_export(Checkpoint(tied), "mixtral")
    assert said in check_one_line(caught.value)
    assert "mixtral can't hold" in str(caught.value) and "tied, dense" in str(caught.value)


def test_a_compensation_without_a_place_is_refused(tmp_path):
    tied = Checkpoint(write_tied(tmp_path, "mistral", compensation=True))
    with pytest.raises(ExportError) as caught:
        dense_plan(tied, family_of_tied(tied), "words")
    assert "'mistral' has no bias" in check_one_line(caught.value)


def test_odd_expert_widths_are_warned_of(mistral):
    plan = native_export(Checkpoint(mistral)).plan
    assert plan.config["intermediate_size"] == 24
    (warning,) = native_warnings(plan)
    assert "24 neurons wide" in warning
    plan.config["intermediate_size"] = 64
    assert native_warnings(plan) == []


def test_mixtral_gets_what_config_json_leaves_out(tmp_path):
    tied = write_tied(tmp_path, "llama", changes={"mlp_bias": False})
    config = Checkpoint(tied).config
    for key in ("rms_norm_eps", "head_dim", "hidden_act", "tie_word_embeddings"):
        config.pop(key, None)
    write_config(tied, config)
    made = native_export(Checkpoint(tied), "mixtral").plan.config
    assert made["rms_norm_eps"] == 1e-6  # Llama's default, not Mixtral's
    assert made["head_dim"] == 8
    assert made["sliding_window"] is None
    assert made["num_local_experts"] == len(EXPERTS)
    assert made["architectures"] == ["MixtralForCausalLM"]
    assert "auto_map" not in made


def test_the_dense_configuration_loses_only_what_conversion_added():
    tied = {
        "model_type": "modmoe_own",
        "architectures": ["ModMoEOwnForCausalLM"],
        "auto_map": {"AutoConfig": "configuration_modmoe.ModMoEOwnConfig"},
        "hidden_size": 8,
        "num_experts": 3,
        "default_expert": None,
        "dtype": "bfloat16",
        "dense_config": {"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}},
    }
    assert dense_config(tied) == {
        "model_type": "own",
        "auto_map": {"AutoConfig": "configuration_own.OwnConfig"},
        "hidden_size": 8,
        "dtype": "bfloat16",
    }
    # files for an architecture that transformers knows are not carried, so nothing may ask for them
    known = {
        **tied,
        "dense_config": {"model_type": "phi3", "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}},
    }
    assert dense_config(known) == {"model_type": "phi3", "hidden_size": 8, "dtype": "bfloat16"}
    with pytest.raises(ExportError, match="lacks model_type"):
        dense_config({**tied, "dense_config": {}})


def test_the_family_is_found_in_the_configuration_the_table_or_the_recipe(tmp_path):
    tied = write_tied(tmp_path, "phi3")
    config = Checkpoint(tied).config
    assert family_of_tied(Checkpoint(tied)) == FAMILIES["phi3"]
    config["dense_config"].pop("family")
    write_config(tied, config)
    assert family_of_tied(Checkpoint(tied)) == FAMILIES["phi3"]
    config["dense_config"]["model_type"] = "own"
    write_config(tied, config)
    with pytest.raises(ExportError, match="put `family:`"):
        family_of_tied(Checkpoint(tied))
    (tied / "modmoe.yaml").write_text("family: {gate: ffn.w1, up: ffn.w3, down: ffn.w2}\n")
    assert family_of_tied(Checkpoint(tied)).down == "ffn.w2"


def test_folded_means_are_those_of_the_skipped_modules():
    source = {"bias": torch.tensor([1.0, 2.0]), "means": torch.tensor([[1.0, 0.0], [10.0, 10.0], [0.0, 5.0]])}
    shapes = {name: tuple(tensor.shape) for name, tensor in source.items()}
    op = FoldMeans("bias", "means", torch.tensor([0, 2]))
    assert op.shape(shapes) == (2,)
    assert op.make(source).tolist() == [2.0, 7.0]
    assert FoldMeans(None, "means", torch.tensor([], dtype=torch.long)).make(source).tolist() == [0.0, 0.0]
    with pytest.raises(ValueError, match="wide"):
        op.shape({**shapes, "bias": (3,)})


def test_a_dtype_is_named_once():
    assert with_dtype({"torch_dtype": "float32", "a": 1}, torch.bfloat16) == {"dtype": "bfloat16", "a": 1}
    assert with_dtype({"torch_dtype": "float32"}, None) == {"torch_dtype": "float32"}


def test_code_of_its_own_must_be_whole_and_plain(tmp_path):
    tied = write_own(tmp_path)
    config = Checkpoint(tied).config
    assert set(own_files(config, tied)) == {"configuration_own.py", "layers_own.py", "modeling_own.py"}
    with pytest.raises(CheckpointError, match="--trust-remote-code"):
        export(str(tied), str(tmp_path / "out"), form="tied")
    config["dense_config"]["auto_map"]["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM\nimport os"
    with pytest.raises(ExportError, match=r"module\.Class"):
        write_code(tmp_path, config, tied)
    config["dense_config"]["auto_map"]["AutoModelForCausalLM"] = "someone/else--modeling_own.OwnForCausalLM"
    with pytest.raises(ExportError, match="another repository"):
        write_code(tmp_path, config, tied)
    (tied / "layers_own.py").unlink()
    config["dense_config"]["auto_map"]["AutoModelForCausalLM"] = "modeling_own.OwnForCausalLM"
    with pytest.raises(ExportError, match=r"layers_own\.py: is missing"):
        write_code(tmp_path, config, tied)
    assert not list(tmp_path.glob("*.py")), "nothing is written before everything is found"


@pytest.mark.parametrize("form", ["tied", "dense", "native"])
def test_an_export_without_proof(form, mistral, tmp_path):
    (mistral / "modmoe.yaml").write_text("source: someone/a-model\n")
    out = tmp_path / "out"
    result = export(
        str(mistral), str(out), form=form, expert="words" if form == "dense" else None, dtype="bfloat16", verify=False
    )
    assert result["verified"] is None
    assert result["target"] == {"tied": "modmoe_mistral", "dense": "mistral", "native": "mixtral"}[form]
    made = Checkpoint(out)
    assert made.config["dtype"] == result["dtype"] == "bfloat16"
    assert {made.dtype(name) for name in made} <= {torch.bfloat16, torch.bool, torch.int32}
    assert result["bytes_after"] == sum(made[name].nbytes for name in made)
    assert {file.name for file in out.glob("*.py")} == (set(CODE_FILES) if form == "tied" else set())
    assert {"tokenizer.json", "modmoe.yaml", "README.md", "generation_config.json"} <= {x.name for x in out.iterdir()}
    json.dumps(result)
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == "someone/a-model"
    assert card.data.library_name == "transformers"
    assert ("custom_code" in card.data.tags) == ("trust_remote_code=True" in card.text) == (form == "tied")
    assert ("moe" in card.data.tags) == (form != "dense")
    assert "not checked" in card.text


def test_a_tied_export_by_task_may_name_its_first_expert(tmp_path):
    tied = write_tied(tmp_path, routing="task")
    export(str(tied), str(tmp_path / "out"), form="tied", expert="code", verify=False)
    assert Checkpoint(tmp_path / "out").config["default_expert"] == "code"
    assert "model.set_expert('code')" in (tmp_path / "out" / "README.md").read_text()


def test_a_card_cannot_be_written_into(tmp_path):
    assert escape("a|b\n<script>`x`[y](z)") == r"a\|b \<script\>\`x\`\[y\]\(z\)"
    tied = write_tied(tmp_path, routing="task")
    config = Checkpoint(tied).config
    config["expert_names"] = ["a`|b\n---\nevil: yes", "'); import os #", "code"]
    write_config(tied, config)
    (tied / "modmoe.yaml").write_text("source: /home/someone/secret\n")
    export(str(tied), str(tmp_path / "out"), form="tied", verify=False)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "/home" not in text
    assert not any(line.startswith("evil") for line in text.splitlines())
    (span,) = (line for line in text.splitlines() if "set_expert" in line)
    assert span.count("`") == 2


def test_the_sample_is_spread_and_fits_the_positions():
    class Model:
        class config:  # noqa: N801
            max_position_embeddings = 8

        @staticmethod
        def get_input_embeddings():
            return torch.nn.Embedding(50, 2)

    ids_BT, new_tokens = verify.sample_ids(Model())
    assert ids_BT.shape == (verify.ROWS, 4) and new_tokens == 4
    assert len(set(ids_BT.flatten().tolist())) == ids_BT.numel()
    assert int(ids_BT.max()) < 50


@pytest.mark.parametrize(("dtype", "shift", "holds"), [(torch.float32, 1e-5, True), (torch.float32, 1e-3, False)])
def test_the_tolerance_is_a_share_of_the_largest_logit(dtype, shift, holds):
    logits_BTV = torch.linspace(-1, 1, 24, dtype=dtype).reshape(1, 2, 12) * 100
    tokens_BG = torch.ones(1, 3, dtype=torch.long)
    found = (logits_BTV + shift * 100, tokens_BG)
    if holds:
        compared = verify._compare((logits_BTV, tokens_BG), found, dtype)
        assert compared["greedy_tokens_equal"] and compared["max_abs_logit_diff"] == pytest.approx(1e-3, rel=0.1)
        return
    with pytest.raises(ExportError) as caught:
        verify._compare((logits_BTV, tokens_BG), found, dtype)
    check_one_line(caught.value)


def test_a_router_near_a_tie_does_not_fail_half_precision():
    logits_BTV = torch.full((1, 10, 10), 1.0, dtype=torch.bfloat16)
    flipped_BTV = logits_BTV.clone()
    flipped_BTV[0, 0, 0] = -1
    tokens_BG = torch.ones(1, 3, dtype=torch.long)
    compared = verify._compare((logits_BTV, tokens_BG), (flipped_BTV, tokens_BG), torch.bfloat16)
    assert compared["max_abs_logit_diff"] == 2
    flipped_BTV[0, :2] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        verify._compare((logits_BTV, tokens_BG), (flipped_BTV, tokens_BG), torch.bfloat16)


def test_what_the_fresh_process_says_becomes_one_line(mistral, tmp_path, monkeypatch):
    class Done:
        returncode, stderr = (
            1,
            "Traceback...\n  File x\nImportError: 'modmoe' is imported where only own code may run\n",
        )

    monkeypatch.setattr(verify, "_run_child", lambda *_, **__: Done)
    with pytest.raises(ExportError) as caught:
        export(str(mistral), str(tmp_path / "out"), form="dense", expert="code")
    assert "does not reload" in str(caught.value) and "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
