"""Train the model that ships with modmoe: `python -m modmoe.demo.train --out modmoe/demo/model`.

A Llama of 2.4 million weights reads standard-library code, documentation and worked sums for about an
hour on two CPU cores. The shipped one was ended by `--minutes 51` on a busy machine, at step 1301.

Hidden matrices are trained by Muon (https://kellerjordan.github.io/posts/muon, scaled to AdamW's update
size as in https://arxiv.org/abs/2502.16982), the rest by AdamW; the learning rate warms up, stays, and
decays linearly to zero.
"""

# Shapes: B sequences, S tokens of one sequence, N tokens of a stream

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from modmoe.demo.corpus import DOMAINS, documents
from modmoe.demo.evaluate import compare_with_ngrams, format_table
from modmoe.demo.streams import encode_stream
from modmoe.demo.tokenizer import train_tokenizer

_REPORT_EVERY = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How a demo model is trained; what the shipped one was given is in its training.json."""

    steps: int = 6000
    """Optimiser steps."""
    seed: int = 0
    """Seeds the weights and the order of the data."""
    threads: int = 2
    """CPU threads."""
    minutes: float = math.inf
    """If finite, the schedule also ends after this many minutes, whichever comes first."""
    tokens_per_step: int = 4096
    """Tokens per optimiser step."""
    sequence_lengths: tuple[int, int] = (256, 512)
    """Tokens per sequence, first and last: reading short ones first is cheaper."""
    lengthen_at: float = 0.75
    """Share of the training after which the last sequence length is used."""
    mix: tuple[float, ...] = (0.47, 0.28, 0.25)
    """Share of the tokens that each domain gets, in the order of `DOMAINS`."""
    muon_lr: float = 3e-3
    """Peak learning rate of the hidden matrices, in AdamW's units."""
    adamw_lr: float = 3e-3
    """Peak learning rate of the embedding and the norms."""
    weight_decay: float = 0.1
    """Decoupled weight decay of every matrix."""
    warmup: float = 0.02
    """Share of the training in which the learning rate rises."""
    decay: float = 0.5
    """Share of the training, at its end, in which the learning rate falls to zero."""
    vocab_size: int = 2048
    """Entries of the vocabulary, special tokens and bytes included."""
    tokenizer_chars: int = 1_500_000
    """Characters of each domain that the tokenizer is trained on."""


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Build the untrained model: 2.36 million weights, the embedding counted once."""
    torch.manual_seed(config.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Batches:
    """Draws sequences at random places of the domains' streams, each domain by its share."""

    def __init__(self, streams: dict[str, Tensor], config: TrainConfig) -> None:
        """Keep `streams`; the draw depends on the config's seed alone."""
        self._streams = list(streams.values())
        self._shares = torch.tensor(config.mix)
        self._tokens_per_step = config.tokens_per_step
        self._generator = torch.Generator().manual_seed(config.seed)

    def draw(self, length: int) -> Tensor:
        """Draw the tokens of one step in sequences of `length`, shape (B, length + 1)."""
        batch_size = self._tokens_per_step // length
        domains_B = torch.multinomial(self._shares, batch_size, replacement=True, generator=self._generator)
        return torch.stack([self._draw_one(self._streams[d], length + 1) for d in domains_B])

    def _draw_one(self, stream_N: Tensor, num_tokens: int) -> Tensor:
        last = len(stream_N) - num_tokens
        start = int(torch.randint(last + 1, (), generator=self._generator))
        return stream_N[start : start + num_tokens]


def build_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """Give hidden matrices to Muon; the embedding and the norms to AdamW."""
    named = dict(model.named_parameters())
    hidden = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    embeddings = [p for name, p in named.items() if "embed" in name]
    norms = [p for p in named.values() if p.ndim < 2]
    return [
        torch.optim.Muon(
            hidden,
            lr=config.muon_lr,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        ),
        torch.optim.AdamW(
            [
                {"params": embeddings, "weight_decay": config.weight_decay},
                {"params": norms, "weight_decay": 0.0},
            ],
            lr=config.adamw_lr,
            betas=(0.9, 0.95),
        ),
    ]


def scale_lr(progress: float, config: TrainConfig) -> float:
    """Factor on the peak learning rate: up, flat, and linearly down to zero at progress 1."""
    return max(0.0, min(1.0, progress / config.warmup, (1.0 - progress) / config.decay))


