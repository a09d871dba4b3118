"""Losses of adapters' routers: Switch load balance, z-loss, importance; over counted tokens only.

Switch   E sum_e f_e P_e: f the share of choices that fall on expert e, P its mean probability
         (Switch Transformers, https://arxiv.org/abs/2101.03961, equation 4)
z        mean log-sum-exp of the logits, squared (ST-MoE, https://arxiv.org/abs/2202.08906, equation 5)
importance   the squared coefficient of variation of the experts' summed weights
         (https://arxiv.org/abs/1701.06538, section 4)
"""

# Shapes: T tokens of all sequences in a row, E experts

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(eq=False)
class Route:
    """What one router decided for the tokens of one pass."""

    site: str
    """Path of the layer it is attached to."""
    probs_TE: Tensor
    """What the router gave each expert, in float32, before anything was cut off."""
    weights_TE: Tensor
    """What multiplied each expert; zero where it was not chosen."""
    chosen_TE: Tensor
    """True at the chosen experts."""
    logits_TE: Tensor | None = None
    """What the probabilities were made from."""
    loss_weights: Mapping[str, float] = field(default_factory=dict)
    """Factor of each loss, by name in ``LOSSES``; 0 or absent is off."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """Losses of the method's own, already multiplied by their factors; one number a token, [T], or one in all."""

    lost: bool = False
    """Whether it was made without gradient; set by the pass."""

    @property
    def has_loss(self) -> bool:
        """Whether a factor is not 0."""
        return bool(self.extra) or any(self.loss_weights.values())

    def detached(self) -> Route:
        """Return the route without gradient."""
        return replace(
            self,
            probs_TE=self.probs_TE.detach(),
            weights_TE=self.weights_TE.detach(),
            chosen_TE=self.chosen_TE.detach(),
            logits_TE=None if self.logits_TE is None else self.logits_TE.detach(),
            extra={name: value.detach() for name, value in self.extra.items()},
        )

    @property
    def learns(self) -> bool:
        """Whether a gradient can reach the router."""
        return self.probs_TE.requires_grad or any(value.requires_grad for value in self.extra.values())


def soft_route(site: str, probs_TE: Tensor, logits_TE: Tensor) -> Route:
    """Return the route of a mixture that has every expert on, weighted by its probability, and no loss."""
    return Route(
        site=site,
        probs_TE=probs_TE,
        weights_TE=probs_TE,
        chosen_TE=torch.ones_like(probs_TE, dtype=torch.bool),
        logits_TE=logits_TE,
    )


def switch_loss(route: Route, counted_T: Tensor | None) -> Tensor:
    """Return the Switch balance loss: 1 where choices and probabilities are even, E where one expert has all."""
    chosen_TE, probs_TE = (
        _counted(route.chosen_TE, counted_T).to(route.probs_TE.dtype),
        _counted(route.probs_TE, counted_T),
    )
    share_E = chosen_TE.sum(0) / chosen_TE.sum().clamp_min(1)
    return share_E.numel() * (share_E * probs_TE.mean(0)).sum()


def z_loss(route: Route, counted_T: Tensor | None) -> Tensor:
    """Return the mean squared log-sum-exp of the logits; 0 for a router that has none."""
    if route.logits_TE is None:
        return route.probs_TE.new_zeros(())
    return _counted(route.logits_TE, counted_T).float().logsumexp(-1).square().mean()


def importance_loss(route: Route, counted_T: Tensor | None) -> Tensor:
    """Return the squared coefficient of variation of the experts' summed weights: 0 where they are even."""
    sums_E = _counted(route.weights_TE, counted_T).float().sum(0)
    return sums_E.var(unbiased=False) / sums_E.mean().square().clamp_min(1e-10)


LOSSES = {"switch": switch_loss, "z": z_loss, "importance": importance_loss}
"""Losses by the name that ``Route.loss_weights`` gives them."""


def total_loss(
    routes: Sequence[Route],
    counted_T: Tensor | None,
    *,
    scope: str = "layer",
    more: Mapping[str, float] | None = None,
) -> Tensor | None:
    """Return the weighted sum of the routes' losses, or None where nothing learns or every factor is 0.

    Args:
        routes: of one pass; those of routers that do not learn are passed over.
        counted_T: which tokens count, [T]; None for all. A route of another number of tokens counts all of its own.
        scope: ``layer``, the mean over routers of each one's loss; or ``all``, where routers with the same number of
            experts and the same factors count as one router that saw all their tokens, as in transformers'
            ``load_balancing_loss_func`` (which is top_k times this, since there each choice counts whole). The two
            scopes are different numbers.
        more: factors of further losses of LOSSES, for every router.
    """
    learning = [route for route in routes if route.learns]
    if counted_T is not None and not bool(counted_T.any()):
        return None
    merged = _merge(learning) if scope == "all" else learning
    sums: dict[str, list[Tensor]] = {}
    for route in merged:
        mask_T = _mask(route, counted_T)
        for name in dict.fromkeys([*route.loss_weights, *(more or {})]):
            factor = route.loss_weights.get(name, 0.0) + (more or {}).get(name, 0.0)
            if factor:
                sums.setdefault(name, []).append(factor * LOSSES[name](route, mask_T))
    for route in learning:
        mask_T = _mask(route, counted_T)
        for name, value in route.extra.items():
            counted = value if value.dim() == 0 else _counted(value, mask_T).mean()
            sums.setdefault(f"extra {name}", []).append(counted)
    if not sums:
        return None
    device = next(iter(sums.values()))[0].device
    return torch.stack([torch.stack([loss.to(device) for loss in values]).mean() for values in sums.values()]).sum()


def _mask(route: Route, counted_T: Tensor | None) -> Tensor | None:
    """Return which of a route's tokens count; a merged route has those of several layers in a row."""
    tokens = route.probs_TE.shape[0]
    if counted_T is None or tokens % counted_T.numel():
        return None
    return counted_T.to(route.probs_TE.device).repeat(tokens // counted_T.numel())


def _counted(values_TE: Tensor, counted_T: Tensor | None) -> Tensor:
    return values_TE if counted_T is None else values_TE[counted_T]


def _merge(routes: Sequence[Route]) -> list[Route]:
    groups: dict[tuple[object, ...], list[Route]] = {}
    for route in routes:
        key = (route.probs_TE.shape, tuple(sorted(route.loss_weights.items())), route.logits_TE is None)
        groups.setdefault(key, []).append(route)
    merged = []
    for group in groups.values():
        first = group[0]
        logits = [route.logits_TE for route in group if route.logits_TE is not None]
        merged.append(
            Route(
                site=first.site,
                probs_TE=torch.cat([route.probs_TE for route in group]),
                weights_TE=torch.cat([route.weights_TE for route in group]),
                chosen_TE=torch.cat([route.chosen_TE for route in group]),
                logits_TE=torch.cat(logits) if logits else None,
                loss_weights=first.loss_weights,
            )
        )
    return merged
