"""The doctor names every fault with its place and its remedy, executes nothing, and finds nothing in what is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modmoe
from modmoe.errors import CheckpointError
from modmoe.storage.checkpoint import INDEX, MANIFEST, SINGLE
from modmoe.storage.seal import MARK
from tests.support.planned import write_tied
from tests.support.tiny import save_dense

UP = "model.layers.1.mlp.up_proj.weight"
MEMBERS = "model.layers.0.mlp.membership"
RANKING = "model.layers.1.mlp.ranking"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tied checkpoint, the same in two shards, and the dense one it was made of."""
    home = tmp_path_factory.mktemp("whole")
    dense, tied = write_tied(home, leave_out=True)
    sharded = home / "sharded"
    shutil.copytree(tied, sharded)
    tensors = load_file(sharded / SINGLE)
    (sharded / SINGLE).unlink()
    names = sorted(tensors)
    parts = dict(zip(SHARDS, (names[::2], names[1::2]), strict=True))
    for file, own in parts.items():
        save_file({name: tensors[name] for name in own}, sharded / file, metadata={"format": "pt"})
    write(sharded / INDEX, {"weight_map": {name: file for file, own in parts.items() for name in own}})
    return {"tied": tied, "sharded": sharded, "dense": dense}


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(name: str, **changes: Any) -> Callable[[Path], None]:
    def spoil(directory: Path) -> None:
        write(directory / name, {**read(directory / name), **changes})

    return spoil


def edit_tensors(change: Callable[[dict[str, torch.Tensor]], object], *, keep_sums: bool = True) -> Any:
    """Change the tensors; with ``keep_sums`` the manifest stays, so that it tells, and otherwise it goes."""

    def spoil(directory: Path) -> None:
        tensors = load_file(directory / SINGLE)
        change(tensors)
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
        if not keep_sums:
            (directory / MANIFEST).unlink()

    return spoil


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], object]:
    return lambda tensors: tensors.update({name: make(tensors[name])})


def rename(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.layers.1.mlp.upward.weight"] = tensors.pop(UP)


def nan_at(place: tuple[int, int]) -> Callable[[torch.Tensor], torch.Tensor]:
    def make(tensor: torch.Tensor) -> torch.Tensor:
        tensor[place] = torch.nan
        return tensor

    return make


def flip_a_bit(directory: Path) -> None:
    data = bytearray((directory / SINGLE).read_bytes())
    data[-100] ^= 1
    (directory / SINGLE).write_bytes(data)


def cut(directory: Path) -> None:
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:-1000])


def cut_header(directory: Path) -> None:
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes()[:100])


def lie_in_header(directory: Path) -> None:
    (directory / SINGLE).write_bytes((directory / SINGLE).read_bytes().replace(b'"F32"', b'"X32"', 1))


def remove(name: str) -> Callable[[Path], None]:
    return lambda directory: (directory / name).unlink()


def lose_shard(directory: Path) -> None:
    (directory / SHARDS[1]).unlink()


def index_more(directory: Path) -> None:
    index = read(directory / INDEX)
    index["weight_map"]["model.more.weight"] = SHARDS[0]
    write(directory / INDEX, index)


def index_less(directory: Path) -> None:
    index = read(directory / INDEX)
    index["weight_map"].pop(UP)
    write(directory / INDEX, index)


def index_outside(directory: Path) -> None:
    index = read(directory / INDEX)
    index["weight_map"][UP] = "../model.safetensors"
    write(directory / INDEX, index)


def old_shard(directory: Path) -> None:
    save_file({"a": torch.zeros(2)}, directory / "model-00003-of-00003.safetensors")


def mark_code(directory: Path) -> None:
    with (directory / "modeling_modmoe.py").open("a", encoding="utf-8") as handle:
        handle.write("\nraise SystemExit('executed')\n")


def beside(end: str) -> Callable[[Path], None]:
    def leave(directory: Path) -> None:
        directory.with_name(directory.name + end).mkdir()
        (directory.with_name(directory.name + end) / MARK).touch()

    return leave


def leave_shard(directory: Path) -> None:
    save_file({"a": torch.zeros(2)}, directory / "shard-00000.safetensors")


def no_tokenizer(directory: Path) -> None:
    for file in directory.glob("tokenizer*"):
        file.unlink()


def more_tokens(directory: Path) -> None:
    tokenizer = read(directory / "tokenizer.json")
    last = max(token["id"] for token in tokenizer["added_tokens"])
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [{"id": last + 1 + n, "content": f"<more{n}>", **flags} for n in range(20)]
    write(directory / "tokenizer.json", tokenizer)


def orphan(tensor: torch.Tensor) -> torch.Tensor:
    tensor[:, 3] = False
    return tensor


def one_more(tensor: torch.Tensor) -> torch.Tensor:
    row = tensor[0]
    row[int((~row).nonzero()[0])] = True
    return tensor


