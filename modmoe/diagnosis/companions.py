"""The files beside the weights: Python files, which are read and never executed, and the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modmoe.adapters.table import METHODS
from modmoe.diagnosis.files import Weights
from modmoe.diagnosis.findings import Findings
from modmoe.errors import CheckpointError, ModmoeError
from modmoe.formats import adapter_code
from modmoe.formats.tied_code import own_files, write_code, write_packed_code
from modmoe.models.loading import ADAPTED_PREFIX, PACKED_PREFIX, TIED_PREFIX, load_tokenizer
from modmoe.models.tokenizer_files import place_of, template_place, try_tokenizer
from modmoe.storage.documents import read_object
from modmoe.storage.kinds.forms import wrong_with
from modmoe.storage.kinds.orders import find_orders
from modmoe.storage.kinds.tokens import count_rows, find_rowless
from modmoe.storage.scratch import scratch_directory

_SETTINGS = ("config.json", "tokenizer_config.json", "processor_config.json", "generation_config.json")
_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_code(directory: Path, config: Mapping[str, Any], findings: Findings) -> None:
    """Compare the Python files with those that this version writes, as text; name those that it does not know."""
    present = {file.name: file for file in sorted(directory.glob("*.py"))}
    own: dict[str, str] = {}
    try:
        written = _written(directory, dict(config))
        own = own_files(dict(config), directory)
    except ModmoeError as error:
        findings.fault_of_error(directory, error, "fetch the Python files again")
        return
    remedy = "modmoe never executes it; others do, so read it first, or have `modmoe export` write all anew"
    for name, text in written.items():
        if name not in present:
            wrong = "is missing, so nothing but modmoe can load the checkpoint"
            findings.fault(directory / name, wrong, "have `modmoe export` write all anew")
        elif present[name].read_bytes() != text.encode():
            findings.fault(directory / name, "is not the code that this version of modmoe writes", remedy)
    auto_map = config.get("auto_map") if written else None
    for key, value in auto_map.items() if isinstance(auto_map, dict) else ():
        if f"{str(value).rpartition('.')[0]}.py" not in written:
            wrong = f"names {str(value)[:80]!r}, which is not what this version of modmoe writes"
            findings.fault(f"{directory / 'config.json'}: auto_map: {key}", wrong, "take the entry out: it is code")
    strange = [name for name in present if name not in written and name not in own]
    named = _auto_maps(directory)
    if own:
        findings.note(
            f"{directory}: its architecture is defined by {', '.join(sorted(own))}; nothing was executed: read the "
            "files before --trust-remote-code"
        )
    if strange or (named and not written and not own):
        files = ", ".join(strange) or "no file here"
        findings.note(f"{directory}: brings Python code ({files}; auto_map: {named or 'none'}); nothing was executed")
    findings.checked["code files"] = len(written)


def _written(directory: Path, config: dict[str, Any]) -> dict[str, str]:
    """Return the files that this version writes beside such a checkpoint."""
    model_type = str(config.get("model_type"))
    if not model_type.startswith(TIED_PREFIX):
        return {}
    if model_type.startswith(ADAPTED_PREFIX):
        method = METHODS.get(str(config.get("adapter_method")))
        return {} if method is None else adapter_code.code_files(method)
    # files that other programs execute are compared one by one
    named = {key: value for key, value in config.items() if key != "auto_map"}
    with scratch_directory("doctor") as scratch:
        if model_type.startswith(PACKED_PREFIX):
            write_packed_code(scratch)
        else:
            write_code(scratch, named, directory)
        texts = {file.name: file.read_text(encoding="utf-8") for file in scratch.glob("*.py")}
    # the architecture's own files are copies of files that were compared
    return {name: text for name, text in texts.items() if name not in own_files(config, directory)}


def _auto_maps(directory: Path) -> str:
    found = []
    for name in _SETTINGS:
        try:
            value = read_object(directory / name)
        except CheckpointError:
            continue
        if value.get("auto_map"):
            found.append(name)
    return ", ".join(found)


def check_tokenizer(directory: Path, config: Mapping[str, Any], weights: Weights, findings: Findings) -> None:
    """Check that there is a tokenizer without code of its own, and that the embeddings have a row for each token."""
    text = config.get("text_config")
    rows = count_rows(weights.headers())
    if rows is None:
        size = (text if isinstance(text, dict) else config).get("vocab_size")
        rows = size if isinstance(size, int) else None
    for key in _TOKENS:
        value = config.get(key)
        for token in value if isinstance(value, list) else [value]:
            if isinstance(token, int) and rows is not None and not -1 <= token < rows:
                wrong = f"is {token}, and the embeddings have {rows} rows"
                findings.fault(f"{directory / 'config.json'}: {key}", wrong, "restore config.json")
    rowless = None if rows is None else find_rowless(directory, rows)
    if rowless is not None:
        findings.fault(*rowless)
        return
    if any(wrong_with(file) for file in directory.glob("*token*.json")) or any(find_orders(directory, config, {})):
        return  # reported with the files; loading a tokenizer reads config.json too
    check_use(directory, findings, load_tokenizer)


def check_use(directory: Path, findings: Findings, load: Callable[[Path], Any]) -> None:
    """Load the tokenizer of a directory, and try it and its chat template."""
    try:
        tokenizer = load(directory)
    except ModmoeError as error:
        reason = str(error).removeprefix(f"{directory}: ")
        findings.fault(directory, f"has no tokenizer that can be read ({reason})", "copy the tokenizer's files there")
        return
    except Exception as error:  # any kind of error: the files may hold anything
        findings.fault(directory, f"its tokenizer cannot be read ({str(error)[:200]})", "fetch its files again")
        return
    findings.checked["tokens"] = len(tokenizer)
    try:
        try_tokenizer(directory, tokenizer)
    except CheckpointError as error:
        places = (place_of(directory), template_place(directory))
        place = next((place for place in places if str(error).startswith(place)), directory)
        findings.fault_of_error(place, error, "fetch the tokenizer's files from where you trust them")
