"""What modmoe writes, converted by llama.cpp's own converter and run by llama.cpp."""

# Shapes: E experts, M modules, T tokens, V vocabulary

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from modmoe import api
from modmoe.cli.main import run
from modmoe.errors import ExportError
from modmoe.models.loading import load, load_tokenizer
from tests.support import gguf_models, planned
from tests.support.gguf_models import CONVERTER, Reader, by_transformers, convert

pytestmark = gguf_models.needs_llama_cpp

IDS = [256, *b"the light of the river"]
BYTES = "qwen2"
"""What the converter is told of the tests' tokenizer of bytes, in which no merge depends on it."""
CLOSE = 2e-5
"""Largest difference from transformers with keys and values in float32, as a share of the largest logit."""
COLD = 4e-3
"""The same where constant gates were made from a softmax, from the dense or tied model."""
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A tied model and the architecture that it becomes."""

    source: str
    target: str
    shared: int = 0
    """Modules that all experts have."""
    router: dict[str, Any] = field(default_factory=dict)
    """All of two experts without top_k, which is the dense model; otherwise keys of the recipe."""
    changes: dict[str, Any] = field(default_factory=dict)
    """Of the tiny dense configuration."""
    bound: float = CLOSE
    """Of the difference from the tied model, as a share of the largest logit."""

    def write(self, home: Path) -> tuple[Path, Path]:
        """Write the dense and the tied model."""
        members_EM = torch.zeros(2, planned.NUM_MODULES, dtype=torch.bool)
        members_EM[:, : self.shared] = True
        members_EM[0, self.shared :: 2] = members_EM[1, self.shared + 1 :: 2] = True
        changes = {"mlp_bias": False} if self.source in ("llama", "granite") else {}
        changes |= {"sliding_window": None} if self.source == "mistral" else {}
        router = self.router or {"top_k": 2}
        dense, tied = planned.write_tied(
            home, self.source, members_EM=members_EM, changes={**changes, **self.changes}, **router
        )
        gguf_models.add_merge(tied)
        return dense, tied


TOP1 = {"top_k": 1}
SUM = {"top_k": 2, "combine": "sum"}
CASES = {
    "llama as mixtral": Case(source="llama", target="mixtral", bound=COLD),
    "mistral as mixtral": Case(source="mistral", target="mixtral", bound=COLD),
    "llama as mixtral, core in each": Case(source="llama", target="mixtral", shared=2, bound=COLD),
    "llama as mixtral, one of two": Case(source="llama", target="mixtral", router=TOP1),
    "llama as mixtral, weighted sum": Case(source="llama", target="mixtral", router=SUM),
    "llama as mixtral, untied": Case(
        source="llama", target="mixtral", router=TOP1, changes={"tie_word_embeddings": False}
    ),
    "llama as mixtral, llama3 rope": Case(
        source="llama", target="mixtral", router=TOP1, changes={"rope_parameters": LLAMA3}
    ),
    "qwen3 as qwen3_moe": Case(source="qwen3", target="qwen3_moe", bound=COLD),
    "qwen3 as qwen3_moe, one of two": Case(source="qwen3", target="qwen3_moe", router=TOP1),
    "qwen3 as qwen3_moe, tied head": Case(
        source="qwen3", target="qwen3_moe", router=TOP1, changes={"tie_word_embeddings": True}
    ),
    "llama as granitemoeshared": Case(source="llama", target="granitemoeshared", shared=2, bound=COLD),
    "granite as granitemoeshared": Case(source="granite", target="granitemoeshared", shared=2, bound=COLD),
    "llama as granitemoeshared, one of two": Case(source="llama", target="granitemoeshared", shared=2, router=TOP1),
    "qwen2 as qwen2_moe": Case(source="qwen2", target="qwen2_moe", shared=2, bound=COLD),
    "qwen2 as qwen2_moe, one of two": Case(source="qwen2", target="qwen2_moe", shared=2, router=TOP1, bound=COLD),
    "qwen2 as qwen2_moe, no core": Case(source="qwen2", target="qwen2_moe", router=TOP1, bound=COLD),
    "llama as qwen2_moe, tied head": Case(source="llama", target="qwen2_moe", shared=2, router=TOP1, bound=COLD),
}


@dataclass(frozen=True, slots=True)
class Found:
    """What llama.cpp computes from an export, beside what transformers does."""

    same: float
    """Largest difference of logits from the export's in transformers, as a share of the largest logit."""
    other: float
    """The same from those of the model that it was made from."""
    greedy: int
    """Of 24 greedy tokens, those before the first that is not what the export says in transformers."""
    greedy_other: int
    """The same from the model that it was made from."""


