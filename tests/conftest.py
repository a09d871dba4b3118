"""What all tests share: no network, few threads, and where real data may lie."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports a library of Hugging Face: they read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["MPLBACKEND"] = "Agg"
# MKL chooses its kernels by where a tensor lies in memory, so that on some processors the same sum differs in its last
# bits from one run to the next. Tests that compare bits are about the program and not about that.
os.environ.setdefault("MKL_CBWR", "AUTO")
# Threads that wait by spinning make tests several times slower wherever something else runs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
for _name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
    os.environ.pop(_name, None)

import pytest  # noqa: E402

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def few_threads() -> None:
    """Tiny models are slower on many threads than on two."""
    import torch

    torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(scope="session", autouse=True)
def known_names() -> Iterator[None]:
    """Let every output that any test writes have only names by which a later run knows what to clear up."""
    from modmoe.storage import seal, staging

    def seal_checked(directory: Path) -> None:
        assert seal.find_unknown(directory) is None, seal.find_unknown(directory)
        seal.seal(directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "seal", seal_checked)
        yield


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the repository."""
    return REPOSITORY


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real texts and weights; the test is skipped where there is none.

    MODMOE_SHARED names it, or it lies as `shared` beside the repository. Nothing else knows where it is.
    """
    named = os.environ.get("MODMOE_SHARED")
    folder = Path(named) if named else REPOSITORY.parent / "shared"
    if not (folder / "models").is_dir():
        pytest.skip("no real data: MODMOE_SHARED names no folder with models/ in it")
    return folder
