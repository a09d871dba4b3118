"""Pushing over real HTTP: what arrives, what is downloaded again, and what every fault on the way comes to."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from modmoe.exports.converted import export
from modmoe.models.loading import load
from modmoe.storage.checkpoint import INDEX, Checkpoint
from tests.conftest import REPOSITORY
from tests.support.adapted import adapted_model, base_model
from tests.support.export_models import write_tied
from tests.support.fake_hub import READ_TOKEN, TOKEN, FakeHub
from tests.support.fake_hub_store import Blob
from tests.support.tiny import token_ids

REPO = "me/moe"
LARGE = (".safetensors", ".png")
"""Four shards and a picture."""


class Client:
    """The process that pushes and downloads."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        unset = (
            "HF_HUB_OFFLINE",
            "TRANSFORMERS_OFFLINE",
            "HF_TOKEN",
            "HTTP_PROXY",
            "http_proxy",
            "ALL_PROXY",
            "all_proxy",
        )
        environment = {name: value for name, value in os.environ.items() if name not in unset}
        environment |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        # as the command line has it, before it imports the client
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_VERBOSITY": "error"}
        self.hub, self.home = hub, home
        command = [sys.executable, str(REPOSITORY / "tests" / "support" / "hub_client.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def ask(self, **task):
        print(json.dumps(task), file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer

    def push(self, directory: Path, *options: str, token: str | None = TOKEN, repo: str = REPO, patience_s: float = 60):
        """Push, and see that the token is nowhere but in the headers and that not much time is waited away."""
        arguments = [str(directory), repo, *options]
        answer = self.ask(do="push", arguments=arguments, token=token, patience_s=patience_s)
        for text in (answer["out"], answer["err"]):
            assert TOKEN not in text and "Bearer" not in text and (token or TOKEN) not in text
        assert answer["waited_s"] < 60
        return answer

    def refused(self, directory: Path, *options: str, **more) -> str:
        """Push what does not go through; return the one line that says why."""
        answer = self.push(directory, *options, "--quiet", **more)
        assert answer["code"] == 2 and not answer["out"], answer
        (line,) = answer["err"].splitlines()
        assert line.startswith("modmoe: ") and len(line) < 400
        return line

    def download(self, to: Path, repo: str = REPO, **options) -> Path:
        return Path(self.ask(do="download", repo=repo, to=str(to), token=TOKEN, **options)["path"])


@pytest.fixture(scope="module")
def server():
    with FakeHub() as hub:
        yield hub


@pytest.fixture(scope="module")
def process(server, tmp_path_factory):
    client = Client(server, tmp_path_factory.mktemp("home"))
    yield client
    with client.process:
        client.process.stdin.close()


@pytest.fixture
def hub(server):
    server.reset()
    yield server
    assert server.failures == []


@pytest.fixture
def client(process, hub):
    return process


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied export in several shards, as small as it gets, with what a trainer left beside it."""
    home = tmp_path_factory.mktemp("tied")
    source = write_tied(home, "mistral")
    (source / "modmoe.yaml").write_text("source: /home/someone/dense\ntasks:\n  sums: /home/someone/sums.jsonl\n")
    export(str(source), str(home / "out"), form="tied", max_shard_size="30KB", verify=False)
    (home / "out" / "optimizer.pt").write_bytes(b"\0" * 9)
    (home / "out" / ".env").write_text(TOKEN)
    assert (home / "out" / INDEX).is_file()
    return home / "out"


@pytest.fixture(scope="module")
def native(tied, tmp_path_factory):
    home = tmp_path_factory.mktemp("native")
    export(str(tied), str(home / "out"), form="native", target="mixtral", verify=False)
    return home / "out"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter's export that names its base model as the Hub does."""
    home = tmp_path_factory.mktemp("adapter")
    model = adapted_model("comol", "llama")
    base_model("llama").save_pretrained(home / "base")
    model.peft_config["default"].base_model_name_or_path = str(home / "base")
    model.save_pretrained(home / "adapter")
    export(str(home / "adapter"), str(home / "out"), form="adapter", verify=False)
    config = json.loads((home / "out" / "adapter_config.json").read_text())
    (home / "out" / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "me/base"}))
    return home / "out"


def pushed(client: Client, directory: Path, *options: str, **more) -> dict:
    """Push what goes through and return what the command printed."""
    answer = client.push(directory, "--json", *options, **more)
    assert answer["code"] == 0, answer["err"]
    return json.loads(answer["out"])


def sums(files: dict[str, bytes]) -> dict[str, str]:
    """Return the hashes of a branch's files, without the one that the Hub puts there."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in files.items() if name != ".gitattributes"}


def code_of(card: str) -> str:
    """Return the Python lines of a card."""
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def test_what_a_dry_run_lists_is_what_arrives_and_what_is_downloaded(client, hub, tied, tmp_path):
    listed = pushed(client, tied, "--dry-run")
    assert hub.requests == []
    result = pushed(client, tied)
    assert result["files"] == listed["files"] and result["card"] == listed["card"]
    wanted = {file["path"]: file["sha256"] for file in result["files"]}
    assert sums(hub.repositories[REPO].files()) == wanted
    assert {"README.md", "config.json", "modeling_modmoe.py", "modmoe.yaml", "experts.png", INDEX} <= wanted.keys()
    assert not {"optimizer.pt", ".env"} & wanted.keys()
    assert hub.repositories[REPO].titles == ["initial commit", "Upload with modmoe"]
    assert hub.put_bytes() == sum(file["bytes"] for file in result["files"] if file["path"].endswith(LARGE))
    assert result["commit"] == hub.repositories[REPO].refs["main"] and result["url"] == f"{hub.url}/{REPO}"
    found = client.download(tmp_path / "down", revision="main")
    assert sums({file.name: file.read_bytes() for file in found.iterdir() if file.is_file()}) == wanted
    assert set(Checkpoint(found)) == set(Checkpoint(tied))


@pytest.mark.parametrize("form", ["tied", "native", "adapter"])
def test_the_lines_of_the_card_load_what_was_pushed(client, hub, tied, native, adapter, form, monkeypatch):
    directory = {"tied": tied, "native": native, "adapter": adapter}[form]
    base = adapter.parent / "base"
    if form == "adapter":
        pushed(client, base, repo="me/base")
    result = pushed(client, directory)
    assert sums(hub.repositories[REPO].files()) == {file["path"]: file["sha256"] for file in result["files"]}
    code = code_of(hub.repositories[REPO].files()["README.md"].decode())
    assert len(code.splitlines()) == 3
    ids_BT = token_ids(1, 9) % 64
    monkeypatch.chdir(adapter.parent)
    (adapter.parent / "me").mkdir(exist_ok=True)
    shutil.copytree(base, adapter.parent / "me" / "base", dirs_exist_ok=True)
    wanted = load(directory)
    answer = client.ask(do="use", code=code, ids=ids_BT.tolist())
    torch.testing.assert_close(torch.tensor(answer["logits"]), wanted(ids_BT).logits.detach(), rtol=0, atol=1e-4)
    assert answer["tokens"] or form == "adapter"


def test_a_second_push_sends_nothing(client, hub, tied):
    first = pushed(client, tied)
    hub.requests.clear()
    assert pushed(client, tied)["commit"] == first["commit"]
    assert hub.put_bytes() == 0 and hub.sent("POST", "/commit/") == []


@pytest.mark.parametrize("is_there", [False, True])
def test_a_branch_is_made_if_it_is_not_there(client, hub, tied, is_there):
    repository = hub.create(REPO)
    if is_there:
        repository.refs["v/1"] = repository.refs["main"]
    assert pushed(client, tied, "--revision", "v/1")["revision"] == "v/1"
    assert "model-00001-of-00004.safetensors" in repository.files("v/1")
    assert set(repository.files("main")) == {".gitattributes"}


def test_a_private_repository_stays_so(client, hub, tied):
    pushed(client, tied, "--private")
    assert hub.repositories[REPO].private
    pushed(client, tied)
    assert hub.repositories[REPO].private
    hub.create("me/public")
    assert "is public" in client.refused(tied, "--private", repo="me/public")
    assert set(hub.repositories["me/public"].files()) == {".gitattributes"}


def test_a_pull_request_leaves_the_branch_alone(client, hub, tied):
    repository = hub.create(REPO)
    result = pushed(client, tied, "--create-pr", token=READ_TOKEN)
    assert result["pull_request"] == f"{hub.url}/{REPO}/discussions/1"
    assert set(repository.files("main")) == {".gitattributes"}
    assert sums(repository.files("refs/pr/1")) == {file["path"]: file["sha256"] for file in result["files"]}
    assert "default branch" in client.refused(tied, "--create-pr", "--revision", "v1")


def test_weights_of_an_earlier_push_go(client, hub, tied):
    repository = hub.create(REPO)
    old = ("model-00009-of-00009.safetensors", "model.safetensors", "adapter_config.json", "notes.md", "old.py")
    repository.commit("main", {name: Blob(b"old", False) for name in old}, "old")
    assert pushed(client, tied)["deleted"] == [
        "adapter_config.json",
        "model-00009-of-00009.safetensors",
        "model.safetensors",
    ]
    assert {"notes.md", "old.py"} <= repository.files().keys()
    assert not set(old[:3]) & repository.files().keys()


def test_an_interrupted_upload_goes_on_where_it_stopped(client, hub, tied):
    last = max(tied.glob("model-*.safetensors"))
    oid = hashlib.sha256(last.read_bytes()).hexdigest()
    hub.create(REPO)
    hub.fault("PUT", f"/storage/{oid}", times=99, drop_after=1000)
    assert "push again" in client.refused(tied)
    assert hub.repositories[REPO].titles == ["initial commit"], "nothing is half there"
    assert len(hub.large) == 4
    hub.faults.clear()
    hub.requests.clear()
    pushed(client, tied)
    assert hub.put_bytes() == last.stat().st_size
    assert len(hub.repositories[REPO].titles) == 2


_ANY = "."
PASSING = {
    "cut in the middle of an upload": ("PUT", "/storage/", {"drop_after": 1000, "times": 3}),
    "storage 500": ("PUT", "/storage/", {"status": 500}),
    "preupload 503": ("POST", "/preupload/", {"status": 503}),
    "batch 502": ("POST", "/objects/batch", {"status": 502}),
    "info 504": ("GET", "/api/models/", {"status": 504}),
    "create 500": ("POST", "/repos/create", {"status": 500}),
    "create is raced": ("POST", "/repos/create", {"before": "create"}),
    "create, its answer lost": ("POST", "/repos/create", {"cut_answer": True}),
    "branch 500": ("POST", "/branch/", {"status": 500}),
    "yaml 500": ("POST", "/validate-yaml", {"status": 500}),
    "commit 500": ("POST", "/commit/", {"status": 500}),
    "commit cut": ("POST", "/commit/", {"drop_after": 100}),
    "commit, its answer lost": ("POST", "/commit/", {"cut_answer": True}),
    "commit 429": ("POST", "/commit/", {"status": 429}),
    "commit 409": ("POST", "/commit/", {"status": 409}),
    "batch 429": ("POST", "/objects/batch", {"status": 429, "headers": {"Retry-After": "7"}}),
    "list 503": ("GET", "/tree/", {"status": 503}),
    "slow": ("POST", _ANY, {"slow_s": 0.05, "times": 9}),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_fault_that_passes_is_got_over(client, hub, tied, name):
    method, path, what = PASSING[name]
    if what.get("before") == "create":
        what = {"before": lambda: hub.create(REPO)}
    fault = hub.fault(method, path, **what)
    result = pushed(client, tied, "--revision", "v1")
    assert fault.times == 0, "the fault was met"
    assert sums(hub.repositories[REPO].files("v1")) == {file["path"]: file["sha256"] for file in result["files"]}
    assert len(hub.repositories[REPO].titles) == 2, "one commit"


LASTING = {
    "401": (
        "GET",
        "/api/models/",
        {"status": 401, "message": "Invalid credentials in Authorization header"},
        "hf auth login",
    ),
    "403": ("POST", "/preupload/", {"status": 403}, "write access"),
    "404": ("POST", "/preupload/", {"status": 404, "code": "RepoNotFound"}, "check the name"),
    "no revision": ("POST", "/preupload/", {"status": 404, "code": "RevisionNotFound"}, "check --revision"),
    "name clash": ("POST", "/repos/create", {"status": 409}, "choose another"),
    "409": ("POST", "/commit/", {"status": 409}, "push again"),
    "429": ("POST", "/commit/", {"status": 429}, "wait some minutes"),
    "5xx in a commit": ("POST", "/commit/", {"status": 503}, "(503); push again later"),
    "5xx in the storage": ("PUT", "/storage/", {"status": 500}, "(500); push again later"),
    "5xx in the first request": ("GET", "/api/models/", {"status": 502}, "(502); push again later"),
    "400": ("POST", "/commit/", {"status": 400, "message": f"no, {TOKEN}"}, "refuses it (400)"),
    "cut": ("POST", "/commit/", {"drop_after": 10}, "check the network"),
    "other bytes": ("PUT", "/storage/", {"corrupt": True}, "refuses it (400): XAmz"),
}


@pytest.mark.parametrize("name", LASTING)
def test_a_fault_that_stays_is_one_line_with_what_to_do(client, hub, tied, name):
    method, path, what, said = LASTING[name]
    if name != "name clash":
        hub.create(REPO)
    hub.fault(method, path, times=99, **what)
    line = client.refused(tied)
    assert said in line and REPO in line
    if name != "name clash":
        assert hub.repositories[REPO].titles == ["initial commit"]


def test_who_may_not_write_is_told_so(client, hub, tied):
    assert "hf auth login" in client.refused(tied, token=None)
    assert "hf auth login" in client.refused(tied, token="hf_nobodysToken123")
    assert "write access" in client.refused(tied, token=READ_TOKEN)
    assert hub.repositories == {}
    hub.create(REPO)
    assert "write access" in client.refused(tied, token=READ_TOKEN)
    assert hub.put_bytes() == 0


def test_a_hub_that_falls_silent_is_not_waited_for(client, hub, tied):
    hub.create(REPO)
    heard = threading.Event()
    hub.fault("POST", "/commit/", times=99, status=500, before=lambda: heard.wait(10))
    line = client.refused(tied, patience_s=0.4)
    heard.set()
    assert "fell silent" in line and "check the network" in line


def test_what_others_commit_meanwhile_stays(client, hub, tied):
    repository = hub.create(REPO)

    def others() -> None:
        files = repository.commits[repository.refs["main"]]
        repository.commit("main", {**files, f"theirs{len(repository.titles)}.md": Blob(b"theirs", False)}, "theirs")

    hub.fault("POST", "/commit/", times=2, before=others)
    pushed(client, tied)
    assert [one.status for one in hub.sent("POST", "/commit/")] == [412, 412, 200]
    assert {"theirs1.md", "theirs2.md", "config.json"} <= repository.files().keys()
    hub.fault("POST", "/commit/", times=99, before=others)
    (tied / "NOTICE.md").write_text("new")
    assert "(412); push again" in client.refused(tied)
    (tied / "NOTICE.md").unlink()


def test_a_hub_that_stored_something_else_is_found_out(client, hub, tied):
    repository = hub.create(REPO)

    def spoil() -> None:
        files = repository.commits[repository.refs["main"]]
        files["config.json"] = Blob(b"{}", False)

    hub.fault("GET", "/tree/", before=spoil)
    assert "has not 'config.json' as it was sent" in client.refused(tied)


@pytest.mark.parametrize("where", ["/storage/", "/commit/"])
def test_ctrl_c_leaves_all_or_nothing(client, hub, tied, where):
    repository = hub.create(REPO)
    stop = hub.fault("PUT" if where == "/storage/" else "POST", where, slow_s=0.5)
    stop.before = lambda: os.kill(client.process.pid, signal.SIGINT)
    answer = client.push(tied, "--quiet")
    hub.settle()
    assert answer["code"] == 130 and answer["err"] in ("", "modmoe: stopped.\n")
    there = set(repository.files())
    assert there == {".gitattributes"} or {file.name for file in tied.glob("*.safetensors")} < there
    kept = len(hub.large)
    hub.requests.clear()
    result = pushed(client, tied)
    assert sums(repository.files()) == {file["path"]: file["sha256"] for file in result["files"]}
    assert len(hub.sent("PUT")) == 5 - kept and len(repository.titles) == 2
