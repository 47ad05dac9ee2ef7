"""What queries can absorb, and how: the maps back that pooling leaves, and a new order of heads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from ...attention.weights import AttentionWeights
from .shared_head import Fold


def foldable(weights: AttentionWeights) -> Fold:
    """What of a complex factor per frequency the queries can absorb in the parameters that they have.

    A norm per head with one gain for all heads undoes any magnitude: what stays is a phase per frequency where the gain
    of its two channels is equal, else a sign. With one gain per head, magnitudes go into the gain. A layer norm keeps
    no phase, and without gains of its own per head nothing.
    """
    q, k = weights.q_norm, weights.k_norm
    if q is None and (k is None or not k.after_rotary):
        return "complex"
    if q is not None and q.kind == "layer":
        return "none" if weights.q_norm_shared else "real"
    gains = [weights.q_norm_NH]
    if (q is not None and q.after_rotary) or (k is not None and k.after_rotary):
        gains.append(weights.k_norm_KH)
    first, second = weights.rotated()
    equal = all(x is None or bool((x[:, first] == x[:, second]).all()) for x in gains)
    if q is None:
        return "complex" if equal else "real"
    if weights.q_norm_shared:
        return "phase" if equal else "sign"
    return "complex" if equal else "real"


def fold_queries(weights: AttentionWeights, read_NHH: Tensor, limit: Fold) -> AttentionWeights:
    """q ← readᵀ q, as far as `limit` (see `foldable`) lets the parameters say so."""
    q, bias = weights.q_NHD, weights.q_bias_NH
    if weights.q_norm is None:
        new_q = read_NHH.mT @ q.double()
        new_bias = None if bias is None else torch.einsum("nij,ni->nj", read_NHH, bias.double()).to(bias.dtype)
        return replace(weights, q_NHD=new_q.to(q.dtype), q_bias_NH=new_bias)
    if limit == "none":
        return weights
    if limit == "real":
        turn, size = torch.eye(weights.head_dim, dtype=torch.float64).expand_as(read_NHH), read_NHH.diagonal(0, 1, 2)
    else:
        size = read_NHH.square().sum(-1).sqrt()  # of a pair's rows: |c|; of a lone channel: its absolute factor
        turn = read_NHH / size.clamp_min(1e-150)[..., None]
    out = replace(weights, q_NHD=(turn.mT @ q.double()).to(q.dtype))
    if bias is not None:
        out = replace(out, q_bias_NH=torch.einsum("nij,ni->nj", turn, bias.double()).to(bias.dtype))
    if not weights.q_norm_shared and weights.q_norm_NH is not None:
        out = replace(out, q_norm_NH=(weights.q_norm_NH.double() * size).to(weights.q_norm_NH.dtype))
        if weights.q_norm_bias_NH is not None:
            out = replace(out, q_norm_bias_NH=(weights.q_norm_bias_NH.double() * size).to(weights.q_norm_bias_NH.dtype))
    return out


def permute_queries(weights: AttentionWeights) -> AttentionWeights:
    """Bring the query heads into the order of `groups`, with all that belongs to a head: the function is the same."""
    order = [h for g in weights.groups for h in g]
    if order == list(range(weights.heads)):
        return weights
    starts = list(itertools.accumulate((len(g) for g in weights.groups), initial=0))
    slopes = weights.alibi_slopes

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[order]

    return replace(
        weights,
        q_NHD=weights.q_NHD[order],
        q_bias_NH=take(weights.q_bias_NH),
        o_DNV=weights.o_DNV[:, order],
        q_norm_NH=take(weights.q_norm_NH),
        q_norm_bias_NH=take(weights.q_norm_bias_NH),
        sinks_N=take(weights.sinks_N),
        alibi_slopes=None if slopes is None else tuple(slopes[h] for h in order),
        groups=tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts)),
    )
