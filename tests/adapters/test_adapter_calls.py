"""What one call of a model with adapters says holds for that call: in threads, and however a prompt comes in."""

# Shapes: B batch, T tokens

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from modmoe.adapters.mechanism.attach import CONTEXT, attach, detach
from modmoe.adapters.methods.moa import SoftMoA, SoftMoASettings
from tests.reference_moa import made
from tests.support import adapted
from tests.support.planned import load_pair
from tests.support.tiny import token_ids

LENGTHS = (5, 6, 9, 11, 14, 17)


def in_threads(jobs: list[Any], work: Callable[[Any], Any], threads: int = 3) -> list[Any]:
    """Return what ``work`` gives for each job, made by several threads at once."""
    found: list[Any] = [None] * len(jobs)

    def run(first: int) -> None:
        for number in range(first, len(jobs), threads):
            found[number] = work(jobs[number])

    running = [threading.Thread(target=run, args=(first,)) for first in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    return found


@pytest.mark.parametrize(("method", "family"), adapted.ONE_EACH)
def test_threads_know_nothing_of_each_other(method: str, family: str) -> None:
    model = adapted.adapted_model(method, family).double()
    prompts = [adapted.token_ids(1, tokens, seed=tokens) for tokens in LENGTHS] * 4

    def logits(ids_BT: Tensor) -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids_BT).logits

    alone = [logits(prompt) for prompt in prompts]
    for ours, theirs in zip(in_threads(prompts, logits), alone, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("method", ["perft_r", "mixlora", "sparse_moa", "ldmole"])
def test_threads_train_as_one_does(method: str, is_checkpointed: bool) -> None:
    """Each thread runs a model that shares the weights, as replicas of a data-parallel run do; gradients add up."""
    model = adapted.adapted_model(method, "llama").double().train()
    if is_checkpointed:
        model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
    prompts = [adapted.token_ids(1, tokens, seed=tokens) for tokens in LENGTHS]
    weights = dict(adapted.adapter_parameters(model))

    def gradients(ids_BT: Tensor) -> tuple[Tensor, ...]:
        out = model(input_ids=ids_BT, labels=ids_BT)
        return torch.autograd.grad(out.loss, list(weights.values()), allow_unused=True)

    alone = [gradients(prompt) for prompt in prompts]
    for ours, theirs in zip(in_threads(prompts, gradients), alone, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


# Weights of an instance


def generate(model: Any, ids_BT: Tensor, **more: Any) -> Tensor:
    """Return the tokens that are generated after the ids, greedily."""
    given: dict[str, Any] = {"attention_mask": torch.ones_like(ids_BT), "max_new_tokens": 5, "do_sample": False}
    made = model.generate(input_ids=ids_BT, **{**given, "eos_token_id": None, "pad_token_id": 258, **more})
    return made[:, ids_BT.shape[1] :]


def padded(ids_BT: Tensor) -> dict[str, Tensor]:
    """Return ids with four tokens of padding before them, and the mask."""
    row_BT = torch.nn.functional.pad(ids_BT, (4, 0), value=258)
    return {"ids_BT": row_BT, "attention_mask": (row_BT != 258).long()}


def second_turn(model: Any, ids_BT: Tensor) -> Tensor:
    cache = DynamicCache(config=model.config)
    generate(model, ids_BT[:, :3], past_key_values=cache, max_new_tokens=2)
    return generate(model, ids_BT, past_key_values=cache)


def from_embeds(model: Any, ids_BT: Tensor) -> Tensor:
    found = model.generate(
        inputs_embeds=model.get_input_embeddings()(ids_BT),
        attention_mask=torch.ones_like(ids_BT),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=258,
    )
    return found


WAYS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "in chunks": lambda model, ids_BT: generate(model, ids_BT, prefill_chunk_size=3),
    "no cache": lambda model, ids_BT: generate(model, ids_BT, use_cache=False),
    "static cache": lambda model, ids_BT: generate(model, ids_BT, cache_implementation="static"),
    "padded": lambda model, ids_BT: generate(model, **padded(ids_BT)),
    "padded, static cache": lambda model, ids_BT: generate(model, **padded(ids_BT), cache_implementation="static"),
    "lookup": lambda model, ids_BT: generate(model, ids_BT, prompt_lookup_num_tokens=3),
    "assisted": lambda model, ids_BT: generate(model, ids_BT, assistant_model=copy.deepcopy(model)),
    "second turn": second_turn,
    "embeds": from_embeds,
    "copied": lambda model, ids_BT: generate(copy.deepcopy(model), ids_BT),
}


@pytest.fixture(scope="module")
def by_instance() -> Any:
    return made("llama", "soft, instance")


@pytest.fixture(scope="module")
def plain(by_instance: Any) -> list[Tensor]:
    found = [generate(by_instance, token_ids(1, tokens, seed=tokens)) for tokens in LENGTHS]
    assert len({tuple(row[0].tolist()) for row in found}) == len(found), "prompts must tell ways apart"
    return found


@pytest.mark.filterwarnings("ignore:Passing `generation_config` together")
@pytest.mark.parametrize("way", WAYS)
def test_an_answer_does_not_depend_on_how_the_prompt_comes_in(by_instance: Any, plain: list[Tensor], way: str) -> None:
    for tokens, expected in zip(LENGTHS, plain, strict=True):
        assert torch.equal(WAYS[way](by_instance, token_ids(1, tokens, seed=tokens)), expected)


def test_generations_in_threads_are_those_alone(by_instance: Any, plain: list[Tensor]) -> None:
    prompts = [token_ids(1, tokens, seed=tokens) for tokens in LENGTHS] * 2
    found = in_threads(prompts, lambda ids_BT: generate(by_instance, ids_BT))
    assert all(torch.equal(one, other) for one, other in zip(found, plain * 2, strict=True))


def test_text_by_hand_is_the_same_in_pieces_whoever_makes_the_cache(by_instance: Any) -> None:
    ids_BT = token_ids(2, 12)
    whole = by_instance(ids_BT, use_cache=False).logits
    out = by_instance(ids_BT[:, :5], use_cache=True)
    rest = by_instance(ids_BT[:, 5:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(torch.cat([out.logits, rest], 1), whole, rtol=1e-9, atol=1e-9)


def test_through_peft_the_prompt_is_the_same() -> None:
    model = adapted.adapted_model("soft_moa", "llama", routing="instance").double()
    prompts = [adapted.token_ids(1, tokens, seed=tokens) for tokens in LENGTHS]
    for ids_BT in prompts:
        expected = generate(model, ids_BT, pad_token_id=0)
        assert torch.equal(generate(model.get_base_model(), ids_BT, pad_token_id=0), expected)
        assert torch.equal(generate(model, ids_BT, pad_token_id=0, prefill_chunk_size=2), expected)
        assert torch.equal(generate(model, ids_BT, pad_token_id=0, use_cache=False), expected)


def test_an_adapter_that_is_gone_leaves_no_trace() -> None:
    model = made("llama", "soft, instance")
    kept = {name for name in model.__dict__ if "generate" in name or "modmoe" in name}
    assert kept
    detach(model)
    assert not {name for name in model.__dict__ if name in kept}
    assert "_prefill" not in model.__dict__ and "prepare_inputs_for_generation" not in model.__dict__


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_on_a_tied_model_both_read_the_prompt(tmp_path: Any, routing: str) -> None:
    model = load_pair(tmp_path, routing=routing, routing_chunk=4)[1]
    attach(model, SoftMoA, SoftMoASettings(routing="instance", routing_chunk=4))
    torch.manual_seed(1)
    for name, weight in model.named_parameters():
        if "routed_" in name:
            weight.data.normal_(0, 0.5)
    model.double().eval()
    ids_BT = token_ids(1, 9)
    expected = generate(model, ids_BT)
    for way in ("in chunks", "no cache", "padded", "padded, static cache", "second turn"):
        assert torch.equal(WAYS[way](model, ids_BT), expected), way
    stepwise = model(torch.cat([ids_BT, expected], 1)[:, :-1], routing_prompt=9, use_cache=False)
    assert torch.equal(stepwise.logits[:, 8:].argmax(-1), expected)
    unmarked = model(torch.cat([ids_BT, expected], 1)[:, :-1], use_cache=False).logits
    assert not torch.allclose(unmarked, stepwise.logits)


def test_a_context_is_pickled_with_its_settings() -> None:
    model = adapted.adapted_model("perft_r", "llama")
    context = adapted.context(model)
    context.counts, context.loss_factor = "answers", 0.25
    again = pickle.loads(pickle.dumps(context))
    assert (again.counts, again.loss_factor, again.run.routes) == ("answers", 0.25, [])
    assert getattr(model.get_base_model(), CONTEXT) is context
