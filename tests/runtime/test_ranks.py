"""Several processes find and train what one does, and fail as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modmoe.errors import CalibrationError
from modmoe.runtime import ranks
from modmoe.storage.checkpoint import Checkpoint
from tests.support import ranked

# peft 0.21 asks transformers 5.23 by the old name
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


def draws() -> torch.Tensor:
    """Return numbers of very different size and of both signs, [batches, X]."""
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(64, 33, generator=generator, dtype=torch.float64)
    return numbers * 10.0 ** torch.randint(-9, 12, numbers.shape, generator=generator)


def test_sums_in_steps_do_not_depend_on_the_order() -> None:
    numbers = draws()
    orders = [torch.randperm(64, generator=torch.Generator().manual_seed(seed)) for seed in range(20)]
    plain = {tuple(sum(numbers[i] for i in order).tolist()) for order in orders}
    assert len(plain) > 1  # in float64 alone the order shows
    found = set()
    for order in orders:
        steps = ranks.in_steps(torch.zeros(33))
        for i in order:
            steps += ranks.in_steps(numbers[i])
        found.add(tuple(ranks.from_steps(steps).tolist()))
    (one,) = found
    wanted = torch.tensor([sum(map(fractions_of, column)) for column in numbers.T.tolist()], dtype=torch.float64)
    torch.testing.assert_close(torch.tensor(one, dtype=torch.float64), wanted, rtol=2e-16, atol=1e-28)


def fractions_of(number: float) -> Any:
    from fractions import Fraction

    return Fraction(number)


def test_one_number_comes_back_as_it_was() -> None:
    numbers = draws()
    assert torch.equal(ranks.from_steps(ranks.in_steps(numbers)), numbers)
    assert not bool(ranks.from_steps(ranks.in_steps(torch.tensor([float("inf"), float("nan")]))).isfinite().any())


def test_alone_there_is_nobody_to_wait_for() -> None:
    with ranks.joined():
        ranks.meet()
        tensor = torch.arange(3)
        assert ranks.add_up(tensor) is tensor
        assert (ranks.rank(), ranks.num_ranks(), ranks.is_first()) == (0, 1, True)
    with pytest.raises(CalibrationError, match="as it is"), ranks.joined():
        raise CalibrationError("as it is")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """Return what two processes left, and beside it what this one makes of the same."""
    room = ranked.make_room(tmp_path_factory.mktemp("ranked"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [*command, str(repository / "tests" / "support" / "ranked.py"), str(room)],
        capture_output=True,
        text=True,
        timeout=900,
        env=environment,
    )
    # the last thing the second process does is to be killed
    assert ran.returncode == 1 and (room / "found-1.json").is_file(), (ran.stdout + ran.stderr)[-4000:]
    return room


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def found_by(room: Path, rank: int) -> dict[str, Any]:
    return dict(json.loads((room / f"found-{rank}.json").read_text()))


def test_two_processes_convert_to_the_same_bits(room: Path) -> None:
    ranked.convert_once(room, room / "converted-1")
    one, two = room / "converted-1", room / "converted-2"
    files = {path.relative_to(one) for path in one.rglob("*") if path.is_file()}
    assert files == {path.relative_to(two) for path in two.rglob("*") if path.is_file()}
    assert {str(file) for file in files} >= {"model.safetensors", "analysis/profile.safetensors"}
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes(), file
    assert not list(room.glob("converted-2.*"))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    if (directory / "adapter_model.safetensors").is_file():
        from safetensors.torch import load_file

        return dict(load_file(directory / "adapter_model.safetensors"))
    return dict(Checkpoint(directory))


def farthest(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys()
    return max(float((one[name].double() - two[name].double()).abs().max()) for name in one)


@pytest.mark.parametrize("kind", ranked.KINDS)
def test_two_processes_train_what_one_does(room: Path, kind: str) -> None:
    alone = ranked.train_once(room, kind, room / f"{kind}-1")
    one = weights(room / f"{kind}-1")
    for name in (kind, f"{kind}-sharded"):
        two = weights(room / f"{name}-2")
        assert farthest(one, two) < 2e-5
        if kind != "adapters":
            assert farthest(weights(room / "tied"), two) > 1e-3
        for rank in (0, 1):
            compare_results(found_by(room, rank)[name], alone)
    assert found_by(room, 0)[f"{kind}-sharded"]["sharded"] > 0
    if kind == "full":
        assert set(alone["tasks"]) == {"sums", "words", "code"}


def compare_results(together: dict[str, Any], alone: dict[str, Any]) -> None:
    for key in ("steps", "tokens", "parameters"):
        assert together[key] == alone[key], key
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-5)
    for name, losses in alone.get("tasks", {}).items():
        assert together["tasks"][name] == pytest.approx(losses, rel=1e-5)


def test_two_processes_go_on_where_they_stopped(room: Path) -> None:
    found = found_by(room, 0)
    assert found["stopped"] == "the disk is full."
    assert found["resumed"]["loss"]["last"] == found["full"]["loss"]["last"]
    assert farthest(weights(room / "full-2"), weights(room / "resumed-2")) == 0


@pytest.mark.parametrize(
    ("how", "words"), [("first", "the disk is full."), ("second", "no such file."), ("bug", "'oops'")]
)
def test_what_one_fails_of_all_hear(room: Path, how: str, words: str) -> None:
    heard = [found_by(room, rank)["failed"][how] for rank in (0, 1)]
    own = heard[0 if how == "first" else 1]
    assert own == (f"KeyError: {words}" if how == "bug" else f"CheckpointError: {words}")
    other = heard[1 if how == "first" else 0]
    assert other == f"ModmoeError: {'rank 1 failed: KeyError: ' if how == 'bug' else ''}{words}"
    assert not list(room.glob(f"*failed-{how}*"))


def test_a_process_that_is_gone_is_noticed(room: Path) -> None:
    said = found_by(room, 0)["lost"]
    assert said.startswith("rank 0 of 2: another rank is gone (")
    assert "\n" not in said
    assert "lost" not in found_by(room, 1)
    assert not list(room.glob("*lost*"))
