"""Adapters at FFN and MoE blocks against the loops of ``reference_blocks``: PERFT, SparMoE and expert LoRA."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.adapters.mechanism.attach import attach
from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.passes import Frame, Pass
from modmoe.adapters.methods.expert_lora import ExpertLoRA, ExpertLoRASettings
from modmoe.adapters.methods.perft import (
    PerftD,
    PerftDSettings,
    PerftE,
    PerftESettings,
    PerftR,
    PerftRSettings,
    PerftS,
    PerftSSettings,
)
from modmoe.adapters.methods.sparmoe import SparMoE, SparMoESettings
from tests import reference_blocks as reference
from tests.support.blocks import (
    CONFIGS,
    EXPERTS,
    MOE_ONLY,
    ROUTED,
    SHAPE,
    D,
    K,
    N,
    T,
    adapters_of,
    any_model,
    fill,
    frame_with,
    made,
    moe_model,
    named,
    plain_experts,
    routing,
    tokens,
)
from tests.support.tiny import token_ids


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
