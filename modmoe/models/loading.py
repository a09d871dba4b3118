"""Models and tokenizers from a checkpoint: dense ones by transformers, tied ones by the classes in this package.

An adapter directory is loaded as its base model with the adapter attached.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from modmoe.errors import (
    AdapterError,
    CheckpointError,
    ModmoeError,
    RecipeError,
    is_failure,
    is_out_of_memory,
    reason_of,
)
from modmoe.modeling import modeling_modmoe, packed_modmoe
from modmoe.models.adapter_config import adapter_method, read_peft_config
from modmoe.models.implied import check_implied
from modmoe.models.tokenizer_files import open_in_bounds
from modmoe.storage.checkpoint import (
    ADAPTER_CONFIG,
    Checkpoint,
    adapter_headers,
    is_adapter,
    read_config,
    resolve_base,
    resolve_source,
)
from modmoe.storage.kinds.faults import check_rows, check_vocabulary
from modmoe.storage.kinds.forms import find_form, has_weights
from modmoe.storage.kinds.headers import read_headers
from modmoe.storage.kinds.orders import find_orders
from modmoe.storage.kinds.tokens import EMBEDDINGS, count_rows

TIED_PREFIX = "modmoe_"
ADAPTED_PREFIX = "modmoe_adapters_"
"""The ``model_type`` of a model that carries its adapters begins with it; such a one is no tied model."""
PACKED_PREFIX = packed_modmoe.TYPE_PREFIX
"""The ``model_type`` of a packed export begins with it; such a one is no tied model either."""

__all__ = [
    "ADAPTED_PREFIX",
    "PACKED_PREFIX",
    "TIED_PREFIX",
    "TOKENIZER",
    "DenseClasses",
    "causal_lm_classes",
    "check_models",
    "dense_classes",
    "is_adapted",
    "is_adapter",
    "is_tied",
    "is_tied_type",
    "load",
    "load_tokenizer",
    "own_code",
    "pick_device",
    "read_settings",
    "skeleton",
    "tokenizer_home",
]


def pick_device(device: str) -> torch.device:
    """Return the device for ``auto``, ``cpu`` or ``cuda``; RecipeError where there is no such device."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RecipeError("device", "no CUDA device here", "pass --device cpu")
    return torch.device(device)


def is_tied(directory: Path) -> bool:
    """Return whether a directory holds a ModularMoE checkpoint."""
    return is_tied_type(read_config(directory).get("model_type"))


def is_tied_type(model_type: Any) -> bool:
    """Return whether a ``model_type`` is that of a ModularMoE."""
    name = str(model_type)
    return name.startswith(TIED_PREFIX) and not name.startswith((ADAPTED_PREFIX, PACKED_PREFIX))


def is_adapted(directory: Path) -> bool:
    """Return whether a directory holds a base model and its routed adapters in one checkpoint."""
    return not is_adapter(directory) and str(read_config(directory).get("model_type")).startswith(ADAPTED_PREFIX)


