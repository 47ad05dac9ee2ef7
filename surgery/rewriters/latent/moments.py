"""What a latent's rewriter must know of the text: moments of the input as keys and as values see it, and distances."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...attention.forward import probabilities, project, rotation
from ...attention.linalg import hermitian, to_double
from ...attention.maths import rotate_pairs
from ...attention.weights import AttentionWeights
from ...calibration.processes import total
from ..common.moments import Moments
from .factors import CommonBasis, definite

QUERIES = 512
"""Queries of each batch whose attention weighs the moments."""
READ_KEYS = 16
"""Keys of each query for `q_read_NHH`, which has H² numbers per head."""


@dataclass(frozen=True, kw_only=True)
class LatentMoments:
    """Second moments of one layer, float64; D stands for D+1 where the projections have a bias (x~ = [x; 1]).

    With attention weights p_mn of the parent and x̄_m = Σ_n p_mn x_n: an error of K changes the output by its part that
    varies over n under p_m, one of V by its mean. So keys weigh x by E Σ_n p_mn (x_n - x̄_m)(x_n - x̄_m)ᵀ and values by
    E x̄_m x̄_mᵀ; the uniform moment, which published methods use for both, is their sum where attention is uniform.
    """

    input_DD: Tensor
    """E[x~ x~ᵀ], every token alike."""
    key_DD: Tensor
    """Of the keys' input, weighted by attention and centred under it; heads averaged."""
    value_DD: Tensor
    """Of the attention-averaged input; heads averaged."""
    mean_D: Tensor
    """E x̄_m, heads averaged."""
    q_NHH: Tensor
    """E[q qᵀ], after the q norm, before rotation."""
    q_read_NHH: Tensor
    """E Σ_n p_mn q'q'ᵀ with q' the query turned to the key's position: the metric of K before its rotation."""
    rho_NF: Tensor
    """Mean phase E Σ_n p_mn e^{iθ_j(n-m)} of each query head and frequency; |rho| near 1: rotation hardly matters."""

    @classmethod
    def of_weights(cls, weights: AttentionWeights, cov_DD: Tensor | None = None) -> LatentMoments:
        """Without attention: the input's moment for keys and values alike, distances spread evenly over 0..255."""
        q, D = weights.with_bias("q"), weights.with_bias("q").shape[-1]
        cov = torch.eye(D, dtype=torch.float64) if cov_DD is None else hermitian(to_double(cov_DD))
        q_NHH = Moments.of_weights(weights, cov).q_NHH
        inv = torch.tensor(() if weights.rotary is None else weights.rotary.inv_freq, dtype=torch.float64)
        angle = -torch.arange(256, dtype=torch.float64)[:, None] * inv
        rho = torch.polar(torch.ones_like(angle), angle).mean(0).expand(len(q), -1)
        first, second = weights.rotated()
        read = q_NHH.clone()
        if first:
            # Over all phases only the energy of a pair is left.
            turning = [*first, *second]
            energy = (q_NHH.diagonal(0, 1, 2)[:, first] + q_NHH.diagonal(0, 1, 2)[:, second]) / 2
            read[:, turning] = 0
            read[:, :, turning] = 0
            read[:, turning, turning] = torch.cat([energy, energy], -1)
        mean = cov.new_zeros(D)
        return cls(input_DD=cov, key_DD=cov, value_DD=cov, mean_D=mean, q_NHH=q_NHH, q_read_NHH=read, rho_NF=rho)

    def uniform(self) -> LatentMoments:
        """The same with every token alike for keys and values (the moments of published methods)."""
        return replace(self, key_DD=self.input_DD, value_DD=self.input_DD)

    @cached_property
    def centred(self) -> LatentMoments:
        """The same for values whose mean is kept apart: no number of a latent is spent on it."""
        return replace(self, value_DD=hermitian(self.value_DD - torch.outer(self.mean_D, self.mean_D)))

    @cached_property
    def basis(self) -> CommonBasis:
        """Of the moments of keys and values, damped: forms that are tried share what costs most."""
        return CommonBasis.of(*definite(self.key_DD, self.value_DD))


