"""Pushing an export to the Hub: whole checkpoints only, and no token in any message."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import (
    GatedRepoError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from modmoe.checkpoint import MANIFEST, Checkpoint, adapter_headers, is_adapter, tensor_sha256
from modmoe.errors import CheckpointError, ExportError
from modmoe.shards import adder

_SUFFIXES = {".json", ".safetensors", ".py", ".md", ".txt", ".model", ".jinja", ".yaml"}
_PREFIXES = ("LICENSE", "NOTICE")
_CARD_LINES = 40
# the Hub's client and what it sends with: the errors of a connection are of the latter, whose name has changed before
_CLIENTS = {"huggingface_hub", "hf_xet", "httpcore", "httpcore2", "httpx", "httpx2"}
_ABSOLUTE = re.compile(r"(?:^|[\s'\":])(~?/[^\s'\"]+|[A-Za-z]:\\[^\s'\"]+)")


def push(
    directory: str,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    dry_run: bool = False,
    progress: Callable[..., None] | None = None,
) -> dict[str, Any]:
    """Upload a checkpoint to ``repo`` on the Hub, which is made if it is not there; the directory is left unchanged.

    Args:
        directory: a whole checkpoint or adapter; what trainers and editors leave beside it is not uploaded.
        repo: ``OWNER/NAME``.
        private: make a new repository private.
        revision: the branch; made if it is not there.
        create_pr: open a pull request.
        dry_run: send nothing and ask nobody.
        progress: called with a message and, where they are known, what is done and what there is in all.

    Returns:
        ``repo``, ``revision``, ``dry_run``, ``files`` (path, bytes, sha256), ``bytes``, ``card`` (the head of README.md
        or None), ``warnings``, and after a push ``url``, ``commit`` and ``pull_request``.

    Raises:
        ExportError: the directory holds no whole checkpoint, the name is none, or the Hub refuses.
    """
    path = Path(directory)
    say = progress or (lambda *_: None)
    _check_repo(repo)
    say("checking the checkpoint")
    _check_whole(path)
    files = list_files(path, lambda *count: say("hashing, bytes", *count))
    result: dict[str, Any] = {
        "repo": repo,
        "revision": revision or constants.DEFAULT_REVISION,
        "dry_run": dry_run,
        "files": files,
        "bytes": sum(file["bytes"] for file in files),
        "card": _card_head(path),
        "warnings": _warnings(path),
    }
    if dry_run:
        return result
    say(f"uploading {result['bytes'] / 1e9:.2f} GB")
    try:
        return {**result, **_upload(path, repo, [file["path"] for file in files], private, revision, create_pr)}
    except Exception as error:
        if not _is_theirs(error):
            raise
        # `from None`: the cause may quote headers of the request
        raise ExportError(f"{repo}: {explain(error)}") from None


def list_files(path: Path, report: Callable[[int, int], None] | None = None) -> list[dict[str, Any]]:
    """Return path, size and SHA-256 of each file that belongs to the checkpoint, by name.

    ``report`` is called with the bytes read and the bytes in all.
    A list of what is wanted rather than of what is not: an optimizer's state or an .env is never uploaded.
    """
    found = [
        file
        for file in sorted(path.iterdir())
        if file.is_file() and not file.name.startswith(".")
        if file.suffix in _SUFFIXES or file.name.startswith(_PREFIXES)
    ]
    sizes = {file: file.stat().st_size for file in found}
    add = adder(report, sum(sizes.values()))
    files = []
    for file, size_bytes in sizes.items():
        files.append({"path": file.name, "bytes": size_bytes, "sha256": _sha256(file)})
        add(size_bytes)
    return files


def explain(error: Exception) -> str:
    """Return one line on what the Hub's client raised and what to do; tokens are taken out."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    first = next(iter(str(error).strip().splitlines()), type(error).__name__)
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
    return f"the Hub refused or could not be reached: {_redact(first)[:300]}"


def _upload(
    path: Path, repo: str, names: list[str], private: bool, revision: str | None, create_pr: bool
) -> dict[str, Any]:
    api = HfApi(library_name="modmoe")
    # None leaves an existing repository and the owner's default as they are
    made = api.create_repo(repo, private=private or None, exist_ok=True)
    if revision is not None and not create_pr:
        api.create_branch(made.repo_id, branch=revision, exist_ok=True)
    commit = api.upload_folder(
        repo_id=made.repo_id,
        folder_path=path,
        revision=revision,
        create_pr=create_pr,
        commit_message="Upload with modmoe",
        allow_patterns=[glob.escape(name) for name in names],
    )
    return {"url": str(made), "commit": commit.oid, "pull_request": commit.pr_url}


def _check_repo(repo: str) -> None:
    name = r"[A-Za-z0-9](?:[\w.-]{0,94}[A-Za-z0-9_])?"
    if not re.fullmatch(f"{name}/{name}", repo, re.ASCII) or "--" in repo or ".." in repo:
        raise ExportError(f"repo: '{repo}' is no name on the Hub; write OWNER/NAME in letters, digits, '-', '_', '.'.")


def _check_whole(path: Path) -> None:
    """Raise ExportError unless ``path`` holds a whole checkpoint, with the tensors of its manifest if it has one."""
    if path.name.endswith(".partial"):
        raise ExportError(f"{path}: is what an unfinished run left; run it again.")
    if not path.is_dir():
        raise ExportError(f"{path}: no such directory.")
    try:
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
        sums = {name: entry["sha256"] for name, entry in json.loads(manifest.read_text("utf-8"))["tensors"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{manifest}: is damaged; export again.") from error
    if sums.keys() != set(checkpoint):
        name = min(sums.keys() ^ set(checkpoint))
        raise ExportError(f"{path}: '{name}' is in the manifest or in the weights but not in both; export again.")
    for name in checkpoint:
        if tensor_sha256(checkpoint[name]) != sums[name]:
            raise ExportError(f"{path}: '{name}' is not what was written; the weights were changed or damaged.")


def _is_theirs(error: Exception) -> bool:
    """Return whether an error is the Hub's, the network's or the disk's rather than a bug of ours."""
    # hf_xet raises RuntimeError for whatever goes wrong in an upload
    return isinstance(error, OSError | ValueError | RuntimeError) or type(error).__module__.split(".")[0] in _CLIENTS


def _warnings(path: Path) -> list[str]:
    """Return what the user should look at before others can, one line each."""
    found = []
    if not (path / "README.md").is_file():
        found.append("there is no README.md; `modmoe export` writes one.")
    recipe = path / "modmoe.yaml"
    named = _ABSOLUTE.search(recipe.read_text(encoding="utf-8", errors="replace")) if recipe.is_file() else None
    if named is not None:
        found.append(f"modmoe.yaml names paths of this machine, such as {named[1]}; edit it if others need not know.")
    return found


def _card_head(path: Path) -> str | None:
    card = path / "README.md"
    if not card.is_file():
        return None
    return "\n".join(card.read_text(encoding="utf-8", errors="replace").splitlines()[:_CARD_LINES])


def _sha256(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _redact(text: str) -> str:
    token = get_token()
    if token:
        text = text.replace(token, "***")
    return re.sub(r"hf_[A-Za-z0-9]{6,}|(?<=[Bb]earer )\S+", "***", text)
