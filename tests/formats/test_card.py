"""The card: a head that the Hub takes, numbers that are those of the files, and nothing of the input that acts."""

from __future__ import annotations

import json
import re
import struct

import matplotlib
import pytest
import yaml
from huggingface_hub import ModelCard

from modmoe.exports.converted import export
from modmoe.formats.card.converted import result_lines
from modmoe.formats.card.head import head, results_of
from modmoe.formats.card.plot import _GAP, PLOT, _kinds, draw_experts
from modmoe.models.counts import read_experts
from modmoe.models.inspection import inspect
from modmoe.storage.checkpoint import Checkpoint
from tests.support.export_models import write_config, write_tied
from tests.support.fake_hub_store import check_head

HOSTILE = "a`|b\n---\nevil: yes\n<script>alert(1)</script> $x^2$ [y](javascript:z) ![i](//e) {{ j }} \u202e"


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """A tied model beside its dense source, whose card has a licence."""
    source = write_tied(tmp_path_factory.mktemp("card"), "mistral")
    dense = source.parent / "dense"
    (dense / "README.md").write_text("---\nlicense: other\nlicense_name: my licence\nlicense_link: LICENSE\n---\nText")
    tasks = {"sums": "/home/someone/sums.jsonl", "talk": "hub:open/talk:en:train"}
    (source / "modmoe.yaml").write_text(yaml.safe_dump({"source": str(dense), "tasks": tasks}))
    numbers = {"loss": 1.23456789, "perplexity": 3.4, "bits_per_byte": float("nan"), "tokens_per_second": 9.0}
    (source / "modmoe_eval.json").write_text(json.dumps({"tasks": {"sums": numbers, "talk": {"loss": 2}}}))
    return source


def card_of(source, out, form, **options):
    export(str(source), str(out), form=form, verify=False, **options)
    text = (out / "README.md").read_text()
    assert check_head(text) == [], "the Hub takes it"
    return text, ModelCard.load(out / "README.md").data


def rows_of(text: str) -> dict[str, str]:
    """Return the table of what it is."""
    table = text.partition("## What it is")[2].partition("## ")[0]
    return {key: value.replace("\\", "") for key, value in re.findall(r"^\| (.+?) \| (.*) \|$", table, re.MULTILINE)}


@pytest.mark.parametrize("form", ["tied", "packed", "native", "dense"])
def test_the_head_says_where_it_came_from_and_what_was_measured(tied, tmp_path, form):
    more = {"expert": "words"} if form == "dense" else {"target": "mixtral"} if form == "native" else {}
    text, data = card_of(tied, tmp_path / "out", form, **more)
    assert (data.license, data.license_name, data.license_link) == ("other", "my licence", "LICENSE")
    assert (data.library_name, data.pipeline_tag, data.datasets) == ("transformers", "text-generation", ["open/talk"])
    assert data.base_model is None and data.get("base_model_relation") is None, "a path is no name of a model"
    if form == "dense":
        assert data.eval_results is None and "## What was measured" not in text
        return
    found = {(one.dataset_name, one.dataset_type, one.metric_type): one.metric_value for one in data.eval_results}
    expected = {("sums", "text", "loss"): 1.23457, ("sums", "text", "perplexity"): 3.4}
    assert found == {**expected, ("talk", "open/talk", "loss"): 2.0}
    assert "| sums | 1.235 | 3.4 |" in text
    for place in (str(tied.parent), "/home", "someone"):
        assert place not in text


@pytest.mark.parametrize("form", ["tied", "packed", "native", "dense"])
def test_the_table_is_that_of_the_files(tied, tmp_path, form):
    more = {"expert": "words"} if form == "dense" else {"target": "mixtral"} if form == "native" else {}
    text, _ = card_of(tied, tmp_path / "out", form, **more)
    rows, found, whole = rows_of(text), inspect(str(tmp_path / "out")), inspect(str(tied))
    assert rows["parameters, stored"] == f"{found['parameters']['stored']:,}"
    assert rows["parameters, active a token"] == f"{found['parameters']['active']:,}"
    assert rows["parameters of the dense model"] == f"{whole['parameters']['dense']:,}"
    assert rows["bytes"].startswith(f"{found['tensor_bytes']:,} ")
    copied = rows.get("parameters, if every expert had its own copy")
    assert copied == (f"{whole['parameters']['materialised']:,}" if form in ("tied", "packed") else None)
    # half of the modules, whichever expert it is
    assert rows["FFN neurons of the dense model that a token leaves out"] == "50.0%"
    left_out = 1 - found["parameters"]["active"] / whole["parameters"]["dense"]
    expected = left_out if form == "dense" else whole["sparsity"]["total"]
    assert rows["parameters of the dense model that a token leaves out"] == f"{expected:.1%}"
    assert (PLOT in text) == (tmp_path / "out" / PLOT).is_file() == (form != "dense")


def test_a_hub_id_is_named_with_its_relation(tied, tmp_path):
    recipe = (tied / "modmoe.yaml").read_text()
    (tied / "modmoe.yaml").write_text("source: someone/a-model\n")
    text, data = card_of(tied, tmp_path / "out", "tied")
    (tied / "modmoe.yaml").write_text(recipe)
    assert (data.base_model, data.get("base_model_relation")) == ("someone/a-model", "finetune")
    assert "Made from someone/a-model with modmoe" in text
    assert (tmp_path / "out" / "modmoe.yaml").read_text() == "source: someone/a-model\n"


