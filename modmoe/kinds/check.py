"""All that config.json and headers tell against a checkpoint, in the order in which it is worth being told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modmoe.documents import local_directory, read_object
from modmoe.errors import CheckpointError
from modmoe.kinds.forms import find_form, find_lack, find_pointers, is_adapter, is_model
from modmoe.kinds.headers import Headers, Problem, read_headers
from modmoe.kinds.names import find_adapters, find_wrapped
from modmoe.kinds.quantized import find_quantization


def find_problems(directory: Path, config: Mapping[str, Any], headers: Headers) -> Iterator[Problem]:
    """Yield what the tensors of a checkpoint are that no command can use, one a kind; of none config.json tells."""
    yield from find_quantization(directory, config, headers)
    yield from find_adapters(directory, config, headers)
    yield from find_wrapped(directory, config, headers)


def check_kind(directory: Path, config: Mapping[str, Any], headers: Headers) -> None:
    """Raise CheckpointError for the first of ``find_problems``."""
    for problem in find_problems(directory, config, headers):
        raise CheckpointError(str(problem))


def check_source(source: str | Path, *, takes_adapters: bool, needs_weights: bool = True) -> None:
    """Check what a command was given as a model, where it is on this disk, without loading torch.

    What is damaged is left to those who open it. Without ``needs_weights`` config.json is enough.

    Raises CheckpointError where it is a model of another form, or one that no command can use.
    """
    directory = local_directory(source)
    if directory is None:
        return
    for problem in find_pointers(directory):
        raise CheckpointError(str(problem))
    if not is_model(directory):
        if takes_adapters and is_adapter(directory):
            return
        problem = find_lack(directory) if needs_weights else find_form(directory)
        if problem is not None:
            raise CheckpointError(str(problem))
    try:
        config = read_object(directory / "config.json")
    except CheckpointError:
        return
    check_kind(directory, config, read_headers(directory))