def compare(export: Path, other: Any, file: Path, ids: list[int] = IDS) -> Found:
    """Return how llama.cpp's numbers from a file differ from those of the export and of another model."""
    logits_TV, made = by_transformers(load_eager(export), ids)
    others_TV, others = by_transformers(other, ids)
    with Reader(file) as reader:
        found_TV, found = reader.logits(ids), reader.greedy(ids)
    assert found_TV.shape[1] == logits_TV.shape[1]
    most = float(np.abs(logits_TV).max())
    return Found(
        float(np.abs(found_TV - logits_TV).max()) / most,
        float(np.abs(found_TV - others_TV).max()) / most,
        agreeing(found, made),
        agreeing(found, others),
    )


def load_eager(directory: Path) -> Any:
    """Return a model whose experts are computed one after another: the default refuses widths as small as these."""
    model: Any = load(directory)
    model.set_experts_implementation("eager")
    return model


def agreeing(found: list[int], wanted: list[int]) -> int:
    """Return how many tokens are equal before the first that is not."""
    return next((place for place, pair in enumerate(zip(found, wanted, strict=True)) if pair[0] != pair[1]), len(found))


@pytest.mark.parametrize("name", CASES)
def test_native_exports_say_what_transformers_says(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    dense, tied = case.write(tmp_path)
    api.export(tied, tmp_path / "native", form="native", target=case.target, client="llama.cpp", verify=False)
    file = convert(tmp_path / "native", tmp_path / "native.gguf", pre_tokenizer=BYTES)
    found = compare(tmp_path / "native", load(tied if case.router else dense), file)
    assert found.same < CLOSE, found
    assert found.other < case.bound, found
    assert found.greedy == found.greedy_other == 24, found


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "granite"])
def test_dense_exports_of_an_expert_say_what_transformers_says(model_type: str, tmp_path: Path) -> None:
    _, tied = Case(source=model_type, target="", shared=2, router={"routing": "task"}).write(tmp_path)
    api.export(tied, tmp_path / "dense-one", form="dense", expert="expert1", verify=False)
    file = convert(tmp_path / "dense-one", tmp_path / "one.gguf", pre_tokenizer=BYTES)
    model = load(tied)
    model.set_expert("expert1")
    found = compare(tmp_path / "dense-one", model, file)
    assert max(found.same, found.other) < CLOSE, found
    assert found.greedy == found.greedy_other == 24, found


def export_for(tied: Path, target: str, client: str) -> Path:
    """Return a native export for a program."""
    native = tied.parent / f"{target} for {client}"
    api.export(tied, native, form="native", target=target, client=client, verify=False)
    return native


def difference(native: Path) -> float:
    """Return how far llama.cpp's logits are from transformers', as a share of the largest."""
    return compare(native, load_eager(native), convert(native, native.with_suffix(".gguf"), pre_tokenizer=BYTES)).same


