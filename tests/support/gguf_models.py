"""GGUF files by llama.cpp's own converter, what llama.cpp computes from them, and models whose tokenizers it takes."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import runpy
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from tests.conftest import REPOSITORY
from tests.support import tiny

HOME = Path(os.environ.get("MODMOE_LLAMA_CPP", REPOSITORY / "build" / "llama_cpp"))
"""Where `make test-clients` puts llama.cpp's sources, of which the converter is one."""
CONVERTER = HOME / "llama.cpp" / "convert_hf_to_gguf.py"
PROMPT = "the river and a stone under the door"
WORDS = ["stone", "river", "light", "door", "wind", "paper", "salt", "bird", "under", "over", "the", "a", "and", "of"]
SIZE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "mlp_bias": False,
    "tie_word_embeddings": False,
}


def _why_not() -> str:
    if importlib.util.find_spec("llama_cpp") is None:
        return "llama-cpp-python is not installed: make test-clients"
    if not CONVERTER.is_file():
        return f"no {CONVERTER}: make test-clients"
    return ""


needs_llama_cpp = [pytest.mark.clients, pytest.mark.skipif(bool(_why_not()), reason=_why_not())]


def convert(directory: Path, file: Path, outtype: str = "f32", pre_tokenizer: str | None = None) -> Path:
    """Write a checkpoint as GGUF with the converter, run in this process; RuntimeError where it refuses.

    ``pre_tokenizer`` is what it shall take for the tokenizer's, which it knows by a hash for published ones only.
    """
    before = sys.argv, list(sys.path)
    sys.path.insert(0, str(CONVERTER.parent))
    sys.argv = [str(CONVERTER), str(directory), "--outfile", str(file), "--outtype", outtype]
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        if pre_tokenizer is not None:
            sys.path.insert(1, str(CONVERTER.parent / "gguf-py"))
            base: Any = importlib.import_module("conversion.base")
            patch.setattr(base.TextModel, "get_vocab_base_pre", lambda self, tokenizer: pre_tokenizer)
        try:
            runpy.run_path(str(CONVERTER), run_name="__main__")
        except SystemExit as stop:
            raise RuntimeError(f"the converter stopped with {stop.code}") from stop
        finally:
            sys.argv, sys.path[:] = before
    return file


def types_of(file: Path) -> dict[str, str]:
    """Return each tensor's type in a GGUF file."""
    import gguf

    return {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}


class Reader:
    """A GGUF file opened by llama.cpp, one thread; use as a context."""

    def __init__(self, file: Path, *, exact: bool = True) -> None:
        """``exact`` keeps keys and values in float32; by default llama.cpp has them in float16."""
        import llama_cpp

        cache = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if exact else {}
        self.model = llama_cpp.Llama(
            str(file), n_ctx=128, n_batch=128, n_threads=1, logits_all=True, verbose=False, **cache
        )

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.model.close()

    def logits(self, ids: list[int]) -> np.ndarray[Any, Any]:
        """Return the logits [T, V] of a sequence."""
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def greedy(self, ids: list[int], new_tokens: int = 24) -> list[int]:
        """Return so many tokens, the likeliest each time."""
        self.model.reset()
        made: list[int] = []
        for token in self.model.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0):
            made.append(token)
            if len(made) == new_tokens:
                break
        return made


def by_transformers(model: Any, ids: list[int], new_tokens: int = 24) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Return the logits [T, V] of a sequence, and so many tokens after it, the likeliest each time."""
    ids_BT = torch.tensor([ids])
    with torch.no_grad():
        logits_TV = model(ids_BT).logits[0].float().numpy()
        made = model.generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            do_sample=False,
            max_new_tokens=new_tokens,
            eos_token_id=None,
        )
    return logits_TV, made[0, len(ids) :].tolist()


def save_dense(directory: Path, model_type: str, **changes: Any) -> Path:
    """Save a tiny random model that says words, with a tokenizer that has a SentencePiece file."""
    model = tiny.dense_model(model_type, **{**SIZE, **changes})
    with torch.no_grad():
        model.lm_head.weight[: 256 + 3] = 0  # single bytes, which need not be text
    model.save_pretrained(directory)
    save_sentencepiece(directory)
    return directory


def save_sentencepiece(directory: Path) -> None:
    """Train a SentencePiece tokenizer of 320 pieces; save its own file, and transformers' files."""
    import sentencepiece

    draw = random.Random(0)
    text = [" ".join(draw.choices(WORDS, k=12)) + "." for _ in range(300)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=SIZE["vocab_size"],
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    (directory / "tokenizer.vocab").unlink()
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "add_bos_token": True,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    transformers.LlamaTokenizer.from_pretrained(directory).save_pretrained(directory)


def add_merge(directory: Path) -> None:
    """Give the tokenizer of bytes one merge, without which llama.cpp takes the file for damaged."""
    file = directory / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    content["model"]["vocab"]["th"] = 259  # after the special tokens
    content["model"]["merges"] = [["t", "h"]]
    file.write_text(json.dumps(content), encoding="utf-8")


def write_texts(directory: Path) -> dict[str, str]:
    """Write three small tasks in words that the tokenizer knows and return their names and paths."""
    draw = random.Random(1)
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for number, name in enumerate(("first", "second", "third")):
        words = WORDS[number * 4 : number * 4 + 6]
        rows = [{"text": " ".join(draw.choices(words, k=16))} for _ in range(12)]
        paths[name] = str(directory / f"{name}.jsonl")
        Path(paths[name]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return paths
