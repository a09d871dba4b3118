"""Pushing an export to the Hub: whole checkpoints only, in one commit, and no token in any message.

The Hub's client uploads large files first, which stay invisible until a commit names them. So a push is complete or
absent, whatever stops it, and the next push uploads only what is missing.
https://huggingface.co/docs/huggingface_hub/guides/upload
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_session, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from modmoe.errors import CheckpointError, ExportError, hide_secrets
from modmoe.formats.pushed_files import CARD, Contents, contents, left_out, list_files, warnings_of
from modmoe.runtime.progress import Progress
from modmoe.storage.checkpoint import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX,
    MANIFEST,
    SINGLE,
    Checkpoint,
    adapter_headers,
    is_adapter,
    tensor_sha256,
)
from modmoe.storage.documents import check_files, read_object

TIMEOUT_S = 120.0
"""The longest silence of the Hub within one request; its client would wait for ever."""
_WAITS_S = (1.0, 4.0, 10.0)
"""Seconds before each new try of a request that the Hub's client does not repeat itself."""
_PASSING = (408, 429, 500, 502, 503, 504)
# the Hub's client and the libraries that it sends with
_CLIENTS = {"huggingface_hub", "hf_xet", "httpcore", "httpcore2", "httpx", "httpx2"}
# a part of the names of all request errors; the name of their library has changed before
_HTTPError: type[BaseException] = next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
# files of an earlier push of another form that a loader would take for the model
_WEIGHTS = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
_DECIDING = {SINGLE, INDEX, MANIFEST, ADAPTER_CONFIG, ADAPTER_WEIGHTS}

_Result = TypeVar("_Result")


