"""How many slots each layer and KV head keeps, and which, once all have a score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .ranking import Ranking


@dataclass(frozen=True, kw_only=True)
class Claim:
    """What one layer brings to a budget over all layers; slots that always stay are not divided."""

    score_BKS: Tensor
    """Of the slots that are there, of the heads that share; infinite and -infinite as in `Budget.keep`."""
    open_BKS: Tensor
    """Which of them may leave."""
    measure_B: Tensor
    """What `Budget.measure` says of the layer."""
    mass_B: Tensor
    """Sum of the scores that were divided at first, some of which may have left since."""

    @property
    def heads(self) -> int:
        """Heads that share."""
        return self.score_BKS.shape[1]

    @property
    def most_B(self) -> Tensor:
        """Slots per head that can be given."""
        return self.open_BKS.sum(-1).amax(-1)

    @property
    def best_BS(self) -> Tensor:
        """Scores of the best open slot of each head together, of the second best, and so on; 0 where there is none."""
        return self.score_BKS.masked_fill(~self.open_BKS, 0.0).sort(-1, descending=True).values.sum(1)

    def of(self, keep_BKS: Tensor) -> Claim:
        """When some have left; the others move up, in their order."""
        index = torch.argsort(~keep_BKS, dim=-1, stable=True)[..., : max(1, int(keep_BKS.sum(-1).max()))]
        score, opened = self.score_BKS.masked_fill(~keep_BKS, -torch.inf), self.open_BKS & keep_BKS
        return replace(self, score_BKS=score.gather(2, index), open_BKS=opened.gather(2, index))


class Budget(Protocol):
    """One rule: slots are shared out over layers, then over the heads of a layer. By itself it gives all as many."""

    describes: str
    """What is shared out, and the source, for people."""
    even: bool = True
    """Whether all heads of a layer keep the same number, known before."""
    by_mass: bool = False
    """Whether it adds and compares scores of several rows, so that these must be parts of attention."""
    finds: Literal["nothing", "whole", "shares"] = "nothing"
    """What is found out about KV heads when a model is converted, and stands in plans from then on: those that keep all
    of their tokens, or what each keeps in units of the mean."""
    by: Literal["text", "lookup"] = "text"
    """How that is found: by what layers lose on calibration text where heads stream, or by which heads look up what
    came before in random tokens that come again."""
    part: float | None = None
    """Part of the KV heads that keep all of their tokens where nobody says; None: the rest streams, and the ratio says
    how many do not."""

    def of_layer(self, mean: float, most: float, depth: float) -> float:
        """Slots per head of a layer beyond those that always stay.

        Args:
            mean: over all layers.
            most: tokens that there are.
            depth: 0 in the first of the layers that share, 1 in the last.
        """
        return mean

    def keep(self, score_BKS: Tensor, slots_B: Tensor) -> Tensor:
        """[B, K, S] bool: which slots stay.

        Args:
            score_BKS: infinite where a slot must stay, -infinite where there is none.
            slots_B: slots per head of this layer.
        """
        return (rank(score_BKS) < slots_B[:, None, None]) & (score_BKS > -torch.inf)


class Uniform(Budget):
    """Every head of every layer keeps the same number."""

    describes = "every head keeps as many"


class Pyramid(Budget):
    """Layers keep fewer slots the later they are: the first 1.95 times the mean, the last a twentieth of it.

    Slots that always stay are not shared out, and no layer is given more than there are tokens: what the first ones
    cannot take goes to the last, as in the authors' code.
    """

    describes = "later layers keep fewer, falling linearly (PyramidKV, arXiv:2406.02069)"
    steepness = 20

    def of_layer(self, mean: float, most: float, depth: float) -> float:
        first = min(2 * mean - mean / self.steepness, most)
        return first + (2 * (mean - first)) * depth


class Ada(Budget):
    """The heads of a layer share their slots: the best of all heads stay, and of each head a fifth of its share."""

    describes = "heads of a layer share their slots, a fifth of them safe for each (Ada-KV, arXiv:2407.11550)"
    even = False
    safe = 0.2

    def keep(self, score_BKS: Tensor, slots_B: Tensor) -> Tensor:
        there, heads = score_BKS > -torch.inf, score_BKS.shape[1]
        safe_B = (self.safe * slots_B).long().clamp_min(1)
        score = score_BKS.masked_fill((rank(score_BKS) < safe_B[:, None, None]) & there, torch.inf)
        best = rank(score.flatten(1)) < (heads * slots_B)[:, None]
        return best.view_as(score) & there


class Lean(Budget):
    """The heads of a layer share their slots so that each holds the same part of the sum of its scores.

    The authors name the part (95 %), and bytes follow from the text; here it is the one that the budget reaches.
    """

    describes = "heads of a layer hold the same part of their attention (LeanKV, arXiv:2412.03131)"
    even = False
    by_mass = True

    def keep(self, score_BKS: Tensor, slots_B: Tensor) -> Tensor:
        there, opened = score_BKS > -torch.inf, score_BKS.isfinite()
        score = score_BKS.masked_fill(~opened, 0.0)
        best = score.sort(-1, descending=True).values
        held = best.cumsum(-1) / best.sum(-1, keepdim=True).clamp_min(1e-30)
        always_BK, most_BK = (there & ~opened).sum(-1), opened.sum(-1)

        def counts(part_B: Tensor) -> Tensor:
            return torch.minimum((held < part_B[:, None, None]).sum(-1), most_BK)

        part_B = largest(lambda part_B: (always_BK + counts(part_B)).sum(-1) <= score_BKS.shape[1] * slots_B, slots_B)
        return (rank(score_BKS) < (always_BK + counts(part_B))[..., None]) & there


class Retrieval(Budget):
    """Some KV heads keep all of their tokens, of the others each as many."""

    finds = "whole"


class Duo(Retrieval):
    """Of every `ratio` KV heads one keeps all of its tokens, and the others the first and the newest.

    Those keep all that change the model's answers most when they stream: the KL of each, to second order, on
    calibration text of which each window's first half is read twice. The authors train a gate on each head for that,
    with an L1 penalty, on texts with pass keys in them; `dms` with `gate: head` does.
    """

    describes = "KV heads that cost most when they stream keep all, others the newest (DuoAttention, arXiv:2410.10819)"


class Razor(Retrieval):
    """KV heads that look up what came before keep all of their tokens, and the others share the rest of the budget.

    Random tokens come four times over. A head looks up if its queries attend to what came behind the earlier places of
    their own token (induction), or to those places (echo, one of fifteen); a KV head is as good as the best query head
    that reads it. The token that stands for those which left is `merge: mean`.
    """

    describes = (
        "KV heads that look up what came before keep all, others share the rest (RazorAttention, arXiv:2407.15891)"
    )
    by = "lookup"
    part = 0.15


class ByHead(Budget):
    """A sixth of the slots is shared evenly, the rest by what each KV head of all layers costs when it streams.

    That is measured on calibration text, as for `duo`; the authors take scores of heads in questions about long texts,
    which ask for labels. No head is given more than all of its tokens, and what it cannot take goes to the others.
    """

    describes = "KV heads share by what they cost when they stream (HeadKV, arXiv:2410.19258)"
    even = False
    finds = "shares"
    safe = 1 / 6


class OverLayers(Budget):
    """Slots are divided over the layers of a cache by what their prompt is like; heads of a layer keep as many.

    That goes on as layers come: what is kept at a time is never more than the whole budget and one layer.
    """

    even = False

    def measure(self, ranking: Ranking) -> Tensor:
        """[B]: what `divide` is to know of a layer beside its scores."""
        return ranking.count_BK.new_zeros(len(ranking.count_BK), dtype=torch.float32)

    def divide(self, claims: Sequence[Claim], slots_B: Tensor) -> Tensor:
        """[B, layers]: slots per head of each layer, beyond those that always stay; no more for any when layers join.

        Args:
            claims: of the first layers.
            slots_B: for all heads of all layers together, those that are still to come included.
        """
        raise NotImplementedError


class Cake(OverLayers):
    """In proportion to how spread out the attention of the newest queries is, and how much it moves.

    A layer's measure is the entropy of the attention of the newest `observe` queries to what came before them, times
    the sum of its variances over the queries. Exponents are 1; the authors tune them for each model.
    """

    describes = "layers share by entropy and variance of their newest queries' attention (CAKE, arXiv:2503.12491)"

    def measure(self, ranking: Ranking) -> Tensor:
        weights = torch.cat(list(ranking.attention(ranking.observe)), dim=2)
        observed_B = ranking.queries.count_B.clamp_max(ranking.observe)
        before = ranking.of_queries(ranking.age_BKS >= observed_B[:, None, None], weights.shape[1])
        weights = weights * before[:, :, None]
        entropy = -(weights * (weights + 1e-10).log()).sum((1, 2, 3))
        count = observed_B[:, None, None].float()
        mean = weights.sum(2) / count
        variance = (weights.square().sum(2) / count - mean.square()).clamp_min(0).sum((1, 2))
        return entropy * variance + 1e-10

    def divide(self, claims: Sequence[Claim], slots_B: Tensor) -> Tensor:
        weight, most = (torch.stack([getattr(c, n) for c in claims], -1) for n in ("measure_B", "most_B"))
        heads = torch.tensor([c.heads for c in claims], device=slots_B.device)
        given, full = torch.zeros_like(weight), torch.zeros_like(weight, dtype=torch.bool)
        for _ in claims:  # those that cannot take their share leave the rest of it to the others
            left_B = slots_B - (heads * most * full).sum(-1)
            share = left_B[:, None] * weight / (heads * weight * ~full).sum(-1, keepdim=True).clamp_min(1e-30)
            given = torch.where(full, most, share)
            full = full | (given >= most)
        return torch.minimum(given, most).long()


class Dynamic(OverLayers):
    """As many as each layer has among the best of all layers, by scores that are parts of attention.

    Heads of a layer keep as many, so that what counts is the mean of their best slots, of their second best, and so on;
    the authors count heads apart before they take a mean, look at some layers at a time, and cap what one may have.
    """

    describes = "layers have as many as are among the best of all (DynamicKV, arXiv:2412.14838)"
    by_mass = True

    def divide(self, claims: Sequence[Claim], slots_B: Tensor) -> Tensor:
        best = torch.cat([c.best_BS / c.heads for c in claims], dim=1)
        heads = torch.cat([torch.full((c.best_BS.shape[1],), c.heads, device=best.device) for c in claims])
        order = torch.argsort(best, dim=-1, descending=True, stable=True)
        fits = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, order, heads[order].cumsum(-1) <= slots_B[:, None])
        counts = fits.split([c.best_BS.shape[1] for c in claims], dim=1)
        return torch.stack([torch.minimum(n.sum(-1), c.most_B) for n, c in zip(counts, claims, strict=True)], -1)


class Prefix(OverLayers):
    """So many that all layers hold the same part of the sum of their scores.

    The authors find the numbers on a few texts, once; here every prompt has its own.
    """

    describes = "layers hold the same part of their attention (PrefixKV, arXiv:2412.03409)"
    by_mass = True

    def divide(self, claims: Sequence[Claim], slots_B: Tensor) -> Tensor:
        # By slots per head, from the best: the part of the scores that is held.
        held = [c.best_BS.cumsum(-1) / c.mass_B.clamp_min(1e-30)[:, None] for c in claims]

        def counts(part_B: Tensor) -> Tensor:
            found = [(h < part_B[:, None]).sum(-1) for h in held]
            return torch.stack([torch.minimum(n, c.most_B) for n, c in zip(found, claims, strict=True)], -1)

        heads = torch.tensor([c.heads for c in claims], device=slots_B.device)
        return counts(largest(lambda part_B: (counts(part_B) * heads).sum(-1) <= slots_B, slots_B))


class Lazy(OverLayers):
    """Lazy layers keep what always stays, and the others all that there is, as far as the budget goes.

    A layer is the lazier the more of their attention its newest `observe` queries pay to what always stays. The authors
    call layers above a threshold lazy, whatever that saves; here the ratio says how many are.
    """

    describes = "layers that look at first and newest tokens stream, others keep all (SimLayerKV, arXiv:2410.13846)"

    def measure(self, ranking: Ranking) -> Tensor:
        to_BKS = ranking.attended(ranking.observe) / ranking.queries.count_B.clamp_max(ranking.observe)[:, None, None]
        return 1 - (to_BKS * ranking.stays_BKS).sum(-1).mean(-1)

    def divide(self, claims: Sequence[Claim], slots_B: Tensor) -> Tensor:
        measure, most = (torch.stack([getattr(c, n) for c in claims], -1) for n in ("measure_B", "most_B"))
        heads = torch.tensor([c.heads for c in claims], device=slots_B.device)
        order = torch.argsort(measure, dim=-1, descending=True, stable=True)
        wanted = (most * heads).gather(-1, order)
        given = (slots_B[:, None] - (wanted.cumsum(-1) - wanted)).clamp_min(0)
        given = torch.minimum(given, wanted)
        return torch.zeros_like(most).scatter_(-1, order, given) // heads


def largest(fits: Callable[[Tensor], Tensor], like_B: Tensor) -> Tensor:
    """[B]: about the largest part, from 0 to 1, that fits in each sequence; smaller ones fit as well."""
    low, high = (torch.full_like(like_B, end, dtype=torch.float32) for end in (0.0, 1.0))
    for _ in range(24):
        middle = (low + high) / 2
        yes = fits(middle)
        low, high = torch.where(yes, middle, low), torch.where(yes, high, middle)
    return low


def rank(score: Tensor) -> Tensor:
    """Place of each entry of the last dimension by its score, from the largest; of equal ones the first comes first."""
    order = torch.argsort(score, dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )


BUDGETS: dict[str, Budget] = {
    "uniform": Uniform(),
    "pyramid": Pyramid(),
    "ada": Ada(),
    "lean": Lean(),
    "duo": Duo(),
    "razor": Razor(),
    "headkv": ByHead(),
    "cake": Cake(),
    "dynamic": Dynamic(),
    "prefix": Prefix(),
    "simlayer": Lazy(),
}
"""Name in recipes and plans -> rule."""
