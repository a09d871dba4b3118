"""Routed adapters: mixtures of LoRA and their kin on frozen models, as PEFT methods.

Importing this package makes the methods known to PEFT: ``get_peft_model(model, CoMoLConfig())``, and
``PeftModel.from_pretrained`` for what was saved.
"""

from modmoe.adapters.budget import solve_budget
from modmoe.adapters.collections import gather_loras
from modmoe.adapters.peft_configs import (
    CONFIGS,
    AdaMoLEConfig,
    CoMoLConfig,
    ExpertLoRAConfig,
    HydraLoRAConfig,
    LDMoLEConfig,
    MixLoRAConfig,
    MoLoRAConfig,
    MoSLoRAConfig,
    PerftDConfig,
    PerftEConfig,
    PerftRConfig,
    PerftSConfig,
    SoftMoAConfig,
    SparMoEConfig,
    SparseMoAConfig,
)

__all__ = [
    "CONFIGS",
    "AdaMoLEConfig",
    "CoMoLConfig",
    "ExpertLoRAConfig",
    "HydraLoRAConfig",
    "LDMoLEConfig",
    "MixLoRAConfig",
    "MoLoRAConfig",
    "MoSLoRAConfig",
    "PerftDConfig",
    "PerftEConfig",
    "PerftRConfig",
    "PerftSConfig",
    "SoftMoAConfig",
    "SparMoEConfig",
    "SparseMoAConfig",
    "gather_loras",
    "solve_budget",
]
