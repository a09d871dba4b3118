"""Each point of the contract that vLLM's and SGLang's Transformers backends publish holds for the packed form.

Neither engine runs here: what they do with a model is acted out, each step from the source named in
``modmoe/modeling/packed_modmoe.py``.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modmoe.modeling import packed_modmoe
from modmoe.models.loading import load
from modmoe.storage.checkpoint import Checkpoint
from tests.exports.test_exported_logits import relative_difference
from tests.support import planned
from tests.support.packed_models import FAMILIES, ROUTERS, load_both, write_packed
from tests.support.tiny import token_ids


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tied model and its packed form: a union of two experts, and means of what is skipped."""
    return write_packed(tmp_path_factory.mktemp("pair"), "mistral", top_k=2, means=True, leave_out=True)


def test_config_names_one_number_of_experts_under_every_name(pair):
    """Engines ask in different orders; all must come to modules, never to the experts that the router scores."""
    _, made = load_both(*pair, torch.float32)
    config = made.config.get_text_config()
    assert config is made.config
    vllm = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
    sglang = ("num_local_experts", "num_experts", "n_routed_experts")
    for names in (vllm, sglang):
        assert next(getattr(config, name) for name in names if hasattr(config, name)) == 7
    assert config.num_experts_per_tok == 6 and config.moe_intermediate_size == 6 and config.hidden_size == 32
    assert config.norm_topk_prob is False
    assert not any(hasattr(config, name) for name in ("n_shared_experts", "moe_num_shared_experts", "n_group"))
    assert not any("shared_expert" in name for name, _ in made.named_parameters())


def test_auto_map_names_the_model_without_a_head(pair):
    config = Checkpoint(pair[1]).config
    assert config["auto_map"]["AutoModel"] == "packed_modmoe.ModMoEPackedMistralModel"
    assert set(config["auto_map"]) == {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    (architecture,) = config["architectures"]
    # neither engine has it, and neither takes it for one whose experts have an activation of their own
    assert not hasattr(transformers, architecture)
    assert not any(name in architecture.lower() for name in ("gptoss", "grok1"))


@pytest.mark.parametrize("model_type", FAMILIES)
def test_attention_can_be_the_engines(model_type):
    name = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "phi3": "Phi3"}[model_type]
    for kind in ("Model", "ForCausalLM"):
        assert getattr(packed_modmoe, f"ModMoEPacked{name}{kind}")._supports_attention_backend is True


@pytest.mark.parametrize("model_type", FAMILIES)
def test_plans_name_what_there_is_in_styles_that_both_engines_know(model_type, tmp_path):
    tied, packed = write_packed(tmp_path, model_type)
    _, made = load_both(tied, packed, torch.float32)
    backbone = made.model
    names = {name for name, _ in [*backbone.named_modules(), *backbone.named_parameters()]}
    general = {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}
    config = made.config
    for plan in (config.base_model_tp_plan, config.base_model_ep_plan, config.base_model_pp_plan):
        assert plan and set(plan) <= general
    assert list(config.base_model_pp_plan) == ["embed_tokens", "layers", "norm"]
    # what SGLang translates; another style stops it
    known = {"colwise", "rowwise", "colwise_rep", "rowwise_rep", "packed_colwise", "packed_rowwise", "moe_tp_experts"}
    styles = set(config.base_model_tp_plan.values())
    assert styles <= {*known, "replicated_with_grad_allreduce"}
    assert styles <= set(ALL_PARALLEL_STYLES.keys())
    experts = {key: style for key, style in config.base_model_tp_plan.items() if ".mlp." in key}
    assert experts == {
        "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
        "layers.*.mlp.experts.down_proj": "rowwise",
        "layers.*.mlp.experts": "moe_tp_experts",
    }
    assert made.tp_plan["model.layers.*.mlp.experts"] == "moe_tp_experts"
    attention = [key for key in config.base_model_tp_plan if "self_attn" in key]
    assert bool(attention) == (model_type != "phi3")  # phi3's styles are unknown to SGLang: left out, so replicated


