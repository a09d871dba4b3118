"""Adapters at FFN and MoE blocks: PERFT, SparMoE and expert LoRA."""

from __future__ import annotations

import dataclasses
import types
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from modmoe.adapters.attach import Site, attach, measure
from modmoe.adapters.base import SiteShape
from modmoe.adapters.expert_lora import ExpertLoRA, ExpertLoRASettings, from_peft_layout, to_peft_layout
from modmoe.adapters.passes import Frame, Pass
from modmoe.adapters.perft import (
    PerftD,
    PerftDSettings,
    PerftE,
    PerftESettings,
    PerftR,
    PerftRSettings,
    PerftS,
    PerftSSettings,
    fold_perft_d,
    folded_settings,
)
from modmoe.adapters.sparmoe import SparMoE, SparMoESettings
from tests import reference_blocks as reference
from tests.tiny import dense_model, token_ids

# Shapes: T tokens, D width, E experts, K top_k

T, D, N, K = 13, 20, 7, 3
SHAPE = SiteShape(inputs=D, outputs=D, num_experts=N, base_top_k=K, init_range=0.5)
EXPERTS = SiteShape(
    inputs=D, outputs=D, num_experts=N, parts={"gate_up_proj": (D, 22), "down_proj": (11, D)}, init_range=0.5
)

_MOE = {
    "vocab_size": 264,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.25,
    "num_experts_per_tok": 3,
    "pad_token_id": 258,
}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("OlmoeConfig", {**_MOE, "num_experts": 8}),
    "mixtral": ("MixtralConfig", {**_MOE, "num_local_experts": 5}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**_MOE, "num_experts": 6, "moe_intermediate_size": 20, "head_dim": 8, "norm_topk_prob": True},
    ),
}
ROUTED = [
    (PerftR, PerftRSettings(r=3, num_experts=5)),
    (PerftR, PerftRSettings(r=3, num_experts=5, top_k=1, expert="parallel")),
    (PerftD, PerftDSettings(r=3, num_experts=3)),
    (PerftS, PerftSSettings(r=3)),
    (SparMoE, SparMoESettings(num_experts=3)),
]
MOE_ONLY = [
    (PerftR, PerftRSettings(r=3, num_experts=5, weight_source="base")),
    (PerftE, PerftESettings(r=3)),
    (ExpertLoRA, ExpertLoRASettings(r=3)),
]


def moe_model(model_type: str, implementation: str = "eager", seed: int = 0, **changes: Any) -> Any:
    """Return a tiny random MoE model in evaluation mode."""
    name, values = CONFIGS[model_type]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**{**values, **changes})
    return transformers.AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()


def any_model(model_type: str) -> Any:
    return dense_model(model_type) if model_type == "llama" else moe_model(model_type)


def named(case: Any) -> str | None:
    return getattr(case, "method", None) if isinstance(case, type) else None


def made(adapter_class: Any, settings: Any, shape: SiteShape = SHAPE, seed: int = 3) -> Any:
    """Return an adapter in float64 and evaluation mode, every parameter random."""
    adapter = adapter_class(settings, shape, "layers.0.mlp").double().eval()
    fill([adapter], seed)
    return adapter


def fill(adapters: list[Any], seed: int = 3, std: float = 0.5) -> None:
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            for parameter in adapter.parameters():
                parameter.copy_(std * torch.randn(parameter.shape, generator=draw, dtype=parameter.dtype))


def adapters_of(model: Any) -> list[Any]:
    return [adapter for site in model.modules() if isinstance(site, Site) for adapter in site.adapters.values()]


