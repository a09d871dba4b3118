"""The model card of an export: what it is, how to load it in three lines, how large it is, what was measured."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from modmoe.formats.card.head import head, results_of
from modmoe.formats.card.plot import PLOT, draw_experts
from modmoe.formats.dense import source_of
from modmoe.formats.pushed_files import CARD, PLACEHOLDER, hub_id
from modmoe.models.counts import read_experts
from modmoe.models.inspection import inspect
from modmoe.models.loading import is_tied
from modmoe.storage.checkpoint import Checkpoint

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~$])")
_NAMED_EXPERTS = 12


def write_card(directory: Path, result: dict[str, Any], tied: Checkpoint) -> None:
    """Write README.md beside an export, and the picture of the experts that it shows.

    Args:
        directory: the export.
        result: what ``modmoe.exports.converted.export`` returns.
        tied: the model that was exported.
    """
    named = source_of(tied.directory)
    # a path on somebody's disk is no name that a reader could use
    base = hub_id(named)
    has_code = any(directory.glob("*.py"))
    # one expert alone is another model than the one that was measured
    results = {} if result["form"] == "dense" else results_of(tied.directory)
    data = head(
        f"{result['target']} by modmoe",
        base=base,
        relation="finetune",
        library="transformers",
        tags=["modmoe", *(["moe"] if result["form"] != "dense" else []), *(["custom_code"] if has_code else [])],
        sources=[tied.directory, *([Path(named)] if named and not base else [])],
        results=results,
    )
    body = "\n".join(
        [
            *_opening(result, tied.config, base),
            *_use(directory, result, tied.config, has_code),
            *_account(directory, result, tied),
            *_picture(directory, result, tied),
            *result_lines(results),
            *proof_lines(result),
        ]
    )
    save(directory, data.to_yaml(), body)


def save(directory: Path, data: str, body: str) -> None:
    """Write README.md from its YAML head and its text."""
    ModelCard(f"---\n{data}\n---\n\n{body}\n").save(directory / CARD)


def escape(text: Any) -> str:
    """Return ``text`` on one line, with nothing in it that Markdown or HTML would act on."""
    plain = "".join(character if character.isprintable() else " " for character in str(text))
    return _SPECIAL.sub(r"\\\1", " ".join(plain.split()).replace("&", "&amp;"))


def table(rows: Sequence[tuple[str, Any]]) -> list[str]:
    """Return a section with a table of two columns, its words escaped."""
    lines = [f"| {escape(key)} | {escape(value)} |" for key, value in rows]
    return ["## What it is", "", "| | |", "|---|---|", *lines, ""]


def result_lines(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Return a section with what was measured of each task; nothing where nothing was."""
    measures = [
        measure
        for measure in ("loss", "perplexity", "bits_per_byte", "exact_match")
        if any(isinstance(numbers.get(measure), int | float) for numbers in results.values())
    ]
    if not measures:
        return []
    lines = ["## What was measured", "", f"| task | {' | '.join(m.replace('_', ' ') for m in measures)} |"]
    lines += ["|---" * (len(measures) + 1) + "|"]
    for task, numbers in results.items():
        cells = [numbers.get(measure) for measure in measures]
        words = [f"{cell:.4g}" if isinstance(cell, int | float) else "" for cell in cells]
        lines.append(f"| {escape(task)} | {' | '.join(words)} |")
    return [*lines, "", "Before the export; losses in nats a token.", ""]


def _opening(result: dict[str, Any], tied: dict[str, Any], base: str | None) -> list[str]:
    origin = escape(base) if base else f"a dense {escape((tied.get('dense_config') or {}).get('model_type'))} model"
    what = {
        "tied": "A mixture of experts whose experts share modules: every module is stored once.",
        "native": f"A mixture of experts in the {escape(result['target'])} architecture, with each expert's own copy.",
        "packed": "A mixture of experts for engines: every module is an expert of its own, stored once, and the router "
        "chooses modules. It follows the published contract of vLLM's and SGLang's Transformers backends: contract "
        "tested, engines not run. Anywhere else the tied form of the same model is faster.",
        "dense": f"A dense model: the expert {escape(result['expert'])} of a mixture of experts, alone.",
    }[result["form"]]
    return [f"# {escape(result['target'])} by modmoe", "", f"{what} Made from {origin} with modmoe.", ""]


