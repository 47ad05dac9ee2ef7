"""What becomes of slots that leave: folded into slots that stay, rather than dropped.

Keys are folded as they lie in the cache, rotated to the positions of their tokens, as published. First tokens that
always stay are left as they are: what they draw attention for is that they say nothing.
"""

from __future__ import annotations

from dataclasses import replace
from math import e
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .noise import uniform
from .slots import Slots

_AT_ONCE = 2**24
"""Similarities that are computed at once: 64 MB in float32."""


class Merge(Protocol):
    """One rule."""

    describes: str
    """What becomes of slots that leave, and the source, for people."""
    of_prompts: bool = True
    """Whether it folds slots that leave behind a prompt, too; those are dropped otherwise."""
    by_attention: bool = False
    """Whether it weighs slots by the attention that a score has summed up for them."""
    counts: bool = False
    """Whether all that leave go into one slot, the first behind the sinks, which then counts in attention as so many
    tokens (`Slots.more_BKS`)."""

    def fold(self, slots: Slots, goes_BKS: Tensor, into_BKS: Tensor, tokens_B: Tensor) -> Slots:
        """`slots`, in the order of their tokens, with those that go folded into some of the others.

        Args:
            goes_BKS: which leave.
            into_BKS: which stay, and may change.
            tokens_B: tokens of each sequence so far.
        """
        raise NotImplementedError


class ToNearest(Merge):
    """What rules share that fold the K and V of a slot into those of the slot whose key is most alike (cosine)."""

    def weights(self, likeness_BKS: Tensor, goes_BKS: Tensor) -> Tensor:
        """[B, K, S]: of each slot that goes; what stays weighs as `own` says."""
        raise NotImplementedError

    def own(self, count_BKS: Tensor) -> Tensor:
        """[B, K, S]: weight of a slot into which so many are folded."""
        raise NotImplementedError

    def fold(self, slots: Slots, goes_BKS: Tensor, into_BKS: Tensor, tokens_B: Tensor) -> Slots:
        likeness, to = nearest(slots.key_BKSH, into_BKS)
        goes_BKS = goes_BKS & into_BKS.any(-1, keepdim=True)
        weight = self.weights(likeness, goes_BKS).masked_fill(~goes_BKS, 0.0)
        count = torch.zeros_like(weight).scatter_add_(2, to, (weight > 0).float())
        return averaged(slots, to, weight, torch.where(count > 0, self.own(count), 1.0))


class D2O(ToNearest):
    """Those that are more alike than the mean of all that go; with weights exp(cosine), and e of the one that stays.

    The authors' threshold follows the steps of decoding by a moving average; here it is that of those which go at once.
    """

    describes = "what leaves is folded into the slot with the nearest key, where that is near (D2O, arXiv:2406.13035)"

    def weights(self, likeness_BKS: Tensor, goes_BKS: Tensor) -> Tensor:
        count = goes_BKS.sum(-1, keepdim=True).clamp_min(1)
        mean = likeness_BKS.masked_fill(~goes_BKS, 0.0).sum(-1, keepdim=True) / count
        return likeness_BKS.exp().masked_fill(likeness_BKS < mean, 0.0)

    def own(self, count_BKS: Tensor) -> Tensor:
        return torch.full_like(count_BKS, e)


class Pivot(ToNearest):
    """All that go: the mean of the slot that stays, and of its mean with each of them (the pivotal form)."""

    describes = "what leaves is averaged into the slot with the nearest key (LOOK-M, arXiv:2406.18139)"

    def weights(self, likeness_BKS: Tensor, goes_BKS: Tensor) -> Tensor:
        return torch.full_like(likeness_BKS, 0.5)

    def own(self, count_BKS: Tensor) -> Tensor:
        return 1 + count_BKS / 2


class Neighbours(Merge):
    """Those in one stretch of alike neighbours (cosine of the keys of each two above 0.75) with a slot that stays.

    They go into the nearest one of those, with weights exp(-|k - k'|^2 / 2 s^2), where s^2 is the mean of the squared
    distances of all that go there, and 1 of the one that stays. The authors merge each stretch into its most attended
    token, and how much that saves follows from the text; here score and budget say what stays. Those that have no
    neighbour alike which stays are dropped.
    """

    describes = (
        "what leaves is averaged into a slot of the same stretch of alike neighbours (KVMerger, arXiv:2407.08454)"
    )
    alike = 0.75

    def fold(self, slots: Slots, goes_BKS: Tensor, into_BKS: Tensor, tokens_B: Tensor) -> Slots:
        key, S = slots.key_BKSH.float(), goes_BKS.shape[-1]
        place_S = torch.arange(S, device=key.device)
        near = torch.cosine_similarity(key[:, :, 1:], key[:, :, :-1], dim=-1) > self.alike
        stretch = F.pad((~near).long(), (1, 0)).cumsum(-1)
        before = torch.where(into_BKS, place_S, -1).cummax(-1).values
        behind = torch.where(into_BKS, place_S, S).flip(-1).cummin(-1).values.flip(-1)
        has_before = (before >= 0) & (stretch.gather(2, before.clamp_min(0)) == stretch)
        has_behind = (behind < S) & (stretch.gather(2, behind.clamp_max(S - 1)) == stretch)
        first = has_before & (~has_behind | (place_S - before <= behind - place_S))
        to = torch.where(first, before, behind).clamp(0, S - 1)
        goes = goes_BKS & (has_before | has_behind)
        far = (key - key.gather(2, to[..., None].expand_as(key))).square().sum(-1).masked_fill(~goes, 0.0)
        nothing = torch.zeros_like(far)
        spread = nothing.scatter_add(2, to, far) / nothing.scatter_add(2, to, goes.float()).clamp_min(1)
        weight = torch.exp(-far / (2 * spread.gather(2, to)).clamp_min(1e-30)).masked_fill(~goes, 0.0)
        return averaged(slots, to, weight, torch.ones_like(weight))


