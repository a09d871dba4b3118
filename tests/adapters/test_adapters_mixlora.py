"""MixLoRA against the loop, at the start, under gradient checkpointing, and written out as a native MoE."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

from modmoe.adapters.mechanism.attach import Site, attach, detach
from modmoe.adapters.mechanism.targets import measure
from modmoe.adapters.methods.mixlora import MixLoRA, MixLoRASettings
from modmoe.errors import ExportError
from modmoe.formats.native.mixlora import base_weights, expand_mixlora
from modmoe.storage.checkpoint import Checkpoint, CheckpointWriter
from tests import reference_mixlora
from tests.support.tiny import dense_config, dense_model, token_ids

# D = 20, F = 29, R = 3, E = 5: nothing divides anything
AWKWARD = {"hidden_size": 20, "intermediate_size": 29, "head_dim": 6, "num_attention_heads": 4}
MODELS = [("llama", {}), ("llama", {"mlp_bias": False, "attention_bias": True}), ("qwen3", {})]


def settings(**changes):
    return MixLoRASettings(**{"r": 3, "num_experts": 5, "lora_dropout": 0.0, **changes})


def attached(model_type="llama", *, seed=3, filled=True, changes=None, **choices):
    """Return a tiny model with MixLoRA at every layer, and the adapters, with random values where ``filled``."""
    model = dense_model(model_type, **(changes or {}))
    attach(model, MixLoRA, settings(**choices))
    model.requires_grad_(False)
    torch.manual_seed(seed)
    adapters = adapters_of(model)
    for adapter in adapters:
        adapter.requires_grad_(True)
        for parameter in adapter.parameters() if filled else ():
            nn.init.normal_(parameter, std=0.3)
    return model, adapters


def adapters_of(model):
    return [site.adapters["default"] for site in model.modules() if isinstance(site, Site)]


def gradients(output, wanted):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).to(output.dtype)
    return torch.autograd.grad((output * weights).sum(), wanted, allow_unused=True)


@pytest.mark.parametrize("top_k", [2, 3])
@pytest.mark.parametrize(("model_type", "changes"), MODELS)
def test_ffn_and_attention_equal_the_loop_outputs_and_gradients(model_type, changes, top_k):
    model, adapters = attached(model_type, changes={**AWKWARD, **changes}, top_k=top_k)
    model.double()
    plain = copy.deepcopy(model)
    detach(plain)
    layer, base, adapter = model.model.layers[1], plain.model.layers[1], adapters[1]
    torch.manual_seed(7)
    x_TD = torch.randn(13, 20, dtype=torch.float64, requires_grad=True)
    named = dict(adapter.named_parameters())
    found, wanted = layer.mlp(x_TD), reference_mixlora.ffn(adapter, base.mlp, x_TD)
    assert (found - base.mlp(x_TD)).abs().max() > 0.1
    torch.testing.assert_close(found, wanted)
    inside = [value for name, value in named.items() if "proj" not in name]
    for have, want in zip(gradients(found, [x_TD, *inside]), gradients(wanted, [x_TD, *inside]), strict=True):
        assert have.abs().max() > 0
        torch.testing.assert_close(have, want)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        projection = getattr(layer.self_attn, name)
        z_TD = torch.randn(13, projection.in_features, dtype=torch.float64, requires_grad=True)
        found = projection(z_TD)
        wanted = reference_mixlora.linear(adapter, name, getattr(base.self_attn, name), z_TD)
        torch.testing.assert_close(found, wanted)
        pair = [z_TD, named[f"{name}_a_RD"], named[f"{name}_b_OR"]]
        torch.testing.assert_close(gradients(found, pair), gradients(wanted, pair))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2"])
def test_the_start_is_the_base_model_to_the_bit(model_type, dtype):
    model, ids = dense_model(model_type).to(dtype), token_ids()
    wanted = model(ids).logits
    attach(model, MixLoRA, MixLoRASettings())
    assert all(parameter.dtype == torch.float32 for adapter in adapters_of(model) for parameter in adapter.parameters())
    for is_training in (False, True):
        assert torch.equal(model.train(is_training)(ids).logits, wanted)
    for adapter in adapters_of(model):
        nn.init.normal_(adapter.down_b_DER)
    assert not torch.equal(model(ids).logits, wanted)
    assert all(route.probs_TE.dtype == torch.float32 for route in model.routed_context.run.routes)


def test_the_start_is_the_base_model_under_autocast():
    model, ids = dense_model("llama"), token_ids()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wanted = model(ids).logits
        attach(model, MixLoRA, MixLoRASettings())
        assert torch.equal(model.train()(ids).logits, wanted)
    assert all(route.logits_TE.dtype == torch.float32 for route in model.routed_context.run.routes)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient_and_records_once(is_reentrant):
    ids, found = token_ids(), []
    balance_weight = 0.0 if is_reentrant else 1.0  # the older kind runs first without gradient, where no loss can hang
    for is_checkpointed in (False, True):
        model, adapters = attached(lora_dropout=0.2, balance_weight=balance_weight)
        if is_checkpointed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": is_reentrant})
            model.enable_input_require_grads()
        model.train()
        torch.manual_seed(11)
        model(ids, labels=ids).loss.backward()
        assert len(model.routed_context.run.routes) == len(adapters)
        found.append([parameter.grad for adapter in adapters for parameter in adapter.parameters()])
    for plain, again in zip(*found, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(plain, again)


@pytest.mark.parametrize("is_reentrant", [False, True])
def test_a_router_moved_before_the_backward_pass_does_not_change_the_experts_chosen(is_reentrant):
    model, adapters = attached(lora_dropout=0.0, balance_weight=0.0)
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": is_reentrant})
    model.enable_input_require_grads()
    loss = model.train()(token_ids(1, 1)).logits.square().sum()
    chosen = [route.chosen_TE[0] for route in model.routed_context.run.routes]
    for adapter in adapters:
        adapter.router_ED.data.neg_()  # the least likely expert is now the likeliest
    loss.backward()
    for adapter, chosen_E in zip(adapters, chosen, strict=True):
        assert chosen_E.sum() == 2
        assert torch.equal(adapter.gate_a_ERD.grad.abs().amax((1, 2)) > 0, chosen_E)


def test_an_expert_without_tokens_gets_a_gradient_of_zero():
    model, adapters = attached()
    model(token_ids(1, 1)).logits.square().sum().backward()
    for adapter, route in zip(adapters, model.routed_context.run.routes, strict=True):
        for name, dim in (("gate_a_ERD", 0), ("up_a_ERD", 0), ("down_a_ERF", 0), ("gate_b_FER", 1), ("down_b_DER", 1)):
            grad = getattr(adapter, name).grad.movedim(dim, 0).flatten(1)
            assert torch.equal(grad.abs().amax(1) > 0, route.chosen_TE[0])


def test_a_router_of_one_expert_a_token_learns():
    model, adapters = attached(top_k=1, balance_weight=0.0)
    model(token_ids()).logits.square().sum().backward()
    for adapter, route in zip(adapters, model.routed_context.run.routes, strict=True):
        # of the others' size: a weight that is renormalised to 1 leaves rounding alone
        assert adapter.router_ED.grad.abs().max() > 1e-3 * adapter.gate_a_ERD.grad.abs().max()
        assert torch.equal(route.weights_TE.sum(-1), torch.ones(len(route.weights_TE)))


def test_the_balance_loss_reaches_every_router_from_the_start():
    model, adapters = attached(filled=False, balance_weight=0.5)
    ids = token_ids()
    output = model.train()(ids, labels=ids)
    routes = model.routed_context.run.routes
    by_hand = [5 * (r.chosen_TE.float().mean(0) / 2 * r.probs_TE.mean(0)).sum() for r in routes]
    torch.testing.assert_close(model.routed_context.loss, 0.5 * torch.stack(by_hand).mean())
    output.loss.backward()
    assert all(adapter.router_ED.grad.abs().max() > 0 for adapter in adapters)


@pytest.mark.parametrize(
    ("names", "parameters"),
    [(("q_proj", "k_proj", "v_proj", "o_proj"), 203_423_744), (("q_proj", "v_proj"), 195_035_136)],
)
def test_llama2_7b_has_the_papers_parameters(names, parameters):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers.LlamaConfig())
    chosen = MixLoRASettings(r=16, num_experts=8, attention_modules=names)
    count = 0
    for layer in range(32):
        path = f"model.layers.{layer}"
        shapes = MixLoRA.shapes(chosen, measure(model, model.get_submodule(path), path, MixLoRA))
        count += sum(torch.Size(shape).numel() for shape in shapes.values())
    assert count == parameters


def test_without_attention_modules_the_attention_is_left_alone():
    model, adapters = attached(attention_modules=[])
    plain = copy.deepcopy(model)
    detach(plain)
    assert not any("proj" in name for name, _ in adapters[0].named_parameters())
    z_TD = torch.randn(4, 32)
    assert torch.equal(model.model.layers[0].self_attn.q_proj(z_TD), plain.model.layers[0].self_attn.q_proj(z_TD))


def test_a_copy_is_a_model_of_its_own():
    model, _ = attached()
    ids = token_ids()
    wanted = model(ids).logits
    new = copy.deepcopy(model)
    assert torch.equal(new(ids).logits, wanted)
    for adapter in adapters_of(new):
        for parameter in adapter.parameters():
            nn.init.zeros_(parameter)
    assert torch.equal(model(ids).logits, wanted)
    assert not torch.equal(new(ids).logits, wanted)


def test_detaching_leaves_the_base_model():
    model, _ = attached()
    plain = dense_model("llama")
    detach(model)
    ids = token_ids()
    assert torch.equal(model(ids).logits, plain(ids).logits)
    assert not any("routed" in name for name, _ in model.named_modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_two_adapters_cannot_run_at_once():
    model, _ = attached()
    attach(model, MixLoRA, settings(), name="second")
    with pytest.raises(ValueError, match=r"model\.layers\.0: several mixlora adapters are active; choose one"):
        model(token_ids())


def test_a_projection_replaced_afterwards_does_not_switch_the_experts_off_in_silence():
    model, _ = attached()
    model.model.layers[1].mlp.gate_proj = copy.deepcopy(dense_model("llama").model.layers[1].mlp.gate_proj)
    with pytest.raises(RuntimeError, match=r"model\.layers\.1: mlp\.gate_proj or up_proj was replaced"):
        model(token_ids())


@pytest.mark.parametrize(
    ("model_type", "changes", "said"),
    [
        ("phi3", {}, "mixlora at model.layers.0: mixlora needs a dense FFN, 'mlp', with gate_proj, up_proj"),
        ("llama", {"attention_modules": ["qkv_proj"]}, "'qkv_proj' is not in this attention; it has q_proj, k_proj"),
        ("llama", {"attention_modules": "q_proj"}, "write a list"),
        ("llama", {"top_k": 6}, "top_k: 6 is more than the 5 experts"),
    ],
)
def test_what_does_not_fit_is_refused(model_type, changes, said):
    with pytest.raises(ValueError) as caught:
        attach(dense_model(model_type), MixLoRA, settings(**changes))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_moe_block_is_refused():
    config = transformers.MixtralConfig(**dense_config("mistral").to_dict() | {"num_local_experts": 4})
    with pytest.raises(ValueError, match="needs a dense FFN"):
        attach(AutoModelForCausalLM.from_config(config), MixLoRA, settings())


EXPANDED = [
    ("llama", {"mlp_bias": False, "head_dim": 12}, "mixtral"),
    ("mistral", {}, "mixtral"),
    ("qwen3", {"head_dim": 12}, "qwen3_moe"),
    ("qwen3", {"tie_word_embeddings": True, "attention_bias": True}, "qwen3_moe"),
]


def written(plan, model, directory):
    writer = CheckpointWriter(directory)
    plan.run(base_weights(model), writer)
    writer.finish(plan.config)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        directory, experts_implementation="eager", output_loading_info=True
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize(("model_type", "changes", "target"), EXPANDED)
def test_the_expansion_reloaded_by_transformers_computes_the_same(model_type, changes, target, top_k, tmp_path):
    model, _ = attached(model_type, changes=changes, top_k=top_k)
    ids = token_ids(3, 40)  # longer than Mistral's window
    with torch.no_grad():
        wanted = model(ids).logits
        loaded = written(expand_mixlora(model), model, tmp_path)
        found = loaded(ids).logits
        detach(model)
        plain = model(ids).logits
    assert loaded.config.model_type == target
    assert loaded.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert ("lm_head.weight" in Checkpoint(tmp_path)) != model.config.tie_word_embeddings
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() <= 1e-4 * scale
    assert (plain - wanted).abs().max() > 0.05 * scale


def test_the_expansion_is_for_the_program_that_will_run_it(tmp_path):
    """Engines that are not known to tie the output matrix get it; llama.cpp has no dense layers beside experts."""
    model, _ = attached("qwen3", changes={"tie_word_embeddings": True})
    assert "lm_head.weight" not in expand_mixlora(model, client="llama.cpp").ops
    plan = expand_mixlora(model, client="sglang")
    assert plan.config["tie_word_embeddings"] is False
    loaded = written(plan, model, tmp_path)
    assert torch.equal(loaded.lm_head.weight, model.model.embed_tokens.weight)
    detach(model)
    attach(model, MixLoRA, settings(), layers=[1])
    with pytest.raises(ExportError, match="layers without experts"):
        expand_mixlora(model, client="llama.cpp")


def test_layers_without_the_adapter_stay_dense_where_the_target_can(tmp_path):
    model = dense_model("qwen3")
    attach(model, MixLoRA, settings(attention_modules=["q_proj"]), layers=[1])
    for parameter in adapters_of(model)[0].parameters():
        nn.init.normal_(parameter, std=0.3)
    loaded, ids = written(expand_mixlora(model), model, tmp_path), token_ids()
    assert loaded.config.mlp_only_layers == [0]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_expansion_is_made_a_tensor_at_a_time_and_written_in_one_type(tmp_path):
    model, adapters = attached("mistral")
    model.to(torch.bfloat16)
    for adapter in adapters:
        adapter.float()
    plan = expand_mixlora(model, dtype=torch.float16)
    held = [op for op in plan.ops.values() if not op.inputs]
    assert sum(op.value.numel() for op in held) == sum(adapter.router_ED.numel() for adapter in adapters)
    written(plan, model, tmp_path)
    made = Checkpoint(tmp_path)
    assert {made.dtype(name) for name in made} == {torch.float16} and made.config["dtype"] == "float16"
    name = "model.layers.1.block_sparse_moe.experts.4.w2.weight"
    weight = model.model.layers[1].mlp.down_proj.weight.float()
    assert torch.equal(made[name], (weight + adapters[1].weight_change("down_proj", 4)).to(torch.float16))
    assert {str(op.make(base_weights(model)).dtype) for op in expand_mixlora(model).ops.values()} == {"torch.bfloat16"}


@pytest.mark.parametrize(
    ("model_type", "changes", "layers", "options", "said"),
    [
        ("llama", {}, None, {}, "mixtral can't hold biases in the FFN (model.layers.0.mlp.gate_proj.bias)."),
        ("llama", {"mlp_bias": False, "attention_bias": True}, None, {}, "mixtral can't hold biases in the attention"),
        ("llama", {"mlp_bias": False}, [1], {}, "layers without experts (0)"),
        ("qwen2", {}, None, {}, "no target continues a 'qwen2' model; there is mixtral for llama and mistral"),
        ("qwen3", {}, None, {"target": "mixtral"}, "mixtral does not continue a 'qwen3' model"),
        ("qwen3", {}, None, {"target": "mixtrl"}, "Did you mean 'mixtral'?"),
        ("qwen3", {}, None, {"name": "defalt"}, "Did you mean 'default'?"),
        (
            "qwen3",
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
            None,
            {},
            "layers of several kinds of attention (full_attention, sliding_attention)",
        ),
    ],
)
def test_what_the_target_cannot_hold_is_refused(model_type, changes, layers, options, said):
    model = dense_model(model_type, **changes)
    attach(model, MixLoRA, settings(), layers=layers)
    with pytest.raises(ExportError) as caught:
        expand_mixlora(model, **options)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_model_without_the_adapter_or_not_in_memory_is_refused():
    with pytest.raises(ExportError, match="has no MixLoRA adapter"):
        expand_mixlora(dense_model("mistral"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(dense_config("mistral"))
        attach(model, MixLoRA, settings())
    with pytest.raises(ExportError, match="not in memory"):
        expand_mixlora(model)
