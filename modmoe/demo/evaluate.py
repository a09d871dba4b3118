"""Score a demo model on held-out text, next to the best n-gram model of the same training text.

`python -m modmoe.demo.evaluate modmoe/demo/model` prints the table and adds it to `training.json`.
"""

# Shapes: N tokens of a stream, B windows, S tokens of one window, V vocabulary

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from modmoe.demo.corpus import DOMAINS
from modmoe.demo.ngram import MAX_ORDER, NGramModel
from modmoe.demo.streams import Stream, encode_stream

_WINDOW = 512
# each token is predicted from at least this many before it, as far as the stream has them
_MIN_CONTEXT = 256
# the sums need fewer to be as sure of their mean
_MAX_HELD_OUT_TOKENS = 150_000


def compare_with_ngrams(model_folder: Path) -> dict[str, dict[str, Any]]:
    """Score the model in `model_folder` and the n-grams, by domain.

    For each domain the n-gram models are trained on that domain alone and on all three together, at
    orders 1 to 5, and the best on the held-out text itself is reported: the choice favours them.
    """
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32)
    model.train(False)
    train = {d: encode_stream(tokenizer, d, "train").ids for d in DOMAINS}
    held_out = {d: encode_stream(tokenizer, d, "held_out", max_tokens=_MAX_HELD_OUT_TOKENS) for d in DOMAINS}
    ngrams = _score_ngrams(train, held_out, model.config.vocab_size)
    report = {}
    for domain, stream in held_out.items():
        nll_N = score_stream(model, stream.ids)
        report[domain] = {
            "tokens": len(nll_N),
            "model": _summarise(nll_N, stream),
            "ngram": min(ngrams[domain], key=lambda row: row["nats_per_token"]),
        }
    return report


@torch.inference_mode()
def score_stream(model: nn.Module, ids_N: Tensor) -> Tensor:
    """Negative log-likelihoods in nats of every token but the first, from overlapping windows."""
    losses = []
    done = 1  # the first token has nothing to be predicted from
    for start in range(0, max(len(ids_N) - _MIN_CONTEXT, 1), _WINDOW - _MIN_CONTEXT):
        window_S = ids_N[start : start + _WINDOW]
        logits_SV = model(input_ids=window_S[None], use_cache=False).logits[0]
        nll_S = nn.functional.cross_entropy(logits_SV[:-1].float(), window_S[1:], reduction="none")
        losses.append(nll_S[done - start - 1 :])
        done = start + len(window_S)
    return torch.cat(losses).double()


def _score_ngrams(
    train: Mapping[str, Tensor], held_out: Mapping[str, Stream], vocab_size: int
) -> dict[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {domain: [] for domain in held_out}
    everything_N = torch.cat(list(train.values()))
    for source, ids_N in [("all domains", everything_N), *train.items()]:
        for order in range(1, MAX_ORDER + 1):
            model = NGramModel(ids_N, vocab_size=vocab_size, order=order)
            for domain in held_out if source == "all domains" else [source]:
                scores = _summarise(model.score(held_out[domain].ids), held_out[domain])
                rows[domain].append({"order": order, "trained_on": source} | scores)
    return rows


def _summarise(nll_N: Tensor, stream: Stream) -> dict[str, float]:
    summary = {
        "nats_per_token": round(nll_N.mean().item(), 4),
        "bits_per_byte": round(nll_N.sum().item() / math.log(2) / stream.num_bytes, 4),
    }
    is_answer_N = stream.is_answer[1:]
    # the numbers of a problem cannot be foretold; its answer can
    if not is_answer_N.all():
        summary["answer_nats_per_token"] = round(nll_N[is_answer_N].mean().item(), 4)
    return summary


def format_table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Lay the comparison out for a terminal."""
    lines = [f"{'held-out':<24}{'model':>18}{'n-gram':>18}   nats/token, bits/byte"]
    for domain, row in report.items():
        cells = [f"{row[k]['nats_per_token']:.3f}, {row[k]['bits_per_byte']:.3f}" for k in ("model", "ngram")]
        best = f"order {row['ngram']['order']}, trained on {row['ngram']['trained_on']}"
        lines.append(f"{domain:<24}{cells[0]:>18}{cells[1]:>18}   {best}")
        if "answer_nats_per_token" in row["model"]:
            cells = [f"{row[k]['answer_nats_per_token']:.3f}" for k in ("model", "ngram")]
            lines.append(f"{'  answers only':<24}{cells[0]:>18}{cells[1]:>18}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Compare the model in a folder with n-grams and write the result into its training.json."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("model", type=Path, help="folder of the model")
    folder = parser.parse_args(arguments).model
    report = compare_with_ngrams(folder)
    print(format_table(report))
    path = folder / "training.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(record | {"held_out": report}, indent=2) + "\n")


if __name__ == "__main__":
    main()
