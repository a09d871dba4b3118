"""``modmoe inspect``: what a checkpoint is, without loading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from modmoe import api
from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.cli.progress import size_words, time_words
from modmoe.errors import visible

if TYPE_CHECKING:
    from rich.tree import Tree

EPILOG = flags.examples("modmoe inspect ./moe", "modmoe inspect ./moe --json | jq .parameters")


def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, converted, exported or dense.")],
    as_json: flags.Json = False,
    quiet: flags.Quiet = False,
    verbose: flags.Verbose = False,
) -> None:
    """Show parameters (stored, active, materialised), sparsity (FFN, total), modules, experts and their overlap.

    Sparsity is the share that a token does not use: of the dense FFN neurons, and of all dense parameters. Overlap is
    the share of an expert's modules that another expert has too.
    """
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        result = api.inspect(directory)
        shown = _shown_dense(result) if _is_dense(result) else result
        console.finish(result, title=directory, shown=shown, picture=lambda: draw_tree(result, directory))


def _is_dense(result: Mapping[str, Any]) -> bool:
    """Return whether a checkpoint has neither modules nor experts nor adapters, so that all of that would read 0."""
    return "num_experts" in result and not result["num_experts"] and "adapter" not in result["parameters"]


def _shown_dense(result: Mapping[str, Any]) -> dict[str, Any]:
    """Return what there is to say of a dense model, or of a pruned one."""
    method = {"method": result["method"]} if result.get("method") else {}
    counts = result["parameters"]
    is_pruned = counts["stored"] != counts["dense"]
    return {
        "model_type": result["model_type"],
        "kind": "dense",
        **method,
        "num_layers": result["num_layers"],
        "parameters": {name: counts[name] for name in ("dense", "stored")} if is_pruned else counts["stored"],
        "bytes_on_disk": result["bytes_on_disk"],
        "tensor_bytes": result["tensor_bytes"],
        **({"sparsity": result["sparsity"]} if is_pruned else {}),
    }


MOST_BRANCHES = 6
"""Experts, and runs of layers that are alike, that are shown one by one: a tree should fit a screen."""


def draw_tree(result: Mapping[str, Any], title: str) -> Tree:
    """Return a checkpoint as a tree: what it is, its parameters, its experts and its layers."""
    from rich.text import Text
    from rich.tree import Tree

    def branch(tree: Tree, head: str, lines: Sequence[str]) -> None:
        part = tree.add(Text(head, style="bold"))
        for line in lines[:MOST_BRANCHES]:
            part.add(Text(visible(line), no_wrap=True, overflow="ellipsis"))
        if len(lines) > MOST_BRANCHES:
            part.add(Text(f"... and {len(lines) - MOST_BRANCHES} more; --json has all"))

    is_dense = _is_dense(result)
    kind = [str(result[name]) for name in ("model_type", "method") if result.get(name)] + ["dense"] * is_dense
    layers = result.get("num_layers")
    about = [*kind, *([f"{layers} layers"] if layers else []), *_routing(result)]
    tree = Tree(Text(visible(title), style="bold", overflow="ellipsis", no_wrap=True))
    tree.add(Text(visible(", ".join(about))))
    on_disk = f", {size_words(result['bytes_on_disk'])} on disk" if result.get("bytes_on_disk") else ""
    parameters = (_shown_dense(result) if is_dense else result).get("parameters") or {}
    if isinstance(parameters, int):
        branch(tree, f"{parameters:,} parameters{on_disk}", [])
        parameters = {}
    numbers = {name: value for name, value in parameters.items() if value is not None}
    if numbers.get("active_max") == numbers.get("active"):
        numbers.pop("active_max", None)
    width = max((len(name) for name in numbers), default=0)
    whole = numbers.get("dense")
    counts = [
        f"{name:<{width}}  {value:>15,}" + (f"  {100 * value / whole:5.1f} % of dense" if whole else "")
        for name, value in numbers.items()
    ]
    if counts:
        branch(tree, f"parameters{on_disk}", counts)
    sparsity = result.get("sparsity") or {}
    if any(sparsity.values()):
        told = [f"{name:<6}{100 * value:5.1f} %" for name, value in sparsity.items()]
        branch(tree, "sparsity, the share that a token does not use", told)
    experts = result.get("experts") or []
    if experts:
        wide = min(24, max(len(str(expert["name"])) for expert in experts))
        told = [
            f"{str(expert['name'])[:wide]:<{wide}}  {expert['modules_used']:>5g} modules, "
            f"{100 * expert['overlap']:.0f} % of them in others too"
            for expert in experts
        ]
        branch(tree, f"{len(experts)} experts of {result.get('num_modules')} modules", told)
    checked = _checked(result)
    if checked:
        branch(tree, "checked", checked)
    runs = _runs(result.get("stored_modules") or [], result.get("active_modules") or [])
    if runs:
        branch(tree, "layers", runs)
    return tree


def _checked(result: Mapping[str, Any]) -> list[str]:
    """Return what a conversion found when it compared its output with the dense model."""
    lines, verified = [], result.get("verified") or {}
    if "max_abs_logit_diff_all_on" in verified:
        difference, largest = verified["max_abs_logit_diff_all_on"], verified["max_abs_logit"]
        lines.append(f"all modules on: logits differ from the dense model's by {difference:.2g} of {largest:.3g}")
    routers = [router for router in result.get("routers") or [] if router.get("agreement") is not None]
    if routers:
        spans = []
        for name in ("agreement", "chance"):
            least, most = min(router[name] for router in routers), max(router[name] for router in routers)
            spans.append(f"{100 * least:.0f} to {100 * most:.0f} %")
        lines.append(f"routers choose the best expert for {spans[0]} of {result['routing']}s, by layer")
        lines.append(f"always choosing the same one would do so for {spans[1]}")
    if result.get("seconds") is not None:
        memory = result.get("peak_rss_bytes")
        taken = f"it took {time_words(result['seconds'])}"
        lines.append(taken + (f" and {size_words(memory)} of memory" if memory else ""))
    return lines


def _routing(result: Mapping[str, Any]) -> list[str]:
    """Return in words who chooses what."""
    if not result.get("num_experts") or not result.get("routing"):
        return []
    if result["routing"] == "task":
        return ["the caller names the expert"]
    return [f"{result.get('top_k')} of {result['num_experts']} experts for each {result['routing']}"]


def _runs(stored: Sequence[float], active: Sequence[float]) -> list[str]:
    """Return one line for each run of layers that are alike."""
    lines, first = [], 0
    pairs = list(zip(stored, active, strict=False))
    for layer, pair in enumerate(pairs):
        if layer + 1 == len(pairs) or pairs[layer + 1] != pair:
            name = f"layer {first}" if first == layer else f"layers {first} to {layer}"
            lines.append(f"{name:<14} {pair[0]:>4g} modules stored, {pair[1]:g} active")
            first = layer + 1
    return lines