def compute_loss(model: Callable[..., Any], tokens_BS: Tensor) -> Tensor:
    """Mean cross-entropy of predicting each token from those before it, in bfloat16 matmuls."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BSV = model(input_ids=tokens_BS[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits_BSV.flatten(0, 1).float(), tokens_BS[:, 1:].flatten())


def train(model: LlamaForCausalLM, batches: Batches, config: TrainConfig, checkpoints: Checkpoints) -> int:
    """Train `model` in place and return how many tokens it has read."""
    optimizers = build_optimizers(model, config)
    peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    # on CPUs the backward of the fused attention takes a third of a step; compiled, this does not
    model.set_attn_implementation("eager")
    compiled = torch.compile(model, dynamic=False)
    model.train()
    start_s = time.monotonic()
    losses: list[float] = []
    while True:
        elapsed_s = time.monotonic() - start_s
        progress = max(len(losses) / config.steps, elapsed_s / 60 / config.minutes)
        if progress >= 1.0:
            return len(losses) * config.tokens_per_step
        for optimizer, lrs in zip(optimizers, peaks, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * scale_lr(progress, config)
        length = config.sequence_lengths[progress >= config.lengthen_at]
        loss = compute_loss(compiled, batches.draw(length))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if len(losses) % _REPORT_EVERY == 0:
            rate = len(losses) * config.tokens_per_step / (time.monotonic() - start_s)
            mean = sum(losses[-_REPORT_EVERY:]) / _REPORT_EVERY
            print(f"step {len(losses)} progress {progress:.3f} loss {mean:.4f} tokens/s {rate:.0f}", flush=True)
        checkpoints.save_if_due(model, len(losses))


class Checkpoints:
    """Saves the model as it is every few minutes, so that a run cut short leaves one."""

    def __init__(self, directory: Path | None, tokenizer: PreTrainedTokenizerFast, every_minutes: float) -> None:
        """Save under `directory`; None saves nothing."""
        self._directory = directory
        self._tokenizer = tokenizer
        self._every_s = every_minutes * 60
        self._last_s = time.monotonic()

    def save_if_due(self, model: LlamaForCausalLM, step: int) -> None:
        """Save if the last save is long enough ago."""
        if self._directory is None or time.monotonic() - self._last_s < self._every_s:
            return
        folder = self._directory / f"step_{step}"
        save_model(folder, model, self._tokenizer)
        self._last_s = time.monotonic()
        print(f"saved {folder}", flush=True)


def save_model(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write weights as bfloat16, both configs and the tokenizer; `model` keeps its dtype."""
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    copy.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def describe_training(config: TrainConfig, num_tokens: int, minutes: float) -> dict[str, Any]:
    """Everything needed to tell how a model came about, ready for JSON."""
    return {
        "config": asdict(config) | {"minutes": None if math.isinf(config.minutes) else config.minutes},
        "steps": num_tokens // config.tokens_per_step,
        "tokens": num_tokens,
        "wall_minutes": round(minutes, 1),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }


def main(arguments: list[str] | None = None) -> None:
    """Train, compare with n-grams on held-out text, and write the model folder."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    defaults = TrainConfig()
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--threads", type=int, default=defaults.threads)
    parser.add_argument("--muon-lr", type=float, default=defaults.muon_lr)
    parser.add_argument("--adamw-lr", type=float, default=defaults.adamw_lr)
    parser.add_argument("--minutes", type=float, default=defaults.minutes)
    parser.add_argument("--checkpoints", type=Path, default=None, help="folder of snapshots")
    parser.add_argument("--checkpoint-minutes", type=float, default=10.0)
    options = vars(parser.parse_args(arguments))
    out, snapshots = options.pop("out"), options.pop("checkpoints")
    every_minutes = options.pop("checkpoint_minutes")
    config = TrainConfig(**options)
    torch.set_num_threads(config.threads)

    texts = (t for d in DOMAINS for t in documents(d, "train", limit_chars=config.tokenizer_chars))
    tokenizer = train_tokenizer(texts, vocab_size=config.vocab_size, max_length=512)
    streams = {domain: encode_stream(tokenizer, domain, "train").ids for domain in DOMAINS}
    print({domain: len(stream_N) for domain, stream_N in streams.items()}, flush=True)
    model = build_model(config, tokenizer)
    print(f"{sum(p.numel() for p in model.parameters())} weights", flush=True)
    start_s = time.monotonic()
    checkpoints = Checkpoints(snapshots, tokenizer, every_minutes)
    num_tokens = train(model, Batches(streams, config), config, checkpoints)
    minutes = (time.monotonic() - start_s) / 60
    save_model(out, model, tokenizer)
    comparison = compare_with_ngrams(out)
    print(format_table(comparison))
    record = describe_training(config, num_tokens, minutes) | {"held_out": comparison}
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
