"""Interpolated modified Kneser-Ney: the n-gram baseline that the demo model has to beat.

    Chen and Goodman 1999, https://doi.org/10.1006/csla.1999.0128, section 3 (equations 26 to 31)

    p_k(w | h) = max(c(h w) - D(c(h w)), 0) / c(h .) + gamma(h) p_{k-1}(w | h')
    gamma(h)   = (D1 N1(h) + D2 N2(h) + D3 N3+(h)) / c(h .)

h' is h without its first token. Below the highest order, c counts the different tokens seen before
the n-gram instead of its occurrences. An n-gram is one 64-bit integer, so counting is sorting.
"""

# Shapes: N tokens of a stream, G distinct n-grams, C distinct contexts

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_TOKEN_BITS = 11
_TOKEN_MASK = (1 << _TOKEN_BITS) - 1
MAX_ORDER = 5
"""The longest n-gram whose tokens fit one signed 64-bit integer."""


@dataclass(frozen=True, slots=True)
class _Order:
    """What is known of n-grams of one length: the first two by n-gram (G), the rest by context (C)."""

    keys: Tensor
    """Packed n-grams, sorted."""
    discounted: Tensor
    """Counts less their discounts."""
    contexts: Tensor
    """Packed n-grams without their last token, sorted."""
    totals: Tensor
    """Counts of each context."""
    gammas: Tensor
    """Share that each context leaves to the lower order."""


class NGramModel:
    """An n-gram model of a stream of token ids below 2048."""

    def __init__(self, stream_N: Tensor, *, vocab_size: int, order: int = MAX_ORDER) -> None:
        """Count the n-grams of `stream_N` up to `order`.

        Raises:
            ValueError: the order is not in 1..5 or the vocabulary needs more than 11 bits.
        """
        if not 1 <= order <= MAX_ORDER or vocab_size > _TOKEN_MASK + 1:
            raise ValueError(
                f"order {order} and vocabulary {vocab_size}: this packs up to {MAX_ORDER} tokens "
                f"below {_TOKEN_MASK + 1} into one integer"
            )
        self.vocab_size = vocab_size
        self._orders: list[_Order] = []
        keys_G, counts_G = torch.unique(pack_ngrams(stream_N, order), return_counts=True)
        for length in range(order, 0, -1):
            self._orders.insert(0, _estimate_order(keys_G, counts_G))
            # one distinct longer n-gram is one distinct token seen before the shorter one
            suffixes_G = keys_G & ((1 << _TOKEN_BITS * (length - 1)) - 1)
            keys_G, counts_G = torch.unique(suffixes_G, return_counts=True)

    def score(self, stream_N: Tensor) -> Tensor:
        """Negative log-likelihoods in nats of every token but the first, shape (N - 1,).

        The first tokens use what context they have.
        """
        probabilities_N = torch.full((len(stream_N) - 1,), 1 / self.vocab_size, dtype=torch.float64)
        for length, order in enumerate(self._orders, start=1):
            start = max(length - 2, 0)  # the first target with length - 1 tokens before it
            keys_N = pack_ngrams(stream_N[1:] if length == 1 else stream_N, length)
            mixed_N = _interpolate(order, keys_N, probabilities_N[start:])
            probabilities_N = torch.cat([probabilities_N[:start], mixed_N])
        return -probabilities_N.log()


def pack_ngrams(stream_N: Tensor, length: int) -> Tensor:
    """Pack every run of `length` tokens into an integer, the last token in the lowest bits."""
    num_ngrams = max(len(stream_N) - length + 1, 0)
    keys_N = torch.zeros(num_ngrams, dtype=torch.int64)
    for offset in range(length):
        keys_N = (keys_N << _TOKEN_BITS) | stream_N[offset : offset + num_ngrams]
    return keys_N


def _estimate_order(keys_G: Tensor, counts_G: Tensor) -> _Order:
    discounts = _estimate_discounts(counts_G)
    discounts_G = discounts[counts_G.clamp(max=3)]
    contexts_C, context_of_G = torch.unique_consecutive(keys_G >> _TOKEN_BITS, return_inverse=True)
    zeros_C = torch.zeros(len(contexts_C), dtype=torch.float64)
    totals_C = zeros_C.index_add(0, context_of_G, counts_G.double())
    # the mass taken from every n-gram of a context is what the lower order may hand out
    gammas_C = zeros_C.index_add(0, context_of_G, discounts_G) / totals_C
    return _Order(keys_G, counts_G - discounts_G, contexts_C, totals_C, gammas_C)


def _estimate_discounts(counts_G: Tensor) -> Tensor:
    """Discounts of counts 0, 1, 2 and 3 or more (Chen and Goodman, equation 26)."""
    n1, n2, n3, n4 = ((counts_G == count).sum().item() for count in (1, 2, 3, 4))
    if min(n1, n2, n3) == 0:  # too few n-grams to estimate: single tokens are all frequent
        return torch.tensor([0.0, 0.5, 0.5, 0.5], dtype=torch.float64)
    y = n1 / (n1 + 2 * n2)
    raw = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    bounded = [min(max(d, 0.05), 0.95 * count) for count, d in enumerate(raw, start=1)]
    return torch.tensor([0.0, *bounded], dtype=torch.float64)


def _interpolate(order: _Order, keys_N: Tensor, lower_N: Tensor) -> Tensor:
    """Mix this order's estimate with the lower one; a context never seen leaves the lower one."""
    discounted_N, _ = _look_up(order.keys, order.discounted, keys_N)
    contexts_N = keys_N >> _TOKEN_BITS
    totals_N, is_seen_N = _look_up(order.contexts, order.totals, contexts_N)
    gammas_N, _ = _look_up(order.contexts, order.gammas, contexts_N)
    mixed_N = discounted_N / totals_N.clamp(min=1) + gammas_N * lower_N
    return torch.where(is_seen_N, mixed_N, lower_N)


def _look_up(sorted_keys_G: Tensor, values_G: Tensor, keys_N: Tensor) -> tuple[Tensor, Tensor]:
    """Values of `keys_N`, zero where absent, and which are present."""
    places_N = torch.searchsorted(sorted_keys_G, keys_N).clamp(max=len(sorted_keys_G) - 1)
    is_present_N = sorted_keys_G[places_N] == keys_N
    return torch.where(is_present_N, values_G[places_N], 0.0), is_present_N
