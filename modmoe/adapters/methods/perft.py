"""PERFT: small experts beside a whole FFN or MoE block: routed, embedded in the base's experts, or always on.

    PERFT, https://arxiv.org/abs/2411.08212 and https://arxiv.org/abs/2508.02587

    lora      d_e(h) = alpha / r  B_e A_e dropout(h)             an expert, D -> r -> D, beside the block
    parallel  d_e(h) = B_e silu(dropout(A_e h))                  the other kind of expert, without a scale
    R         p = softmax(W h); y += sum of p_e d_e(h) over the top_k largest p_e
    E         y += sum_k g_k d_{i_k}(h)                          with the base router's weights g and experts i
    D         y += sum_e d_e(h)                                  M adapters, always on
    S         y += d(h)                                          one adapter, always on

E puts a d_e into each of the base's N experts, E_e + d_e: since the base weighs the two alike, the block's output grows
by the sum above, and no expert needs to be touched. A block costs 2 D r (S), 2 D r M (D), 2 D r M + M D (R) or 2 D r N
(E). Nothing of it folds into the base: the block is no linear map. D of M adapters is S of rank M r (``fold_perft_d``).

A begins as sqrt(2 / r) times a normal number, as in the released code; B there as 1e-6 times one, here as zero, so that
the model begins as the base model exactly. LoRA's dropout there is another one for each expert, here one for all.

Two faults of the released code, by its files for OLMoE and for Mixtral:
* OLMoE's multiplies the experts that the adapter's router chose by the base router's weights, so that its own learns
  from the balance loss alone: ``weight_source="base"``.
* Mixtral's divides the chosen probabilities by their sum; with top_k 1 that is the constant 1, and the router learns
  from the balance loss alone. Here it is p / stop_gradient(p): the same value, with a gradient.
"""

# Shapes: T tokens, D width, E adapter experts (the base's number for PERFT-E), R rank, X = E R, K top_k,
#         S = K T choices sorted by expert

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanism.base import RoutedAdapter, SiteShape
from ..mechanism.losses import Route
from ..mechanism.passes import Frame
from ..mechanism.routing import by_expert, down_and_logits, dropped, mix_up, normalised, softmax_experts


@dataclass(kw_only=True)
class PerftSSettings:
    """The choices of PERFT-S."""

    r: int = 16
    """Rank of an expert: the width it goes through."""
    lora_alpha: float = 32
    """A LoRA expert is multiplied by lora_alpha / r; the paper's scripts take twice r."""
    lora_dropout: float = 0.05
    """Dropout: of LoRA on the input, of parallel adapters in front of the activation."""
    expert: Literal["lora", "parallel"] = "lora"
    """What an expert is: a LoRA, or a parallel adapter with SiLU at its narrow place."""


@dataclass(kw_only=True)
class PerftDSettings(PerftSSettings):
    """The choices of PERFT-D."""

    num_experts: int = 2
    """Adapters side by side; the paper's scripts have 1, 2 and 4."""


@dataclass(kw_only=True)
class PerftESettings(PerftSSettings):
    """The choices of PERFT-E; it has as many experts as the base model's block."""

    r: int = 4
    """Rank of an expert: small, since there are as many as the base has (16.8 M parameters on OLMoE-1B-7B)."""
    lora_alpha: float = 8
    """A LoRA expert is multiplied by lora_alpha / r; the paper's scripts take twice r."""


@dataclass(kw_only=True)
class PerftRSettings(PerftSSettings):
    """The choices of PERFT-R; the defaults lie in the middle of the paper's sweeps, at 4.3 M parameters on OLMoE."""

    num_experts: int = 4
    """Adapter experts; the paper's scripts have 1 to 16."""
    top_k: int = 2
    """Experts that a token is given to; 2, since one alone always has the weight 1 where weights are renormalised."""
    weight_source: Literal["own", "base"] = "own"
    """own: the router's own probabilities, as the paper has it. base: the base router's weights, the largest for the
    first choice and so on, as the released code for OLMoE does; then the router has no gradient but its loss's."""
    renormalise: bool | None = None
    """Whether the chosen probabilities are divided by their sum; None: as the base block does it, or yes if dense."""
    balance_weight: float = 0.01
    """Factor of the Switch balance loss."""


