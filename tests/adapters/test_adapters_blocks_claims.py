"""What PERFT, SparMoE and expert LoRA claim: folds, merges, the released fault, second runs, counts, refusals."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.adapters.mechanism.attach import Site, attach
from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.passes import Frame, Pass
from modmoe.adapters.mechanism.targets import measure
from modmoe.adapters.methods.expert_lora import ExpertLoRA, ExpertLoRASettings, from_peft_layout, to_peft_layout
from modmoe.adapters.methods.perft import (
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
from modmoe.adapters.methods.sparmoe import SparMoE, SparMoESettings
from tests.support.blocks import (
    CONFIGS,
    EXPERTS,
    MOE_ONLY,
    ROUTED,
    SHAPE,
    D,
    N,
    adapters_of,
    any_model,
    fill,
    frame_with,
    gpt_oss,
    made,
    moe_model,
    named,
    plain_experts,
    routing,
    tokens,
)
from tests.support.tiny import dense_model, token_ids


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
        self.context.between[self._key] = args[0]

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


@pytest.mark.parametrize(
    ("make", "kind", "settings", "message"),
    [
        (lambda: dense_model("llama"), PerftE, PerftESettings(), "needs one of the kind block with a router"),
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
        (lambda: dense_model("llama"), ExpertLoRA, ExpertLoRASettings(), "needs one of the kind experts"),
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
