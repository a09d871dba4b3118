"""A stand-in for the Hub over real HTTP on the loopback: repositories, branches, commits, large files, and its faults.

It answers what huggingface_hub sends for a push and a download, and nothing else: a request that it does not know, a
token in an address or one that reaches the storage of large files is a failure that ``FakeHub.failures`` lists.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.support.fake_hub_store import Blob, Fault, RefusalError, Repository, Request, apply, check_head, is_large

ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.model filter=lfs diff=lfs merge=lfs -text\n"
TOKEN = "hf_aTokenThatMayWrite123"
READ_TOKEN = "hf_aTokenThatMayOnlyRead4"


class FakeHub:
    """The server and what it knows; ``with FakeHub() as hub`` runs it."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.failures: list[str] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()
        self.idle, self.busy = threading.Condition(), 0
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        # large files lie elsewhere, where no token belongs
        self.storage = f"http://localhost:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    def __enter__(self) -> FakeHub:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)

    def settle(self) -> None:
        """Wait for what is being answered, though nobody may hear it."""
        with self.idle:
            assert self.idle.wait_for(lambda: self.busy == 0, 20)

    def reset(self) -> None:
        """Forget everything but the address."""
        self.settle()
        with self.lock:
            self.repositories.clear(), self.large.clear(), self.requests.clear()
            self.failures.clear(), self.faults.clear()

    def fault(self, method: str, path: str, times: int = 1, **what: Any) -> Fault:
        """Let the next ``times`` requests whose path matches go wrong."""
        made = Fault(method, path, times, **what)
        self.faults.append(made)
        return made

    def create(self, name: str, private: bool = False) -> Repository:
        """Make a repository as the Hub does: with one commit."""
        repository = self.repositories[name] = Repository(name, private)
        repository.commit("main", {".gitattributes": Blob(ATTRIBUTES, False)}, "initial commit")
        return repository

    def sent(self, method: str = "", path: str = "") -> list[Request]:
        """Return the requests of a kind."""
        return [one for one in self.requests if method in ("", one.method) and re.search(path, one.path)]

    def put_bytes(self) -> int:
        """Return the bytes of large files that arrived."""
        return sum(len(one.body) for one in self.sent("PUT"))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        split = urlsplit(self.path)
        given = self.headers.get("Authorization")
        token = given.removeprefix("Bearer ") if given else None
        request = Request(self.command, unquote(split.path), parse_qs(split.query), token)
        self.raw_path = split.path
        hub = self.hub
        with hub.lock:
            hub.requests.append(request)
            fault = next((f for f in hub.faults if f.times and f.method == self.command and self._hits(f)), None)
            if fault is not None:
                fault.times -= 1
        if "hf_" in self.path:
            hub.failures.append(f"a token in an address: {self.command} {split.path}")
        fault = fault or Fault("", "", 0)
        if not self._read(request, fault):
            self.close_connection = True
            return
        if fault.before is not None:
            fault.before()
        try:
            if fault.status:
                raise RefusalError(
                    fault.status, fault.message or "a fault of its own", fault.code, headers=fault.headers
                )
            status, answer, headers = self._answer(request)
        except RefusalError as refusal:
            status, headers = refusal.status, dict(refusal.more.pop("headers", {}))
            answer = json.dumps({"error": str(refusal), **refusal.more}).encode()
            if refusal.code:
                headers["X-Error-Code"] = refusal.code
            headers["X-Error-Message"] = str(refusal)
        except Exception as error:
            hub.failures.append(f"{self.command} {split.path}: {error!r}")
            status, answer, headers = 500, b"{}", {}
        request.status = status
        if fault.cut_answer:
            self.close_connection = True
            return
        with contextlib.suppress(ConnectionError):
            self._reply(status, answer, headers)

    def _count(self) -> None:
        hub = self.hub
        with hub.idle:
            hub.busy += 1
        try:
            self._serve()
        finally:
            with hub.idle:
                hub.busy -= 1
                hub.idle.notify_all()

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _count

    def _hits(self, fault: Fault) -> bool:
        return re.search(fault.path, unquote(self.path)) is not None

    def _read(self, request: Request, fault: Fault) -> bool:
        """Read the body; False where the connection is to be cut, or is gone."""
        length = int(self.headers.get("Content-Length") or 0)
        if fault.drop_after is not None:
            request.body = self.rfile.read(min(length, fault.drop_after))
        time.sleep(fault.slow_s)
        if fault.drop_after is not None:
            return False
        try:
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline(), 16):
                    request.body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                request.body = self.rfile.read(length)
        except (ConnectionError, ValueError):
            return False
        if fault.corrupt:
            request.body = request.body[:-1] + bytes([request.body[-1] ^ 1])
        return len(request.body) >= length

    def _reply(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        kind = headers.pop("Content-Type", "application/json")
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _answer(self, request: Request) -> tuple[int, Any, dict[str, str]]:
        for method, pattern, answer in _ROUTES:
            match = re.fullmatch(pattern, self.raw_path)
            if match is not None and request.method in method:
                with self.hub.lock:
                    return answer(self, request, *(unquote(part) for part in match.groups()))
        self.hub.failures.append(f"no such request: {request.method} {self.path}")
        raise RefusalError(404, "Not Found")

    def _may(self, request: Request, *, write: bool = False) -> None:
        if request.token not in (None, TOKEN, READ_TOKEN):
            raise RefusalError(401, "Invalid credentials in Authorization header")
        if write and request.token is None:
            raise RefusalError(401, "Invalid username or password.")
        if write and request.token != TOKEN:
            raise RefusalError(403, "You don't have the rights to write here.")

    def _repository(self, request: Request, name: str, *, write: bool = False) -> Repository:
        self._may(request)
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and request.token is None):
            if request.token is None:
                raise RefusalError(401, "Invalid username or password.", "RepoNotFound")
            raise RefusalError(404, "Repository not found", "RepoNotFound")
        self._may(request, write=write)
        return repository

    def _commit_of(self, repository: Repository, ref: str) -> str:
        sha = repository.refs.get(ref, ref)
        if sha not in repository.commits:
            raise RefusalError(404, f"Invalid rev id: {ref}", "RevisionNotFound")
        return sha

    def create(self, request: Request) -> tuple[int, Any, dict[str, str]]:
        self._may(request, write=True)
        asked = json.loads(request.body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{self.hub.url}/{name}"
        if name in self.hub.repositories:
            raise RefusalError(409, "You already created this model repo", url=url)
        self.hub.create(name, asked.get("visibility") == "private")
        return 200, {"url": url, "name": name}, {}

    def info(self, request: Request, name: str, ref: str = "main") -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(request, name)
        sha = self._commit_of(repository, ref)
        siblings = [{"rfilename": path} for path in repository.commits[sha]]
        return 200, {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}, {}

    def validate(self, request: Request) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(request.body)
        assert asked["repoType"] == "model"
        errors = check_head(asked["content"])
        return (400 if errors else 200), {"errors": [{"message": error} for error in errors], "warnings": []}, {}

    def branch(self, request: Request, name: str, ref: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(request, name, write=True)
        if ref in repository.refs:
            raise RefusalError(409, "Reference already exists")
        repository.refs[ref] = self._commit_of(repository, json.loads(request.body).get("startingPoint", "main"))
        return 201, {}, {}

    def preupload(self, request: Request, name: str, ref: str) -> tuple[int, Any, dict[str, str]]:
        pull = request.query.get("create_pr") == ["1"]
        repository = self._repository(request, name, write=not pull)
        there = repository.commits[self._commit_of(repository, ref)]
        files = []
        for asked in json.loads(request.body)["files"]:
            sample = base64.b64decode(asked["sample"])
            large = is_large(asked["path"], sample, asked["size"])
            mode = {"path": asked["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            old = there.get(asked["path"])
            files.append({**mode, **({"oid": old.oid} if old else {})})
        return 200, {"files": files}, {}

    def batch(self, request: Request, name: str) -> tuple[int, Any, dict[str, str]]:
        asked = json.loads(request.body)
        assert asked["operation"] == "upload" and asked["hash_algo"] == "sha256" and "basic" in asked["transfers"]
        # whoever can read may open a pull request
        self._repository(request, name, write="ref" in asked)
        objects = []
        for one in asked["objects"]:
            put = {"href": f"{self.hub.storage}/storage/{one['oid']}?X-Amz-Signature=abc", "header": {}}
            verify = {"href": f"{self.hub.url}/{name}.git/info/lfs/objects/verify", "header": {}}
            new = {} if one["oid"] in self.hub.large else {"actions": {"upload": put, "verify": verify}}
            objects.append({"oid": one["oid"], "size": one["size"], "authenticated": True, **new})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def verify(self, request: Request, name: str) -> tuple[int, Any, dict[str, str]]:
        self._repository(request, name)
        asked = json.loads(request.body)
        if len(self.hub.large.get(asked["oid"], b"")) != asked["size"]:
            raise RefusalError(404, "no such object")
        return 200, {}, {}

    def store(self, request: Request, oid: str) -> tuple[int, Any, dict[str, str]]:
        if request.token is not None:
            self.hub.failures.append("a token went to the storage of large files")
        if request.method == "PUT":
            if hashlib.sha256(request.body).hexdigest() != oid:
                raise RefusalError(
                    400, "XAmzContentSHA256Mismatch: the provided checksum does not match what was computed."
                )
            self.hub.large[oid] = request.body
            return 200, b"", {}
        return self._ranged(self.hub.large[oid], {})

    def commit(self, request: Request, name: str, ref: str) -> tuple[int, Any, dict[str, str]]:
        pull = request.query.get("create_pr") == ["1"]
        repository = self._repository(request, name, write=not pull)
        if request.token is None:
            raise RefusalError(401, "Invalid username or password.")
        head, *lines = (json.loads(line) for line in request.body.splitlines())
        assert head["key"] == "header" and self.headers["Content-Type"] == "application/x-ndjson"
        tip = self._commit_of(repository, ref)
        if head["value"].get("parentCommit", tip) != tip:
            raise RefusalError(412, "A commit has happened since. Please refresh and try again.")
        files = apply(repository.commits[tip], lines, self.hub.large)
        if pull:
            number = sum(one.startswith("refs/pr/") for one in repository.refs) + 1
            ref = f"refs/pr/{number}"
            repository.refs[ref] = tip
        sha = repository.commit(ref, files, head["value"]["summary"])
        url = f"{self.hub.url}/{name}"
        answer = {"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", "hookOutput": ""}
        return 200, {**answer, **({"pullRequestUrl": f"{url}/discussions/{number}"} if pull else {})}, {}

    def tree(self, request: Request, name: str, ref: str, folder: str = "") -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(request, name)
        files = repository.commits[self._commit_of(repository, ref)]
        if folder:
            raise RefusalError(404, f"{folder} does not exist on '{ref}'", "EntryNotFound")
        items = []
        for path, blob in files.items():
            lfs = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
            item = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.git_oid}
            items.append({**item, **({"lfs": lfs} if blob.is_large else {})})
        return 200, items, {}

    def refs(self, request: Request, name: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(request, name)
        branches = [
            {"name": ref, "ref": f"refs/heads/{ref}", "targetCommit": sha}
            for ref, sha in repository.refs.items()
            if not ref.startswith("refs/")
        ]
        return 200, {"branches": branches, "converts": [], "tags": []}, {}

    def resolve(self, request: Request, name: str, ref: str, path: str) -> tuple[int, Any, dict[str, str]]:
        repository = self._repository(request, name)
        sha = self._commit_of(repository, ref)
        blob = repository.commits[sha].get(path)
        if blob is None:
            raise RefusalError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": sha})
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob.git_oid}"'}
        if blob.is_large:
            linked = {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
            place = f"{self.hub.storage}/storage/{blob.sha256}?X-Amz-Signature=abc"
            return 302, b"", {**headers, **linked, "Location": place}
        return self._ranged(blob.data, headers)

    def _ranged(self, data: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
        headers = {**headers, "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            return 200, data, headers
        first, last = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        return 206, data[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(data)}"}


_ID, _REF = r"([^/]+/[^/]+)", r"([^/]+)"
_ROUTES: list[tuple[str, str, Callable[..., tuple[int, Any, dict[str, str]]]]] = [
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", r"/api/validate-yaml", _Handler.validate),
    ("GET", rf"/api/models/{_ID}", _Handler.info),
    ("GET", rf"/api/models/{_ID}/revision/{_REF}", _Handler.info),
    ("GET", rf"/api/models/{_ID}/refs", _Handler.refs),
    ("GET", rf"/api/models/{_ID}/tree/{_REF}", _Handler.tree),
    ("GET", rf"/api/models/{_ID}/tree/{_REF}/(.+)", _Handler.tree),
    ("POST", rf"/api/models/{_ID}/branch/{_REF}", _Handler.branch),
    ("POST", rf"/api/models/{_ID}/preupload/{_REF}", _Handler.preupload),
    ("POST", rf"/api/models/{_ID}/commit/{_REF}", _Handler.commit),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/batch", _Handler.batch),
    ("POST", rf"/{_ID}\.git/info/lfs/objects/verify", _Handler.verify),
    ("GET HEAD", rf"/{_ID}/resolve/{_REF}/(.+)", _Handler.resolve),
    ("PUT GET", r"/storage/([0-9a-f]{64})", _Handler.store),
]
"""Methods, the path as it is sent, and what answers it."""
