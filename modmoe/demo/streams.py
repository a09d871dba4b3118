"""A domain's documents as one stream of tokens, for training and for scoring."""

# Shapes: N tokens of a stream

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from modmoe.demo.corpus import documents, problems


@dataclass(frozen=True, slots=True)
class Stream:
    """Documents one after the other, each as `<s> document </s>`."""

    ids: Tensor
    """Token ids, int64, shape (N,)."""
    is_answer: Tensor
    """Whether a token belongs to what follows a prompt, shape (N,); all of a document without a prompt."""
    num_bytes: int
    """Length of the documents in UTF-8."""


def encode_stream(
    tokenizer: PreTrainedTokenizerBase, domain: str, split: str, *, max_tokens: int | None = None
) -> Stream:
    """Encode a domain's split, as many whole documents as it takes to reach `max_tokens`."""
    if domain == "arithmetic":
        pairs = [(problem.prompt, problem.completion) for problem in problems(split)]
    else:
        pairs = [("", document) for document in documents(domain, split)]
    prompts, answers = zip(*pairs, strict=True)
    # not verbose: a warning that documents are longer than the context is no news here
    prompt_ids = tokenizer(list(prompts), verbose=False)["input_ids"]
    answer_ids = tokenizer(list(answers), verbose=False)["input_ids"]
    ids: list[int] = []
    is_answer: list[bool] = []
    num_bytes = 0
    for (prompt, answer), prompt_part, answer_part in zip(pairs, prompt_ids, answer_ids, strict=True):
        if max_tokens is not None and len(ids) >= max_tokens:
            break
        ids += [tokenizer.bos_token_id, *prompt_part, *answer_part, tokenizer.eos_token_id]
        is_answer += [not prompt] * (1 + len(prompt_part)) + [True] * (len(answer_part) + 1)
        num_bytes += len((prompt + answer).encode())
    return Stream(torch.tensor(ids), torch.tensor(is_answer), num_bytes)
