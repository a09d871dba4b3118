"""The model card of an export: what it is, how to load it in three lines, how large it is, what was proved."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from modmoe.checkpoint import Checkpoint
from modmoe.export.dense import source_of
from modmoe.inspection import inspect

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+!|<>~$])")


def write_card(directory: Path, result: dict[str, Any], tied: Checkpoint) -> None:
    """Write README.md beside an export.

    Args:
        directory: the export.
        result: what ``modmoe.export.run.export`` returns.
        tied: the model that was exported.
    """
    base = source_of(tied.directory)
    # a path on somebody's disk is no name that a reader could use
    is_hub_id = base is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", base) is not None and not Path(base).exists()
    has_code = any(directory.glob("*.py"))
    tags = ["modmoe", *(["moe"] if result["form"] != "dense" else []), *(["custom_code"] if has_code else [])]
    data = ModelCardData(
        base_model=base if is_hub_id else None,
        base_model_relation="finetune" if is_hub_id else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    body = "\n".join(_body(directory, result, tied.config, base if is_hub_id else None, has_code))
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(directory / "README.md")


def escape(text: Any) -> str:
    """Return ``text`` on one line, with nothing in it that Markdown or HTML would act on."""
    plain = "".join(character if character.isprintable() else " " for character in str(text))
    return _SPECIAL.sub(r"\\\1", " ".join(plain.split()).replace("&", "&amp;"))


def _body(directory: Path, result: dict[str, Any], tied: dict[str, Any], base: str | None, has_code: bool) -> list[str]:
    config = Checkpoint(directory).config
    origin = escape(base) if base else f"a dense {escape((tied.get('dense_config') or {}).get('model_type'))} model"
    what = {
        "tied": "A mixture of experts whose experts share modules: every module is stored once.",
        "native": f"A mixture of experts in the {escape(result['target'])} architecture, with each expert's own copy.",
        "packed": "A mixture of experts for engines: every module is an expert of its own, stored once, and the router "
        "chooses modules. It follows the published contract of vLLM's and SGLang's Transformers backends: contract "
        "tested, engines not run. Anywhere else the tied form of the same model is faster.",
        "dense": f"A dense model: the expert {escape(result['expert'])} of a mixture of experts, alone.",
    }[result["form"]]
    lines = [f"# {escape(result['target'])} by modmoe", "", f"{what} Made from {origin} with modmoe.", ""]
    lines += ["## Use", "", "```python", "from transformers import AutoModelForCausalLM, AutoTokenizer"]
    trust = ", trust_remote_code=True" if has_code else ""
    lines += [f'model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO"{trust})']
    lines += [f'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO"{trust})', "```", ""]
    if result["form"] == "packed":
        lines += ["```sh", "vllm serve PATH_OR_REPO --trust-remote-code", "```", ""]
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
    return lines + _table(directory, result, tied, experts) + proof_lines(result)


def _table(directory: Path, result: dict[str, Any], tied: dict[str, Any], experts: list[str]) -> list[str]:
    found = inspect(str(directory))
    rows: list[tuple[str, Any]] = [
        (f"parameters, {kind}", f"{found['parameters'][kind]:,}")
        for kind in ("stored", "active")
        if found["parameters"].get(kind) is not None
    ]
    rows.append(("bytes", f"{result['bytes_after']:,} (tied: {result['bytes_before']:,})"))
    rows.append(("dtype", result["dtype"]))
    if result["form"] != "dense":
        rows += [("experts", ", ".join(experts)), ("chosen at once", tied.get("num_experts_per_tok"))]
        rows += [("routing", tied.get("routing")), ("modules of an expert", tied.get("modules_per_expert"))]
    return ["## What it is", "", "| | |", "|---|---|", *(f"| {key} | {escape(value)} |" for key, value in rows), ""]


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
