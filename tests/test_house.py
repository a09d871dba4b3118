"""The house: imports go downwards, no files import each other in a circle, and CONTRIBUTING.md shows what there is."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

from tests.support import house


def test_no_files_import_each_other_in_a_circle() -> None:
    files = house.sources()
    graph = {module: house.imports(module, files) for module in files}
    assert house.circles(graph) == []
    # which would see one
    graph["modmoe.errors"] = {"modmoe.storage.checkpoint"}
    assert any("modmoe.errors" in circle for circle in house.circles(graph))


def test_an_import_goes_only_downwards(repository: Path) -> None:
    """Inside functions and for types too, in the order that ``make imports`` has."""
    settings = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    contract = settings["tool"]["importlinter"]["contracts"][0]
    rank = {name: number for number, layer in enumerate(contract["layers"]) for name in layer.split(" | ")}
    files = house.sources()
    upward = []
    for module in files:
        here = module.split(".")[1:2]
        for other in house.imports(module, files):
            there = other.split(".")[1:2]
            if here and (not there or rank[there[0]] < rank[here[0]]):
                upward.append(f"{module} -> {other}")
    assert upward == []


def test_the_tree_is_the_one_that_contributing_shows(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert f"```text\n{house.tree()}```" in text, "put there what `python -m tests.support.house tree` prints"
    assert all(" " in line.strip() for line in house.tree().splitlines()[1:]), "a file has no docstring"


def test_tables_lie_where_contributing_says(repository: Path) -> None:
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = re.findall(r"`([A-Z_]+)` (?:in|of) `([\w/]+\.py)`", text)
    assert len(rows) >= 8
    for table, named in rows:
        files = [file for file in (repository / "modmoe").rglob("*.py") if str(file).endswith(f"/{named}")]
        assert any(re.search(rf"(?m)^{table}\b", file.read_text(encoding="utf-8")) for file in files), (table, named)


def test_a_conversion_is_told_by_its_row_alone() -> None:
    """No other file compares a recipe's method with a name."""
    compared = re.compile(r"recipe\.method\s*(?:==|!=|in\b|not in\b)")
    found = {
        module: compared.findall(file.read_text(encoding="utf-8"))
        for module, file in house.sources().items()
        if module != "modmoe.conversion.table"
    }
    assert {module: lines for module, lines in found.items() if lines} == {}


_FFN_NAMES = re.compile(
    r"gate_up|(?:gate|up|down)_proj|\bc_(?:fc|proj)\b|\bfc[12]\b|dense_\w+_to_\w+"
    # a name that is put together from a role; those of the attention are no FFN's
    r"|(?<!self_attn\.)\{\w+\}_proj"
    r"|\.(?:is_)?(?:fused|transposed)\b"
)
_MAY_NAME_FFNS = {
    "modmoe.models.ffn_layout": "it interprets them",
    "modmoe.models.families": "its rows say where they lie",
    "modmoe.modeling": "is copied beside exported weights, and names the layers that it defines itself",
    "modmoe.adapters.methods": "is copied too, and finds the layers that it hooks by transformers' names for them",
    "modmoe.adapters.mechanism.targets": "is copied too, and measures the fused experts of a model in memory",
    "modmoe.storage.kinds.quantized": "lies below, and tells weights by the ends of their names without reading one",
    "modmoe.training.trainable": "tells PEFT how a model in memory stores its weights",
}
"""Files, and folders of them, with the reason why."""


def test_tensors_of_ffns_are_interpreted_in_one_file() -> None:
    """No other file spells their names, or asks a family whether they are fused or transposed."""
    naming = {
        module: sorted(set(found))
        for module, file in house.sources().items()
        if (found := _FFN_NAMES.findall(file.read_text(encoding="utf-8")))
    }
    held = {module: place for module in naming for place in _MAY_NAME_FFNS if f"{module}.".startswith(f"{place}.")}
    assert {module: words for module, words in naming.items() if module not in held} == {}
    assert set(held.values()) == set(_MAY_NAME_FFNS), "an exception that nothing needs any more"
    # which would see these
    for line in ('f"{prefix}up_proj.weight"', 'f"{stored}{role}_proj.weight"', "family.fused", "layout.is_transposed"):
        assert _FFN_NAMES.search(line), line


_PUBLIC = "its keywords are the command line's options, named one by one"
_PASSED_ON = "it takes the options of a public function one by one, all of them by keyword"
MANY_PARAMETERS = {
    "modmoe.api.convert": _PUBLIC,
    "modmoe.api.finetune": _PUBLIC,
    "modmoe.api.export": _PUBLIC,
    "modmoe.api.evaluate": _PUBLIC,
    "modmoe.exports.converted.export": _PASSED_ON,
    "modmoe.exports.adapters.export_adapter": _PASSED_ON,
    "modmoe.training.evaluation.lm_eval.evaluate_harness": _PASSED_ON,
    "modmoe.training.evaluation.task_loss.evaluate": _PASSED_ON,
    "modmoe.training.evaluation.task_loss.evaluate_model": _PASSED_ON,
    "modmoe.reports.report.write_report": "each keyword is a part of the page, and most pages lack some",
    "modmoe.formats.proof.verify.verify": "each keyword is one way in which an export differs from its source",
    "modmoe.training.data.training_set": "each keyword is a choice of how rows become sequences",
    "modmoe.analysis.text.calibration.token_batches": "each keyword is a choice of how rows become batches",
    "modmoe.conversion.modular.routers.start_routers": "five are what is known of the layers, one of each a layer",
    "modmoe.analysis.routing._note": "it is the body of a hook, and has all that the hook has seen",
    "modmoe.modeling.ways_modmoe.gather_token": "it is compiled, and takes tensors alone",
}
"""Functions of more than eight parameters, and why they have so many."""


def test_a_function_fits_a_screen_or_says_why() -> None:
    assert house.long_functions() == []
    assert sorted(house.wide_functions()) == sorted(MANY_PARAMETERS)
