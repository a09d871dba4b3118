"""README and the tutorials run from top to bottom, on tiny models in the place of those that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import pages

RUN = [pages.ROOT / "README.md", *sorted((pages.ROOT / "docs" / "tutorials").glob("*.md"))]


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what `modmoe demo` makes lies there already; it has a test of its own
    assert len(pages.run_page(page, tmp_path, monkeypatch, skip=("modmoe demo",))) >= 4
