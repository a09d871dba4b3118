"""The model card of what upcycling writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from modmoe.formats.card.converted import escape, load_lines, save, table
from modmoe.formats.card.head import head
from modmoe.formats.pushed_files import hub_id


def write_upcycled_card(directory: Path, result: Mapping[str, Any], source: Path, named: str | None) -> None:
    """Write README.md beside what ``modmoe convert --method upcycle`` wrote.

    Args:
        directory: the new checkpoint.
        result: what ``modmoe.conversion.driver.convert`` returns.
        source: where the source lies.
        named: how the user named it.
    """
    base = hub_id(named)
    title = f"{result['model_type']} with {result['num_experts']} upcycled experts by modmoe"
    data = head(
        title,
        base=base,
        relation="finetune",
        library="transformers",
        tags=["modmoe", "moe", "upcycled"],
        sources=[directory, source],
        results={},
    )
    origin = escape(base) if base else "a dense model"
    drawn = result["redrawn_fraction"]
    how = "Each expert is a copy of the FFN, so that it computes what the dense model does until it is trained."
    compared = "the dense model"
    if drawn:
        how = f"Each expert is a copy of the FFN with {drawn:.0%} of its neurons drawn anew: it has to be trained."
        compared = "the same experts made in memory"
    rows = [
        ("parameters, stored", f"{result['parameters']['stored']:,} (before: {result['parameters_before']:,})"),
        ("parameters, active", f"{result['parameters']['active']:,}"),
        ("experts", result["num_experts"]),
        ("chosen at once", result["top_k"]),
    ]
    lines = [f"# {escape(title)}", "", f"{how} Made from {origin} with modmoe.", ""]
    lines += ["## Use", "", "```python", *load_lines(False), "```", "", *table(rows)]
    if result["verified"]:
        lines += [
            "Checked when it was written: reloaded with transformers alone, its logits differ by at most "
            f"{result['verified']['max_abs_logit_diff']:.2g} from those of {compared}."
        ]
    save(directory, data.to_yaml(), "\n".join(lines))
