"""Bytes at random, led by what they reach in the parsers: atheris, for as long as is asked.

    python -m tests.fuzz.bytes_level SECONDS

It stops at the first input that is neither taken nor refused as it should be, prints it and exits with 1. Without
atheris, which comes as a wheel for Linux, it says so and exits with 0.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from modmoe.errors import CalibrationError, CheckpointError, ModmoeError
from tests.fuzz import oracle

try:
    import atheris
except ImportError:
    atheris = None

with (
    atheris.instrument_imports(include=["modmoe.storage.documents", "modmoe.analysis.text.rows", "yaml"])
    if atheris
    else nullcontext()
):
    from modmoe.analysis.text.rows import read_rows
    from modmoe.storage.documents import YamlError, open_tensors, parse_yaml, read_object


def check(data: bytes, place: Path) -> None:
    """Read bytes as each kind of file; anything but a value or the kind's own error is let out."""
    kind, data = (data[0] if data else 0) % 5, data[1:]
    path = place / ("x.safetensors", "x.json", "x.yaml", "x.jsonl", "x.json")[kind]
    path.write_bytes(data)
    try:
        if kind == 0:
            names = set(open_tensors(path).keys())
            real = oracle.read(data)
            assert real is not None and set(real) == names, "taken, and against the format"
        elif kind == 1:
            assert isinstance(read_object(path), dict)
        elif kind == 2:
            parse_yaml(data.decode("utf-8", "replace"))
        else:
            assert read_rows("x", str(path))
    except (CheckpointError, CalibrationError) as error:
        assert str(error).isprintable() and str(path) in str(error)
    except (YamlError, ModmoeError):
        pass


def main() -> None:
    """Run for the seconds given on the command line."""
    if atheris is None:
        print("bytes_level: atheris is not installed; pip install atheris")
        return
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 60.0
    with tempfile.TemporaryDirectory() as folder:
        place, corpus = Path(folder), Path(folder) / "corpus"
        corpus.mkdir()
        for number, seed in enumerate(SEEDS):
            (corpus / str(number)).write_bytes(seed)
        count, slowest, ends = 0, 0.0, time.monotonic() + seconds

        def one(data: bytes) -> Any:
            nonlocal count, slowest
            started_s = time.process_time()
            check(data, place)
            count, slowest = count + 1, max(slowest, time.process_time() - started_s)
            if time.monotonic() > ends:
                print(
                    f"bytes_level: {count} inputs, none that went wrong; the slowest took {slowest:.2f} s", flush=True
                )
                os._exit(0)  # it leaves no other way out of its loop

        atheris.Setup([sys.argv[0], str(corpus), "-max_len=4096", "-verbosity=0", "-close_fd_mask=0"], one)
        atheris.Fuzz()


_HEADER = b'{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
SEEDS = (
    b"\x00" + len(_HEADER).to_bytes(8, "little") + _HEADER + bytes(8),
    b'\x01{"model_type": "llama", "a": [1, 2.5, null, {"b": true}]}',
    b"\x02a: &x [1, 2]\nb: {c: *x, <<: {d: 2020-01-01}}\n",
    b'\x03{"text": "one"}\n{"text": "two"}\n',
    b'\x04[{"prompt": "a", "completion": "b"}]',
)

if __name__ == "__main__":
    main()
