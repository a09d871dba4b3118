"""An exported adapter computes what it did with PEFT: with its base model, alone, and folded in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from modmoe.adapters.table import METHODS
from modmoe.analysis.text.calibration import Batch
from modmoe.errors import ExportError, ModmoeError
from modmoe.exports.converted import export
from modmoe.exports.folded import fold_to_single, mean_weights
from modmoe.formats.adapter_code import CONFIGURATION, MODELING, code_files
from modmoe.models.inspection import inspect
from modmoe.models.loading import load
from modmoe.storage.checkpoint import Checkpoint
from tests.support import adapted, tiny
from tests.support.export_models import write_tied

CONTRACT = {"attach.py", "base.py", "losses.py", "passes.py", "routing.py", "targets.py", CONFIGURATION, MODELING}
CONTRACT |= {"generation_modmoe.py", "sequences_modmoe.py"}  # what a call says of its prompt
TIED_CASES = [*adapted.ONE_EACH, ("comol", "mixtral"), ("expert_lora", "mixtral"), ("perft_r", "qwen3_moe")]


def save_base(directory: Path, family: str, dtype: torch.dtype | None = None, **changes: Any) -> Path:
    """Write a tiny base model whose vocabulary is that of the tiny tokenizer."""
    torch.manual_seed(0)
    model = adapted.from_config(family, vocab_size=tiny.VOCABULARY, **changes)
    model.to(dtype).save_pretrained(directory)
    tiny.tokenizer().save_pretrained(directory)
    return directory


def save_adapter(directory: Path, base: Path, method: str, scale: float = 0.2, **changes: Any) -> Path:
    """Attach a method to a base model, move it off its start and write it as PEFT does."""
    torch.manual_seed(0)
    model = get_peft_model(load(base, device="cpu"), adapted.config_for(method, **changes))
    adapted.shake(model, scale=scale)
    model.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    made = {}

    def get(family: str, dtype: torch.dtype | None = None) -> Path:
        key = f"{family}-{dtype}"
        if key not in made:
            made[key] = save_base(folder / key, family, dtype)
        return made[key]

    return get


@torch.no_grad()
def logits_of(directory: Path) -> torch.Tensor:
    return load(directory, device="cpu")(input_ids=tiny.token_ids(2, 9)).logits.float()


RELOAD = """
import json, sys, torch
from pathlib import Path
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForCausalLM
sys.modules["modmoe"] = sys.modules["peft"] = None
job = json.loads(Path(sys.argv[1]).read_text())
ids_BT, made = torch.tensor(job["ids"]), {}
with torch.no_grad():
    for name, directory in job["directories"].items():
        model = AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=True).eval()
        made[name] = model(ids_BT).logits.float()
        cut = model.generate(ids_BT, max_new_tokens=2, do_sample=False, pad_token_id=0)
        assert cut.shape[1] == ids_BT.shape[1] + 2
        body = AutoModel.from_pretrained(directory, trust_remote_code=True).eval()
        assert torch.equal(body(ids_BT).last_hidden_state, model.base_model(ids_BT).last_hidden_state), name
        if name in job["saved"]:
            model.save_pretrained(job["saved"][name])
            again = AutoModelForCausalLM.from_pretrained(job["saved"][name], trust_remote_code=True).eval()
            assert torch.equal(again(ids_BT).logits.float(), made[name]), name
