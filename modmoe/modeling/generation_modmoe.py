"""Generation with a model routed by sequence: what its routers are told of the prompt; see ``sequences_modmoe``.

Routed by sequence is a model whose FFNs are, or to which an adapter is attached that is weighted by sequence.
"""

# Shapes: B batch, T tokens of this pass

from __future__ import annotations

import copy
import functools
import threading
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

LOG = logging.get_logger(__name__)


class _Generation(threading.local):
    """The call of ``generate`` under way in a thread."""

    prompt: tuple[Any, int | None, int] | None = None
    """The model, the tokens of its prompt, None where it is marked already, and those that lie before ``input_ids``."""


_GENERATION = _Generation()


def methods_over(base: Any) -> dict[str, Callable[..., Any]]:
    """Return the methods of generation of a class over ``base``, a causal LM: they say what the prompt is."""

    @functools.wraps(base.generate)
    def generate(
        self: Any, inputs: Tensor | None = None, generation_config: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        before = _GENERATION.prompt
        if is_by_sequence(self):
            _GENERATION.prompt = _begin_prompt(self, inputs, generation_config, kwargs)
        try:
            return base.generate(self, inputs, generation_config, *args, **kwargs)
        finally:
            _GENERATION.prompt = before

    @functools.wraps(base._prefill)
    def _prefill(self: Any, input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        if is_by_sequence(self) and generation_config.prefill_chunk_size is not None:
            LOG.warning_once(
                "prefill_chunk_size: a model routed by sequence reads its prompt in one piece, since its routers read "
                "all of it before they choose for the first token."
            )
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return base._prefill(self, input_ids, generation_config, *args, **kwargs)

    @functools.wraps(base.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self: Any, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = base.prepare_inputs_for_generation(self, input_ids, *args, **kwargs)
        _mark_tokens(self, inputs, input_ids, kwargs)
        return inputs

    found = (generate, _prefill, prepare_inputs_for_generation)
    return {method.__name__: method for method in found}


def is_by_sequence(model: Any) -> bool:
    """Return whether a causal LM has routers that read a prompt before they choose."""
    # what its adapters share, if it has any
    adapters = getattr(model, "routed_context", None)
    return getattr(model.config, "routing", None) == "sequence" or getattr(adapters, "reads_sequences", False)


def read_prompts(model: Any) -> None:
    """Have a causal LM of any class say what the prompt is, for adapters that are weighted by it."""
    if "generate" in model.__dict__ or hasattr(model, "routing_state") or not hasattr(model, "generate"):
        return
    for name, method in methods_over(type(model)).items():
        setattr(model, name, types.MethodType(method, model))


def read_no_prompts(model: Any) -> None:
    """Undo ``read_prompts``."""
    for name in ("generate", "_prefill", "prepare_inputs_for_generation"):
        model.__dict__.pop(name, None)


def _begin_prompt(
    model: Any, inputs: Tensor | None, generation_config: Any, kwargs: dict[str, Any]
) -> tuple[Any, int | None, int]:
    """Return what ``_Generation`` holds of a call, and empty a cache that is computed anew."""
    ids, embeds = kwargs.get("input_ids") if inputs is None else inputs, kwargs.get("inputs_embeds")
    given = 1 if ids is None else ids.shape[1]
    tokens = given if embeds is None else embeds.shape[1]
    before = 0 if embeds is None else tokens - (0 if ids is None else given)
    cache: Any = kwargs.get("past_key_values")
    mask = kwargs.get("attention_mask")
    held = int(cache.get_seq_length()) if hasattr(cache, "get_seq_length") else 0
    if held and getattr(generation_config, "is_assistant", False):
        # an assistant is asked again and again; its prompt was what it was given first
        return model, None, before
    if held and (embeds is not None or mask is None or mask.shape[1] == tokens):
        if tokens < held:
            raise ValueError(
                f"past_key_values: holds {held} tokens, and {tokens} are given; give all of them, or the new ones "
                "with an attention_mask of all."
            )
        cache.reset()
    elif held:
        LOG.warning_once(
            "Only new tokens were given with the cache of a model routed by sequence: keys and values of the "
            "earlier ones stay as they were computed, with the experts of an earlier prompt. Give all tokens, and "
            "the answer is that to the whole."
        )
    return model, tokens, before


def _mark_tokens(model: Any, inputs: dict[str, Any], input_ids: Tensor, kwargs: dict[str, Any]) -> None:
    """Say of the tokens of a pass which are the prompt, and which expert of ``expert_ids`` each of them has."""
    tokens = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    length = tokens.shape[1]
    owner, prompt, before = _GENERATION.prompt or (None, None, 0)
    if owner is not model:
        # a loop of the caller's own
        prompt, before = input_ids.shape[1] if kwargs.get("is_first_iteration", False) else None, 0
    begin = input_ids.shape[1] + before - length
    if is_by_sequence(model) and prompt is not None and begin < prompt:
        prompt_BT = (torch.arange(begin, begin + length, device=tokens.device) < prompt).expand(tokens.shape[0], -1)
        # the mask of keys: what the model is given may be another, or none
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2:
            prompt_BT = prompt_BT & mask[:, -length:].to(tokens.device).bool()
        inputs["routing_prompt"] = prompt_BT
    expert_ids = inputs.get("expert_ids")
    if isinstance(expert_ids, Tensor) and expert_ids.dim() == 2:
        # what is generated goes to the expert of the last token that one was named for
        index_T = torch.arange(begin, begin + length, device=expert_ids.device)
        inputs["expert_ids"] = expert_ids[:, index_T.clamp(0, expert_ids.shape[1] - 1)]
