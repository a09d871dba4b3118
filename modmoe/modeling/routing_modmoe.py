"""What the layers of one model share while it runs: named experts, where sequences begin, what was chosen before."""

# Shapes: B batch, T tokens (of one sequence, or of all of them in a row), D model width, E experts, K chosen at once

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass
class RoutingState:
    """The routing of the forward pass under way. Kept until the next one begins, so that recomputation finds it."""

    expert_names: list[str]
    """Names of the experts, for errors."""
    expert: int | None = None
    """The expert that ``set_expert`` named for every token."""
    way: str = "auto"
    """auto, masked, runs or gather: how FFNs are computed; all are equal."""
    active_modules: int | None = None
    """The modules of each expert that count, its best; None is all of them."""
    all_on: bool = False
    """Every stored module counts, whatever the router says: the dense model."""
    is_recording: bool = False
    """Whether router logits are kept for losses and reports."""
    shape: tuple[int, int] = (0, 0)
    """Sequences and tokens of each in the pass under way."""
    expert_ids: Tensor | None = None
    """Experts named for this pass alone, [B] or [B, T]."""
    position_BT: Tensor | None = None
    """Position of each token in its document."""
    valid_BT: Tensor | None = None
    """False at padding."""
    prompt_tokens: int = 0
    """Leading tokens that the caller marked as the prompt."""
    memory: dict[int, SequenceMemory] | None = None
    """What sequence routing keeps with the cache, by layer."""
    logits: dict[int, Tensor] = field(default_factory=dict)
    """Router logits_TE of the pass, by layer, while recording."""

    def record(self, layer: int, logits_TE: Tensor) -> None:
        """Keep logits once a pass; recomputation in the backward pass does not change them."""
        if self.is_recording and layer not in self.logits:
            self.logits[layer] = logits_TE

    def kept_choice(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Return the experts and weights of each token, [T, K], where a prompt fixed them and no one asks for more."""
        memory = None if self.memory is None else self.memory.get(layer)
        if memory is None or memory.choice_BK is None or self.prompt_tokens:
            return None
        ids_BK, weights_BK = memory.choice_BK
        batch, tokens = self.shape
        if len(ids_BK) != batch or self.is_recording or torch.is_grad_enabled():
            return None
        if tokens == 1:
            return ids_BK, weights_BK
        return ids_BK.repeat_interleave(tokens, 0), weights_BK.repeat_interleave(tokens, 0)

    def keep_choice(self, layer: int, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """Keep with the cache what a prompt fixed, so that tokens after it need no router."""
        memory = None if self.memory is None else self.memory.get(layer)
        batch, tokens = self.shape
        if memory is not None and memory.is_fixed and len(memory.feature_BD) == batch:
            memory.choice_BK = (ids_TK[::tokens].clone(), weights_TK.detach()[::tokens].clone())

    def named_experts(self, tokens: int, device: torch.device) -> Tensor | None:
        """Return the expert named for each of ``tokens``, or None where the router decides."""
        if self.expert_ids is not None:
            ids = self.expert_ids.to(device)
            return ids.reshape(-1) if ids.dim() == 2 else ids.repeat_interleave(tokens // ids.shape[0])
        if self.expert is not None:
            return torch.full((tokens,), self.expert, dtype=torch.long, device=device)
        return None


@dataclass
class SequenceMemory:
    """What one layer's sequence router remembers of the tokens in the cache."""

    feature_BD: Tensor
    """What the router last read."""
    sum_BD: Tensor
    """Sum of the FFN's inputs so far."""
    count_B: Tensor
    """Tokens in the sum."""
    is_fixed: bool
    """The choice was made by a marked prompt and stays."""
    choice_BK: tuple[Tensor, Tensor] | None = None
    """The experts of each sequence and their weights, once fixed."""


def sequence_features(state: RoutingState, layer: int, x: Tensor, chunk: int) -> Tensor:
    """Return what a sequence router reads for each token, [B T, D]; never anything that comes later in the text.

    With a marked prompt: the mean over the prompt's tokens, kept with the cache. Otherwise text is cut into chunks of
    ``chunk`` tokens; a chunk reads the mean of all before it, the first chunk the first token.
    """
    batch, tokens = state.shape
    x_BTD = x.reshape(batch, tokens, -1)
    valid_BT = state.valid_BT
    valid_BT1 = (
        torch.ones(batch, tokens, 1, device=x.device, dtype=torch.bool)
        if valid_BT is None
        else valid_BT.to(x.device).unsqueeze(-1)
    )
    high = torch.promote_types(x.dtype, torch.float32)
    counted_BTD = torch.where(valid_BT1, x_BTD, 0).to(high)
    memory = None if state.memory is None else state.memory.get(layer)
    if memory is not None and memory.feature_BD.shape[0] != batch:
        repeats = batch // memory.feature_BD.shape[0]
        memory = SequenceMemory(
            memory.feature_BD.repeat_interleave(repeats, 0),
            memory.sum_BD.repeat_interleave(repeats, 0),
            memory.count_B.repeat_interleave(repeats, 0),
            memory.is_fixed,
        )
    if state.prompt_tokens:
        head_BTD = counted_BTD[:, : state.prompt_tokens]
        count_B1 = valid_BT1[:, : state.prompt_tokens].sum(1).clamp_min(1)
        feature_BD = (head_BTD.sum(1) / count_B1).to(x.dtype)
        if state.memory is not None:
            state.memory[layer] = SequenceMemory(feature_BD, head_BTD.sum(1), count_B1.squeeze(-1), True)
        return feature_BD.unsqueeze(1).expand(-1, tokens, -1).reshape(batch * tokens, -1)
    if memory is not None and memory.is_fixed:
        return memory.feature_BD.unsqueeze(1).expand(-1, tokens, -1).reshape(batch * tokens, -1)

    start_BD = torch.zeros_like(counted_BTD[:, 0]) if memory is None else memory.sum_BD
    past_B = torch.zeros(batch, dtype=torch.long, device=x.device) if memory is None else memory.count_B
    position_BT = _positions(state, valid_BT1.squeeze(-1), past_B)
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
    if state.memory is not None:
        state.memory[layer] = SequenceMemory(
            features_BTD[:, -1], start_BD + counted_BTD.sum(1), past_B + valid_BT1.sum((1, 2)), False
        )
    return features_BTD.reshape(batch * tokens, -1)


def _positions(state: RoutingState, valid_BT: Tensor, past_B: Tensor) -> Tensor:
    if state.position_BT is not None:
        return state.position_BT.to(valid_BT.device).expand(valid_BT.shape)
    return (valid_BT.long().cumsum(1) - 1 + past_B.unsqueeze(1)).clamp_min(0)


def _take(source_BTD: Tensor, index_BT: Tensor) -> Tensor:
    return source_BTD.gather(1, index_BT.unsqueeze(-1).expand(-1, -1, source_BTD.shape[-1]))


def begin_pass(
    state: RoutingState,
    *,
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    expert_ids: Tensor | None,
    prompt_tokens: int,
    needs_positions: bool,
) -> None:
    """Note what the layers need to know about the forward pass that begins; ``tokens`` is input_ids or embeddings."""
    state.logits = {}
    state.expert_ids = expert_ids
    state.shape = (tokens.shape[0], tokens.shape[1])
    if not needs_positions:
        return
    state.prompt_tokens = min(prompt_tokens, tokens.shape[1])
    state.valid_BT, state.position_BT = None, position_ids
    if attention_mask is not None and attention_mask.dim() == 2:
        state.valid_BT = attention_mask[:, -tokens.shape[1] :].bool()
    state.memory = None
    if cache is not None:
        if not hasattr(cache, "modmoe_memory") or cache.get_seq_length() == 0:
            cache.modmoe_memory = {}
        state.memory = cache.modmoe_memory