def tokens(width: int = D, count: int = T, seed: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def routing(count: int = T, experts: int = N, top_k: int = K) -> tuple[Tensor, Tensor]:
    """Return the weights and ids of a base router, not in the order of their size."""
    draw = torch.Generator().manual_seed(7)
    logits_TE = torch.randn(count, experts, generator=draw, dtype=torch.float64)
    logits_TE[:, 2] = -100  # an expert without tokens
    probs_TE = logits_TE.softmax(-1)
    weights_TK, ids_TK = probs_TE.topk(top_k)
    return weights_TK.flip(-1), ids_TK.flip(-1)


def frame_with(weights_TK: Tensor, ids_TK: Tensor) -> Frame:
    frame = Frame(0, Pass())
    frame.values["layers.0.mlp base router"] = (weights_TK, ids_TK)
    return frame


def check_against(
    adapter: Any, run: Any, loop: Any, extra: tuple[Tensor, ...] = (), x_TD: Tensor | None = None
) -> None:
    """Compare two functions of x: outputs, and gradients to x, to ``extra`` and to every parameter."""
    x_TD = tokens() if x_TD is None else x_TD
    learned = [x_TD.requires_grad_(), *extra, *adapter.parameters()]
    results = []
    for function in (run, loop):
        y_TD = function(x_TD)
        weight_TD = torch.randn(y_TD.shape, generator=torch.Generator().manual_seed(1), dtype=y_TD.dtype)
        grads = torch.autograd.grad((y_TD * weight_TD).sum(), learned, allow_unused=True)
        results.append(
            [y_TD, *(torch.zeros_like(at) if g is None else g for g, at in zip(grads, learned, strict=True))]
        )
    assert results[0][0].abs().max() > 1e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("expert", ["lora", "parallel"])
@pytest.mark.parametrize(("kind", "settings"), [(PerftS, PerftSSettings), (PerftD, PerftDSettings)], ids=named)
def test_always_on_adapters_are_their_sum(kind, settings, expert):
    adapter = made(kind, settings(r=3, lora_alpha=5, expert=expert))
    check_against(
        adapter, lambda x: adapter.delta(x, Frame(0, Pass())), lambda x: reference.perft_always_on(adapter, x)
    )


@pytest.mark.parametrize("expert", ["lora", "parallel"])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("renormalise", [True, False])
@pytest.mark.parametrize("is_said_by", ["settings", "base"])
def test_perft_r_is_the_loop(expert, top_k, renormalise, is_said_by):
    settings = PerftRSettings(r=3, lora_alpha=5, num_experts=5, top_k=top_k, expert=expert)
    settings.renormalise = renormalise if is_said_by == "settings" else None
    shape = SiteShape(inputs=D, outputs=D, renormalises=renormalise != (is_said_by == "settings"))
    adapter = made(PerftR, settings, shape)
    frame = Frame(0, Pass())
    check_against(
        adapter,
        lambda x: adapter.delta(x, frame),
        lambda x: reference.perft_r(adapter, x, renormalise=renormalise),
    )
    (route,) = frame.run.routes
    assert (route.chosen_TE.sum(-1) == top_k).all()
    assert route.loss_weights == {"switch": 0.01}
    sums_T = route.weights_TE.sum(-1)
    assert torch.allclose(sums_T, torch.ones_like(sums_T)) == (renormalise or top_k == 5)


@pytest.mark.parametrize("expert", ["lora", "parallel"])
def test_perft_r_with_the_base_routers_weights_is_the_released_code_for_olmoe(expert):
    settings = PerftRSettings(r=3, lora_alpha=5, num_experts=5, weight_source="base", expert=expert)
    adapter = made(PerftR, settings)
    weights_TK, ids_TK = routing()
    weights_TK.requires_grad_()
    check_against(
        adapter,
        lambda x: adapter.delta(x, frame_with(weights_TK, ids_TK)),
        lambda x: reference.perft_r(adapter, x, renormalise=False, base_weights_TK=weights_TK),
        (weights_TK,),
    )


@pytest.mark.parametrize("expert", ["lora", "parallel"])
@pytest.mark.parametrize(("rank", "top_k", "sorts"), [(3, K, False), (30, 1, True), (60, 2, True)])
def test_perft_e_is_the_loop_whichever_way_it_computes(expert, rank, top_k, sorts):
    adapter = made(PerftE, PerftESettings(r=rank, lora_alpha=5, expert=expert))
    weights_TK, ids_TK = routing(top_k=top_k)
    ids_TK[3, 0] = N  # an expert of another device
    weights_TK.requires_grad_()
    assert adapter._sorts(tokens(), ids_TK) == sorts
    check_against(
        adapter,
        lambda x: adapter.delta(x, frame_with(weights_TK, ids_TK)),
        lambda x: reference.perft_e(adapter, x, weights_TK, ids_TK),
        (weights_TK,),
    )


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_expert_lora_is_the_loop(implementation):
    adapter = made(ExpertLoRA, ExpertLoRASettings(r=3, lora_alpha=5), EXPERTS)
    experts = plain_experts(implementation)
    weights_TK, ids_TK = routing()
    ids_TK[3, 0] = N
    weights_TK.requires_grad_()
    check_against(
        adapter,
        lambda x: adapter.mix(experts, Frame(0, Pass()), x, ids_TK, weights_TK),
        lambda x: reference.expert_lora(adapter, experts.gate_up_proj, experts.down_proj, x, ids_TK, weights_TK),
        (weights_TK,),
    )


def plain_experts(implementation: str = "eager") -> Any:
    experts = torch.nn.Module()
    draw = torch.Generator().manual_seed(2)
    for name, size in {"gate_up_proj": (N, 22, D), "down_proj": (N, D, 11)}.items():
        weight = torch.randn(size, generator=draw, dtype=torch.float64)
        experts.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    experts.act_fn = torch.nn.SiLU()
    experts.config = types.SimpleNamespace(_experts_implementation=implementation)
    return experts


def test_expert_lora_with_no_expert_of_this_device_adds_nothing():
    adapter = made(ExpertLoRA, ExpertLoRASettings(r=3), EXPERTS)
    ids_TK = torch.full((T, K), N)
    assert not adapter.mix(plain_experts(), Frame(0, Pass()), tokens(), ids_TK, routing()[0]).any()


def test_sparmoe_is_a_tokens_own_scale_and_bias():
    adapter = made(SparMoE, SparMoESettings(num_experts=4))
    check_against(adapter, lambda h: h + adapter.delta(h, Frame(0, Pass())), lambda h: reference.sparmoe(adapter, h))
    with torch.no_grad():
        adapter.scales_ED.zero_()
        adapter.biases_ED.zero_()
    assert not adapter.delta(tokens(), Frame(0, Pass())).any()


def test_sparmoe_drops_from_the_scaling_path_alone():
    adapter = made(SparMoE, SparMoESettings(num_experts=4, dropout=0.25))
    h_TD, frame = tokens(), Frame(0, Pass())
    whole_TD = adapter.delta(h_TD, frame)
    with torch.no_grad():
        scales_ED = adapter.scales_ED.clone()
        adapter.scales_ED.zero_()
    bias_TD = adapter.delta(h_TD, frame)
    adapter.train()
    torch.testing.assert_close(adapter.delta(h_TD, frame), bias_TD)
    with torch.no_grad():
        adapter.scales_ED.copy_(scales_ED)
    torch.manual_seed(0)
    share_TD = (adapter.delta(h_TD, frame) - bias_TD) / (whole_TD - bias_TD)
    is_dropped = share_TD.abs() < 1e-6
    assert 0.1 < is_dropped.double().mean() < 0.4
    torch.testing.assert_close(share_TD[~is_dropped], torch.full_like(share_TD[~is_dropped], 4 / 3))


@pytest.mark.parametrize(
    ("model_type", "adapter_class", "settings"),
    [("llama", *case) for case in ROUTED] + [(name, *case) for name in CONFIGS for case in ROUTED + MOE_ONLY],
    ids=named,
)
def test_attached_is_the_base_model_until_it_learns(model_type, adapter_class, settings):
    model = any_model(model_type)
    ids = token_ids()
    before = model(input_ids=ids).logits.detach()
    paths = attach(model, adapter_class, settings)
    assert len(paths) == 2
    for is_training in (False, True):
        assert torch.equal(model.train(is_training)(input_ids=ids).logits, before)
    fill(adapters_of(model))
    assert not torch.allclose(model.eval()(input_ids=ids).logits, before, atol=1e-2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_expert_lora_starts_as_each_way_the_base_computes(implementation, dtype):
    model = moe_model("olmoe", implementation).to(dtype)
    before = model(input_ids=token_ids()).logits
    attach(model, ExpertLoRA, ExpertLoRASettings(r=3))
    assert torch.equal(model(input_ids=token_ids()).logits, before)


@pytest.mark.parametrize(("adapter_class", "settings"), ROUTED + MOE_ONLY, ids=named)
def test_half_precision_base_and_autocast(adapter_class, settings):
    model = moe_model("olmoe").to(torch.bfloat16).train()
    attach(model, adapter_class, settings)
    fill(adapters_of(model), std=0.1)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            model(input_ids=token_ids(), labels=token_ids()).loss.backward()
    for adapter in adapters_of(model):
        assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters() if parameter.grad is not None)
        assert all(parameter.dtype == torch.float32 for parameter in adapter.parameters())


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("expert", ["lora", "parallel"])
def test_perft_e_is_an_adapter_inside_each_expert(model_type, expert):
    model = moe_model(model_type).double()
    attach(model, PerftE, PerftESettings(r=3, expert=expert))
    adapters = adapters_of(model.double())
    fill(adapters)
    ours = model(input_ids=token_ids()).logits
    for layer, adapter in zip(model.model.layers, adapters, strict=True):
        experts, site = layer.mlp.experts, layer.mlp.routed_perft_e
        site.remove(layer.mlp)
        experts.forward = types.MethodType(
            lambda self, h, ids, weights, adapter=adapter: reference.perft_e_inside(self, adapter, h, ids, weights),
            experts,
        )
    torch.testing.assert_close(model(input_ids=token_ids()).logits, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("expert", ["lora", "parallel"])
@pytest.mark.parametrize("is_training", [False, True])
def test_perft_d_folds_into_one_perft_s(expert, is_training):
    several = made(PerftD, PerftDSettings(r=3, lora_alpha=5, num_experts=4, lora_dropout=0.3, expert=expert))
    one = PerftS(folded_settings(several.settings), SHAPE, "").double()
    one.load_state_dict(fold_perft_d(several))
    results = []
    for adapter in (several.train(is_training), one.train(is_training)):
        torch.manual_seed(0)
        results.append(adapter.delta(tokens(), Frame(0, Pass())))
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-12)
    assert one.settings.r == 12


def router_gradients(model: Any, settings: PerftRSettings) -> list[Tensor | None]:
    attach(model, PerftR, settings)
    fill(adapters_of(model), std=0.2)
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    return [adapter.router_ED.grad for adapter in adapters_of(model)]


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_the_routers_gradient_and_the_released_fault(model_type, top_k):
    choices = {"r": 3, "num_experts": 5, "top_k": top_k, "lora_dropout": 0.0}
    own = router_gradients(moe_model(model_type), PerftRSettings(**choices, balance_weight=0.0))
    assert all(grad is not None and grad.abs().max() > 1e-6 for grad in own)
    fault = PerftRSettings(**choices, weight_source="base", balance_weight=0.0)
    assert all(grad is None or not grad.any() for grad in router_gradients(moe_model(model_type), fault))
    balanced = PerftRSettings(**choices, weight_source="base", balance_weight=0.01)
    assert all(grad is not None and grad.any() for grad in router_gradients(moe_model(model_type), balanced))


@pytest.mark.parametrize("clones", [True, False])
def test_a_block_adapter_sees_the_input_before_mixtral_jitters_it(clones, monkeypatch):
    def before_without_clone(self, module, args, kwargs):
        self._before.append(args[0])

    if not clones:
        monkeypatch.setattr(Site, "before", before_without_clone)
    model = moe_model("mixtral", router_jitter_noise=0.3).train()
    came_in, seen = [], []
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: came_in.append(args[0].detach().clone()))
    attach(model, PerftS, PerftSSettings(r=3))
    for adapter in adapters_of(model):
        delta = adapter.delta
        adapter.delta = lambda x, frame, delta=delta: seen.append(x.detach().clone()) or delta(x, frame)
    model(input_ids=token_ids())
    assert len(came_in) == len(seen) == 2
    for x_BTD, x_TD in zip(came_in, seen, strict=True):
        assert torch.equal(x_BTD.flatten(0, 1), x_TD) == clones


