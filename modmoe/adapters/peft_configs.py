"""One PEFT configuration for each method: the settings of its file, and PEFT's own fields."""

from __future__ import annotations

from dataclasses import dataclass

from modmoe.adapters.methods.adamole import AdaMoLESettings
from modmoe.adapters.methods.comol import CoMoLSettings
from modmoe.adapters.methods.expert_lora import ExpertLoRASettings
from modmoe.adapters.methods.hydralora import HydraLoRASettings
from modmoe.adapters.methods.ldmole import LDMoLESettings
from modmoe.adapters.methods.mixlora import MixLoRASettings
from modmoe.adapters.methods.moa import SoftMoASettings, SparseMoASettings
from modmoe.adapters.methods.molora import MoLoRASettings
from modmoe.adapters.methods.moslora import MoSLoRASettings
from modmoe.adapters.methods.perft import PerftDSettings, PerftESettings, PerftRSettings, PerftSSettings
from modmoe.adapters.methods.sparmoe import SparMoESettings
from modmoe.adapters.peft_binding import RoutedConfig, register
from modmoe.adapters.table import METHODS


@dataclass
class PerftRConfig(PerftRSettings, RoutedConfig):
    """PERFT-R, https://arxiv.org/abs/2508.02587."""

    method = "perft_r"


@dataclass
class PerftEConfig(PerftESettings, RoutedConfig):
    """PERFT-E, https://arxiv.org/abs/2508.02587."""

    method = "perft_e"


@dataclass
class PerftDConfig(PerftDSettings, RoutedConfig):
    """PERFT-D, https://arxiv.org/abs/2508.02587."""

    method = "perft_d"


@dataclass
class PerftSConfig(PerftSSettings, RoutedConfig):
    """PERFT-S, https://arxiv.org/abs/2508.02587."""

    method = "perft_s"


@dataclass
class CoMoLConfig(CoMoLSettings, RoutedConfig):
    """CoMoL, https://arxiv.org/abs/2603.00573."""

    method = "comol"


@dataclass
class SoftMoAConfig(SoftMoASettings, RoutedConfig):
    """Soft MoA, https://arxiv.org/abs/2506.05928."""

    method = "soft_moa"


@dataclass
class SparseMoAConfig(SparseMoASettings, RoutedConfig):
    """Sparse MoA, https://arxiv.org/abs/2506.05928."""

    method = "sparse_moa"


@dataclass
class SparMoEConfig(SparMoESettings, RoutedConfig):
    """SparMoE, Findings of ACL 2026, 975."""

    method = "sparmoe"


@dataclass
class MoLoRAConfig(MoLoRASettings, RoutedConfig):
    """MoLoRA, https://arxiv.org/abs/2309.05444."""

    method = "molora"


@dataclass
class HydraLoRAConfig(HydraLoRASettings, RoutedConfig):
    """HydraLoRA, https://arxiv.org/abs/2404.19245."""

    method = "hydralora"


@dataclass
class MixLoRAConfig(MixLoRASettings, RoutedConfig):
    """MixLoRA, https://arxiv.org/abs/2404.15159."""

    method = "mixlora"


@dataclass
class AdaMoLEConfig(AdaMoLESettings, RoutedConfig):
    """AdaMoLE, https://arxiv.org/abs/2405.00361."""

    method = "adamole"


@dataclass
class LDMoLEConfig(LDMoLESettings, RoutedConfig):
    """LD-MoLE, https://arxiv.org/abs/2509.25684."""

    method = "ldmole"


@dataclass
class MoSLoRAConfig(MoSLoRASettings, RoutedConfig):
    """MoSLoRA, https://arxiv.org/abs/2406.11909."""

    method = "moslora"


@dataclass
class ExpertLoRAConfig(ExpertLoRASettings, RoutedConfig):
    """A LoRA for each expert of a fused MoE block, under its frozen router."""

    method = "expert_lora"


CONFIGS: dict[str, type[RoutedConfig]] = {
    kind.method: kind
    for kind in (
        PerftRConfig,
        PerftEConfig,
        PerftDConfig,
        PerftSConfig,
        CoMoLConfig,
        SoftMoAConfig,
        SparseMoAConfig,
        SparMoEConfig,
        MoLoRAConfig,
        HydraLoRAConfig,
        MixLoRAConfig,
        AdaMoLEConfig,
        LDMoLEConfig,
        MoSLoRAConfig,
        ExpertLoRAConfig,
    )
}
"""The configuration of each method by name."""

for _name, _row in METHODS.items():
    if _name not in CONFIGS:
        # the classes above are for import by name; a method without one gets the same class from its settings
        _fields = {"method": _name, "__module__": __name__, "__doc__": _row.settings.__doc__}
        CONFIGS[_name] = dataclass(type(f"{_row.adapter.__name__}Config", (_row.settings, RoutedConfig), _fields))
    register(_name, CONFIGS[_name])
