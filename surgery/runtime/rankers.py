"""Scores that order the slots of a layer, so that a budget can keep the best ones: nothing is trained for them.

Unlike those of `scorers.py` they may read the attention of the newest queries. Larger is better. Query heads that read
one KV head count alike (their mean), of a latent all of them. Sinks and newest tokens stay whatever a score says.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .budgets import rank
from .ranking import Ranking


class Ranker(Protocol):
    """One score; what is said of it here are the answers of most."""

    describes: str
    """What stays, and the source, for people."""
    while_decoding: bool = True
    """Whether slots leave while tokens are decoded one by one; else only after several tokens came at once."""
    reads: tuple[str, ...] = ()
    """Options of the step that the score reads, of `observe` and `pool`."""
    gathers: bool = False
    """Whether the score reads a sum over all queries so far, to which `gather` adds the new ones."""
    newest: float = 0.0
    """Part of the budget that goes to the newest tokens."""
    plain_queries: bool = False
    """Whether it needs queries before their rotation."""
    output_norms: bool = False
    """Whether it needs what W_o makes of values."""

    def score(self, ranking: Ranking) -> Tensor:
        """[B, K, S] float32 of all slots; anything where there is none."""
        raise NotImplementedError

    def gather(self, ranking: Ranking) -> Tensor:
        """`ranking.gathered_BKS` and what the new queries add, 0 where there is no slot."""
        return ranking.gathered_BKS


class Streaming(Ranker):
    """The newest stay."""

    describes = "the newest tokens stay (StreamingLLM, arXiv:2309.17453)"

    def score(self, ranking: Ranking) -> Tensor:
        return -ranking.age_BKS.float()


class KeyNorm(Ranker):
    """Short keys stay; of a latent, by the norm of the keys of all heads side by side."""

    describes = "short keys stay (arXiv:2406.11430)"

    def score(self, ranking: Ranking) -> Tensor:
        return -_over_heads(ranking.keys_values()[0].float().square().sum(-1), ranking).sqrt()


class Snap(Ranker):
    """Attention of the newest `observe` queries of the prompt, each token's the mean of `pool` neighbours'.

    As in the authors' code, the observed tokens themselves and neighbours beyond the ends count as 0.
    """

    describes = "what the newest queries of the prompt attend to stays (SnapKV, arXiv:2404.14469)"
    while_decoding = False
    reads = ("observe", "pool")

    def score(self, ranking: Ranking) -> Tensor:
        observed = ranking.queries.count_B.clamp_max(ranking.observe)[:, None, None]
        before = (ranking.attended(ranking.observe) / observed).masked_fill(
            (ranking.age_BKS < observed) | ~ranking.there_BKS, 0.0
        )
        return F.avg_pool1d(before, ranking.pool, stride=1, padding=ranking.pool // 2)


class HeavyHitters(Ranker):
    """Attention of all queries so far, summed up; half of the budget is for the newest tokens."""

    describes = "what all queries so far attend to stays, half of it the newest tokens (H2O, arXiv:2306.14048)"
    gathers = True
    newest = 0.5

    def gather(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS + ranking.attended()

    def score(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS


class ValueAware(HeavyHitters):
    """The same, times the sum of the absolute values of V. Published with 20 first tokens that stay (`sinks`)."""

    describes = "attention of all queries so far times |v|, half of it the newest tokens (VATP, arXiv:2406.12335)"

    def score(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS * _over_heads(ranking.keys_values()[1].float().abs().sum(-1), ranking)


class LastQuery(Ranker):
    """Attention of the newest query, the mean over all heads: the heads of a layer keep the same tokens."""

    describes = "what the newest query attends to stays (TOVA, arXiv:2401.06104)"

    def score(self, ranking: Ranking) -> Tensor:
        (weights,) = ranking.attention(1)
        return weights.mean((1, 2))[:, None].expand_as(ranking.there_BKS)


class Expected(Ranker):
    """Attention that queries of the next 512 positions are expected to pay, times |v|_2.

    exp(k'm / d^.5 + k'Ck / 2d), with mean m and covariance C of the new queries but those of the sinks, turned by the
    mean rotation over those positions; the softmax is over slots behind the sinks. As the authors' code, not the paper,
    whose last factor is |W_o v|.
    """

    describes = "what queries to come are expected to attend to stays (Expected Attention, arXiv:2510.00636)"
    while_decoding = False
    plain_queries = True
    ahead = 512

    def score(self, ranking: Ranking) -> Tensor:
        queries = ranking.queries
        assert queries.plain_BNTH is not None and queries.ahead is not None
        T = queries.plain_BNTH.shape[2]
        query = queries.newest(queries.plain_BNTH, T).float()
        order = ranking.tokens_B[:, None] - T + torch.arange(T, device=query.device)
        counts = (order >= ranking.sinks) & (order >= (ranking.tokens_B - queries.count_B)[:, None])
        share = (counts / counts.sum(-1, keepdim=True).clamp_min(1))[:, None, :, None]
        mean = (query * share).sum(2, keepdim=True)
        centred = query - mean
        covariance = torch.matmul((centred * share).transpose(2, 3), centred)
        turn = functools.partial(queries.ahead, positions=self.ahead)
        mean, covariance = turn(mean), turn(turn(covariance).transpose(2, 3))
        key = ranking.of_queries(ranking.keys_values()[0].float(), query.shape[1])
        logits = torch.matmul(key, mean.transpose(2, 3))[..., 0] * queries.scale
        logits = logits + (torch.matmul(key, covariance) * key).sum(-1) * queries.scale**2 / 2
        hidden = (ranking.place_S < ranking.sinks) | ~ranking.there_BKS
        logits = logits.masked_fill(ranking.of_queries(hidden, query.shape[1]), torch.finfo(torch.float32).min)
        return ranking.by_row(logits.softmax(-1)) * ranking.keys_values()[1].float().norm(dim=-1)


class Critical(Snap):
    """Half of the budget by `snapkv`, the other by (that + 1e-4) |W_o v|_1."""

    describes = "half by what the newest queries attend to, half by that times |W_o v| (CriticalKV, arXiv:2502.03805)"
    output_norms = True

    def score(self, ranking: Ranking) -> Tensor:
        assert ranking.queries.output_norms is not None
        attended = super().score(ranking)
        first = attended.masked_fill(ranking.stays_BKS, torch.inf).masked_fill(~ranking.there_BKS, -torch.inf)
        at_first = rank(first) < (ranking.slots_B // 2).clamp_min(1)[:, None, None]
        value = ranking.queries.output_norms(ranking.keys_values()[1].float())
        return ((attended + 1e-4) * ranking.by_row(value)).masked_fill(at_first, torch.inf)


def _over_heads(x_BkS: Tensor, ranking: Ranking) -> Tensor:
    """[B, K, S]: the sum over the heads that are made from one latent; KV heads are rows of their own."""
    return x_BkS.unflatten(1, (ranking.count_BK.shape[1], -1)).sum(2)


RANKERS: dict[str, Ranker] = {
    "streaming": Streaming(),
    "snapkv": Snap(),
    "h2o": HeavyHitters(),
    "tova": LastQuery(),
    "knorm": KeyNorm(),
    "expected": Expected(),
    "vatp": ValueAware(),
    "critical": Critical(),
}
"""Name in recipes and plans -> score."""
