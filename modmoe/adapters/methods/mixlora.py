"""MixLoRA: a dense FFN becomes a mixture of experts that are the frozen FFN itself, each with LoRAs of its own.

    MixLoRA, https://arxiv.org/abs/2404.15159

    E_e(x) = (W_d + D_e) h_e(x),   h_e(x) = act((W_g + G_e) x) * ((W_u + U_e) x)
    w      = the top K of softmax(W x), renormalised
    y      = sum_k w_k E_k(x)

G, U and D are LoRAs, alpha / r B A. The attention's projections get one plain LoRA each, which is part of the method:
so the adapter hangs below the decoder layer. A layer costs 3 E R (D + F) + E D, and R (in + out) a projection.

The weights sum to 1, so with the frozen FFN's own h_0

    y = W_d (h_0 + sum_k w_k (h_k - h_0)) + sum_k w_k D_k h_k

and the frozen layers run once a token, in front of the mixture and behind it, a bias of ``down`` counts once, and with
B = 0, where h_k = h_0 to the bit, so is the base model's output. Hence the frozen FFN runs as it is, whatever its
kernels and its quantization; hooks read what its projections give and change what enters and leaves ``down``.

Only K of the E experts compute at the width of F. At rank all do, masked: LoRAs of all experts are one product.
Every expert is the dense FFN with other weights, so the model is a native MoE checkpoint once those are written out.
"""

# Shapes: T tokens, D model width (input width of an attention projection), O its output width, F neurons, E experts,
# K top_k, R rank, X ranks in a row. LoRA's A and B are called a and b here, since up and down are the FFN's.

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..mechanism.base import Fold, Kind, RoutedAdapter, SiteShape
from ..mechanism.losses import Route
from ..mechanism.passes import Frame, first_tensor
from ..mechanism.routing import down_and_logits, dropped, kaiming_, mix_up, normalised

FFN, ATTENTION = "mlp", "self_attn"
"""Where a decoder layer of transformers has its FFN and its attention."""


