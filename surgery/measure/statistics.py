"""Means over tokens with bootstrap intervals over windows.

Windows are documents or long pieces of one, so they are what is resampled; tokens of one window are not independent.
Differences of two models are resampled in pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .scoring import Sums

RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % interval; low = high = NaN for a single window, which says nothing about others."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Loss of one model along one path."""

    nats_per_token: Estimate
    by_position: tuple[float, ...]
    """Nats per token in each of `scoring.BUCKETS`."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A model against its baseline along one path, on the same tokens."""

    gap: Estimate
    """Nats per token that the model lost."""
    kl: Estimate
    """KL(baseline || model), nats per token."""
    agreement: Estimate
    """Share of tokens at which both find the same next token likeliest."""
    gap_by_position: tuple[float, ...]
    kl_by_position: tuple[float, ...]


def quality(sums: Sums, model: int, seed: int) -> Quality:
    """Of the model (0) or its baseline (1)."""
    nll = sums.nll if model == 0 else sums.baseline_nll
    return Quality(nats_per_token=bootstrap(nll, sums.tokens, seed), by_position=_by_position(nll, sums.tokens))


def difference(sums: Sums, seed: int) -> Difference:
    """Of the model to its baseline."""
    gap = sums.nll - sums.baseline_nll
    return Difference(
        gap=bootstrap(gap, sums.tokens, seed),
        kl=bootstrap(sums.kl, sums.tokens, seed),
        agreement=bootstrap(sums.same, sums.tokens, seed),
        gap_by_position=_by_position(gap, sums.tokens),
        kl_by_position=_by_position(sums.kl, sums.tokens),
    )


def bootstrap(sums_WP: Tensor, tokens_WP: Tensor, seed: int) -> Estimate:
    """Mean per token, with the 2.5 and 97.5 percentiles of `RESAMPLES` resamples of the windows.

    Args:
        sums_WP, tokens_WP: per window and part of it.
    """
    pair_W2 = torch.stack([sums_WP.sum(1), tokens_WP.sum(1)], 1)
    W = len(pair_W2)
    total, tokens = pair_W2.sum(0).tolist()
    if W == 1:
        return Estimate(value=total / tokens, low=float("nan"), high=float("nan"))
    generator = torch.Generator().manual_seed(seed)
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    for i in range(RESAMPLES):  # one at a time: [RESAMPLES, W] need not fit
        drawn, count = pair_W2[torch.randint(W, (W,), generator=generator)].sum(0)
        means[i] = drawn / count
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(value=total / tokens, low=low, high=high)


def _by_position(sums_WP: Tensor, tokens_WP: Tensor) -> tuple[float, ...]:
    return tuple((sums_WP.sum(0) / tokens_WP.sum(0)).tolist())
