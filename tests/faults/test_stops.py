"""A short run of what ``make test-faults`` does at length: commands stopped anywhere lose nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.faults.harness import OUTPUT, Command, Figures, Server, assert_said, measure, serving, stop_once, tree_of

# what is written in different ways: by this package, by transformers and torch, by both into shards
NAMES = ("analyze", "finetune router", "export tied")
SHARES = {"kill": 5, "interrupt": 1, "ENOSPC": 1, "EIO": 1}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("faults") / "room") as made:
        yield made


@pytest.fixture(scope="module", params=NAMES)
def command(request: pytest.FixtureRequest, server: Server) -> Command:
    return measure(server, request.param)


@pytest.mark.parametrize("action", SHARES)
def test_nothing_is_lost(command: Command, action: str) -> None:
    figures, draw = Figures(), random.Random(f"0 {command.name} {action}")
    for _ in range(SHARES[action]):
        stop_once(command, draw, figures, action)
    assert figures.lost == []
    assert figures.counts["resumed byte-identically"] == SHARES[action]


@pytest.mark.parametrize(
    ("name", "file_bytes"), [("analyze", 2000), ("finetune full", 60_000), ("finetune full", 120_000)]
)
def test_what_the_system_refuses_is_told_in_a_line(server: Server, name: str, file_bytes: int) -> None:
    """Real refusals, of what safetensors writes, then of what transformers and torch do."""
    command = Command(server, name, {}, 0, 0)
    root = command.fresh(old=True)
    before = tree_of(root / OUTPUT)
    done = command.run(root, "--overwrite", file_bytes=file_bytes)
    assert done["code"] == 2, done["error"]
    assert_said("EFBIG", done["error"], is_whole=False)
    assert tree_of(root / OUTPUT) == before and os.listdir(root) == [OUTPUT]