def push(
    directory: str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Upload a checkpoint to ``repo`` on the Hub, which is created if it does not exist; the directory stays unchanged.

    It is one commit, which also deletes weights of an earlier push that this one does not replace.

    Args:
        directory: a whole checkpoint or adapter; files that trainers and editors leave in it are not uploaded.
        repo: ``OWNER/NAME``.
        private: make a new repository private.
        revision: the branch; created if it does not exist.
        create_pr: open a pull request against the default branch.
        dry_run: send nothing, without a request.
        progress: called with a message and, where they are known, what is done and what there is in all.

    Returns:
        ``repo``, ``revision``, ``dry_run``, ``files`` (path, bytes, sha256 of what is sent), ``bytes``, ``card``
        (README.md as it is sent, or None), ``left_out`` (path and why of what is not sent), ``warnings``,
        and after a push ``url``, ``commit``, ``pull_request`` and
        ``deleted`` (paths).

    Raises:
        ExportError: the directory holds no whole checkpoint, a file of it is a link or holds what looks like a
            credential, the name is not valid, or the Hub refuses.
    """
    path = Path(directory)
    say = progress or (lambda *_: None)
    _check_repo(repo)
    if create_pr and revision not in (None, constants.DEFAULT_REVISION):
        raise ExportError(
            "revision",
            f"a pull request goes to the default branch, not to '{revision}'",
            "drop --revision or --create-pr",
        )
    say("checking the checkpoint")
    _check_whole(path)
    parcel = contents(path, repo)
    files = list_files(parcel, lambda *count: say("hashing, bytes", *count))
    result: dict[str, Any] = {
        "repo": repo,
        "revision": revision or constants.DEFAULT_REVISION,
        "dry_run": dry_run,
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "card": _card(parcel),
        "left_out": left_out(path, parcel),
        "warnings": warnings_of(path),
    }
    if dry_run:
        return result
    say(f"uploading {result['bytes']:,} bytes")
    try:
        return {**result, **_Push(repo, parcel, files, private, revision, create_pr).run()}
    except ExportError:
        raise
    except Exception as error:
        if not _is_theirs(error):
            raise
        # `from None`: the cause may quote headers of the request
        raise ExportError(repo, explain(error)) from None


def explain(error: BaseException) -> str:
    """Return one line on what the Hub's client raised and what to do; tokens are taken out."""
    error = _root(error)
    status = _status(error)
    first = _redact(next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:300]
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to push."
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "the Hub does not know who you are; run `hf auth login` or set HF_TOKEN to a token that may write."
    if isinstance(error, GatedRepoError) or status == 403:
        return "your token may not write there; use one with write access, or --create-pr."
    if isinstance(error, RevisionNotFoundError):
        return "there is no such revision; check --revision."
    if isinstance(error, RepositoryNotFoundError) or status == 404:
        return "no such repository, or your token may not see it; check the name."
    if status in (409, 412):
        return f"others are changing the repository at the same time ({status}); push again, or use --create-pr."
    if status == 429:
        return "the Hub allows no more requests for now (429); wait some minutes and push again. Uploads are kept."
    if status is not None and status >= 500:
        return f"the Hub has a fault of its own ({status}); push again later. What is uploaded is not sent again."
    if status is not None:
        said = _redact(" ".join(str(getattr(error, "server_message", None) or first).split()))[:300]
        return f"the Hub refuses it ({status}): {said}"
    if isinstance(error, _HTTPError):
        return (
            f"the Hub could not be reached or fell silent: {first}; check the network and push again. "
            "What is uploaded is not sent again."
        )
    return f"the Hub refused or could not be reached: {first}"


class _Push:
    """One push: its requests in order, each repeated where that can help."""

    def __init__(
        self,
        repo: str,
        parcel: Contents,
        files: list[dict[str, Any]],
        private: bool,
        revision: str | None,
        create_pr: bool,
    ) -> None:
        self.repo, self.parcel, self.files = repo, parcel, files
        self.private, self.revision, self.create_pr = private, revision, create_pr
        self.api = HfApi(library_name="modmoe")

    def run(self) -> dict[str, Any]:
        """Return ``url``, ``commit``, ``pull_request`` and ``deleted``."""
        repo_id = self._repository()
        if self.revision is not None and not self.create_pr:
            branch = self.revision
            _again(lambda: self.api.create_branch(repo_id, branch=branch, exist_ok=True))
        commit, deleted = self._commit(repo_id)
        self._compare(repo_id, commit.oid)
        return {
            "url": f"{self.api.endpoint}/{repo_id}",
            "commit": commit.oid,
            "pull_request": commit.pr_url,
            "deleted": deleted,
        }

    def _repository(self) -> str:
        """Return the repository's name as the Hub writes it, after creating it if necessary."""
        try:
            there = _again(lambda: self.api.model_info(self.repo))
        except RepositoryNotFoundError:
            try:
                # None leaves the owner's default; another process may create the repository at the same time
                made = _again(lambda: self.api.create_repo(self.repo, private=self.private or None, exist_ok=True))
            except KeyError:  # a conflict that is not about this repository comes without its address
                raise ExportError(str(self.repo), "the name is taken on the Hub", "choose another") from None
            return made.repo_id
        if self.private and there.private is False:
            raise ExportError(
                str(self.repo), "is there already and is public", "make it private first, or drop --private"
            )
        return str(there.id)

    def _commit(self, repo_id: str) -> tuple[Any, list[str]]:
        """Upload what is missing and commit; return the commit and the paths that it deletes."""

        def commit() -> tuple[Any, list[str]]:
            # anew each time: what was uploaded or committed before is found to be there, and what others committed
            # since then is what we go on from
            tip = self.api.model_info(repo_id, revision=None if self.create_pr else self.revision)
            deleted = self._stale([sibling.rfilename for sibling in tip.siblings or []])
            added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=item) for name, item in self.parcel.items()]
            made = self.api.create_commit(
                repo_id,
                [*added, *(CommitOperationDelete(path_in_repo=name) for name in deleted)],
                commit_message="Upload with modmoe",
                revision=None if self.create_pr else self.revision,
                create_pr=self.create_pr,
                parent_commit=None if self.create_pr else tip.sha,
            )
            return made, deleted

        # where the answer is lost the pull request may exist, and another try would open a second one
        return commit() if self.create_pr else _again(commit)

    def _stale(self, there: list[str]) -> list[str]:
        return sorted(
            name for name in there if name not in self.parcel and (name in _DECIDING or _WEIGHTS.fullmatch(name))
        )

    def _compare(self, repo_id: str, commit: str) -> None:
        """Raise ExportError unless the Hub lists what was sent, byte for byte by its hashes."""
        there = {
            item.path: item
            for item in _again(lambda: list(self.api.list_repo_tree(repo_id, recursive=True, revision=commit)))
        }
        for file in self.files:
            item: Any = there.get(file["path"])
            lfs = getattr(item, "lfs", None)
            same = item is not None and item.size == file["bytes"]
            if same and lfs is not None:
                same = lfs.sha256 == file["sha256"]
            elif same:
                same = item.blob_id == _blob_id(self.parcel[file["path"]])
            if not same:
                raise ExportError(str(self.repo), f"the Hub has not '{file['path']}' as it was sent", "push again")


