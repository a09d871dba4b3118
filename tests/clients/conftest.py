"""Marks that transformers' own tests wear; ours are strict about them."""

from __future__ import annotations

import pytest

THEIRS = (
    "accelerate_tests",
    "flash_attn_test",
    "flash_attn_3_test",
    "flash_attn_4_test",
    "generate",
    "slow",
    "torch_compile_test",
    "torch_export_test",
)


def pytest_configure(config: pytest.Config) -> None:
    for name in THEIRS:
        config.addinivalue_line("markers", f"{name}: of transformers")
