"""MoA: whole models against a layer written as loops, the prefix against what attention sees, thresholds, copies."""

# Shapes: B batch, T tokens, E adapter types, H heads, C head width

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache

from modmoe.adapters.mechanism.attach import CONTEXT, add_adapter, attach, detach
from modmoe.adapters.mechanism.base import SiteShape
from modmoe.adapters.mechanism.targets import measure
from modmoe.adapters.methods.moa import TYPES, MoA, SoftMoA, SoftMoASettings, SparseMoA, SparseMoASettings
from modmoe.adapters.methods.moa_prefix import AttentionPrefix
from tests import reference_moa
from tests.reference_moa import CASES, adapters_of, base, grads, made, randomise
from tests.support.tiny import token_ids


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral", "olmoe", "olmoe_clipped"])
def test_a_model_equals_the_loop(name: str, case: str) -> None:
    model = made(name, case)
    adapters, ids_BT = adapters_of(model), token_ids(2, 7)
    weight_BTV = torch.randn(2, 7, model.config.vocab_size, generator=torch.Generator().manual_seed(3)).double()
    ours, theirs = model(ids_BT).logits, reference_moa.logits(model, adapters, ids_BT)
    routes = model.routed_context.run.routes
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-5)
    found, expected = (grads((logits * weight_BTV).sum(), adapters) for logits in (ours, theirs))
    assert len(found) > 2 * 4
    for key, grad in found.items():
        other = expected[key]
        assert grad is not None, key
        other = torch.zeros_like(grad) if other is None else other
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4 * float(1 + other.abs().max()), msg=key)
    assert [route.site for route in routes] == ["model.layers.0", "model.layers.1"]
    # what the reports read is what was computed
    x_TD = model.model.embed_tokens(ids_BT[0])
    if adapters[0].settings.router_input == "norm":
        x_TD = model.model.layers[0].input_layernorm(x_TD)
    for t, read_D in enumerate(reference_moa.features(adapters[0], x_TD)):
        weights, chosen_E = reference_moa.weights(adapters[0], read_D)
        expected_E = torch.stack([*weights.values()]).double()
        torch.testing.assert_close(routes[0].weights_TE[t].double(), expected_E, rtol=1e-5, atol=1e-5)
        assert routes[0].chosen_TE[t].tolist() == chosen_E.tolist()


def test_thresholds_cut_some_types_off_and_keep_others() -> None:
    model = made("llama", "sparse")
    model(token_ids(2, 13))
    for route in model.routed_context.run.routes:
        assert 0.1 < route.chosen_TE.double().mean() < 0.9
        assert not torch.equal(route.chosen_TE, route.chosen_TE[:1].expand_as(route.chosen_TE))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "gemma2", "gemma3_text", "mixtral", "olmoe"])
def test_the_start_is_the_base_model_bit_for_bit(name: str, case: str) -> None:
    model, ids_BT = base(name), token_ids()
    before = model(ids_BT).logits
    attach(model, *CASES[case])
    assert torch.equal(model(ids_BT).logits, before)
    randomise(model)
    assert not torch.equal(model(ids_BT).logits, before)
    detach(model)
    assert torch.equal(model(ids_BT).logits, before)
    assert not any("routed" in key or "modmoe" in key for key in model.state_dict())
    hooks = [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]
    assert not hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_type_is_zero_at_the_start_alone_and_learns(dtype: torch.dtype) -> None:
    for name in TYPES:
        model, ids_BT = base("qwen3").to(dtype).requires_grad_(False), token_ids()
        before = model(ids_BT).logits
        attach(model, SoftMoA, SoftMoASettings(adapters=(name,)))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=False):
            out = model(ids_BT, labels=ids_BT)
        assert torch.equal(out.logits, before)
        assert model.routed_context.run.routes[0].weights_TE.dtype == torch.float32
        found = grads(out.loss, adapters_of(model))
        at_start = [key for key, grad in found.items() if grad is not None and bool((grad != 0).any())]
        assert at_start, name
        assert all(".up_" in key or "prompt_gate" in key for key in at_start)


def test_the_start_is_the_base_model_under_autocast() -> None:
    model, ids_BT = base("qwen3").requires_grad_(False), token_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = model(ids_BT).logits
        attach(model, *CASES["soft"])
        out = model(ids_BT, labels=ids_BT)
    assert torch.equal(out.logits, before)
    assert model.routed_context.run.routes[0].logits_TE.dtype == torch.float32
    assert all(grad is not None for grad in grads(out.loss, adapters_of(model)).values())


