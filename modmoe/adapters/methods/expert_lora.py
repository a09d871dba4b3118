"""Expert LoRA: one LoRA for each fused expert and projection of an MoE block, under the frozen router.

What PEFT calls ``target_parameters``, https://huggingface.co/docs/peft/developer_guides/lora; PERFT's embedded experts
(https://arxiv.org/abs/2411.08212), but for each projection instead of for the whole expert.

    [gate, up] = (W_e + alpha / r  B_e A_e) x            W_e [2 I, D]
    y_e = (V_e + alpha / r  D_e C_e) (act(gate) * up)    V_e [D, I]
    y = sum_k w_k y_{i_k}                                with the base router's weights w and experts i

A block costs E r (D + 2 I) and E r (I + D). It merges exactly into the experts' weights. PEFT makes all W_e + B_e A_e
anew in each forward, and so cannot have dropout; here tokens are sorted by expert, and each expert's go through W_e and
through its LoRA. A begins as ``nn.Linear`` does and B at zero, as in PEFT.
"""

# Shapes: T tokens, D width, K top_k, E experts, R rank, I an expert's neurons, F = 2 I gate and up rows,
#         N tokens of one expert, S = K T choices sorted by expert; in and out widths of any projection: I, O

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.passes import Frame
from ..mechanism.routing import by_expert, dropped, kaiming_


@dataclass(kw_only=True)
class ExpertLoRASettings:
    """The choices of expert LoRA."""

    r: int = 4
    """Rank of each expert's LoRA; a dense LoRA's rank divided by the experts a token gets costs about as much."""
    lora_alpha: float = 8
    """The deltas are multiplied by lora_alpha / r."""
    lora_dropout: float = 0.0
    """Dropout on the LoRAs' inputs; an adapter for PEFT must have none."""


