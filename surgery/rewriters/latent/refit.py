"""Refits of q and o around a latent: closed forms on calibration activations, to the parent's scores and output."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor

from ...attention.latent import LatentWeights, cached_entries, expanded_weights, shared_rotary
from ...attention.maths import rotate_pairs
from ...attention.weights import AttentionWeights
from ...calibration.visit import Visit
from ..common.query_fit import QueryFit, ScoreFit, stride_of
from ..common.refit import Fit

QUERY_TOKENS = 4_500
"""Calibration tokens whose queries are fitted to keys from latents: with twice as many, KL of SmolLM2's `mla-4x` and
`lowrank-3x` changes by about one percent, up in one and down in the other."""


class LatentKeys:
    """Keys that depend on where their query stands: k_up c_n + q_ropeᵀ rot(k_r,n, n - m), for each query head.

    Args:
        time: places of the queries.
    """

    def __init__(self, student: AttentionWeights, latent: LatentWeights, x_BTD: Tensor, time: Tensor) -> None:
        c, k_r = cached_entries(latent, x_BTD)
        entry = torch.cat([c, k_r], -1)
        self.entry = (entry - entry.mean(1, keepdim=True))[:, None]  # changes no variance; differences are small
        self.rotary, kv_of = shared_rotary(latent), student.kv_of()
        self.k_up, self.q_rope = (w[kv_of].to(x_BTD) for w in (latent.k_up_KHR, latent.q_rope_KFH))
        angle = time[:, None].double() * latent.inv_freq_F.double()
        self.cos, self.sin = angle.cos().to(x_BTD), angle.sin().to(x_BTD)

    def scores(self, u_BNmH: Tensor) -> Tensor:
        turned = rotate_pairs(self.rotary, u_BNmH @ self.q_rope.mT, self.cos, self.sin)
        return torch.cat([u_BNmH @ self.k_up, turned], -1) @ self.entry.mT

    def pull(self, c_BNmS: Tensor) -> Tensor:
        return self._back(c_BNmS @ self.entry, self.cos, self.sin)

    def seen_from(self, query: int) -> Tensor:
        return self._back(self.entry, self.cos[query], self.sin[query])

    def of_heads(self, heads: slice) -> Self:
        found = copy(self)
        found.k_up, found.q_rope = self.k_up[heads], self.q_rope[heads]
        return found

    def part(self, queries: slice, seen: int) -> Self:
        found = copy(self)
        found.entry, found.cos, found.sin = self.entry[:, :, :seen], self.cos[queries], self.sin[queries]
        return found

    def _back(self, entry: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rank = self.k_up.shape[-1]
        turned = rotate_pairs(self.rotary, entry[..., rank:], cos, -sin)
        return entry[..., :rank] @ self.k_up.mT + turned @ self.q_rope


class LatentQueryFit(ScoreFit):
    """`ScoreFit` where the key that a query sees depends on where it stands."""

    def __init__(self, parent: AttentionWeights, student: AttentionWeights, latent: LatentWeights) -> None:
        super().__init__(parent, student, range(student.heads))
        self.latent = latent

    def add(self, x_parent_BTD: Tensor, x_BTD: Tensor, mask_BT: Tensor, stride: int = 1) -> None:
        """Both streams' inputs of the projections; every `stride`-th position serves as a query."""
        time = torch.arange(0, x_BTD.shape[1], stride)
        self.take(x_parent_BTD, x_BTD, mask_BT, time, LatentKeys(self.student, self.latent, x_BTD, time))


def fit_queries(parent: AttentionWeights, latent: LatentWeights) -> Fit:
    """What fits W_q of a layer with that latent to the parent's attention logits.

    Where a q norm or a soft cap follows, it leaves W_q as it is.
    """

    def fit(visit: Visit, student: AttentionWeights) -> AttentionWeights:
        found: QueryFit | LatentQueryFit
        if latent.rotate_on_read:
            found = QueryFit(parent, expanded_weights(student, latent), range(student.heads))
        else:
            found = LatentQueryFit(parent, student, latent)
        for a in visit.activations():
            found.add(a.x_parent_BTD, a.x_student_BTD, a.mask_BT, stride_of(visit, QUERY_TOKENS))
        fitted = found.solve()
        return replace(student, q_NHD=fitted.q_NHD, q_bias_NH=fitted.q_bias_NH)

    return fit
