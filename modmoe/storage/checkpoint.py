"""Checkpoints on disk: read lazily, written whole or not at all. Safetensors only; a pickle is never opened."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from modmoe.errors import CheckpointError, RecipeError
from modmoe.storage.documents import FILES, check_links, local_directory, open_tensors, read_index, read_object
from modmoe.storage.kinds.faults import check_kind
from modmoe.storage.kinds.forms import ADAPTER_CONFIG as ADAPTER_CONFIG
from modmoe.storage.kinds.forms import find_lack, wrong_with
from modmoe.storage.kinds.forms import is_adapter as is_adapter
from modmoe.storage.kinds.headers import INDEX as INDEX
from modmoe.storage.kinds.headers import SINGLE as SINGLE
from modmoe.storage.kinds.headers import Header
from modmoe.storage.seal import MANIFEST as MANIFEST
from modmoe.storage.shards import DTYPES, Made, adder, chunks, is_finite, run_all, write_shards

ADAPTER_WEIGHTS = "adapter_model.safetensors"


def resolve_source(source: str | Path, revision: str | None = None) -> Path:
    """Return the local directory of a checkpoint, fetching it first if ``source`` is a Hub id.

    Raises CheckpointError where there is neither such a directory nor such a repository.
    """
    path = local_directory(source)
    if path is not None:
        return path
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=list(FILES)))
    except Exception as error:
        # the Hub's client raises a dozen kinds of errors; their first line says enough, and none holds the token
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(str(source), f"no such directory, and not to be had from the Hub: {reason}") from error


class Checkpoint(Mapping[str, Tensor]):
    """A lazy mapping of tensor name to tensor; only headers are read until a tensor is asked for."""

    def __init__(self, directory: str | Path) -> None:
        """Open the headers of all shards and check them against the index.

        Raises:
            CheckpointError: no config, no safetensors, a pickle instead, a damaged or missing shard, an index that
                names a file outside the directory or a tensor that its shard lacks; tensors that are quantized, an
                adapter that is not merged or of a model inside of a wrapper.
        """
        self.directory = Path(directory)
        self.config = read_config(self.directory)
        self._files: dict[str, Any] = {}
        # name as a causal LM has it -> (file, name in the file)
        self._where = {name: (file, name) for name, file in self._locate().items()}
        self._added: dict[str, Tensor] = {}
        check_kind(self.directory, self.config, {name: self._header(name) for name in self._where})

    def _header(self, name: str) -> Header:
        file, stored = self._where[name]
        header = self._open(file).get_slice(stored)
        return Header(file, header.get_dtype(), tuple(header.get_shape()))

    def _locate(self) -> dict[str, str]:
        index = self.directory / INDEX
        if index.is_file():
            weight_map = read_index(index)
            present = {file: set(self._open(file).keys()) for file in sorted(set(weight_map.values()))}
            for name, file in weight_map.items():
                if name not in present[file]:
                    raise CheckpointError(str(index), f"'{name[:80]}' is not in {file}", "fetch the checkpoint again")
            for file, names in present.items():
                # other programs read every tensor of a shard, so a model without this one would differ from theirs
                if names - weight_map.keys():
                    unnamed = min(names - weight_map.keys())
                    raise CheckpointError(
                        str(index), f"does not name '{unnamed[:80]}', which is in {file}", "fetch it again"
                    )
            if SINGLE not in present and (self.directory / SINGLE).is_file():
                raise CheckpointError(
                    str(self.directory),
                    f"{INDEX} names other files than {SINGLE}, which is there too",
                    "programs differ in which they read, so take away the one that is not meant",
                )
            return weight_map
        if (self.directory / SINGLE).is_file():
            return dict.fromkeys(self._open(SINGLE).keys(), SINGLE)
        raise CheckpointError(str(find_lack(self.directory)))

    def _open(self, file: str) -> Any:
        if file not in self._files:
            path = self.directory / file
            if not path.is_file():
                raise CheckpointError(str(path), "the shard is missing", "fetch the checkpoint again")
            _check_file(path)
            self._files[file] = open_tensors(path)
        return self._files[file]

    def __getitem__(self, name: str) -> Tensor:
        """Read one tensor."""
        if name in self._added:
            return self._added[name]
        file, stored = self._where[name]
        tensor: Tensor = self._open(file).get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        """Iterate over tensor names, in the order of the files."""
        return itertools.chain(self._where, self._added)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._where) + len(self._added)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape from the header."""
        if name in self._added:
            return tuple(self._added[name].shape)
        return self._header(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type from the header."""
        if name in self._added:
            return self._added[name].dtype
        header = self._header(name)
        if header.dtype not in DTYPES:
            raise CheckpointError(
                str(self.directory / header.file), f"'{name}' has type {header.dtype}, which is not supported"
            )
        return DTYPES[header.dtype]

    def add_prefix(self, layers: str) -> None:
        """Name tensors as the causal LM does where the checkpoint was saved from its base model alone (GPT-2's are).

        ``layers`` is the path of the decoder layers from the causal LM, as in a family's row. Changes nothing else.
        """
        prefix, _, rest = layers.partition(".")
        bare = [name for name in self._where if name.startswith(f"{rest}.")]
        if bare and not any(name.startswith(f"{layers}.") for name in self._where):
            self._where = {
                name if name.startswith("lm_head.") else f"{prefix}.{name}": place
                for name, place in self._where.items()
            }

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors that lie in memory to those of the files; their names are new."""
        self._added.update(tensors)

    def check_finite(self, report: Callable[[int, int], None] | None = None) -> None:
        """Read every tensor once; raise CheckpointError that names the first with a NaN or an infinity.

        ``report`` is called with the bytes read and the bytes in all.
        """
        sizes = {name: math.prod(self.shape(name)) * self.dtype(name).itemsize for name in self}
        add = adder(report, sum(sizes.values()))

        def check(name: str) -> bool:
            finite = is_finite(self[name])
            add(sizes[name])
            return finite

        for name, finite in zip(self, run_all(check, self), strict=True):
            if not finite:
                raise CheckpointError(
                    str(self.directory / self._where[name][0]),
                    f"'{name}' has values that are not finite",
                    "the checkpoint is damaged or its training diverged",
                )


class CheckpointWriter:
    """Writes tensors into shards and, at the end, their index, a manifest of checksums and the configuration.

    It writes into a directory that ``open_output`` of ``modmoe.storage.staging`` renames, so a partial checkpoint
    never looks whole.
    """

    def __init__(
        self,
        directory: Path,
        *,
        max_shard_bytes: int = 5 * 10**9,
        report: Callable[[int, int], None] | None = None,
    ) -> None:
        """Write into the existing ``directory`` in shards of at most ``max_shard_bytes``; a larger tensor is alone.

        ``report`` is called with the bytes written and the bytes in all, of all shards that are written at once.
        """
        self.directory, self.report = directory, report
        self.max_shard_bytes = max_shard_bytes
        self.sums: dict[str, dict[str, Any]] = {}
        self._pending: dict[str, Made] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0

    def write(self, name: str, tensor: Tensor) -> None:
        """Add one tensor, held until its shard is full and not to be changed until then; names are unique.

        ``stream`` is better where types and shapes are known beforehand: it holds no tensor.
        """
        data = tensor.detach().to("cpu").contiguous()
        if data.untyped_storage().nbytes() != data.nbytes:
            # a view is copied, so that one row does not keep a whole matrix alive
            data = data.clone()
        if self._pending and self._pending_bytes + data.nbytes > self.max_shard_bytes:
            self._flush()
        self._add(name, Made(data.dtype, tuple(data.shape), lambda: [data]))

    def stream(self, tensors: Mapping[str, Made]) -> None:
        """Write tensors whose types and shapes are known before they are made; they are made by several threads.

        Raises CheckpointError where a name was written before, a tensor is not made as was said, or a file cannot be
        written; then the shards begun are gone.
        """
        filled: dict[Path, dict[str, Made]] = {}
        for name, made in tensors.items():
            if self._pending and self._pending_bytes + made.size_bytes > self.max_shard_bytes:
                filled.update([self._take_shard()])
            self._add(name, made)
        if self._pending:
            filled.update([self._take_shard()])
        self._write(filled)

    def _add(self, name: str, made: Made) -> None:
        if name in self.sums:
            raise CheckpointError(str(self.directory), f"'{name}' was written twice")
        kind = str(made.dtype).removeprefix("torch.")
        self.sums[name] = {"sha256": "", "shape": list(made.shape), "dtype": kind}
        self._pending[name] = made
        self._pending_bytes += made.size_bytes
        self._total_bytes += made.size_bytes

    def _take_shard(self) -> tuple[Path, dict[str, Made]]:
        path, tensors = self._temporary(len(self._shards)), self._pending
        self._shards.append(list(tensors))
        self._pending, self._pending_bytes = {}, 0
        return path, tensors

    def _write(self, shards: Mapping[Path, Mapping[str, Made]]) -> None:
        for name, digest in write_shards(shards, self.report).items():
            self.sums[name]["sha256"] = digest

    def _flush(self) -> None:
        self._write(dict([self._take_shard()]))

    def _temporary(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.safetensors"

    def finish(self, config: Mapping[str, Any]) -> None:
        """Write the last shard, the index if there are several shards, the manifest and config.json."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, names in enumerate(self._shards):
            file = SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._temporary(number).rename(self.directory / file)
            weight_map.update(dict.fromkeys(names, file))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
            write_json(self.directory / INDEX, index)
        write_json(self.directory / MANIFEST, {"tensors": self.sums})
        write_json(self.directory / "config.json", config)


def read_config(directory: Path) -> dict[str, Any]:
    """Return config.json as a mapping; CheckpointError where it is missing, no object, or names weights elsewhere."""
    path = directory / "config.json"
    if not path.is_file():
        raise CheckpointError(str(find_lack(directory)))
    _check_file(path)
    check_links(directory)
    config = read_object(path)
    if not isinstance(config.get("model_type", ""), str):
        raise CheckpointError(str(path), f"model_type is {config['model_type']!r:.80}", "it must name the architecture")
    if config.get("transformers_weights") is not None:
        # transformers would read that file, while modmoe and every other program read the usual one
        raise CheckpointError(str(path), "transformers_weights names a file of its own", "take that key away")
    return config


def _check_file(path: Path) -> None:
    """Raise CheckpointError where a file is only a pointer to another one, as Git LFS leaves it, or is empty."""
    wrong = wrong_with(path)
    if wrong is not None:
        raise CheckpointError(str(path), f"{wrong[0]}", f"{wrong[1]}")


def read_adapter_config(directory: Path) -> dict[str, Any]:
    """Return adapter_config.json as a mapping; CheckpointError where it is not one."""
    check_links(directory)
    return read_object(directory / ADAPTER_CONFIG)


def adapter_headers(directory: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return shape and type of each of an adapter's tensors by name; no weight is read.

    Raises CheckpointError where the file is missing, damaged or a pickle.
    """
    path = directory / ADAPTER_WEIGHTS
    if not path.is_file():
        if any(directory.glob("*.bin")):
            raise CheckpointError(
                str(directory),
                "holds pickled weights only, which can run code when read",
                "save the adapter again with save_pretrained(..., safe_serialization=True)",
            )
        raise CheckpointError(str(directory), f"no {ADAPTER_WEIGHTS}", "fetch the adapter again")
    _check_file(path)
    with open_tensors(path) as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is no mapping)
        for name, one in slices.items():
            if one.get_dtype() not in DTYPES:
                raise CheckpointError(str(path), f"'{name[:80]}' has type {one.get_dtype()}, which is not supported")
        return {name: (tuple(one.get_shape()), DTYPES[one.get_dtype()]) for name, one in slices.items()}


def local_base(directory: Path) -> Path | None:
    """Return the directory of the model that an adapter is for; None where nothing on this disk is named.

    A relative path counts from the working directory, and then from the adapter's.
    """
    named = read_adapter_config(directory).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise CheckpointError(
            str(directory / ADAPTER_CONFIG),
            f"base_model_name_or_path is {named!r}",
            "write the base model's directory or Hub id there",
        )
    return next((place for place in (Path(named), directory / named) if os.path.isdir(place)), None)


def resolve_base(directory: Path) -> Path:
    """Return the directory of the model that an adapter is for, fetched from the Hub if need be.

    Raises CheckpointError where it cannot be found, or is an adapter itself.
    """
    base, config = local_base(directory), read_adapter_config(directory)
    if base is None:
        try:
            base = resolve_source(config["base_model_name_or_path"], config.get("revision"))
        except CheckpointError as error:
            raise CheckpointError(f"{directory / ADAPTER_CONFIG}: base_model_name_or_path", str(error)) from error
    if is_adapter(base):
        raise CheckpointError(str(directory / ADAPTER_CONFIG), f"the base model {base} is an adapter itself")
    return base


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's bytes in memory order (little-endian, C order)."""
    digest = hashlib.sha256()
    for chunk in chunks(tensor):
        digest.update(chunk)
    return digest.hexdigest()


def parse_bytes(text: str, place: str) -> int:
    """Return bytes for a size such as ``5GB`` or ``200MB`` (powers of ten) or ``4GiB`` (powers of two)."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(K|M|G|T)?(i?)B?", text.strip(), re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise RecipeError(str(place), f"'{text}' is no size", "write 5GB, 500MB or 4GiB")
    power = " KMGT".index((match[2] or " ").upper())
    return int(float(match[1]) * (1024 if match[3] else 1000) ** power)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON with a final newline; what UTF-8 cannot hold is written by its number."""
    path.write_bytes(json.dumps(value, indent=2, ensure_ascii=False).encode(errors="backslashreplace") + b"\n")


def copy_companions(source: Path, target: Path) -> None:
    """Copy what belongs to a checkpoint beside its weights: tokenizer, generation settings, licence. No code.

    Raises CheckpointError where one of them is a link out of the directory.
    """
    names = (
        "tokenizer*",
        "special_tokens_map.json",
        "added_tokens.json",
        "vocab.*",
        "merges.txt",
        "chat_template*",
        "generation_config.json",
        "*.model",
        "LICENSE*",
    )
    check_links(source, names)
    for pattern in names:
        for file in source.glob(pattern):
            if file.is_file() and file.suffix != ".py":
                with contextlib.suppress(FileExistsError):
                    (target / file.name).write_bytes(file.read_bytes())