class ExpertLoRA(RoutedAdapter):
    """A LoRA in each projection of each expert of the base model."""

    method = "expert_lora"
    kind = "experts"
    fold: ClassVar[Fold] = "exact"
    gate_up_a_ERD: Tensor
    gate_up_b_EFR: Tensor
    down_a_ERI: Tensor
    down_b_EDR: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Refuse experts of another form."""
        super().check(settings, shape)
        if shape.expert_form:
            raise ValueError(
                f"expert_lora knows experts of the form [E, 2 I, D] and [E, D, I] without bias, and these have: "
                f"{shape.expert_form}; use perft_e."
            )

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return A and B of both projections of all experts."""
        experts, rank = shape.num_experts, settings.r
        width, rows = shape.parts["gate_up_proj"]
        neurons, outputs = shape.parts["down_proj"]
        return {
            "gate_up_a_ERD": (experts, rank, width),
            "gate_up_b_EFR": (experts, rows, rank),
            "down_a_ERI": (experts, rank, neurons),
            "down_b_EDR": (experts, outputs, rank),
        }

    def reset_parameters(self) -> None:
        """A as ``nn.Linear``, B zero."""
        for a_ERI, b_EOR in self.pairs().values():
            kaiming_(a_ERI)
            b_EOR.zero_()

    def pairs(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return (A, B) of each projection by its name in the base model."""
        return {
            "gate_up_proj": (self.gate_up_a_ERD, self.gate_up_b_EFR),
            "down_proj": (self.down_a_ERI, self.down_b_EDR),
        }

    def mix(
        self, experts: nn.Module, frame: Frame, hidden_TD: Tensor, top_k_index_TK: Tensor, top_k_weights_TK: Tensor
    ) -> Tensor:
        """Return the experts' output, [T, D], as the base model computes it, with the LoRAs in it.

        Args:
            experts: the base model's fused experts.
            frame: the decoder layer's run.
            hidden_TD: the block's input.
            top_k_index_TK: each token's experts; one of ``num_experts`` is passed over, as an expert of another device.
            top_k_weights_TK: what multiplies their outputs.
        """
        base: Any = experts
        ids_TK = frame.decide(f"{self.site} experts", lambda: top_k_index_TK)
        order_S, counts = by_expert(ids_TK, self.shape.num_experts)
        order_S = order_S[: sum(counts)]
        token_S = order_S % len(hidden_TD)
        # unbind, not an index in the loop: its gradient would be a tensor of all experts for each expert
        stacks = (base.gate_up_proj, *self.pairs()["gate_up_proj"], base.down_proj, *self.pairs()["down_proj"])
        inputs = torch.split(hidden_TD[token_S], counts)
        rows = []
        for x_ND, *gate_up, down, a_RI, b_DR in zip(inputs, *(stack.unbind(0) for stack in stacks), strict=True):
            if len(x_ND):
                gated_NI = _gated(base, self._project(x_ND, *gate_up))
                rows.append(self._project(gated_NI, down, a_RI, b_DR))
        if not rows:
            return torch.zeros_like(hidden_TD)
        weighted_SD = torch.cat(rows) * top_k_weights_TK.T.reshape(-1, 1)[order_S]
        # summed in the order in which the base model sums, so that B = 0 is the base model bit for bit
        if getattr(getattr(base, "config", None), "_experts_implementation", "eager") == "eager":
            y_TD = torch.zeros_like(hidden_TD)
            for token_N, y_ND in zip(torch.split(token_S, counts), torch.split(weighted_SD, counts), strict=True):
                # one call for all experts would round half precision less often
                y_TD.index_add_(0, token_N, y_ND.to(y_TD.dtype))
            return y_TD
        tokens, top_k = ids_TK.shape
        place_S = token_S * top_k + order_S // tokens
        y_SD = weighted_SD.new_zeros(ids_TK.numel(), hidden_TD.shape[1]).index_copy(0, place_S, weighted_SD)
        return y_SD.view(tokens, top_k, -1).sum(1).to(hidden_TD.dtype)

    def _project(self, x_NI: Tensor, weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
        y_NO = F.linear(x_NI, weight_OI)
        z_NR = F.linear(dropped(x_NI.to(a_RI.dtype), self.settings.lora_dropout, self.training), a_RI)
        return y_NO + (self._scale * F.linear(z_NR, b_OR)).to(y_NO.dtype)

    @property
    def _scale(self) -> float:
        scale: float = self.settings.lora_alpha / self.settings.r
        return scale

    @torch.no_grad()
    def merged(self, experts: nn.Module) -> dict[str, Tensor]:
        """Return the base's ``gate_up_proj`` and ``down_proj`` with the LoRAs in them; ``experts`` stays as it is."""
        result = {}
        for name, (a_ERI, b_EOR) in self.pairs().items():
            weight_EOI = getattr(experts, name).detach().clone()
            for weight_OI, a_RI, b_OR in zip(weight_EOI, a_ERI, b_EOR, strict=True):
                # added in the LoRA's precision: one expert at a time, for all at once may not fit
                weight_OI.copy_(weight_OI.to(b_OR.dtype) + self._scale * b_OR @ a_RI)
            result[name] = weight_EOI
        return result


def to_peft_layout(a_ERI: Tensor, b_EOR: Tensor) -> tuple[Tensor, Tensor]:
    """Return A and B of all experts as PEFT stores those of one of ``target_parameters``.

    Row e r + p of its lora_A, [E R, I], belongs to column p E + e of its lora_B, [O, R E]: experts are the slow index
    in the one and the fast one in the other.
    """
    return a_ERI.flatten(0, 1), b_EOR.permute(1, 2, 0).flatten(1)


def from_peft_layout(lora_a_XI: Tensor, lora_b_OX: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return A, [E, R, I], and B, [E, O, R], of what PEFT stores; ``to_peft_layout`` backwards."""
    inputs, outputs = lora_a_XI.shape[1], lora_b_OX.shape[0]
    return lora_a_XI.view(num_experts, -1, inputs), lora_b_OX.view(outputs, -1, num_experts).permute(2, 0, 1)


def _gated(experts: Any, gate_up_NF: Tensor) -> Tensor:
    """Return act(gate) * up as the base model's experts compute it."""
    if hasattr(experts, "_apply_gate"):
        gated: Tensor = experts._apply_gate(gate_up_NF)
        return gated
    gate_NI, up_NI = gate_up_NF.chunk(2, dim=-1)
    product: Tensor = experts.act_fn(gate_NI) * up_NI
    return product
