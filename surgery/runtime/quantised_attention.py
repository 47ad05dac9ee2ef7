"""Attention of one new token over a quantised cache, a block of tokens after another: nothing is expanded as a whole.

Blocks are decoded, scored and added up with a running maximum, as flash attention does. Where a codec rotates vectors,
the query is taken into its basis, and the mean of the values out of it, once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .codecs import Form, Parts

KeyMap = Callable[[Tensor, int], Tensor]
"""(keys [B, K, n, H], their first column) -> keys as attention reads them."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What one new token of each sequence sees of a quantised layer."""

    first: tuple[Tensor, Tensor]
    """Keys and values [B, K, s, .] of the first tokens."""
    begin_B: Tensor | None
    """Column of each sequence's first token; None where that is 0 in all."""
    blocks: Callable[[], Iterator[tuple[int, int, Parts, Parts]]]
    """(first column, tokens, parts of keys, parts of values) of packed blocks."""
    forms: tuple[Form, Form]
    """Of keys and of values."""
    ring: tuple[Tensor, Tensor]
    tokens: int
    """Columns in all."""
    key_map: KeyMap | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """As of the keys, were they one tensor."""
        B, K, _, H = self.ring[0].shape
        return B, K, self.tokens, H

    @property
    def device(self) -> torch.device:
        return self.ring[0].device


class _Sum:
    """Softmax-weighted sums that go on from block to block, per KV head and the queries that read it."""

    def __init__(self, query_BKGH: Tensor, widths: int) -> None:
        B, K, G, _ = query_BKGH.shape
        self.most = query_BKGH.new_full((B, K, G, 1), -torch.inf)
        self.total = query_BKGH.new_zeros(B, K, G, 1)
        self.sums = [query_BKGH.new_zeros(B, K, G, widths) for _ in range(2)]

    def add(self, scores: Tensor, mean: Callable[[Tensor], Tensor], which: int) -> None:
        most = torch.maximum(self.most, scores.amax(-1, keepdim=True))
        weight = torch.exp(scores - most)
        if bool((most == -torch.inf).any()):  # nothing was visible so far
            weight = torch.where(most == -torch.inf, 0.0, weight)
        shrink = torch.where(most == -torch.inf, 1.0, torch.exp(self.most - most))
        self.total = self.total * shrink + weight.sum(-1, keepdim=True)
        self.sums = [t * shrink for t in self.sums]
        self.sums[which] = self.sums[which] + mean(weight)
        self.most = most


def attend_packed(
    query_BN1H: Tensor,
    seen: Seen,
    mask: Tensor | None,
    scaling: float,
    kv_of_query: Tensor | None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """[B, 1, N, V] in the dtype of the query; computed in float32.

    Args:
        mask: [B or 1, 1 or N, 1, S], bool (True is visible) or additive.
        kv_of_query: [N], the KV head of each query head; None where N / K of them in turn read each.
        sinks_N: logits that take part in the sum and have no value.
    """
    B, N, _, H = query_BN1H.shape
    K, V = (seen.shape[1] if kv_of_query is None else N), seen.ring[1].shape[-1]
    query = query_BN1H.float().reshape(B, K, N // K, H) * scaling
    keys, values = seen.forms
    bases = keys.basis(H), values.basis(V)
    turned = query if bases[0] is None else query @ bases[0].to(query.device)
    done = _Sum(query, V)

    def spread(x: Tensor) -> Tensor:
        return x.float() if kv_of_query is None else x.float().index_select(1, kv_of_query)

    def add(scores: Tensor, mean: Callable[[Tensor], Tensor], start: int, which: int) -> None:
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        end = start + scores.shape[-1]
        hidden = _elsewhere(seen, start, end)
        done.add(_masked(scores, None if mask is None else mask[..., start:end], hidden), mean, which)

    def add_plain(key: Tensor, value: Tensor, start: int) -> None:
        key = key if seen.key_map is None else seen.key_map(key, start)
        add(query @ spread(key).mT, lambda weight: weight @ spread(value), start, 1)

    if seen.first[0].shape[2]:
        if seen.begin_B is None:
            add_plain(*seen.first, 0)
        else:
            _add_first(query, seen, mask, spread, done, softcap)
    for start, _, key_parts, value_parts in seen.blocks():
        if seen.key_map is not None:
            scores = query @ spread(seen.key_map(keys.decode(key_parts, H), start)).mT
        elif kv_of_query is not None:
            scores = turned @ spread(keys.decode(key_parts, H, turned=True)).mT
        else:
            scores = keys.scores(turned, key_parts)
        if kv_of_query is not None:
            value = spread(values.decode(value_parts, V, turned=True))
            add(scores, functools.partial(_weighted, value=value), start, 0)
        else:
            add(scores, functools.partial(values.mean, parts=value_parts, width=V), start, 0)
    add_plain(*seen.ring, seen.tokens - seen.ring[0].shape[2])
    mean = done.sums[0] if bases[1] is None else done.sums[0] @ bases[1].t().to(query.device)
    total = done.total
    if sinks_N is not None:
        total = total + torch.exp(sinks_N.float().reshape(1, K, N // K, 1) - done.most)
    out = (mean + done.sums[1]) / total
    return out.to(query_BN1H.dtype).reshape(B, 1, N, V)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    return weight @ value


def _elsewhere(seen: Seen, start: int, end: int) -> Tensor | None:
    """[B, 1, 1, n]: columns of padded sequences whose tokens lie in `first`."""
    if seen.begin_B is None:
        return None
    place = torch.arange(start, end, device=seen.device) - seen.begin_B[:, None]
    return ((place >= 0) & (place < seen.first[0].shape[2]))[:, None, None]


def _masked(scores: Tensor, mask: Tensor | None, hidden: Tensor | None) -> Tensor:
    """`scores` [B, K, G, n], hidden by a mask [B or 1, 1 or N, 1, n] and by what lies elsewhere."""
    if mask is not None:
        if mask.shape[1] > 1:
            mask = mask.reshape(-1, *scores.shape[1:3], mask.shape[-1])
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)


def _add_first(
    query: Tensor,
    seen: Seen,
    mask: Tensor | None,
    spread: Callable[[Tensor], Tensor],
    done: _Sum,
    softcap: float | None,
) -> None:
    """The first tokens of padded sequences, which stand in columns of their own in each."""
    assert seen.begin_B is not None
    key, value = seen.first
    columns = seen.begin_B[:, None] + torch.arange(key.shape[2], device=key.device)
    if seen.key_map is not None:
        key = torch.cat([seen.key_map(key, int(c))[b : b + 1] for b, c in enumerate(seen.begin_B)])
    scores = query @ spread(key).mT
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        wide = mask.expand(len(key), -1, -1, -1)
        mask = wide.gather(3, columns[:, None, None].expand(-1, wide.shape[1], 1, -1))
    done.add(_masked(scores, mask, None), lambda weight: weight @ spread(value), 1)
