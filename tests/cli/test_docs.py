"""The site builds without a warning, its links lead somewhere, it asks for no network, and it has every method."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest

import modmoe
from modmoe.adapters.table import METHODS
from modmoe.api import KEYWORDS
from modmoe.conversion.table import CONVERSIONS

pytest.importorskip("mkdocs", reason="the extra `docs` is not installed")
ASSETS = ("link", "script", "img", "source", "iframe", "object", "embed")


class Page(HTMLParser):
    """What a page links to, what it loads, and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.assets: list[str] = []
        self.anchors: set[str] = set()
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.anchors |= {value for name in ("id", "name") if (value := given.get(name))}
        target = given.get("href") or given.get("src")
        # what a page says of itself is not loaded
        if target and given.get("rel") not in ("canonical", "next", "prev"):
            (self.assets if tag in ASSETS else self.links).append(target)


@pytest.fixture(scope="module")
def links(repository: Path) -> ModuleType:
    """Return docs/links.py, which lies in no package."""
    spec = importlib.util.spec_from_file_location("links", repository / "docs" / "links.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def site(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Build the site with warnings as errors (not quietly: then mkdocs counts none) and return its pages."""
    out = tmp_path_factory.mktemp("site")
    # no proxy that leads anywhere: what asked for a network would fail
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "HTTPS_PROXY": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return {path: Page(path) for path in sorted(out.rglob("*.html"))}


def test_every_link_inside_leads_somewhere(site: dict[Path, Page]) -> None:
    dead = []
    for path, page in site.items():
        # the page of what is not found is shown anywhere, so its links are absolute
        for link in [*page.links, *page.assets] if path.name != "404.html" else []:
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            if not target.is_file():
                dead.append(f"{path.name}: {link}")
            elif parts.fragment and target in site and unquote(parts.fragment) not in site[target].anchors:
                dead.append(f"{path.name}: {link} has no such anchor")
    assert dead == []


def test_links_outside_are_well_formed(site: dict[Path, Page], links: ModuleType) -> None:
    outside = sorted({link for page in site.values() for link in page.links if urlsplit(link).scheme})
    assert len(outside) > 20
    assert {link: words for link in outside if (words := links.complain(link))} == {}


def test_addresses_of_the_repository_are_well_formed(
    links: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if not (repository / ".git").exists():
        pytest.skip("no git here: what belongs to the repository is not known")
    assert links.main() == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert out.count("https://arxiv.org/abs/") > 20 and "modmoe/conversion/upcycle.py" in out


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://arxiv.org/abs/2110.01786", "not https"),
        ("https://localhost/x", "no host"),
        ("https://hf.co/docs", "is huggingface.co now"),
        ("https://pytorch.org/docs/stable", "is docs.pytorch.org now"),
        ("https://arxiv.org/pdf/2110.01786", "not of the form"),
        ("https://arxiv.org/abs/2113.01786", "not of the form"),
        ("https://github.com/huggingface", "names no repository"),
        ("https://example.org/a).", "ends in"),
    ],
)
def test_a_bad_address_is_told(url: str, words: str, links: ModuleType) -> None:
    assert words in links.complain(url)


def test_nothing_is_loaded_from_a_network(site: dict[Path, Page]) -> None:
    assert {asset for page in site.values() for asset in page.assets if urlsplit(asset).netloc} == set()
    styles = [path.read_text(encoding="utf-8") for path in next(iter(site)).parent.rglob("*.css")]
    assert styles and not any(re.search(r"(@import|url\()[\"'\s]*(https?:)?//", style) for style in styles)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_has_a_page(method: str, site: dict[Path, Page]) -> None:
    text = next(page.text for path, page in site.items() if path.parts[-2:] == ("adapters", f"{method}.html"))
    for words in (
        "<strong>source</strong>",
        "<strong>cost</strong>",
        'id="equations"',
        'id="when-to-use-it"',
        f"<code>{method}</code>",
    ):
        assert words in text, words
    assert METHODS[method].adapter.__doc__ in text
    assert all(f"<code>{item.name}</code>" in text for item in fields(METHODS[method].settings))


@pytest.mark.parametrize("method", [method for method in CONVERSIONS if method != "adapters"])
def test_a_conversion_has_a_page(method: str, site: dict[Path, Page]) -> None:
    text = next(page.text for path, page in site.items() if path.parts[-2:] == ("conversions", f"{method}.html"))
    for words in ("<strong>source</strong>", 'id="when-to-use-it"', 'id="the-method"', 'id="cost"'):
        assert words in text, words


def test_reference_has_all_that_is_public(site: dict[Path, Page]) -> None:
    python = next(page for path, page in site.items() if path.parts[-2:] == ("reference", "python.html"))
    assert set(modmoe.__all__) - {"__version__", "ModmoeError", "Recipe"} <= python.anchors
    assert all(f"<code>{keyword}</code>" in python.text for step in KEYWORDS.values() for keyword in step)
    commands = next(page for path, page in site.items() if path.parts[-2:] == ("reference", "cli.html"))
    assert {"modmoe-convert", "modmoe-doctor", "modmoe-recipes-cp"} <= commands.anchors
    assert "<code>--distill-from</code>" in commands.text
