"""Pushing: whole checkpoints only, nothing that is not asked for, and no token in any message."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
import yaml
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from modmoe.errors import ExportError
from modmoe.exports import hub
from modmoe.formats.pushed_files import contents
from modmoe.storage.checkpoint import MANIFEST, CheckpointWriter

TOKEN = "hf_abcdefghijklmnop"


@pytest.fixture
def whole(tmp_path):
    """A whole checkpoint with things beside it that are nobody's business."""
    directory = tmp_path / "out"
    directory.mkdir()
    writer = CheckpointWriter(directory, max_shard_bytes=64)
    for number in range(3):
        writer.write(f"weight{number}", torch.arange(12.0) + number)
    writer.finish({"model_type": "llama"})
    (directory / "README.md").write_text("---\nlibrary_name: transformers\n---\n\n# A model\n")
    (directory / "LICENSE").write_text("free")
    (directory / "tokenizer[1].json").write_text("{}")
    for name in (".env", "optimizer.pt", "notes.log"):
        (directory / name).write_text(TOKEN)
    (directory / "checkpoint-5").mkdir()
    (directory / "checkpoint-5" / "model.safetensors").write_bytes(b"")
    return directory


class Api:
    """Stands for the Hub's client where it fails at once."""

    error: Exception | None = None

    def __init__(self, **_):
        pass

    def model_info(self, repo):
        raise Api.error

    def create_repo(self, repo, **_):
        raise Api.error


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(hub.time, "sleep", lambda _: None)
    monkeypatch.setattr(Api, "error", AssertionError("nobody is to be asked"))
    return Api


def test_a_dry_run_lists_what_would_go_and_asks_nobody(whole, api):
    result = hub.push(str(whole), "me/moe", dry_run=True)
    names = [file["path"] for file in result["files"]]
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    expected = ["LICENSE", "README.md", "config.json", *shards, "model.safetensors.index.json", MANIFEST]
    assert names == sorted(expected)
    why = "no file of a checkpoint's format"
    assert result["left_out"] == [
        {"path": ".env", "why": why},
        {"path": "checkpoint-5", "why": "a folder"},
        *({"path": name, "why": why} for name in ("notes.log", "optimizer.pt", "tokenizer[1].json")),
    ]
    for file in result["files"]:
        data = (whole / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert result["bytes"] == sum(file["bytes"] for file in result["files"])
    assert result["card"].startswith("---\nlibrary_name")
    assert TOKEN not in json.dumps(result)


@pytest.mark.parametrize("repo", ["moe", "a/b/c", "me/mo e", "me/", "../x", "me/-x-", "me/a--b", "me/a..b", "me/é", ""])
def test_names_that_the_hub_would_refuse(whole, repo):
    with pytest.raises(ExportError, match="OWNER/NAME"):
        hub.push(str(whole), repo, dry_run=True)


def test_only_a_whole_checkpoint_is_pushed(whole, tmp_path):
    def refused(match):
        with pytest.raises(ExportError, match=match):
            hub.push(str(whole), "me/moe", dry_run=True)

    partial = whole.rename(tmp_path / "out.partial")
    with pytest.raises(ExportError, match="unfinished"):
        hub.push(str(partial), "me/moe", dry_run=True)
    partial.rename(whole)
    manifest = json.loads((whole / MANIFEST).read_text())
    manifest["tensors"]["weight1"]["sha256"] = "0" * 64
    (whole / MANIFEST).write_text(json.dumps(manifest))
    refused("'weight1' is not what was written")
    del manifest["tensors"]["weight1"]
    (whole / MANIFEST).write_text(json.dumps(manifest))
    refused("not in both")
    for damaged in ("{", "[" * 100_000, '{"tensors": {}, "tensors": {}}'):
        (whole / MANIFEST).write_text(damaged)
        refused("is damaged; export again")
    (whole / MANIFEST).write_text("[]")
    refused("damaged")
    (whole / MANIFEST).unlink()
    hub.push(str(whole), "me/moe", dry_run=True)
    (whole / "model-00002-of-00003.safetensors").unlink()
    refused("shard is missing")
    (whole / "config.json").unlink()
    refused(r"config\.json")
    with pytest.raises(ExportError, match="no such directory"):
        hub.push(str(tmp_path / "nowhere"), "me/moe", dry_run=True)


class Response:
    headers: dict = {}  # noqa: RUF012
    request = None

    def __init__(self, status):
        self.status_code = status


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (HfHubHTTPError(f"401 for Bearer {TOKEN}", response=Response(401)), "hf auth login"),
        (HfHubHTTPError(f"403 for {TOKEN}", response=Response(403)), "may not write"),
        (RepositoryNotFoundError(f"404 {TOKEN}", response=Response(404)), "no such repository"),
        (HfHubHTTPError(f"500 for Bearer {TOKEN}\n{TOKEN}", response=Response(500)), "(500); push again later"),
        (
            HfHubHTTPError(f"400 for Bearer {TOKEN}\n{TOKEN}", response=Response(400)),
            "refuses it (400): 400 for Bearer ***",
        ),
        (HfHubHTTPError("409", response=Response(409)), "push again, or use --create-pr"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (ConnectionError("no route, token other-secret"), "no route"),
        (HTTPError("connection refused"), "connection refused"),
    ],
)
def test_the_hubs_errors_become_one_line_without_a_token(whole, api, monkeypatch, error, said):
    monkeypatch.setattr(hub, "get_token", lambda: "other-secret")
    monkeypatch.setattr(api, "error", error)
    with pytest.raises(ExportError) as caught:
        hub.push(str(whole), "me/moe")
    text = str(caught.value)
    assert said in text and "\n" not in text
    assert TOKEN not in text and "other-secret" not in text
    assert caught.value.__cause__ is None


