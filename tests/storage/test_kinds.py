"""What a checkpoint is, is told in one line from its headers, by every command and before anything is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import modmoe
from modmoe.cli.main import run
from modmoe.errors import MOST_CHARACTERS, CheckpointError, PlanError
from modmoe.models.families import FAMILIES
from modmoe.models.ffn_layout import check_ffns
from modmoe.models.loading import load, load_tokenizer
from modmoe.storage.checkpoint import INDEX, SINGLE, Checkpoint
from modmoe.storage.kinds.faults import check_source
from modmoe.storage.kinds.names import find_prefix, wrapper_of
from modmoe.storage.staging import open_output
from tests.support import moes, tiny

UP = "model.layers.0.mlp.up_proj.weight"
Spoil = Callable[[Path], object]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("kinds")
    tiny.write_tasks(home / "tasks")
    return tiny.save_dense(home / "dense")


@pytest.fixture
def model(dense: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dense, tmp_path / "model"))


def says(**values: Any) -> Spoil:
    def spoil(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return spoil


def tensors(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Spoil:
    def spoil(directory: Path) -> None:
        made = {name: tensor.contiguous() for name, tensor in change(load_file(directory / SINGLE)).items()}
        save_file(made, directory / SINGLE, metadata={"format": "pt"})

    return spoil


def renamed(change: Callable[[str], str]) -> Spoil:
    return tensors(lambda found: {change(name): tensor for name, tensor in found.items()})


def with_more(*names: str, like: Tensor | None = None) -> Spoil:
    extra = torch.ones(4, 4) if like is None else like
    return tensors(lambda found: {**found, **{name: extra.clone() for name in names}})


def cast(dtype: torch.dtype) -> Spoil:
    return tensors(lambda found: {k: v.to(dtype) if v.dim() == 2 and "proj" in k else v for k, v in found.items()})


def both(*spoils: Spoil) -> Spoil:
    return lambda directory: [spoil(directory) for spoil in spoils]


def layer_more(found: dict[str, Tensor]) -> dict[str, Tensor]:
    more = {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in found.items()}
    return {**more, **found}


def beside(name: str, text: str = '{"bits": 4}') -> Spoil:
    return lambda directory: (directory / name).write_text(text)


def becomes(name: str) -> Spoil:
    return lambda directory: (directory / SINGLE).rename(directory / name)


def without(part: str) -> Spoil:
    return tensors(lambda found: {name: tensor for name, tensor in found.items() if part not in name})


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
LEFT, BACK = "not quantized: it was left behind", "dequantize=True"

QUANTIZED: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("fp8 left", says(quantization_config=FP8), ("quantization_config", "fp8", LEFT)),
    ("hqq left", says(quantization_config={"quant_method": "hqq"}), ("quantization_config", "hqq", LEFT)),
    ("eetq left", says(quantization_config={"quant_method": "eetq"}), ("quantization_config", LEFT)),
    ("unknown left", says(quantization_config={"quant_method": "new"}), ("new", LEFT)),
    ("no mapping", says(quantization_config="int8"), ("quantization_config: says 'int8'", LEFT)),
    ("empty", says(quantization_config={}), ("quantization_config", LEFT)),
    ("nested", says(text_config={"quantization_config": FP8}), ("text_config.quantization_config", LEFT)),
    ("compression", says(compression_config={"quant_method": "compressed-tensors"}), ("compression_config", LEFT)),
    ("mlx", says(quantization={"group_size": 64, "bits": 4}), ("quantization", LEFT)),
    ("beside", beside("quantize_config.json"), ("quantize_config.json", "take that file away")),
    ("modelopt", beside("hf_quant_config.json"), ("hf_quant_config.json", "take that file away")),
    ("fp8", both(says(quantization_config=FP8), cast(torch.float8_e4m3fn)), ("quantization_config", BACK)),
    ("fp8 unsaid", cast(torch.float8_e4m3fn), ("is quantized", "F8_E4M3")),
    ("int8 unsaid", cast(torch.int8), ("is quantized", "I8")),
    ("gptq unsaid", with_more("model.layers.0.mlp.x.qweight"), ("GPTQ", "is quantized")),
    ("nf4 unsaid", with_more(f"{UP}.absmax"), ("bitsandbytes", "dequantize()")),
    ("packed unsaid", with_more("model.layers.0.mlp.x.weight_packed"), ("compressed-tensors", BACK)),
    ("quanto unsaid", with_more(f"{UP}._data"), ("quanto", "is quantized")),
]
NAMES: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("compile", renamed("_orig_mod.{}".format), ("'_orig_mod.'", "torch.compile")),
    ("ddp", renamed("module.{}".format), ("'module.'", "model.module")),
    ("peft", renamed("base_model.model.{}".format), ("'base_model.model.'", "merge_and_unload")),
    ("compile in ddp", renamed("module._orig_mod.{}".format), ("'module._orig_mod.'",)),
    ("in the middle", renamed(lambda n: n.replace("mlp.", "_checkpoint_wrapped_module.mlp.")), ("of 26 tensors",)),
    ("fsdp", renamed(lambda n: n.replace("layers.1.", "layers.1._fsdp_wrapped_module.")), ("FSDP",)),
    ("any prefix", renamed("student.net.{}".format), ("'student.net.' in front",)),
    ("doubled", renamed("model.{}".format), ("'model.' in front", "take 'model.' out")),
    ("lora", with_more("model.layers.0.mlp.up_proj.lora_A.default.weight"), ("not merged", "merge_and_unload")),
    ("base_layer", renamed(lambda n: n.replace("up_proj.", "up_proj.base_layer.")), ("not merged", "base_layer")),
]
MISFITS: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("bias", with_more("model.layers.0.self_attn.q_proj.bias", like=torch.ones(32)), ("attention_bias to true",)),
    ("mlp bias", says(mlp_bias=False), ("mlp_bias to true",)),
    ("layers", tensors(layer_more), ("says 2 layers", "of layers 2 to 2")),
    ("unknown", with_more("model.memory.weight"), ("'model.memory.weight'", "left out")),
    ("missing", without("layers.1.self_attn.q_proj"), ("'model.layers.1.self_attn.q_proj.weight' is missing",)),
    ("head", with_more("lm_head.weight", like=torch.ones(300, 32)), ("'lm_head.weight'", "[300, 32]")),
    ("vocabulary", says(vocab_size=260), ("set vocab_size to 264",)),
    ("no head", says(tie_word_embeddings=False), ("'lm_head.weight' is missing", "tie_word_embeddings")),
    ("other ffn", renamed(lambda n: n.replace("up_proj", "w3")), ("mlp.w3.", "mlp.up_proj.")),
]
FORMS: list[tuple[str, Spoil, tuple[str, ...]]] = [
    ("gguf", becomes("model.gguf"), ("GGUF", "gguf_file='model.gguf'")),
    ("pickle", becomes("pytorch_model.bin"), ("pickled weights only", "save_pretrained")),
    ("meta", becomes("consolidated.00.pth"), ("consolidated.00.pth", "original format")),
    ("mistral", becomes("consolidated.safetensors"), ("original format",)),
    ("mlx", becomes("weights.npz"), ("MLX",)),
    ("tensorflow", becomes("tf_model.h5"), ("from_tf=True",)),
    ("flax", becomes("flax_model.msgpack"), ("from_flax=True",)),
    ("variant", becomes("model.fp16.safetensors"), ("is not called model.safetensors",)),
    ("shard", becomes("model-00001-of-00002.safetensors"), (f"without {INDEX}",)),
    ("pointer", beside(SINGLE, POINTER), (SINGLE, "git lfs pull")),
    ("pointer of a tokenizer", beside("tokenizer.json", POINTER), ("tokenizer.json", "git lfs pull")),
    ("empty", beside(SINGLE, ""), (SINGLE, "is empty")),
    ("page", beside("config.json", "<!DOCTYPE html><html>"), ("config.json", "page of a website")),
]
ALL = [*QUANTIZED, *NAMES, *MISFITS, *FORMS]


COMMANDS = (
    "analyze",
    "dry run",
    "prune",
    "upcycle",
    "adapters",
    "finetune",
    "plan",
    "eval",
    "baseline",
    "teacher",
    "inspect",
    "push",
)


def command(name: str, model: Path, dense: Path) -> list[str]:
    task = ["--task", f"sums={dense.parent / 'tasks' / 'sums.jsonl'}"]
    out, sizes = str(model.parent / "out"), ["--num-modules", "8"]
    words = {
        "analyze": ["analyze", str(model), "-o", out, *task, *sizes],
        "convert": ["convert", str(model), out, *task, *sizes],
        "dry run": ["convert", str(model), out, *task, *sizes, "--dry-run"],
        "prune": ["convert", str(model), out, *task, "--method", "prune", "--dry-run"],
        "upcycle": ["convert", str(model), out, "--method", "upcycle", "--num-experts", "2", "--top-k", "2"],
        "adapters": ["convert", str(model), out, "--method", "adapters", "--adapter", "comol", "--dry-run"],
        "finetune": ["finetune", str(model), out, *task, "--train", "full", "--max-steps", "1"],
        "plan": ["finetune", str(model), out, *task, "--train", "full", "--dry-run"],
        "eval": ["eval", str(model), *task],
        "baseline": ["eval", str(dense), *task, "--baseline", str(model)],
        "teacher": ["finetune", str(dense), out, *task, "--train", "full", "--distill-from", str(model)],
        "inspect": ["inspect", str(model)],
        "push": ["push", str(model), "someone/else", "--dry-run"],
    }[name]
    return [*words, "-q"]


def line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [text for text in capsys.readouterr().err.splitlines() if text.startswith("modmoe: ")]
    assert len(lines) == 1 and len(lines[0]) <= MOST_CHARACTERS + len("modmoe: "), lines
    return lines[0]


@pytest.mark.parametrize(("spoil", "said"), [case[1:] for case in ALL], ids=[case[0] for case in ALL])
def test_it_is_told_in_one_line(
    spoil: Spoil, said: tuple[str, ...], model: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil(model)
    before = sorted(model.parent.rglob("*"))
    assert run(command("convert", model, dense)) == 2
    told = line(capsys)
    assert str(model) in told and all(word in told for word in said), told
    assert sorted(model.parent.rglob("*")) == before


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_tells_it(name: str, model: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both(says(quantization_config=FP8), cast(torch.float8_e4m3fn))(model)
    assert run(command(name, model, dense)) == 2
    assert "is quantized by fp8" in line(capsys)
    assert not (model.parent / "out").exists()


@pytest.mark.parametrize(
    "name", ["analyze", "dry run", "upcycle", "adapters", "finetune", "plan", "eval", "baseline", "teacher"]
)
def test_a_model_with_other_tensors_is_told_before_it_is_loaded(
    name: str, model: Path, dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_more("model.memory.weight")(model)
    monkeypatch.setattr(Checkpoint, "__getitem__", lambda *_: pytest.fail("a weight was read"))
    assert run(command(name, model, dense)) == 2
    assert "'model.memory.weight'" in line(capsys)


@pytest.mark.parametrize(("kind", "spoil"), [case[:2] for case in ALL], ids=[case[0] for case in ALL])
def test_the_doctor_tells_it_too(kind: str, spoil: Spoil, model: Path) -> None:
    spoil(model)
    # transformers takes a prefix twice for once, and what loads is whole
    assert bool(modmoe.doctor(model)["faults"]) == (kind != "doubled")


@pytest.mark.parametrize(
    "spoil",
    [
        says(quantization_config=None),
        with_more("model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.x.weight"),
        renamed(lambda name: name.removeprefix("model.")),
        tensors(lambda found: {**found, "lm_head.weight": found["model.embed_tokens.weight"].clone()}),
    ],
    ids=["null", "harmless", "base model alone", "head twice"],
)
def test_what_is_right_loads(spoil: Spoil, model: Path) -> None:
    before = load(model, device="cpu")(tiny.token_ids()).logits
    spoil(model)
    assert torch.equal(load(model, device="cpu")(tiny.token_ids()).logits, before)


@pytest.mark.parametrize("family", moes.CONFIGS)
def test_other_mixtures_are_known(family: str, tmp_path: Path) -> None:
    moes.moe_model(family).save_pretrained(tmp_path)
    load(tmp_path, device="cpu")


def more_tokens(file: str) -> Spoil:
    def spoil(directory: Path) -> None:
        tokenizer = json.loads((directory / "tokenizer.json").read_text())
        if file == "tokenizer.json":
            tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 264, "content": "<call>"})
        elif file == "vocabulary":
            tokenizer["model"]["vocab"]["<call>"] = 264
        elif file == "added_tokens.json":
            (directory / file).write_text('{"<call>": 264}')
        else:
            settings = json.loads((directory / file).read_text())
            settings["added_tokens_decoder"] = {"264": {"content": "<call>"}}
            (directory / file).write_text(json.dumps(settings))
        (directory / "tokenizer.json").write_text(json.dumps(tokenizer))

    return spoil


@pytest.mark.parametrize("file", ["tokenizer.json", "vocabulary", "added_tokens.json", "tokenizer_config.json"])
@pytest.mark.parametrize("name", ["convert", "finetune", "eval", "baseline"])
def test_a_token_without_a_row_is_told(
    file: str, name: str, model: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more_tokens(file)(model)
    assert run(command(name, model, dense)) == 2
    told = line(capsys)
    assert "'<call>' has id 264" in told and "264 rows" in told and "resize_token_embeddings(265)" in told
    with pytest.raises(CheckpointError, match="<call>"):
        load_tokenizer(model)
    assert run(["inspect", str(model)]) == 0


@pytest.mark.parametrize("key", ["eos_token", "bos_token", "unk_token", "pad_token"])
@pytest.mark.parametrize("token", ["[NEW]", {"content": "[NEW]"}])
def test_a_special_token_that_is_new_to_the_vocabulary_has_no_row(
    key: str, token: Any, model: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, settings = (json.loads((model / file).read_text()) for file in ("tokenizer.json", "tokenizer_config.json"))
    whole["model"]["vocab"]["last"] = 263
    (model / "tokenizer.json").write_text(json.dumps(whole))
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, key: token}))
    for name in ("convert", "finetune", "eval"):
        assert run(command(name, model, dense)) == 2 and "config.json: token '[NEW]' has id 264, " in line(capsys)
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    load_tokenizer(model)


def test_a_token_that_stands_for_an_image_is_none_of_text(model: Path) -> None:
    path = model / "tokenizer.json"
    more_tokens("tokenizer.json")(model)
    path.write_text(path.read_text().replace("<call>", "<image_soft_token>"))
    load_tokenizer(model)


def test_only_commands_that_read_text_want_a_tokenizer(
    model: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in model.glob("*token*"):
        file.unlink()
    for name in ("inspect", "adapters", "plan"):
        assert run(command(name, model, dense)) == 0, capsys.readouterr().err
    capsys.readouterr()
    for name in ("analyze", "dry run", "eval"):
        assert run(command(name, model, dense)) == 2
        assert "no usable tokenizer" in line(capsys)


def test_an_adapter_is_told_from_a_model(model: Path, dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [word for word in command("adapters", dense, dense) if word != "--dry-run"]
    assert run(words) == 0
    adapter = dense.parent / "out"
    capsys.readouterr()
    for name in ("analyze", "dry run", "adapters"):
        assert run([*command(name, adapter, dense)[:2], *command(name, model, dense)[2:]]) == 2
        assert f"is an adapter without its model; name its base model ({dense}" in line(capsys)
    says(quantization_config=FP8)(model)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": str(model)}))
    assert run(["eval", str(adapter), *command("eval", model, dense)[2:]]) == 2
    assert f"{model}/config.json: quantization_config" in line(capsys)


def test_a_folder_of_checkpoints_names_the_last(model: Path) -> None:
    for step in (9, 10):
        shutil.copytree(model, model.parent / "runs" / f"checkpoint-{step}")
    with pytest.raises(CheckpointError, match=r"name .*/runs/checkpoint-10"):
        check_source(model.parent / "runs")
    with pytest.raises(CheckpointError, match="is a GGUF file; name the model"):
        (model / "x.gguf").touch()
        check_source(model / "x.gguf")


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"up": "mlp.fc1"}, "'model.layers.0.mlp.fc1.weight' is missing, where the row of .* has its up projection"),
        ({"layers": "decoder.blocks"}, "layers lie in 'model.layers'"),
        ({"transposed": True}, "set transposed: false under `family:`"),
        ({"gate": "mlp.up_proj"}, "48 rows, gate and up in one, where config.json says 48"),
    ],
    ids=["up", "layers", "order", "fused"],
)
def test_an_ffn_that_lies_elsewhere_is_told(dense: Path, described: dict[str, Any], said: str) -> None:
    row = {name: getattr(FAMILIES["llama"], name) for name in ("gate", "up", "down", "layers", "transposed")}
    family = type(FAMILIES["llama"])(model_type="llama", **{**row, **described})
    with pytest.raises(CheckpointError, match=said):
        check_ffns(Checkpoint(dense), family, 2, tiny.NEURONS)


@pytest.mark.parametrize(
    ("name", "mark"),
    [
        ("module.model._orig_mod.layers.0.w", "module._orig_mod."),
        ("base_model.model._orig_mod.w", "base_model.model._orig_mod."),
        ("model.base_model.w", ""),
        ("model.layers.0.mlp.up_proj.weight", ""),
        ("a._fsdp_wrapped_module.b._fsdp_wrapped_module.w", "_fsdp_wrapped_module."),
    ],
)
def test_marks_of_wrappers(name: str, mark: str) -> None:
    assert wrapper_of(name) == mark


def test_a_prefix_is_found_on_either_side() -> None:
    names = [f"layers.{i}.weight" for i in range(4)]
    assert find_prefix([f"a.b.{name}" for name in names], names) == ("a.b.", "")
    assert find_prefix(names, [f"model.{name}" for name in names]) == ("", "model.")
    assert find_prefix(["other.weight"], names) is None


def test_an_error_names_the_output_and_not_where_it_was_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(PlanError) as caught, open_output(out) as partial:
        raise PlanError(f"{partial / 'x'}: differs")
    assert str(caught.value) == f"{out}/x: differs"
    with pytest.raises(modmoe.ModmoeError) as failed, open_output(out) as partial:
        raise OSError(28, "No space left on device", str(partial / "x"))
    assert ".partial" not in str(failed.value) and str(out) in str(failed.value)
