"""What a latent's rewriter must know of the text: moments of the input as keys and as values see it, and distances."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..anatomy.proof import rotate_pairs
from ..linalg import hermitian, to_double
from .attention_weights import AttentionWeights
from .moments import Moments
from .reference import attend, rotation


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
        return cls(input_DD=cov, key_DD=cov, value_DD=cov, q_NHH=q_NHH, q_read_NHH=read, rho_NF=rho)

    def uniform(self) -> LatentMoments:
        """The same with every token alike for keys and values (the moments of published methods)."""
        return LatentMoments(
            input_DD=self.input_DD,
            key_DD=self.input_DD,
            value_DD=self.input_DD,
            q_NHH=self.q_NHH,
            q_read_NHH=self.q_read_NHH,
            rho_NF=self.rho_NF,
        )


class MomentSums:
    """Streams `LatentMoments`: add batches, then `finish`. Batches are summed in float64."""

    def __init__(self, parent: AttentionWeights) -> None:
        self.parent = parent
        self.tokens = 0
        self.sums: list[Tensor] = []

    def add(self, x_parent_BTD: Tensor, x_student_BTD: Tensor, mask_BT: Tensor) -> None:
        """Inputs of the projections: the parent's decide where it looks, the student's are what will be projected."""
        w = self.parent
        found = attend(w, x_parent_BTD)
        x = x_student_BTD
        if w.has_bias:
            x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        T, D = x.shape[1:]
        real = mask_BT.to(x)
        p = found.probs_BNTT * real[:, None, :, None]
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-30) * real[:, None, :, None]
        flat = x[mask_BT]
        value = torch.zeros(D, D, dtype=torch.float64)
        for n in range(w.heads):
            rows = (p[:, n] @ x)[mask_BT]
            value += (rows.T @ rows).double()
        value = value / w.heads
        seen = (x * p.sum((1, 2))[..., None]).flatten(0, 1).T @ x.flatten(0, 1) / w.heads
        cos, sin = rotation(w, T, x)
        scaling = 1.0 if w.rotary is None else w.rotary.scaling
        q_turned = found.q_BNTH
        q = rotate_pairs(w.rotary, q_turned, cos / scaling**2, -sin / scaling**2)
        q_mom = torch.stack([q[:, n][mask_BT].T @ q[:, n][mask_BT] for n in range(w.heads)])
        read = []
        for n in range(w.heads):
            outer = torch.einsum("bti,btj->btij", q_turned[:, n], q_turned[:, n])
            at_key = (p[:, n].mT @ outer.flatten(2)).unflatten(-1, outer.shape[-2:])
            turned = rotate_pairs(w.rotary, at_key, cos[:, None], -sin[:, None])
            read.append(rotate_pairs(w.rotary, turned.mT, cos[:, None], -sin[:, None]).sum((0, 1)))
        phase = torch.complex(cos, sin) / scaling  # [T, F]
        rho = torch.einsum("bntf,tf->nf", p.to(phase.dtype) @ phase, phase.conj())
        parts = [to_double(part) for part in (flat.T @ flat, seen, value, q_mom, torch.stack(read), rho)]
        self.sums = [a + b for a, b in zip(self.sums, parts, strict=True)] if self.sums else parts
        self.tokens += len(flat)

    def finish(self) -> LatentMoments:
        """The moments of all that was added."""
        input_DD, seen, value, q, read, rho = (s / self.tokens for s in self.sums)
        return LatentMoments(
            input_DD=hermitian(input_DD),
            key_DD=hermitian(seen - value),
            value_DD=hermitian(value),
            q_NHH=hermitian(q),
            q_read_NHH=hermitian(read),
            rho_NF=rho,
        )
