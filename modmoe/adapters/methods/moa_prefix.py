"""The attention prefix of MoA: prompt vectors that every query attends to beside the text, behind a gate per head.

    K, V = k_proj(P), v_proj(P)                          with the frozen weights, without LoRA and without RoPE
    out_h = attention_h + w g_h softmax(q_h K^T s) V     q after RoPE, s the attention's own factor; before o_proj

Two softmaxes, as in LLaMA-Adapter (https://arxiv.org/abs/2303.16199): with the gates g at zero the attention is what
it was. Where the architecture has a k_norm (Qwen3, OLMoE) it is applied to K too, and OLMoE's clipping to K and V: a
prompt is a token that has no position, not a kind of its own. GQA shares K and V among heads as the text's.

The attention is not replaced, so every implementation of it works: the query is what q_proj returned, taken through
the architecture's q_norm and rotary function once more, and the prefix is added to what enters o_proj.
"""

# Shapes: B batch, T tokens, P prompt vectors, D model width, H query heads, G key heads, Q = H / G, C head width

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..mechanism.attach import Site
from ..mechanism.passes import first_tensor


class AttentionPrefix:
    """The hooks of one attention: they keep the query and add the prefixes of the site's active adapters."""

    def __init__(self, site: Site, attention: nn.Module) -> None:
        """Serve ``attention``, whose q, k, v and o are layers of their own."""
        self.site, self.attention = site, attention
        self.key = f"{site.path} {site.container}"
        # the architecture's own, since families differ in how they pair the halves of a head
        self.rotate = getattr(sys.modules.get(type(attention).__module__), "apply_rotary_pos_emb", None)

    def install(self) -> list[Any]:
        """Put the hooks on and return their handles; a LoRA on q_proj must have its hook already."""
        attention: Any = self.attention
        return [
            attention.register_forward_pre_hook(self.keep_positions, with_kwargs=True),
            attention.q_proj.register_forward_hook(self.keep_query),
            attention.o_proj.register_forward_pre_hook(self.add, with_kwargs=True),
        ]

    def active(self) -> list[Any]:
        """Return the active adapters that have a prompt."""
        adapters: list[Any] = self.site.active()
        return [adapter for adapter in adapters if "prompt" in adapter.types]

    def keep_positions(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the cosines and sines that the attention is called with."""
        if self.active():
            given = (kwargs.get("position_embeddings"), *args)
            found = next((value for value in given if isinstance(value, tuple) and len(value) == 2), None)
            self.site.frame().values[f"{self.key} rotary"] = found

    def keep_query(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep what q_proj returned."""
        if self.active():
            self.site.frame().values[f"{self.key} query"] = output

    def add(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Add the prefixes to what enters o_proj."""
        adapters = self.active()
        if not adapters:
            return None
        frame = self.site.frame()
        # taken out, not looked up: what stays in a frame lives as long as the pass
        query, rotary = (frame.values.pop(f"{self.key} {name}", None) for name in ("query", "rotary"))
        if query is None:
            raise RuntimeError(
                f"{self.site.path}: the prompt needs the query, but o_proj ran without q_proj before it."
            )
        x = first_tensor(args, kwargs)
        assert x is not None
        query_BTHC = self.rotated(self.heads(query, "q_norm", adapters[0].shape.head_dim), rotary)
        total = x
        for adapter in adapters:
            out_BTHC = self.prefix(adapter, query_BTHC) * adapter.prompt_gate_H.unsqueeze(-1)
            weight_BT11 = adapter.weight("prompt", frame).view(*query_BTHC.shape[:2], 1, 1)
            total = total + (weight_BT11 * out_BTHC).to(x.dtype).reshape(x.shape)
        return tuple(total if value is x else value for value in args), {
            name: total if value is x else value for name, value in kwargs.items()
        }

    def prefix(self, adapter: Any, query_BTHC: Tensor) -> Tensor:
        """Return what the queries read from an adapter's prompt, [B, T, H, C], in the parameters' type."""
        attention: Any = self.attention
        prompt_PD = adapter.prompt_PD.to(query_BTHC.dtype)
        dtype, width = adapter.prompt_PD.dtype, adapter.shape.head_dim
        # forward, not a call: hooks would add this method's LoRA, and others'
        key_PGC = self.heads(attention.k_proj.forward(prompt_PD), "k_norm", width).to(dtype)
        value_PGC = self.heads(attention.v_proj.forward(prompt_PD), "", width).to(dtype)
        query_BTGQC = query_BTHC.to(dtype).reshape(*query_BTHC.shape[:2], key_PGC.shape[1], -1, width)
        scores_BTGQP = torch.einsum("btgqc,pgc->btgqp", query_BTGQC, key_PGC) * getattr(
            attention, "scaling", width**-0.5
        )
        probs_BTGQP = scores_BTGQP.to(dtype).softmax(-1)
        return torch.einsum("btgqp,pgc->btgqc", probs_BTGQP, value_PGC).flatten(2, 3)

    def heads(self, states: Tensor, norm: str, width: int) -> Tensor:
        """Return a projection's output by heads, [..., H, C], normed and clipped as the architecture does."""
        layer: Any = getattr(self.attention, norm, None) if norm else None
        if layer is not None:
            weight = getattr(layer, "weight", None)
            # over a head in Qwen3 and Gemma 3, over all of them in OLMoE
            over = width if weight is None else weight.shape[-1]
            states = layer.forward(_split(states, over)).flatten(-2)
        clip = getattr(getattr(self.attention, "config", None), "clip_qkv", None)
        if clip is not None:
            states = states.clamp(-clip, clip)
        return _split(states, width)

    def rotated(self, query_BTHC: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the query after RoPE, by the architecture's own function; as it is in layers without RoPE."""
        if not getattr(self.attention, "use_rope", True):
            return query_BTHC
        if rotary is None or self.rotate is None:
            raise RuntimeError(
                f"{self.site.path}: the prompt needs the rotary embedding of {type(self.attention).__name__}, and it "
                "is of no known form; leave 'prompt' out of adapters."
            )
        cos, sin = rotary
        turned = cos.shape[-1]  # some families turn a part of each head
        query_BHTC = query_BTHC[..., :turned].transpose(1, 2)
        turned_BHTC, _ = self.rotate(query_BHTC, query_BHTC[:, :1], cos, sin)
        return torch.cat([turned_BHTC.transpose(1, 2), query_BTHC[..., turned:]], -1)


def _split(states: Tensor, width: int) -> Tensor:
    return states.reshape(*states.shape[:-1], -1, width)