def test_a_bug_stays_a_bug(whole, api, monkeypatch):
    monkeypatch.setattr(api, "error", KeyError("ours"))
    with pytest.raises(KeyError):
        hub.push(str(whole), "me/moe")


def test_what_is_sent_of_a_recipe_names_no_path_of_this_machine(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "model").mkdir()
    recipe = "\n".join(
        [
            "# torch: 2.13",
            "# command: modmoe convert /home/me/dense",
            "source: there/model",
            "tasks:",
            "  sums: /home/me/sums.jsonl",
            "  words: words/of me.txt",
            "  code: 'C:\\Users\\me\\code.jsonl'",
            "  talk: hub:open/talk:en:train",
            "finetune: {distill_from: ../dense, train: full}",
            "calibration: {tokens: 9}",
            "family: {gate: mlp.w1, up: /home/me/x}",
            "",
        ]
    )
    for name in ("modmoe.yaml", "modmoe.source.yaml"):
        (whole / name).write_text(recipe)
    sent = contents(whole, "me/moe")
    for name in ("modmoe.yaml", "modmoe.source.yaml"):
        assert (whole / name).read_text() == recipe, "the recipe here stays usable"
        text = sent[name].decode()
        assert text.startswith("# torch: 2.13\nsource: model\n")
        values = yaml.safe_load(text)
        tasks = {"sums": "sums.jsonl", "words": "of me.txt", "code": "code.jsonl", "talk": "hub:open/talk:en:train"}
        assert values["tasks"] == tasks
        assert values["finetune"] == {"distill_from": "dense", "train": "full"}
        assert values["family"] == {"gate": "mlp.w1", "up": "x"} and values["calibration"] == {"tokens": 9}
        assert "/home" not in text and "Users" not in text
    (whole / "modmoe.yaml").write_text("source: someone/a-model\n")
    assert contents(whole)["modmoe.yaml"] == b"source: someone/a-model\n", "a Hub id is for everybody"
    (whole / "modmoe.yaml").write_text("a: [")
    with pytest.raises(ExportError, match=r"modmoe\.yaml: cannot be read as YAML"):
        contents(whole)


def test_other_paths_of_this_machine_are_pointed_out(whole):
    assert hub.push(str(whole), "me/moe", dry_run=True)["warnings"] == []
    (whole / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    (whole / "README.md").unlink()
    missing, named = hub.push(str(whole), "me/moe", dry_run=True)["warnings"]
    assert "README.md" in missing and "/home/me/base" in named and "adapter_config.json" in named


def test_a_card_gets_its_name_and_brings_its_pictures(whole):
    for name in ("experts.png", "loss.png"):
        (whole / name).write_bytes(b"PNG")
    (whole / "README.md").write_text('load("PATH_OR_REPO") not PATH_OR_REPOS ![all](experts.png) ![home](../loss.png)')
    sent = contents(whole, "me/moe")
    assert b'load("me/moe") not PATH_OR_REPOS' in sent["README.md"]
    assert "experts.png" in sent and "loss.png" not in sent
    assert contents(whole)["README.md"] == (whole / "README.md").read_bytes()