@pytest.mark.parametrize(
    "name",
    ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "mixtral", "olmoe_clipped", "smollm3", "glm4"],
)
def test_the_prefix_reads_the_query_that_attention_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name, "soft", attn_implementation="eager")
    seen: list[Tensor] = []
    kept: list[Tensor] = []
    modeling = sys.modules[type(model.model.layers[0].self_attn).__module__]
    attention, prefix = modeling.eager_attention_forward, AttentionPrefix.prefix

    def spy(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.append(query.transpose(1, 2))
        return attention(module, query, *args, **kwargs)

    def keep(self: Any, adapter: Any, query_BTHC: Tensor) -> Tensor:
        kept.append(query_BTHC)
        return prefix(self, adapter, query_BTHC)

    monkeypatch.setattr(modeling, "eager_attention_forward", spy)
    monkeypatch.setattr(AttentionPrefix, "prefix", keep)
    model(token_ids(2, 4))  # as many tokens as heads
    assert len(seen) == len(kept) == 2
    for theirs, ours in zip(seen, kept, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_the_model_with_a_cache_equals_the_model_without() -> None:
    model, ids_BT = made("qwen3"), token_ids(2, 9)
    whole = model(ids_BT).logits
    cache = DynamicCache(config=model.config)
    parts = [model(ids_BT[:, a:b], past_key_values=cache).logits for a, b in ((0, 5), (5, 8), (8, 9))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-6, atol=1e-6)


def test_types_without_a_place_are_left_out_and_refused_by_name() -> None:
    model = base("mixtral")
    attach(model, SoftMoA, SoftMoASettings())
    assert adapters_of(model)[0].types == tuple(name for name in TYPES if name != "down_proj")
    with pytest.raises(ValueError, match=r"model\.layers\.0: adapters: .*no place for 'down_proj'"):
        attach(base("mixtral"), SoftMoA, SoftMoASettings(adapters=("down_proj",)))
    # fused projections: no query to read
    phi3 = base("phi3")
    attach(phi3, SoftMoA, SoftMoASettings())
    assert adapters_of(phi3)[0].types == ("o_proj", "down_proj", "parallel")
    assert torch.isfinite(randomise(phi3)(token_ids()).logits).all()
    opt = base("opt")
    attach(opt, SoftMoA, SoftMoASettings())
    assert adapters_of(opt)[0].types == ("q_proj", "k_proj", "v_proj")
    sparse = base("llama")
    attach(sparse, SparseMoA, SparseMoASettings())
    assert adapters_of(sparse)[0].types == TYPES[:-1]
    # a list, as it is read from a file, and in any order
    attach(model := base("llama"), SparseMoA, SparseMoASettings(adapters=["prompt", "q_proj"]))  # type: ignore[arg-type]
    assert adapters_of(model)[0].types == ("q_proj", "prompt")


@pytest.mark.parametrize(
    ("method", "changes", "words"),
    [
        (SoftMoA, {"r": 0}, "r: 0"),
        (SoftMoA, {"adapters": ("gate_proj",)}, "adapters: no type 'gate_proj'"),
        (SoftMoA, {"adapters": ()}, "adapters: none named"),
        (SoftMoA, {"bottleneck_size": 0}, "bottleneck_size: 0"),
        (SoftMoA, {"num_virtual_tokens": True}, "num_virtual_tokens: True"),
        (SoftMoA, {"router_width": -1}, "router_width: -1"),
        (SoftMoA, {"router_input": "x"}, "router_input: 'x' is none of layer, norm"),
        (SoftMoA, {"routing": "task"}, "routing: 'task'"),
        (SoftMoA, {"routing_chunk": 0}, "routing_chunk: 0"),
        (SparseMoA, {"threshold_weight": "soft"}, "threshold_weight: 'soft'"),
        (SparseMoA, {"const_threshold": 1.5}, "const_threshold: 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused(method: Any, changes: dict[str, Any], words: str) -> None:
    kind = SoftMoASettings if method is SoftMoA else SparseMoASettings
    with pytest.raises(ValueError, match=words):
        attach(base("llama"), method, kind(**changes))


def test_the_released_threshold_has_no_gradient_and_ours_has() -> None:
    sizes = {}
    for way in ("raw", "minus_tau", "straight_through"):
        model = base("llama").requires_grad_(False)
        attach(model, SparseMoA, SparseMoASettings(threshold_weight=way))  # type: ignore[arg-type]
        for adapter in adapters_of(model):
            for name in ("q_proj", "down_proj"):
                torch.nn.init.normal_(getattr(adapter, f"up_{name}_OR"), std=0.1)
        ids_BT = token_ids()
        found = grads(model(ids_BT, labels=ids_BT).loss, adapters_of(model))
        sizes[way] = min(float(grad.abs().max()) for key, grad in found.items() if "threshold" in key)
    assert sizes["raw"] == 0
    assert sizes["minus_tau"] > 1e-6
    assert sizes["straight_through"] > 1e-6


def test_a_type_that_was_cut_off_can_come_back() -> None:
    """Through its threshold, and through its own weight: raw and minus_tau give neither a gradient."""
    alive = {}
    for way in ("raw", "minus_tau", "straight_through"):
        settings = SparseMoASettings(threshold_weight=way, router_width=0, adapters=("q_proj",))  # type: ignore[arg-type]
        model = base("llama").requires_grad_(False)
        attach(model, SparseMoA, settings)
        for adapter in adapters_of(model):
            torch.nn.init.normal_(adapter.up_q_proj_OR, std=0.1)
            torch.nn.init.constant_(adapter.router_bias_E, -3.0)
            torch.nn.init.zeros_(adapter.router_ED)
            torch.nn.init.zeros_(adapter.threshold_1D)
        ids_BT = token_ids()
        found = grads(model(ids_BT, labels=ids_BT).loss, adapters_of(model))
        assert not any(route.chosen_TE.any() for route in model.routed_context.run.routes)
        alive[way] = any(bool((grad != 0).any()) for key, grad in found.items() if "router_bias" in key)
    assert alive == {"raw": False, "minus_tau": False, "straight_through": True}


SIZES = {
    "Llama-3.1-8B": ("LlamaConfig", 4096, 14336, 32, 8, 32, {}),
    "Qwen3-8B": ("Qwen3Config", 4096, 12288, 32, 8, 36, {"head_dim": 128}),
    "Qwen3-14B": ("Qwen3Config", 5120, 17408, 40, 8, 40, {"head_dim": 128}),
}


@pytest.mark.parametrize(
    ("size", "method", "millions"),
    [
        ("Llama-3.1-8B", SoftMoA, 24.52),
        ("Llama-3.1-8B", SparseMoA, 22.29),
        ("Qwen3-8B", SoftMoA, 27.00),
        ("Qwen3-8B", SparseMoA, 24.49),
        ("Qwen3-14B", SparseMoA, 34.50),
    ],
)
def test_published_parameter_counts(size: str, method: Any, millions: float) -> None:
    kind, width, inner, heads, key_heads, layers, more = SIZES[size]
    config = getattr(transformers, kind)(
        hidden_size=width,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        num_hidden_layers=1,
        vocab_size=8,
        pad_token_id=0,
        **more,
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = measure(model, model.model.layers[0], "model.layers.0", method)
    settings = SoftMoASettings() if method is SoftMoA else SparseMoASettings()
    shapes = method.shapes(settings, shape)
    total = layers * sum(torch.Size(each).numel() for each in shapes.values())
    assert round(total / 1e6, 2) == millions
    # the formula for a layer, with T types, b = 16 and P = 10
    types, kv = (7 if method is SoftMoA else 6), key_heads * 128
    formula = 8 * (width + width + 2 * (width + kv) + 2 * width + inner + width) + 2 * width * 16 + 16 + width
    formula += 2 * (4 * types * width + 4 * types) + 4 * types * types + types
    formula += 10 * width + heads if method is SoftMoA else width + 1
    assert total == layers * formula
    # nothing but sizes is needed
    by_hand = SiteShape(inputs=width, outputs=width, parts=dict(shape.parts), num_heads=heads, head_dim=128)
    assert method.shapes(settings, by_hand) == shapes
    with torch.device("meta"):
        assert {name: tuple(p.shape) for name, p in method(settings, by_hand).named_parameters()} == shapes


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("case", ["soft", "soft, normed", "soft, instance", "sparse"])
@pytest.mark.parametrize("name", ["qwen3", "mixtral"])
def test_checkpointing_gives_equal_gradients(name: str, case: str, reentrant: bool) -> None:
    model, ids_BT = made(name, case).train(), token_ids()
    if reentrant:
        model.enable_input_require_grads()
    expected = grads(model(ids_BT, labels=ids_BT, use_cache=False).loss, adapters_of(model))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    loss = model(ids_BT, labels=ids_BT, use_cache=False).loss
    # a pass in between changes what the context follows, not what is computed again
    routes = len(model.routed_context.run.routes)
    model(token_ids(1, 7, seed=5), use_cache=False)
    loss.backward()
    assert routes == 2
    assert len(model.routed_context.run.routes) == 2
    for i, adapter in enumerate(adapters_of(model)):
        for key, weight in adapter.named_parameters():
            assert weight.grad is not None, key
            torch.testing.assert_close(weight.grad, expected[f"{i}.{key}"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["soft", "soft, normed", "sparse, constant"])
def test_frames_keep_no_activations(case: str) -> None:
    model = made("qwen3", case)
    model(token_ids(2, 13))
    for frame in getattr(model, CONTEXT)._here.frames.values():
        # the weights alone, so that checkpointing saves memory
        kept = [value for value in frame.values.values() if isinstance(value, Tensor)]
        assert {tuple(value.shape) for value in kept} <= {(26, len(adapters_of(model)[0].types))}
        assert len(frame.values) <= 1


@pytest.mark.parametrize("case", ["soft, normed", "sparse, constant"])
def test_a_copy_computes_the_same_and_is_its_own(case: str) -> None:
    model, ids_BT = made("qwen3", case), token_ids()
    twin = copy.deepcopy(model)
    before = model(ids_BT).logits
    assert torch.equal(twin(ids_BT).logits, before)
    with torch.no_grad():
        for adapter in adapters_of(twin):
            adapter.up_q_proj_OR.mul_(2)
            adapter.prompt_gate_H.mul_(2)
    changed = twin(ids_BT).logits
    assert not torch.allclose(changed, before)
    assert torch.equal(model(ids_BT).logits, before)
    detach(model)
    assert torch.equal(twin(ids_BT).logits, changed)
    detach(twin)
    assert torch.equal(twin(ids_BT).logits, model(ids_BT).logits)


def test_adapters_are_looked_up_when_the_layer_runs() -> None:
    model, ids_BT = base("llama").requires_grad_(False), token_ids()
    plain = model(ids_BT).logits
    attach(model, *CASES["soft"], name="one")
    randomise(model)
    one = model(ids_BT).logits
    for layer in range(2):
        site = model.model.layers[layer].routed_soft_moa
        add_adapter(site, model, f"model.layers.{layer}", CASES["soft, normed"][1], "two")
    assert torch.equal(model(ids_BT).logits, one)
    randomise(model, seed=7)
    both = model(ids_BT).logits
    assert len(model.routed_context.run.routes) == 4
    sites = [model.model.layers[layer].routed_soft_moa for layer in range(2)]
    taken = [site.adapters.pop("one") for site in sites]
    two = model(ids_BT).logits
    # order does not count, and each has its own weights
    for site, adapter in zip(sites, taken, strict=True):
        site.adapters["one"] = adapter
    torch.testing.assert_close(model(ids_BT).logits, both, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(two, both)
    for site in sites:
        site.adapters.clear()
    assert torch.equal(model(ids_BT).logits, plain)
    # the other form at the same layers keeps to itself
    attach(model, *CASES["sparse, constant"])
    assert torch.equal(model(ids_BT).logits, plain)


def test_jitter_does_not_reach_the_parallel_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids_BT = made("mixtral", router_jitter_noise=0.5).train(), token_ids()
    seen: list[Tensor] = []
    normed: list[Tensor] = []
    parallel = MoA.parallel
    monkeypatch.setattr(MoA, "parallel", lambda self, x, frame: (seen.append(x), parallel(self, x, frame))[1])
    norm = model.model.layers[0].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, output: normed.append(output.clone()))
    model(ids_BT, labels=ids_BT).loss.backward()
    torch.testing.assert_close(seen[0], normed[0].reshape(seen[0].shape), rtol=0, atol=0)


def test_the_router_needs_the_norm_that_it_reads() -> None:
    model = base("llama")
    attach(model, *CASES["soft, normed"])
    with pytest.raises(RuntimeError, match="no input_layernorm first"):
        model.model.layers[0].self_attn.q_proj(torch.zeros(1, 2, 32))


def test_the_prompt_needs_a_query() -> None:
    model = base("llama")
    attach(model, *CASES["soft"])
    with pytest.raises(RuntimeError, match="q_proj"):
        model.model.layers[0].self_attn.o_proj(torch.zeros(1, 2, 32))
