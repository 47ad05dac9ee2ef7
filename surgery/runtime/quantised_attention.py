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

from .packed_forms import Form, Parts

Columns = slice | Tensor
"""Neighbours, or [n] or [B, n] anywhere in the cache."""
Operator = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(queries [B, N, H], visible [B, room], scale) -> mean of values [B, N, V] and log-sum-exp of scores [B, N]."""
KeyMap = Callable[[Tensor, Columns], Tensor]
"""(keys [B, K, n, H], their columns) -> keys as attention reads them."""


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
    ring_R: Tensor | None = None
    """Column of each place of the ring; None where they are the newest ones, in order."""
    operator: Operator | None = None
    """Reads all packed tokens that there is room for, `room`; None where blocks are read."""
    room: int = 0
    packed: Tensor | None = None
    """Tokens that are packed, and `arrived` ones, where there is room for more; None where all columns are there."""
    arrived: Tensor | None = None

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
        level = torch.where(most == -torch.inf, 0.0, most)  # nothing was visible so far: all weights are 0
        weight = torch.exp(scores - level)
        shrink = torch.exp(self.most - level)
        self.total = self.total * shrink + weight.sum(-1, keepdim=True)
        self.sums = [t * shrink for t in self.sums]
        self.sums[which] = self.sums[which] + mean(weight)
        self.most = most

    def add_mean(self, mean_BKGV: Tensor, lse_BKG: Tensor, which: int) -> None:
        """What was summed up elsewhere."""
        self.add(lse_BKG[..., None], lambda weight: weight * mean_BKGV.float(), which)


def attend_packed(
    query_BN1H: Tensor,
    seen: Seen,
    mask: Tensor | None,
    scaling: float,
    kv_of_query: Tensor | None,
    softcap: float | None = None,
    sinks_N: Tensor | None = None,
    operators: bool = False,
) -> Tensor:
    """[B, 1, N, V] in the dtype of the query; computed in float32.

    Args:
        mask: [B or 1, 1 or N, 1, S], bool (True is visible) or additive.
        kv_of_query: [N], the KV head of each query head; None where N / K of them in turn read each.
        sinks_N: logits that take part in the sum and have no value.
        operators: packed tokens may be read by `seen.operator`.
    """
    B, N, _, H = query_BN1H.shape
    K, V = (seen.shape[1] if kv_of_query is None else N), seen.ring[1].shape[-1]
    query = query_BN1H.float().reshape(B, K, N // K, H) * scaling
    keys, values = seen.forms
    to_keys, to_values = (
        basis if basis is None or basis.ndim == 2 or kv_of_query is None else basis.index_select(0, kv_of_query)
        for basis in (keys.basis(H, query.device), values.basis(V, query.device))
    )
    turned = query if to_keys is None else query @ to_keys
    done = _Sum(query, V)

    def spread(x: Tensor) -> Tensor:
        return x.float() if kv_of_query is None else x.float().index_select(1, kv_of_query)

    def add(scores: Tensor, mean: Callable[[Tensor], Tensor], at: Columns, which: int, hidden: Tensor | None) -> None:
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        done.add(_masked(scores, None if mask is None else columns_of(mask, at), hidden), mean, which)

    def add_plain(key: Tensor, value: Tensor, at: Columns, hidden: Tensor | None) -> None:
        key = key if seen.key_map is None else seen.key_map(key, at)
        add(query @ spread(key).mT, lambda weight: weight @ spread(value), at, 1, hidden)

    if seen.first[0].shape[2]:
        add_plain(*seen.first, *_first(seen))
    says_yes_or_no = mask is None or (mask.dtype == torch.bool and mask.shape[1] == 1)
    plain = seen.key_map is None and kv_of_query is None and softcap is None and says_yes_or_no
    operator = seen.operator if operators and plain and not query_BN1H.requires_grad else None
    if operator is not None:
        at = slice(seen.first[0].shape[2], seen.first[0].shape[2] + seen.room)
        hidden = _elsewhere(seen, at, ring=False)
        assert hidden is not None
        visible = ~hidden if mask is None else ~hidden & columns_of(mask, at)
        found, lse = operator(query_BN1H[:, :, 0], visible[:, 0, 0], scaling)
        done.add_mean(found.unflatten(1, (K, -1)), lse.unflatten(1, (K, -1)), 0)
    for start, count, key_parts, value_parts in seen.blocks() if operator is None else ():
        at = slice(start, start + count)
        hidden = _elsewhere(seen, at, ring=False)
        if seen.key_map is not None:
            scores = query @ spread(seen.key_map(keys.decode(key_parts, H), at)).mT
        elif kv_of_query is not None:
            scores = turned @ spread(keys.decode(key_parts, H, turned=True)).mT
        else:
            scores = keys.scores(turned, key_parts)
        if kv_of_query is not None:
            value = spread(values.decode(value_parts, V, turned=True))
            add(scores, functools.partial(_weighted, value=value), at, 0, hidden)
        else:
            add(scores, functools.partial(values.mean, parts=value_parts, width=V), at, 0, hidden)
    newest = slice(seen.tokens - seen.ring[0].shape[2], seen.tokens) if seen.ring_R is None else seen.ring_R
    add_plain(*seen.ring, newest, _elsewhere(seen, newest, ring=True))
    mean = done.sums[0] if to_values is None else done.sums[0] @ to_values.mT
    total = done.total
    if sinks_N is not None:
        total = total + torch.exp(sinks_N.float().reshape(1, K, N // K, 1) - done.most)
    out = (mean + done.sums[1]) / total
    return out.to(query_BN1H.dtype).reshape(B, 1, N, V)


def _weighted(weight: Tensor, value: Tensor) -> Tensor:
    return weight @ value


def columns_of(x: Tensor, at: Columns) -> Tensor:
    """Columns of [B or 1, ., ., S]."""
    if isinstance(at, slice):
        return x[..., at]
    if at.ndim == 1:
        return x.index_select(-1, at)
    return x.expand(len(at), -1, -1, -1).gather(3, at[:, None, None].expand(-1, *x.shape[1:3], -1))


def _first(seen: Seen) -> tuple[Columns, Tensor | None]:
    """Where the first tokens stand, in columns of their own in each padded sequence, and which of them are to come."""
    count = seen.first[0].shape[2]
    if seen.begin_B is None:
        return slice(0, count), None
    columns = seen.begin_B[:, None] + torch.arange(count, device=seen.device)
    if seen.arrived is None:
        return columns, None
    return columns % seen.tokens, (columns >= seen.arrived)[:, None, None]


def _elsewhere(seen: Seen, at: Columns, *, ring: bool) -> Tensor | None:
    """[B or 1, 1, 1, n]: columns whose tokens lie elsewhere, or are still to come."""
    if seen.begin_B is None:
        return None
    columns = torch.arange(at.start, at.stop, device=seen.device) if isinstance(at, slice) else at
    first = seen.first[0].shape[2]
    place = columns - seen.begin_B[:, None]
    hidden = (place >= 0) & (place < first)
    if seen.packed is not None and seen.arrived is not None:
        border = first + seen.packed
        hidden = hidden | ((columns < border) | (columns >= seen.arrived) if ring else columns >= border)
    return hidden[:, None, None]


def _masked(scores: Tensor, mask: Tensor | None, hidden: Tensor | None) -> Tensor:
    """`scores` [B, K, G, n], hidden by a mask [B or 1, 1 or N, 1, n] and by what lies elsewhere."""
    if mask is not None:
        if mask.shape[1] > 1:
            mask = mask.reshape(-1, *scores.shape[1:3], mask.shape[-1])
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    return scores if hidden is None else scores.masked_fill(hidden, -torch.inf)