def load(
    source: str | Path,
    *,
    trust_remote_code: bool = False,
    dtype: torch.dtype | None = None,
    device: str = "auto",
    revision: str | None = None,
    trainable: bool = False,
) -> PreTrainedModel:
    """Load a causal LM, dense or tied or with adapters, in evaluation mode.

    A tied model is built from this package's classes: the code that lies beside its weights is not executed. Code of
    an architecture of the checkpoint's own is executed with ``trust_remote_code`` only. ``dtype`` None keeps the
    checkpoint's. Of an adapter directory comes a PeftModel: the base model in ``dtype``, the adapter in float32;
    with ``trainable`` the adapter learns.

    Raises:
        CheckpointError: the checkpoint is damaged, unknown, or has own code and is not trusted; the base model of an
            adapter is not to be had.
        AdapterError: the adapter does not fit its base model.
        RecipeError: ``device`` is not to be had.
    """
    where = pick_device(device)
    directory = resolve_source(source, revision)
    if is_adapter(directory):
        return _load_adapter(directory, trainable, trust_remote_code=trust_remote_code, dtype=dtype, device=where.type)
    checkpoint = Checkpoint(directory)  # damage is told in one line before transformers sees it
    if (directory / ADAPTER_CONFIG).is_file():
        # transformers would load the base model that this file names, and not the weights that lie here
        raise CheckpointError(
            str(directory), f"holds a model and {ADAPTER_CONFIG}", "take away the one that is not meant"
        )
    empty = skeleton(directory, trust_remote_code=trust_remote_code)
    options: dict[str, Any] = {"dtype": dtype or "auto", "output_loading_info": True}
    with _transformers(directory, "load the model"):
        kind: Any = type(empty)
        model, info = kind.from_pretrained(directory, config=deepcopy(empty.config), **options)
        missing = sorted(info["missing_keys"])
        if missing:
            raise CheckpointError(
                str(directory),
                f"'{missing[0][:80]}' is missing, of {len(missing)} tensors that config.json asks for",
                "fetch the checkpoint again",
            )
        if where.type == "cpu" and not str(checkpoint.config.get("model_type")).startswith(TIED_PREFIX):
            # transformers' own choice is for GPUs; here it refuses many widths of experts
            model.set_experts_implementation("eager")
    if str(checkpoint.config.get("model_type")).startswith(TIED_PREFIX) and not is_adapted(directory):
        # save_pretrained writes this package's code too, as it does where the model was loaded with the code beside it
        type(model).register_for_auto_class("AutoModelForCausalLM")
    loaded: PreTrainedModel = model.eval().to(where)
    return loaded


@contextmanager
def _transformers(directory: Path, doing: str) -> Iterator[None]:
    """Turn what transformers makes of a damaged or hostile file, any kind of error, into a CheckpointError."""
    try:
        yield
    except BaseException as error:
        if isinstance(error, ModmoeError) or is_out_of_memory(error) or not is_failure(error):
            raise
        reason = reason_of(error, 300)
        named = _named_in(reason, read_config(directory))
        why = f"it does not know {named}" if named else reason
        raise CheckpointError(
            f"{directory}/config.json", f"transformers cannot {doing}: {why}", "restore it there"
        ) from error


def _named_in(reason: str, config: dict[str, Any]) -> str:
    """Return the key and the value of a configuration's text that an error consists of, or nothing."""
    # of a key that is looked up it says nothing else, of an attribute of torch a little more
    word = re.fullmatch(r"(?:module 'torch' has no attribute )?'([^']+)'", reason)
    waiting = [("", config)]
    while word and waiting:
        place, values = waiting.pop()
        for key, value in values.items():
            if isinstance(value, dict):
                waiting.append((f"{place}{key}.", value))
            elif value == word[1]:
                return f"{place}{key} {value!r}"
    return ""


def read_settings(directory: Path, kind: Any = AutoConfig) -> Any:
    """Return config.json as a configuration of the class ``kind``, its defaults filled in; no code is executed.

    What it says of the form of a model's outputs is left aside.

    Raises CheckpointError where transformers cannot read it, or would make or run what no model needs.
    """
    for problem in find_orders(directory, read_config(directory), read_headers(directory)):
        raise CheckpointError(str(problem))
    with _transformers(directory, "read it"):
        settings = kind.from_pretrained(directory)
    settings.return_dict, settings.output_hidden_states = True, False
    return settings


