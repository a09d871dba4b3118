"""Tiny real transformers models of every family, a byte-level tokenizer and task files, all made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 264
NEURONS = 48

# weights this large make every layer matter, so that a wrong one shows in the logits
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
_GATED = {**_COMMON, "intermediate_size": NEURONS, "num_key_value_heads": 2}
_MULTIPLIERS = {
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {**_GATED, "mlp_bias": True, "tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {**_GATED, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", _GATED),
    "qwen3": ("Qwen3Config", {**_GATED, "head_dim": 8}),
    "granite": ("GraniteConfig", {**_GATED, **_MULTIPLIERS, "mlp_bias": True, "tie_word_embeddings": True}),
    "olmo2": ("Olmo2Config", _GATED),
    "gemma2": ("Gemma2Config", {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3TextConfig", {**_GATED, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", _GATED),
    "gpt2": ("GPT2Config", {**_COMMON, "n_inner": NEURONS, "n_positions": 128}),
    "gpt_neox": ("GPTNeoXConfig", {**_COMMON, "intermediate_size": NEURONS}),
    "opt": ("OPTConfig", {**_COMMON, "ffn_dim": NEURONS, "word_embed_proj_dim": 32}),
}


def dense_config(model_type: str, **changes: Any) -> Any:
    """Return a tiny configuration of a family."""
    name, values = CONFIGS[model_type]
    return getattr(transformers, name)(**{**values, **changes})


def dense_model(model_type: str, seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random dense model in evaluation mode; biases are random too, so that a lost one shows."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(dense_config(model_type, **changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.2)
    return model.eval()


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level tokenizer without merges: one token a byte, and three special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<pad>"])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def save_dense(directory: Path, model_type: str = "llama", dtype: torch.dtype | None = None, **changes: Any) -> Path:
    """Save a tiny dense model with its tokenizer and return the directory."""
    model = dense_model(model_type, **changes)
    if dtype is not None:
        model = model.to(dtype)
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write_tasks(directory: Path, rows: int = 24, seed: int = 0) -> dict[str, str]:
    """Write three small task files of different text and return their names and paths."""
    draw = random.Random(seed)
    directory.mkdir(parents=True, exist_ok=True)
    sums = [(draw.randint(0, 99), draw.randint(0, 99)) for _ in range(rows)]
    words = ["stone", "river", "light", "door", "wind", "paper", "salt", "bird"]
    made: dict[str, list[dict[str, Any]]] = {
        "sums": [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in sums],
        "words": [{"text": " ".join(draw.choices(words, k=10)) + "."} for _ in range(rows)],
        "code": [{"text": f"def f{a}(x):\n    return x * {b}\n"} for a, b in sums],
    }
    paths = {}
    for name, items in made.items():
        path = directory / f"{name}.jsonl"
        path.write_text("".join(json.dumps(item) + "\n" for item in items), encoding="utf-8")
        paths[name] = str(path)
    return paths


def token_ids(batch: int = 3, tokens: int = 21, seed: int = 1) -> torch.Tensor:
    """Return random token ids, no special ones."""
    return torch.randint(0, 256, (batch, tokens), generator=torch.Generator().manual_seed(seed))
