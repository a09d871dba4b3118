"""Published parameter counts, from the models' real sizes on the meta device: nothing is built."""

from functools import cache

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
    RobertaConfig,
    RobertaModel,
)

from modmoe.adapters import CONFIGS, solve_budget
from modmoe.adapters.budget import make_config
from modmoe.errors import AdapterError

SIZES = {
    "qwen3-8b": Qwen3Config(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
        num_key_value_heads=8, head_dim=128,
    ),
    "qwen3-14b": Qwen3Config(
        vocab_size=151936, hidden_size=5120, intermediate_size=17408, num_hidden_layers=40, num_attention_heads=40,
        num_key_value_heads=8, head_dim=128,
    ),
    "llama-3.1-8b": LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "llama2-7b": LlamaConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32,
    ),
    "olmoe-1b-7b": OlmoeConfig(
        vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
        num_key_value_heads=16, num_experts=64, num_experts_per_tok=8,
    ),
    "mixtral-8x7b": MixtralConfig(
        vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, num_local_experts=8, num_experts_per_tok=2,
    ),
    "qwen3-30b-a3b": Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8,
    ),
}  # fmt: skip

# (model, method, settings, millions as printed): CoMoL tables 2 and 3 (2603.00573), MoA (2506.05928),
# PERFT (2508.02587), MixLoRA (2404.15159)
PUBLISHED = [
    ("qwen3-8b", "comol", {"r": 16, "num_experts": 8}, "25.16"),
    ("qwen3-8b", "comol", {"r": 16, "num_experts": 64}, "27.91"),
    ("qwen3-8b", "comol", {"r": 16, "num_experts": 8, "core_routing": False}, "33.40"),
    ("qwen3-8b", "comol", {"r": 16, "num_experts": 64, "core_routing": False}, "93.78"),
    ("qwen3-14b", "comol", {"r": 16, "num_experts": 8}, "35.82"),
    ("qwen3-14b", "comol", {"r": 16, "num_experts": 8, "core_routing": False}, "47.92"),
    ("llama-3.1-8b", "comol", {"r": 16, "num_experts": 4}, "23.24"),
    ("qwen3-8b", "molora", {"r": 8, "num_experts": 8}, "107.35"),
    ("qwen3-14b", "molora", {"r": 8, "num_experts": 4}, "76.84"),
    ("llama-3.1-8b", "molora", {"r": 8, "num_experts": 8}, "100.14"),
    ("qwen3-8b", "sparse_moa", {}, "24.49"),
    ("qwen3-8b", "soft_moa", {}, "27.00"),
    ("qwen3-14b", "sparse_moa", {}, "34.50"),
    ("llama-3.1-8b", "soft_moa", {}, "24.52"),
    ("llama-3.1-8b", "sparse_moa", {}, "22.29"),
    ("llama2-7b", "sparmoe", {"num_experts": 4}, "1.6"),
    ("llama2-7b", "mixlora", {"r": 16, "num_experts": 8}, "203.4"),
    ("llama2-7b", "mixlora", {"r": 16, "num_experts": 8, "attention_modules": ["q_proj", "v_proj"]}, "195.0"),
    ("olmoe-1b-7b", "perft_s", {"r": 16}, "1.049"),
    ("olmoe-1b-7b", "perft_d", {"r": 16, "num_experts": 2}, "2.097"),
    ("olmoe-1b-7b", "perft_r", {"r": 8, "num_experts": 2}, "1.114"),
    ("olmoe-1b-7b", "perft_r", {"r": 16, "num_experts": 2}, "2.163"),
    ("olmoe-1b-7b", "perft_r", {"r": 16, "num_experts": 4}, "4.325"),
    ("olmoe-1b-7b", "perft_r", {"r": 16, "num_experts": 8}, "8.651"),
    ("olmoe-1b-7b", "perft_e", {"r": 4}, "16.78"),
    ("olmoe-1b-7b", "perft_e", {"r": 16}, "67.11"),
    ("mixtral-8x7b", "perft_s", {"r": 16}, "4.194"),
    ("mixtral-8x7b", "perft_d", {"r": 16, "num_experts": 2}, "8.389"),
    ("mixtral-8x7b", "perft_r", {"r": 8, "num_experts": 2}, "4.456"),
    ("mixtral-8x7b", "perft_r", {"r": 16, "num_experts": 4}, "17.30"),
    ("mixtral-8x7b", "perft_r", {"r": 16, "num_experts": 8}, "34.60"),
    ("mixtral-8x7b", "perft_e", {"r": 16}, "33.55"),
    ("qwen3-30b-a3b", "perft_s", {"r": 16}, "3.146"),
    ("qwen3-30b-a3b", "perft_r", {"r": 16, "num_experts": 4}, "12.98"),
    ("qwen3-30b-a3b", "perft_e", {"r": 4}, "100.7"),
]


