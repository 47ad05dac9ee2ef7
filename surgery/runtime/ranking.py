"""What a score of slots may read: the slots of one layer, and the attention that the newest queries pay to them.

Attention is computed anew for those queries that a score observes, some of them at a time: never [T, T] at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .budgets import rank
from .noise import gumbel
from .queries import Queries
from .slots import Slots

_AT_ONCE = 2**24
"""Weights that are computed at once: 64 MB in float32."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The slots of one layer when some of them are to leave; those of the new tokens are the last ones of each row."""

    slots: Slots
    """Live slots first, in the order of their tokens."""
    count_BK: Tensor
    """Live slots of each row."""
    queries: Queries
    observe: int
    """Newest queries that a score may observe, as the recipe says."""
    pool: int
    """Neighbours that share their scores, as the recipe says; odd."""
    sinks: int
    """First tokens, which stay."""
    tokens_B: Tensor
    """Tokens of each sequence so far, padding left out."""
    slots_BK: Tensor
    """Slots that each head keeps, [B, 1] where all as many; where heads share, on average over them."""
    newest_BK: Tensor
    """Newest tokens of each head that stay; likewise."""

    @property
    def place_S(self) -> Tensor:
        """Places in a row."""
        return torch.arange(len(self.slots), device=self.count_BK.device)

    @property
    def there_BKS(self) -> Tensor:
        """Whether there is a slot."""
        return self.place_S < self.count_BK[..., None]

    @property
    def age_BKS(self) -> Tensor:
        """Slots behind each one in its row: 0 of the newest."""
        return self.count_BK[..., None] - 1 - self.place_S

    @property
    def stays_BKS(self) -> Tensor:
        """Whether a slot stays whatever its score."""
        return (self.place_S < self.sinks) | (self.age_BKS < self.newest_BK[..., None])

    @property
    def gathered_BKS(self) -> Tensor:
        """What the score has summed up for each slot so far; 0 of new ones."""
        assert self.slots.gathered_BKS is not None
        return self.slots.gathered_BKS

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """K and V of all slots, [B, heads, S, .]; of a latent those of all heads that are made from it."""
        key, value = self.slots.key_BKSH, self.slots.value_BKSV
        return (key, value) if self.queries.expand is None else self.queries.expand(key, value)

    def attention(self, last: int | None = None) -> Iterator[Tensor]:
        """Weights [B, N, Q, S] of some queries after others, oldest first; float32.

        0 behind the query, and in queries that are not there (of short sequences).

        Args:
            last: newest queries that are asked for; None: all new ones.
        """
        for weights, _ in self._blocks(last):
            yield F.pad(weights, (0, len(self.slots) - weights.shape[-1]))

    def attended(self, last: int | None = None, noisy: bool = False) -> Tensor:
        """[B, K, S]: the sum of those weights over the queries, and their mean over the query heads of each row.

        Args:
            noisy: Gumbel noise is added to the logits, of its own for each head, query and slot.
        """
        return self._summed(last, lambda weights, age_Q: weights, noisy)

    def below_mean(self, last: int | None = None) -> Tensor:
        """[B, K, S]: the queries that pay a slot less than 1 / (slots that they see); mean over the heads of a row."""

        def below(weights: Tensor, age_Q: Tensor) -> Tensor:
            sees_BKQS = self.age_BKS[:, :, None, : weights.shape[-1]] >= age_Q[:, None]
            sees_BKQS = sees_BKQS & (age_Q < self.queries.count_B[:, None])[:, None, :, None]
            least_BKQ = 1.0 / (self.count_BK[..., None] - age_Q).clamp_min(1)
            sees, least = (self.of_queries(x, weights.shape[1]) for x in (sees_BKQS, least_BKQ))
            return (weights < least[..., None]) & sees

        return self._summed(last, below)

    def most_attended(self) -> Tensor:
        """[B, K, S]: the largest of those weights, over the new queries and the query heads of each row."""
        most = torch.zeros((*self.queries.query_BNTH.shape[:2], len(self.slots)), device=self.count_BK.device)
        for weights, _ in self._blocks(None):
            part = most[..., : weights.shape[-1]]
            part.copy_(torch.maximum(part, weights.amax(2)))
        index = self.queries.row_of_query
        if index is None:
            return most.unflatten(1, (self.count_BK.shape[1], -1)).amax(2)
        rows = most.new_zeros(len(most), self.count_BK.shape[1], len(self.slots))
        return rows.scatter_reduce(1, index[None, :, None].expand_as(most), most, "amax")

    def _summed(self, last: int | None, of: Callable[[Tensor, Tensor], Tensor], noisy: bool = False) -> Tensor:
        """[B, K, S]: the sum over the queries of what `of` makes of weights [B, N, Q, S] and ages; mean over heads."""
        total = torch.zeros((*self.queries.query_BNTH.shape[:2], len(self.slots)), device=self.count_BK.device)
        for weights, age_Q in self._blocks(last, noisy):
            total[..., : weights.shape[-1]] += of(weights, age_Q).sum(2)
        return self.by_row(total)

    def _blocks(self, last: int | None, noisy: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
        """`attention`, without the slots behind all of the queries of a block, and the tokens behind each query."""
        T = self.queries.query_BNTH.shape[2]
        last = T if last is None else min(last, T)
        query = self.queries.newest(self.queries.query_BNTH, last).float()
        (B, N), rows = query.shape[:2], self.count_BK.shape[1]
        key = self.keys_values()[0].float()
        if self.queries.row_of_query is not None:
            key, rows = key.index_select(1, self.queries.row_of_query), N
        at_once = max(1, _AT_ONCE // max(1, B * N * len(self.slots)))
        longest = int(self.count_BK.max())
        for begin in range(0, last, at_once):
            end = min(begin + at_once, last)
            age_Q = torch.arange(last - 1 - begin, last - 1 - end, -1, device=query.device)
            S = max(1, longest - (last - end))
            asked = query[:, :, begin:end].reshape(B, key.shape[1], -1, query.shape[-1])
            with torch.autocast(asked.device.type, enabled=False):  # what ranks is in float32 everywhere
                logits = torch.matmul(asked, key[:, :, :S].transpose(2, 3))
            logits = logits.view(B, N, end - begin, S).mul_(self.queries.scale)
            if self.queries.softcap is not None:
                logits = self.queries.softcap * torch.tanh(logits / self.queries.softcap)
            if self.slots.more_BKS is not None:
                logits = logits + self.of_queries(self.slots.more_BKS.log1p(), N)[:, :, None, :S]
            if noisy:
                order_B1Q1 = (self.tokens_B[:, None] - 1 - age_Q)[:, None, :, None]
                head_N11 = torch.arange(N, device=query.device)[:, None, None]
                logits = logits + gumbel(order_B1Q1, head_N11, self.place_S[:S])
            hidden = self.age_BKS[:, :, None, :S] < age_Q[:, None]
            if self.queries.row_of_query is not None:
                hidden = hidden.index_select(1, self.queries.row_of_query)
            logits.view(B, rows, -1, end - begin, S).masked_fill_(hidden[:, :, None], torch.finfo(torch.float32).min)
            if self.queries.sinks_N is not None:
                sink = self.queries.sinks_N.float().view(1, N, 1, 1).expand(B, -1, end - begin, 1)
                logits = torch.cat((logits, sink), dim=-1)
            weights = logits.softmax(-1)[..., :S]
            there = age_Q < self.queries.count_B[:, None]
            if self.queries.real_BT is not None:
                weights = weights.masked_fill(~there[:, None, :, None], 0.0)
            yield weights, age_Q

    def ranked(self, score_BKS: Tensor) -> Tensor:
        """`score_BKS`, infinite where a slot stays whatever it says, and -infinite where there is none."""
        return score_BKS.masked_fill(self.stays_BKS, torch.inf).masked_fill(~self.there_BKS, -torch.inf)

    def among_best(self, score_BKS: Tensor, slots_BK: Tensor) -> Tensor:
        """[B, K, S]: the best slots of each row, so many, those that stay before all others."""
        return rank(self.ranked(score_BKS)) < slots_BK[..., None]

    def plain_queries(self) -> tuple[Tensor, Tensor]:
        """Queries of the new tokens before their rotation [B, N, T, H], float32, and the part [B, 1, T, 1] of each in
        their mean: 0 of sinks and padding."""
        assert self.queries.plain_BNTH is not None
        T = self.queries.plain_BNTH.shape[2]
        query = self.queries.newest(self.queries.plain_BNTH, T).float()
        order = self.tokens_B[:, None] - T + torch.arange(T, device=query.device)
        counts = (order >= self.sinks) & (order >= (self.tokens_B - self.queries.count_B)[:, None])
        return query, (counts / counts.sum(-1, keepdim=True).clamp_min(1))[:, None, :, None]

    def of_new(self, x_BT: Tensor) -> Tensor:
        """[B, K, S]: for the slot of each new token what `x_BT` says of that token, 0 for others."""
        T, real = x_BT.shape[1], self.queries.real_BT
        ordered = x_BT if real is None else x_BT.gather(1, torch.argsort(real.byte(), dim=-1, stable=True))
        place = (T - 1 - self.age_BKS).clamp(0, T - 1)
        found = ordered[:, None].expand(-1, place.shape[1], -1).gather(2, place)
        new = (self.age_BKS >= 0) & (self.age_BKS < self.queries.count_B[:, None, None])
        return found.masked_fill(~new, 0.0)

    def of_queries(self, x_BK: Tensor, heads: int) -> Tensor:
        """[B, N, ...] from [B, K, ...]: for each query head what its row says."""
        if self.queries.row_of_query is not None:
            return x_BK.index_select(1, self.queries.row_of_query)
        return x_BK.repeat_interleave(heads // x_BK.shape[1], dim=1)

    def by_row(self, x_BN: Tensor) -> Tensor:
        """[B, K, ...] from [B, N, ...]: the mean over the query heads that read each row."""
        rows = self.count_BK.shape[1]
        index = self.queries.row_of_query
        if index is None:
            return x_BN.unflatten(1, (rows, -1)).mean(2)
        total = x_BN.new_zeros(len(x_BN), rows, *x_BN.shape[2:]).index_add_(1, index, x_BN)
        return total / torch.bincount(index, minlength=rows).view(1, -1, *[1] * (x_BN.ndim - 2))
