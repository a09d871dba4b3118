"""``modmoe env``: what a bug report needs."""

from __future__ import annotations

import os
import platform
from typing import Any

from modmoe.cli import flags
from modmoe.cli.console import Console
from modmoe.version import __version__

EPILOG = flags.examples("modmoe env", "modmoe env --json")

PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "huggingface_hub",
    "accelerate",
    "peft",
    "trl",
    "datasets",
    "numpy",
    "scikit-learn",
    "matplotlib",
    "PyYAML",
    "typer",
    "rich",
    "k-means-constrained",
)


def env(as_json: flags.Json = False, quiet: flags.Quiet = False, verbose: flags.Verbose = False) -> None:
    """Show versions, device, threads and caches, for a bug report. A token is never shown."""
    with Console(as_json=as_json, quiet=quiet, verbose=verbose) as console:
        console.finish(describe())


def describe() -> dict[str, Any]:
    """Return versions, device, threads and where the Hub's cache is; of a token only whether one is set."""
    import torch
    from huggingface_hub import constants, get_token

    return {
        "modmoe": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "device": torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu",
        "cuda": torch.version.cuda,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "hf_cache": constants.HF_HUB_CACHE,
        "hf_offline": bool(constants.HF_HUB_OFFLINE),
        "hf_token": "set" if get_token() else "not set",
    }


def _version(package: str) -> str | None:
    import importlib.metadata

    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
