"""Where a change is made: an example of each that CONTRIBUTING.md names, as a patch that is applied and tried.

``tests/changes/NAME.patch`` is the whole diff of an example. All of them are applied to one copy of the package, and a
process with that copy runs each. Where a patch no longer applies, its table has changed: mend the patch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CHANGES = Path(__file__).resolve().parent / "changes"
# new files of an example, and lines that it adds to files that are there
ROOM: dict[str, tuple[int, int]] = {
    "partitioner": (1, 2),
    "family_plain": (0, 1),
    "family_fused": (0, 1),
    "family_transposed": (0, 10),
    "score": (0, 5),
    "assignment": (1, 2),
    "conversion": (1, 1),
    "adapter": (1, 2),
    "native_target": (0, 19),
    "router_loss": (0, 6),
    "command": (1, 2),
}


@pytest.mark.parametrize("name", ROOM)
def test_a_change_touches_no_more_than_its_file_and_its_row(name: str) -> None:
    files = re.split(r"(?m)^diff --git ", (CHANGES / f"{name}.patch").read_text(encoding="utf-8"))[1:]
    new = [file for file in files if "\nnew file mode" in file]
    added = sum(len(re.findall(r"(?m)^\+(?!\+\+ )", file)) for file in files if file not in new)
    removed = sum(len(re.findall(r"(?m)^-(?!-- )", file)) for file in files)
    assert (len(new), added) == ROOM[name]
    assert removed <= 1 and len(files) <= 2


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Iterator[Path]:
    """Copy the package as it is installed, with all examples applied."""
    root = tmp_path_factory.mktemp("changed")
    for folder in ("modmoe", "cli", "recipes"):
        shutil.copytree(repository / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ROOM:
        done = subprocess.run(
            ["git", "apply", "--unidiff-zero", "--whitespace=nowarn", str(CHANGES / f"{name}.patch")],
            cwd=root,
            capture_output=True,
            text=True,
            env={**os.environ, "GIT_CEILING_DIRECTORIES": str(root.parent)},
        )
        assert done.returncode == 0, f"tests/changes/{name}.patch: {done.stderr}"
    for folder in ("cli", "recipes"):
        shutil.move(root / folder, root / "modmoe" / folder)
    yield root


def test_each_example_works(changed: Path, tmp_path: Path, repository: Path) -> None:
    script = repository / "tests" / "support" / "tried_changes.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": f"{changed}{os.pathsep}{repository}", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == sorted(ROOM)
