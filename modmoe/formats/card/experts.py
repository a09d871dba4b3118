"""The model card of a mixture of experts that was left fewer experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modmoe.formats.card.converted import escape, load_lines, save, table
from modmoe.formats.card.head import head
from modmoe.formats.pushed_files import hub_id

_HOW = {
    "prune": "Of each layer's {before} experts, the {after} of the highest score ({score}) are left.",
    "merge": "Each layer's {before} experts, clustered by their mean outputs, became {after}: means of their weights.",
}


def write_experts_card(directory: Path, result: Mapping[str, Any], source: Path, named: str | None) -> None:
    """Write README.md beside what ``modmoe convert --method experts`` wrote.

    Args:
        directory: the new checkpoint.
        result: what ``modmoe.conversion.driver.convert`` returns.
        source: where the source lies.
        named: how the user named it.
    """
    base = hub_id(named)
    before, after = result["num_experts_before"], result["num_experts"]
    title = f"{result['model_type']} with {after} of {before} experts by modmoe"
    data = head(
        title,
        base=base,
        relation="finetune",
        library="transformers",
        tags=["modmoe", "moe", "pruned" if result["assignment"] == "prune" else "merged"],
        sources=[directory, source],
        results={},
    )
    how = _HOW[result["assignment"]].format(before=before, after=after, score=escape(result["score"]))
    origin = escape(base) if base else f"a {escape(result['model_type'])} model"
    shares = [layer["routed_share"] for layer in result["layers"]]
    rows = [
        ("parameters, stored", f"{result['parameters']['stored']:,} (before: {result['parameters_before']:,})"),
        ("parameters, active", f"{result['parameters']['active']:,}"),
        ("experts", f"{after} (before: {before})"),
        ("chosen at once", result["top_k"]),
        ("calibration tokens that had gone to the experts left", f"{sum(shares) / len(shares):.1%}"),
    ]
    lines = [f"# {escape(title)}", "", f"{how} Made from {origin} with modmoe, in the format of its source.", ""]
    lines += ["## Use", "", "```python", *load_lines(False), "```", "", *table(rows)]
    lines += [
        "Checked when it was written: reloaded with transformers alone, its logits differ by at most "
        f"{result['verified']['max_abs_logit_diff']:.2g} from those of the source with the same change made in memory."
    ]
    save(directory, data.to_yaml(), "\n".join(lines))