def swap(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, 0)


# what is damaged, which checkpoint, what the place ends in, what is said to be wrong, what the remedy has
CASES: list[tuple[str, str, Callable[[Path], object], str, str, str]] = [
    ("bit", "tied", flip_a_bit, "'", "has another SHA-256 than", "fetch it again"),
    ("cut", "tied", cut, SINGLE, "is cut short: it has", "fetch it again"),
    ("cut header", "tied", cut_header, SINGLE, "fewer than its header", "fetch it again"),
    ("type unknown", "tied", lie_in_header, SINGLE, "damaged or cut short", "fetch it again"),
    ("no weights", "tied", remove(SINGLE), "", "no model.safetensors", "fetch the weights too"),
    ("renamed", "tied", edit_tensors(rename), MANIFEST + f": '{UP}'", "in no file", "fetch it again"),
    ("renamed, no sums", "tied", edit_tensors(rename, keep_sums=False), f"config.json: '{UP}'", "in no file", "fetch"),
    ("extra, no sums", "tied", edit_tensors(rename, keep_sums=False), "upward.weight'", "is no tensor of", "restore"),
    ("type", "tied", edit_tensors(put(UP, torch.Tensor.half)), f"'{UP}'", "has dtype float16, and float32", "fetch"),
    (
        "kind, no sums",
        "tied",
        edit_tensors(put(UP, lambda t: t.to(torch.int32)), keep_sums=False),
        f"'{UP}'",
        "the model is quantized",
        "name the unquantized model",
    ),
    ("shape", "tied", edit_tensors(put(UP, lambda t: t[:-1])), f"'{UP}'", "in the manifest", "fetch it again"),
    (
        "shape, no sums",
        "tied",
        edit_tensors(put(UP, lambda t: t[:-1]), keep_sums=False),
        f"'{UP}'",
        "has shape [41, 32], and config.json implies [42, 32]",
        "restore config.json",
    ),
    ("nan", "tied", edit_tensors(put(UP, nan_at((2, 3)))), f"'{UP}'", "not finite", "training diverged"),
    ("missing shard", "sharded", lose_shard, SHARDS[1], "is missing, with", "fetch it"),
    ("index too long", "sharded", index_more, "'model.more.weight'", f"is not in {SHARDS[0]}", "fetch it again"),
    ("index too short", "sharded", index_less, f"'{UP}'", f"is not in {INDEX}", "fetch it again"),
    ("index outside", "sharded", index_outside, f"'{UP}'", "no plain file name", "from where you trust it"),
    ("old shard", "sharded", old_shard, "00003.safetensors", "belongs to no part", "delete it"),
    ("damaged manifest", "tied", lambda d: (d / MANIFEST).write_text("{"), MANIFEST, "cannot be read as JSON", "fetch"),
    ("no config", "tied", remove("config.json"), "config.json", "is missing", "fetch it"),
    ("config cut", "tied", lambda d: (d / "config.json").write_text('{"a": '), "config.json", "as JSON", "fetch it"),
    (
        "width",
        "tied",
        edit_json("config.json", hidden_size=64),
        "'model.norm.weight'",
        "config.json implies [64]",
        "restore",
    ),
    (
        "layers",
        "tied",
        edit_json("config.json", num_hidden_layers=10**9),
        "config.json: num_hidden_layers",
        "is 1000000000, and there are",
        "restore",
    ),
    (
        "experts",
        "tied",
        edit_json("config.json", num_experts=90_000),
        "config.json",
        "000 experts, more than",
        "restore",
    ),
    (
        "very many experts",
        "tied",
        edit_json("config.json", num_experts=10**12),
        "config.json: num_experts",
        "and no model has more than 100,000",
        "restore",
    ),
    ("modules", "tied", edit_json("config.json", num_modules=9), "module_size", "9 modules of 6 neurons", "restore"),
    (
        "top k",
        "tied",
        edit_json("config.json", num_experts_per_tok=4),
        "_per_tok",
        "more than the 3 experts",
        "restore",
    ),
    ("negative", "tied", edit_json("config.json", module_size=-6), "module_size", "is -6, not a whole", "restore"),
    ("names", "tied", edit_json("config.json", expert_names=["a", "b"]), "expert_names", "each of 3", "restore"),
    ("default", "tied", edit_json("config.json", default_expert="maths"), "default_expert", "none of", "restore"),
    ("routing", "tied", edit_json("config.json", routing="tokn"), "routing", "none of token, sequence", "restore"),
    ("stored", "tied", edit_json("config.json", stored_modules=[7]), "stored_modules", "of 1 layers", "restore"),
    ("end token", "tied", edit_json("config.json", eos_token_id=9999), "eos_token_id", "264 rows", "restore"),
    ("type name", "dense", edit_json("config.json", model_type="lama"), "model_type", "knows no 'lama'", "update"),
    ("orphan", "tied", edit_tensors(put(MEMBERS, orphan)), f"'{MEMBERS}'", "no expert has module 3", "convert again"),
    ("uneven", "tied", edit_tensors(put(MEMBERS, one_more)), f"'{MEMBERS}'", "expert 0: 5 modules, where", "convert"),
    ("ranking", "tied", edit_tensors(put(RANKING, lambda t: t + 5)), f"'{RANKING}'", "outside 0 to 6", "convert again"),
    ("ranking of others", "tied", edit_tensors(put(RANKING, swap)), f"'{RANKING}'", "other modules than", "convert"),
    ("code changed", "tied", mark_code, "modeling_modmoe.py", "is not the code that", "read it first"),
    (
        "code elsewhere",
        "tied",
        edit_json("config.json", auto_map={"AutoConfig": "a/b--configuration_modmoe.ModMoELlamaConfig"}),
        "auto_map: AutoConfig",
        "names 'a/b--configuration_modmoe",
        "it is code",
    ),
    ("code gone", "tied", remove("ways_modmoe.py"), "ways_modmoe.py", "is missing", "modmoe export"),
    ("partial", "tied", beside(".partial"), ".partial", "was left by an interrupted run", "delete it"),
    ("state", "tied", beside(".states"), ".states", "was left by interrupted training", "--resume"),
    ("replaced", "tied", beside(".replaced"), ".replaced", "is an older output", "delete it"),
    ("shard of a run", "tied", leave_shard, "shard-00000.safetensors", "was left by", "delete it"),
    ("no tokenizer", "dense", no_tokenizer, "", "has no tokenizer", "copy the tokenizer's files"),
    (
        "tokens",
        "tied",
        more_tokens,
        "tokenizer.json",
        "has id 264, and the embeddings have 264 rows",
        "resize_token_embeddings(279)",
    ),
]