def _again(call: Callable[[], _Result]) -> _Result:
    """Return the result of ``call``, repeated after temporary faults that the client does not repeat itself."""
    for wait_s in _WAITS_S:
        # after some faults the client is rebuilt, without the time limit
        get_session().timeout = TIMEOUT_S
        try:
            return call()
        except Exception as error:
            if not _passes(error):
                raise
        time.sleep(wait_s)
    return call()


def _passes(error: BaseException) -> bool:
    """Return whether another try may succeed and the client has not made it already."""
    path = str(getattr(_request(error), "url", ""))
    # the client itself has repeated uploads and their preparation for half a minute
    if "/preupload/" in path or ".git/info/lfs/" in path:
        return False
    status = _status(error)
    return status in (*_PASSING, 409, 412) if status is not None else isinstance(error, _HTTPError)


def _root(error: BaseException) -> BaseException:
    """Return the request's own error under what an upload's thread wraps around it."""
    for inner in _causes(error):
        if isinstance(inner, _HTTPError):
            return inner
    return error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _request(error: BaseException) -> Any:
    try:
        return getattr(error, "request", None) or getattr(getattr(error, "response", None), "request", None)
    except RuntimeError:  # it is a property whose value may be missing
        return None


def _check_repo(repo: str) -> None:
    name = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    if not re.fullmatch(f"{name}/{name}", repo, re.ASCII) or "--" in repo or ".." in repo:
        raise ExportError(
            "repo", f"'{repo}' is no name on the Hub", "write OWNER/NAME in letters, digits, '-', '_', '.'"
        )


def _check_whole(path: Path) -> None:
    """Raise ExportError unless ``path`` holds a whole checkpoint, with the tensors of its manifest if it has one."""
    if path.name.endswith(".partial"):
        raise ExportError(str(path), "is what an unfinished run left", "run it again")
    if not os.path.isdir(path):
        raise ExportError(str(path), "no such directory")
    try:
        check_files(path)
        if is_adapter(path):
            adapter_headers(path)
            return
        checkpoint = Checkpoint(path)
    except CheckpointError as error:
        raise ExportError(str(error)) from error
    manifest = path / MANIFEST
    if not manifest.is_file():
        return
    try:
        sums = {name: entry["sha256"] for name, entry in read_object(manifest)["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(str(manifest), "is damaged", "export again") from error
    if sums.keys() != set(checkpoint):
        name = min(sums.keys() ^ set(checkpoint))
        raise ExportError(str(path), f"'{name}' is in the manifest or in the weights but not in both", "export again")
    for name in checkpoint:
        if tensor_sha256(checkpoint[name]) != sums[name]:
            raise ExportError(str(path), f"'{name}' is not what was written", "the weights were changed or damaged")


def _is_theirs(error: Exception) -> bool:
    """Return whether an error is the Hub's, the network's or the disk's rather than a bug of ours."""
    # hf_xet raises RuntimeError for whatever goes wrong in an upload
    return isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__.split(".")[0] in _CLIENTS


def _card(parcel: Contents) -> str | None:
    card = parcel.get(CARD)
    if isinstance(card, Path):
        return card.read_text(encoding="utf-8", errors="replace")
    return None if card is None else card.decode()


def _blob_id(item: Path | bytes) -> str:
    """Return the hash by which git knows a small file."""
    data = item if isinstance(item, bytes) else item.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _redact(text: str) -> str:
    token = get_token()
    return hide_secrets(text.replace(token, "***") if token else text)
