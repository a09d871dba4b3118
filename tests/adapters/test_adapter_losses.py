"""The losses of the adapters' routers: what they count, and that they reach the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from modmoe.adapters.mechanism import passes
from modmoe.adapters.mechanism.attach import CONTEXT
from modmoe.adapters.mechanism.losses import Route, importance_loss, switch_loss, total_loss, z_loss
from tests.support.adapted import (
    BALANCED,
    ONE_EACH,
    PAIRS,
    adapted_model,
    adapter_parameters,
    assert_same,
    context,
    gradients,
    settings_of,
    token_ids,
    with_balance,
)


def routes_of(model: Any, run: Callable[[], Any]) -> list[Route]:
    """Return the routes of a pass with their gradient, which they lose at its end."""
    kept: list[Route] = []

    def keep(routes: list[Route], *args: Any, **kwargs: Any) -> None:
        kept.extend(routes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "total_loss", keep)
        run()
    assert kept
    return kept


def balanced(method: str, **changes: Any) -> Any:
    """Return a model in training whose router loss is large enough to be seen."""
    return adapted_model(method, dict(ONE_EACH)[method], **with_balance(method), **changes).train()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("method", BALANCED)
def test_padding_changes_nothing(method: str, side: str) -> None:
    model = balanced(method)
    lengths = [9, 5]
    ids_BT, mask_BT = token_ids(), torch.ones(2, 9, dtype=torch.long)
    padding = slice(0, 4) if side == "left" else slice(5, 9)
    mask_BT[1, padding] = 0

    def run(filler: int) -> tuple[dict[str, Tensor], Tensor]:
        filled_BT = torch.where(mask_BT.bool(), ids_BT, filler)
        labels_BT = torch.where(mask_BT.bool(), ids_BT, -100)
        labels_BT[1, 5 if side == "right" else 4] = -100  # on the left, padding would have to predict it
        position_BT = (mask_BT.cumsum(-1) - 1).clamp_min(0)

        def loss() -> Tensor:
            out = model(input_ids=filled_BT, attention_mask=mask_BT, position_ids=position_BT, labels=labels_BT)
            return out.loss

        return gradients(model, loss), context(model).loss

    (first, loss), (second, other) = run(0), run(7)
    torch.testing.assert_close(other, loss)
    assert_same(second, first)

    # by hand: what routers see of each row alone, one after the other
    rows: list[list[Route]] = []
    for row, length in enumerate(lengths):
        alone_BT = ids_BT[row][mask_BT[row].bool()].view(1, length)
        rows.append(routes_of(model, lambda alone_BT=alone_BT: model(input_ids=alone_BT)))
    joined = [
        Route(
            site=first_route.site,
            probs_TE=torch.cat([first_route.probs_TE, second_route.probs_TE]),
            weights_TE=torch.cat([first_route.weights_TE, second_route.weights_TE]),
            chosen_TE=torch.cat([first_route.chosen_TE, second_route.chosen_TE]),
            loss_weights=first_route.loss_weights,
        )
        for first_route, second_route in zip(*rows, strict=True)
    ]
    expected = total_loss(joined, None)
    assert expected is not None and float(loss) > 0.1
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", BALANCED)
def test_only_answers_count_where_that_is_asked(method: str) -> None:
    model = balanced(method)
    ids_BT = token_ids()
    labels_BT, mask_BT = ids_BT.clone(), torch.ones_like(ids_BT)
    labels_BT[:, :4] = -100
    mask_BT[1, 7:] = 0
    labels_BT[1, 7:] = -100
    everything = {}
    for counts in ("tokens", "answers"):
        context(model).counts = counts
        model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT)
        everything[counts] = context(model).loss
        counted_T = (mask_BT.bool() if counts == "tokens" else labels_BT != -100).view(-1)
        routes = routes_of(model, lambda: model(input_ids=ids_BT, attention_mask=mask_BT, labels=labels_BT))
        by_hand = total_loss(routes, counted_T)
        assert by_hand is not None
        torch.testing.assert_close(everything[counts], by_hand.detach())
    assert not torch.allclose(everything["tokens"], everything["answers"])
    # labels of one call do not stay for the next, nor where a trainer calls the backbone
    for called in (model, model.get_base_model().model):
        called(input_ids=ids_BT, attention_mask=mask_BT)
        torch.testing.assert_close(context(model).loss, everything["tokens"])


@pytest.mark.parametrize(("method", "family"), PAIRS)
def test_the_injected_loss_has_the_gradient_of_the_sum(method: str, family: str) -> None:
    model = adapted_model(method, family, **with_balance(method)).train()
    ids_BT = token_ids()
    found = gradients(model, lambda: model(input_ids=ids_BT, labels=ids_BT).loss)
    assert (context(model).loss is not None) == (method in BALANCED)

    base = model.get_base_model()
    getattr(base, f"{CONTEXT}_handles")[""][-1].remove()  # the hook that injects
    plain = gradients(model, lambda: model(input_ids=ids_BT, labels=ids_BT).loss)

    def both() -> Tensor:
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
        more = total_loss(context(model).run.routes, None)  # with gradient, since that hook has not run
        return loss if more is None else loss + more

    assert_same(found, gradients(model, both))
    if method in BALANCED:
        moved = [name for name in found if not torch.allclose(found[name], plain[name], rtol=1e-3, atol=1e-5)]
        assert any("router" in name for name in moved)


def test_the_injected_loss_keeps_its_size_when_the_loss_is_scaled_by_a_trainer() -> None:
    """It counts once a pass, whatever the loss is multiplied by; the value of the output is untouched."""
    model = balanced("molora")
    ids_BT = token_ids()
    with torch.no_grad():
        plain = model(input_ids=ids_BT).logits
    # with gradients the attention may run another kernel, which rounds otherwise
    torch.testing.assert_close(model(input_ids=ids_BT).logits.detach(), plain, rtol=0, atol=1e-4)
    nothing = gradients(model, lambda: 0 * model(input_ids=ids_BT, labels=ids_BT).loss)
    alone = context(model).loss
    getattr(model.get_base_model(), f"{CONTEXT}_handles")[""][-1].remove()

    def only() -> Tensor:
        model(input_ids=ids_BT)
        loss = total_loss(context(model).run.routes, None)
        assert loss is not None and alone is not None
        torch.testing.assert_close(loss.detach(), alone)
        return loss

    expected = gradients(model, only)
    assert_same({name: nothing[name] for name in expected}, expected)


@pytest.mark.parametrize(("method", "family"), ONE_EACH)
def test_there_is_no_loss_where_no_router_learns(method: str, family: str) -> None:
    model = adapted_model(method, family, **with_balance(method)).train()
    ids_BT = token_ids()
    model(input_ids=ids_BT)
    assert (context(model).loss is not None) == (method in BALANCED)
    with torch.no_grad():
        model(input_ids=ids_BT)
    assert context(model).loss is None
    model.requires_grad_(False)
    model.enable_input_require_grads()  # as checkpointing does
    model(input_ids=ids_BT)
    assert context(model).loss is None
    model.disable_input_require_grads()
    if method in BALANCED:
        # the experts train, their router does not
        for name, weight in adapter_parameters(model):
            weight.requires_grad_("router" not in name)
        model(input_ids=ids_BT)
        assert context(model).loss is None
        for name, weight in adapter_parameters(model):
            weight.requires_grad_("layers.0" not in name or "router" not in name)
        loss = routes_of(model, lambda: model(input_ids=ids_BT))
        assert loss and all("layers.1" in route.site for route in loss)
    with model.disable_adapter():
        model(input_ids=ids_BT)
    assert context(model).loss is None and not context(model).run.routes


@pytest.mark.parametrize("method", [method for method in BALANCED if "top_k" in settings_of(method)])
def test_the_loss_over_all_layers_is_that_of_transformers(method: str) -> None:
    model = balanced(method)
    ids_BT, mask_BT = token_ids(), torch.ones(2, 9, dtype=torch.long)
    mask_BT[1, 6:] = 0
    losses = {}
    for scope in ("layer", "all"):
        context(model).loss_scope = scope
        model(input_ids=ids_BT, attention_mask=mask_BT)
        losses[scope] = context(model).loss
    routes = context(model).run.routes
    logits = tuple(route.logits_TE for route in routes)
    experts = routes[0].probs_TE.shape[1]
    # transformers counts each of a token's k choices fully: k times the share of choices
    of_all = load_balancing_loss_func(logits, experts, 2, mask_BT) / 2
    of_each = torch.stack([load_balancing_loss_func((one,), experts, 2, mask_BT) / 2 for one in logits]).mean()
    torch.testing.assert_close(losses["all"], 0.5 * of_all.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses["layer"], 0.5 * of_each.detach(), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(losses["all"], losses["layer"], rtol=1e-5, atol=1e-7)


def test_the_losses_are_those_of_the_papers() -> None:
    logits_TE = torch.randn(13, 5, generator=torch.Generator().manual_seed(0))
    probs_TE = logits_TE.softmax(-1)
    chosen_TE = torch.zeros_like(probs_TE, dtype=torch.bool).scatter_(1, probs_TE.topk(2).indices, True)
    weights_TE = probs_TE * chosen_TE
    route = Route(site="", probs_TE=probs_TE, weights_TE=weights_TE, chosen_TE=chosen_TE, logits_TE=logits_TE)
    counted_T = torch.arange(13) % 3 > 0
    rows = [t for t in range(13) if counted_T[t]]
    balance = sum(
        (sum(bool(chosen_TE[t, e]) for t in rows) / (2 * len(rows)))
        * (sum(float(probs_TE[t, e]) for t in rows) / len(rows))
        for e in range(5)
    )
    assert float(switch_loss(route, counted_T)) == pytest.approx(5 * balance, rel=1e-5)
    z = sum(float(logits_TE[t].exp().sum().log()) ** 2 for t in rows) / len(rows)
    assert float(z_loss(route, counted_T)) == pytest.approx(z, rel=1e-5)
    sums = [sum(float(weights_TE[t, e]) for t in rows) for e in range(5)]
    mean = sum(sums) / 5
    spread = sum((value - mean) ** 2 for value in sums) / 5 / mean**2
    assert float(importance_loss(route, counted_T)) == pytest.approx(spread, rel=1e-5)
    even = torch.full((10, 5), 0.2)
    once = torch.eye(5, dtype=torch.bool).repeat(2, 1)
    assert float(switch_loss(Route(site="", probs_TE=even, weights_TE=even, chosen_TE=once), None)) == pytest.approx(1)
    one = torch.eye(5)[torch.zeros(10, dtype=torch.long)]
    assert float(switch_loss(Route(site="", probs_TE=one, weights_TE=one, chosen_TE=one.bool()), None)) == 5


def test_a_batch_in_which_nothing_counts_has_a_finite_loss() -> None:
    model = balanced("molora")
    context(model).counts = "answers"
    ids_BT = token_ids()
    labels_BT = torch.full_like(ids_BT, -100)
    logits = model(input_ids=ids_BT, labels=labels_BT).logits
    assert context(model).loss is None or bool(torch.isfinite(context(model).loss))
    (0 * logits).sum().backward()
    assert all(bool(torch.isfinite(weight.grad).all()) for _, weight in adapter_parameters(model))
