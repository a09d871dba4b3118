"""Mixtures of LoRA at linear layers against the loops of ``reference_lora``."""

from __future__ import annotations

import pytest
import torch

from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.routing import mix_lora, narrow_linear, router_logits
from modmoe.adapters.methods.adamole import AdaMoLE, AdaMoLESettings
from modmoe.adapters.methods.comol import CoMoL, CoMoLSettings
from modmoe.adapters.methods.hydralora import HydraLoRA, HydraLoRASettings
from modmoe.adapters.methods.ldmole import LDMoLE, LDMoLESettings
from modmoe.adapters.methods.molora import MoLoRA, MoLoRASettings
from modmoe.adapters.methods.moslora import MoSLoRA, MoSLoRASettings
from tests import reference_lora
from tests.support.loras import MANY, SIZES, D, E, O, R, T, gradients, make, parameters, run

CASES = {
    "molora": (MoLoRA, MoLoRASettings(**MANY), reference_lora.molora),
    "molora top 2": (MoLoRA, MoLoRASettings(**MANY, top_k=2), reference_lora.molora),
    "hydralora": (HydraLoRA, HydraLoRASettings(**MANY), reference_lora.hydralora),
    "adamole": (AdaMoLE, AdaMoLESettings(**MANY), reference_lora.adamole),
    "adamole high": (AdaMoLE, AdaMoLESettings(**MANY, tau_max=0.9), reference_lora.adamole),
    "ldmole": (LDMoLE, LDMoLESettings(**MANY, lambda_width=6), reference_lora.ldmole),
    "moslora": (MoSLoRA, MoSLoRASettings(**SIZES), reference_lora.moslora),
    "comol": (CoMoL, CoMoLSettings(**MANY), reference_lora.comol),
    "comol reading x": (CoMoL, CoMoLSettings(**MANY, core_routing=False), reference_lora.comol),
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case):
    adapter_class, settings, reference = CASES[case]
    adapter = make(adapter_class, settings)
    x_TD = torch.randn(T, D, dtype=torch.float64, requires_grad=True)
    output, _ = run(adapter, x_TD)
    expected = reference(adapter, x_TD)
    torch.testing.assert_close(output, expected, rtol=1e-11, atol=1e-11)
    ours, theirs = gradients(output, adapter, x_TD), gradients(expected, adapter, x_TD)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-9, atol=1e-10, msg=name)
        assert gradient.abs().max() > 0, name
    with torch.no_grad():
        torch.testing.assert_close(run(adapter, x_TD)[0], expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_lower_precision_stays_near_and_routes_in_float32(case, dtype):
    adapter_class, settings, _ = CASES[case]
    adapter, exact = make(adapter_class, settings, dtype=dtype), make(adapter_class, settings)
    for name, parameter in parameters(adapter).items():
        parameters(exact)[name].data.copy_(parameter.data)
    x_TD = torch.randn(300, D, dtype=dtype, requires_grad=True)
    y_TD = x_TD.detach().double().requires_grad_()
    (output, route), (expected, right) = run(adapter, x_TD), run(exact, y_TD)
    assert output.dtype == dtype
    # top-k and thresholds may decide otherwise where two are equal to rounding, so not the worst token but the mean
    near = 2e-2 if dtype == torch.bfloat16 else 1e-5
    assert (output - expected).abs().mean() < near * expected.abs().mean()
    ours, theirs = gradients(output, adapter, x_TD), gradients(expected, exact, y_TD)
    for name, gradient in ours.items():
        assert gradient.dtype == dtype
        assert (gradient - theirs[name]).abs().mean() < 3 * near * theirs[name].abs().mean(), name
    if route is not None:
        assert route.probs_TE.dtype == torch.float32
        if not (adapter_class is CoMoL and settings.core_routing):  # whose router reads what bfloat16 made
            torch.testing.assert_close(route.logits_TE.double(), right.logits_TE, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("moslora", "comol")])
