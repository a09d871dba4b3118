"""Which native target holds what, for whom, and what is said of it; each trap of other programs, and what avoids it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from modmoe.errors import ExportError, RecipeError
from modmoe.exports.converted import export
from modmoe.formats.names import CLIENTS
from modmoe.formats.native.plan import native_export, native_warnings
from modmoe.formats.native.targets import TARGETS
from modmoe.storage import staging
from modmoe.storage.checkpoint import Checkpoint
from tests.support.export_models import write_tied
from tests.support.native_models import tied_models, write_native_source

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    """Return what writes, once, the tied model of a family and a case."""
    return tied_models(tmp_path_factory.mktemp("tied"))


@pytest.mark.parametrize(
    ("source", "client", "target"),
    [
        ("llama", "transformers", "mixtral"),
        ("llama", "vllm", "granitemoeshared"),
        ("llama", "sglang", "granitemoeshared"),
        ("qwen3", "vllm", "glm4_moe"),
        ("qwen3", "llama.cpp", "qwen3_moe"),
        ("qwen2", "llama.cpp", "qwen2_moe"),
        ("granite", "llama.cpp", "granitemoeshared"),
        ("olmo2", "vllm", "flex_olmo"),
    ],
)
def test_auto_says_which_and_why(tied, source, client, target):
    case = "one of disjoint" if target == "mixtral" else "one with a core"
    made = native_export(Checkpoint(tied(source, case)), "auto", client)
    assert made.target == target and made.plan.config["model_type"] == target
    assert made.why.startswith(f"{target} for {client}: continues {source}; ") and "\n" not in made.why
    if (source, client) == ("qwen3", "llama.cpp"):
        assert "not glm4_moe: it can't hold anything for llama.cpp" in made.why
    if target == "glm4_moe":
        assert "zero neurons" in made.why
        assert made.plan.config["n_shared_experts"] * made.plan.config["moe_intermediate_size"] == 12


@pytest.mark.parametrize("client", CLIENTS)
def test_llama3_rope_goes_where_it_is_kept(client, tmp_path):
    source = Checkpoint(
        write_native_source(tmp_path, "llama", "core", top_k=2, changes={"rope_parameters": LLAMA3_ROPE})
    )
    kept = {name for name, row in TARGETS.items() if "llama" in row.sources and client in row.scaled_rope}
    assert (
        kept
        == {
            "transformers": {"mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe"},
            "vllm": {"mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe"},
            "sglang": {"granitemoeshared", "qwen2_moe", "glm4_moe"},
            "llama.cpp": {"mixtral"},
        }[client]
    )
    made = native_export(source, "auto", client)
    assert made.target in kept
    assert made.plan.config["rope_parameters"]["rope_type"] == "llama3"
    for name in {name for name, row in TARGETS.items() if "llama" in row.sources and client in row.clients} - kept:
        with pytest.raises(ExportError, match=f"rotary positions of type 'llama3' for {client}"):
            native_export(source, name, client)


@pytest.mark.parametrize(
    ("source", "target", "written_for"),
    [
        ("llama", "mixtral", {"sglang"}),
        ("llama", "granitemoeshared", {"sglang"}),
        ("llama", "qwen2_moe", {"vllm", "sglang", "llama.cpp"}),
        ("llama", "glm4_moe", {"vllm", "sglang"}),
        ("qwen3", "qwen3_moe", {"sglang"}),
    ],
)
def test_the_output_matrix_is_written_where_it_is_not_known_to_be_tied(tied, source, target, written_for):
    checkpoint = Checkpoint(tied(source, "one of disjoint"))
    assert "lm_head.weight" not in checkpoint and checkpoint.config["tie_word_embeddings"]
    for client in TARGETS[target].clients:
        plan = native_export(checkpoint, target, client).plan
        assert ("lm_head.weight" in plan.ops) == (client in written_for)
        assert plan.config["tie_word_embeddings"] == (client not in written_for)
        if client in written_for:
            made = plan.ops["lm_head.weight"].make(checkpoint)
            assert torch.equal(made, checkpoint["model.embed_tokens.weight"])


def test_qwen2_moe_has_biases_that_engines_always_read(tied):
    plan = native_export(Checkpoint(tied("llama", "one with a core")), "qwen2_moe", "vllm").plan
    assert plan.config["qkv_bias"] is True
    biases = {name: op for name, op in plan.ops.items() if name.endswith("_proj.bias")}
    assert {name.split(".")[-2] for name in biases} == {"q_proj", "k_proj", "v_proj"} and len(biases) == 6
    assert all(not op.make({}).any() for op in biases.values())
    source = Checkpoint(tied("qwen2", "one with a core"))
    kept = native_export(source, "qwen2_moe", "vllm").plan
    assert kept.ops["model.layers.0.self_attn.k_proj.bias"].make(source).abs().max() > 0.01


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_every_layer_is_a_mixture(tied, target):
    """Engines know no or few layers without experts; the defaults of some configurations have them."""
    plan = native_export(Checkpoint(tied(TARGETS[target].sources[0], "one of disjoint")), target).plan
    config = plan.config
    assert config.get("first_k_dense_replace", 0) == 0 and not config.get("mlp_only_layers")
    assert config.get("decoder_sparse_step", 1) == 1
    routers = [name for name in plan.ops if name.endswith(TARGETS[target].router)]
    assert len(routers) == config["num_hidden_layers"]


@pytest.mark.parametrize("target", sorted(TARGETS))
def test_widths_that_quantization_cannot_cut_are_warned_of(target, tied):
    plan = native_export(Checkpoint(tied(TARGETS[target].sources[0], "one of disjoint")), target).plan
    key = TARGETS[target].width
    for width, client, said in ((48, "vllm", "32"), (64, "vllm", ""), (64, "llama.cpp", "256"), (512, "llama.cpp", "")):
        plan.config[key] = width
        warnings = native_warnings(plan, client)
        assert bool(warnings) == bool(said)
        assert all(f"no multiple of {said}" in line for line in warnings)


REFUSED = [
    ("llama", "overlap", {"top_k": 2}, {}, "auto", "transformers", "a union of 2 experts that overlap"),
    ("llama", "core", {"routing": "sequence"}, {}, "auto", "vllm", "routing by sequence (only by token)"),
    ("llama", "core", {"routing": "task"}, {}, "auto", "llama.cpp", "routing by task (only by token)"),
    ("llama", "core", {"kind": "mlp"}, {}, "auto", "transformers", "a two-layer router"),
    ("llama", "core", {"means": True}, {}, "auto", "transformers", "the compensation"),
    ("llama", "core", {}, {"mlp_bias": True}, "auto", "transformers", "biases in the FFN (gate, up, down)"),
    ("llama", "core", {}, {"attention_bias": True}, "mixtral", "transformers", "biases in the attention (k, o, q, v)"),
    ("llama", "core", {}, {"attention_bias": True}, "granitemoeshared", "vllm", "biases in the attention"),
    ("qwen2", "core", {}, {}, "mixtral", "transformers", "a 'qwen2' model (only llama, mistral)"),
    ("llama", "core", {}, {"head_dim": 12}, "granitemoeshared", "transformers", "4 heads of 12 in a width of 32"),
    ("llama", "core", {}, {"head_dim": 12}, "qwen2_moe", "transformers", "4 heads of 12 in a width of 32"),
    ("llama", "core", {}, {"head_dim": 12}, "mixtral", "sglang", "4 heads of 12 in a width of 32"),
    ("mistral", "core", {}, {"sliding_window": 16}, "granitemoeshared", "transformers", "sliding-window attention"),
    ("llama", "core", {}, {}, "glm4_moe", "llama.cpp", "anything for llama.cpp (only for transformers, vllm, sglang)"),
    ("olmo2", "core", {}, {}, "auto", "sglang", "anything for sglang"),
    ("olmo2", "overlap", {"top_k": 2, "combine": "sum"}, {}, "auto", "vllm", "a weighted sum of experts for vllm"),
    ("qwen2", "overlap", {"top_k": 2, "combine": "sum"}, {}, "auto", "llama.cpp", "a weighted sum of experts for"),
    ("qwen3", "overlap", {"top_k": 2, "combine": "sum"}, {}, "glm4_moe", "vllm", "its weights are sigmoids"),
    ("llama", "core", {}, {"hidden_act": "gelu"}, "auto", "vllm", "the activation 'gelu' for vllm (only silu)"),
]


@pytest.mark.parametrize(("source", "sharing", "router", "changes", "target", "client", "said"), REFUSED)
def test_what_cannot_be_held_is_named(source, sharing, router, changes, target, client, said, tmp_path):
    tied = Checkpoint(write_native_source(tmp_path, source, sharing, changes=changes, **router))
    with pytest.raises(ExportError) as caught:
        native_export(tied, target, client)
    message = str(caught.value)
    assert said in message and "\n" not in message
    assert "can't hold" in message and message.endswith("forms that work: tied, dense.")


def test_a_family_without_a_target_names_those_with_one(tmp_path):
    with pytest.raises(ExportError, match=r"no native target holds a 'gemma2' model \(only granite, llama, mistral"):
        native_export(Checkpoint(write_tied(tmp_path, "gemma2")))


def test_cold_routers_are_not_kept_in_float16(tied):
    source = Checkpoint(tied("llama", "union of three"))
    for name in ("mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe"):
        with pytest.raises(ExportError, match="no bits left"):
            native_export(source, name, dtype=torch.float16)
        plan = native_export(source, name, dtype=torch.bfloat16).plan
        router_ED = plan.ops[f"model.layers.0.{TARGETS[name].router}"].make(source).bfloat16()
        assert (router_ED.abs() >= torch.finfo(torch.bfloat16).smallest_normal).all()
    assert native_export(Checkpoint(tied("llama", "one with a core")), "mixtral", dtype=torch.float16)


def test_layers_with_more_in_common_than_others(tmp_path):
    """A shared expert has one width: at top_k 1 it gets what all layers share; a union needs all of it outside."""
    directory = write_native_source(tmp_path, "llama", "core", top_k=2)
    source = Checkpoint(directory)
    name = "model.layers.1.mlp.membership"
    member_ES = source[name]
    # the second layer's experts: the core and another module that all have, and one of their own
    member_ES[:] = False
    member_ES[:, :2] = True
    member_ES[[0, 1, 2], [2, 3, 4]] = True

    class Changed(Checkpoint):
        def __getitem__(self, key):
            return member_ES if key == name else super().__getitem__(key)

    source = Changed(directory)
    with pytest.raises(ExportError, match="more shared modules than others"):
        native_export(source, "granitemoeshared")
    assert native_export(source, "mixtral").plan
    source.config["num_experts_per_tok"] = 1
    assert native_export(source, "granitemoeshared").plan.config["shared_intermediate_size"] == 6


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(tied, tmp_path, monkeypatch):
    monkeypatch.setattr(staging.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(RecipeError, match=r"needs [\d,]+ bytes, and 1,000 are free"):
        export(str(tied("llama", "one with a core")), str(tmp_path / "new" / "out"), form="native")
    assert list(tmp_path.iterdir()) == []


def test_routers_that_only_transformers_can_read_are_warned_of(tied):
    source = Checkpoint(tied("granite", "union of three"))
    made = native_export(source)
    assert any("for transformers alone" in line for line in made.warnings) and made.tolerance is None
    other = native_export(source, client="llama.cpp")
    assert not any("alone" in line for line in other.warnings) and other.tolerance == 5e-3


def test_a_sliding_window_is_kept_by_transformers_and_told_to_others(tmp_path):
    source = Checkpoint(write_native_source(tmp_path, "mistral", "disjoint", changes={"sliding_window": 16}))
    assert native_export(source).plan.config["sliding_window"] == 16
    assert not any("sliding" in line for line in native_export(source).warnings)
    for client in ("vllm", "llama.cpp"):
        made = native_export(source, client=client)
        assert made.target == "mixtral"
        assert any(f"{client} is not known to keep the sliding window of 16" in line for line in made.warnings)


def test_a_client_that_is_not_known_is_refused():
    with pytest.raises(ExportError, match=r"Did you mean 'llama\.cpp'"):
        export("nowhere", "out", form="native", client="llama-cpp")
    with pytest.raises(ExportError, match="goes with the native form only"):
        export("nowhere", "out", form="dense", client="vllm")
