"""Quantized checkpoints: those whose tensors are packed, and those whose config.json only says that they are.

What the tensors are decides; config.json, and files that quantizers leave beside it, name the method.
Methods and names: https://huggingface.co/docs/transformers/quantization/overview and the files that each one writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from modmoe.errors import ModmoeError
from modmoe.storage.documents import read_object
from modmoe.storage.kinds.headers import Headers, Problem

_KEYS = ("quantization_config", "compression_config", "quantization")
"""Of config.json and of a part of it; the last is MLX's."""
_FILES = ("quantize_config.json", "hf_quant_config.json", "quant_config.json", "quantization_config.json")
"""What AutoGPTQ, ModelOpt and AutoAWQ write beside config.json."""
_TRACES = (
    (re.compile(r"\.(qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.qweight$"), "GPTQ, AWQ or EETQ"),
    (re.compile(r"\.(absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..+|SCB)$"), "bitsandbytes"),
    (re.compile(r"\.(weight_packed|weight_zero_point|weight_shape|weight_g_idx)$"), "compressed-tensors"),
    (re.compile(r"\.weight_scale_inv$"), "FP8"),
    (re.compile(r"\.(weight_scale|weight_scales|weight_scale_2|input_scale)$"), "FP8, NVFP4 or compressed-tensors"),
    (re.compile(r"\.W_q$"), "HQQ"),
    (re.compile(r"\.(codes|codebooks)$"), "AQLM"),
    (re.compile(r"\.(centroids|res_centroids)$"), "VPTQ"),
    (re.compile(r"\.weight\._(data|scale|shift)$"), "quanto"),
    (re.compile(r"[._](qdata|weight_qdata)$"), "torchao"),
)
"""Ends of names that no floating-point model has, and which methods write them."""
_BLOCKS = re.compile(r"_blocks$")
_WEIGHTS = re.compile(r"\.weight$|(^|[._])(gate_up|gate|up|down|[qkvo])_proj$|\.experts\.\w+$")
_SMALL_FLOATS = ("F8_", "F4", "F6_")
"""Types of a value's bits; F8_E4M3 is one."""
_WHOLE = ("U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64", "BOOL")
_LOADED = "AutoModelForCausalLM.from_pretrained('{source}'{options}){dequantize}.save_pretrained('{source}-plain')"
_OPTIONS = {
    "fp8": "FineGrainedFP8Config",
    "mxfp4": "Mxfp4Config",
    "compressed-tensors": "CompressedTensorsConfig",
    "metal": "MetalConfig",
}
"""Methods whose weights transformers turns back when it reads them, with the class to say so by."""
_METHODS = ("bitsandbytes", "higgs")
"""Methods whose models transformers turns back once they are read."""


def find_quantization(directory: Path, config: Mapping[str, Any], headers: Headers) -> Iterator[Problem]:
    """Yield that the tensors are quantized, or else each word of it that was left where they are not."""
    said = list(_said(config))
    packed = find_packed(headers)
    files = [file for file in _FILES if (directory / file).is_file()]
    if packed is not None:
        name, trace = packed
        named = next((_method(value) for _, value in said if _method(value)), None) or _method_beside(directory, files)
        header = headers[name]
        by = named or trace
        what = f"is quantized{f' by {by}' if by else ''}"
        shape = f"has type {header.dtype}, shape {list(header.shape)}"
        if said:
            place = f"{directory / 'config.json'}: {said[0][0]}"
            yield Problem(place, f"{what}: '{name[:99]}' {shape}", _remedy(directory, by.lower()))
        else:
            place = f"{directory / header.file}: '{name[:99]}'"
            yield Problem(place, f"{shape}: the model {what}", _remedy(directory, by.lower()))
        return
    for key, value in said:
        place = f"{directory / 'config.json'}: {key}"
        if headers:
            what = f"says {_shown(value)}, and the tensors are not quantized: it was left behind"
            yield Problem(place, what, "take that key out of config.json")
        else:
            # without tensors, as in a dry run, config.json is believed
            yield Problem(
                place, f"says {_shown(value)}, so that the model is quantized", _remedy(directory, _method(value) or "")
            )
    for file in files if headers and not said else ():
        what = "says that the model is quantized, and the tensors are not: it was left behind"
        yield Problem(str(directory / file), what, "take that file away")


def find_packed(headers: Headers) -> tuple[str, str] | None:
    """Return the first tensor that only a quantized model has, and which methods write such ones."""
    for name, header in headers.items():
        for pattern, method in _TRACES:
            if pattern.search(name):
                return name, method
        if header.dtype.startswith(_SMALL_FLOATS):
            return name, "FP8" if header.dtype.startswith("F8_") else header.dtype
        if header.dtype in _WHOLE:
            if _BLOCKS.search(name):
                return name, "MXFP4"
            if _WEIGHTS.search(name) or (name.endswith(".bias") and len(header.shape) == 1):
                return name, ""
    return None


def _said(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each key that says that the model is quantized, with its value; null says nothing."""
    for key in _KEYS:
        value = config.get(key)
        if value is not None and (key != "quantization" or isinstance(value, dict)):
            yield prefix + key, value
    for key, value in config.items() if not prefix else ():
        # models of several parts have one configuration a part
        if isinstance(value, dict) and key not in _KEYS and key.endswith(("config", "_model")):
            yield from _said(value, f"{key}.")


def _method(value: Any) -> str | None:
    """Return the method that a value of such a key names."""
    if not isinstance(value, dict):
        return None
    method = value.get("quant_method") or value.get("quant_algo")
    if isinstance(method, str) and method:
        return method[:40]
    if value.get("load_in_4bit") is True or value.get("load_in_8bit") is True:
        return "bitsandbytes"
    return None


def _method_beside(directory: Path, files: list[str]) -> str | None:
    for file in files:
        try:
            value = read_object(directory / file)
        except ModmoeError:
            continue
        method = _method(value) or _method(value.get("quantization"))
        if method:
            return method
        return "GPTQ" if file == "quantize_config.json" else None
    return None


def _shown(value: Any) -> str:
    method = _method(value)
    if method:
        return method
    return f"{value!r:.60}" if not isinstance(value, dict) or not value else f"no method ({', '.join(value)[:60]})"


def _remedy(directory: Path, method: str) -> str:
    original = "name the unquantized model it was made from"
    kind = next((_OPTIONS[key] for key in _OPTIONS if key in method), None)
    if kind is not None:
        how = _LOADED.format(source=directory, options=f", quantization_config={kind}(dequantize=True)", dequantize="")
    elif method in _METHODS:
        how = _LOADED.format(source=directory, options="", dequantize=".dequantize()")
    else:
        return f"{original}, since modmoe cuts weights that are floating-point numbers"
    return f"{original}, or write it with transformers: {how}"