def test_an_export_carries_no_path_in_its_recipe(tied, tmp_path):
    export(str(tied), str(tmp_path / "out"), form="tied", verify=False)
    values = yaml.safe_load((tmp_path / "out" / "modmoe.yaml").read_text())
    assert values == {"source": "dense", "tasks": {"sums": "sums.jsonl", "talk": "hub:open/talk:en:train"}}
    assert "/home/someone" in (tied / "modmoe.yaml").read_text(), "the source's own stays usable"


@pytest.mark.parametrize("form", ["tied", "packed"])
def test_nothing_of_the_input_acts(tmp_path, form):
    tied = write_tied(tmp_path, "mistral", routing="task")
    config = Checkpoint(tied).config
    config["expert_names"] = [HOSTILE, "'); import os #", "code"]
    write_config(tied, config)
    (tied / "modmoe.yaml").write_text(yaml.safe_dump({"source": HOSTILE, "tasks": {HOSTILE: f"hub:{HOSTILE}"}}))
    (tied / "modmoe_eval.json").write_text(
        json.dumps({"tasks": {HOSTILE: {"loss": 1.5}, "x": "no", "y": {"loss": "<b>"}}})
    )
    (tied / "README.md").write_text(f"---\n{yaml.safe_dump({'license': HOSTILE, 'license_link': HOSTILE})}---\n")
    text, data = card_of(tied, tmp_path / "out", form, expert=HOSTILE)
    body = text.split("\n---\n", 1)[1]
    assert data.license is None and data.license_link is None and data.base_model is None and data.datasets is None
    assert [one.dataset_name for one in data.eval_results] == [HOSTILE], "as it is, where YAML quotes it"
    assert not any(line.startswith(("evil", "---")) for line in body.splitlines())
    # what lies between backquotes is shown as it is
    assert all(len(re.findall(r"(?<!\\)`", line)) % 2 == 0 for line in body.replace("```", "").splitlines())
    shown = re.sub(r"(?<!\\)(`+).*?(?<!\\)\1", "", body, flags=re.DOTALL)
    for acts in ("<script", "[y](", "![i](", "$x", "\u202e"):
        assert not re.search(rf"(?<!\\){re.escape(acts)}", shown), acts


def test_a_result_file_that_is_none_is_passed_over(tmp_path):
    for text in ("", "[]", "{}", '{"tasks": 3}', '{"tasks": {"a": 3}}', "[" * 100_000):
        (tmp_path / "modmoe_eval.json").write_text(text)
        assert results_of(tmp_path) == {}
    (tmp_path / "modmoe_training.json").write_text('{"tasks": {"a": {"before": 2, "after": 1.5}, "b": {"before": 2}}}')
    assert results_of(tmp_path) == {"a": {"loss": 1.5}}
    (tmp_path / "modmoe_eval.json").write_text('{"tasks": {"c": {"loss": 1}}}')
    assert results_of(tmp_path) == {"c": {"loss": 1}}, "the last measurement counts"
    assert result_lines({}) == []


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ("---\nlicense: apache-2.0\n---\n", "apache-2.0"),
        ("---\r\nlicense: mit\r\n---\r\n", "mit"),
        ("---\nlicense: [mit]\n---\n", None),
        ("---\nlicense: {a\n---\n", None),
        ("license: mit", None),
    ],
)
def test_a_licence_is_taken_from_the_nearest_card(tmp_path, card, licence):
    (tmp_path / "near").mkdir()
    (tmp_path / "README.md").write_bytes(card.encode())
    data = head(
        "n",
        base=None,
        relation="finetune",
        library="transformers",
        tags=[],
        sources=[tmp_path / "near", tmp_path],
        results={},
    )
    assert data.license == licence


def test_the_picture_shows_who_has_a_module():
    kinds = _kinds([[[0, 1], [0, 2], [0, 1]], [[3], [], [0]]]).tolist()
    absent, everyone, some, alone = range(4)
    gap = [_GAP] * 4
    first = [[everyone, some, absent, absent], [everyone, absent, alone, absent], [everyone, some, absent, absent]]
    assert kinds == [*first, gap, [absent, absent, absent, alone], [absent] * 4, [alone, absent, absent, absent]]


@pytest.mark.parametrize(("layers", "experts", "modules"), [(1, 1, 1), (2, 3, 8), (48, 16, 256)])
def test_the_picture_is_of_a_size_that_a_page_takes(tmp_path, layers, experts, modules):
    before = dict(matplotlib.rcParams)
    members = [[[(e + m) % modules for m in range(modules // 2 + 1)] for e in range(experts)] for _ in range(layers)]
    draw_experts(tmp_path / "x.png", members, [HOSTILE, "文字", "code"])
    data = (tmp_path / "x.png").read_bytes()
    width, height = struct.unpack(">II", data[16:24])
    assert data.startswith(b"\x89PNG") and width == 960 and 150 < height < 1500 and len(data) < 300_000
    assert dict(matplotlib.rcParams) == before


def test_the_picture_is_of_the_tied_model(tied, tmp_path, monkeypatch):
    from modmoe.formats.card import converted

    drawn = []
    monkeypatch.setattr(converted, "draw_experts", lambda *arguments: drawn.append(arguments))
    export(str(tied), str(tmp_path / "out"), form="native", target="mixtral", verify=False)
    (_, layers, names) = drawn[0]
    assert layers == read_experts(Checkpoint(tied)) and names == ["sums", "words", "code"]