def _use(directory: Path, result: dict[str, Any], tied: dict[str, Any], has_code: bool) -> list[str]:
    config = Checkpoint(directory).config
    lines = ["## Use", "", "```python", *load_lines(has_code), "```", ""]
    if result["form"] == "packed":
        lines += ["```sh", f"vllm serve {PLACEHOLDER} --trust-remote-code", "```", ""]
        if config.get("default_expert") is not None:
            lines += [
                f"Every token goes to the expert {escape(config['default_expert'])}; another is chosen at the start:"
            ]
            lines += ['`--hf-overrides \'{"default_expert": "NAME"}\'`.', ""]
    experts: list[str] = list(tied.get("expert_names") or [])
    if result["form"] == "tied" and tied.get("routing") == "task" and experts:
        lines += [
            f"Name the expert before use: `model.set_expert({_literal(config.get('default_expert') or experts[0])})`."
        ]
        lines += [""]
    return lines


def load_lines(has_code: bool) -> list[str]:
    """Return the three lines of Python that load a model and its tokenizer."""
    trust = ", trust_remote_code=True" if has_code else ""
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("{PLACEHOLDER}"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("{PLACEHOLDER}"{trust})',
    ]


def _account(directory: Path, result: dict[str, Any], tied: Checkpoint) -> list[str]:
    """Return the table of what the export and the model that it was made from hold."""
    found, whole = inspect(str(directory)), inspect(str(tied.directory))
    stored, dense = found["parameters"]["stored"], whole["parameters"].get("dense")
    rows: list[tuple[str, Any]] = [("parameters, stored", f"{stored:,}")]
    rows.append(("parameters, active a token", f"{found['parameters']['active']:,}"))
    if result["form"] in ("tied", "packed"):
        materialised = whole["parameters"]["materialised"]
        rows.append(("parameters, if every expert had its own copy", f"{materialised:,}"))
    if dense is not None:
        rows.append(("parameters of the dense model", f"{dense:,}"))
    rows.append(("bytes", f"{result['bytes_after']:,} (tied: {result['bytes_before']:,})"))
    rows.append(("dtype", result["dtype"]))
    sparsity = _dense_sparsity(found, whole, tied.config, result) if result["form"] == "dense" else whole["sparsity"]
    if sparsity is not None:
        rows.append(("FFN neurons of the dense model that a token leaves out", f"{sparsity['ffn']:.1%}"))
        rows.append(("parameters of the dense model that a token leaves out", f"{sparsity['total']:.1%}"))
    if result["form"] != "dense":
        config = tied.config
        names = list(config.get("expert_names") or [])
        # names of many are numbers, and a list of them says less than how many they are
        is_short = 0 < len(names) <= _NAMED_EXPERTS
        rows += [("experts", ", ".join(names) if is_short else whole["num_experts"])]
        rows += [("chosen at once", config.get("num_experts_per_tok"))]
        rows += [("routing", config.get("routing")), ("modules of an expert", config.get("modules_per_expert"))]
    return table(rows)


def _dense_sparsity(
    found: dict[str, Any], whole: dict[str, Any], tied: dict[str, Any], result: dict[str, Any]
) -> dict[str, float] | None:
    used = {expert["name"]: expert["modules_used"] for expert in whole["experts"]}.get(result["expert"])
    neurons, dense = tied.get("dense_intermediate_size"), whole["parameters"].get("dense")
    if used is None or not neurons or not dense:
        return None
    return {"ffn": 1 - used * tied["module_size"] / neurons, "total": 1 - found["parameters"]["active"] / dense}


def _picture(directory: Path, result: dict[str, Any], tied: Checkpoint) -> list[str]:
    """Draw which modules each expert has, and return the lines that show it; nothing for one expert alone."""
    if result["form"] == "dense" or not is_tied(tied.directory):
        return []
    layers = read_experts(tied)
    draw_experts(directory / PLOT, layers, [str(name) for name in tied.config.get("expert_names") or []])
    said = f"Which of the stored modules each of the {len(layers[0])} experts has, in each of the {len(layers)} layers"
    return [f"![{said}]({PLOT})", ""]


def proof_lines(result: Mapping[str, Any]) -> list[str]:
    """Return what was proved when the export was written, in one sentence."""
    verified = result["verified"]
    if verified is None:
        return ["The export was not checked by reloading."]
    tool = "transformers alone" if verified["reloaded_without_modmoe"] else "peft"
    return [
        f"Checked when it was written: reloaded with {tool}, its logits differ from the source's by at most "
        f"{verified['max_abs_logit_diff']:.2g}."
    ]


def _literal(name: str) -> str:
    """Return a name as a Python string that cannot end the code span it stands in."""
    return repr(name).replace("`", "\\x60")
