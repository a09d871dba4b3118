"""The model card of an exported adapter: alone, with its base model, or folded into it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modmoe.formats.card.converted import escape, load_lines, proof_lines, result_lines, save, table
from modmoe.formats.card.head import head, results_of
from modmoe.formats.pushed_files import PLACEHOLDER, hub_id
from modmoe.models.inspection import inspect
from modmoe.storage.checkpoint import ADAPTER_CONFIG, read_config

_WHAT = {
    "adapter": "A routed adapter ({method}) for {origin}, as PEFT saves it.",
    "tied": "{Origin} with a routed adapter ({method}), in one checkpoint with the code that runs it.",
    "native": "{Origin} with a routed adapter ({method}), its experts written out in the {target} architecture.",
    "dense": "{Origin} with a routed adapter ({method}) folded into its weights.",
}


_ADAPTER_LINES = [
    "import modmoe.adapters  # pip install modmoe: makes the method known to peft",
    "from peft import AutoPeftModelForCausalLM",
    f'model = AutoPeftModelForCausalLM.from_pretrained("{PLACEHOLDER}")',
]
_NEEDS_BASE = [
    f"The base model is named by where it lay when this was made: write its Hub id into `{ADAPTER_CONFIG}` first.",
    "",
]


def write_adapter_card(
    directory: Path, result: Mapping[str, Any], config: Mapping[str, Any], base: Path, source: Path
) -> None:
    """Write README.md beside an export.

    Args:
        directory: the export.
        result: what ``modmoe.exports.converted.export`` returns.
        config: the adapter's adapter_config.json.
        base: the directory of its base model.
        source: the adapter's directory.
    """
    # a path on somebody's disk is no name that a reader could use
    named = hub_id(config.get("base_model_name_or_path"))
    form = result["form"]
    has_code = form == "tied" or any(directory.glob("*.py"))
    folded = {task: {"loss": item["after"]} for task, item in (result.get("tasks") or {}).items()}
    results = folded or results_of(source)
    data = head(
        f"{result['method']} by modmoe",
        base=named,
        relation="adapter" if form == "adapter" else "finetune",
        library="peft" if form == "adapter" else "transformers",
        tags=["modmoe", "peft", *(["moe"] if form == "native" else []), *(["custom_code"] if has_code else [])],
        sources=[source, base],
        results=results,
    )
    origin = escape(named) if named else f"a {escape(read_config(base).get('model_type'))} model"
    words = {"method": escape(result["method"]), "target": escape(result["target"])}
    what = _WHAT[form].format(origin=origin, Origin=origin[0].upper() + origin[1:], **words)
    lines = [f"# {escape(result['target'])} by modmoe", "", f"{what} Made with modmoe.", "", "## Use", "", "```python"]
    lines += _ADAPTER_LINES if form == "adapter" else load_lines(has_code)
    lines += [
        "```",
        "",
        *(_NEEDS_BASE if form == "adapter" and not named else []),
        *table(_rows(directory, result, config)),
    ]
    save(directory, data.to_yaml(), "\n".join([*lines, *result_lines(results), *proof_lines(result)]))


def _rows(directory: Path, result: Mapping[str, Any], config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = [("method", result["method"])]
    for key in ("num_experts", "top_k", "r", "lora_alpha"):
        if config.get(key) is not None:
            rows.append((key, config[key]))
    targets = config.get("target_modules")
    if targets:
        rows.append(("attached to", targets if isinstance(targets, str) else ", ".join(map(str, targets))))
    counts = inspect(str(directory))["parameters"]
    for key, said in (("adapter", "of the adapter"), ("stored", "stored"), ("active", "active a token")):
        if counts.get(key) is not None:
            rows.append((f"parameters, {said}", f"{counts[key]:,}"))
    rows.append(("bytes", f"{result['bytes_after']:,} (base model and adapter: {result['bytes_before']:,})"))
    rows.append(("dtype", result["dtype"] + (" (the adapter: float32)" if result["form"] == "tied" else "")))
    folding = result.get("folding")
    if folding is not None and folding["kind"] == "approximate":
        rows.append(("logits moved by folding, mean", f"{folding['mean_abs_logit_diff']:.3g}"))
        rows.append(("logits moved by folding, at most", f"{folding['max_abs_logit_diff']:.3g}"))
    for name, task in (result.get("tasks") or {}).items():
        rows.append((f"loss on {name}", f"{task['after']:.4f} (before folding: {task['before']:.4f})"))
    return rows