@pytest.mark.parametrize("model_type", CONFIGS)
def test_expert_lora_merges_exactly(model_type):
    model = moe_model(model_type).double()
    attach(model, ExpertLoRA, ExpertLoRASettings(r=3))
    model.double()
    fill(adapters_of(model))
    ours = model(input_ids=token_ids()).logits.detach()
    merged = moe_model(model_type).double()
    for layer, base in zip(model.model.layers, merged.model.layers, strict=True):
        (adapter,) = layer.mlp.experts.routed_expert_lora.adapters.values()
        before = {name: value.clone() for name, value in base.mlp.experts.named_parameters()}
        weights = adapter.merged(base.mlp.experts)
        assert all(torch.equal(value, before[name]) for name, value in base.mlp.experts.named_parameters())
        base.mlp.experts.load_state_dict(weights)
    torch.testing.assert_close(merged(input_ids=token_ids()).logits, ours, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("model_type", CONFIGS)
def test_expert_lora_has_pefts_layout_both_ways(model_type):
    import peft

    ours, theirs = moe_model(model_type), moe_model(model_type)
    attach(ours, ExpertLoRA, ExpertLoRASettings(r=3, lora_alpha=5))
    fill(adapters_of(ours), std=0.2)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=5,
        lora_dropout=0.0,
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    model = peft.get_peft_model(theirs, config).eval()
    wrappers = {
        (int(name.split("layers.")[1].split(".")[0]), wrapper.parameter_name): wrapper
        for name, wrapper in model.named_modules()
        if hasattr(wrapper, "parameter_name")
    }
    assert len(wrappers) == 4
    for layer, adapter in enumerate(adapters_of(ours)):
        for name, (a_ERI, b_EOR) in adapter.pairs().items():
            lora_a_XI, lora_b_OX = to_peft_layout(a_ERI.detach(), b_EOR.detach())
            wrapper = wrappers[layer, name]
            wrapper.lora_A["default"].load_state_dict({"weight": lora_a_XI})
            wrapper.lora_B["default"].load_state_dict({"weight": lora_b_OX})
            back = from_peft_layout(wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight, len(a_ERI))
            assert torch.equal(back[0], a_ERI)
            assert torch.equal(back[1], b_EOR)
    base = moe_model(model_type)(input_ids=token_ids()).logits
    result = model(input_ids=token_ids()).logits
    assert not torch.allclose(result, base, atol=1e-2)
    torch.testing.assert_close(ours(input_ids=token_ids()).logits, result, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(("adapter_class", "settings"), ROUTED + MOE_ONLY, ids=named)
def test_checkpointing_changes_no_gradient(adapter_class, settings, use_reentrant):
    if use_reentrant and hasattr(settings, "balance_weight"):
        # its first run has no graph, and routers' losses hang on the first run
        settings = dataclasses.replace(settings, balance_weight=0.0)
    results = []
    for checkpoints in (False, True):
        model = moe_model("olmoe")
        attach(model, adapter_class, settings)
        fill(adapters_of(model), std=0.2)
        if checkpoints:
            model.activation_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()  # the older kind of checkpointing needs it
        model.train()
        torch.manual_seed(0)
        model(input_ids=token_ids(), labels=token_ids(), use_cache=False).loss.backward()
        results.append([parameter.grad for adapter in adapters_of(model) for parameter in adapter.parameters()])
    assert sum(plain is not None and plain.abs().max() > 0 for plain in results[0]) >= 4
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-5, atol=1e-7)


def test_a_second_run_chooses_as_the_first():
    """In a run under checkpointing rounding may differ; the choices may not."""
    weights_TK, ids_TK = routing()
    other_TK = (ids_TK + 1) % N
    x_TD = tokens()

    embedded = made(PerftE, PerftESettings(r=3))
    frame = frame_with(weights_TK, ids_TK)
    first_TD = embedded.delta(x_TD, frame)
    frame.values["layers.0.mlp base router"] = (weights_TK, other_TK)
    assert torch.equal(embedded.delta(x_TD, frame), first_TD)
    assert not torch.equal(embedded.delta(x_TD, frame_with(weights_TK, other_TK)), first_TD)

    routed = made(PerftR, PerftRSettings(r=3, num_experts=5))
    frame = Frame(0, Pass())
    routed.delta(x_TD, frame)
    with torch.no_grad():
        routed.router_ED.neg_()
    routed.delta(x_TD, frame)
    routed.delta(x_TD, Frame(0, frame.run))
    first, second, fresh = (route.chosen_TE for route in frame.run.routes)
    assert torch.equal(first, second)
    assert not torch.equal(first, fresh)

    fused = made(ExpertLoRA, ExpertLoRASettings(r=3), EXPERTS)
    frame = Frame(0, Pass())
    first_TD = fused.mix(plain_experts(), frame, x_TD, ids_TK, weights_TK)
    assert torch.equal(fused.mix(plain_experts(), frame, x_TD, other_TK, weights_TK), first_TD)
    assert not torch.equal(fused.mix(plain_experts(), Frame(0, Pass()), x_TD, other_TK, weights_TK), first_TD)


def test_sparmoe_folds_with_a_constant_gate():
    model = dense_model("llama").double()  # its down_proj has a bias
    attach(model, SparMoE, SparMoESettings(num_experts=1))
    model.double()
    fill(adapters_of(model))
    folded = dense_model("llama").double()
    with torch.no_grad():
        for layer, adapter in zip(folded.model.layers, adapters_of(model), strict=True):
            down, scale_D = layer.mlp.down_proj, 1 + adapter.scales_ED[0]
            down.weight.mul_(scale_D[:, None])
            down.bias.mul_(scale_D).add_(adapter.biases_ED[0])
    torch.testing.assert_close(folded(input_ids=token_ids()).logits, model(input_ids=token_ids()).logits)


def test_the_start():
    torch.manual_seed(0)
    wide = SiteShape(inputs=400, outputs=400, num_experts=6, init_range=0.1)
    adapter = PerftR(PerftRSettings(r=8, num_experts=6), wide, "")
    assert adapter.down_ERD.detach().std() == pytest.approx(0.5, rel=0.05)
    assert adapter.router_ED.detach().std() == pytest.approx(0.1, rel=0.05)
    assert not adapter.up_DER.any()
    gate = SparMoE(SparMoESettings(), wide, "").router_ED
    assert gate.detach().std() == pytest.approx(0.1, rel=0.1)
    with torch.device("meta"):
        for kind, settings in ROUTED + MOE_ONLY[:2]:
            assert all(value.is_meta for value in kind(settings, SHAPE, "").parameters())
        assert all(value.is_meta for value in ExpertLoRA(ExpertLoRASettings(), EXPERTS, "").parameters())


def count(kind: Any, settings: Any, shape: SiteShape, layers: int) -> int:
    return layers * sum(torch.Size(size).numel() for size in kind.shapes(settings, shape).values())


BASES = {
    "OLMoE-1B-7B": (SiteShape(inputs=2048, outputs=2048, num_experts=64), 16),
    "Mixtral-8x7B": (SiteShape(inputs=4096, outputs=4096, num_experts=8), 32),
    "Qwen3-30B-A3B": (SiteShape(inputs=2048, outputs=2048, num_experts=128), 48),
}


@pytest.mark.parametrize(
    ("kind", "settings", "expected"),
    [
        (PerftS, PerftSSettings(r=16), (1.049, 4.194, 3.146)),
        (PerftD, PerftDSettings(r=16, num_experts=2), (2.097, 8.389, 6.291)),
        (PerftR, PerftRSettings(r=8, num_experts=2), (1.114, 4.456, 3.342)),
        (PerftR, PerftRSettings(r=16, num_experts=2), (2.163, 8.651, 6.488)),
        (PerftR, PerftRSettings(r=16, num_experts=4), (4.325, 17.30, 12.98)),
        (PerftR, PerftRSettings(r=16, num_experts=8), (8.651, 34.60, 25.95)),
        (PerftE, PerftESettings(r=4), (16.78, 8.389, 100.7)),
        (PerftE, PerftESettings(r=16), (67.11, 33.55, 402.7)),
    ],
)
def test_parameter_counts_of_perft(kind, settings, expected):
    for (shape, layers), millions in zip(BASES.values(), expected, strict=True):
        assert count(kind, settings, shape, layers) / 1e6 == pytest.approx(millions, rel=5e-4)


def test_parameter_counts_of_the_others():
    for layers, width, expected in ((12, 768, 110_592), (24, 1024, 294_912), (32, 4096, 1_572_864)):
        assert count(SparMoE, SparMoESettings(), SiteShape(inputs=width, outputs=width), layers) == expected
    parts = {"gate_up_proj": (2048, 2048), "down_proj": (1024, 2048)}
    shape = SiteShape(inputs=2048, outputs=2048, num_experts=64, parts=parts)
    assert count(ExpertLoRA, ExpertLoRASettings(r=4), shape, 1) == 64 * 4 * (2048 + 2048 + 1024 + 2048)


def test_what_is_measured():
    expected = {"olmoe": (8, 3, False), "mixtral": (5, 3, True), "qwen3_moe": (6, 3, True), "llama": (0, 0, True)}
    for model_type, (experts, top_k, renormalises) in expected.items():
        model = any_model(model_type)
        shape = measure(model, model.model.layers[0].mlp, "model.layers.0.mlp", PerftR)
        assert (shape.num_experts, shape.base_top_k, shape.renormalises) == (experts, top_k, renormalises)


def gpt_oss() -> Any:
    config = transformers.GptOssConfig(
        **{**_MOE, "num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    )
    return transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("make", "kind", "settings", "message"),
    [
        (lambda: dense_model("llama"), PerftE, PerftESettings(), "none of its kind, block with a router"),
        (
            lambda: dense_model("llama"),
            PerftR,
            PerftRSettings(weight_source="base"),
            "mlp: weight_source: 'base' .* use 'own'",
        ),
        (lambda: moe_model("olmoe"), PerftR, PerftRSettings(weight_source="base", top_k=4), "top_k: 4 .* chooses 3"),
        (
            lambda: moe_model("olmoe"),
            PerftR,
            PerftRSettings(weight_source="base", renormalise=True),
            "renormalise: True",
        ),
        (lambda: moe_model("olmoe"), PerftR, PerftRSettings(weight_source="bsae"), "weight_source: 'bsae'"),
        (lambda: moe_model("olmoe"), PerftS, PerftSSettings(expert="adapter"), "expert: 'adapter'"),
        (lambda: moe_model("olmoe"), SparMoE, SparMoESettings(dropout=1.0), "dropout: 1.0"),
        (lambda: dense_model("llama"), ExpertLoRA, ExpertLoRASettings(), "none of its kind, experts"),
        (gpt_oss, ExpertLoRA, ExpertLoRASettings(), "transposed and bias"),
    ],
)
def test_what_does_not_fit_is_refused(make, kind, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        attach(make(), kind, settings)
    assert "\n" not in str(caught.value)


def test_perft_e_itself_refuses_a_dense_block():
    with pytest.raises(ValueError, match="perft_e needs an MoE block"):
        PerftE(PerftESettings(), SiteShape(inputs=D, outputs=D), "")
