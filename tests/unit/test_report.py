"""The report is one file, complete in itself, whatever strings and shapes it is given."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modmoe.analyze import plots
from modmoe.analyze.report import order_modules, write_report
from modmoe.analyze.run import Analysis, analyze_source, open_source, silent
from modmoe.convert.run import make_assignments
from modmoe.recipe import Recipe, make_recipe
from tests import tiny

NASTY = "<script>alert('x')</script>&\"]]>"
VOID = {"meta", "link", "br", "hr", "img", "path", "use", "image", "rect", "circle", "line", "stop"}


class Page(HTMLParser):
    """What a browser would find in the page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Analysis]:
    folder = tmp_path_factory.mktemp("report")
    dense = tiny.save_dense(folder / "dense")
    recipe = make_recipe(
        {
            "source": str(dense),
            "tasks": tiny.write_tasks(folder / "tasks"),
            "calibration.tokens": 400,
            "calibration.sequence_length": 32,
            "partition.num_modules": 8,
        }
    )
    return recipe, analyze_source(recipe, open_source(recipe), silent)


def summary() -> dict[str, Any]:
    return {
        "output": NASTY,
        "parameters": {"dense": 1000, "stored": 900, "active": 700, "materialised": 1500},
        "sparsity": {"ffn": 0.5, "total": 0.3},
        "tensor_bytes": 3600,
        "routers": [{"agreement": 0.7, "chance": 0.4}] * 2,
    }


def write(path: Path, made: tuple[Recipe, Analysis], **options: Any) -> Page:
    write_report(path, *made, **options)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory, made: tuple[Recipe, Analysis]) -> tuple[str, Page]:
    recipe, analysis = made
    named = [
        SimpleNamespace(membership_EM=item.membership_EM, expert_names=(NASTY, "計算", "c"))
        for item in make_assignments(recipe, analysis)
    ]
    path = tmp_path_factory.mktemp("full") / "deep" / "report.html"
    page = write(
        path,
        made,
        assignments=named,
        summary=summary(),
        evaluation={NASTY: {"sums": 2.0, NASTY: 1.0}, "fine-tuned": {"sums": {"loss": 1.5}}},
        samples={NASTY: {"prompt": NASTY, NASTY: "one\ntwo"}},
    )
    return path.read_text(encoding="utf-8"), page


def test_the_page_is_well_formed_and_asks_for_nothing(full: tuple[str, Page]) -> None:
    text, page = full
    assert page.open == []
    for name, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "data", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), f"<{name} {key}={value}>"
    assert not {"script", "iframe", "object"} & {name for name, _ in page.tags}
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_no_string_becomes_markup(full: tuple[str, Page]) -> None:
    text, page = full
    assert "<script" not in text
    assert page.text.count("alert('x')") >= 5


def test_ids_are_unique_and_all_that_is_referred_to_is_there(full: tuple[str, Page]) -> None:
    text, page = full
    counts = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert max(counts.values()) == 1
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(counts)


def test_plots_and_tables_say_what_they_are(full: tuple[str, Page]) -> None:
    _, page = full
    plots_found, names = page.all("svg"), [name for name, _ in page.tags]
    assert len(plots_found) == 7  # bars, losses, three over the layers, and one a layer
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 20 for plot in plots_found)
    assert names.count("table") == names.count("caption") == names.count("thead")
    assert names.count("figure") == names.count("figcaption")
    assert names.count("details") == 3  # two layers and the recipe


def test_numbers_of_the_summary_are_shown(full: tuple[str, Page]) -> None:
    _, page = full
    for words in (
        "1,500",
        "150.0 %",
        "FFN sparsity is 50.0 %",
        "sparsity is 30.0 %",
        "router agrees in 70\u00a0%",
        "2.000",
    ):
        assert words in page.text
    assert "num_modules: 8" in page.text


def test_colours_of_text_are_the_page_s(full: tuple[str, Page]) -> None:
    text, _ = full
    assert "currentColor" in text and "var(--paper)" in text
    assert not re.search(r"(?:fill|stroke): ?#(?:000000|ffffff)", text)
    assert "#010203" not in text and "DejaVu Sans'" not in text


def test_without_experts_it_is_a_report_of_the_analysis(tmp_path: Path, made: tuple[Recipe, Analysis]) -> None:
    page = write(tmp_path / "a.html", made)
    assert "No experts were made." in page.text
    assert "Overlap" not in page.text and "Quality" not in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]


def test_one_task_and_routing_by_task(tmp_path: Path, made: tuple[Recipe, Analysis]) -> None:
    recipe, _ = made
    alone = make_recipe(
        {
            "source": recipe.source,
            "tasks": {"sums": recipe.tasks["sums"]},
            "calibration.tokens": 200,
            "partition.num_modules": 4,
            "router.routing": "task",
        }
    )
    analysis = analyze_source(alone, open_source(alone), silent)
    page = write(
        tmp_path / "a.html", (alone, analysis), assignments=make_assignments(alone, analysis), summary=summary()
    )
    assert "Variation between tasks" not in page.text and "router agrees" not in page.text
    assert "names the task" in page.text


def test_matplotlib_is_left_as_it_was(tmp_path: Path, made: tuple[Recipe, Analysis]) -> None:
    import matplotlib

    with matplotlib.rc_context({"font.size": 31.0, "svg.fonttype": "path", "text.color": "#ff0000"}):
        before = dict(matplotlib.rcParams)
        page = write(tmp_path / "a.html", made)
        assert dict(matplotlib.rcParams) == before
    assert page.all("svg")
    assert "#ff0000" not in (tmp_path / "a.html").read_text(encoding="utf-8")


def test_the_same_input_gives_the_same_file(tmp_path: Path, made: tuple[Recipe, Analysis]) -> None:
    write(tmp_path / "a.html", made)
    write(tmp_path / "b.html", made)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_many_layers_stay_small(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    view = plots.LayerView(
        modules=range(64),
        tasks=[f"a task of a long name {number}" for number in range(8)],
        importance_PM=torch.rand(8, 64, generator=draw).double().numpy(),
        favourite_mM=torch.randint(0, 8, (96, 64), generator=draw).numpy(),
        strength_mM=torch.rand(96, 64, generator=draw).double().numpy(),
        experts=[f"expert {number}" for number in range(8)],
        membership_EM=(torch.rand(8, 64, generator=draw) < 0.5).numpy(),
    )
    assert 32 * len(plots.draw_modules("l0", "Layer 0.", view)) < 3_000_000


def test_modules_are_ordered_by_who_has_them() -> None:
    member_EM = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 0]]).bool()
    scores_PM = torch.tensor([[5.0, 0.1, 1.0, 9.0, 0.0], [0.1, 5.0, 1.0, 9.0, 0.0]])
    assignment = SimpleNamespace(membership_EM=member_EM, expert_names=("a", "b"))
    assert order_modules(scores_PM, assignment) == [3, 2, 0, 1, 4]
    assert order_modules(scores_PM, None)[0] in (0, 3)
