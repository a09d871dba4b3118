"""The model card of an exported adapter: alone, with its base model, or folded into it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from modmoe.checkpoint import read_config
from modmoe.export.card import escape, proof_lines

_WHAT = {
    "adapter": "A routed adapter ({method}) for {origin}, as PEFT saves it.",
    "tied": "{Origin} with a routed adapter ({method}), in one checkpoint with the code that runs it.",
    "native": "{Origin} with a routed adapter ({method}), its experts written out in the {target} architecture.",
    "dense": "{Origin} with a routed adapter ({method}) folded into its weights.",
}


def write_adapter_card(directory: Path, result: Mapping[str, Any], config: Mapping[str, Any], base: Path) -> None:
    """Write README.md beside an export.

    Args:
        directory: the export.
        result: what ``modmoe.export.run.export`` returns.
        config: the adapter's adapter_config.json.
        base: the directory of its base model.
    """
    named = str(config.get("base_model_name_or_path"))
    # a path on somebody's disk is no name that a reader could use
    is_hub_id = re.fullmatch(r"[\w.-]+/[\w.-]+", named) is not None and not Path(named).exists()
    form = result["form"]
    has_code = form == "tied" or any(directory.glob("*.py"))
    tags = ["modmoe", "peft", *(["moe"] if form == "native" else []), *(["custom_code"] if has_code else [])]
    data = ModelCardData(
        base_model=named if is_hub_id else None,
        base_model_relation=("adapter" if form == "adapter" else "finetune") if is_hub_id else None,
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
    )
    origin = escape(named) if is_hub_id else f"a {escape(read_config(base).get('model_type'))} model"
    words = {"method": escape(result["method"]), "target": escape(result["target"])}
    what = _WHAT[form].format(origin=origin, Origin=origin[0].upper() + origin[1:], **words)
    lines = [f"# {escape(result['target'])} by modmoe", "", f"{what} Made with modmoe.", "", "## Use", "", "```python"]
    lines += _use(form, named if is_hub_id else "PATH_OR_REPO_OF_THE_BASE_MODEL", has_code)
    lines += ["```", "", *_table(result, config), *proof_lines(result)]
    body = "\n".join(lines)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n").save(directory / "README.md")


def _use(form: str, base: str, has_code: bool) -> list[str]:
    trust = ", trust_remote_code=True" if has_code and form != "adapter" else ""
    if form == "adapter":
        return [
            "import modmoe.adapters  # pip install modmoe: makes the method known to peft",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            'model = PeftModel.from_pretrained(base, "PATH_OR_REPO")',
            'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO")',
        ]
    return [
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f'model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPO"{trust})',
        f'tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPO"{trust})',
    ]


def _table(result: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    rows: list[tuple[str, Any]] = [("method", result["method"])]
    for key in ("num_experts", "top_k", "r", "lora_alpha"):
        if config.get(key) is not None:
            rows.append((key, config[key]))
    targets = config.get("target_modules")
    if targets:
        rows.append(("attached to", targets if isinstance(targets, str) else ", ".join(map(str, targets))))
    rows.append(("bytes", f"{result['bytes_after']:,} (base model and adapter: {result['bytes_before']:,})"))
    rows.append(("dtype", result["dtype"] + (" (the adapter: float32)" if result["form"] == "tied" else "")))
    folding = result.get("folding")
    if folding is not None and folding["kind"] == "approximate":
        rows.append(("logits moved by folding, mean", f"{folding['mean_abs_logit_diff']:.3g}"))
        rows.append(("logits moved by folding, at most", f"{folding['max_abs_logit_diff']:.3g}"))
    for name, task in (result.get("tasks") or {}).items():
        rows.append((f"loss on {name}", f"{task['after']:.4f} (before folding: {task['before']:.4f})"))
    table = [f"| {escape(key)} | {escape(value)} |" for key, value in rows]
    return ["## What it is", "", "| | |", "|---|---|", *table, ""]