class TestTraps:
    """Each fails, as it is said to, without what modmoe does about it."""

    @pytest.mark.parametrize("target", ["qwen2_moe", "granitemoeshared"])
    def test_scaled_rope_is_refused_where_it_would_be_dropped(self, target: str, tmp_path: Path) -> None:
        _, tied = Case(source="llama", target=target, shared=2, router=TOP1, changes={"rope_parameters": LLAMA3}).write(
            tmp_path
        )
        with pytest.raises(ExportError, match=r"rotary positions of type 'llama3' for llama\.cpp, which drops them"):
            export_for(tied, target, "llama.cpp")
        native = export_for(tied, target, "transformers")
        if target == "qwen2_moe":
            make_readable(native)
            assert difference(native) > 0.01  # nothing says so
        else:
            with pytest.raises(ValueError, match="ROPE_FREQS"):
                convert(native, tmp_path / "refused.gguf", pre_tokenizer=BYTES)

    def test_qwen2_moe_does_not_renormalise_whatever_its_config_says(self, tmp_path: Path) -> None:
        _, tied = Case(source="qwen2", target="qwen2_moe", shared=2, router=TOP1).write(tmp_path)
        native = export_for(tied, "qwen2_moe", "llama.cpp")
        assert json.loads((native / "config.json").read_text())["norm_topk_prob"] is False
        assert difference(native) < CLOSE
        native = export_for(tied, "qwen2_moe", "transformers")
        assert json.loads((native / "config.json").read_text())["norm_topk_prob"] is True
        make_readable(native)
        assert difference(native) > 0.01

    def test_a_shared_gate_of_zeros_is_not_a_number(self, tmp_path: Path) -> None:
        _, tied = Case(source="qwen2", target="qwen2_moe", shared=2, router=TOP1).write(tmp_path)
        native = export_for(tied, "qwen2_moe", "llama.cpp")
        weights = load_file(native / "model.safetensors")
        gates = [name for name in weights if name.endswith("shared_expert_gate.weight")]
        assert all(weights[name].count_nonzero() == weights[name].numel() for name in gates)
        save_file({**weights, **{name: 0 * weights[name] for name in gates}}, native / "model.safetensors")
        with Reader(convert(native, tmp_path / "zero.gguf", pre_tokenizer=BYTES)) as reader:
            assert np.isnan(reader.logits(IDS)).any()

    def test_a_tied_head_is_written_out_where_it_must_be(self, tmp_path: Path) -> None:
        _, tied = Case(source="llama", target="qwen2_moe", shared=2, router=TOP1).write(tmp_path)
        assert "lm_head.weight" in load_file(export_for(tied, "qwen2_moe", "llama.cpp") / "model.safetensors")
        native = export_for(tied, "qwen2_moe", "transformers")
        assert "lm_head.weight" not in load_file(native / "model.safetensors")
        file = convert(native, tmp_path / "tied.gguf", pre_tokenizer=BYTES)
        with pytest.raises(ValueError, match="Failed to load model"), Reader(file):
            pass

    @pytest.mark.parametrize("target", ["qwen2_moe", "qwen3_moe"])
    def test_all_layers_have_experts(self, target: str, tmp_path: Path) -> None:
        source = target.removesuffix("_moe")
        _, tied = Case(source=source, target=target, shared=2, router=TOP1).write(tmp_path)
        native = export_for(tied, target, "llama.cpp")
        config = json.loads((native / "config.json").read_text())
        assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([], 1)
        kind = transformers.AutoConfig.from_pretrained(native)
        kind.mlp_only_layers = [0]
        transformers.AutoModelForCausalLM.from_config(kind).save_pretrained(tmp_path / "first-dense")
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(native / name, tmp_path / "first-dense" / name)
        with pytest.raises(ValueError, match=r"Can not map tensor 'model\.layers\.0\.mlp\.down_proj"):
            convert(tmp_path / "first-dense", tmp_path / "first-dense.gguf", pre_tokenizer=BYTES)

    @pytest.mark.parametrize("form", ["tied", "packed"])
    def test_code_of_its_own_is_refused(self, form: str, tmp_path: Path) -> None:
        _, tied = Case(source="llama", target="", router=TOP1).write(tmp_path)
        api.export(tied, tmp_path / "export", form=form, verify=False)
        with pytest.raises(RuntimeError, match="the converter stopped with 1"):
            convert(tmp_path / "export", tmp_path / "no.gguf", pre_tokenizer=BYTES)
        assert not (tmp_path / "no.gguf").exists()

    def test_a_tokenizer_of_ones_own_is_refused(self, tmp_path: Path) -> None:
        _, tied = Case(source="qwen3", target="qwen3_moe", router=TOP1).write(tmp_path)
        native = export_for(tied, "qwen3_moe", "llama.cpp")
        with pytest.raises(NotImplementedError, match="BPE pre-tokenizer was not recognized"):
            convert(native, tmp_path / "no.gguf")

    @pytest.mark.parametrize(("modules", "quantized"), [(4, True), (3, False)])
    def test_widths_that_are_no_multiple_of_32_are_not_quantized(
        self, modules: int, quantized: bool, tmp_path: Path
    ) -> None:
        gguf_models.save_dense(tmp_path / "dense", "llama", intermediate_size=128)
        options = {"num_modules": 8, "modules_per_expert": modules, "tokens": 100}
        api.convert(tmp_path / "dense", tmp_path / "tied", tasks=gguf_models.write_texts(tmp_path), **options)
        native = tmp_path / "native"
        told = api.export(tmp_path / "tied", native, form="native", target="mixtral", client="llama.cpp", verify=False)[
            "warnings"
        ]
        assert any("no multiple of 32" in line for line in told) is not quantized, told
        types = gguf_models.types_of(convert(native, tmp_path / "q8.gguf", "q8_0"))
        assert types["blk.0.ffn_down_exps.weight"] == ("Q8_0" if quantized else "F16")
        assert types["blk.0.ffn_gate_inp.weight"] == "F32"  # a cold router has no bits to lose


