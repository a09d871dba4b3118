"""The tied FFN: one copy of every module, shared by all experts that have it.

    y = sum_j c_j(x) F_j(x) + bias,    F_j(x) = down[:, j] (act(gate_j x) * (up_j x))

    union   c_j = 1 where any chosen expert has module j
    sum     c = weights A, with the weights of the chosen experts normalised and A the membership

The three matrices are the dense FFN's own, with the neurons reordered. With all modules on, the layer therefore
computes what the dense FFN does.
"""

# Shapes: B batch, T tokens (of one sequence, or of all of them in a row), D model width, S stored modules,
# F neurons stored, E experts, K top_k, N tokens that chose alike

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN

from .routing_modmoe import RoutingState, pass_of
from .sequences_modmoe import sequence_features
from .ways_modmoe import Layout, by_runs, compiled_gather, gather_token, lanes_of, run_tokens


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
    ranking: Tensor

    def __init__(self, config: Any, layer: int, state: RoutingState) -> None:
        """Make the layer that ``config`` describes; ``state``, the settings, is shared by all layers of a model."""
        super().__init__()
        width, stored = config.hidden_size, config.stored_modules[layer]
        neurons = stored * config.module_size
        self.layer, self.state = layer, state
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.stored_modules, self.module_size, self.shared_modules = stored, config.module_size, config.shared_modules
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
        self.left_out_means = int(config.left_out_means)
        means_shape = (stored + self.left_out_means, width)
        self.means = nn.Parameter(torch.zeros(means_shape)) if config.compensation else None
        ranking_ER, membership_ES = self._first_experts(config.modules_per_expert)
        self.register_buffer("membership", membership_ES)
        self.register_buffer("ranking", ranking_ER)
        self._layouts: dict[int | None, Layout] = {}

    def _first_experts(self, each: int) -> tuple[Tensor, Tensor]:
        """Return ``ranking`` and ``membership`` of a model that was not converted: shared modules, then each its share.

        An expert's share begins where that of the expert before ends, around and around.
        """
        shared, stored = min(self.shared_modules, each), self.stored_modules
        expert_E1, place_R = torch.arange(self.num_experts).unsqueeze(1), torch.arange(each)
        others_ER = shared + (expert_E1 * (each - shared) + place_R - shared) % max(1, stored - shared)
        ranking_ER = torch.where(place_R < shared, place_R, others_ER).clamp_max(stored - 1)
        membership_ES = torch.zeros(self.num_experts, stored).scatter(1, ranking_ER, 1.0)
        return ranking_ER.to(torch.int32), membership_ES.bool()

    def init_own(self, std: float) -> None:
        """Give the router, the means and the tables their first values, but for what is loaded."""
        ranking_ER, membership_ES = self._first_experts(self.ranking.shape[1])
        init.copy_(self.ranking, ranking_ER)
        init.copy_(self.membership, membership_ES)
        self._layouts.clear()
        if self.means is not None:
            init.zeros_(self.means)
        if self.router is not None and hasattr(self.router, "weight"):
            init.normal_(self.router.weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., D] to [..., D]."""
        x_TD = x.reshape(-1, x.shape[-1])
        state = self.state
        if state.all_on:
            y_TD = self.down_proj(self._hidden(x_TD))
        else:
            way = self._way(x_TD)
            if way == "runs" and state.expert is not None and pass_of(state, x).expert_ids_N is None:
                y_TD = self._one_expert(x_TD, state.expert)
            else:
                ids_TK, weights_TK = self._choose(x, x_TD)
                y_TD = self._WAYS[way](self, x_TD, ids_TK, weights_TK)
        y = y_TD.reshape(x.shape)
        dropped: Tensor = self.dropout(y) if self.training else y
        return dropped

    def _hidden(self, x_TD: Tensor) -> Tensor:
        up_TF: Tensor = self.up_proj(x_TD)
        hidden_TF: Tensor = self.act_fn(self.gate_proj(x_TD)) * up_TF if self.gated else self.act_fn(up_TF)
        return hidden_TF

    def _choose(self, x: Tensor, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts ids_TK and their weights_TK (probabilities; normalised over K for ``sum``)."""
        run = pass_of(self.state, x)
        named_T = run.named_experts(x_TD.shape[0], x_TD.device)
        if named_T is not None:
            return named_T[:, None], torch.ones_like(named_T[:, None], dtype=x_TD.dtype)
        if self.router is None:
            raise ValueError(
                "this model is routed by task: name the expert, as in model.set_expert(name) or expert_ids=..., one of "
                f"{self.state.expert_names}"
            )
        is_weighted = self.combine == "sum" and self.top_k > 1
        if not is_weighted:
            # only the router learns from a choice that weighs nothing: that gradient is no descent of the loss, and all
            # it would tell the layers before grows with the router's weights until it drowns theirs
            x, x_TD = x.detach(), x_TD.detach()
        features_TD = x_TD
        if self.routing == "sequence":
            kept = run.kept_choice(self.layer)
            if kept is not None:
                return kept
            features_TD = sequence_features(run, self.layer, x, self.chunk)
        logits_TE = self.router(features_TD)
        run.record(self.layer, logits_TE)
        probs_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
        weights_TK, ids_TK = probs_TE.topk(self.top_k, dim=-1)
        if is_weighted:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        weights_TK = weights_TK.to(x_TD.dtype)
        if self.routing == "sequence":
            run.keep_choice(self.layer, ids_TK, weights_TK)
        return ids_TK, weights_TK

    def coefficients(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Return what multiplies each module's output, coefficients_TS, and whether it is on at all, active_TS.

        Where experts are not weighted (union, or a single one) the value is exactly 1 and the gradient that of the
        logarithm of the module's summed weight: a weight normalised to 1 would give the router no gradient. It ends at
        the router's weights (see ``_choose``).
        """
        member_ES = self.member_ES(weights_TK.dtype)
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
            y_TD = y_TD + self._missing((~active_TS).to(y_TD.dtype)) @ self.means
        return y_TD

    def _missing(self, skipped: Tensor) -> Tensor:
        """Return skipped modules as 1 and others as 0, [..., S], with a 1 for those that are never there, if any."""
        return F.pad(skipped, (0, self.left_out_means), value=1.0)

    def _way(self, x_TD: Tensor) -> str:
        """Return the way that this pass is computed: what was asked for, as far as the shape and the weights allow."""
        asked = self.state.way
        # also where a way is asked for: it would pass over what sits on the matrices
        if asked == "masked" or not self._is_plain() or (asked == "auto" and self.training):
            return "masked"
        if torch.compiler.is_compiling():
            return "gather" if len(x_TD) == 1 and not torch.is_grad_enabled() else "masked"
        if asked == "gather" and len(x_TD) == 1 and not torch.is_grad_enabled():
            return "gather"
        return "runs"

    def _is_plain(self) -> bool:
        """Whether the matrices may be read directly: no LoRA, quantization, offloading or hook in between."""
        modules = self._modules
        for name in ("up_proj", "down_proj", "gate_proj") if self.gated else ("up_proj", "down_proj"):
            linear: Any = modules[name]
            # its attributes are read where nn.Module keeps them: this runs for every token
            held = linear.__dict__
            weight = held["_parameters"].get("weight")
            if type(linear) is not nn.Linear or type(weight) is not nn.Parameter:
                return False
            if "_hf_hook" in held or held["_forward_hooks"] or held["_forward_pre_hooks"]:
                return False
        return not torch.is_autocast_enabled(weight.device.type)

    def member_ES(self, dtype: torch.dtype) -> Tensor:
        """Return 1 where an expert has a module that counts, after ``set_active_modules``, else 0."""
        active = self.state.active_modules
        if active is None:
            return self.membership.to(dtype)
        zeros_ES = torch.zeros(self.membership.shape, dtype=dtype, device=self.membership.device)
        return zeros_ES.scatter(1, self.ranking[:, :active].long(), 1)

    def check_ranking(self) -> None:
        """Rank modules in the order in which they are stored where ``ranking`` is not of the experts' own modules.

        So it is in checkpoints that were written without it.
        """
        known_ER = self.ranking.long().clamp(0, self.stored_modules - 1)
        held_ES = torch.zeros_like(self.membership).scatter(1, known_ER, True)
        if not torch.equal(known_ER, self.ranking.long()) or not torch.equal(held_ES, self.membership):
            first_ES = self.membership.to(torch.int8).sort(dim=-1, descending=True, stable=True).indices
            self.ranking.copy_(first_ES[:, : self.ranking.shape[1]])

    def layout(self) -> Layout:
        """Return what the experts are, on the host; made when first asked for, by the modules that count now."""
        active = self.state.active_modules
        layout = self._layouts.get(active)
        if layout is None:
            self.check_ranking()
            layout = self._layouts[active] = Layout(self.ranking[:, :active].tolist(), self.stored_modules)
        return layout

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._layouts.clear()
        super()._load_from_state_dict(*args, **kwargs)

    def _one_expert(self, x_TD: Tensor, expert: int) -> Tensor:
        """The runs of one expert for all tokens: nothing is chosen, sorted or scaled, and nothing leaves the device."""
        layout = self.layout()
        y_TD = by_runs(self, x_TD, layout.runs(layout.set_E[expert]))
        if self.down_proj.bias is not None:
            y_TD = y_TD + self.down_proj.bias
        if self.means is not None:
            y_TD = y_TD + self._missing(1 - self.member_ES(y_TD.dtype)[expert]) @ self.means
        return y_TD

    def _sliced(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Only the neurons that are on, as slices of the matrices: tokens that chose alike go together."""
        is_scaled = self.combine == "sum" and ids_TK.shape[1] > 1
        scale_TS = None
        if is_scaled or weights_TK.requires_grad:
            scale_TS, _ = self.coefficients(ids_TK, weights_TK)
        y_TD = run_tokens(self, x_TD, self.layout(), ids_TK, scale_TS)
        return self._add_constants(y_TD, ids_TK)

    def _gathered(self, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor) -> Tensor:
        """One token, its modules as a tensor: what a compiler makes copy-free loops of."""
        scale_A = None
        if ids_1K.shape[1] == 1:
            modules_A = self.ranking[ids_1K[:, 0]][0, : self.state.active_modules].long()
        else:
            scale_1S, active_1S = self.coefficients(ids_1K, weights_1K)
            each = self.ranking[:, : self.state.active_modules].shape[1]
            # a union has as many modules at most, since what all experts have ranks first; what is missing is filled
            # with modules that count 0
            shared = min(self.shared_modules, each)
            most = min(self.stored_modules, shared + ids_1K.shape[1] * (each - shared))
            modules_A = active_1S[0].to(torch.int8).sort(descending=True, stable=True).indices[:most]
            scale_A = scale_1S[0, modules_A]
        gate = self.gate_proj if self.gated else None
        call = gather_token if torch.compiler.is_compiling() else compiled_gather()
        y_1D = call(
            x_1D,
            None if gate is None else gate.weight,
            self.up_proj.weight,
            self.down_proj.weight,
            None if gate is None else gate.bias,
            self.up_proj.bias,
            modules_A,
            scale_A,
            self.act_fn,
            self.module_size,
            lanes_of(self.module_size, self.down_proj.out_features, x_1D.device),
        )
        return self._add_constants(y_1D, ids_1K)

    def _add_constants(self, y_TD: Tensor, ids_TK: Tensor) -> Tensor:
        """Add what lies behind ``down``: its bias, and the means of skipped modules."""
        if self.down_proj.bias is not None:
            y_TD = y_TD + self.down_proj.bias
        if self.means is not None:
            y_TD = y_TD + self._missing(1 - self.member_ES(y_TD.dtype)[ids_TK].amax(1)) @ self.means
        return y_TD

    _WAYS: ClassVar[dict[str, Any]] = {"masked": _masked, "runs": _sliced, "gather": _gathered}