@pytest.mark.parametrize(
    ("kind", "spoil", "place", "wrong", "remedy"), [c[1:] for c in CASES], ids=[c[0] for c in CASES]
)
def test_a_fault_is_named_with_place_and_remedy(
    whole: dict[str, Path], tmp_path: Path, kind: str, spoil: Any, place: str, wrong: str, remedy: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(whole[kind], directory)
    spoil(directory)
    found = modmoe.doctor(directory)
    assert not found["healthy"]
    fitting = [
        f for f in found["faults"] if f["place"].endswith(place) and wrong in f["wrong"] and remedy in f["remedy"]
    ]
    assert len(fitting) == 1, found["faults"]
    assert str(tmp_path) in fitting[0]["place"]


@pytest.mark.parametrize("kind", ["tied", "sharded", "dense"])
def test_what_is_whole_is_healthy(whole: dict[str, Path], kind: str) -> None:
    found = modmoe.doctor(whole[kind])
    assert (found["healthy"], found["faults"]) == (True, [])
    tensors = found["checked"]["tensors"]
    assert tensors == found["checked"]["finite"] > 20
    if kind == "dense":
        assert "no manifest" in found["checked"]["sums"] and any(MANIFEST in note for note in found["notes"])
    else:
        assert found["checked"]["sums"] == tensors and found["notes"] == []
        assert found["checked"]["layers of modules"] == 2 and found["checked"]["code files"] == 7


def test_all_faults_are_named_at_once(whole: dict[str, Path], tmp_path: Path) -> None:
    directory = tmp_path / "model"
    shutil.copytree(whole["tied"], directory)
    edit_tensors(put(UP, nan_at((0, 0))))(directory)
    edit_json("config.json", default_expert="maths")(directory)
    mark_code(directory)
    no_tokenizer(directory)
    beside(".replaced")(tmp_path / "model")
    (tmp_path / "model.states").mkdir()  # has no mark, so it is the user's own
    places = " ".join(fault["place"] for fault in modmoe.doctor(directory)["faults"])
    assert all(part in places for part in (UP, "default_expert", "modeling_modmoe.py", "model.replaced"))
    assert not any("model.states" in place for place in places)
    assert len(modmoe.doctor(directory)["faults"]) == 6  # the NaN is told by its sum too


def test_nothing_is_changed(whole: dict[str, Path]) -> None:
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole["tied"].parent.rglob("*")}
    modmoe.doctor(whole["tied"])
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in whole["tied"].parent.rglob("*")} == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such directory"):
        modmoe.doctor(tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        modmoe.doctor(tmp_path)


def test_a_base_model_saved_alone_is_known_by_its_prefix(tmp_path: Path) -> None:
    save_dense(tmp_path / "gpt2", "gpt2")
    tensors = load_file(tmp_path / "gpt2" / SINGLE)
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    save_file(bare, tmp_path / "gpt2" / SINGLE, metadata={"format": "pt"})
    assert modmoe.doctor(tmp_path / "gpt2")["faults"] == []
