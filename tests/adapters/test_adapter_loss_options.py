"""The router losses that a configuration asks for beside its method's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from modmoe.adapters.mechanism.losses import importance_loss, total_loss, z_loss
from modmoe.errors import AdapterError
from tests.support.adapted import adapted_model, adapter_parameters, config_for, context, token_ids


def run(**options: Any) -> tuple[Any, Any]:
    """Return a trained-looking model after a pass, and what its adapters share."""
    model = adapted_model("comol", "llama", **options).train()
    ids_BT = token_ids()
    labels_BT = ids_BT.clone()
    labels_BT[:, :5] = -100
    model(input_ids=ids_BT, labels=labels_BT).loss.backward()
    return model, context(model)


def test_without_them_a_soft_mixture_has_no_loss() -> None:
    assert run()[1].loss is None


@pytest.mark.parametrize(("option", "loss"), [("z_loss_weight", z_loss), ("importance_loss_weight", importance_loss)])
def test_each_is_the_mean_over_routers_times_its_factor(option: str, loss: Any) -> None:
    _, shared = run(**{option: 0.25})
    wanted = torch.stack([loss(route, None) for route in shared.run.routes]).mean()
    torch.testing.assert_close(shared.loss, 0.25 * wanted)


def test_they_move_the_routers() -> None:
    gradients = []
    for weight in (0.0, 5.0):
        model, _ = run(z_loss_weight=weight)
        gradients.append({name: value.grad for name, value in adapter_parameters(model)})
    assert any("router" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        if "router" in name:
            assert (gradient - gradients[1][name]).abs().max() > 1e-3


def test_answers_alone_count_where_that_is_asked() -> None:
    _, everything = run(z_loss_weight=1.0)
    _, answers = run(z_loss_weight=1.0, loss_tokens="answers")
    rows_T = torch.zeros(2, 9, dtype=torch.bool)
    rows_T[:, 5:] = True
    wanted = torch.stack([z_loss(route, rows_T.flatten()) for route in answers.run.routes]).mean()
    torch.testing.assert_close(answers.loss, wanted)
    assert (answers.loss - everything.loss).abs() > 1e-4


def test_the_scope_is_the_configurations() -> None:
    _, shared = run(importance_loss_weight=1.0, loss_scope="all")
    wanted = total_loss([_learning(route) for route in shared.run.routes], None, scope="all", more={"importance": 1.0})
    torch.testing.assert_close(shared.loss, wanted.detach())  # type: ignore[union-attr]
    assert (shared.loss - run(importance_loss_weight=1.0)[1].loss).abs() > 1e-6


def _learning(route: Any) -> Any:
    route.probs_TE = route.probs_TE.requires_grad_()
    return route


def test_a_trainer_that_adds_up_gradients_can_scale_the_loss() -> None:
    found = []
    for factor in (1.0, 0.5):
        model = adapted_model("comol", "llama", z_loss_weight=1.0).train()
        context(model).loss_factor = factor
        # nothing but the routers' loss has a gradient
        (0.0 * model(input_ids=token_ids()).logits.sum()).backward()
        found.append({name: value.grad.clone() for name, value in adapter_parameters(model) if "router" in name})
    for name, gradient in found[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(0.5 * gradient, found[1][name])


@pytest.mark.parametrize(("field", "value"), [("loss_scope", "layers"), ("loss_tokens", "answer")])
def test_unknown_words_are_refused(field: str, value: str) -> None:
    with pytest.raises(AdapterError, match=f"{field}: no such value '{value}'. Did you mean"):
        config_for("comol", **{field: value})


def test_they_are_those_of_the_active_adapter() -> None:
    model = adapted_model("comol", "llama", z_loss_weight=1.0).train()
    model.add_adapter("plain", config_for("comol"))
    found = []
    for name in ("default", "plain", "default"):
        model.set_adapter(name)
        model(input_ids=token_ids())
        found.append(context(model).loss)
    assert found[0] is not None and found[1] is None
    torch.testing.assert_close(found[0], found[2])


def test_over_all_layers_a_methods_own_losses_are_not_counted_among_routers() -> None:
    """The z-loss is a mean over tokens, so that the scope changes nothing where every layer has as many."""
    found = []
    for scope in ("layer", "all"):
        options = {"z_loss_weight": 1.0, "balance_weight": 0.0, "sparsity_weight": 1.0, "loss_scope": scope}
        model = adapted_model("ldmole", "llama", **options).train()
        model(input_ids=token_ids())
        found.append(context(model).loss)
    torch.testing.assert_close(found[0], found[1])


def test_a_method_without_a_router_has_none_to_lose() -> None:
    with pytest.raises(AdapterError, match="perft_s has no router; leave them 0"):
        adapted_model("perft_s", "llama", z_loss_weight=1.0)
