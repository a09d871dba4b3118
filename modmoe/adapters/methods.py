"""The table of methods: name to the class of the adapter and of its settings."""

from __future__ import annotations

from typing import Any, NamedTuple

from .adamole import AdaMoLE, AdaMoLESettings
from .base import RoutedAdapter
from .comol import CoMoL, CoMoLSettings
from .expert_lora import ExpertLoRA, ExpertLoRASettings
from .hydralora import HydraLoRA, HydraLoRASettings
from .ldmole import LDMoLE, LDMoLESettings
from .mixlora import MixLoRA, MixLoRASettings
from .moa import SoftMoA, SoftMoASettings, SparseMoA, SparseMoASettings
from .molora import MoLoRA, MoLoRASettings
from .moslora import MoSLoRA, MoSLoRASettings
from .perft import PerftD, PerftDSettings, PerftE, PerftESettings, PerftR, PerftRSettings, PerftS, PerftSSettings
from .sparmoe import SparMoE, SparMoESettings


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
"""Every routed adapter by name; the configuration of each for PEFT is in ``configs.py``."""