save_file(made, job["output"])
"""


@pytest.fixture(scope="module")
def reloaded(bases, tmp_path_factory):
    """Exports of every method in the tied form, and the logits that each gives without modmoe: in one process."""
    folder = tmp_path_factory.mktemp("tied")
    cases = {f"{method}-{family}": (method, bases(family)) for method, family in TIED_CASES}
    cases["comol-bfloat16"] = ("comol", bases("llama", torch.bfloat16))
    directories, wanted = {}, {}
    for name, (method, base) in cases.items():
        adapter = save_adapter(folder / f"{name}-adapter", base, method)
        directories[name], wanted[name] = str(folder / name), logits_of(adapter)
        export(str(adapter), directories[name], form="tied", verify=False)
    saved = {name: str(folder / f"{name}-saved") for name in ("comol-llama", "comol-mixtral", "soft_moa-llama")}
    job = {"ids": tiny.token_ids(2, 9).tolist(), "directories": directories, "saved": saved}
    run_child(RELOAD, folder, {**job, "output": str(folder / "logits.safetensors")})
    return folder, wanted, load_file(folder / "logits.safetensors")


def run_child(script: str, folder: Path, job: dict[str, Any]) -> None:
    (folder / "job.json").write_text(json.dumps(job))
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-P", "-c", textwrap.dedent(script), str(folder / "job.json")]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize("name", [f"{method}-{family}" for method, family in TIED_CASES] + ["comol-bfloat16"])
def test_a_model_with_its_adapter_is_the_same_without_modmoe(reloaded, name):
    folder, wanted, found = reloaded
    limit = 0.02 if name == "comol-bfloat16" else 1e-5
    assert (found[name] - wanted[name]).abs().max() <= limit * wanted[name].abs().max()
    # and with modmoe, by this package's classes
    model = load(folder / name, device="cpu")
    assert type(model).__module__ == "modmoe.adapters.modeling_modmoe_adapters"
    # the same arithmetic in another process, where tensors lie elsewhere in memory
    torch.testing.assert_close(logits_of(folder / name), found[name])


@pytest.mark.parametrize("method", METHODS)
def test_the_code_that_is_carried_is_what_the_method_needs(reloaded, method):
    folder, _, _ = reloaded
    (family,) = (family for name, family in adapted.ONE_EACH if name == method)
    carried = {file.name for file in (folder / f"{method}-{family}").glob("*.py")}
    assert carried >= CONTRACT
    others = {kind.adapter.__module__.rpartition(".")[2] for kind in METHODS.values()}
    own = METHODS[method].adapter.__module__.rpartition(".")[2]
    if method in ("comol", "moslora", "perft_r", "mixlora"):
        assert carried == {*CONTRACT, f"{own}.py"}
    assert f"{own}.py" in carried and "peft.py" not in carried and "methods.py" not in carried
    assert len(carried & {f"{other}.py" for other in others}) <= 2
    assert not any("modmoe." in line for text in code_files(METHODS[method]).values() for line in imports(text))


def imports(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip().startswith(("from ", "import "))]


def test_adapters_stay_in_float32_and_base_weights_keep_name_and_type(reloaded, bases):
    folder, _, _ = reloaded
    made, base = Checkpoint(folder / "comol-bfloat16"), Checkpoint(bases("llama", torch.bfloat16))
    assert made.config["dtype"] == "bfloat16" and made.config["model_type"] == "modmoe_adapters_llama"
    added = set(made) - set(base)
    assert set(base) <= set(made) and all(torch.equal(made[name], base[name]) for name in base)
    assert "model.layers.1.self_attn.q_proj.routed_comol.modmoe_comol.default.up_OR" in added
    assert {made.dtype(name) for name in added} == {torch.float32}
    for dtype in (None, torch.float16):
        model = load(folder / "comol-bfloat16", dtype=dtype, device="cpu")
        kinds = {name: weight.dtype for name, weight in model.named_parameters()}
        assert {kind for name, kind in kinds.items() if "routed_" in name} == {torch.float32}
        assert {kind for name, kind in kinds.items() if "routed_" not in name} == {dtype or torch.bfloat16}


@pytest.mark.parametrize("form", ["tied", "dense"])
def test_a_type_that_is_asked_for_is_the_base_weights(bases, tmp_path, form):
    adapter = save_adapter(tmp_path / "adapter", bases("mixtral"), "moslora")
    result = export(str(adapter), str(tmp_path / "out"), form=form, dtype="bfloat16", verify=False)
    made = Checkpoint(tmp_path / "out")
    assert result["dtype"] == made.config["dtype"] == "bfloat16"
    assert {made.dtype(name) for name in made if "routed_" not in name} == {torch.bfloat16}
    assert {made.dtype(name) for name in made if "routed_" in name} == ({torch.float32} if form == "tied" else set())
    assert result["bytes_after"] == sum(made[name].nbytes for name in made)


def test_a_tied_embedding_is_written_once(tmp_path):
    base = save_base(tmp_path / "base", "llama", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, "comol")
    export(str(adapter), str(tmp_path / "out"), form="tied", verify=False)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "out")
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(adapter))


def test_exports_are_proved_in_fresh_processes(bases, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", bases("llama", torch.bfloat16), "comol")
    for form, kind, target in (("tied", "modmoe", "modmoe_adapters_llama"), ("adapter", "peft", "MODMOE_COMOL")):
        result = export(str(adapter), str(tmp_path / kind), form=form)
        proof = result["verified"]
        assert result["target"] == target
        assert proof["reloaded_without_modmoe"] is (kind == "modmoe")
        assert proof.get("reloaded_with_peft", False) is (kind == "peft")
        assert proof["greedy_tokens_equal"] and set(proof["by_dtype"]) == {"bfloat16", "float32"}
        assert proof["max_abs_logit_diff"] <= 1e-4 * proof["by_dtype"]["float32"]["max_abs_logit"]
        json.dumps(result)
        card = ModelCard.load(tmp_path / kind / "README.md")
        assert ("trust_remote_code=True" in card.text) == ("custom_code" in card.data.tags) == (form == "tied")
        assert ("import modmoe.adapters" in card.text) == (form == "adapter") == (card.data.library_name == "peft")
        assert str(tmp_path) not in card.text


def test_an_export_that_differs_is_refused(bases, tmp_path, monkeypatch):
    adapter = save_adapter(tmp_path / "adapter", bases("llama"), "comol")

    def write_other(tensors, path, **options):
        save_file({name: 1.1 * tensor for name, tensor in tensors.items()}, path, **options)

    monkeypatch.setattr("modmoe.exports.adapters.save_file", write_other)
    with pytest.raises(ExportError, match="logits differ"):
        export(str(adapter), str(tmp_path / "out"), form="adapter")
    assert not (tmp_path / "out").exists()


def test_an_adapter_alone_loses_what_a_trainer_left(tmp_path):
    base = save_base(tmp_path / "base", "llama")
    adapter = save_adapter(tmp_path / "run" / "adapter", base, "molora")
    for name in ("optimizer.pt", "trainer_state.json", "rng_state.pth"):
        (adapter / name).write_bytes(b"x")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "../../base"  # from the adapter's directory
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = export(str(adapter), str(tmp_path / "out"), form="adapter", verify=False)
    assert "Hub id" in result["warnings"][0]
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "README.md", "tokenizer.json"}
    assert not names & {"optimizer.pt", "trainer_state.json", "rng_state.pth", "config.json"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "../base"
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(adapter))
    old, new = (load_file(place / "adapter_model.safetensors") for place in (adapter, tmp_path / "out"))
    assert old.keys() == new.keys() and all(torch.equal(old[name], new[name]) for name in old)


EXACT = [("comol", "llama", {"num_experts": 1}), ("moslora", "mixtral", {}), ("expert_lora", "mixtral", {})]


@pytest.mark.parametrize(("method", "family", "changes"), EXACT, ids=[f"{m}-{f}" for m, f, _ in EXACT])
def test_an_exact_fold_changes_the_weights_it_must_and_no_others(bases, method, family, changes, tmp_path):
    base = bases(family)
    adapter = save_adapter(tmp_path / "adapter", base, method, **changes)
    result = export(str(adapter), str(tmp_path / "out"), form="dense", verify=False)
    assert result["target"] == family and result["folding"]["kind"] == "exact"
    old, new = Checkpoint(base), Checkpoint(tmp_path / "out")
    assert list(new) == list(old) or set(new) == set(old)
    same = {name for name in old if torch.equal(old[name], new[name])}
    word = "experts" if method == "expert_lora" else "_proj"
    assert same and set(old) - same and all(word in name for name in set(old) - same)
    assert "model.embed_tokens.weight" in same and new.config == old.config
    wanted = logits_of(adapter)
    assert (wanted - logits_of(base)).abs().max() > 0.1
    assert (logits_of(tmp_path / "out") - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_gpt2_folds_into_transposed_weights_and_bare_names(tmp_path):
    base = tmp_path / "base"
    model = tiny.dense_model("gpt2")
    model.transformer.save_pretrained(base)  # names without the prefix, as on the Hub
    tiny.tokenizer().save_pretrained(base)
    adapter = save_adapter(tmp_path / "adapter", base, "moslora", target_modules=["c_attn", "c_proj"])
    assert "h.0.attn.c_attn.weight" in Checkpoint(base)
    for form in ("dense", "tied"):
        export(str(adapter), str(tmp_path / form), form=form, verify=False)
        wanted = logits_of(adapter)
        assert (logits_of(tmp_path / form) - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert set(Checkpoint(tmp_path / "dense")) == set(Checkpoint(base))


def test_a_fold_of_half_precision_is_proved_against_what_was_written(bases, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", bases("llama", torch.bfloat16), "moslora")
    result = export(str(adapter), str(tmp_path / "out"), form="dense")
    assert result["verified"]["reloaded_without_modmoe"] and result["dtype"] == "bfloat16"
    assert result["verified"]["by_dtype"]["float32"]["max_abs_logit_diff"] <= 1e-3


def test_mean_weights_count_no_padding(bases, tmp_path):
    model = load(save_adapter(tmp_path / "adapter", bases("llama"), "molora"), device="cpu").get_base_model()
    ids_BT, mask_BT = tiny.token_ids(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask_BT[1, 4:] = 0
    found = mean_weights(model, [Batch(ids_BT, mask_BT)])
    sums: dict[str, torch.Tensor] = {}
    for ids_T in (ids_BT[0], ids_BT[1, :4]):  # row by row there is nothing to pad
        with torch.no_grad():
            model(ids_T[None])
        for route in adapted.context(model).run.routes:
            for weights_E in route.weights_TE:
                sums[route.site] = sums.get(route.site, 0) + weights_E / 11
    assert found.keys() == sums.keys() and len(found) > 3
    for site, weights_E in found.items():
        assert torch.allclose(weights_E, sums[site], atol=1e-6)


def test_an_approximate_fold_is_asked_for_and_measured(bases, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", bases("llama"), "comol", scale=0.05)
    tasks = tiny.write_tasks(tmp_path / "tasks")
    options = {"form": "dense", "verify": False}
    with pytest.raises(ExportError, match="--approximate"):
        export(str(adapter), str(tmp_path / "out"), **options)
    with pytest.raises(ExportError, match="add --task"):
        export(str(adapter), str(tmp_path / "out"), approximate=True, **options)
    result = export(str(adapter), str(tmp_path / "out"), approximate=True, tasks={"words": tasks["words"]}, **options)
    folding, words = result["folding"], result["tasks"]["words"]
    assert folding["kind"] == "approximate" and 0 < folding["mean_abs_logit_diff"] < folding["max_abs_logit_diff"]
    assert words["before"] != words["after"] and abs(words["before"] - words["after"]) < 1 and words["tokens"] > 100
    assert "approximate" in result["warnings"][0] and "words" in (tmp_path / "out" / "README.md").read_text()
    wanted = logits_of(adapter)
    moved = (logits_of(tmp_path / "out") - wanted).abs().mean()
    assert 0 < moved < 0.5 * (logits_of(bases("llama")) - wanted).abs().mean(), "nearer than the base model alone"


def test_several_perft_adapters_become_one(bases, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", bases("olmoe"), "perft_d", num_experts=3, r=2, expert="parallel")
    wanted = logits_of(adapter)
    result = export(str(adapter), str(tmp_path / "one"), form="adapter", verify=False)
    assert result["folding"] == {"kind": "exact", "into": "perft_s"} and result["target"] == "MODMOE_PERFT_S"
    config = json.loads((tmp_path / "one" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"]) == ("MODMOE_PERFT_S", 6)
    assert config["base_model_name_or_path"] == str(bases("olmoe"))
    assert (logits_of(tmp_path / "one") - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    with pytest.raises(ExportError, match="only a perft_d"):
        fold_to_single(load(tmp_path / "one", device="cpu"))


@pytest.mark.parametrize("target", ["auto", "mixtral"])
def test_mixlora_becomes_a_native_moe(bases, tmp_path, target):
    adapter = save_adapter(tmp_path / "adapter", bases("llama"), "mixlora")
    result = export(str(adapter), str(tmp_path / "out"), form="native", target=target, verify=target == "mixtral")
    assert result["target"] == "mixtral" and inspect(str(tmp_path / "out"))["num_experts"] == 3
    wanted = logits_of(adapter)
    assert (logits_of(tmp_path / "out") - wanted).abs().max() <= 1e-4 * wanted.abs().max()


def test_layers_that_were_trained_whole_go_where_they_belong(bases, tmp_path):
    adapter = save_adapter(tmp_path / "adapter", bases("llama"), "moslora", modules_to_save=["norm"])
    weights = load_file(adapter / "adapter_model.safetensors")
    weights["base_model.model.model.norm.weight"] *= 1.5
    save_file(weights, adapter / "adapter_model.safetensors")
    wanted = logits_of(adapter)
    for form in ("tied", "dense"):
        export(str(adapter), str(tmp_path / form), form=form, verify=False)
        assert float(Checkpoint(tmp_path / form)["model.norm.weight"].max()) == 1.5
        assert (logits_of(tmp_path / form) - wanted).abs().max() <= 1e-4 * wanted.abs().max()


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("comol", {"form": "native"}, "only mixlora does"),
        ("comol", {"form": "tied", "expert": "a"}, "for converted models"),
        ("comol", {"form": "tied", "approximate": True}, "dense form only"),
        ("comol", {"form": "dense", "tasks": {"a": "a.txt"}}, "goes with tasks"),
        ("comol", {"form": "adapter", "dtype": "bfloat16"}, "leave --dtype out"),
        ("comol", {"form": "packed"}, "for converted models"),
        ("perft_r", {"form": "dense"}, "no linear map"),
        ("mixlora", {"form": "dense"}, "no linear map"),
    ],
)
def test_what_an_adapter_cannot_become_is_said_in_one_line(bases, tmp_path, method, options, said):
    adapter = save_adapter(tmp_path / "adapter", bases("llama"), method)
    with pytest.raises(ModmoeError) as caught:
        export(str(adapter), str(tmp_path / "out"), **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_bases_and_sources_that_a_form_cannot_hold_are_refused(bases, tmp_path):
    tied = write_tied(tmp_path, "mistral")
    adapter = save_adapter(tmp_path / "adapter", tied, "comol", target_modules=["q_proj"])
    with pytest.raises(ExportError, match="only --form adapter"):
        export(str(adapter), str(tmp_path / "out"), form="tied")
    plain = save_adapter(tmp_path / "plain", save_base(tmp_path / "base", "llama"), "comol")
    export(str(plain), str(tmp_path / "whole"), form="tied", verify=False)
    with pytest.raises(ExportError, match="is an export already"):
        export(str(tmp_path / "whole"), str(tmp_path / "out"), form="tied")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    own = {"model_type": "own", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    for values, said in ((own, "files of its own"), ({"quantization_config": {"bits": 4}}, "quantization_config")):
        (tmp_path / "base" / "config.json").write_text(json.dumps({**config, **values}))
        with pytest.raises(ModmoeError, match=said):
            export(str(plain), str(tmp_path / "out"), form="tied")
    assert not (tmp_path / "out").exists()