class PerftS(RoutedAdapter):
    """One adapter beside the block, always on; the other three differ in their number and in what weighs them."""

    method = "perft_s"
    kind = "block"
    down_ERD: Tensor
    up_DER: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Refuse an unknown kind of expert."""
        super().check(settings, shape)
        if settings.expert not in ("lora", "parallel"):
            raise ValueError(f"expert: {settings.expert!r} is neither 'lora' nor 'parallel'.")

    @classmethod
    def count(cls, settings: Any, shape: SiteShape) -> int:
        """Return the number of experts."""
        return 1

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return A and B of all experts."""
        experts = cls.count(settings, shape)
        return {"down_ERD": (experts, settings.r, shape.inputs), "up_DER": (shape.outputs, experts, settings.r)}

    def reset_parameters(self) -> None:
        """A normal, B zero."""
        nn.init.normal_(self.down_ERD, std=math.sqrt(2 / self.settings.r))
        self.up_DER.zero_()

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return sum_e d_e(h)."""
        return _mix(self, x_TD)


class PerftD(PerftS):
    """Several adapters beside the block, always on."""

    method = "perft_d"
    merges_into = "perft_s"

    @classmethod
    def count(cls, settings: Any, shape: SiteShape) -> int:
        """Return the number of adapters."""
        experts: int = settings.num_experts
        return experts


class PerftE(PerftS):
    """An adapter in each expert of the base model, under the base router."""

    method = "perft_e"
    needs_base_router = True

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Refuse a dense block."""
        super().check(settings, shape)
        if not shape.num_experts:
            raise ValueError(
                "perft_e needs an MoE block, whose router it reuses; beside a dense FFN use perft_r or _d."
            )

    @classmethod
    def count(cls, settings: Any, shape: SiteShape) -> int:
        """Return the number of the base's experts."""
        return shape.num_experts

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return sum_k g_k d_{i_k}(h)."""
        weights_TK, now_TK = frame.values[f"{self.site} base router"]
        weights_TK = weights_TK.to(x_TD.dtype)
        ids_TK = frame.decide(f"{self.site} experts", lambda: now_TK)
        if self._sorts(x_TD, ids_TK):
            return self._by_slices(x_TD, weights_TK, ids_TK)
        experts = self.down_ERD.shape[0]
        # one column more, for choices of another device
        weights_TE = weights_TK.new_zeros(len(x_TD), experts + 1).scatter(-1, ids_TK, weights_TK)[:, :experts]
        return _mix(self, x_TD, weights_TE)

    def _sorts(self, x_TD: Tensor, ids_TK: Tensor) -> bool:
        """Return whether sorting tokens by expert is faster than all experts for all tokens.

        Measured on one CPU core, forward and backward, 512 tokens of width 2048, top_k 8: all for all takes 0.13 to
        0.2 ms a column of E R; sorting, which copies each token top_k times, 110 to 290 ms from E R = 256 to 4096. At
        64 experts of rank 16 all for all wins by 1.2, at 128 sorting by 1.8. Not measured elsewhere, where a loop over
        experts and its wait for their counts have to cost more.
        """
        experts, rank, _ = self.down_ERD.shape
        return x_TD.device.type == "cpu" and len(x_TD) >= experts and experts * rank > 192 * ids_TK.shape[1]

    def _by_slices(self, x_TD: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        on_input, on_narrow = _dropouts(self)
        order_S, counts = by_expert(ids_TK, self.down_ERD.shape[0])
        order_S = order_S[: sum(counts)]
        token_S = order_S % len(x_TD)
        x_SD = dropped(x_TD, on_input, True)[token_S]
        weights_S1 = _scale(self.settings) * weights_TK.T.reshape(-1, 1)[order_S]
        # unbind, not an index in the loop: its gradient would be a tensor of all experts for each expert
        sliced = zip(
            torch.split(x_SD, counts),
            torch.split(weights_S1, counts),
            self.down_ERD.unbind(0),
            self.up_DER.unbind(1),
            strict=True,
        )
        y_SD = torch.cat(
            [
                F.linear(_activate(self, F.linear(x_ND, down_RD), on_narrow) * weights_N1, up_DR)
                for x_ND, weights_N1, down_RD, up_DR in sliced
            ]
        )
        return y_SD.new_zeros(x_TD.shape).index_add(0, token_S, y_SD)


class PerftR(PerftD):
    """Adapters beside the block with a router of their own."""

    method = "perft_r"
    needs_base_router: ClassVar[bool | Literal["maybe"]] = "maybe"
    router_ED: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Refuse the base router's weights where it has none, or too few."""
        super().check(settings, shape)
        if settings.weight_source not in ("own", "base"):
            raise ValueError(f"weight_source: {settings.weight_source!r} is neither 'own' nor 'base'.")
        if settings.weight_source == "own":
            return
        if not shape.num_experts:
            raise ValueError(
                "weight_source: 'base' takes the weights of an MoE block's router; in a dense FFN use 'own'."
            )
        if settings.top_k > shape.base_top_k:
            raise ValueError(
                f"top_k: {settings.top_k} experts have no weights each from weight_source 'base', whose router chooses "
                f"{shape.base_top_k}; lower it."
            )
        if settings.renormalise is not None:
            raise ValueError(
                f"renormalise: {settings.renormalise!r} changes nothing about the weights of weight_source 'base'; "
                "leave it None."
            )

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return A and B of all experts, and the router."""
        return {**super().shapes(settings, shape), "router_ED": (settings.num_experts, shape.inputs)}

    def reset_parameters(self) -> None:
        """A normal, B zero, the router as the base model's weights began."""
        super().reset_parameters()
        nn.init.normal_(self.router_ED, std=self.shape.init_range)

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return the sum of w_e d_e(h) over the chosen experts."""
        settings = self.settings
        on_input, on_narrow = _dropouts(self)
        z_TX, logits_TE = down_and_logits(x_TD, self.down_ERD.flatten(0, 1), self.router_ED, on_input)
        probs_TE = softmax_experts(logits_TE, z_TX.dtype)
        ids_TK = frame.decide(f"{self.site} experts", lambda: probs_TE.detach().topk(settings.top_k, dim=-1).indices)
        chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter(-1, ids_TK, True)
        if settings.weight_source == "base":
            base_TK, _ = frame.values[f"{self.site} base router"]
            largest_TK = base_TK.to(probs_TE.dtype).topk(settings.top_k, dim=-1).values
            weights_TE = torch.zeros_like(probs_TE).scatter(-1, ids_TK, largest_TK)
        else:
            weights_TE = self._own_weights(probs_TE, chosen_TE)
        frame.record(
            Route(
                site=self.site,
                probs_TE=probs_TE,
                weights_TE=weights_TE,
                chosen_TE=chosen_TE,
                logits_TE=logits_TE,
                loss_weights={"switch": settings.balance_weight},
            )
        )
        return _widen(self, _activate(self, z_TX, on_narrow), weights_TE)

    def _own_weights(self, probs_TE: Tensor, chosen_TE: Tensor) -> Tensor:
        renormalises = self.shape.renormalises if self.settings.renormalise is None else self.settings.renormalise
        if not renormalises:
            return probs_TE * chosen_TE
        if self.settings.top_k > 1:
            return normalised(probs_TE * chosen_TE)
        # where() keeps 0 / 0 and its gradient out of the experts that were not chosen
        return probs_TE * chosen_TE / torch.where(chosen_TE, probs_TE.detach(), 1.0)


def fold_perft_d(adapter: PerftD) -> dict[str, Tensor]:
    """Return the tensors of the one PERFT-S that computes the same, under the settings of ``folded_settings``.

    The rows of all A in a row and the columns of all B: SiLU works number by number, so that this holds for parallel
    adapters too, and in training with dropout.
    """
    return {
        "down_ERD": adapter.down_ERD.detach().flatten(0, 1).unsqueeze(0).clone(),
        "up_DER": adapter.up_DER.detach().flatten(1).unsqueeze(1).clone(),
    }


def folded_settings(settings: PerftDSettings) -> PerftSSettings:
    """Return the settings of the PERFT-S that a PERFT-D folds into: M times its r and its lora_alpha."""
    return PerftSSettings(
        r=settings.num_experts * settings.r,
        lora_alpha=settings.num_experts * settings.lora_alpha,
        lora_dropout=settings.lora_dropout,
        expert=settings.expert,
    )


def _scale(settings: Any) -> float:
    scale: float = settings.lora_alpha / settings.r if settings.expert == "lora" else 1.0
    return scale


def _dropouts(adapter: RoutedAdapter) -> tuple[float, float]:
    """Return the shares of dropout on the input and in front of the activation."""
    share = adapter.settings.lora_dropout if adapter.training else 0.0
    return (share, 0.0) if adapter.settings.expert == "lora" else (0.0, share)


def _activate(adapter: RoutedAdapter, z_TX: Tensor, dropout: float) -> Tensor:
    return F.silu(dropped(z_TX, dropout, True)) if adapter.settings.expert == "parallel" else z_TX


def _mix(adapter: Any, x_TD: Tensor, weights_TE: Tensor | None = None) -> Tensor:
    """Return the sum of all experts' outputs, weighted where there are weights."""
    on_input, on_narrow = _dropouts(adapter)
    z_TX = F.linear(dropped(x_TD, on_input, True), adapter.down_ERD.flatten(0, 1))
    return _widen(adapter, _activate(adapter, z_TX, on_narrow), weights_TE)


def _widen(adapter: Any, z_TX: Tensor, weights_TE: Tensor | None = None) -> Tensor:
    scale = _scale(adapter.settings)
    if weights_TE is None:
        return scale * F.linear(z_TX, adapter.up_DER.flatten(1))
    return mix_up(z_TX, adapter.up_DER, scale * weights_TE)
