"""What one call says holds for that call: in threads, in recomputed layers, and however a prompt comes in."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, StaticCache

from modmoe.modeling import routing_modmoe
from tests.support.packed_models import load_both, write_packed
from tests.support.planned import load_pair, write_tied
from tests.support.tiny import token_ids

ROUTINGS = ("token", "sequence", "task")
SETTINGS = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 258, "eos_token_id": None}
PROMPTS = [token_ids(1, length, seed=length) for length in (5, 6, 9, 11, 14, 17)]


@pytest.fixture(scope="module", params=ROUTINGS)
def routed(request, tmp_path_factory):
    return load_pair(tmp_path_factory.mktemp("routed"), routing=request.param, routing_chunk=4, means=True)[1]


@pytest.fixture(scope="module")
def sequence(tmp_path_factory):
    return load_pair(tmp_path_factory.mktemp("sequence"), routing="sequence", routing_chunk=4)[1]


def named(model, *experts: int) -> dict:
    return {"expert_ids": torch.tensor(experts)} if model.config.routing == "task" else {}


def generate(model, ids, **more):
    return model.generate(ids, attention_mask=torch.ones_like(ids), **{**SETTINGS, **more})


@pytest.fixture(scope="module")
def plain(sequence):
    return [generate(sequence, prompt) for prompt in PROMPTS]


def test_threads_know_nothing_of_each_other(routed):
    jobs = [(prompt, {"expert_ids": torch.tensor([number % 3])} if number % 2 else named(routed, number % 3))
            for number, prompt in enumerate(PROMPTS * 2)]  # fmt: skip
    alone = [generate(routed, prompt, **more) for prompt, more in jobs]
    logits = [routed(prompt, use_cache=False, **more).logits for prompt, more in jobs]
    found, passes = [None] * len(jobs), [None] * len(jobs)

    def work(first: int) -> None:
        for number in range(first, len(jobs), 3):
            prompt, more = jobs[number]
            found[number] = generate(routed, prompt, **more)
            passes[number] = routed(prompt, use_cache=False, **more).logits

    threads = [threading.Thread(target=work, args=(first,)) for first in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(one, other) for one, other in zip(found, alone, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(passes, logits, strict=True))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("is_reentrant", [False, True])
def test_recomputed_layers_are_in_their_own_call(routed, is_reentrant):
    """Two calls whose gradients are still to come, of other experts and other padding, and a third between."""
    ids, grads = token_ids(2, 9), []
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for is_checkpointed in (False, True):
        model = copy.deepcopy(routed).train()
        if is_checkpointed:
            model.activation_checkpointing_enable({"use_reentrant": is_reentrant})
            model.enable_input_require_grads()
        first = model(ids, labels=ids, attention_mask=mask, use_cache=False, expert_ids=torch.tensor([0, 2])).loss
        second = model(ids.flip(0), labels=ids, use_cache=False, **named(model, 1, 1)).loss
        with torch.no_grad():
            model(ids[:1, :4], use_cache=False, **named(model, 0))
        (first + second).backward()
        grads.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-9, atol=1e-12)


def test_layers_recomputed_by_other_means_are_right_or_refused(routed):
    ids, model = token_ids(2, 9), copy.deepcopy(routed).train()
    more = {"use_cache": False, "labels": ids, "expert_ids": torch.tensor([0, 2])}
    model(ids, **more).loss.backward()
    wanted = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    for layer in model.model.layers:
        forward = layer.forward
        layer.forward = lambda *args, forward=forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    model(ids, **more).loss.backward()
    found = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    first, second = model(ids, **more).loss, model(ids, **{**more, "expert_ids": torch.tensor([1, 1])}).loss
    with pytest.raises(RuntimeError, match="cannot be known which one"):
        (first + second).backward()


@pytest.mark.parametrize(
    "way",
    [
        {"prefill_chunk_size": 3},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"use_cache": False},
    ],
    ids=lambda way: next(iter(way)),
)
def test_a_sequence_router_reads_the_prompt_however_it_comes_in(sequence, plain, way):
    for prompt, wanted in zip(PROMPTS, plain, strict=True):
        assert torch.equal(generate(sequence, prompt, **way), wanted)


def test_assistants_and_embeddings_change_no_answer(sequence, plain, tmp_path):
    dense, other = load_pair(tmp_path, routing="sequence", routing_chunk=4, seed=3)
    for prompt, wanted in zip(PROMPTS, plain, strict=True):
        for assistant in (dense, other):
            assert torch.equal(generate(sequence, prompt, assistant_model=assistant), wanted)
        embeddings = sequence.get_input_embeddings()(prompt)
        mask = torch.ones_like(prompt)
        found = sequence.generate(inputs_embeds=embeddings, attention_mask=mask, **SETTINGS)
        assert torch.equal(found, wanted[:, prompt.shape[1] :])


@pytest.mark.parametrize("way", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}])
def test_padding_at_the_left_is_no_prompt(sequence, way):
    width = max(prompt.shape[1] for prompt in PROMPTS)
    rows = torch.cat([pad(prompt, (width - prompt.shape[1], 0), value=258) for prompt in PROMPTS])
    found = sequence.generate(rows, attention_mask=(rows != 258).long(), **SETTINGS, **way)[:, width:]
    for row, prompt in zip(found, PROMPTS, strict=True):
        assert torch.equal(row, generate(sequence, prompt, **way)[0, prompt.shape[1] :])


@torch.no_grad()
def test_a_mask_of_queries_and_keys_says_what_padding_is(sequence):
    """As callers with masks of their own pass it, with any cache; without one a prompt may be marked token by token."""
    ids, length = token_ids(2, 12), 5
    real = torch.ones_like(ids)
    real[0, :length] = 0
    positions = (real.cumsum(1) - 1).clamp_min(0)
    wanted = sequence(ids[:1, length:], use_cache=False).logits
    keys = (real[:, None, None, :] == 1) & torch.ones(12, 12, dtype=torch.bool).tril()
    for mask in (keys, torch.zeros_like(keys, dtype=torch.float64).masked_fill(~keys, torch.finfo(torch.float64).min)):
        for cache in (
            None,
            DynamicCache(config=sequence.config),
            StaticCache(config=sequence.config, max_cache_len=20),
        ):
            full = mask if not isinstance(cache, StaticCache) else pad(mask, (0, 8), value=mask[0, 0, 0, -1].item())
            found = sequence(ids, attention_mask=full, position_ids=positions, past_key_values=cache).logits
            torch.testing.assert_close(found[:1, length:], wanted, rtol=1e-6, atol=1e-6)


def test_a_second_turn_is_the_whole_conversation(sequence, plain):
    for prompt, first in zip(PROMPTS, plain, strict=True):
        cache = DynamicCache(config=sequence.config)
        assert torch.equal(generate(sequence, prompt, past_key_values=cache), first)
        second = torch.cat([first, token_ids(1, 5, seed=prompt.shape[1])], 1)
        wanted = generate(sequence, second)
        assert torch.equal(generate(sequence, second, past_key_values=cache), wanted)
        third = torch.cat([wanted, prompt], 1)
        assert torch.equal(generate(sequence, third, past_key_values=cache), generate(sequence, third))
    with pytest.raises(ValueError, match="give all of them"):
        generate(sequence, PROMPTS[0][:, :2], past_key_values=cache)


@torch.no_grad()
def test_what_is_remembered_follows_the_cache(sequence):
    """Rows ordered anew, picked and repeated, with the sums of unmarked text; what was cut off is no longer in them."""
    ids, rest = token_ids(3, 7), token_ids(3, 6, seed=5)
    for change, order in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 1])), [2, 0, 1]),
        (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = sequence(ids, use_cache=True).past_key_values
        change(cache)
        found = sequence(rest[order], past_key_values=copy.deepcopy(cache)).logits
        whole = sequence(torch.cat([ids, rest], 1)[order], use_cache=False).logits[:, 7:]
        torch.testing.assert_close(found, whole, rtol=1e-6, atol=1e-6)
    cache = sequence(ids, use_cache=True).past_key_values
    cache.crop(-2)
    with pytest.raises(ValueError, match="tokens were cut off"):
        sequence(rest, past_key_values=cache)
    cache.reset()
    torch.testing.assert_close(sequence(ids, past_key_values=cache).logits, sequence(ids, use_cache=False).logits)


@torch.no_grad()
def test_a_call_is_one_graph(sequence):
    """With a static cache, empty and not, and in ``generate``, where the choice is kept."""
    ids = token_ids(2, 6)
    torch._dynamo.reset()
    compiled = torch.compile(sequence, backend="eager", fullgraph=True)
    caches = [StaticCache(config=sequence.config, max_cache_len=12) for _ in range(2)]
    for inputs in (ids, ids[:, :1]):
        pair = [model(input_ids=inputs, past_key_values=cache).logits
                for model, cache in zip((sequence, compiled), caches, strict=True)]  # fmt: skip
        torch.testing.assert_close(pair[1], pair[0])
    torch._dynamo.reset()
    settings = CompileConfig(fullgraph=True, backend="eager", mode=None)
    settings._compile_all_devices = True
    found = generate(sequence, ids, cache_implementation="static", compile_config=settings)
    torch._dynamo.reset()
    assert torch.equal(found, generate(sequence, ids))


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        (torch.tensor([0, 3]), "there is no expert 3; the model's are 0 to 2"),
        (torch.tensor([-1, 0]), "there is no expert -1"),
        (torch.tensor([0]), r"has the shape \(1,\); it must be \(2,\), one expert a sequence, or \(2, 9\)"),
        (torch.zeros(2, 4, dtype=torch.long), r"has the shape \(2, 4\)"),
        (torch.tensor([0.0, 1.0]), "is of torch.float32"),
        (torch.tensor([True, False]), "is of torch.bool"),
        ([0, 1], "is of type list"),
    ],
)
def test_experts_that_are_none_are_refused(routed, ids, said):
    with pytest.raises(ValueError, match=f"expert_ids: .*{said}"):
        routed(token_ids(2, 9), expert_ids=ids)
    # nothing of the call is left behind
    assert routing_modmoe._THREAD.run is None


def test_experts_named_for_each_token_go_on_with_the_last(routed):
    prompt = token_ids(1, 6)
    ids = torch.tensor([[0, 0, 1, 1, 2, 2]])
    found = generate(routed, prompt, expert_ids=ids)
    whole = routed(found, expert_ids=pad(ids, (0, 4), value=2), use_cache=False).logits
    assert torch.equal(whole[:, 5:-1].argmax(-1), found[:, 6:])


@torch.no_grad()
def test_router_logits_are_in_the_output(tmp_path):
    tied, packed = write_packed(tmp_path, "mistral", top_k=2, combine="sum")
    ids, found = token_ids(2, 9), []
    for model in load_both(tied, packed, torch.float64):
        without = model(ids, labels=ids)
        assert "router_logits" not in without
        output = model(ids, labels=ids, output_router_logits=True)
        assert output.aux_loss is None and torch.equal(output.loss, without.loss)
        assert [tuple(logits.shape) for logits in output.router_logits] == [(18, 3)] * 2
        as_tuple = model(ids, output_router_logits=True, return_dict=False)
        assert torch.equal(as_tuple[-1][1], output.router_logits[1])
        model.config.router_aux_loss_coef = 0.1
        balanced = model(ids, labels=ids, output_router_logits=True)
        torch.testing.assert_close(balanced.loss, without.loss + 0.1 * balanced.aux_loss)
        model.config.output_router_logits = True
        assert len(model(ids).router_logits) == 2 and "router_logits" not in model(ids, output_router_logits=False)
        found.append(output.router_logits)
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("prompt", ["x", 1.5, True, [1], float("nan"), torch.tensor(2.5)])
def test_a_prompt_that_is_none_is_refused(routed, prompt):
    with pytest.raises(ValueError, match=r"routing_prompt: is .*; it must be a whole number of leading tokens"):
        routed(token_ids(1, 5), routing_prompt=prompt)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_a_model_without_values_gets_all_of_them(routing, tmp_path):
    _, model = load_pair(tmp_path, routing=routing, means=True, kind="mlp" if routing == "token" else "linear")
    with torch.device("meta"):
        empty = type(model)(model.config)
    made = empty.to_empty(device="cpu")
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data.fill_(7)
    made.init_weights()
    for layer in made.model.layers:
        ffn = layer.mlp
        held = torch.zeros_like(ffn.membership).scatter(1, ffn.ranking.long(), True)
        assert torch.equal(held, ffn.membership) and ffn.membership.sum(1).tolist() == [4] * 3
        assert not ffn.means.any() and all(weight.std() < 1 for weight in ffn.parameters())
    made(token_ids(), **({"expert_ids": torch.tensor([0, 1, 2])} if routing == "task" else {}))


@pytest.mark.parametrize("part", ["membership", "router.weight", "means"])
def test_a_checkpoint_that_does_not_say_what_the_experts_are_is_refused(part, tmp_path):
    """By plain transformers too, with the code that lies beside it."""
    _, tied = write_tied(tmp_path, means=True)
    tensors = load_file(tied / "model.safetensors")
    del tensors[f"model.layers.1.mlp.{part}"]
    save_file(tensors, tied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"'model.layers.1.mlp.{part}' is missing"):
        AutoModelForCausalLM.from_pretrained(tied, trust_remote_code=True)
