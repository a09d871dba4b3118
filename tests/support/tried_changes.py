"""A process that runs each example of ``tests/changes``, with a copy of the package that has them all.

It prints the names of those that did what they say.
"""

from __future__ import annotations

import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CohereConfig, GlmConfig, GPT2Config

import modmoe
from modmoe.cli.main import run
from modmoe.storage.checkpoint import Checkpoint
from tests.support.tiny import save_dense, tokenizer, write_tasks

SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 300}


CONV1D = """
from transformers import GPT2Config, GPT2LMHeadModel


class Conv1DConfig(GPT2Config):
    model_type = "conv1d_lm"


class Conv1DForCausalLM(GPT2LMHeadModel):
    config_class = Conv1DConfig
"""
"""Code of a checkpoint's own: GPT-2 by another name."""


def try_all(home: Path) -> None:
    """Run each example; whatever does not hold raises."""
    tasks = write_tasks(home / "tasks")
    dense = save_dense(home / "dense")
    options: dict[str, Any] = {"tasks": tasks, "tokens": 200, "num_modules": 4, "device": "cpu"}
    for name, keywords in {
        "partitioner": {"partition": "norms"},
        "score": {"score": "spread"},
        "assignment": {"assignment": "in_order"},
    }.items():
        result = modmoe.convert(dense, home / name, **options, **keywords)
        assert result["verified"]["max_abs_logit_diff_all_on"] <= 1e-8
        print(name)
    modmoe.convert(dense, home / "conversion", method="every_second")
    up = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(Checkpoint(home / "conversion")[up], Checkpoint(dense)[up][::2])
    print("conversion")
    for name, config in {
        "family_plain": CohereConfig(**SIZES, intermediate_size=64, num_key_value_heads=2),
        "family_fused": GlmConfig(**SIZES, intermediate_size=64, num_key_value_heads=2, head_dim=8, pad_token_id=0),
        "family_transposed": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=300, n_inner=64),
    }.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.save_pretrained(home / f"{name}-dense")
        tokenizer().save_pretrained(home / f"{name}-dense")
        if name == "family_transposed":
            rename(home / f"{name}-dense")
        result = modmoe.convert(home / f"{name}-dense", home / name, **options, trust_remote_code=True)
        assert result["verified"]["max_abs_logit_diff_all_on"] <= 1e-8
        print(name)
    result = modmoe.convert(dense, home / "adapter", method="adapters", adapter="scaled")
    assert result["verified"]["max_abs_logit_diff"] == 0 and result["parameters"]["adapter"] > 0
    print("adapter")
    qwen = save_dense(home / "qwen", "qwen3")
    modmoe.convert(qwen, home / "tied", **options)
    result = modmoe.export(home / "tied", home / "native_target", form="native", target="dots1")
    assert json.loads((home / "native_target" / "config.json").read_text())["model_type"] == "dots1"
    assert result["verified"] is not None
    print("native_target")
    try_loss()
    print("router_loss")
    shown = io.StringIO()
    with redirect_stdout(shown):
        assert run(["families", "--json"]) == 0
    assert {"cohere", "glm", "conv1d_lm"} <= set(json.loads(shown.getvalue())["families"])
    print("command")


def rename(directory: Path) -> None:
    """Make a GPT-2 one of another model type, with code of its own."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "conv1d_lm", "architectures": ["Conv1DForCausalLM"]}
    names = {"AutoConfig": "Conv1DConfig", "AutoModelForCausalLM": "Conv1DForCausalLM"}
    config["auto_map"] = {auto: f"modeling_conv1d.{name}" for auto, name in names.items()}
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "modeling_conv1d.py").write_text(CONV1D, encoding="utf-8")


def try_loss() -> None:
    """The loss of even probabilities is the log of their number."""
    from modmoe.adapters.mechanism.losses import LOSSES, soft_route, total_loss

    logits_TE = torch.zeros(3, 4, requires_grad=True)
    route = soft_route("site", logits_TE.softmax(-1), logits_TE)
    loss = total_loss([route], None, more={"entropy": 1.0})
    assert loss is not None and "entropy" in LOSSES
    torch.testing.assert_close(loss.detach(), torch.tensor(4.0).log())


if __name__ == "__main__":
    lines = io.StringIO()
    with redirect_stdout(lines):
        try_all(Path(sys.argv[1]))
    print(*sorted(lines.getvalue().split()), sep="\n")