@cache
def outline(name: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(SIZES[name])


@pytest.mark.parametrize(
    ("model", "method", "settings", "printed"), PUBLISHED, ids=lambda value: value if isinstance(value, str) else None
)
def test_count_is_the_published_one_to_its_printed_digits(model, method, settings, printed):
    count = make_config(method, settings).num_parameters(outline(model))

    digits = len(printed.partition(".")[2])
    assert f"{count / 1e6:.{digits}f}" == printed


@pytest.mark.parametrize(("width", "layers", "count"), [(768, 12, 110_592), (1024, 24, 294_912)])
def test_sparmoe_on_roberta_has_the_published_count(width, layers, count):
    with torch.device("meta"):
        config = RobertaConfig(hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
        config.intermediate_size = 4 * width
        model = RobertaModel(config)

    settings = {"num_experts": 4, "target_modules": r"encoder\.layer\.\d+\.output\.dense"}

    assert make_config("sparmoe", settings).num_parameters(model) == count


@pytest.mark.parametrize(
    ("model", "targets", "printed"),
    [
        ("qwen3-8b", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "24.77"),
        ("qwen3-14b", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "35.39"),
        ("llama-3.1-8b", ["q_proj", "k_proj", "v_proj", "o_proj", "down_proj"], "23.07"),
        ("olmoe-1b-7b", ["q_proj", "v_proj"], "2.097"),
        ("mixtral-8x7b", ["q_proj", "v_proj"], "6.816"),
    ],
)
def test_plain_lora_which_the_tables_compare_with_has_the_published_count(model, targets, printed):
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(SIZES[model])
        attached = get_peft_model(base, LoraConfig(r=16, target_modules=targets))

    count = attached.get_nb_trainable_parameters()[0]

    assert f"{count / 1e6:.{len(printed.partition('.')[2])}f}" == printed


def test_expert_lora_costs_what_peft_has_for_fused_experts():
    # PEFT's target_parameters: E r (n + m) for each of gate_up (D to 2 I) and down (I to D)
    count = make_config("expert_lora", {"r": 4}).num_parameters(outline("olmoe-1b-7b"))

    assert count == 16 * 64 * 4 * ((2048 + 2 * 1024) + (1024 + 2048))


@pytest.mark.parametrize("method", CONFIGS)
def test_budget_is_kept_and_nearly_used(method):
    model = outline("olmoe-1b-7b" if method in ("perft_e", "expert_lora") else "llama-3.1-8b")

    config = solve_budget(method, model, 60_000_000)

    assert 0.85 * 60e6 < config.num_parameters(model) <= 60_000_000


def test_budget_keeps_the_scale_and_what_is_given():
    config = solve_budget("molora", outline("llama-3.1-8b"), 60_000_000, num_experts=3)

    assert config.num_experts == 3
    assert config.lora_alpha / config.r == 2


def test_budget_takes_the_experts_nearest_to_the_methods_own_and_never_one_alone():
    # with its 8 experts LD-MoLE has more than that at rank 1
    model = outline("llama-3.1-8b")
    config = solve_budget("ldmole", model, 20_000_000, lambda_width=8)

    assert 2 <= config.num_experts < 8
    more = make_config("ldmole", {"r": 1, "num_experts": config.num_experts + 1, "lambda_width": 8})
    assert more.num_parameters(model) > 20_000_000


def test_budget_too_small_names_the_smallest():
    with pytest.raises(AdapterError, match=r"budget: 1000 parameters are too few for comol; its smallest has \d+\."):
        solve_budget("comol", outline("llama-3.1-8b"), 1000)
