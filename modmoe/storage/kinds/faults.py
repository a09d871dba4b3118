"""All that config.json and headers tell against a checkpoint, in the order in which it is worth being told."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modmoe.errors import CheckpointError
from modmoe.storage.documents import local_directory, read_object
from modmoe.storage.kinds.forms import describe_file, find_form, find_pointers, is_adapter, is_model
from modmoe.storage.kinds.headers import Headers, Problem, read_headers
from modmoe.storage.kinds.names import find_adapters, find_wrapped
from modmoe.storage.kinds.orders import find_orders
from modmoe.storage.kinds.quantized import find_quantization
from modmoe.storage.kinds.tokens import count_rows, describe_rowless, find_rowless, has_tokenizer, without_row


def find_problems(directory: Path, config: Mapping[str, Any], headers: Headers) -> Iterator[Problem]:
    """Yield what the tensors of a checkpoint are that no command can use, one a kind; of none config.json tells."""
    yield from find_quantization(directory, config, headers)
    yield from find_adapters(directory, config, headers)
    yield from find_wrapped(directory, config, headers)
    yield from find_orders(directory, config, headers)


def check_kind(directory: Path, config: Mapping[str, Any], headers: Headers) -> None:
    """Raise CheckpointError for the first of ``find_problems``."""
    for problem in find_problems(directory, config, headers):
        raise CheckpointError(str(problem))


def check_source(
    source: str | Path, *, takes_adapters: bool = True, needs_tokenizer: bool = True, reads_text: bool = True
) -> None:
    """Check what a command was given as a model, where it is on this disk, without loading torch.

    What is damaged, or holds nothing of a model, is left to those who open it.

    Args:
        source: a directory, or a Hub id, of which nothing is known here.
        takes_adapters: an adapter without its model will do.
        needs_tokenizer: False where its tokenizer is used if there is one, as in a plan.
        reads_text: its tokenizer is going to be used.

    Raises:
        CheckpointError: it is a model of another form, or one that no command can use.
    """
    path = Path(source)
    if os.path.isfile(path):
        raise CheckpointError(str(describe_file(path)))
    directory = local_directory(source)
    if directory is None:
        return
    for problem in find_pointers(directory):
        raise CheckpointError(str(problem))
    if not is_model(directory):
        if takes_adapters and is_adapter(directory):
            return
        form = find_form(directory)
        if form is not None:
            raise CheckpointError(str(form))
    try:
        config = read_object(directory / "config.json")
    except CheckpointError:
        return
    headers = read_headers(directory)
    check_kind(directory, config, headers)
    if headers and reads_text and (needs_tokenizer or has_tokenizer(directory)):
        check_rows(directory, count_rows(headers))


def check_rows(directory: Path, rows: int | None) -> None:
    """Raise CheckpointError where the tokenizer in ``directory`` is none, or can give a token without a row."""
    if not has_tokenizer(directory):
        raise CheckpointError(
            str(directory), "no usable tokenizer: there is no file of one", "copy the tokenizer there"
        )
    problem = None if rows is None else find_rowless(directory, rows)
    if problem is not None:
        raise CheckpointError(str(problem))


def check_vocabulary(directory: Path, tokenizer: Any, rows: int | None) -> None:
    """Raise CheckpointError where a loaded tokenizer whose files say nothing of its ids has a token without a row."""
    if rows is None or (directory / "tokenizer.json").is_file():
        return
    try:
        vocabulary = tokenizer.get_vocab()
    except NotImplementedError:  # some of a model's own have none
        return
    tokens = without_row(vocabulary, rows)
    if tokens:
        raise CheckpointError(str(describe_rowless(directory, tokens, rows)))