def test_routes_in_float32_under_autocast(case):
    adapter_class, settings, _ = CASES[case]
    adapter = make(adapter_class, settings, dtype=torch.float32)
    x_TD = torch.randn(T, D, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output, route = run(adapter, x_TD)
    assert output.dtype == torch.bfloat16
    logits_TE = x_TD.double() @ getattr(adapter, "router_ED", getattr(adapter, "router_EX", None)).double().T
    torch.testing.assert_close(route.logits_TE.double(), logits_TE, rtol=1e-5, atol=1e-5)
    expected, _ = run(adapter, x_TD)
    assert (output - expected).abs().mean() < 2e-2 * expected.abs().mean()
    ours, theirs = gradients(output, adapter, x_TD), gradients(expected.to(output.dtype), adapter, x_TD)
    for name, gradient in ours.items():
        assert (gradient - theirs[name]).abs().mean() < 6e-2 * theirs[name].abs().mean(), name


@pytest.mark.parametrize("case", CASES)
def test_is_zero_at_the_start(case):
    adapter_class, settings, _ = CASES[case]
    adapter = make(adapter_class, settings, random=False)
    assert not run(adapter, torch.randn(T, D, dtype=torch.float64))[0].any()
    others = [value for name, value in parameters(adapter).items() if not name.startswith("up_") and value.dim() > 1]
    assert all(value.any() for value in others)


@pytest.mark.parametrize("case", CASES)
def test_can_be_made_without_memory(case):
    adapter_class, settings, _ = CASES[case]
    with torch.device("meta"):
        adapter = adapter_class(settings, SiteShape(inputs=D, outputs=O), "site")
    assert all(parameter.is_meta for parameter in adapter.parameters())


@pytest.mark.parametrize("case", CASES)
def test_has_the_parameters_of_its_formula(case):
    adapter_class, settings, _ = CASES[case]
    mixture = E * R * (D + O) + E * D
    expected = {
        "molora": mixture,
        "molora top 2": mixture,
        "hydralora": R * D + E * R * O + E * D,
        "adamole": mixture + D + 1,
        "adamole high": mixture + D + 1,
        "ldmole": mixture,
        "moslora": R * (D + O) + R * R,
        "comol": R * (D + O) + E * R * R + E * R,
        "comol reading x": R * (D + O) + E * R * R + E * D,
    }
    shape = SiteShape(inputs=D, outputs=O)
    sizes = adapter_class.shapes(settings, shape)
    assert sum(torch.Size(size).numel() for size in sizes.values()) == expected[case]
    assert {name: tuple(value.shape) for name, value in make(adapter_class, settings).named_parameters()} == sizes
    shared = adapter_class.shared_shapes(settings, shape)
    assert sum(torch.Size(size).numel() for size in shared.values()) == (6 * D + 2 * 6 + 1 if case == "ldmole" else 0)


def test_the_published_counts_of_comol():
    """Millions for q, k, v, o and down of Qwen3-8B: 36 layers, width 4096, 1024 for k and v, 12288 neurons."""
    sites = [(4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), (12288, 4096)]

    def millions(adapter_class, settings) -> float:
        shapes = [adapter_class.shapes(settings, SiteShape(inputs=n, outputs=m)) for n, m in sites]
        return round(36 * sum(torch.Size(size).numel() for one in shapes for size in one.values()) / 1e6, 2)

    assert millions(CoMoL, CoMoLSettings()) == 25.16
    assert millions(CoMoL, CoMoLSettings(num_experts=64)) == 27.91
    assert millions(CoMoL, CoMoLSettings(core_routing=False)) == 33.40
    assert millions(MoLoRA, MoLoRASettings()) == 107.35


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("molora top 2", "adamole high")])
def test_one_expert_folds_exactly(case):
    adapter_class, settings, _ = CASES[case]
    fields = {**vars(settings)} | ({} if case == "moslora" else {"num_experts": 1})
    adapter = make(adapter_class, type(settings)(**fields))
    x_TD = torch.randn(T, D, dtype=torch.float64)
    assert adapter.fold_kind == "exact"
    torch.testing.assert_close(x_TD @ adapter.fixed_weight().T, run(adapter, x_TD)[0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("case", [case for case in CASES if case != "moslora"])
def test_fixed_weight_is_the_delta_at_fixed_weights(case):
    adapter_class, settings, _ = CASES[case]
    adapter = make(adapter_class, settings)
    assert adapter.fold_kind == "approximate"
    x_TD = torch.randn(T, D, dtype=torch.float64)
    output, route = run(adapter, x_TD)
    for t, weights_E in enumerate(route.weights_TE):
        torch.testing.assert_close(adapter.fixed_weight(weights_E) @ x_TD[t], output[t], rtol=1e-11, atol=1e-11)


def test_mixing_cores_is_mixing_outputs():
    adapter = make(CoMoL, CoMoLSettings(**MANY))
    x_TD = torch.randn(T, D, dtype=torch.float64)
    output, route = run(adapter, x_TD)
    outputs = [x_TD @ adapter.fixed_weight(weights_E).T for weights_E in torch.eye(E, dtype=torch.float64)]
    mixed = sum(route.weights_TE[:, e : e + 1] * outputs[e] for e in range(E))
    torch.testing.assert_close(output, mixed, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("core_routing", [True, False])
def test_comol_drops_what_its_paper_drops(core_routing):
    adapter = make(CoMoL, CoMoLSettings(**{**MANY, "lora_dropout": 0.3}, core_routing=core_routing))
    x_TD = torch.randn(T, D, dtype=torch.float64)
    torch.manual_seed(3)
    output, _ = run(adapter, x_TD)
    torch.manual_seed(3)
    torch.testing.assert_close(output, reference_lora.comol(adapter, x_TD), rtol=1e-11, atol=1e-11)
    adapter.eval()
    torch.testing.assert_close(run(adapter, x_TD)[0], reference_lora.comol(adapter, x_TD), rtol=1e-11, atol=1e-11)
    assert (run(adapter, x_TD)[0] - output).abs().max() > 0.1


@pytest.mark.parametrize("case", ["molora", "hydralora", "adamole", "comol reading x"])
def test_dropout_is_not_for_the_router(case):
    adapter_class, settings, _ = CASES[case]
    adapter = make(adapter_class, type(settings)(**{**vars(settings), "lora_dropout": 0.5}))
    x_TD = torch.randn(T, D, dtype=torch.float64)
    output, route = run(adapter, x_TD)
    adapter.eval()
    still, right = run(adapter, x_TD)
    torch.testing.assert_close(route.weights_TE, right.weights_TE)
    assert (output - still).abs().max() > 0.1


def test_mix_lora_is_a_sum_over_experts():
    x_TD, weights_TE = torch.randn(T, D), torch.randn(T, E)
    down_ERD, up_OER = torch.randn(E, R, D), torch.randn(O, E, R)
    expected = sum(weights_TE[:, e : e + 1] * (x_TD @ down_ERD[e].T @ up_OER[:, e].T) for e in range(E))
    torch.testing.assert_close(mix_lora(x_TD, down_ERD, up_OER, weights_TE), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("sizes", [(R, D), (O, R)])
def test_a_narrow_product_is_linear(sizes, autocast):
    dtype = torch.float32 if autocast else torch.bfloat16
    weight_OI = torch.randn(sizes).bfloat16().to(dtype).requires_grad_()
    x_TI = torch.randn(T, sizes[1]).bfloat16().to(dtype).requires_grad_()
    grad_TO = torch.randn(T, sizes[0]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = narrow_linear(x_TI, weight_OI)
    wide = [tensor.detach().double().requires_grad_() for tensor in (x_TI, weight_OI)]
    expected = torch.nn.functional.linear(*wide)
    torch.testing.assert_close(output, expected.bfloat16())
    grads = torch.autograd.grad(output, (x_TI, weight_OI), grad_TO)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, wide, grad_TO.double()), strict=True):
        torch.testing.assert_close(ours, theirs.bfloat16().to(dtype))


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_narrow_product_needs_no_gradient_of_what_is_frozen(frozen):
    tensors = [torch.randn(T, D).bfloat16(), torch.randn(R, D).bfloat16()]
    tensors[1 - frozen].requires_grad_()
    narrow_linear(*tensors).sum().backward()
    assert tensors[frozen].grad is None and tensors[1 - frozen].grad.any()


def test_a_router_without_gradient_is_as_exact():
    x_TD, router_ED = torch.randn(300, D).bfloat16(), torch.randn(E, D)
    with torch.no_grad():
        logits_TE = router_logits(x_TD, router_ED)
    torch.testing.assert_close(logits_TE, x_TD.float() @ router_ED.T, rtol=1e-5, atol=1e-5)
    assert logits_TE.is_contiguous()