@dataclass(kw_only=True)
class MixLoRASettings:
    """The choices of MixLoRA; the defaults are the released code's, the paper's tables have r = 16."""

    r: int = 8
    """Rank of every LoRA."""
    lora_alpha: float = 16
    """Each delta is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.05
    """Dropout in front of each LoRA."""
    num_experts: int = 8
    """Experts of a layer."""
    top_k: int = 2
    """Experts that a token runs through."""
    attention_modules: Sequence[str] = ("q_proj", "k_proj", "v_proj", "o_proj")
    """Projections of the attention with a plain LoRA; none where it is empty."""
    balance_weight: float = 1e-2
    """Factor of the Switch balance loss."""


class MixLoRA(RoutedAdapter):
    """Experts that share the frozen FFN, and LoRAs on the attention beside it."""

    method = "mixlora"
    kind: ClassVar[Kind] = "layer"
    fold: ClassVar[Fold] = "to_moe"
    router_ED: Tensor
    gate_a_ERD: Tensor
    gate_b_FER: Tensor
    up_a_ERD: Tensor
    up_b_FER: Tensor
    down_a_ERF: Tensor
    down_b_DER: Tensor

    @classmethod
    def check(cls, settings: Any, shape: SiteShape) -> None:
        """Raise ValueError where the layer has no dense gated FFN or lacks a projection that is named."""
        super().check(settings, shape)
        if shape.expert_form:
            raise ValueError(
                f"mixlora makes experts of a dense FFN; this one's have {shape.expert_form}; attach mixlora to the "
                "dense model, or another method here."
            )
        if not all(f"{FFN}.{part}_proj" in shape.parts for part in ("gate", "up", "down")):
            raise ValueError(
                f"mixlora needs a dense FFN, '{FFN}', with gate_proj, up_proj and down_proj; choose layers that have "
                "one, or for an MoE block a method of the kind 'block'."
            )
        names = settings.attention_modules
        if isinstance(names, str):
            raise ValueError(f"attention_modules: {names!r} is one word; write a list, [{names}].")
        there = [path.removeprefix(f"{ATTENTION}.") for path in shape.parts if path.startswith(f"{ATTENTION}.")]
        for name in names:
            if name not in there:
                raise ValueError(f"attention_modules: {name!r} is not in this attention; it has {', '.join(there)}.")

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return the router, the experts' LoRAs and the attention's."""
        experts, rank = settings.num_experts, settings.r
        width, neurons = shape.parts[f"{FFN}.gate_proj"]
        attention = {}
        for name in settings.attention_modules:
            inputs, outputs = shape.parts[f"{ATTENTION}.{name}"]
            attention[f"{name}_a_RD"] = (rank, inputs)
            attention[f"{name}_b_OR"] = (outputs, rank)
        return {
            "router_ED": (experts, width),
            "gate_a_ERD": (experts, rank, width),
            "gate_b_FER": (neurons, experts, rank),
            "up_a_ERD": (experts, rank, width),
            "up_b_FER": (neurons, experts, rank),
            "down_a_ERF": (experts, rank, neurons),
            "down_b_DER": (width, experts, rank),
            **attention,
        }

    def reset_parameters(self) -> None:
        """Every B zero, every A as ``nn.Linear``, the router normal with a deviation of 0.02."""
        for name, weight in self.named_parameters(recurse=False):
            if "_a_" in name:
                kaiming_(weight)
            elif "_b_" in name:
                weight.zero_()
        self.router_ED.normal_(std=0.02)

    @classmethod
    def install(cls, site: Any, layer: nn.Module) -> list[Any]:
        """Hook the FFN's and the attention's projections of a decoder layer; return the hooks' handles."""
        handles = []
        ffn = getattr(layer, FFN, None)
        if all(hasattr(ffn, f"{part}_proj") for part in ("gate", "up", "down")):  # if not, ``check`` refuses the layer
            handles += FFNHooks(site, cast(nn.Module, ffn)).register()
        for name, projection in layer.get_submodule(ATTENTION).named_children():
            if getattr(projection, "in_features", None) is not None:
                handles.append(projection.register_forward_hook(ProjectionHook(site, name).after, with_kwargs=True))
        return handles

    def choose(self, logits_TE: Tensor, frame: Frame) -> tuple[Tensor, Tensor]:
        """Return the experts chosen, ids_TK, and their weights_TK, which sum to 1."""
        top_k = self.settings.top_k
        probs_TE = logits_TE.softmax(-1)
        ids_TK: Tensor = frame.decide(f"{self.site} experts", lambda: probs_TE.detach().topk(top_k, dim=-1).indices)
        kept_TK = probs_TE.gather(-1, ids_TK)
        # one weight that is renormalised is a constant: as p / p without the lower gradient it is 1 and learns
        weights_TK = normalised(kept_TK) if top_k > 1 else kept_TK / kept_TK.detach()
        zeros_TE = torch.zeros_like(probs_TE)
        frame.record(
            Route(
                site=self.site,
                probs_TE=probs_TE,
                weights_TE=zeros_TE.scatter(-1, ids_TK, weights_TK),
                chosen_TE=zeros_TE.bool().scatter_(-1, ids_TK, True),
                logits_TE=logits_TE,
                loss_weights={"switch": self.settings.balance_weight},
            )
        )
        return ids_TK, weights_TK

    def mix(
        self, x_TD: Tensor, gate_TF: Tensor, up_TF: Tensor, act: Callable[[Tensor], Tensor], frame: Frame
    ) -> tuple[Tensor, Tensor]:
        """Return what the experts change in front of ``down``, [T, F], and behind it, [T, D].

        Args:
            x_TD: the FFN's input.
            gate_TF: the frozen gate projection of it, before the activation.
            up_TF: the frozen up projection of it.
            act: the activation.
            frame: the decoder layer's run.
        """
        experts, rank = self.settings.num_experts, self.settings.r
        dropout = self.settings.lora_dropout if self.training else 0.0
        # gate's and up's A of all experts and the router are one product
        a_XD = torch.cat((self.gate_a_ERD.flatten(0, 1), self.up_a_ERD.flatten(0, 1)))
        z_TX, logits_TE = down_and_logits(x_TD, a_XD, self.router_ED, dropout)
        z_gate_TX, z_up_TX = z_TX.chunk(2, dim=-1)
        ids_TK, weights_TK = self.choose(logits_TE, frame)
        base_TF = act(gate_TF) * up_TF
        before_TF, behind_TX = torch.zeros_like(base_TF), torch.zeros_like(z_up_TX)
        for ids_T, weights_T in zip(ids_TK.unbind(-1), weights_TK.to(x_TD.dtype).unbind(-1), strict=True):
            scaled_TE = self.scale * F.one_hot(ids_T, experts).to(x_TD.dtype)
            hidden_TF = act(gate_TF + mix_up(z_gate_TX, self.gate_b_FER, scaled_TE))
            hidden_TF = hidden_TF * (up_TF + mix_up(z_up_TX, self.up_b_FER, scaled_TE))
            before_TF = before_TF + weights_T.unsqueeze(-1) * (hidden_TF - base_TF)
            z_down_TX = F.linear(dropped(hidden_TF, dropout, True), self.down_a_ERF.flatten(0, 1))
            chosen_TX = (scaled_TE * weights_T.unsqueeze(-1)).repeat_interleave(rank, dim=1)
            behind_TX = behind_TX + z_down_TX * chosen_TX
        return before_TF, F.linear(behind_TX, self.down_b_DER.flatten(1))

    def project(self, name: str, x_TD: Tensor) -> Tensor:
        """Return what the LoRA of an attention projection adds, [T, O]."""
        inputs_TD = dropped(x_TD, self.settings.lora_dropout, self.training)
        z_TR = F.linear(inputs_TD, self.get_parameter(f"{name}_a_RD"))
        return self.scale * F.linear(z_TR, self.get_parameter(f"{name}_b_OR"))

    def weight_change(self, name: str, expert: int | None = None) -> Tensor:
        """Return alpha / R B A, [out, in]: of ``gate_proj``, ``up_proj`` or ``down_proj`` of one expert, or of an
        attention projection.
        """
        if expert is None:
            return self.scale * self.get_parameter(f"{name}_b_OR") @ self.get_parameter(f"{name}_a_RD")
        pairs = {
            "gate_proj": (self.gate_a_ERD, self.gate_b_FER),
            "up_proj": (self.up_a_ERD, self.up_b_FER),
            "down_proj": (self.down_a_ERF, self.down_b_DER),
        }
        a, b = pairs[name]
        return self.scale * b[:, expert] @ a[expert]

    @property
    def scale(self) -> float:
        """Alpha / r."""
        scale: float = self.settings.lora_alpha / self.settings.r
        return scale


