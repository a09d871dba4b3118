"""The report is one file, complete in itself, whatever strings and shapes it is given."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from modmoe.analysis.run import Analysis, analyze_source
from modmoe.analysis.source import open_source
from modmoe.conversion.modular.steps import make_assignments
from modmoe.recipe.schema import Recipe, make_recipe
from modmoe.reports import page as parts
from modmoe.reports import plots
from modmoe.reports.report import order_modules, write_report
from modmoe.reports.routed import most_telling
from modmoe.reports.routed import text as coloured_text
from modmoe.reports.script import SCRIPT
from modmoe.runtime.progress import silent
from tests.support.reports import NASTY, analysed, full_report, routed_view, summary

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


def write(path: Path, made: tuple[Recipe, Analysis], **options: Any) -> Page:
    write_report(path, *made, **options)
    return Page(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Analysis]:
    return analysed(tmp_path_factory)


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    text = full_report(tmp_path_factory).read_text(encoding="utf-8")
    return text, Page(text)


def test_the_page_is_well_formed_and_asks_for_nothing(full: tuple[str, Page]) -> None:
    text, page = full
    assert page.open == []
    for name, attributes in page.tags:
        for key in ("src", "href", "xlink:href", "data", "srcset"):
            value = attributes.get(key)
            assert value is None or value.startswith(("#", "data:")), f"<{name} {key}={value}>"
    assert not {"iframe", "object", "embed", "base", "form"} & {name for name, _ in page.tags}
    assert text.count("http:") + text.count("https:") == text.count('="http://www.w3.org/')  # names, not places
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_no_string_becomes_markup(full: tuple[str, Page]) -> None:
    text, page = full
    assert text.count("<script") == 1 and text.count(f"<script>{SCRIPT}</script>") == 1
    assert page.text.count("alert('x')") >= 5
    attributes = [value or "" for _, found in page.tags for value in found.values()]
    assert sum("alert('x')" in value for value in attributes) >= 5
    assert not any(name.startswith("on") for _, found in page.tags for name in found)


def test_only_the_page_s_own_script_may_run(full: tuple[str, Page]) -> None:
    _, page = full
    policy = next(meta["content"] or "" for meta in page.all("meta") if "http-equiv" in meta)
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not {"fetch", "XMLHttpRequest", "innerHTML", "import"} & set(re.findall(r"\w+", SCRIPT))


def test_ids_are_unique_and_all_that_is_referred_to_is_there(full: tuple[str, Page]) -> None:
    text, page = full
    counts = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert max(counts.values()) == 1
    assert set(re.findall(r'(?:url\(#|href="#)([^")]+)', text)) <= set(counts)


def test_plots_and_tables_say_what_they_are(full: tuple[str, Page]) -> None:
    _, page = full
    plots_found, names = page.all("svg"), [name for name, _ in page.tags]
    assert len(plots_found) == 10  # bars, losses, six over the layers, and one a layer
    assert all(plot["role"] == "img" and len(plot["aria-label"] or "") > 20 for plot in plots_found)
    assert names.count("table") == names.count("caption") == names.count("thead")
    assert names.count("figure") == names.count("figcaption")
    assert names.count("details") == 5  # two layers and the values of each, and the recipe


def test_headings_go_down_one_by_one_and_the_contents_lead_to_them(full: tuple[str, Page]) -> None:
    _, page = full
    levels = [int(name[1]) for name, _ in page.tags if re.fullmatch("h[1-6]", name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    places = [attributes["id"] for name, attributes in page.tags if name == "h2"]
    assert [link["href"] for link in page.all("a")] == [f"#{place}" for place in places] and len(places) == 8


def test_cells_of_heads_have_a_scope_and_tables_that_scroll_a_name(full: tuple[str, Page]) -> None:
    _, page = full
    assert {head.get("scope") for head in page.all("th")} == {"col", "row"}
    regions = [found for found in page.all("div") if found.get("class") == "scroll"]
    assert regions and all(found["role"] == "region" and found["aria-label"] for found in regions)


def test_every_control_has_a_label_and_is_out_of_sight_without_the_script(full: tuple[str, Page]) -> None:
    text, page = full
    found = re.findall(r'<div class="pick" hidden><label>([^<]+)<select', text)
    assert found == ["Layer", "Layer of the colours", "Task"] and len(page.all("select")) == 3
    assert not {"button", "input", "textarea"} & {name for name, _ in page.tags}


def test_what_a_plot_tells_fits_its_cells(full: tuple[str, Page]) -> None:
    _, page = full
    told = [mark for plot in page.all("svg") for mark in json.loads(plot.get("data-marks") or "[]")]
    assert len(told) >= 12
    for mark in told:
        assert [len(row) for row in mark["words"]] == [len(mark["columns"])] * len(mark["rows"])
        x, y, wide, high = mark["box"]
        assert 0 <= x < x + wide <= 1.001 and 0 <= y < y + high <= 1.001
    words = [cell for mark in told for row in mark["words"] for cell in row]
    assert "FFN sparsity 50, output kept 87.5" in words and "of one token 75, of all together 100" in words


def test_tokens_are_in_order_and_have_the_colour_of_their_expert(full: tuple[str, Page]) -> None:
    text, page = full
    boxes = [found for found in page.all("div") if found.get("class") == "tokens"]
    assert len(boxes) == 3
    choices_LT, names = json.loads(boxes[0]["data-choices"] or ""), json.loads(boxes[0]["data-names"] or "")
    assert names == [NASTY, "計算", "c"]
    view = routed_view(["sums", "words", "code"])
    assert choices_LT == view.samples[0].ids_LTK[:, :, 0].tolist()
    shown = most_telling(view)
    spans = re.findall(r'<span class="e(\d)" title="', text.split('class="tokens"')[1].split("</div>")[0])
    assert [int(number) for number in spans] == choices_LT[shown]
    assert "Of 9 tokens in layer" in page.text


def test_where_many_are_chosen_the_colour_is_how_rare_they_are(tmp_path: Path, made: tuple[Recipe, Analysis]) -> None:
    view = routed_view(list(made[1].batches), chosen=4, experts=9)
    names = [f"module {number}" for number in range(9)]
    page = Page(parts.page("x", coloured_text(view, names)))
    levels = json.loads(next(found["data-choices"] or "" for found in page.all("div") if "data-choices" in found))
    assert {level for level_T in levels for level in level_T} <= set(range(parts.SHADES))
    assert max(levels[0]) == parts.SHADES - 1 and min(levels[0]) == 0
    assert "chooses 4 of 9" in page.text


def test_the_layer_shown_first_tells_the_tasks_apart() -> None:
    view = routed_view(["a", "b", "c"])
    chosen_LPE = torch.full((3, 3, 3), 1 / 3)
    chosen_LPE[1] = torch.eye(3)
    chosen_LPE[2] = torch.tensor([1.0, 0, 0])  # one expert for everything tells nothing
    assert most_telling(replace(view, chosen_LPE=chosen_LPE)) == 1


def test_after_fine_tuning_its_routers_are_shown_beside_those_of_before(
    tmp_path: Path, made: tuple[Recipe, Analysis]
) -> None:
    before = routed_view(list(made[1].batches))
    samples = tuple(replace(sample, ids_LTK=2 - sample.ids_LTK) for sample in before.samples)
    after = replace(
        before,
        chosen_LPE=before.chosen_LPE.flip(2),
        used_LPM=1 - before.used_LPM,
        certainty_L=torch.tensor([0.125, 0.5]),
        kept_LQ=before.kept_LQ / 7,
        samples=samples,
    )
    named = make_assignments(*made)
    page = write(tmp_path / "a.html", made, assignments=named, summary=summary(), routing=before, tuned=after)
    first, last = (round(100 * float(before.chosen_LPE[0, 0, expert])) for expert in (0, 2))
    assert f"{first} → {last}" in page.text and "as converted → fine-tuned" in page.text
    assert "Fine-tuned, it lies in" in page.text and "router as converted agrees" in page.text
    box = next(found for found in page.all("div") if found.get("class") == "tokens")
    assert json.loads(box["data-choices"] or "") == samples[0].ids_LTK[:, :, 0].tolist()
    spoken = " ".join(str(found.get("aria-label")) for found in page.all("svg"))
    assert "of one token 12.5, 50;" in spoken and "As converted: of one token 25, 75;" in spoken
    assert "output kept 62.5, 87.5" in spoken  # of the conversion
    used = [f"{100 * value:.0f} %" for value in after.used_LPM[0, 0].sort().values]
    cells = re.findall(r"<td>(\d+ %)</td>", (tmp_path / "a.html").read_text(encoding="utf-8"))
    assert set(used) <= set(cells)


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
        usage_PM=torch.rand(8, 64, generator=draw).double().numpy(),
    )
    assert 32 * len(plots.draw_modules("l0", "Layer 0.", view)) < 3_000_000


def test_modules_are_ordered_by_who_has_them() -> None:
    member_EM = torch.tensor([[1, 0, 1, 1, 0], [0, 1, 1, 1, 0]]).bool()
    scores_PM = torch.tensor([[5.0, 0.1, 1.0, 9.0, 0.0], [0.1, 5.0, 1.0, 9.0, 0.0]])
    assignment = SimpleNamespace(membership_EM=member_EM, expert_names=("a", "b"))
    assert order_modules(scores_PM, assignment) == [3, 2, 0, 1, 4]
    assert order_modules(scores_PM, None)[0] in (0, 3)
