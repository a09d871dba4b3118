"""The tied FFN: one copy of every module, shared by all experts that have it.

    y = sum_j c_j(x) F_j(x) + bias,    F_j(x) = down[:, j] (act(gate_j x) * (up_j x))

    union   c_j = 1 where any chosen expert has module j
    sum     c = weights A, with the weights of the chosen experts normalised and A the membership

The three matrices are the dense FFN's own with their neurons reordered, so that with all modules on this is it.
"""

# Shapes: B batch, T tokens (of one sequence, or of all of them in a row), D model width, S stored modules,
# F neurons stored, E experts, K top_k, N tokens that chose alike

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from .routing_modmoe import RoutingState, sequence_features


class ModularRouter(nn.Module):
    """Scores experts: one matrix, or two with a ReLU between; no bias, so that other MoE formats can hold it."""

    def __init__(self, width: int, num_experts: int, hidden: int = 0) -> None:
        """Make a linear router, or a two-layer one if ``hidden`` is above 0."""
        super().__init__()
        if hidden:
            self.hidden = nn.Linear(width, hidden, bias=False)
            self.output = nn.Linear(hidden, num_experts, bias=False)
        else:
            self.weight = nn.Parameter(torch.zeros(num_experts, width))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits_TE."""
        if hasattr(self, "hidden"):
            logits_TE: Tensor = self.output(torch.relu(self.hidden(x_TD)))
            return logits_TE
        return F.linear(x_TD, self.weight)


class ModularFFN(nn.Module):
    """A feed-forward layer whose experts are sets of shared modules. All ways of computing it are equal."""

    membership: Tensor

    def __init__(self, config: Any, layer: int, state: RoutingState) -> None:
        """Make the layer that ``config`` describes; ``state`` is shared by all layers of a model."""
        super().__init__()
        width, stored = config.hidden_size, config.stored_modules[layer]
        neurons = stored * config.module_size
        self.layer, self.state = layer, state
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.stored_modules, self.module_size = stored, config.module_size
        self.routing, self.combine, self.chunk = config.routing, config.combine, config.routing_chunk
        biased = set(config.ffn_biases)
        self.gated = config.ffn_gated
        if self.gated:
            self.gate_proj = nn.Linear(width, neurons, bias="gate" in biased)
        self.up_proj = nn.Linear(width, neurons, bias="up" in biased)
        self.down_proj = nn.Linear(neurons, width, bias="down" in biased)
        self.act_fn = ACT2FN[config.ffn_activation]
        self.dropout = nn.Dropout(config.ffn_dropout)
        self.router = None
        if config.routing != "task":
            self.router = ModularRouter(width, config.num_experts, config.router_hidden)
        self.means = nn.Parameter(torch.zeros(stored, width)) if config.compensation else None
        self.register_buffer("membership", torch.ones(config.num_experts, stored, dtype=torch.bool))
        self._runs: dict[tuple[int, ...], list[tuple[int, int]]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        x_TD = x.reshape(-1, x.shape[-1])
        if self.state.all_on:
            y_TD = self.down_proj(self._hidden(x_TD))
        else:
            ids_TK, weights_TK = self._choose(x, x_TD)
            if self._can_slice():
                y_TD = self._slices(x_TD, ids_TK, weights_TK)
            else:
                y_TD = self._masked(x_TD, ids_TK, weights_TK)
        dropped: Tensor = self.dropout(y_TD.reshape(x.shape))
        return dropped

    def _hidden(self, x_TD: Tensor) -> Tensor:
        up_TF: Tensor = self.up_proj(x_TD)
        hidden_TF: Tensor = self.act_fn(self.gate_proj(x_TD)) * up_TF if self.gated else self.act_fn(up_TF)
        return hidden_TF

    def _choose(self, x: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts ids_TK and their weights_TK (probabilities; normalised over K for ``sum``)."""
        named_T = self.state.named_experts(x_TD.shape[0], x_TD.device)
        if named_T is not None:
            return named_T[:, None], torch.ones_like(named_T[:, None], dtype=x_TD.dtype)
        if self.router is None:
            raise ValueError(
                "this model is routed by task: name the expert, as in model.set_expert(name) or expert_ids=..., one of "
                f"{self.state.expert_names}"
            )
        features_TD = x_TD
        if self.routing == "sequence":
            features_TD = sequence_features(self.state, self.layer, x, self.chunk)
        logits_TE = self.router(features_TD)
        self.state.record(self.layer, logits_TE)
        probs_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
        weights_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        if self.combine == "sum" and self.top_k > 1:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        return ids_TK, weights_TK.to(x_TD.dtype)

    def coefficients(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return what multiplies each module's output, coefficients_TS, and whether it is on at all, active_TS.

        Where experts are not weighted (union, or a single one) the value is exactly 1 and the gradient that of the
        logarithm of the module's summed weight: a weight normalised to 1 would give the router no gradient.
        """
        member_ES = self.membership.to(weights_TK.dtype)
        shape_TE = (ids_TK.shape[0], self.num_experts)
        chosen_TE = weights_TK.new_zeros(shape_TE).scatter(1, ids_TK, 1.0)
        active_TS = (chosen_TE @ member_ES) > 0
        if self.combine == "sum" and self.top_k > 1 and ids_TK.shape[1] > 1:
            weights_TE = weights_TK.new_zeros(shape_TE).scatter(1, ids_TK, weights_TK)
            return weights_TE @ member_ES, active_TS
        ones_TS = active_TS.to(weights_TK.dtype)
        if not weights_TK.requires_grad:
            return ones_TS, active_TS
        summed_TS = weights_TK.new_zeros(shape_TE).scatter(1, ids_TK, weights_TK) @ member_ES
        held_TS = summed_TS.detach()
        return ones_TS + ones_TS * (summed_TS - held_TS) / held_TS.clamp_min(1e-6), active_TS

    def _masked(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """The dense product with each module's neurons scaled: what training, LoRA and quantized weights use."""
        coefficients_TS, active_TS = self.coefficients(ids_TK, weights_TK)
        hidden_TSm = self._hidden(x_TD).reshape(-1, self.stored_modules, self.module_size)
        y_TD: Tensor = self.down_proj((hidden_TSm * coefficients_TS.unsqueeze(-1)).flatten(-2))
        if self.means is not None:
            y_TD = y_TD + (~active_TS).to(y_TD.dtype) @ self.means
        return y_TD

    def _can_slice(self) -> bool:
        """Whether the matrices may be read directly: no LoRA, quantization, offloading or tracing in between."""
        if self.state.way != "auto":
            return self.state.way == "runs"
        if self.training or torch.compiler.is_compiling():
            return False
        linears = [self.up_proj, self.down_proj, *([self.gate_proj] if self.gated else [])]
        return all(
            type(linear) is nn.Linear
            and not (hasattr(linear, "_hf_hook") or linear._forward_hooks or linear._forward_pre_hooks)
            for linear in linears
        )

    def runs(self, experts: Sequence[int]) -> list[tuple[int, int]]:
        """Return the ranges of neurons, begin and end, of the modules that any of ``experts`` has, in storage order."""
        key = tuple(experts)
        if key not in self._runs:
            used = self.membership[list(key)].any(0).tolist()
            found: list[tuple[int, int]] = []
            for module, is_used in enumerate(used):
                begin = module * self.module_size
                if is_used and found and found[-1][1] == begin:
                    found[-1] = (found[-1][0], begin + self.module_size)
                elif is_used:
                    found.append((begin, begin + self.module_size))
            self._runs[key] = found
        return self._runs[key]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._runs.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _slices(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Only the neurons that are on, as slices of the matrices: tokens that chose alike go together."""
        combinations_CK, which_T = torch.unique(ids_TK.sort(dim=-1).values, dim=0, return_inverse=True)
        if len(combinations_CK) > max(16, len(x_TD) // 8):
            return self._masked(x_TD, ids_TK, weights_TK)
        coefficients_TS, active_TS = self.coefficients(ids_TK, weights_TK)
        plain = not (self.combine == "sum" and ids_TK.shape[1] > 1) and not coefficients_TS.requires_grad
        y_TD = torch.zeros_like(x_TD)
        for number, experts in enumerate(combinations_CK.tolist()):
            alone = len(combinations_CK) == 1
            rows_N = (which_T == number).nonzero().squeeze(-1)
            x_ND = x_TD if alone else x_TD[rows_N]
            y_ND = None
            for begin, end in self.runs(experts):
                hidden_NF = self._hidden_slice(x_ND, begin, end)
                if not plain:
                    modules = slice(begin // self.module_size, end // self.module_size)
                    scale_NF = coefficients_TS[rows_N, modules].repeat_interleave(self.module_size, dim=-1)
                    hidden_NF = hidden_NF * scale_NF
                part_ND = F.linear(hidden_NF, self.down_proj.weight[:, begin:end])
                y_ND = part_ND if y_ND is None else y_ND + part_ND
            if y_ND is not None:
                y_TD = y_ND if alone else y_TD.index_copy(0, rows_N, y_ND)
        if self.down_proj.bias is not None:
            y_TD = y_TD + self.down_proj.bias
        if self.means is not None:
            y_TD = y_TD + (~active_TS).to(y_TD.dtype) @ self.means
        return y_TD

    def _hidden_slice(self, x_ND: Tensor, begin: int, end: int) -> Tensor:
        def project(linear: nn.Linear) -> Tensor:
            return F.linear(x_ND, linear.weight[begin:end], None if linear.bias is None else linear.bias[begin:end])

        up_NF = project(self.up_proj)
        hidden_NF: Tensor = self.act_fn(project(self.gate_proj)) * up_NF if self.gated else self.act_fn(up_NF)
        return hidden_NF