class MomentSums:
    """Streams `LatentMoments`: add batches, then `finish`. Batches are summed in float64."""

    def __init__(self, parent: AttentionWeights) -> None:
        self.parent = parent
        self.tokens = 0
        self.queries = 0
        self.sums: dict[str, Tensor] = {}

    def add(self, x_parent_BTD: Tensor, x_student_BTD: Tensor, mask_BT: Tensor) -> None:
        """Inputs of the projections: the parent's decide where it looks, the student's are what will be projected."""
        w, x = self.parent, x_student_BTD
        # Neighbouring queries look at much the same: some stand for all, more of each window in a small batch.
        every = max(1, mask_BT.numel() // QUERIES)
        time = torch.arange(0, x.shape[1], every)
        seen_at = mask_BT[:, time]
        plain = replace(w, rotary=None)  # before their rotation
        q, k, _ = project(plain, x_parent_BTD)
        cos, sin = rotation(w, x.shape[1], x)
        q_turned, k = rotate_pairs(w.rotary, q[:, :, time], cos[time], sin[time]), rotate_pairs(w.rotary, k, cos, sin)
        _, p = probabilities(w, q_turned, k[:, w.kv_of()], time)
        if w.sinks_N is not None:
            p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)
        p = p * seen_at[:, None, :, None]
        if w.has_bias:
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        flat, q = x[mask_BT], q.transpose(0, 1)[:, mask_BT]
        weighed = x * p.sum((1, 2))[..., None]
        self._sum("input", flat.mT @ flat)
        self._sum("seen", weighed.flatten(0, 1).mT @ x.flatten(0, 1) / w.heads, every)
        self._sum("value", _of_means(p, x) / w.heads, every)
        self._sum("mean", to_double(weighed).sum((0, 1)) / w.heads, every)
        self._sum("q", q.mT @ q)
        self._sum("rho", self._phases(p, cos, sin, time), every)
        self.tokens += len(flat)
        self.queries += every * int(seen_at.sum())
        self._sum("read", self._read(p, q_turned, cos, sin), every)

    def _sum(self, name: str, part: Tensor, times: int = 1) -> None:
        found = to_double(part).mul_(times)
        self.sums[name] = self.sums[name] + found if name in self.sums else found

    def _phases(self, p_BNmT: Tensor, cos_TF: Tensor, sin_TF: Tensor, time: Tensor) -> Tensor:
        """Σ_mn p_mn e^{iθ(n-m)} [N, F], in real products: the weights are real and by far the largest factor."""
        scaling = 1.0 if self.parent.rotary is None else self.parent.rotary.scaling
        c, s = cos_TF / scaling, sin_TF / scaling
        at_c, at_s = p_BNmT @ c, p_BNmT @ s
        c, s = c[time], s[time]
        return torch.complex((at_c * c + at_s * s).sum((0, 2)), (at_s * c - at_c * s).sum((0, 2)))

    def _read(self, p_BNmT: Tensor, q_BNmH: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
        """Σ_mn p_mn q'q'ᵀ [N, H, H] of queries turned to the keys' places, by a few keys that stand for all.

        Keys are taken at even steps of the attention that is summed up along the text, so that each stands for the
        same part of it.
        """
        steps = (torch.arange(READ_KEYS) + 0.5) / READ_KEYS
        summed = p_BNmT.cumsum(-1)
        at = torch.searchsorted(summed, (summed[..., -1:] * steps).contiguous()).clamp_max(p_BNmT.shape[-1] - 1)
        q = q_BNmH[..., None, :].expand(*at.shape, -1)
        turned = rotate_pairs(self.parent.rotary, q, cos_TF[at], -sin_TF[at])
        rows = turned * (summed[..., -1] / READ_KEYS).sqrt()[..., None, None]
        rows = rows.transpose(0, 1).flatten(1, 3)
        return rows.mT @ rows

    def finish(self) -> LatentMoments:
        """The moments of all that was added; where all inputs were zero, those of a layer without text."""
        sums = {name: total(s) for name, s in self.sums.items()}
        if not sums["input"].any():
            return LatentMoments.of_weights(self.parent)
        tokens, queries = total(torch.tensor([self.tokens, self.queries])).tolist()
        mean = {name: s / (tokens if name in ("input", "q") else queries) for name, s in sums.items()}
        return LatentMoments(
            input_DD=hermitian(mean["input"]),
            key_DD=hermitian(mean["seen"] - mean["value"]),
            value_DD=hermitian(mean["value"]),
            mean_D=mean["mean"],
            q_NHH=hermitian(mean["q"]),
            q_read_NHH=hermitian(mean["read"]),
            rho_NF=mean["rho"],
        )


def _of_means(p_BNmT: Tensor, x_BTD: Tensor) -> Tensor:
    """Σ x̄ x̄ᵀ [D, D] over queries and heads, with x̄ the mean of x under a query's attention."""
    T, D = x_BTD.shape[1:]
    if T**2 <= D**2 + T * D:  # what is seen together first: fewer numbers than the means themselves
        look = p_BNmT.flatten(1, 2)
        found: Tensor = (x_BTD.mT @ (look.mT @ look @ x_BTD)).sum(0)
        return found
    value = torch.zeros(D, D, dtype=torch.float64)
    for p_BmT in p_BNmT.unbind(1):
        rows = (p_BmT @ x_BTD).flatten(0, 1)
        value += rows.mT @ rows
    return value