def test_the_block_has_packed_experts_with_the_agreed_forward(pair):
    _, made = load_both(*pair, torch.float32)
    for layer in made.model.layers:
        experts = layer.mlp.experts
        shapes = {name: tuple(parameter.shape) for name, parameter in experts.named_parameters()}
        assert shapes == {"gate_up_proj": (7, 12, 32), "down_proj": (7, 32, 6)}
        assert list(inspect.signature(type(experts).forward).parameters)[1:] == [
            "hidden_states",
            "top_k_index",
            "top_k_weights",
        ]
        assert layer.self_attn.is_causal is True
    # engines load parameters, not buffers
    assert set(made.state_dict()) - {"lm_head.weight"} <= {name for name, _ in made.named_parameters()}


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_the_router_is_not_taken_for_one_that_returns_experts(kind, tmp_path):
    """vLLM puts its own in the place of a router whose tensors are ``weight`` and at most a correction bias."""
    tied, packed = write_packed(tmp_path, kind=kind)
    router = load_both(tied, packed, torch.float32)[1].model.layers[0].mlp.router
    tensors = {name for name, _ in [*router.named_parameters(), *router.named_buffers()]}
    assert "weight" not in tensors and tensors - {"weight", "e_score_correction_bias"}


@pytest.mark.parametrize("router", ROUTERS)
def test_every_token_is_given_the_same_number_of_modules(router, tmp_path):
    tied, packed = write_packed(tmp_path, **ROUTERS[router])
    model, made = load_both(tied, packed, torch.float64)
    x_TD = torch.randn(40, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for before, after in zip(model.model.layers, made.model.layers, strict=True):
        active_TS, weights_TA, modules_TA = after.mlp.router(x_TD)
        given = made.config.num_experts_per_tok
        assert weights_TA.shape == modules_TA.shape == (40, given) and modules_TA.dtype == torch.long
        assert int(modules_TA.min()) >= 0 and int(modules_TA.max()) < made.config.num_experts
        wanted_TS, wanted_active_TS = before.mlp.coefficients(*before.mlp._choose(x_TD, x_TD))
        shares_TS = torch.zeros_like(wanted_TS).scatter_add(1, modules_TA, weights_TA)
        torch.testing.assert_close(shares_TS, wanted_TS)
        assert torch.equal(active_TS, wanted_active_TS)
    # no larger than some choice of experts needs
    assert given == max(
        len(set().union(*(set(row) for row in chosen)))
        for layer in _members(tied)
        for chosen in _choices(layer, router)
    )


def _members(tied: Path) -> list[list[list[int]]]:
    checkpoint = Checkpoint(tied)
    tables = [checkpoint[f"model.layers.{layer}.mlp.membership"] for layer in range(2)]
    return [[row.nonzero().flatten().tolist() for row in table] for table in tables]


def _choices(layer: list[list[int]], router: str) -> list[list[list[int]]]:
    top_k = ROUTERS[router].get("top_k", 1)
    if router == "task":
        return [[layer[planned.EXPERTS.index("words")]]]
    return [list(chosen) for chosen in itertools.combinations(layer, top_k)]


@pytest.mark.parametrize("router", ["means", "task"])
def test_the_block_is_one_graph_for_any_number_of_tokens(router, tmp_path):
    """Nothing in it depends on values: it traces whole, and the trace computes other inputs and lengths."""
    tied, packed = write_packed(tmp_path, **ROUTERS[router])
    made = load_both(tied, packed, torch.float32)[1]
    made.set_experts_implementation("batched_mm")
    block = made.model.layers[1].mlp
    tokens = torch.export.Dim("tokens", min=2, max=64)
    exported = torch.export.export(block, (torch.randn(1, 9, 32),), dynamic_shapes=({1: tokens},), strict=True)
    other = torch.randn(1, 17, 32)
    torch.testing.assert_close(exported.module()(other), block(other))


# What an engine does with the model, acted out ------------------------------------------------------------------------


class EngineExperts(nn.Module):
    """Stands where vLLM and SGLang put their fused kernels: their call, their loader, their activation."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        count, size, width = config.num_experts, config.moe_intermediate_size, config.hidden_size
        # what no file fills stays as it is: not a number, so that a use of it shows
        self.w13_weight = nn.Parameter(torch.full((count, 2 * size, width), torch.nan))
        self.w2_weight = nn.Parameter(torch.full((count, width, size), torch.nan))
        self.top_k, self.size = config.num_experts_per_tok, size

    def load(self, name: str, weight: Tensor) -> None:
        number, role, suffix = name.split(".")
        assert suffix == "weight"
        part = {"gate_proj": slice(0, self.size), "up_proj": slice(self.size, None)}.get(role)
        into = self.w2_weight[int(number)] if role == "down_proj" else self.w13_weight[int(number), part]
        assert into.shape == weight.shape
        into.data.copy_(weight)

    def forward(self, hidden_states: Tensor, topk_ids: Tensor, topk_weights: Tensor, **kwargs: Any) -> Tensor:
        assert hidden_states.dim() == 2 and topk_ids.shape == topk_weights.shape == (len(hidden_states), self.top_k)
        ids_TA, weights_TA = topk_ids.to(torch.int32), topk_weights.to(torch.float32)
        gate, up = torch.einsum("taod,td->tao", self.w13_weight[ids_TA], hidden_states).chunk(2, dim=-1)
        down_TAD = torch.einsum("tado,tao->tad", self.w2_weight[ids_TA], F.silu(gate) * up)
        return (down_TAD * weights_TA.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def serve(packed: Path) -> Callable[[Tensor], Tensor]:
    """Build, load and call a packed model as the Transformers backends do; return what gives hidden states [T, D]."""
    checkpoint = Checkpoint(packed)
    model_type = getattr(packed_modmoe, checkpoint.config["auto_map"]["AutoModel"].split(".")[1])
    config = model_type.config_class.from_pretrained(packed)
    assert model_type.is_backend_compatible()
    config._attn_implementation = "engine"
    with torch.device("meta"):
        model = model_type._from_config(config, dtype=torch.float32)
    model.rotary_emb.to_empty(device="cpu")
    rotary = type(model.rotary_emb)(config)
    model.rotary_emb = rotary
    for layer in model.layers:
        experts = layer.mlp.experts
        assert all(parameter.dim() == 3 for parameter in experts.parameters())
        layer.mlp.experts = EngineExperts(config).requires_grad_(False)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(module, name, nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu")))
    parameters = dict(model.named_parameters())
    for name in checkpoint:
        where = name.removeprefix("model.")
        if ".experts." in where:
            block, _, rest = where.partition(".experts.")
            model.get_submodule(block).experts.load(rest, checkpoint[name])
        elif where != "lm_head.weight":
            assert parameters[where].shape == checkpoint[name].shape  # a name that is no parameter stops vLLM
            parameters[where].data.copy_(checkpoint[name])
    instances = {index: object() for index in range(len(model.layers))}

    @torch.no_grad()
    def run(ids_T: Tensor) -> Tensor:
        outputs = model.eval()(
            input_ids=ids_T[None],
            use_cache=False,
            position_ids=torch.arange(len(ids_T))[None],
            attention_instances=instances,
            return_dict=False,
        )
        return outputs[0][0]

    return run


def engine_attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Causal attention by plain means; the engine's own objects must have come through every layer."""
    assert kwargs["attention_instances"][module.layer_idx] is not None
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


@pytest.mark.parametrize(
    ("model_type", "router"),
    [
        ("llama", "union2"),
        ("mistral", "means"),
        ("qwen2", "sum2"),
        ("qwen3", "top1"),
        ("phi3", "mlp"),
        ("qwen2", "task"),
    ],
)
def test_an_engine_that_keeps_the_contract_computes_the_model(model_type, router, tmp_path, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "engine", engine_attention)
    tied, packed = write_packed(tmp_path, model_type, **ROUTERS[router])
    model = load_both(tied, packed, torch.float32)[0]
    ids_T = token_ids(1, 15)[0]
    with torch.no_grad():
        wanted_TD = model.model(ids_T[None]).last_hidden_state[0]
    found_TD = serve(packed)(ids_T)
    assert (found_TD - wanted_TD).abs().max() <= 1e-5 * wanted_TD.abs().max()


def test_an_expert_can_be_chosen_when_the_engine_starts(tmp_path):
    """``--hf-overrides`` sets a field of the configuration before the model is made."""
    tied, packed = write_packed(tmp_path, routing="task")
    model = load(tied, dtype=torch.float64)
    model_type = packed_modmoe.ModMoEPackedMistralForCausalLM
    for expert in planned.EXPERTS:
        config = model_type.config_class.from_pretrained(packed)
        config.update({"default_expert": expert})
        made = model_type.from_pretrained(packed, config=config, dtype=torch.float64).eval()
        model.set_expert(expert)
        assert relative_difference(made, model) <= 1e-10
