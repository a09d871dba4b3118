"""The report in a browser: it loads in silence, its controls work, it fits a phone and a sheet of paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.browser import Browser, find_chromium
from tests.support.reports import full_report

SHOWN = "[...document.querySelectorAll('{}')].filter((part) => part.checkVisibility()).length"
PICK = """(() => {{ const select = document.querySelectorAll('select')[{}]; select.value = '{}';
  select.dispatchEvent(new Event('change')); }})()"""
COLOURS = "[...document.querySelectorAll('.tokens')[0].children].map((token) => token.className).join(' ')"
CHOSEN = "JSON.parse(document.querySelector('.tokens').dataset.choices)[{}].map((one) => 'e' + one).join(' ')"


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return full_report(tmp_path_factory)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium on this machine: the report is not tried in a browser")
    browser = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (400, "dark")])
def test_it_loads_in_silence_and_fits(browser: Browser, report: Path, width: int, scheme: str) -> None:
    browser.set_view(width, scheme=scheme)
    browser.open(report)
    assert browser.problems == []
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    # and with all that can be opened open
    browser.run("document.querySelectorAll('details').forEach((part) => { part.hidden = false; part.open = true; })")
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    paper = browser.run("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(255, 255, 255)" if scheme == "light" else "rgb(20, 23, 27)")
    assert len(browser.screenshot()) > 5000


def test_its_pickers_change_what_is_shown(browser: Browser, report: Path) -> None:
    browser.set_view(1280)
    browser.open(report)
    assert browser.run(SHOWN.format("details[data-layer]")) == 1
    assert browser.run("document.querySelector('#layer-0').checkVisibility()")
    browser.run(PICK.format(0, "1"))
    assert browser.run("document.querySelector('#layer-1 figure').checkVisibility()")
    assert not browser.run("document.querySelector('#layer-0').checkVisibility()")
    browser.run(PICK.format(0, "all"))
    assert browser.run(SHOWN.format("details[data-layer]")) == 2
    for layer in ("0", "1"):
        browser.run(PICK.format(1, layer))
        assert browser.run(COLOURS) == browser.run(CHOSEN.format(layer))
        assert f"in layer {layer}:" in browser.run("document.querySelector('[data-task] .note').textContent")
    assert browser.run(CHOSEN.format(0)) != browser.run(CHOSEN.format(1))
    assert browser.run(SHOWN.format(".tokens")) == 3
    browser.run(PICK.format(2, "1"))
    assert browser.run(SHOWN.format(".tokens")) == 1
    assert browser.problems == []


def test_values_are_told_to_the_pointer_and_to_the_keyboard(browser: Browser, report: Path) -> None:
    browser.set_view(1280)
    browser.open(report)
    tip = "document.querySelector('.tip').hidden ? '' : document.querySelector('.tip').textContent"
    assert browser.run(tip) == ""
    browser.run("document.querySelector('#layer-0 svg').scrollIntoView({block: 'center'})")
    browser.run("document.querySelector('#layer-0 svg').focus()")
    browser.press("ArrowRight")
    first = browser.run(tip)
    assert "module" in first and first.endswith(" it")
    browser.press("ArrowRight")
    assert browser.run(tip) not in ("", first)
    for _ in range(3):
        browser.press("ArrowDown")
    assert "importance" in browser.run(tip)
    browser.press("Escape")
    assert browser.run(tip) == ""
    x, y = browser.run(
        "(() => { const plot = document.querySelector('#layer-0 svg'), box = plot.getBoundingClientRect(),"
        " [x, y, wide, high] = JSON.parse(plot.dataset.marks)[0].box;"
        " return [box.left + box.width * (x + wide / 100), box.top + box.height * (y + high / 100)]; })()"
    )
    browser.move(x, y)
    assert browser.run(tip) == first
    browser.move(5, 5)
    assert browser.run(tip) == ""


def test_on_paper_there_are_no_controls_and_all_layers(browser: Browser, report: Path) -> None:
    browser.set_view(1280, media="print", scheme="dark")
    browser.open(report)
    assert browser.run(SHOWN.format("select")) == 0 and browser.run(SHOWN.format("nav")) == 0
    assert browser.run(SHOWN.format("details[data-layer]")) == 2
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.run("document.querySelector('#layer-1 figure').getBoundingClientRect().height") > 100
    browser.set_view(1280)


def test_without_its_script_everything_is_there(browser: Browser, report: Path, tmp_path: Path) -> None:
    text = report.read_text(encoding="utf-8")
    bare = tmp_path / "bare.html"
    bare.write_text(text[: text.index("<script>")] + text[text.index("</script>") :], encoding="utf-8")
    browser.set_view(1280)
    browser.open(bare)
    assert browser.run(SHOWN.format("select")) == 0
    assert browser.run(SHOWN.format("summary")) >= 4 and browser.run(SHOWN.format(".tokens")) == 3
    assert "e" in browser.run(COLOURS)
