"""Routing by sequence: what a router reads of the text, and what it remembers of it with the cache.

A pass is read in one of two ways.

* Where a prompt is marked, the router of each layer reads the mean of all its tokens before it chooses for any of them,
  and the choice stays for what is generated after it. To ``generate`` the prompt is all that it is given, what earlier
  turns gave and generated among it; padding is none of it, and candidates of assisted generation neither. So the answer
  does not depend on how the prompt came in: it is read in one piece whatever ``prefill_chunk_size`` says, and from a
  kept cache that holds the beginning of it nothing is taken over, since that was computed with the choice of a shorter
  one. Where the caller gives new tokens alone, the earlier ones are not there to be computed again: the mean goes on
  over all that was read before, and their keys and values stay as they are.
* Elsewhere text is cut into chunks of ``routing_chunk`` tokens; a chunk reads the mean of all tokens before it, the
  first one the first token, so that no choice depends on what comes later.
"""

# Shapes: B batch, T tokens (of one sequence), N tokens of all of them in a row, D model width, K experts chosen at once

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


@dataclass
class SequenceMemory:
    """What one layer's sequence router remembers of the tokens in the cache."""

    feature_BD: Tensor
    """What the router last read."""
    sum_BD: Tensor
    """Sum of the FFN's inputs so far: of what was marked as a prompt once something was, of all tokens before."""
    count_B: Tensor
    """Tokens in the sum."""
    is_fixed: bool
    """The choice was made by a marked prompt and stays."""
    choice_BK: tuple[Tensor, Tensor] | None = None
    """The experts of each sequence and their weights, once fixed."""

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> SequenceMemory:
        """Return the memory of other rows: ``change`` takes and gives tensors whose first dimension is B."""
        choice = None if self.choice_BK is None else (change(self.choice_BK[0]), change(self.choice_BK[1]))
        return SequenceMemory(change(self.feature_BD), change(self.sum_BD), change(self.count_B), self.is_fixed, choice)


class _Following:
    """A cache whose routing memory is ordered, repeated, picked from and cut as its keys and values are."""

    def _map_rows(self: Any, change: Callable[[Tensor], Tensor]) -> None:
        for layer, memory in self.modmoe_memory.items():
            self.modmoe_memory[layer] = memory.map_rows(change)

    def reorder_cache(self: Any, beam_idx: Tensor) -> Any:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map_rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self: Any, repeats: int) -> Any:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map_rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self: Any, indices: Any) -> Any:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map_rows(lambda tensor: tensor[indices])

    def crop(self: Any, *args: Any, **kwargs: Any) -> Any:
        before = int(self.get_seq_length())
        super().crop(*args, **kwargs)  # type: ignore[misc]
        left = int(self.get_seq_length())
        if left == 0:
            self._forget()
        elif left < _end_of_prompt(*self.modmoe_prompt) if self.modmoe_prompt else left < before:
            # what was cut off is in the sums, and cannot be taken out of them
            self.modmoe_is_cut = True

    def reset(self: Any) -> Any:
        super().reset()  # type: ignore[misc]
        self._forget()

    def _forget(self: Any) -> None:
        self.modmoe_memory.clear()
        self.modmoe_is_cut, self.modmoe_prompt = False, None


def _end_of_prompt(past: int, marked: int | Tensor) -> int:
    """Return how much of a cache a prompt takes up that was marked when it held ``past`` tokens."""
    if not isinstance(marked, Tensor):
        return past + marked
    columns = marked.any(0).nonzero()
    return past + (int(columns[-1]) + 1 if len(columns) else 0)


_FOLLOWING: dict[type, type] = {}


def follow_cache(cache: Any, *, is_marked: bool) -> dict[int, SequenceMemory]:
    """Return what is remembered with a cache, by layer, and have it follow the cache from now on.

    Raises ValueError where a mean is to go on over tokens that were cut off. (A choice that was made stays.)
    """
    if not hasattr(cache, "modmoe_memory"):
        cache.modmoe_memory, cache.modmoe_is_cut, cache.modmoe_prompt = {}, False, None
    if not torch.compiler.is_compiling() and not isinstance(cache, _Following):
        kind = type(cache)
        if kind not in _FOLLOWING:
            name = f"Following{kind.__name__}"
            _FOLLOWING[kind] = type(name, (_Following, kind), {"__module__": __name__, "__doc__": kind.__doc__})
            # where what was pickled looks for it
            globals()[name] = _FOLLOWING[kind]
        cache.__class__ = _FOLLOWING[kind]
    if cache.modmoe_is_cut and (is_marked or cache.modmoe_prompt is None):
        raise ValueError(
            "past_key_values: tokens were cut off that a sequence router has read, and its mean over them cannot be "
            "undone; begin with a new cache, or call generate with all tokens."
        )
    memory: dict[int, SequenceMemory] = cache.modmoe_memory
    return memory


