"""A checkpoint that was opened once, and is handed around instead of its path."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from modmoe.models.loading import DenseClasses, dense_classes, load, load_tokenizer, read_settings, skeleton
from modmoe.storage.checkpoint import Checkpoint, resolve_source


class OpenedModel:
    """The directory of a model, whether its own code may run, and what was read of it so far.

    Each part is read when it is asked for first, and once. Nothing but headers is read before ``load``.
    """

    def __init__(self, directory: Path, *, trust_remote_code: bool = False) -> None:
        """Open a directory; CheckpointError where no checkpoint lies there."""
        self.directory, self.trust_remote_code = directory, trust_remote_code

    @classmethod
    def at(cls, source: str, revision: str | None = None, *, trust_remote_code: bool = False) -> OpenedModel:
        """Open a directory or, fetched first where it is not here, a repository of the Hub."""
        return cls(resolve_source(source, revision), trust_remote_code=trust_remote_code)

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The tensors, from their headers, with config.json."""
        return Checkpoint(self.directory)

    @cached_property
    def classes(self) -> DenseClasses:
        """The classes of a dense architecture; CheckpointError where its code would have to be trusted."""
        return dense_classes(self.directory, trust_remote_code=self.trust_remote_code)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The configuration with its defaults filled in; config.json may leave them out."""
        settings: dict[str, Any] = read_settings(self.directory, self.classes.config).to_dict()
        return settings

    def outline(self) -> PreTrainedModel:
        """Return the model without values; CheckpointError where the tensors are not those of the model."""
        return skeleton(self.directory, trust_remote_code=self.trust_remote_code)

    def check(self) -> None:
        """Raise CheckpointError where the tensors are not those of the model that config.json describes."""
        self.outline()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer; CheckpointError where there is none that can be used."""
        return load_tokenizer(self.directory, trust_remote_code=self.trust_remote_code)

    def load(self, **options: Any) -> Any:
        """Return the model with its weights, anew at each call; the options are those of ``loading.load``."""
        return load(self.directory, trust_remote_code=self.trust_remote_code, **options)
