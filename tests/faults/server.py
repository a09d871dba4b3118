"""A process with all libraries loaded that forks a child for each command: a run starts in no time, and can be killed.

Jobs come as lines of JSON on stdin, answers go as lines of JSON to stdout; see ``serve``.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

LOADED = (
    "matplotlib.pyplot",
    "modmoe.reports.report",
    "modmoe.cli.main",
    "modmoe.conversion.attach_adapters",
    "modmoe.conversion.prune",
    "modmoe.conversion.modular.steps",
    "modmoe.exports.adapters",
    "modmoe.exports.converted",
    "modmoe.training.run",
    "peft",
    "pydantic",
    "torch.utils.serialization",
    "transformers.models.llama.modeling_llama",
    "trl",
    "typer.rich_utils",
    "tests.faults.layer",
    "tests.faults.room",
)
"""What the commands import, most of it only when they run."""
_POLL_S = 0.002
_LIMIT_S = 120.0
"""The longest that a run may take; beyond it hangs."""


def serve() -> None:
    """Answer jobs until stdin ends.

    A job is ``{root, arguments, log}``: run ``modmoe`` with the arguments, or the function ``call`` of
    ``tests.faults.room`` in their place. ``action`` and ``at`` let a call to the disk go wrong (see
    ``tests.faults.layer``), ``signal`` and ``after_s`` send a signal after a time, ``file_bytes`` is the size at which
    the system itself refuses to write on (EFBIG), whatever library writes. ``cwd`` is the working directory, by default
    the root, and ``home`` the user's.
    The answer: ``{code, hung, error, out, seconds, cpu_s, calls}``; a negative code is the signal that ended it.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    _load()
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(_run(json.loads(line))), file=answers, flush=True)


def _load() -> None:
    for name in LOADED:
        importlib.import_module(name)
    import torch
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    torch.set_num_threads(1)
    get_checkpoint_conversion_mapping("llama")  # builds a table for all models once
    gc.collect()
    gc.freeze()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    home = Path(job["log"])
    home.mkdir(parents=True, exist_ok=True)
    for file in home.iterdir():
        file.unlink()
    for name in ("out", "error"):  # a kill may come before the child has opened them
        (home / name).touch()
    began_s = time.monotonic()
    child = os.fork()
    if child == 0:
        _be_child(job, home)
    sent, hung = "signal" not in job, False
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        now_s = time.monotonic() - began_s
        if not sent and now_s >= job["after_s"]:
            os.kill(child, job["signal"])
            sent = True
        if now_s > _LIMIT_S and not hung:
            hung = True
            os.kill(child, signal.SIGKILL)
        time.sleep(_POLL_S)
    with contextlib.suppress(ProcessLookupError):  # what it had started, as a proof of an export does
        os.killpg(child, signal.SIGKILL)
    calls = home / "calls"
    return {
        "code": os.waitstatus_to_exitcode(status),
        "hung": hung,
        "out": (home / "out").read_text(errors="replace"),
        "error": (home / "error").read_text(errors="replace"),
        "calls": calls.read_text().splitlines() if calls.exists() else [],
        "seconds": time.monotonic() - began_s,
        "cpu_s": used.ru_utime + used.ru_stime,
    }


def _be_child(job: dict[str, Any], home: Path) -> None:
    code = 70
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        os.setsid()
        for number, name in ((1, "out"), (2, "error")):
            handle = os.open(home / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
            os.dup2(handle, number)
            os.close(handle)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", encoding="utf-8")
        sys.stderr = os.fdopen(2, "w", encoding="utf-8", buffering=1)
        code = _do(job, home)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _do(job: dict[str, Any], home: Path) -> int:
    from tests.faults import room
    from tests.faults.layer import Layer

    os.chdir(job.get("cwd", job["root"]))
    if "home" in job:
        os.environ["HOME"] = job["home"]
    if "call" in job:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        getattr(room, job["call"])(Path(job["root"]), *job.get("arguments", ()))
        return 0
    from modmoe.cli.main import run

    layer = Layer(Path(job["root"]), job.get("action"), job.get("at", 0))
    layer.install()
    if "file_bytes" in job:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"], job["file_bytes"]))
    # until here Ctrl-C is ignored, as the system does for a program that is not yet there
    signal.signal(signal.SIGINT, signal.default_int_handler)
    code = run(job["arguments"])
    if "file_bytes" not in job:
        (home / "calls").write_text("\n".join(layer.calls))
    return code


if __name__ == "__main__":
    serve()
