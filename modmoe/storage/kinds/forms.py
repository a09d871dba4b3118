"""Directories without the files that are read here: which other form of a model lies there, and how it is made one.

And files that stand for others: the pointers of git's large file storage, pages of a website, nothing at all.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from modmoe.errors import ModmoeError
from modmoe.storage.documents import read_object
from modmoe.storage.kinds.headers import INDEX, SINGLE, Problem

ADAPTER_CONFIG = "adapter_config.json"
_SAVE = "AutoModelForCausalLM.from_pretrained('{place}'{options}).save_pretrained('{place}-safetensors')"
_PICKLES = ("pytorch_model*.bin", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")
_OF_TRAINING = ("training_args", "optimizer", "scheduler", "rng_state", "scaler")
"""Beginnings of pickles that trainers leave beside weights."""
_FORMS: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (
        ("*.gguf",),
        "is GGUF, which is read by llama.cpp",
        "name the model it was made from, or write it with transformers: "
        + _SAVE.replace("{place}", "{directory}").replace("{options}", ", gguf_file='{file}'"),
    ),
    (
        ("consolidated*.safetensors", "consolidated*.pth", "params.json"),
        "is the original format of Meta or Mistral",
        "fetch the files of transformers' format (model*.safetensors and config.json), or write them with the "
        "convert_*_weights_to_hf.py of the model in transformers",
    ),
    (
        ("weights*.npz", "weights*.safetensors"),
        "is the format of MLX",
        "name the model it was made from, or have it saved as model.safetensors under the names of transformers",
    ),
    (
        ("*.distcp", "pytorch_model_fsdp_*", "*/*.distcp"),
        "is a state of distributed training",
        "merge it first: accelerate merge-weights DIR OUT",
    ),
    (
        ("zero_to_fp32.py", "*zero_pp_rank*", "*/*zero_pp_rank*", "mp_rank_*"),
        "is a state of DeepSpeed",
        "merge it first: python zero_to_fp32.py DIR OUT --safe_serialization",
    ),
    (("tf_model*.h5", "*.h5"), "holds TensorFlow's weights only", "{old}"),
    (("flax_model*.msgpack", "*.msgpack"), "holds Flax's weights only", "{old}"),
    (("model.ckpt*.index",), "is a checkpoint of TensorFlow 1", "{old}"),
    (("*.onnx", "*/*.onnx"), "is an ONNX model", "name the model it was exported from"),
    (("openvino_model*",), "is an OpenVINO model", "name the model it was exported from"),
    (("*.nemo",), "is an archive of NeMo", "export it from NeMo to Hugging Face's format"),
    (("model_index.json",), "is a pipeline of diffusers", "name the directory of a causal LM"),
)
"""Patterns of names, what lies there, and what makes a checkpoint of it."""
_OLD = (
    "ask for safetensors, or write them with transformers 4, which still reads this: AutoModelForCausalLM."
    "from_pretrained('{directory}', from_{kind}=True).save_pretrained('{directory}-safetensors')"
)
_POINTER = b"version https://git-lfs.github.com/spec/"
_MOST_POINTER_BYTES = 1024
_READ = ("*.json", "model*.safetensors", "adapter_model.safetensors", "*.model", "*.txt", "*.jinja")
_NEVER_EMPTY = ("config.json", "tokenizer", "model", "adapter_")
"""Beginnings of names."""


def is_model(directory: Path) -> bool:
    """Return whether a directory holds config.json and weights in the files that are read here."""
    return (directory / "config.json").is_file() and has_weights(directory)


def has_weights(directory: Path) -> bool:
    """Return whether a directory holds weights in the files that are read here."""
    return (directory / SINGLE).is_file() or (directory / INDEX).is_file()


def is_adapter(directory: Path) -> bool:
    """Return whether a directory holds an adapter alone, as PEFT writes it, and no model."""
    return (directory / ADAPTER_CONFIG).is_file() and not has_weights(directory)


def find_lack(directory: Path) -> Problem:
    """Return what a directory that ``is_model`` does not call one has instead, or what it lacks."""
    found = find_form(directory)
    if found is not None:
        return found
    if (directory / "config.json").is_file():
        return Problem(str(directory), f"no {SINGLE} and no {INDEX}", "fetch the weights too")
    return Problem(str(directory), "no config.json", "name the directory of a checkpoint")


def find_form(directory: Path) -> Problem | None:
    """Return which other form of a model such a directory holds; None where it holds nothing of a model."""
    has_config = (directory / "config.json").is_file()
    if has_weights(directory) and not has_config:
        return Problem(str(directory), "no config.json beside the weights", "fetch it from where the weights are from")
    if (directory / ADAPTER_CONFIG).is_file():
        return Problem(str(directory), *_adapter(directory))
    for patterns, wrong, remedy in _FORMS:
        file = next((file for pattern in patterns for file in sorted(directory.glob(pattern))), None)
        if file is not None:
            kind = "flax" if "Flax" in wrong else "tf"
            old = _OLD.format(directory=directory, kind=kind)
            remedy = remedy.format(directory=directory, file=file.name, old=old)
            return Problem(str(directory), f"{file.relative_to(directory)} {wrong}", remedy)
    loose = sorted(file.name for file in directory.glob("*.safetensors"))
    if loose and has_config:
        return Problem(str(directory), *_loose(loose))
    pickles = (file for pattern in _PICKLES for file in sorted(directory.glob(pattern)))
    pickle = next((file for file in pickles if not file.name.startswith(_OF_TRAINING)), None)
    if pickle is not None and (has_config or not loose):
        save = _SAVE.format(place=directory, options="")
        wrong = f"holds pickled weights only ({pickle.name}), which can run code when read"
        return Problem(
            str(directory),
            wrong,
            f'if you trust them, convert them: python -c "from transformers import AutoModelForCausalLM; {save}"',
        )
    inner = _inner(directory)
    if inner is not None:
        lack = SINGLE if has_config else "config.json"
        return Problem(str(directory), f"no {lack}, and {inner.name} in it is a checkpoint", f"name {inner}")
    return None


def describe_file(file: Path) -> Problem:
    """Return what to name instead of a file."""
    if file.suffix == ".gguf":
        save = _SAVE.format(place=file.parent, options=f", gguf_file='{file.name}'")
        return Problem(
            str(file), "is a GGUF file", f"name the model it was made from, or write it with transformers: {save}"
        )
    return Problem(str(file), "is a file", "name the directory that holds config.json and the safetensors")


def _adapter(directory: Path) -> tuple[str, str]:
    base = ""
    try:
        named = read_object(directory / ADAPTER_CONFIG).get("base_model_name_or_path")
        base = f" ({named[:120]})" if isinstance(named, str) and named else ""
    except ModmoeError:
        pass
    return (
        "is an adapter without its model",
        f"name its base model{base}, or merge the two with peft: AutoPeftModelForCausalLM.from_pretrained("
        f"'{directory}').merge_and_unload().save_pretrained('{directory}-merged')",
    )


def _loose(files: list[str]) -> tuple[str, str]:
    if any("-of-" in file for file in files):
        return f"{files[0]} without {INDEX}", "fetch the index too"
    if len(files) == 1:
        return f"{files[0]} is not called {SINGLE}", "give it that name if it is the whole model"
    return f"{len(files)} safetensors files, such as {files[0]}, without {INDEX}", "fetch the index too"


def _inner(directory: Path) -> Path | None:
    """Return a checkpoint in the folders that the Hub's cache and trainers make; the last of several."""
    found = [
        place.parent
        for pattern in ("config.json", "*/config.json", "snapshots/*/config.json")
        for place in sorted(directory.glob(pattern), key=_number)
        if place.parent != directory
        if (place.parent / SINGLE).is_file() or (place.parent / INDEX).is_file()
    ]
    return found[-1] if found else None