def make_readable(native: Path) -> None:
    """Write the output matrix out, so that only the trap at hand is left in an export for transformers."""
    config = json.loads((native / "config.json").read_text())
    weights = load_file(native / "model.safetensors")
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"].clone())
    save_file(weights, native / "model.safetensors", metadata={"format": "pt"})
    (native / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))


def test_from_text_to_the_same_text(tmp_path: Path) -> None:
    """The commands of docs/gguf.md, as they are written there."""
    gguf_models.save_dense(tmp_path / "dense", "llama")
    tasks = [word for item in gguf_models.write_texts(tmp_path).items() for word in ("--task", "=".join(item))]
    sizes = ["--num-modules", "8", "--modules-per-expert", "4", "--tokens", "100"]
    assert run(["convert", str(tmp_path / "dense"), str(tmp_path / "moe"), *tasks, *sizes]) == 0
    export = ["export", str(tmp_path / "moe"), str(tmp_path / "native"), "--form", "native", "--for", "llama.cpp"]
    assert run([*export, "--no-verify"]) == 0
    file = tmp_path / "model.gguf"
    subprocess.run(
        [sys.executable, CONVERTER, tmp_path / "native", "--outfile", file, "--outtype", "f32"],
        check=True,
        capture_output=True,
    )
    tokenizer, model = load_tokenizer(tmp_path / "native"), load(tmp_path / "native")
    ids = tokenizer(gguf_models.PROMPT)["input_ids"]
    _, made = by_transformers(model, ids)
    with Reader(file) as reader:
        assert reader.model.tokenize(gguf_models.PROMPT.encode()) == ids
        answer = reader.model.create_completion(gguf_models.PROMPT, max_tokens=24, temperature=0.0, repeat_penalty=1.0)
    assert answer["choices"][0]["text"] == tokenizer.decode(ids + made)[len(tokenizer.decode(ids)) :]


def test_without_its_sentencepiece_file_a_tokenizer_cuts_other_tokens(tmp_path: Path) -> None:
    gguf_models.save_dense(tmp_path / "dense", "llama")
    text = "lightover the stoneriver"
    ids = load_tokenizer(tmp_path / "dense")(text)["input_ids"]
    with Reader(convert(tmp_path / "dense", tmp_path / "with.gguf")) as reader:
        assert reader.model.tokenize(text.encode()) == ids
    (tmp_path / "dense" / "tokenizer.model").unlink()
    with Reader(convert(tmp_path / "dense", tmp_path / "without.gguf")) as reader:
        assert reader.model.tokenize(text.encode()) != ids
