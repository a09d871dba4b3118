"""The packed form computes what the tied model does, stores each module once, and says what it cannot hold."""

from __future__ import annotations

import pytest
import torch

from modmoe.errors import ExportError
from modmoe.exports.converted import export
from modmoe.formats.packed import packed_plan, packed_warnings
from modmoe.models.inspection import inspect
from modmoe.models.loading import is_tied
from modmoe.storage.checkpoint import Checkpoint
from tests.exports.test_exported_logits import relative_difference, run_without_modmoe
from tests.support import planned
from tests.support.export_models import write_own
from tests.support.packed_models import FAMILIES, ROUTERS, load_both, write_packed

CASES = [*((family, "union2") for family in FAMILIES), *(("mistral", router) for router in ROUTERS)]


@pytest.mark.parametrize(("model_type", "router"), CASES)
def test_a_packed_export_is_the_tied_model(model_type, router, tmp_path):
    tied, packed = write_packed(tmp_path, model_type, **ROUTERS[router])
    for dtype, bound in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        model, made = load_both(tied, packed, dtype)
        assert made.config.model_type == f"modmoe_packed_{model_type}"
        assert relative_difference(made, model) <= bound


def test_layers_may_store_fewer_modules_than_others_give_to_a_token(tmp_path, monkeypatch):
    """The count is the same for all layers: the lesser layer fills up with weights of zero."""
    narrow, wide = torch.zeros(3, 8, dtype=torch.bool), torch.zeros(3, 8, dtype=torch.bool)
    narrow[0, :4] = narrow[1, 1:5] = narrow[2, [0, 2, 3, 4]] = True
    wide[0, :4] = wide[1, 4:] = wide[2, 2:6] = True
    rows = iter((narrow, wide))
    monkeypatch.setattr(planned, "_membership", lambda leave_out, draw: next(rows))
    tied, packed = write_packed(tmp_path, top_k=2)
    config = Checkpoint(packed).config
    assert (config["modular"]["stored_modules"], config["num_experts"], config["num_experts_per_tok"]) == ([5, 8], 8, 8)
    model, made = load_both(tied, packed, torch.float64)
    assert relative_difference(made, model) <= 1e-10
    _, weights_TA, modules_TA = made.model.layers[0].mlp.router(torch.randn(5, 32, dtype=torch.float64))
    assert weights_TA.shape == modules_TA.shape == (5, 8)
    assert modules_TA.max() < 5 and not weights_TA[:, 5:].any()
    # nothing is padded on disk
    assert "model.layers.0.mlp.experts.5.up_proj.weight" not in Checkpoint(packed)


@pytest.mark.parametrize("router", ["union2", "sum2"])
def test_every_way_of_computing_experts_is_equal(router, tmp_path):
    # modules of 16 neurons, as grouped products want
    tied, packed = write_packed(tmp_path, changes={"intermediate_size": 128}, **ROUTERS[router])
    model, made = load_both(tied, packed, torch.float32)
    for way in ("eager", "batched_mm", "grouped_mm"):
        made.set_experts_implementation(way)
        assert made.config._experts_implementation == made.model.config._experts_implementation == way
        assert relative_difference(made, model) <= 1e-5
    assert packed_warnings(packed_plan(Checkpoint(tied))) == [
        "the packed form is for engines; anywhere else the tied form is faster"
    ]


def test_a_module_is_stored_once(tmp_path):
    pair = write_packed(tmp_path, top_k=2, means=True, leave_out=True)
    tied, packed = map(Checkpoint, pair)

    def size(checkpoint: Checkpoint) -> int:
        tables = [name for name in checkpoint if name.endswith((".membership", ".ranking"))]
        return sum(checkpoint[name].nbytes for name in checkpoint if name not in tables)

    assert size(packed) == size(tied)
    assert not is_tied(pair[1])
    of_tied, of_packed = (inspect(str(path)) for path in pair)
    for key in ("parameters", "sparsity", "experts", "top_k", "stored_modules", "router_parameters"):
        assert of_packed[key] == of_tied[key]


def test_a_packed_export_is_proved_and_goes_wherever_transformers_saves_it(tmp_path):
    _, tied = planned.write_tied(tmp_path, "qwen3", top_k=2)
    out = tmp_path / "out"
    result = export(str(tied), str(out), form="packed", dtype="bfloat16", max_shard_size="20KB")
    assert result["target"] == "modmoe_packed_qwen3"
    verified = result["verified"]
    assert verified["reloaded_without_modmoe"] is True and verified["greedy_tokens_equal"] is True
    assert verified["max_abs_logit_diff"] <= 1e-5 * verified["by_dtype"]["float32"]["max_abs_logit"]
    assert any("for engines" in line for line in result["warnings"])
    assert any("no multiple of 8" in line for line in result["warnings"])
    card = (out / "README.md").read_text()
    assert "contract tested, engines not run" in card and "the tied form of the same model is faster" in card
    assert {file.name for file in out.glob("*.py")} == {"packed_modmoe.py"}
    script = """
        import sys, torch
        from pathlib import Path
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

        def load(directory, kind=AutoModelForCausalLM):
            return kind.from_pretrained(directory, trust_remote_code=True, dtype=torch.float32).eval()

        ids = torch.arange(12).reshape(2, 6)
        out = Path(sys.argv[1])
        model, body = load(out), load(out, AutoModel)
        logits = model(ids).logits
        assert torch.equal(model.model(ids).last_hidden_state, body(ids).last_hidden_state)
        model.set_experts_implementation("batched_mm")
        assert (model(ids).logits - logits).abs().max() < 1e-4 * logits.abs().max()
        model.save_pretrained(out.parent / "saved")
        assert torch.equal(load(out.parent / "saved")(ids).logits, logits)
        config = AutoConfig.from_pretrained(out, trust_remote_code=True)
        assert type(AutoModel.from_config(config, trust_remote_code=True)) is type(body)
    """
    run_without_modmoe(script, tmp_path, out)
    assert set(Checkpoint(tmp_path / "saved")) == set(Checkpoint(out))


@pytest.mark.parametrize(
    ("model_type", "changes", "router", "said"),
    [
        ("mistral", {}, {"routing": "sequence"}, "routing by sequence"),
        ("gpt2", {}, {}, "without a gate projection"),
        ("llama", {}, {}, "biases in the FFN (gate, up, down"),
        ("gemma2", {}, {}, "engines compute experts with SiLU"),
        ("mistral", {"hidden_act": "gelu"}, {}, "the activation 'gelu'"),
        ("mistral", {}, {"routing": "task"}, "name the one to begin with, of sums, words, code"),
    ],
)
def test_what_engines_cannot_hold_is_refused_in_one_line(model_type, changes, router, said, tmp_path):
    _, tied = planned.write_tied(tmp_path, model_type, changes=changes, **router)
    with pytest.raises(ExportError) as caught:
        export(str(tied), str(tmp_path / "out"), form="packed")
    text = str(caught.value)
    assert said in text and "\n" not in text and text.endswith(".") and len(text) < 400
    assert "forms that work: tied, dense" in text or router.get("routing") == "task"
    assert not (tmp_path / "out").exists()


def test_an_architecture_of_its_own_code_is_refused(tmp_path):
    with pytest.raises(ExportError, match="whose code is its own"):
        packed_plan(Checkpoint(write_own(tmp_path)))
