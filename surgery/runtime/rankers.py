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

from .noise import gumbel
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
    rehearses: bool = False
    """Whether it reads the attention of a second pass over each prompt, in which slots leave."""
    is_attention: bool = False
    """Whether it is a part of the attention of some queries, so that layers can be compared, and slots added up."""
    output_norms: bool = False
    """Whether it needs what W_o makes of values."""
    attends: bool = True
    """Whether it reads what queries attend to."""
    separators: bool = False
    """Whether it needs to know which tokens separate parts of the text."""

    def score(self, ranking: Ranking) -> Tensor:
        """[B, K, S] float32 of all slots; anything where there is none."""
        raise NotImplementedError

    def gather(self, ranking: Ranking) -> Tensor:
        """`ranking.gathered_BKS` and what the new queries add, 0 where there is no slot."""
        return ranking.gathered_BKS


class Streaming(Ranker):
    """The newest stay."""

    describes = "the newest tokens stay (StreamingLLM, arXiv:2309.17453)"
    attends = False

    def score(self, ranking: Ranking) -> Tensor:
        return -ranking.age_BKS.float()


class Separators(Ranker):
    """Tokens that separate parts of the text, the newest of them first; what is left of the budget goes to the newest.

    The authors give separators and newest tokens budgets of their own, and drop the oldest separators; here both share
    one, and `recent` says how many of the newest tokens are sure of a place.
    """

    describes = "separators stay, and the newest tokens (SepLLM, arXiv:2412.12094)"
    gathers = True
    attends = False
    separators = True
    reads = ("separators",)

    def gather(self, ranking: Ranking) -> Tensor:
        found_BT = ranking.queries.separators_BT
        if found_BT is None:
            raise ValueError(
                "sepllm knows separators by their ids, and the model was called with embeddings. Pass input_ids, or "
                "use another score."
            )
        return ranking.gathered_BKS + ranking.of_new(found_BT.float())

    def score(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS * len(ranking.slots) - ranking.age_BKS


class KeyNorm(Ranker):
    """Short keys stay; of a latent, by the norm of the keys of all heads side by side."""

    describes = "short keys stay (arXiv:2406.11430)"
    attends = False

    def score(self, ranking: Ranking) -> Tensor:
        return -_over_heads(ranking.keys_values()[0].float().square().sum(-1), ranking).sqrt()


class Snap(Ranker):
    """Attention of the newest `observe` queries of the prompt, each token's the mean of `pool` neighbours'.

    As in the authors' code, the observed tokens themselves and neighbours beyond the ends count as 0.
    """

    describes = "what the newest queries of the prompt attend to stays (SnapKV, arXiv:2404.14469)"
    while_decoding = False
    reads: tuple[str, ...] = ("observe", "pool")
    is_attention = True

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
    is_attention = True

    def gather(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS + ranking.attended()

    def score(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS


class ValueAware(HeavyHitters):
    """The same, times the sum of the absolute values of V. Published with 20 first tokens that stay (`sinks`)."""

    describes = "attention of all queries so far times |v|, half of it the newest tokens (VATP, arXiv:2406.12335)"
    is_attention = False

    def score(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS * _over_heads(ranking.keys_values()[1].float().abs().sum(-1), ranking)


class Keyformer(HeavyHitters):
    """The same sum, of a softmax over noisy logits: Gumbel noise is added to each, so that slots which got little by
    chance are not lost.

    Its temperature rises from 1 to 2 over an answer of known length in the paper; here it stays at the 1 of prompts,
    for nobody tells how much will be decoded.
    """

    describes = (
        "what all queries so far attend to under noise stays, half of it the newest (Keyformer, arXiv:2403.09054)"
    )

    def gather(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS + ranking.attended(noisy=True)


class Scissorhands(Ranker):
    """How few queries paid a slot less than the mean of what they saw: those of the newest 400 of a prompt, and of all
    that are decoded behind it."""

    describes = (
        "what fewest of the last 400 queries attended to below their mean stays (Scissorhands, arXiv:2305.17118)"
    )
    gathers = True
    history = 400

    def gather(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS + ranking.below_mean(self.history)

    def score(self, ranking: Ranking) -> Tensor:
        return -ranking.gathered_BKS


class Buzz(HeavyHitters):
    """Attention of all queries so far, the best one of each stretch of neighbours before all others.

    Slots between sinks and newest are cut into as many stretches as may stay of them; in the authors' code stretches
    have a fixed length, and the budget follows from it.
    """

    describes = "of each stretch of neighbours the most attended stays, half of it the newest (BUZZ, arXiv:2410.23079)"
    is_attention = False

    def score(self, ranking: Ranking) -> Tensor:
        open_BK = (ranking.count_BK - ranking.sinks - ranking.newest_BK).clamp_min(1)
        room_BK = (ranking.slots_BK - ranking.sinks - ranking.newest_BK).clamp_min(1)
        length_BK1 = -(-open_BK // room_BK)[..., None]
        free = ranking.there_BKS & ~ranking.stays_BKS
        stretch = ((ranking.place_S - ranking.sinks).clamp_min(0) // length_BK1).clamp_max(len(ranking.slots) - 1)
        score = ranking.gathered_BKS.masked_fill(~free, -1.0)
        best = torch.full_like(score, -1.0).scatter_reduce(2, stretch, score, "amax").gather(2, stretch)
        return score + (score == best) * (1 + score.amax(-1, keepdim=True))


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
        assert queries.ahead is not None
        query, share = ranking.plain_queries()
        mean = (query * share).sum(2, keepdim=True)
        centred = query - mean
        covariance = torch.matmul((centred * share).transpose(2, 3), centred)
        turn = functools.partial(queries.ahead, offsets=range(self.ahead))
        mean, covariance = turn(mean), turn(turn(covariance).transpose(2, 3))
        key = ranking.of_queries(ranking.keys_values()[0].float(), query.shape[1])
        logits = torch.matmul(key, mean.transpose(2, 3))[..., 0] * queries.scale
        logits = logits + (torch.matmul(key, covariance) * key).sum(-1) * queries.scale**2 / 2
        hidden = (ranking.place_S < ranking.sinks) | ~ranking.there_BKS
        logits = logits.masked_fill(ranking.of_queries(hidden, query.shape[1]), torch.finfo(torch.float32).min)
        return ranking.by_row(logits.softmax(-1)) * ranking.keys_values()[1].float().norm(dim=-1)


class Centres(Ranker):
    """What the mean query of a prompt will ask for at distances of 1, 2, 4, ... 2^16, by channel pairs of the rotation.

    Mean over those distances of q'k, where q is the mean query, and of each pair |k| (E|q| - |E q|), for queries that
    lie far from their mean. The mean is that of the prompt itself; the authors take it from calibration text.
    """

    describes = (
        "what the mean query asks for at growing distances stays (TriAttention, github.com/WeianMao/triattention)"
    )
    while_decoding = False
    plain_queries = True
    offsets = tuple(2**i - 1 for i in range(17))

    def score(self, ranking: Ranking) -> Tensor:
        queries = ranking.queries
        assert queries.ahead is not None and queries.pair_norms is not None
        query, share = ranking.plain_queries()
        mean = (query * share).sum(2, keepdim=True)
        spread = (queries.pair_norms(query) * share).sum(2, keepdim=True) - queries.pair_norms(mean)
        key = ranking.of_queries(ranking.keys_values()[0].float(), query.shape[1])
        score = torch.matmul(key, queries.ahead(mean, self.offsets).transpose(2, 3))[..., 0]
        return ranking.by_row(score + (queries.pair_norms(key) * spread).sum(-1))


class Reconstruction(Ranker):
    """The largest attention that any query pays when the prompt is read again, behind itself.

    That of earlier prompts counts on, so that a conversation loses what no prompt needed for itself; what was decoded
    is rehearsed in none. The authors put an instruction before the second reading, and cut prompts of more than 2048
    tokens into pieces that attend to themselves alone.
    """

    describes = (
        "what a second reading of the prompt attends to stays, whatever is asked later (KVzip, arXiv:2505.23416)"
    )
    while_decoding = False
    gathers = True
    rehearses = True
    is_attention = True

    def gather(self, ranking: Ranking) -> Tensor:
        return torch.maximum(ranking.gathered_BKS, ranking.most_attended())

    def score(self, ranking: Ranking) -> Tensor:
        return ranking.gathered_BKS


class Lots(Ranker):
    """Half of the budget by the attention of the newest `observe` queries, the other drawn by lot, with chances as that
    attention has them.

    The published split between both is tuned by task; a lot falls as noise of its place does, alike in every run.
    """

    describes = "half by what the newest queries attend to, half drawn by lot from that (NACL, arXiv:2408.03675)"
    while_decoding = False
    reads = ("observe",)

    def score(self, ranking: Ranking) -> Tensor:
        attended = ranking.attended(ranking.observe) / ranking.queries.count_B.clamp_max(ranking.observe)[:, None, None]
        at_first = ranking.among_best(attended, ranking.slots_BK // 2)
        heads = torch.arange(ranking.count_BK.shape[1], device=attended.device)[:, None]
        drawn = attended.clamp_min(1e-30).log() + gumbel(ranking.tokens_B[:, None, None], heads, ranking.place_S)
        return drawn.masked_fill(at_first, torch.inf)


class Critical(Snap):
    """Half of the budget by `snapkv`, the other by (that + 1e-4) |W_o v|_1."""

    describes = "half by what the newest queries attend to, half by that times |W_o v| (CriticalKV, arXiv:2502.03805)"
    is_attention = False
    output_norms = True

    def score(self, ranking: Ranking) -> Tensor:
        assert ranking.queries.output_norms is not None
        attended = super().score(ranking)
        at_first = ranking.among_best(attended, (ranking.slots_BK // 2).clamp_min(1))
        value = ranking.queries.output_norms(ranking.keys_values()[1].float())
        return ((attended + 1e-4) * ranking.by_row(value)).masked_fill(at_first, torch.inf)


def _over_heads(x_BkS: Tensor, ranking: Ranking) -> Tensor:
    """[B, K, S]: the sum over the heads that are made from one latent; KV heads are rows of their own."""
    return x_BkS.unflatten(1, (ranking.count_BK.shape[1], -1)).sum(2)


RANKERS: dict[str, Ranker] = {
    "streaming": Streaming(),
    "sepllm": Separators(),
    "snapkv": Snap(),
    "h2o": HeavyHitters(),
    "tova": LastQuery(),
    "knorm": KeyNorm(),
    "expected": Expected(),
    "vatp": ValueAware(),
    "critical": Critical(),
    "scissorhands": Scissorhands(),
    "keyformer": Keyformer(),
    "buzz": Buzz(),
    "nacl": Lots(),
    "triattention": Centres(),
    "kvzip": Reconstruction(),
}
"""Name in recipes and plans -> score."""