class Mean(Merge):
    """All that leave: into the mean of their keys and that of their values, a token that counts as often as it has
    tokens.

    It begins as the first token behind the sinks, which stays for that, whatever its score.
    """

    describes = "what leaves is averaged into one token, which counts as so many (RazorAttention, arXiv:2407.15891)"
    counts = True

    def fold(self, slots: Slots, goes_BKS: Tensor, into_BKS: Tensor, tokens_B: Tensor) -> Slots:
        assert slots.more_BKS is not None
        goes = goes_BKS & into_BKS.any(-1, keepdim=True)
        to = into_BKS.byte().argmax(-1, keepdim=True).expand_as(goes)
        more = slots.more_BKS.scatter_add(2, to, goes.float())
        return replace(averaged(slots, to, goes.float(), 1 + slots.more_BKS), more_BKS=more)


class CaM(Merge):
    """V alone, shared out evenly to the next 32 that stay, by lot: the chance is the slot's attention by their mean.

    While decoding alone, as published: so many leave behind a prompt that the sums of V would outweigh all else. Lots
    fall as noise of their place does, alike in every run.
    """

    describes = (
        "V of what leaves while decoding is added to the next slots, by lot (CaM, openreview.net/forum?id=LCTmppB165)"
    )
    of_prompts = False
    by_attention = True
    next = 32

    def fold(self, slots: Slots, goes_BKS: Tensor, into_BKS: Tensor, tokens_B: Tensor) -> Slots:
        assert slots.gathered_BKS is not None
        B, K, S = goes_BKS.shape
        attention, value = slots.gathered_BKS, slots.value_BKSV.float()
        before = into_BKS.cumsum(-1) - into_BKS.long()  # of those that stay: of them, [i, i + next) take slot i
        last = (before + self.next).clamp_max(into_BKS.sum(-1, keepdim=True))
        takers = last - before
        sums = torch.zeros(B, K, S + 1, device=value.device)  # of the attention of the first so many that stay
        sums.scatter_add_(2, before + 1, attention * into_BKS)
        sums = sums.cumsum(-1)
        mean = (sums.gather(2, last) - sums.gather(2, before)) / takers.clamp_min(1)
        heads, place = torch.arange(K, device=value.device)[:, None], torch.arange(S, device=value.device)
        drawn = uniform(tokens_B[:, None, None], heads, place) * mean < attention
        part = (goes_BKS & drawn & (takers > 0)) / takers.clamp_min(1)
        given = part[..., None] * value
        ends = torch.zeros(B, K, S + 1, value.shape[-1], device=value.device)
        ends.scatter_add_(2, before[..., None].expand_as(value), given)
        ends.scatter_add_(2, last[..., None].expand_as(value), -given)
        taken = ends.cumsum(2).gather(2, before[..., None].expand_as(value)) * into_BKS[..., None]
        return replace(slots, value_BKSV=(value + taken).to(slots.value_BKSV.dtype))


def averaged(slots: Slots, to_BKS: Tensor, weight_BKS: Tensor, own_BKS: Tensor) -> Slots:
    """`slots`, each of them the mean of itself and of what goes there.

    Args:
        to_BKS: where each slot goes.
        weight_BKS: with which weight; 0 of what goes nowhere.
        own_BKS: weight of each slot itself; whatever, where nothing comes.
    """
    total = own_BKS.scatter_add(2, to_BKS, weight_BKS)[..., None]

    def folded(x_BKSH: Tensor) -> Tensor:
        x = x_BKSH.float()
        index = to_BKS[..., None].expand_as(x)
        return ((own_BKS[..., None] * x).scatter_add(2, index, weight_BKS[..., None] * x) / total).to(x_BKSH.dtype)

    return replace(slots, key_BKSH=folded(slots.key_BKSH), value_BKSV=folded(slots.value_BKSV))


def nearest(key_BKSH: Tensor, into_BKS: Tensor) -> tuple[Tensor, Tensor]:
    """Of each slot, [B, K, S] each: cosine of its key and of the nearest among some slots, and the place of that."""
    B, K, S, _ = key_BKSH.shape
    unit = F.normalize(key_BKSH.float(), dim=-1)
    blocks = unit.split(max(1, _AT_ONCE // max(1, B * K * S)), dim=2)
    found = [(part @ unit.transpose(2, 3)).masked_fill(~into_BKS[:, :, None], -2.0).max(-1) for part in blocks]
    return torch.cat([f.values for f in found], dim=2), torch.cat([f.indices for f in found], dim=2)


MERGES: dict[str, Merge] = {
    "d2o": D2O(),
    "lookm": Pivot(),
    "cam": CaM(),
    "kvmerger": Neighbours(),
    "mean": Mean(),
}
"""Name in recipes and plans -> rule."""
