"""What a user gets wrong: one line that names the place and the remedy, exit 2, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modmoe.cli.main import run
from modmoe.storage.checkpoint import INDEX
from tests.support.tiny import save_dense, write_tasks


@pytest.fixture
def work(tmp_path):
    save_dense(tmp_path / "dense")
    write_tasks(tmp_path / "tasks")
    return tmp_path


def edit_config(work: Path, **changes) -> None:
    path = work / "dense" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def weights(work: Path) -> Path:
    return work / "dense" / "model.safetensors"


def truncate(work):
    weights(work).write_bytes(weights(work).read_bytes()[:-1000])


def missing_shard(work):
    names = list(load_file(weights(work)))
    (work / "dense" / INDEX).write_text(
        json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")})
    )


def outside(work):
    names = list(load_file(weights(work)))
    (work / "dense" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "../dense/model.safetensors")}))


def not_finite(work):
    tensors = load_file(weights(work))
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = torch.nan
    save_file(tensors, weights(work), metadata={"format": "pt"})


def pickle(work):
    weights(work).unlink()
    (work / "dense" / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def unknown_family(work):
    edit_config(work, model_type="lama")


def wrong_width(work):
    edit_config(work, intermediate_size=64)


def own_code(work):
    edit_config(work, model_type="mine", auto_map={"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M"})


def empty_task(work):
    (work / "tasks" / "sums.jsonl").write_text("")


def no_task_file(work):
    (work / "tasks" / "sums.jsonl").unlink()


def wrong_columns(work):
    (work / "tasks" / "sums.jsonl").write_text('{"question": "1+1"}\n')


def broken_json(work):
    (work / "tasks" / "sums.jsonl").write_text('{"text": "good"}\n{"text": \n')


def used_output(work):
    (work / "out").mkdir()
    (work / "out" / "precious").write_text("mine")


def no_tokenizer(work):
    for file in (work / "dense").glob("tokenizer*"):
        file.unlink()


CASES = [
    (truncate, [], "model.safetensors: damaged or cut short"),
    (missing_shard, [], "model-00001-of-00002.safetensors: the shard is missing"),
    (outside, [], "not a plain file name in the directory"),
    (not_finite, [], "'model.layers.1.mlp.up_proj.weight' has values that are not finite"),
    (pickle, [], "holds pickled weights only"),
    (
        unknown_family,
        [],
        "'lama' is not a dense family known here (gemma2, gemma3_text, gpt2, gpt_neox, granite,",
    ),
    (wrong_width, [], "implies [64, 32] for 'model.layers.0.mlp.gate_proj.weight', which has shape [48, 32]"),
    (own_code, [], "Describe where its FFNs lie under `family:` in a recipe"),
    (empty_task, [], "sums.jsonl"),
    (no_task_file, [], "sums.jsonl"),
    (wrong_columns, [], "question"),
    (broken_json, [], "sums.jsonl"),
    (used_output, [], "is not empty"),
    (no_tokenizer, [], "no usable tokenizer"),
    (None, ["--num-modules", "7"], "7 does not divide 48"),
    (None, ["--modules-per-expert", "9"], "9 is more than the 8 modules"),
    (None, ["--shared-modules", "5"], "5 is more than the 4 modules of an expert"),
    (None, ["--num-experts", "5"], "5 experts for 3 tasks"),
    (None, ["--top-k", "4"], "4 is more than the 3 experts"),
    (None, ["--routing", "tokn"], "Did you mean 'token'?"),
    (None, ["--partition", "kmean"], "Did you mean 'kmeans'?"),
    (None, ["--score", "wand"], "Did you mean 'wanda'?"),
    (None, ["--method", "modula"], "Did you mean 'modular'?"),
    (None, ["--active-fraction", "1.5"], "1.5 is not above 0 and at most 1"),
    (None, ["--num-modules", "0"], "0 is not above 0"),
    (None, ["--task", "more"], "NAME=FILE"),
    (None, ["--no-such-flag"], "--no-such-flag"),
    (None, ["--device", "tpu"], "tpu"),
]


@pytest.mark.parametrize(
    ("spoil", "flags", "said"), CASES, ids=[c[0].__name__ if c[0] else " ".join(c[1]) for c in CASES]
)
def test_convert_says_what_to_mend(work, capsys, spoil, flags, said):
    if spoil is not None:
        spoil(work)
    before = sorted(path.name for path in work.rglob("*"))
    tasks = [word for name in ("sums", "words", "code") for word in ("--task", f"{name}={work}/tasks/{name}.jsonl")]
    command = ["convert", str(work / "dense"), str(work / "out"), *tasks, "--tokens", "200", "-q"]
    if "--num-modules" not in flags:
        command += ["--num-modules", "8"]
    assert run([*command, *flags]) == 2
    printed = capsys.readouterr()
    lines = [line for line in printed.err.splitlines() if line.startswith("modmoe: ")]
    assert len(printed.err.strip().splitlines()) == len(lines) == 1, printed.err
    assert said in lines[0]
    assert printed.out == ""
    assert sorted(path.name for path in work.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("partition:\n  num_module: 8\n", "partition.num_module: no such key. Did you mean 'num_modules'?"),
        ("roter: {}\n", "roter: no such key"),
        ("seed: yes\n", "seed: True is not a whole number"),
        ("finetune:\n  learning_rate: fast\n", "finetune.learning_rate: 'fast' is not a number"),
        ("roter:\n", "roter: no such key"),
        ("partition:\n  num_module:\n", "partition.num_module: no such key"),
        ("router: token\n", "router: 'token' is not a mapping of keys"),
        ("- a\n", "a recipe is a mapping of keys, not a list"),
        ("a: [\n", "not valid YAML"),
        ("family:\n  gat: x\n", "family.gat: no such field. Did you mean 'gate'?"),
    ],
)
def test_recipes_say_what_to_mend(work, capsys, text, said):
    recipe = work / "r.yaml"
    recipe.write_text(
        text + f"tasks:\n  words: {work}/tasks/words.jsonl\n" if not text.startswith(("-", "a")) else text
    )
    assert run(["convert", str(work / "dense"), str(work / "out"), "-c", str(recipe)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert said in lines[-1]
    assert not (work / "out").exists()


def test_own_code_is_not_executed_unasked(work, capsys):
    own_code(work)
    (work / "dense" / "m.py").write_text(f"open({str(work / 'executed')!r}, 'w')")
    recipe = work / "r.yaml"
    recipe.write_text(f"family:\n  gate: mlp.gate_proj\ntasks:\n  words: {work}/tasks/words.jsonl\n")
    assert run(["convert", str(work / "dense"), str(work / "out"), "-c", str(recipe)]) == 2
    assert "read them, then pass --trust-remote-code" in capsys.readouterr().err
    assert not (work / "executed").exists()


def test_code_beside_a_known_architecture_is_never_executed(work):
    """A Llama that names Python files of its own is read as the Llama that transformers knows, in every step."""
    entries = {"AutoConfig": "m.C", "AutoModelForCausalLM": "m.M", "AutoTokenizer": ["m.T", None]}
    edit_config(work, auto_map=entries)
    (work / "dense" / "m.py").write_text(f"open({str(work / 'executed')!r}, 'w')")
    tasks = ["--task", f"words={work}/tasks/words.jsonl", "--task", f"code={work}/tasks/code.jsonl"]
    command = ["convert", str(work / "dense"), str(work / "out"), *tasks, "--num-modules", "8", "--tokens", "200", "-q"]
    assert run(command) == 0
    assert run(["export", str(work / "out"), str(work / "moe"), "--form", "dense", "--expert", "words", "-q"]) == 0
    assert not (work / "executed").exists()


def test_a_recipe_reads_1e_minus_4_as_a_number(work, capsys):
    recipe = work / "r.yaml"
    recipe.write_text("finetune:\n  learning_rate: 1e-4\n")
    assert run(["validate", str(recipe)]) == 0
