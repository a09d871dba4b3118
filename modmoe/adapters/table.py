"""The table of methods: name to the class of the adapter and of its settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from .mechanism.base import RoutedAdapter
from .methods.adamole import AdaMoLE, AdaMoLESettings
from .methods.comol import CoMoL, CoMoLSettings
from .methods.expert_lora import ExpertLoRA, ExpertLoRASettings
from .methods.hydralora import HydraLoRA, HydraLoRASettings
from .methods.ldmole import LDMoLE, LDMoLESettings
from .methods.mixlora import MixLoRA, MixLoRASettings
from .methods.moa import SoftMoA, SoftMoASettings, SparseMoA, SparseMoASettings
from .methods.molora import MoLoRA, MoLoRASettings
from .methods.moslora import MoSLoRA, MoSLoRASettings
from .methods.perft import (
    PerftD,
    PerftDSettings,
    PerftE,
    PerftESettings,
    PerftR,
    PerftRSettings,
    PerftS,
    PerftSSettings,
)
from .methods.sparmoe import SparMoE, SparMoESettings


class Method(NamedTuple):
    """One method."""

    adapter: type[RoutedAdapter]
    settings: type[Any]


METHODS: dict[str, Method] = {
    "perft_r": Method(PerftR, PerftRSettings),
    "perft_e": Method(PerftE, PerftESettings),
    "perft_d": Method(PerftD, PerftDSettings),
    "perft_s": Method(PerftS, PerftSSettings),
    "comol": Method(CoMoL, CoMoLSettings),
    "soft_moa": Method(SoftMoA, SoftMoASettings),
    "sparse_moa": Method(SparseMoA, SparseMoASettings),
    "sparmoe": Method(SparMoE, SparMoESettings),
    "molora": Method(MoLoRA, MoLoRASettings),
    "hydralora": Method(HydraLoRA, HydraLoRASettings),
    "mixlora": Method(MixLoRA, MixLoRASettings),
    "adamole": Method(AdaMoLE, AdaMoLESettings),
    "ldmole": Method(LDMoLE, LDMoLESettings),
    "moslora": Method(MoSLoRA, MoSLoRASettings),
    "expert_lora": Method(ExpertLoRA, ExpertLoRASettings),
}
"""Every routed adapter by name; the configuration of each for PEFT is in ``peft_configs.py``."""
