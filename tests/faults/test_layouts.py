"""A short run of what ``make test-faults`` does at length: no layout of a user's files makes a command lose one."""

from __future__ import annotations

import pytest

from tests.faults.harness import serving
from tests.faults.layouts import Figures, run_layout


def test_no_file_of_the_user_is_lost(tmp_path_factory: pytest.TempPathFactory) -> None:
    figures = Figures()
    with serving(tmp_path_factory.mktemp("layouts") / "room") as server:
        for number in range(50):
            run_layout(server, f"gate {number}", figures, commands=2)
    assert figures.faults == [], figures.faults[0]
    # otherwise nothing was tried
    assert figures.codes.get(0, 0) >= 10 and figures.codes.get(2, 0) >= 10