class FFNHooks:
    """Reads what an FFN's gate and up give, and changes what enters and leaves its down."""

    def __init__(self, site: Any, ffn: nn.Module) -> None:
        """Serve the adapters of ``site``."""
        self.site, self.ffn = site, ffn
        self.gate, self.up, self.behind = (f"{site.path} mixlora {name}" for name in ("gate", "up", "behind"))

    def register(self) -> list[Any]:
        """Put the hooks on the FFN's projections and return their handles."""
        ffn: Any = self.ffn
        return [
            ffn.gate_proj.register_forward_hook(self.after_gate, with_kwargs=True),
            ffn.up_proj.register_forward_hook(self.after_up),
            ffn.down_proj.register_forward_pre_hook(self.before_down),
            ffn.down_proj.register_forward_hook(self.after_down),
        ]

    def after_gate(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        """Keep the FFN's input and its gate."""
        if self.site.active():
            self.site.context.between[self.gate] = cast(Tensor, first_tensor(args, kwargs)), output

    def after_up(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep up."""
        if self.site.active():
            self.site.context.between[self.up] = output

    def before_down(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Add the experts' change to what enters ``down``."""
        adapters: list[Any] = self.site.active()
        if not adapters:
            return None
        if len(adapters) > 1:
            raise ValueError(f"{self.site.path}: several mixlora adapters are active; choose one.")
        between = self.site.context.between
        if self.gate not in between or self.up not in between:
            raise RuntimeError(
                f"{self.site.path}: {FFN}.gate_proj or up_proj was replaced since mixlora was attached; attach it last."
            )
        given = (*between.pop(self.gate), between.pop(self.up))
        dtype = next(adapters[0].parameters()).dtype
        x_TD, gate_TF, up_TF = (value.reshape(-1, value.shape[-1]).to(dtype) for value in given)
        before_TF, between[self.behind] = adapters[0].mix(x_TD, gate_TF, up_TF, self.ffn.act_fn, self.site.frame())
        return args[0] + before_TF.to(args[0].dtype).view_as(args[0]), *args[1:]

    def after_down(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the experts' LoRAs of ``down``."""
        behind_TD = self.site.context.between.pop(self.behind, None)
        return output if behind_TD is None else output + behind_TD.to(output.dtype).view_as(output)


class ProjectionHook:
    """Adds the LoRA of one projection of the attention."""

    def __init__(self, site: Any, name: str) -> None:
        """Serve the adapters of ``site``."""
        self.site, self.name = site, name

    def after(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        """Add to the projection's output."""
        for adapter in self.site.active():
            if self.name in adapter.settings.attention_modules:
                x = cast(Tensor, first_tensor(args, kwargs))
                x_TD = x.reshape(-1, x.shape[-1]).to(next(adapter.parameters()).dtype)
                output = output + adapter.project(self.name, x_TD).to(output.dtype).view_as(output)
        return output
