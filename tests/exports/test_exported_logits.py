"""An export computes what the tied model computes, whatever its form, family and file layout."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from modmoe.errors import ExportError
from modmoe.exports.converted import export
from modmoe.formats.dense import dense_plan, family_of_tied
from modmoe.formats.native.plan import native_export
from modmoe.formats.tied import CODE_FILES, tied_plan
from modmoe.modeling.configuration_modmoe import ModularFields
from modmoe.models.families import FAMILIES
from modmoe.models.loading import load
from modmoe.storage.checkpoint import INDEX, Checkpoint, CheckpointWriter
from modmoe.storage.plan import Plan
from tests.support.export_models import EXPERTS, OWN_CODE, write_own, write_tied
from tests.support.tiny import token_ids

NO_BIAS = {"mlp_bias": False}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def write(plan: Plan, tied: Path, directory: Path, *, max_shard_bytes: int = 10**9) -> Path:
    """Check and run a plan, without the proof that an export ends with."""
    source = Checkpoint(tied)
    shapes = plan.check(source)
    directory.mkdir()
    writer = CheckpointWriter(directory, max_shard_bytes=max_shard_bytes)
    plan.run(source, writer)
    writer.finish(plan.config)
    made = Checkpoint(directory)
    assert {name: made.shape(name) for name in made} == shapes
    return directory


def write_dense(tied: Path, directory: Path, expert: str) -> Path:
    source = Checkpoint(tied)
    return write(dense_plan(source, family_of_tied(source), expert), tied, directory)


@torch.no_grad()
def relative_difference(found, wanted) -> float:
    ids_BT = token_ids()
    wanted_BTV = wanted(ids_BT).logits
    return float((found(ids_BT).logits - wanted_BTV).abs().max() / wanted_BTV.abs().max())


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def tied_of_family(request, tmp_path_factory):
    tied = write_tied(tmp_path_factory.mktemp(request.param), request.param)
    return request.param, tied


def test_each_dense_export_is_the_tied_model_held_to_its_expert(tied_of_family, tmp_path):
    model_type, tied = tied_of_family
    model = load(tied, dtype=torch.float64)
    for expert in EXPERTS:
        directory = write_dense(tied, tmp_path / expert, expert)
        dense = load(directory, dtype=torch.float64)
        assert dense.config.model_type == model_type
        model.set_expert(expert)
        assert relative_difference(dense, model) <= 1e-10


def test_a_dense_export_has_the_names_and_keys_of_its_family(tied_of_family, tmp_path):
    _, tied = tied_of_family
    before, after = Checkpoint(tied.parent / "dense"), Checkpoint(write_dense(tied, tmp_path / "out", "words"))
    family = family_of_tied(Checkpoint(tied))
    before.add_prefix(family.layers)
    assert set(after) == set(before)
    changed = {key for key in before.config.keys() | after.config if before.config.get(key) != after.config.get(key)}
    assert changed == {family.width}
    assert not {field.name for field in dataclasses.fields(ModularFields)} & after.config.keys()


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), ("llama", NO_BIAS), ("gpt2", {}), ("gpt_neox", {}), ("opt", {})],
    ids=["llama-biased", "llama", "gpt2", "gpt_neox", "opt"],
)
def test_compensation_goes_into_the_bias_of_down(model_type, changes, tmp_path):
    tied = write_tied(tmp_path, model_type, compensation=True, changes=changes)
    model = load(tied, dtype=torch.float64)
    model.set_expert("code")
    # the sum of means was rounded to the weights' float32
    assert relative_difference(load(write_dense(tied, tmp_path / "out", "code"), dtype=torch.float64), model) <= 1e-6


@pytest.mark.parametrize("routing", ["sequence", "task"])
def test_a_dense_export_needs_no_router(routing, tmp_path):
    tied = write_tied(tmp_path, "qwen2", routing=routing, kind="mlp", top_k=2)
    model = load(tied, dtype=torch.float64)
    model.set_expert("sums")
    assert relative_difference(load(write_dense(tied, tmp_path / "out", "sums"), dtype=torch.float64), model) <= 1e-10


@pytest.mark.parametrize(
    ("model_type", "changes", "router"),
    [
        ("mistral", {}, {"top_k": 1}),
        ("llama", NO_BIAS, {"top_k": 1}),
        ("llama", {**NO_BIAS, "tie_word_embeddings": False, "rope_parameters": LLAMA3_ROPE}, {"top_k": 1}),
        ("llama", {**NO_BIAS, "head_dim": 12, "rms_norm_eps": 1e-3}, {"top_k": 2, "combine": "sum"}),
        ("mistral", {"num_key_value_heads": 4}, {"top_k": 3, "combine": "sum"}),
    ],
    ids=["mistral", "llama", "llama3-rope-untied", "llama-head-dim-sum2", "mistral-sum3"],
)
def test_a_mixtral_export_is_the_tied_model(model_type, changes, router, tmp_path):
    tied = write_tied(tmp_path, model_type, changes=changes, **router)
    directory = write(native_export(Checkpoint(tied)).plan, tied, tmp_path / "out")
    model = load(tied, dtype=torch.float64)
    native = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, experts_implementation="eager")
    assert native.config.model_type == "mixtral"
    # Mixtral's router computes its softmax in float32
    assert relative_difference(native.eval(), model) <= (1e-10 if router["top_k"] == 1 else 1e-5)


def test_a_mixtral_export_has_the_names_used_on_the_hub(tmp_path):
    tied = write_tied(tmp_path, "mistral")
    names = set(native_export(Checkpoint(tied)).plan.ops)
    assert "model.layers.1.block_sparse_moe.gate.weight" in names
    assert {f"model.layers.0.block_sparse_moe.experts.2.{part}.weight" for part in ("w1", "w2", "w3")} <= names
    assert not any(".mlp." in name for name in names)


@pytest.mark.parametrize("form", ["tied", "dense", "native"])
def test_many_shards_hold_what_one_does(form, tmp_path):
    tied = write_tied(tmp_path, "mistral")
    source = Checkpoint(tied)
    plan = {
        "tied": lambda: tied_plan(source),
        "dense": lambda: dense_plan(source, family_of_tied(source), "words"),
        "native": lambda: native_export(source).plan,
    }[form]()
    one = Checkpoint(write(plan, tied, tmp_path / "one"))
    many = Checkpoint(write(plan, tied, tmp_path / "many", max_shard_bytes=8000))
    assert (many.directory / INDEX).is_file() and not (one.directory / INDEX).exists()
    assert set(one) == set(many)
    assert all(torch.equal(one[name], many[name]) for name in one)


def run_without_modmoe(script: str, scratch: Path, *arguments: Path) -> str:
    """Run a script where modmoe cannot be imported and return what it printed."""
    blocked = "import sys\nsys.modules['modmoe'] = None\n"
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-c", blocked + textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, cwd=scratch, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.parametrize(
    ("form", "model_type", "router", "options"),
    [
        ("tied", "gpt2", {"routing": "task"}, {"expert": "code", "dtype": "bfloat16"}),
        ("dense", "opt", {"top_k": 2}, {"expert": "words"}),
        ("native", "mistral", {}, {"dtype": "float16"}),
    ],
)
def test_an_export_is_proved_in_a_process_without_modmoe(form, model_type, router, options, tmp_path):
    tied = write_tied(tmp_path, model_type, **router)
    out = tmp_path / "out"
    result = export(str(tied), str(out), form=form, max_shard_size="20KB", **options)
    verified = result["verified"]
    assert verified["reloaded_without_modmoe"] is True
    assert verified["greedy_tokens_equal"] is True
    assert verified["max_abs_logit_diff"] <= 1e-4 * verified["by_dtype"]["float32"]["max_abs_logit"]
    assert result["bytes_after"] == sum(Checkpoint(out)[name].nbytes for name in Checkpoint(out))
    assert (out / INDEX).is_file()
    assert (out / "tokenizer.json").is_file()
    assert (out / "README.md").read_text().startswith("---\n")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(("out.", ".out"))] == []


def test_the_code_of_a_tied_export_goes_wherever_transformers_saves_it(tmp_path):
    own, plain = tmp_path / "own", tmp_path / "plain"
    for directory in (own, plain):
        directory.mkdir()
    tied = write_own(own)
    export(str(tied), str(own / "out"), form="tied", verify=False)
    export(str(tied), str(own / "words"), form="dense", expert="words", verify=False)
    export(str(write_tied(plain, "qwen3")), str(plain / "out"), form="tied", verify=False)
    script = """
        import sys, torch
        from pathlib import Path
        from transformers import AutoModel, AutoModelForCausalLM, Trainer, TrainingArguments

        ids = torch.arange(12).reshape(2, 6)

        def load(directory, kind=AutoModelForCausalLM):
            return kind.from_pretrained(directory, trust_remote_code=True).eval()

        for folder in map(Path, sys.argv[1:]):
            model, body = load(folder / "out"), load(folder / "out", AutoModel)
            logits = model(ids).logits
            assert torch.equal(model.model(ids).last_hidden_state, body(ids).last_hidden_state)
            model.save_pretrained(folder / "saved")
            load(folder / "saved").save_pretrained(folder / "again")
            assert torch.equal(load(folder / "again")(ids).logits, logits)
            assert torch.equal(load(folder / "again", AutoModel)(ids).last_hidden_state, body(ids).last_hidden_state)
            arguments = TrainingArguments(folder / "trained", max_steps=1, save_steps=1, use_cpu=True, report_to="none")
            Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in ids]).train()
            assert torch.equal(load(folder / "trained" / "checkpoint-1")(ids).logits, model.eval()(ids).logits)

        folder = Path(sys.argv[1])
        model, dense = load(folder / "out"), load(folder / "words")
        assert type(model).__mro__[2].__name__ == "OwnForCausalLM", type(model).__mro__
        assert type(model.config).__mro__[2].__name__ == "OwnConfig", type(model.config).__mro__
        assert type(model.model.layers[0].post_attention_layernorm).__name__ == "OwnNorm"
        model.set_expert("words")
        assert (model(ids).logits - dense(ids).logits).abs().max() < 1e-5 * dense(ids).logits.abs().max()
    """
    run_without_modmoe(script, tmp_path, own, plain)
    for folder, carried in ((own, {*CODE_FILES, *OWN_CODE}), (plain, set(CODE_FILES))):
        for saved in ("out", "saved", "again", "trained/checkpoint-1"):
            assert {file.name for file in (folder / saved).glob("*.py")} == carried
    assert {file.name for file in (own / "words").glob("*.py")} == set(OWN_CODE)


def test_an_export_that_differs_leaves_nothing_behind(tmp_path, monkeypatch):
    from modmoe.formats.proof import verify

    tied = write_tied(tmp_path, "mistral")

    def differ(job):
        shape = (len(job["input_ids"]), len(job["input_ids"][0]))
        return {"float32.logits": torch.full((*shape, 264), float("nan")), "float32.tokens": torch.zeros(*shape)}

    monkeypatch.setattr(verify, "_reload", differ)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ExportError, match="logits differ"):
        export(str(tied), str(tmp_path / "out"), form="native")
    assert sorted(tmp_path.iterdir()) == before
