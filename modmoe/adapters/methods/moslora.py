"""MoSLoRA: a LoRA with a mixer between A and B, which joins each direction of the one with each of the other.

    MoSLoRA, https://arxiv.org/abs/2406.11909

    delta(x) = alpha / R  B M A x

It is CoMoL with one core: no router, and it folds into the weights exactly. A layer costs R (D + O) + R R. B is zero at
the start; A and the mixer begin as ``nn.Linear`` does (an identity mixer would be a plain LoRA).
"""

# Shapes: T tokens, D input width, O output width, R rank, S = R (the mixer's input side)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..mechanism.base import Fold, RoutedAdapter, SiteShape
from ..mechanism.passes import Frame
from ..mechanism.routing import dropped, kaiming_


@dataclass(kw_only=True)
class MoSLoRASettings:
    """The choices of MoSLoRA."""

    r: int = 16
    """Rank of A, M and B."""
    lora_alpha: float = 32
    """The delta is multiplied by lora_alpha / r."""
    lora_dropout: float = 0.05
    """Dropout on the input."""


class MoSLoRA(RoutedAdapter):
    """A LoRA with a trained mixer in its middle."""

    method = "moslora"
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    fold: ClassVar[Fold] = "exact"
    down_RD: Tensor
    mixer_RS: Tensor
    up_OR: Tensor

    @classmethod
    def shapes(cls, settings: Any, shape: SiteShape) -> dict[str, tuple[int, ...]]:
        """Return A, the mixer and B."""
        rank = settings.r
        return {"down_RD": (rank, shape.inputs), "mixer_RS": (rank, rank), "up_OR": (shape.outputs, rank)}

    def reset_parameters(self) -> None:
        """B zero, the rest as ``nn.Linear``."""
        kaiming_(self.down_RD)
        kaiming_(self.mixer_RS)
        self.up_OR.zero_()

    def delta(self, x_TD: Tensor, frame: Frame) -> Tensor:
        """Return alpha / R  B M A x."""
        z_TS = F.linear(dropped(x_TD, self.settings.lora_dropout, self.training), self.down_RD)
        scale: float = self.settings.lora_alpha / self.settings.r
        return F.linear(F.linear(z_TS, scale * self.mixer_RS), self.up_OR)

    def fixed_weight(self, weights_E: Tensor | None = None) -> Tensor:
        """Return alpha / R  B M A; there is nothing to hold fixed."""
        scale: float = self.settings.lora_alpha / self.settings.r
        return scale * self.up_OR @ self.mixer_RS @ self.down_RD