def _number(path: Path) -> tuple[int, str]:
    digits = path.parent.name.rpartition("-")[2]
    return (int(digits) if digits.isascii() and digits.isdecimal() and len(digits) < 12 else 0, path.parent.name)


def find_pointers(directory: Path) -> Iterator[Problem]:
    """Yield the files of a checkpoint that stand for others, or hold nothing."""
    for file in sorted({file for pattern in _READ for file in directory.glob(pattern)}):
        wrong = wrong_with(file)
        if wrong:
            yield Problem(str(file), *wrong)


def wrong_with(file: Path) -> tuple[str, str] | None:
    """Return what a file is instead of what its name says, and the remedy; None where nothing speaks against it."""
    try:
        size_bytes = file.stat().st_size if file.is_file() else -1
        with file.open("rb") as opened:
            start = opened.read(64) if size_bytes > 0 else b""
    except OSError:
        return None
    if size_bytes == 0 and file.name.startswith(_NEVER_EMPTY):
        return "is empty", "fetch it again"
    if start.startswith(_POINTER) and size_bytes < _MOST_POINTER_BYTES:
        return (
            "is a pointer of git's large file storage, not the file itself",
            "run git lfs pull there, or fetch it again",
        )
    if start.lstrip()[:14].lower().startswith((b"<!doctype html", b"<html")) and file.suffix != ".txt":
        return "is a page of a website, not the file itself", "fetch it again, and log in first if it asks for that"
    return None
