"""The loop that anyone can read: a decoder layer with MoA's adapters, token by token and head by head; and models."""

# Shapes: T tokens, D model width, E adapter types, H heads, C head width, P prompt vectors

from __future__ import annotations

import math
from typing import Any

import torch
import transformers
from torch import Tensor

from modmoe.adapters.mechanism.attach import attach
from modmoe.adapters.methods.moa import MoA, SoftMoA, SoftMoASettings, SparseMoA, SparseMoASettings
from tests.support.tiny import _GATED, dense_model


def weights(adapter: Any, x_D: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """Return the weight of each type for one token, and True for those that are chosen; the router is float32."""
    p, settings, x_D = dict(adapter.named_parameters()), adapter.settings, x_D.float()
    if settings.router_width:
        gate_X = p["router_gate_XD"].float() @ x_D + p["router_gate_bias_X"]
        up_X = p["router_up_XD"].float() @ x_D + p["router_up_bias_X"]
        hidden_X = (gate_X * torch.sigmoid(gate_X) * up_X).float()
        logits_E = p["router_down_EX"].float() @ hidden_X + p["router_down_bias_E"]
    else:
        logits_E = p["router_ED"].float() @ x_D + p["router_bias_E"]
    probs_E = torch.sigmoid(logits_E)
    if adapter.method == "soft_moa":
        return dict(zip(adapter.types, probs_E, strict=True)), probs_E > 0
    tau = torch.as_tensor(settings.const_threshold if settings.const_threshold is not None else 0.0)
    if settings.const_threshold is None:
        tau = 0.5 * torch.sigmoid(p["threshold_1D"][0].float() @ x_D + p["threshold_bias_1"][0])
    values = []
    for s in probs_E:
        chosen = bool(s >= tau)
        if settings.threshold_weight == "raw":
            values.append(s * chosen)
        elif settings.threshold_weight == "minus_tau":
            values.append(s - tau if chosen else s * 0)
        else:
            soft = torch.sigmoid((s - tau) / 0.1)
            values.append(s * (chosen + soft - soft.detach()))
    return dict(zip(adapter.types, values, strict=True)), probs_E >= tau


def features(adapter: Any, x_TD: Tensor) -> list[Tensor]:
    """Return what the router reads for each token of an unmarked text."""
    if getattr(adapter.settings, "routing", "token") == "token":
        return list(x_TD)
    chunk = adapter.settings.routing_chunk
    starts = [t // chunk * chunk for t in range(len(x_TD))]
    return [x_TD[0] if start == 0 else x_TD[:start].mean(0) for start in starts]


def linear(layer: Any, x_D: Tensor) -> Tensor:
    """Return a frozen linear layer's output, without hooks."""
    return layer.weight @ x_D if layer.bias is None else layer.weight @ x_D + layer.bias


def with_lora(adapter: Any, name: str, layer: Any, x_D: Tensor, weight: dict[str, Tensor]) -> Tensor:
    """Return a linear layer's output with the adapter's LoRA of that type, if there is one."""
    y_O = linear(layer, x_D)
    if name not in weight:
        return y_O
    scale = adapter.settings.lora_alpha / adapter.settings.r
    down_RD, up_OR = getattr(adapter, f"down_{name}_RD"), getattr(adapter, f"up_{name}_OR")
    return y_O + weight[name] * scale * (up_OR @ (down_RD @ x_D))


def by_head(attention: Any, x_O: Tensor, norm: str | None) -> list[Tensor]:
    """Return q, k or v of one token by heads, normed over a head (Qwen3) or over all of them (OLMoE), and clipped."""
    width = attention.head_dim
    layer = getattr(attention, norm, None) if norm else None
    if layer is not None and layer.weight.numel() != width:
        x_O, layer = layer.forward(x_O), None
    heads = [x_O[start : start + width] for start in range(0, len(x_O), width)]
    if layer is not None:
        heads = [layer.forward(head) for head in heads]
    clip = getattr(attention.config, "clip_qkv", None)
    return heads if clip is None else [head.clamp(-clip, clip) for head in heads]


def turned(x_C: Tensor, position: int, theta: float) -> Tensor:
    """Return one head after RoPE: number c and number c + C / 2 are turned together."""
    half = len(x_C) // 2
    out = [torch.zeros(())] * len(x_C)
    for c in range(half):
        angle = position / theta ** (2 * c / len(x_C))
        cos, sin = math.cos(angle), math.sin(angle)
        out[c] = x_C[c] * cos - x_C[c + half] * sin
        out[c + half] = x_C[c + half] * cos + x_C[c] * sin
    return torch.stack(out)


def attend(query_C: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """Return what one query reads."""
    scores = torch.stack([query_C @ key for key in keys]) / math.sqrt(len(query_C))
    return sum(share * value for share, value in zip(scores.softmax(0), values, strict=True))


def decoder_layer(layer: Any, adapter: Any, x_TD: Tensor, theta: float) -> Tensor:
    """Return a Llama, Qwen3, Mixtral or OLMoE layer's output for one sequence, with the adapter's types."""
    attention, tokens = layer.self_attn, range(len(x_TD))
    normed_TD = layer.input_layernorm.forward(x_TD)
    read = features(adapter, x_TD if adapter.settings.router_input == "layer" else normed_TD)
    weight_T = [weights(adapter, read_D)[0] for read_D in read]

    def project(name: str, x_D: Tensor, t: int) -> Tensor:
        return with_lora(adapter, name, getattr(attention, name), x_D, weight_T[t])

    query_T = [by_head(attention, project("q_proj", normed_TD[t], t), "q_norm") for t in tokens]
    key_T = [by_head(attention, project("k_proj", normed_TD[t], t), "k_norm") for t in tokens]
    value_T = [by_head(attention, project("v_proj", normed_TD[t], t), None) for t in tokens]
    query_T = [[turned(head, t, theta) for head in query_T[t]] for t in tokens]
    key_T = [[turned(head, t, theta) for head in key_T[t]] for t in tokens]
    prompt_keys, prompt_values = [], []
    for prompt_D in getattr(adapter, "prompt_PD", []):
        prompt_keys.append(by_head(attention, linear(attention.k_proj, prompt_D), "k_norm"))
        prompt_values.append(by_head(attention, linear(attention.v_proj, prompt_D), None))
    shared = len(query_T[0]) // len(key_T[0])

    middle_TD = []
    for t in tokens:
        heads = []
        for h, query_C in enumerate(query_T[t]):
            g = h // shared
            out_C = attend(query_C, [key_T[s][g] for s in range(t + 1)], [value_T[s][g] for s in range(t + 1)])
            if "prompt" in weight_T[t]:
                read_C = attend(query_C, [key[g] for key in prompt_keys], [value[g] for value in prompt_values])
                out_C = out_C + weight_T[t]["prompt"] * adapter.prompt_gate_H[h] * read_C
            heads.append(out_C)
        middle_TD.append(x_TD[t] + project("o_proj", torch.cat(heads), t))

    block_TD = layer.post_attention_layernorm.forward(torch.stack(middle_TD))
    out_TD = []
    moe_TD = None if hasattr(layer.mlp, "down_proj") else layer.mlp.forward(block_TD.unsqueeze(0))[0]
    for t in tokens:
        if moe_TD is None:
            gate_F, up_F = linear(layer.mlp.gate_proj, block_TD[t]), linear(layer.mlp.up_proj, block_TD[t])
            hidden_F = gate_F * torch.sigmoid(gate_F) * up_F
            y_D = with_lora(adapter, "down_proj", layer.mlp.down_proj, hidden_F, weight_T[t])
        else:
            y_D = moe_TD[t]
        if "parallel" in weight_T[t]:
            hidden_W = adapter.down_parallel_WD @ block_TD[t] + adapter.down_parallel_bias_W
            hidden_W = hidden_W * torch.sigmoid(hidden_W)
            y_D = y_D + weight_T[t]["parallel"] * (adapter.up_parallel_DW @ hidden_W + adapter.up_parallel_bias_D)
        out_TD.append(middle_TD[t] + y_D)
    return torch.stack(out_TD)


def logits(model: Any, adapters: list[Any], ids_BT: Tensor) -> Tensor:
    """Return the logits of a causal LM whose every decoder layer has one adapter, sequence by sequence."""
    theta = model.config.rope_parameters["rope_theta"]
    rows = []
    for ids_T in ids_BT:
        x_TD = model.model.embed_tokens.weight[ids_T]
        for layer, adapter in zip(model.model.layers, adapters, strict=True):
            x_TD = decoder_layer(layer, adapter, x_TD, theta)
        rows.append(model.model.norm.forward(x_TD) @ model.lm_head.weight.T)
    return torch.stack(rows)


MOE = {
    "mixtral": ("MixtralConfig", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmoe": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2}),
    "olmoe_clipped": ("OlmoeConfig", {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.7}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0]}),
    "glm4": ("Glm4Config", {"head_dim": 8, "partial_rotary_factor": 0.5}),
}
CASES: dict[str, tuple[type[MoA], Any]] = {
    "soft": (SoftMoA, SoftMoASettings(r=3, lora_alpha=5, bottleneck_size=5, num_virtual_tokens=3)),
    "soft, normed": (SoftMoA, SoftMoASettings(r=3, router_input="norm", router_width=3)),
    "soft, linear router": (SoftMoA, SoftMoASettings(r=3, router_width=0, adapters=("prompt", "o_proj"))),
    "soft, instance": (SoftMoA, SoftMoASettings(r=3, routing="instance", routing_chunk=4)),
    "sparse": (SparseMoA, SparseMoASettings(r=3, lora_alpha=2)),
    "sparse, raw": (SparseMoA, SparseMoASettings(r=3, threshold_weight="raw")),
    "sparse, minus_tau": (SparseMoA, SparseMoASettings(r=3, threshold_weight="minus_tau")),
    "sparse, constant": (SparseMoA, SparseMoASettings(r=3, const_threshold=0.5, adapters=("q_proj", "prompt"))),
}


def base(name: str, **changes: Any) -> Any:
    if name not in MOE:
        return dense_model(name, **changes)
    kind, values = MOE[name]
    torch.manual_seed(0)
    config = getattr(transformers, kind)(**{**_GATED, **values, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()


def adapters_of(model: Any) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, MoA)]


def randomise(model: Any, seed: int = 0, scale: float = 0.4) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters_of(model):
            for name, weight in adapter.named_parameters():
                weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
                # routers compute in float32: small ones keep what they round small, large biases keep them apart
                if "router" in name or "threshold" in name:
                    weight.mul_(4 if name.startswith("router_down") else 0.3)
    return model


def made(name: str, case: str = "soft", *, double: bool = True, **changes: Any) -> Any:
    """Return a frozen model with random adapters."""
    model = base(name, **changes).requires_grad_(False)
    torch.manual_seed(1)
    attach(model, *CASES[case])
    if double:
        model.double()
    return randomise(model)


def grads(loss: Tensor, adapters: list[Any]) -> dict[str, Tensor | None]:
    named = {f"{i}.{name}": p for i, adapter in enumerate(adapters) for name, p in adapter.named_parameters()}
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {name: grad for (name, _), grad in zip(named.items(), found, strict=True)}
