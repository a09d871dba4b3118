"""MoA in generation: padded batches, beams, caches, packed documents, and weights of a whole instance."""

# Shapes: B batch, T tokens, E adapter types

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.reference_moa import CASES, made
from tests.support.tiny import token_ids


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["llama", "olmoe"])
def test_a_token_changes_nothing_before_it(name: str, case: str) -> None:
    model, ids_BT = made(name, case), token_ids(2, 14)
    before = model(ids_BT).logits
    for t in (1, 4, 7, 13):
        changed_BT = ids_BT.clone()
        changed_BT[:, t] = (changed_BT[:, t] + 1) % 256
        after = model(changed_BT).logits
        torch.testing.assert_close(after[:, :t], before[:, :t], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(after[:, t:], before[:, t:])


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    longest = max(len(row) for row in rows)
    ids_BT = torch.full((len(rows), longest), 258)
    mask_BT = torch.zeros_like(ids_BT)
    for i, row in enumerate(rows):
        ids_BT[i, longest - len(row) :] = row
        mask_BT[i, longest - len(row) :] = 1
    return {"input_ids": ids_BT, "attention_mask": mask_BT}


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", ["soft", "soft, instance", "sparse"])
def test_generation_in_a_padded_batch_equals_each_row_alone(case: str, beams: int) -> None:
    model = made("qwen3", case)
    rows = [token_ids(1, tokens, seed=tokens)[0] for tokens in (3, 9, 6)]
    given: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    together = model.generate(**padded(rows), **given)
    alone = [model.generate(**padded([row]), **given)[0, len(row) :] for row in rows]
    assert together[:, 9:].tolist() == [row.tolist() for row in alone]
    assert len({tuple(row.tolist()) for row in alone}) == 3


def test_an_instance_is_weighted_by_its_prompt_for_the_whole_generation() -> None:
    model, prompt = made("llama", "soft, instance"), token_ids(2, 6)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=7,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    stepwise = torch.stack(out.logits, 1)
    marked = model(out.sequences[:, :-1], routing_prompt=6).logits[:, 5:]
    torch.testing.assert_close(stepwise.double(), marked, rtol=1e-5, atol=1e-5)
    routes = model.routed_context.run.routes
    for route in routes:
        weights_BTE = route.weights_TE.view(2, 12, -1)
        torch.testing.assert_close(weights_BTE, weights_BTE[:, :1].expand_as(weights_BTE))
    assert not torch.allclose(model(out.sequences[:, :-1]).logits[:, 5:], marked)


def test_two_generations_side_by_side_do_not_mix() -> None:
    model = made("llama", "soft, instance")
    first, second = token_ids(1, 6, seed=1), token_ids(1, 6, seed=2)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    alone = []
    for ids_BT in (first, second):
        cache = DynamicCache(config=model.config)
        model(ids_BT[:, :5], past_key_values=cache)
        alone.append(model(ids_BT[:, 5:], past_key_values=cache).logits)
    for ids_BT, cache in zip((first, second), caches, strict=True):
        model(ids_BT[:, :5], past_key_values=cache)
    turns = [
        model(ids_BT[:, 5:], past_key_values=cache).logits
        for ids_BT, cache in zip((first, second), caches, strict=True)
    ]
    for ours, theirs in zip(turns, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_packed_documents_are_instances_of_their_own() -> None:
    model = made("llama", "soft, instance", attn_implementation="eager")
    ids_BT = token_ids(1, 12)
    position_BT = torch.tensor([[*range(5), *range(7)]])
    model(ids_BT, position_ids=position_BT)
    packed_TE = model.routed_context.run.routes[0].weights_TE
    for part in (slice(0, 5), slice(5, 12)):
        model(ids_BT[:, part])
        torch.testing.assert_close(model.routed_context.run.routes[0].weights_TE, packed_TE[part])
