"""Files from strangers: bounds, names that stand twice, and links that lead out of a directory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modmoe.analysis.text import rows
from modmoe.errors import CalibrationError, CheckpointError, ModmoeError, RecipeError
from modmoe.models.loading import load, skeleton
from modmoe.recipe.schema import load_recipe
from modmoe.storage.checkpoint import INDEX, Checkpoint, copy_companions, write_json
from modmoe.storage.documents import YamlError, check_task_file, local_directory, open_tensors, parse_yaml, read_object
from modmoe.training.evaluation.task_loss import evaluate
from tests.support.tiny import save_dense


@pytest.fixture
def dense(tmp_path):
    return save_dense(tmp_path / "dense", num_hidden_layers=1)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_name_twice(tmp_path):
    entry = '{"dtype":"U8","shape":[1],"data_offsets":[0,1]}'
    other = entry.replace("[0,1]", "[1,2]")
    # safetensors itself takes the second, as if the first were not there
    for number, (name, second, data) in enumerate((("b", other, b"xy"), ("a", entry, b"x"))):
        header = f'{{"a":{entry},"{name}":{second}}}'.encode()
        path = tmp_path / f"{number}.safetensors"
        path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert set(open_tensors(tmp_path / "0.safetensors").keys()) == {"a", "b"}
    with pytest.raises(CheckpointError, match="'a' is there twice"):
        open_tensors(tmp_path / "1.safetensors")
    (tmp_path / "x.json").write_text('{"a": 1, "b": {"c": 1, "c": 2}}')
    with pytest.raises(CheckpointError, match="'c' is there twice"):
        read_object(tmp_path / "x.json")


def test_links_of_the_hubs_cache_and_within_a_directory_are_followed(tmp_path, dense):
    cache = tmp_path / "models--me--it"
    (cache / "blobs").mkdir(parents=True)
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(dense.iterdir())):
        file.rename(cache / "blobs" / f"{number}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", str(number)))
    assert len(load(snapshot).state_dict()) > 1
    (tmp_path / "named").symlink_to(snapshot)
    assert len(Checkpoint(tmp_path / "named")) > 1
    out = tmp_path / "out"
    out.mkdir()
    copy_companions(snapshot, out)
    assert not (out / "tokenizer.json").is_symlink() and (out / "tokenizer.json").stat().st_size > 0
    inside = save_dense(tmp_path / "inside", num_hidden_layers=1)
    (inside / "model.safetensors").rename(inside / "weights")
    (inside / "model.safetensors").symlink_to("weights")
    assert len(Checkpoint(inside)) > 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "LICENSE", "extra.py"])
def test_links_out_of_a_directory_are_refused(tmp_path, dense, name):
    secret = tmp_path / "secret"
    secret.write_bytes((dense / name).read_bytes() if (dense / name).exists() else b"mine")
    (dense / name).unlink(missing_ok=True)
    (dense / name).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"is a link to .*secret, outside of the checkpoint"):
        Checkpoint(dense)
    # a cache whose blobs lie elsewhere is none
    (tmp_path / "blobs").symlink_to("/")
    (tmp_path / "snapshots").mkdir()
    dense.rename(tmp_path / "snapshots" / "0123")
    with pytest.raises(CheckpointError, match="outside of the checkpoint"):
        Checkpoint(tmp_path / "snapshots" / "0123")
    if name == "LICENSE":
        (tmp_path / "out").mkdir()
        with pytest.raises(CheckpointError, match="outside of the checkpoint"):
            copy_companions(tmp_path / "snapshots" / "0123", tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())


def test_weights_that_are_not_those_of_the_configuration_are_refused(dense):
    path = dense / "model.safetensors"
    tensors = load_file(path)
    left = {name: tensor for name, tensor in tensors.items() if "up_proj.weight" not in name}
    save_file(left, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.up_proj.weight' is missing, of 1 tensors"):
        load(dense)
    save_file(tensors, path, metadata={"format": "pt"})
    load(dense)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 2**40}, "one of the two is of another model"),
        ({"vocab_size": 2**40}, "one of the two is of another model"),
        ({"intermediate_size": 2**62}, "transformers cannot build a model"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers: is 1099511627776, and there are 14 tensors"),
        ({"num_attention_heads": 0}, "transformers cannot read it"),
        ({"hidden_size": -8}, "transformers cannot build a model"),
        ({"pad_token_id": 10**6}, "transformers cannot build a model"),
        ({"hidden_act": "x\n\x1b[31my"}, "transformers cannot build a model"),
        ({"quantization_config": 7}, "quantization_config: says 7"),
        ({"rope_parameters": []}, "transformers cannot"),
        ({"rope_scaling": {"rope_type": "dynamite"}}, r"does not know rope_scaling.rope_type 'dynamite'"),
        ({"dtype": "float99"}, "does not know dtype 'float99'"),
        ({"attention_bias": 10**400}, r"attention_bias: is 10{23}\.\.\., too large for any number of a model"),
        ({"num_labels": 10**9}, "num_labels: is 1000000000, and no model has more than 100,000"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps: is NaN"),
        ({"rope_parameters": {"rope_theta": float("nan"), "rope_type": "default"}}, "rope_theta: is NaN"),
        ({"_attn_implementation": "evil/kernel"}, "_attn_implementation: names code of the Hub, 'evil/kernel'"),
        ({"attn_implementation": {"": "evil/kernel:x"}}, "names code of the Hub"),
        ({"_experts_implementation": "evil/kernel"}, "names code of the Hub"),
        ({"transformers_weights": "other.safetensors"}, "transformers_weights names a file of its own"),
    ],
)
def test_sizes_are_checked_before_they_are_made(dense, changes, said):
    edit_config(dense, **changes)
    with pytest.raises(CheckpointError, match=said) as caught:
        load(dense)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("changes", [{"return_dict": False}, {"output_hidden_states": True}])
def test_the_form_of_outputs_is_not_the_files_to_say(dense, changes, tmp_path):
    (tmp_path / "t.txt").write_text("some words of a text that is read\n" * 9)
    expected = evaluate(dense, {"t": str(tmp_path / "t.txt")})["tasks"]["t"]["loss"]
    edit_config(dense, **changes)
    assert evaluate(dense, {"t": str(tmp_path / "t.txt")})["tasks"]["t"]["loss"] == expected
    assert load(dense).config.return_dict


def test_a_loss_that_is_no_number_names_the_model(dense, tmp_path):
    weights = load_file(dense / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "t.txt").write_text("some words\n")
    with pytest.raises(CheckpointError, match=rf"^{dense}: task t: the model's loss is nan.* modmoe doctor"):
        evaluate(dense, {"t": str(tmp_path / "t.txt")})


@pytest.mark.parametrize(
    "name",
    ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.bias", "lm_head.weight"],
)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64])
def test_weights_that_are_no_floating_point_numbers(dense, name, dtype):
    weights = load_file(dense / "model.safetensors")
    name = name if name in weights else "model.embed_tokens.weight"
    weights[name] = weights[name].to(dtype)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"'{name}': has type .* is quantized"):
        load(dense)


def test_a_configuration_alone_is_enough_for_a_skeleton(dense):
    (dense / "model.safetensors").unlink()
    assert all(parameter.is_meta for parameter in skeleton(dense).parameters())
    edit_config(dense, num_hidden_layers=10**7)
    with pytest.raises(CheckpointError, match="num_hidden_layers: is 10000000"):
        skeleton(dense)


def test_two_sets_of_weights(dense):
    names = list(load_file(dense / "model.safetensors"))
    save_file(load_file(dense / "model.safetensors"), dense / "other.safetensors")
    (dense / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "other.safetensors")}))
    with pytest.raises(CheckpointError, match="programs differ in which they read"):
        Checkpoint(dense)
    (dense / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, "model.safetensors")}))
    assert len(Checkpoint(dense)) == len(names)
    (dense / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names[1:], "model.safetensors")}))
    with pytest.raises(CheckpointError, match=f"does not name '{names[0]}', which is in model.safetensors"):
        Checkpoint(dense)
    (dense / INDEX).unlink()
    (dense / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(dense)}))
    with pytest.raises(CheckpointError, match=r"holds a model and adapter_config\.json"):
        load(dense)


def test_aliases_that_stay_small_are_read(tmp_path):
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: [*a, *a]\n") == {
        "a": {"x": 1},
        "b": {"x": 1, "y": 2},
        "c": [{"x": 1}] * 2,
    }
    deep = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 200))
    with pytest.raises(YamlError, match="nested more than"):
        parse_yaml(deep)
    plain = parse_yaml("[12, -3, 0, 1e-5, 1.5e3, .5, 2., .inf]")
    assert plain == [12, -3, 0, 1e-5, 1.5e3, 0.5, 2.0, float("inf")]
    # what YAML 1.1 would make other numbers of
    assert parse_yaml("[010, 1:30, 1:30.5, 0x10, 1_000]") == ["010", "1:30", "1:30.5", "0x10", 1000]
    path = tmp_path / "r.yaml"
    path.write_text("seed: 1:30\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: seed"):
        load_recipe(path)
    path.write_text("seed: -1\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: seed: -1 is not between 0 and"):
        load_recipe(path)


def test_lines_and_files_that_would_fill_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_MOST_LINE_BYTES", 100)
    monkeypatch.setattr(rows, "_MOST_JSON_BYTES", 100)
    path = tmp_path / "t.jsonl"
    path.write_text(f'{{"text": "a"}}\n{{"text": "{"x" * 100}"}}\n')
    with pytest.raises(CalibrationError, match=r"t\.jsonl:2: the line has over 100 bytes; cut"):
        rows.read_rows("t", str(path))
    assert list(rows.read_rows("t", str(path), 1)) == [{"text": "a"}]
    path.rename(tmp_path / "t.json")
    with pytest.raises(CalibrationError, match=r"t\.json: has 127 bytes, over 100"):
        rows.read_rows("t", str(tmp_path / "t.json"))


@pytest.mark.parametrize("repeated", [True, False])
def test_parquet_that_holds_far_more_than_its_size(tmp_path, monkeypatch, repeated):
    import pyarrow
    from pyarrow import parquet

    texts = ["x" * 100_000] * 300 if repeated else [f"{i:03}" + " " * 100_000 for i in range(300)]
    path = tmp_path / "t.parquet"
    parquet.write_table(pyarrow.table({"text": texts}), path, compression="zstd", use_dictionary=repeated)
    assert path.stat().st_size < 100_000
    assert len(rows.read_rows("t", str(path))) == 300
    monkeypatch.setattr(rows, "_FREE_GROWTH_BYTES", 1 << 20)
    with pytest.raises(CalibrationError, match="holds over 100 times its"):
        rows.read_rows("t", str(path))


def test_nothing_is_left_on_the_meta_device(dense):
    """The model that is only measured is another than the one that is loaded."""
    assert not any(tensor.is_meta for tensor in load(dense, dtype=torch.float64).state_dict().values())


@pytest.mark.parametrize("name", ["A" * 5000, "a/" * 3000, "x\0y", "\ud800"])
def test_a_name_that_no_file_can_have_is_not_there(tmp_path: Path, name: str) -> None:
    """Such names stand in strangers' configurations, and on command lines where a variable was empty."""
    from modmoe import api
    from modmoe.diagnosis.doctor import doctor
    from modmoe.exports.hub import push
    from modmoe.storage.checkpoint import local_base

    for act in (
        lambda: local_directory(name),
        lambda: check_task_file("a", f"{name}.jsonl"),
        lambda: api.inspect(name),
        lambda: doctor(name),
        lambda: push(name, "me/x", dry_run=True),
        lambda: api.export(name, tmp_path / "out"),
        lambda: api.evaluate(name, {"a": "b.txt"}),
    ):
        with pytest.raises(ModmoeError):
            act()
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": name}))
    if name == "\ud800":
        with pytest.raises(ModmoeError, match="surrogates not allowed"):
            local_base(tmp_path)
    else:
        assert local_base(tmp_path) is None


def test_what_utf8_cannot_hold_is_written_by_its_number(tmp_path: Path) -> None:
    for value in ({"a": "\ud800"}, {"\udfff": 1}, {"a": "ü😀"}):
        write_json(tmp_path / "x.json", value)
        assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == value
