"""What the adapters of a model share while it runs: checkpointing, generation, copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from modmoe.adapters.mechanism.passes import Frame
from tests.support.adapted import (
    BALANCED,
    ONE_EACH,
    PAIRS,
    adapted_model,
    adapter_parameters,
    assert_same,
    base_model,
    context,
    gradients,
    logits_of,
    settings_of,
    shake,
    token_ids,
    with_balance,
)


def dropping(method: str) -> dict[str, float]:
    """Return the setting that switches a method's dropout on."""
    return {name: 0.2 for name in ("lora_dropout", "dropout") if name in settings_of(method)}


def checkpointed(model: Any, reentrant: bool) -> None:
    if reentrant:
        model.enable_input_require_grads()
    base = model.get_base_model()
    base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_gradients_under_checkpointing_are_those_without(method: str, family: str) -> None:
    for reentrant in (False, True):
        model = adapted_model(method, family, **dropping(method), **with_balance(method)).train()
        ids_BT = token_ids()

        def loss(model: Any = model, ids_BT: Tensor = ids_BT) -> Tensor:
            return model(input_ids=ids_BT, labels=ids_BT).loss

        expected = gradients(model, loss)
        routes, balance = list(context(model).run.routes), context(model).loss
        checkpointed(model, reentrant)
        if reentrant and method in BALANCED:
            with pytest.raises(ValueError, match="use_reentrant': False"):
                loss()
            continue
        found = gradients(model, loss)
        assert len(found) == len(list(adapter_parameters(model)))
        assert_same(found, expected)
        again = context(model).run.routes
        assert [route.site for route in again] == [route.site for route in routes], "a route was counted twice"
        assert len({route.site for route in again}) == len(again)
        if balance is not None:
            torch.testing.assert_close(context(model).loss, balance)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize(("method", "family"), ONE_EACH)
def test_two_passes_before_two_backward_passes_do_not_mix(method: str, family: str, reentrant: bool) -> None:
    model = adapted_model(method, family, **({"balance_weight": 0.0} if method in BALANCED else {})).train()
    checkpointed(model, reentrant)
    first_BT, second_BT = token_ids(seed=1), token_ids(seed=2)

    def pick(ids_BT: Tensor) -> Tensor:
        return model(input_ids=ids_BT).logits.log_softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).mean()

    parts = [gradients(model, lambda: pick(first_BT)), gradients(model, lambda: -2 * pick(second_BT))]
    expected = {name: parts[0][name] + parts[1][name] for name in parts[0]}
    assert_same(gradients(model, lambda: pick(first_BT) - 2 * pick(second_BT)), expected)


@pytest.mark.parametrize("reentrant", [False, True])
def test_what_was_decided_is_not_decided_anew_in_the_second_run(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted_model("perft_r", "olmoe", balance_weight=0.0).train()
    checkpointed(model, reentrant)
    made, decide = [], Frame.decide

    def counting(self: Frame, key: str, make: Callable[[], Any]) -> Any:
        def note() -> Any:
            made.append(key)
            return make()

        return decide(self, key, note)

    monkeypatch.setattr(Frame, "decide", counting)
    ids_BT = token_ids()
    first, second = (model(input_ids=ids_BT[i : i + 1], labels=ids_BT[i : i + 1]).loss for i in range(2))
    before = list(made)
    assert len(before) == 2 * len(set(before)) > 0
    (first + second).backward()
    assert made == before


@pytest.mark.parametrize(("method", "family"), ONE_EACH)
def test_what_entered_a_layer_does_not_outlive_its_pass(method: str, family: str) -> None:
    model = adapted_model(method, family).train()
    checkpointed(model, reentrant=False)
    for _ in range(4):
        ids_BT = token_ids()
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
    kept = context(model)._kept
    assert kept and all(len(frames) <= 2 for frames in kept.values()), "frames of earlier passes pile up"
    alive = [layer for layer, frames in kept.items() for entered, _ in frames if entered() is not None]
    assert alive in ([], [0]), "only the layer that ran last may still hold what entered it"


# Generation


@pytest.mark.parametrize(("method", "family"), ONE_EACH)
def test_generation_in_batches_is_generation_row_by_row(method: str, family: str) -> None:
    model = adapted_model(method, family).double()
    lengths, longest = [7, 4, 5], 7
    ids_BT, mask_BT = token_ids(3, longest), torch.ones(3, longest, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids_BT[row, : longest - length] = 0
        mask_BT[row, : longest - length] = 0
    plan: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    for more in ({}, {"num_beams": 2}):
        together = model.generate(input_ids=ids_BT, attention_mask=mask_BT, **plan, **more)[:, longest:]
        if not more:
            uncached = model.generate(input_ids=ids_BT, attention_mask=mask_BT, use_cache=False, **plan)
            assert torch.equal(uncached[:, longest:], together)
        for row, length in enumerate(lengths):
            alone_BT = ids_BT[row : row + 1, longest - length :]
            alone = model.generate(input_ids=alone_BT, attention_mask=torch.ones_like(alone_BT), **plan, **more)
            assert torch.equal(alone[0, length:], together[row]), (more, row)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_logits_with_a_cache_are_those_without(method: str, family: str) -> None:
    model = adapted_model(method, family).double()
    ids_BT = token_ids(2, 11)
    with torch.no_grad():
        expected = model(input_ids=ids_BT).logits
        out = model(input_ids=ids_BT[:, :6], use_cache=True)
        found = [out.logits]
        for start, end in ((6, 7), (7, 9), (9, 11)):
            out = model(input_ids=ids_BT[:, start:end], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_no_token_sees_what_comes_after_it(method: str, family: str) -> None:
    model = adapted_model(method, family).double()
    ids_BT = token_ids(1, 10)
    other_BT = ids_BT.clone()
    other_BT[0, 6:] = token_ids(1, 4, seed=9)
    first, second = logits_of(model, ids_BT), logits_of(model, other_BT)
    torch.testing.assert_close(second[:, :6], first[:, :6], rtol=1e-10, atol=1e-10)
    assert not torch.allclose(second[:, 6:], first[:, 6:])


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_a_copy_is_independent(method: str, family: str) -> None:
    model = adapted_model(method, family)
    expected = logits_of(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits_of(twin), expected)
    assert context(twin) is not context(model)
    assert context(twin).run is not context(model).run
    shake(twin, seed=3)
    moved = logits_of(twin)
    assert torch.equal(logits_of(model), expected) and not torch.allclose(moved, expected)
    assert torch.equal(logits_of(copy.deepcopy(twin)), moved)
    ids_BT = token_ids()
    twin.train()(input_ids=ids_BT, labels=ids_BT).loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    plain = twin.unload()
    assert torch.equal(logits_of(plain), logits_of(base_model(family)))
    assert torch.equal(logits_of(model), expected)