def _of_batch(memory: SequenceMemory | None, batch: int) -> SequenceMemory | None:
    """Return a memory for ``batch`` rows; where a cache repeated each of its rows without telling, so does it."""
    held = batch if memory is None else len(memory.feature_BD)
    if memory is None or held == batch:
        return memory
    if batch % held:
        raise ValueError(f"past_key_values: is of {held} sequences, and the batch has {batch}; they must be the same.")
    return memory.map_rows(lambda tensor: tensor.repeat_interleave(batch // held, 0))


def check_prompt(prompt: Any, shape: tuple[int, int]) -> int | Tensor:
    """Return what ``routing_prompt`` marks: a number of leading tokens, or which tokens, [B, T]; else ValueError."""
    if isinstance(prompt, Tensor) and prompt.dim():
        if tuple(prompt.shape) != shape:
            raise ValueError(f"routing_prompt: has the shape {tuple(prompt.shape)}; it must be {shape}, one a token.")
        return prompt.bool()
    if isinstance(prompt, Tensor):
        prompt = prompt.item()
    if not (prompt is None or (isinstance(prompt, int) and not isinstance(prompt, bool))):
        raise ValueError(
            f"routing_prompt: is {prompt!r:.40}; it must be a whole number of leading tokens, or a tensor with a truth "
            "value for each token."
        )
    length = prompt or 0
    if length < 0:
        raise ValueError(f"routing_prompt: {length} tokens cannot be a prompt; 0 is none.")
    return min(length, shape[1])


def find_valid(mask: Any, cache: Any, shape: tuple[int, int]) -> Tensor | None:
    """Return which tokens are none of padding, [B, T], from a mask of any form; None where it does not say.

    A mask of keys, [B, past and T], says so itself. In a mask of queries and keys, [B or 1, heads or 1, T, keys], a
    token is padding where it may not attend to itself.
    """
    batch, tokens = shape
    if isinstance(mask, dict):
        found = [part for part in mask.values() if isinstance(part, Tensor)]
        mask = mask.get("full_attention", found[0] if found else None)
    if not isinstance(mask, Tensor):
        return None
    if mask.dim() == 2:
        return mask[:, -tokens:].bool()
    if mask.dim() != 4:
        return None
    index_T = torch.arange(tokens, device=mask.device)
    last_T = index_T + mask.shape[-1] - tokens
    if cache is not None and getattr(cache, "is_compileable", False):
        # keys of tokens that are still to come lie behind these
        last_T = torch.minimum(last_T, index_T + cache.get_seq_length())
    own_BT = mask[:, 0].gather(-1, last_T[None, :, None].expand(mask.shape[0], -1, 1)).squeeze(-1)
    valid_BT = own_BT if own_BT.dtype == torch.bool else own_BT > torch.finfo(own_BT.dtype).min / 2
    return valid_BT.expand(batch, -1)


def read_call(run: Any, backbone: Any, given: dict[str, Any], kwargs: dict[str, Any], prompt: Any) -> None:
    """Note in a pass what a call of the backbone says of its sequences, and begin or go on with what its cache keeps.

    Args:
        run: the pass; its ``shape`` is read, and ``prompt_tokens``, by which it knows whether it ``is_marked``,
            ``valid_BT``, ``position_BT`` and ``memory`` are set.
        backbone: the model without its head.
        given: what it was called with, by name.
        kwargs: its keywords, to which a cache is added where it would make one itself.
        prompt: what ``routing_prompt`` marks.
    """
    cache: Any = given.get("past_key_values")
    use_cache = given.get("use_cache")
    use_cache = backbone.config.use_cache if use_cache is None else use_cache
    is_recomputed = backbone.training and getattr(backbone, "is_gradient_checkpointing", False)
    if cache is None and use_cache and not backbone.training:
        # made here rather than in the dense model, since what the router keeps goes with it
        cache = kwargs["past_key_values"] = DynamicCache(config=backbone.config)
    run.prompt_tokens = check_prompt(prompt, run.shape)
    run.valid_BT = find_valid(given.get("attention_mask"), cache, run.shape)
    run.position_BT = given.get("position_ids")
    if hasattr(cache, "get_seq_length") and not is_recomputed:
        run.memory = follow_cache(cache, is_marked=run.is_marked)
        if run.is_marked and not torch.compiler.is_compiling() and not getattr(cache, "is_compileable", False):
            cache.modmoe_prompt = (cache.get_seq_length(), run.prompt_tokens)


def sequence_features(run: Any, layer: Any, x: Tensor, chunk: int) -> Tensor:
    """Return what a sequence router reads for each token, [N, D], D of the type of ``x``; see the top of the file.

    Args:
        run: the pass; of it are read ``shape``, ``valid_BT``, ``position_BT``, ``prompt_tokens`` and ``memory``, where
            what is to be remembered is put.
        layer: the key of the layer in the memory.
        x: what enters the FFN.
        chunk: tokens after which the choice is made anew where no prompt is marked.
    """
    batch, tokens = run.shape
    x_BTD = x.reshape(batch, tokens, -1)
    valid_BT1 = (
        torch.ones(batch, tokens, 1, device=x.device, dtype=torch.bool)
        if run.valid_BT is None
        else run.valid_BT.to(x.device).unsqueeze(-1)
    )
    high = torch.promote_types(x.dtype, torch.float32)
    counted_BTD = torch.where(valid_BT1, x_BTD, 0).to(high)
    memory = _of_batch(None if run.memory is None else run.memory.get(layer), batch)
    marked = run.prompt_tokens
    if isinstance(marked, Tensor) or marked:
        if isinstance(marked, Tensor):
            prompt_BT1 = valid_BT1 & marked.to(x.device).unsqueeze(-1)
        else:
            prompt_BT1 = valid_BT1 & (torch.arange(tokens, device=x.device) < marked)[:, None]
        sum_BD = torch.where(prompt_BT1, counted_BTD, 0).sum(1)
        count_B = prompt_BT1.sum((1, 2))
        if memory is not None:
            sum_BD, count_B = sum_BD + memory.sum_BD, count_B + memory.count_B
        feature_BD = (sum_BD / count_B.clamp_min(1).unsqueeze(-1)).to(x.dtype)
        if run.memory is not None:
            run.memory[layer] = SequenceMemory(feature_BD, sum_BD, count_B, True)
        return feature_BD.unsqueeze(1).expand(-1, tokens, -1).reshape(batch * tokens, -1)
    if memory is not None and memory.is_fixed:
        return memory.feature_BD.unsqueeze(1).expand(-1, tokens, -1).reshape(batch * tokens, -1)

    start_BD = torch.zeros_like(counted_BTD[:, 0]) if memory is None else memory.sum_BD
    past_B = torch.zeros(batch, dtype=torch.long, device=x.device) if memory is None else memory.count_B
    position_BT = _positions(run, valid_BT1.squeeze(-1), past_B)
    index_T = torch.arange(tokens, device=x.device)
    # before_BTD[t] is the sum of all that lies before t; documents packed into one row are told apart by their start
    before_BTD = torch.cat([start_BD.unsqueeze(1), start_BD.unsqueeze(1) + counted_BTD.cumsum(1)[:, :-1]], 1)
    chunk_start_BT = index_T - position_BT % chunk
    document_start_BT = index_T - position_BT
    clamped_BT = chunk_start_BT.clamp_min(0)
    at_chunk_BTD = _take(before_BTD, clamped_BT)
    base_BTD = torch.where((document_start_BT >= 0).unsqueeze(-1), _take(before_BTD, document_start_BT.clamp_min(0)), 0)
    length_BT1 = (position_BT - position_BT % chunk).unsqueeze(-1)
    mean_BTD = (at_chunk_BTD - base_BTD) / length_BT1.clamp_min(1)
    features_BTD = torch.where(length_BT1 > 0, mean_BTD.to(x.dtype), _take(x_BTD, clamped_BT))
    if memory is not None:
        features_BTD = torch.where((chunk_start_BT < 0).unsqueeze(-1), memory.feature_BD.unsqueeze(1), features_BTD)
    if run.memory is not None:
        run.memory[layer] = SequenceMemory(
            features_BTD[:, -1], start_BD + counted_BTD.sum(1), past_B + valid_BT1.sum((1, 2)), False
        )
    return features_BTD.reshape(batch * tokens, -1)


def _positions(run: Any, valid_BT: Tensor, past_B: Tensor) -> Tensor:
    if run.position_BT is not None:
        position_BT: Tensor = run.position_BT.to(valid_BT.device).expand(valid_BT.shape)
        return position_BT
    return (valid_BT.long().cumsum(1) - 1 + past_B.unsqueeze(1)).clamp_min(0)


def _take(source_BTD: Tensor, index_BT: Tensor) -> Tensor:
    return source_BTD.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, source_BTD.shape[-1]))