def skeleton(directory: Path, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """Return a checkpoint's model without values, from its config.json alone; own code is executed only if trusted.

    Raises CheckpointError where no model can be made of it, or only with code that is not trusted; and where there are
    weights that are not those of that model.
    """
    config = read_config(directory)
    _check_code(directory, config, trust_remote_code)
    is_known = not own_code(config) and not str(config.get("model_type")).startswith(TIED_PREFIX)
    model_type, kind = (
        (None, AutoConfig) if is_known else causal_lm_classes(directory, trust_remote_code=trust_remote_code)
    )
    settings = read_settings(directory, kind)
    with _transformers(directory, "build a model of it"), torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config if model_type is None else model_type
        made: PreTrainedModel = make(settings)
    if has_weights(directory):
        check_implied(Checkpoint(directory), made)
    elif (form := find_form(directory)) is not None:
        raise CheckpointError(str(form))
    return made


def check_models(sources: Iterable[str | Path | None], *, trust_remote_code: bool) -> None:
    """Raise CheckpointError unless each that is not None, or its base model, has what config.json implies."""
    for place in (resolve_source(source) for source in sources if source is not None):
        skeleton(resolve_base(place) if is_adapter(place) else place, trust_remote_code=trust_remote_code)


_SPARE = 1 << 16
"""Values by which an adapter's configuration may be larger than twice its weights."""


def _load_adapter(directory: Path, trainable: bool, **options: Any) -> PreTrainedModel:
    adapter_method(directory)
    held = sum(math.prod(shape) for shape, _ in adapter_headers(directory).values())
    base = load(resolve_base(directory), **options)
    from peft import PeftModel

    try:
        config = read_peft_config(directory)
        wanted = int(config.num_parameters(base))
        if wanted > _SPARE + 2 * held:
            raise CheckpointError(
                str(directory / ADAPTER_CONFIG),
                f"describes an adapter of {wanted:.3g} parameters, and its weights are {held:.3g}",
                "one of the two is of another adapter",
            )
        model = PeftModel.from_pretrained(base, str(directory), is_trainable=trainable, torch_device=str(base.device))
    except AdapterError as error:  # it knows its name in the model, and not where it came from
        raise error.at(f"{directory}: {error.place}" if error.place else str(directory)) from error
    except BaseException as error:  # as with transformers, a damaged file comes to any kind of error
        if isinstance(error, ModmoeError) or is_out_of_memory(error) or not is_failure(error):
            raise
        raise CheckpointError(str(directory), f"peft cannot load it: {reason_of(error, 300)}") from error
    return cast(PreTrainedModel, model.eval())


def tokenizer_home(directory: Path) -> Path:
    """Return where a checkpoint's tokenizer lies: for an adapter without one, beside its base model."""
    if not is_adapter(directory) or any((directory / name).is_file() for name in TOKENIZER):
        return directory
    return resolve_base(directory)


TOKENIZER = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
"""One of these is there where a directory has a tokenizer."""


def load_tokenizer(source: str | Path, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """Load the tokenizer that lies beside a checkpoint, or the base model's.

    Raises CheckpointError where there is none, where the embeddings have no row for one of its tokens, or where what
    its files come to breaks the bounds of a child process.
    """
    place = resolve_source(source, revision)
    directory, rows = tokenizer_home(place), embedding_rows(place)
    check_rows(directory, rows)
    tokenizer = open_tokenizer(directory, trust_remote_code=trust_remote_code)
    check_vocabulary(directory, tokenizer, rows)
    return tokenizer


def open_tokenizer(directory: Path, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer in a directory within bounds, whatever model it is for; CheckpointError."""
    config = {} if is_adapter(directory) else read_config(directory)
    if str(config.get("model_type", "")).startswith(TIED_PREFIX) and not own_code(config):
        kind = _own_classes(directory, config)[1]
        AutoConfig.register(kind.model_type, kind, exist_ok=True)  # transformers warns of types that it does not know

    def read() -> Any:
        try:
            return AutoTokenizer.from_pretrained(directory, trust_remote_code=trust_remote_code)
        except BaseException as error:  # what stands in five files is read by two libraries, which raise what they like
            if isinstance(error, ModmoeError | MemoryError) or not is_failure(error):
                raise
            raise CheckpointError(str(directory), f"no usable tokenizer: {reason_of(error)}") from error

    return open_in_bounds(directory, read, is_trusted=trust_remote_code)


def embedding_rows(directory: Path) -> int | None:
    """Return the rows of the embeddings of a model, or of that which an adapter is for; None where none are known."""
    if not is_adapter(directory):
        return count_rows(read_headers(directory))
    trained = [shape[0] for name, (shape, _) in adapter_headers(directory).items() if name.endswith(EMBEDDINGS)]
    return max(trained, default=None) or count_rows(read_headers(resolve_base(directory)))


def own_code(config: dict[str, Any]) -> dict[str, str]:
    """Return the auto_map of an architecture that transformers does not know, else nothing."""
    if str(config.get("model_type")).startswith((ADAPTED_PREFIX, PACKED_PREFIX)):
        return {}  # its code is this package's, over an architecture that transformers knows
    dense = config.get("dense_config") if is_tied_type(config.get("model_type")) else config
    dense = dense if isinstance(dense, dict) else {}
    auto_map = dense.get("auto_map")
    if str(dense.get("model_type")) in CONFIG_MAPPING or not isinstance(auto_map, dict):
        return {}
    return {key: value for key, value in auto_map.items() if isinstance(value, str)}


def _check_code(directory: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    model_type = config.get("model_type")
    code = own_code(config)
    if code and "AutoConfig" not in code:
        raise CheckpointError(f"{directory}/config.json", "auto_map lacks AutoConfig")
    if code and "AutoModelForCausalLM" not in code:
        raise CheckpointError(
            f"{directory}/config.json", "auto_map lacks AutoModelForCausalLM", "only causal LMs are known"
        )
    if code and not trust_remote_code:
        raise CheckpointError(
            str(directory),
            f"'{model_type}' is defined by Python files in the checkpoint ({code.get('AutoModelForCausalLM')})",
            "read them, then pass --trust-remote-code to execute them",
        )
    if not code and not str(model_type).startswith(TIED_PREFIX) and model_type not in CONFIG_MAPPING:
        raise CheckpointError(str(directory), f"transformers does not know model_type '{model_type}'")


def _own_classes(directory: Path, config: dict[str, Any]) -> tuple[Any, Any]:
    """Return the causal LM's class and its configuration's, of a tied model or of one that carries its adapters."""
    code = own_code(config)
    if code:
        base = get_class_from_dynamic_module(code["AutoModelForCausalLM"], directory)
        model_type: Any = modeling_modmoe.model_class(base)
        return model_type, model_type.config_class
    names = config.get("architectures")
    if not isinstance(names, list) or len(names) != 1 or not str(names[0]).startswith("ModMoE"):
        raise CheckpointError(f"{directory}/config.json", f"architectures is {names!r}", "it must name one causal LM")
    home: Any = modeling_modmoe
    if str(config.get("model_type")).startswith(PACKED_PREFIX):
        home = packed_modmoe
    if str(config.get("model_type")).startswith(ADAPTED_PREFIX):
        from modmoe.adapters import modeling_modmoe_adapters
        from modmoe.adapters.table import METHODS

        home = modeling_modmoe_adapters
        for method in METHODS.values():
            home.know(method.adapter, method.settings)
    model_type = getattr(home, str(names[0]), None)
    kind = getattr(model_type, "config_class", None)
    if kind is None or kind.model_type != config.get("model_type") or not hasattr(model_type, "generate"):
        raise CheckpointError(
            f"{directory}/config.json",
            f"architectures names {str(names[0])!r:.80}, which is no causal LM of the "
            f"model_type '{config.get('model_type')}'",
            "restore it",
        )
    return model_type, kind


def causal_lm_classes(directory: Path, *, trust_remote_code: bool) -> tuple[Any, Any]:
    """Return a checkpoint's causal LM class and its configuration's, of whatever kind; own code only if trusted."""
    config = read_config(directory)
    if not str(config.get("model_type")).startswith(TIED_PREFIX):
        classes = dense_classes(directory, trust_remote_code=trust_remote_code)
        return classes.causal_lm, classes.config
    _check_code(directory, config, trust_remote_code)
    return _own_classes(directory, config)


@dataclass(frozen=True, slots=True)
class DenseClasses:
    """The classes of a dense architecture."""

    config: Any
    model: Any
    """The model without a head; None where own code names none."""
    causal_lm: Any


def dense_classes(source: Path, *, trust_remote_code: bool) -> DenseClasses:
    """Return a dense checkpoint's classes, executing own code only if trusted; CheckpointError otherwise."""
    config = read_config(source)
    _check_code(source, config, trust_remote_code)
    code = own_code(config)
    if code:
        found = {key: get_class_from_dynamic_module(value, source) for key, value in code.items()}
        return DenseClasses(found["AutoConfig"], found.get("AutoModel"), found["AutoModelForCausalLM"])
    kind = type(read_settings(source))
    if kind not in AutoModelForCausalLM._model_mapping:
        raise CheckpointError(str(source), f"'{config.get('model_type')}' has no causal language model in transformers")
    return DenseClasses(kind, AutoModel._model_mapping[kind], AutoModelForCausalLM._model_mapping[kind])
