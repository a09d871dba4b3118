"""Pushing: whole checkpoints only, nothing that is not asked for, and no token in any message."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

from modmoe.checkpoint import MANIFEST, CheckpointWriter
from modmoe.errors import ExportError
from modmoe.export import hub

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
    """Stands for the Hub's client and notes what it is asked."""

    calls: list = []  # noqa: RUF012
    error: Exception | None = None

    def __init__(self, **_):
        pass

    def create_repo(self, repo, **options):
        if Api.error is not None:
            raise Api.error
        Api.calls.append(("create_repo", repo, options))
        return type("Url", (str,), {"repo_id": repo})(f"https://hub/{repo}")

    def create_branch(self, repo, **options):
        Api.calls.append(("create_branch", repo, options))

    def upload_folder(self, **options):
        Api.calls.append(("upload_folder", options["repo_id"], options))
        return type("Commit", (), {"oid": "abc", "pr_url": "pr/1" if options["create_pr"] else None})


@pytest.fixture
def api(monkeypatch):
    monkeypatch.setattr(hub, "HfApi", Api)
    monkeypatch.setattr(Api, "calls", [])
    monkeypatch.setattr(Api, "error", None)
    return Api


def test_a_dry_run_lists_what_would_go_and_asks_nobody(whole, api):
    result = hub.push(str(whole), "me/moe", dry_run=True)
    assert api.calls == []
    names = [file["path"] for file in result["files"]]
    shards = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    expected = ["LICENSE", "README.md", "config.json", *shards, "model.safetensors.index.json", MANIFEST]
    assert names == sorted([*expected, "tokenizer[1].json"])
    for file in result["files"]:
        data = (whole / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert result["bytes"] == sum(file["bytes"] for file in result["files"])
    assert result["card"].startswith("---\nlibrary_name")
    assert TOKEN not in json.dumps(result)


def test_a_push_makes_the_repository_and_sends_the_files_listed(whole, api):
    result = hub.push(str(whole), "me/moe", private=True, revision="v1")
    (_, _, made), (_, _, branch), (_, _, sent) = api.calls
    assert made == {"private": True, "exist_ok": True}
    assert branch == {"branch": "v1", "exist_ok": True}
    assert sent["revision"] == "v1" and not sent["create_pr"]
    assert "tokenizer[[]1].json" in sent["allow_patterns"] and len(sent["allow_patterns"]) == len(result["files"])
    assert (result["url"], result["commit"], result["pull_request"]) == ("https://hub/me/moe", "abc", None)
    api.calls.clear()
    assert hub.push(str(whole), "me/moe", create_pr=True, revision="v1")["pull_request"] == "pr/1"
    assert [name for name, *_ in api.calls] == ["create_repo", "upload_folder"]


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
        (HfHubHTTPError(f"500 for Bearer {TOKEN}\n{TOKEN}", response=Response(500)), "refused or could not be reached"),
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


def test_paths_of_this_machine_are_pointed_out(whole):
    (whole / "modmoe.yaml").write_text("source: me/model\ntasks:\n  sums: sums.jsonl\n")
    assert hub.push(str(whole), "me/moe", dry_run=True)["warnings"] == []
    (whole / "modmoe.yaml").write_text("source: me/model\ntasks:\n  sums: /home/me/sums.jsonl\n")
    (whole / "README.md").unlink()
    missing, named = hub.push(str(whole), "me/moe", dry_run=True)["warnings"]
    assert "README.md" in missing and "/home/me/sums.jsonl" in named
