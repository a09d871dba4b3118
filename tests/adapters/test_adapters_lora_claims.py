"""What the papers of mixtures of LoRA claim: thresholds, sparsegen, LD-MoLE, core space, second runs, settings."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from modmoe.adapters.corespace import comol_from_loras, stack_loras
from modmoe.adapters.mechanism.attach import CONTEXT, attach
from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.losses import switch_loss, total_loss
from modmoe.adapters.methods.adamole import AdaMoLE, AdaMoLESettings, passed, threshold_weights
from modmoe.adapters.methods.comol import CoMoL, CoMoLSettings
from modmoe.adapters.methods.hydralora import HydraLoRA, HydraLoRASettings
from modmoe.adapters.methods.ldmole import LDMoLE, LDMoLESettings, lambda_low, sparsegen
from modmoe.adapters.methods.molora import MoLoRA, MoLoRASettings
from modmoe.adapters.methods.moslora import MoSLoRA, MoSLoRASettings
from tests import reference_lora
from tests.support import tiny
from tests.support.loras import MANY, D, E, O, T, make, run


def test_thresholds_leave_weights_that_sum_to_one():
    torch.manual_seed(0)
    probs_TE = torch.cat((torch.randn(500, E).softmax(-1), torch.full((1, E), 1 / E))).double()
    probs_TE[0, :2] = probs_TE[0, :2].mean()
    for tau in (0.0, 0.1, 1 / E, 0.5, 1.0):
        tau_T1 = torch.full((501, 1), tau, dtype=torch.float64, requires_grad=True)
        leaf_TE = probs_TE.clone().requires_grad_()
        chosen_TE = passed(leaf_TE, tau_T1)
        weights_TE = threshold_weights(leaf_TE, tau_T1, chosen_TE)
        torch.testing.assert_close(weights_TE.sum(-1), torch.ones(501, dtype=torch.float64))
        assert torch.equal(weights_TE > 0, chosen_TE)
        made = torch.autograd.grad((weights_TE * torch.randn(E)).sum(), (leaf_TE, tau_T1))
        assert all(gradient.isfinite().all() for gradient in made)
        torch.testing.assert_close(weights_TE[-1], torch.full_like(weights_TE[-1], 1 / E))  # the tie


def test_adamole_counts_what_passed_against_what_exceeds():
    adapter = make(AdaMoLE, AdaMoLESettings(**MANY))
    x_TD = torch.randn(T, D, dtype=torch.float64)
    _, route = run(adapter, x_TD)
    tau_T1 = (x_TD @ adapter.threshold_1D.T + adapter.threshold_1).sigmoid() / E
    over_TE = (x_TD @ adapter.router_ED.T).softmax(-1) - tau_T1
    counts_E = (over_TE > 0).sum(0)
    assert counts_E.sum() > T and len(set((over_TE > 0).sum(1).tolist())) > 1
    expected = E * (counts_E / counts_E.sum() * over_TE.mean(0)).sum()
    torch.testing.assert_close(switch_loss(route, None), expected)
    torch.testing.assert_close(total_loss([route], None), 0.01 * expected)


@pytest.mark.parametrize("experts", range(2, 10))
def test_sparsegen_is_what_its_paper_says(experts):
    """250 random tokens for each number of experts, 2,000 in all."""
    torch.manual_seed(experts)
    u_TE = torch.randn(250, experts, dtype=torch.float64) * 10 ** (3 * torch.rand(250, 1) - 1.5).double()
    lambda_T1 = 0.99 - 10 ** (4 * torch.rand(250, 1) - 2).double()
    p_TE = sparsegen(u_TE, lambda_T1)
    torch.testing.assert_close(p_TE.sum(-1), torch.ones(250, dtype=torch.float64))
    expected = [reference_lora.sparsegen(u_E, one[0]) for u_E, one in zip(u_TE, lambda_T1, strict=True)]
    torch.testing.assert_close(p_TE, torch.stack(expected), rtol=1e-9, atol=1e-12)
    assert set((p_TE > 0).sum(-1).tolist()) == set(range(1, experts + 1))
    for top_k in range(1, experts):
        low_T1 = lambda_low(u_TE, top_k)
        for share in (1e-9, 0.5, 0.99):  # of the way from the bound to 1
            assert ((sparsegen(u_TE, low_T1 + share * (1 - low_T1)) > 0).sum(-1) <= top_k).all()
        below_T1 = low_T1 - 1e-6 * (1 - low_T1)
        assert ((sparsegen(u_TE, below_T1) > 0).sum(-1) > top_k).all()


def test_sparsegen_goes_from_all_to_one():
    u_TE = torch.tensor([[0.1, 0.5, 0.3, 0.2]], dtype=torch.float64)
    sharp = sparsegen(u_TE, torch.tensor([[0.99]], dtype=torch.float64))
    assert torch.equal(sharp, torch.tensor([[0.0, 1.0, 0.0, 0.0]], dtype=torch.float64))
    soft = sparsegen(u_TE, torch.tensor([[-1e6]], dtype=torch.float64))
    torch.testing.assert_close(soft, torch.full((1, 4), 0.25, dtype=torch.float64), rtol=0, atol=1e-5)
    same = sparsegen(torch.ones(1, 4), torch.tensor([[0.5]]))
    torch.testing.assert_close(same, torch.full((1, 4), 0.25))


def test_sparsegen_keeps_its_sum_at_large_logits():
    u_TE = 1e4 + torch.randn(200, 8)
    torch.testing.assert_close(sparsegen(u_TE, torch.full((200, 1), 0.98)).sum(-1), torch.ones(200))


def test_gradient_of_sparsegen():
    torch.manual_seed(1)
    u_TE = torch.randn(30, E, dtype=torch.float64, requires_grad=True)
    lambda_T1 = (-torch.rand(30, 1, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(sparsegen, (u_TE, lambda_T1), eps=1e-7, atol=1e-5)
    rows = torch.stack([reference_lora.sparsegen(u_E, one[0]) for u_E, one in zip(u_TE, lambda_T1, strict=True)])
    weights = torch.randn_like(rows)
    ours = torch.autograd.grad((sparsegen(u_TE, lambda_T1) * weights).sum(), (u_TE, lambda_T1))
    theirs = torch.autograd.grad((rows * weights).sum(), (u_TE, lambda_T1))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
        assert one.abs().max() > 0


def test_ldmole_asks_for_few_experts():
    settings = LDMoLESettings(**MANY, lambda_width=6, sparsity_weight=0.5, sparsity_experts=2)
    adapter = make(LDMoLE, settings)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    _, route = run(adapter, x_TD)
    lambda_T1 = adapter.sharpness(x_TD)
    sorted_TE = (x_TD @ adapter.router_ED.T).sort(-1, descending=True).values
    low_T = 1 - (sorted_TE[:, :2].sum(-1) - 2 * sorted_TE[:, 2])
    expected_T = 0.5 * (low_T - lambda_T1[:, 0]).relu()
    torch.testing.assert_close(route.extra["sparsity"], expected_T)
    # no loss exactly where the token keeps to two
    assert torch.equal(expected_T == 0, (route.weights_TE > 0).sum(-1) <= 2)
    assert 0 < (expected_T == 0).sum() < T
    torch.testing.assert_close(total_loss([route], None), switch_loss(route, None) + expected_T.mean())
    made = torch.autograd.grad(route.extra["sparsity"].sum(), adapter.shared[0].parameters(), allow_unused=True)
    assert all(gradient is not None for gradient in made)


def test_ldmole_shares_a_net_for_each_width():
    model = tiny.dense_model("llama", intermediate_size=48)
    attach(model, LDMoLE, LDMoLESettings(r=2, num_experts=3, lambda_width=4))
    shared = {name: tuple(value.shape) for name, value in model.named_parameters() if "lambda" in name}
    assert sorted(shared.values()) == sorted([(4, 32), (4, 48), (4,), (4,), (1, 4), (1, 4), (1,), (1,)])
    ids = tiny.token_ids()
    model.train()
    model(ids, labels=ids).loss.backward()
    assert all(value.grad is not None for name, value in model.named_parameters() if "lambda" in name)
    assert {value.item() for name, value in model.named_parameters() if name.endswith("_out_1")} == {-2.5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (AdaMoLESettings(tau_max=0.0), "tau_max: 0.0"),
        (AdaMoLESettings(tau_max=1.5), "tau_max: 1.5"),
        (LDMoLESettings(lambda_width=0), "lambda_width: 0"),
        (LDMoLESettings(num_experts=2, sparsity_weight=1.0), "sparsity_experts: 2"),
        (MoLoRASettings(top_k=9), "top_k: 9"),
        (HydraLoRASettings(r=0), "r: 0"),
        (MoSLoRASettings(lora_dropout=1.0), "lora_dropout: 1.0"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    classes = {
        AdaMoLESettings: AdaMoLE,
        LDMoLESettings: LDMoLE,
        MoLoRASettings: MoLoRA,
        HydraLoRASettings: HydraLoRA,
        MoSLoRASettings: MoSLoRA,
    }
    with pytest.raises(ValueError, match=words):
        classes[type(settings)](settings, SiteShape(inputs=D, outputs=O))


@pytest.mark.parametrize("ranks", [(3, 3, 3), (1, 4, 2), (9, 9, 9), (12, 12)])
def test_loras_become_cores_without_loss(ranks):
    torch.manual_seed(0)
    loras = [
        (
            torch.randn(rank, D, dtype=torch.float64),
            torch.randn(O, rank, dtype=torch.float64),
            0.5 + number,
        )
        for number, rank in enumerate(ranks)
    ]
    made = stack_loras(loras)
    rank = min(sum(ranks), max(D, O))
    assert made["cores_ERS"].shape == (len(ranks), rank, rank)
    used = min(sum(ranks), D)
    torch.testing.assert_close(
        made["down_RD"][:used] @ made["down_RD"][:used].T, torch.eye(used, dtype=torch.float64), rtol=0, atol=1e-12
    )
    adapter = comol_from_loras(loras).double()
    for name, weight in made.items():
        adapter.get_parameter(name).data.copy_(weight)
    adapter.eval()
    for (down, up, scale), weights_E in zip(loras, torch.eye(len(ranks), dtype=torch.float64), strict=True):
        torch.testing.assert_close(adapter.fixed_weight(weights_E), scale * up @ down, rtol=1e-12, atol=1e-12)
    x_TD = torch.randn(T, D, dtype=torch.float64)
    mean_OD = sum(scale * up @ down for down, up, scale in loras) / len(ranks)
    torch.testing.assert_close(run(adapter, x_TD)[0], x_TD @ mean_OD.T, rtol=1e-11, atol=1e-11)


def test_equal_loras_become_cores_too():
    down, up = torch.randn(3, D), torch.randn(O, 3)
    made = stack_loras([(down, up, 1.0), (down, up, 2.0)])
    assert {name: weight.dtype for name, weight in made.items()} == dict.fromkeys(made, torch.float32)
    for core_RS, scale in zip(made["cores_ERS"], (1.0, 2.0), strict=True):
        torch.testing.assert_close(made["up_OR"] @ core_RS @ made["down_RD"], scale * up @ down, rtol=1e-4, atol=1e-4)


def test_loras_that_do_not_go_together():
    with pytest.raises(ValueError, match="loras: none"):
        stack_loras([])
    good = (torch.randn(3, D), torch.randn(O, 3), 1.0)
    for bad in (
        (torch.randn(3, D + 1), torch.randn(O, 3), 1.0),
        (torch.randn(3, D), torch.randn(O + 1, 3), 1.0),
        (torch.randn(3, D), torch.randn(O, 2), 1.0),
    ):
        with pytest.raises(ValueError, match="loras: number 1"):
            stack_loras([good, bad])


REPLAYED = {
    "molora": (MoLoRA, MoLoRASettings(r=3, num_experts=4, top_k=2, balance_weight=0.01)),
    "hydralora": (HydraLoRA, HydraLoRASettings(r=3, num_experts=4, lora_dropout=0.0)),
    "adamole": (AdaMoLE, AdaMoLESettings(r=3, num_experts=4, lora_dropout=0.0)),
    "ldmole": (LDMoLE, LDMoLESettings(r=3, num_experts=4, lora_dropout=0.0, lambda_width=8, sparsity_weight=0.1)),
    "moslora": (MoSLoRA, MoSLoRASettings(r=3, lora_dropout=0.0)),
    "comol": (CoMoL, CoMoLSettings(r=3, num_experts=4, lora_dropout=0.0)),
}


def attached(adapter_class, settings):
    """Return a tiny model in training with random adapters, as after some steps."""
    model = tiny.dense_model("llama").double()
    model.requires_grad_(False)
    attach(model, adapter_class, settings, targets=["q_proj", "v_proj", "down_proj"])
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "routed_" in name:
            parameter.requires_grad_().data.add_(0.3 * torch.randn_like(parameter))
    return model.double().train()


def checkpoint(model, *, reentrant: bool) -> None:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()


def learn(model, between=None) -> dict[str, torch.Tensor]:
    """Return all gradients; ``between`` runs after the forward."""
    ids = tiny.token_ids()
    model.zero_grad()
    loss = model(ids, labels=ids).loss
    if between is not None:
        between()
    loss.backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", REPLAYED)
def test_checkpointing_changes_no_gradient(method, reentrant):
    adapter_class, settings = REPLAYED[method]
    if reentrant:  # whose first run has no gradient, and so no loss of the routers
        losses = {name: 0.0 for name in vars(settings) if name in ("balance_weight", "sparsity_weight")}
        settings = dataclasses.replace(settings, **losses)
    model = attached(adapter_class, settings)
    plain = learn(model)
    routes = len(getattr(model, CONTEXT).run.routes)
    checkpoint(model, reentrant=reentrant)
    again = learn(model)
    assert all(gradient.any() for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
    assert len(getattr(model, CONTEXT).run.routes) == routes == (0 if method == "moslora" else 6)


# one expert a token, of weight 1 whatever the logits are: a router then matters by its choice alone
ALONE = {
    "molora": (MoLoRA, MoLoRASettings(r=3, num_experts=4, top_k=1)),
    "adamole": (AdaMoLE, AdaMoLESettings(r=3, num_experts=4, lora_dropout=0.0, tau_max=1.0, balance_weight=0.0)),
    "ldmole": (LDMoLE, LDMoLESettings(r=3, num_experts=4, lora_dropout=0.0, lambda_width=8, balance_weight=0.0)),
}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("method", ALONE)
def test_a_choice_once_made_is_kept_in_the_second_run(method, reentrant):
    """The routers change between forward and backward, so that a choice made anew would be another."""
    model = attached(*ALONE[method])
    named = dict(model.named_parameters())
    routers = [value for name, value in named.items() if name.endswith("router_ED")]
    for name, value in named.items():
        if name.endswith("router_ED"):
            value.data.mul_(10)
        if name.endswith(("threshold_1", "_out_1")):
            value.data.fill_(50.0)

    def turn() -> None:
        for router_ED in routers:
            router_ED.data.copy_(-router_ED.roll(1, 0))

    def experts(gradients):
        return {name: value for name, value in gradients.items() if name.endswith(("down_ERD", "up_OER"))}

    start = [router_ED.detach().clone() for router_ED in routers]
    plain = experts(learn(model))
    assert all((route.weights_TE == route.chosen_TE).all() for route in getattr(model, CONTEXT).run.routes)
    turn()
    turned = experts(learn(model))
    assert not any(torch.allclose(turned[name], gradient, rtol=1e-2) for name, gradient in plain.items())
    for router_ED, weight_ED in zip(routers, start, strict=True):
        router_ED.data.copy_(weight_ED)
    checkpoint(model, reentrant=reentrant)
    again = experts(learn(model, turn))
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
