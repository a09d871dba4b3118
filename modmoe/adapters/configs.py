"""One PEFT configuration a method: its settings with what PEFT asks for. See each method's file for the fields."""

from __future__ import annotations

from dataclasses import dataclass

from modmoe.adapters.comol import CoMoLSettings
from modmoe.adapters.peft import RoutedConfig, _register


@dataclass
class CoMoLConfig(CoMoLSettings, RoutedConfig):
    """CoMoL, https://arxiv.org/abs/2603.00573."""

    method = "comol"


CONFIGS: dict[str, type[RoutedConfig]] = {kind.method: kind for kind in (CoMoLConfig,)}
"""The configuration of each method by name."""

for _name, _config in CONFIGS.items():
    _register(_name, _config)
