"""A process that pushes and downloads when told to: the Hub's client reads its settings once, when it is imported.

Each line on stdin is a JSON object with ``do`` and what it needs; each answer is one on stdout. It waits between tries
by noting how long, not by sleeping.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import threading
import traceback
from types import SimpleNamespace
from typing import Any


def push(arguments: list[str], token: str | None, patience_s: float) -> dict[str, Any]:
    """Run the command line; the Hub may be silent for ``patience_s``."""
    from modmoe.cli import main
    from modmoe.exports import hub

    hub.TIMEOUT_S = patience_s
    out, err = io.StringIO(), io.StringIO()
    waits.clear()
    os.environ.pop("HF_TOKEN", None)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main.run(["push", *arguments])
    return {"code": code, "out": out.getvalue(), "err": err.getvalue(), "waited_s": max(waits.values(), default=0)}


def download(repo: str, to: str, **options: Any) -> dict[str, Any]:
    """Fetch a snapshot."""
    from huggingface_hub import snapshot_download

    os.environ["HF_TOKEN"] = options.pop("token")
    return {"path": snapshot_download(repo, local_dir=to, **options)}


def use(code: str, ids: list[list[int]]) -> dict[str, Any]:
    """Run the lines of a card and return what ``model`` computes."""
    import torch

    known: dict[str, Any] = {}
    exec(code, known)
    with torch.no_grad():
        logits = known["model"].eval()(torch.tensor(ids)).logits
    tokenizer = known.get("tokenizer")
    return {"logits": logits.tolist(), "tokens": tokenizer and tokenizer("a").input_ids}


waits: dict[int, float] = {}
"""Of each thread, since uploads wait side by side."""


def note(seconds: float) -> None:
    """Stand for time.sleep."""
    waits[threading.get_ident()] = waits.get(threading.get_ident(), 0) + seconds


def main() -> None:
    """Answer until stdin ends."""
    from huggingface_hub.utils import _http

    from modmoe.exports import hub

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    clock = SimpleNamespace(sleep=note)
    _http.time = hub.time = clock  # type: ignore[assignment]
    jobs: dict[str, Any] = {"push": push, "download": download, "use": use}
    for line in sys.stdin:
        task = json.loads(line)
        try:
            answer = jobs[task.pop("do")](**task)
        except Exception:
            answer = {"error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
