"""The optimal head that several heads share, under each kind of map back that can be folded away.

k' = Σ_a mix_a k_a, and per old head a small map back, k_a ≈ read_a k'. Rotated pairs allow one complex factor per
frequency, channels without position any matrix.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ...attention.linalg import blockdiag, damp, factorise, hermitian, procrustes, to_double, top_eigenvector

Fold = Literal["complex", "phase", "real", "sign", "none"]
"""What of a complex factor per frequency survives: all, its phase, its real part, its sign, nothing."""


class PooledPairs(NamedTuple):
    """k' = Σ_a mix_a k_a per frequency, k_a ≈ read_a k'."""

    mix: Tensor
    """complex [F, m]"""
    read: Tensor
    """complex [F, m]"""


class PooledBlock(NamedTuple):
    """The same for channels that turn together with nothing."""

    mix: Tensor
    """[H', m, H']"""
    read: Tensor
    """[m, H', H']"""


def pool_pairs(gram_Fmm: Tensor, weight_mF: Tensor, fold: Fold = "complex", rounds: int = 20) -> PooledPairs:
    """Minimise Σ_a λ_a E|k_a - read_a k'|² per frequency over the shared k' and the factors that `fold` allows.

    complex: any factor: the top eigenvector of diag(√λ) Gram diag(√λ), the optimum. phase: |read| = 1. real; sign: ±1;
    none: 1 (the weighted mean). All but the first two alternate between k' and read, starting at the optimum.

    The free scale between mix and read is set so that E|k'|² is the mean over the heads, where `fold` leaves it free.
    """
    gram = hermitian(to_double(gram_Fmm))
    lam = to_double(weight_mF).T
    lam = lam.maximum(1e-6 * lam.mean()).clamp_min(1e-300)  # [F, m]; a head that no query weighs still needs a value
    root = lam.sqrt().to(gram.dtype)
    u = top_eigenvector(root[:, :, None] * gram * root[:, None, :])
    read = u / root
    if fold != "complex":
        read = _project(read, fold)
        for _ in range(rounds if fold != "none" else 0):
            mix = _best_mix(read, lam)
            energy = _energy(mix, gram)
            cross = torch.einsum("fab,fb->fa", gram, mix.conj())  # E[k_a conj(k')]
            read = _project(cross / energy.clamp_min(1e-300)[:, None], fold)
    mix = _best_mix(read, lam)
    if fold in ("complex", "real"):
        energy, target = _energy(mix, gram), gram.diagonal(dim1=1, dim2=2).real.mean(-1)
        known = (energy > 0) & (target > 0)
        # Without energy any scale will do, and one that numbers of 32 bits can hold is wanted.
        t = torch.where(known, (target / energy.clamp_min(1e-300)).sqrt(), read.abs().amax(-1).clamp_min(1e-150))
        mix, read = mix * t[:, None], read / t[:, None]
    return PooledPairs(mix, read)


def _best_mix(read: Tensor, lam: Tensor) -> Tensor:
    """argmin over k' of Σ_a λ_a |k_a - read_a k'|², as coefficients of the k_a."""
    norm = (lam * read.abs().square()).sum(-1, keepdim=True).clamp_min(1e-300)
    return lam * read.conj() / norm


def _energy(mix: Tensor, gram: Tensor) -> Tensor:
    return torch.einsum("fa,fab,fb->f", mix, gram, mix.conj()).real


def _project(c: Tensor, fold: Fold) -> Tensor:
    """The nearest factor that can be folded."""
    if fold == "phase":
        return torch.where(c.abs() > 0, c / c.abs().clamp_min(1e-300), torch.ones_like(c))
    if fold == "real":
        return c.real.to(c.dtype)
    if fold == "sign":
        return torch.where(c.real < 0, -torch.ones_like(c), torch.ones_like(c))
    return torch.ones_like(c) if fold == "none" else c


def pool_block(
    moment_mHmH: Tensor,
    metric_mHH: Tensor,
    fold: Literal["general", "orthogonal", "none"] = "general",
    rounds: int = 20,
) -> PooledBlock:
    """The shared head of channels without position, or of values: k_a ≈ read_a k'.

    general: `factorise` under the metrics, the optimum. orthogonal: read_a orthogonal, alternating Procrustes and mean
    (unweighted). none: read_a = 1, the mean under the metrics.
    """
    moment = to_double(moment_mHmH)
    m, H = moment.shape[:2]
    eye = torch.eye(H, dtype=torch.float64)
    if fold == "general":
        total = moment.reshape(m * H, m * H)
        metric = blockdiag(to_double(metric_mHH))
        up, down, _, _ = factorise(torch.eye(m * H, dtype=torch.float64), total, H, metric)
        energy, target = torch.trace(down @ total @ down.T), torch.trace(total) / m
        t = float((target / energy).sqrt()) if energy > 0 and target > 0 else 1.0
        return PooledBlock(down.reshape(H, m, H) * t, up.reshape(m, H, H) / t)
    if fold == "none":
        total = damp(to_double(metric_mHH).sum(0), 1e-6)
        return PooledBlock(
            torch.linalg.solve(total, damp(to_double(metric_mHH), 1e-6)).permute(1, 0, 2), eye.expand(m, H, H)
        )
    if fold == "orthogonal":
        read = torch.stack([procrustes(moment[a, :, 0]) for a in range(m)])
        for _ in range(rounds):
            shared = torch.einsum("aij,aibk->bkj", read, moment) / m  # E[k_b k'ᵀ], k' the mean of read_aᵀ k_a
            read = procrustes(shared)
    return PooledBlock(read.permute(2, 0, 1) / m, read)


def keep_energy(pooled: PooledPairs, gram: Tensor) -> PooledPairs:
    """`pooled` with the energy of each frequency at the mean of the heads: where no factor of its size survives."""
    own = gram.diagonal(dim1=1, dim2=2).real.mean(-1)
    scale = (own / _energy(pooled.mix, gram).clamp_min(1e-300)).sqrt()
    return pooled._replace(mix=pooled.mix * torch.where(own > 0, scale, torch.ones_like(scale))[:, None])


def renorm_pairs(pooled: PooledPairs, gram: Tensor) -> PooledPairs:
    """`pooled` at the mean energy of the heads that it replaces, summed over frequencies."""
    own = gram.diagonal(dim1=1, dim2=2).real.mean(-1).sum()
    return pooled._replace(mix=pooled.mix * (own / _energy(pooled.mix, gram).sum().clamp_min(1e-300)).sqrt())


def renorm_block(pooled: PooledBlock, moment: Tensor) -> PooledBlock:
    """`pooled` at the mean energy of the heads that it replaces."""
    H, m = pooled.mix.shape[:2]
    mix, total = pooled.mix.reshape(H, m * H), moment.reshape(m * H, m * H)
    scale = (torch.trace(total) / m / torch.trace(mix @ total @ mix.T).clamp_min(1e-300)).sqrt()
    return pooled._replace(mix=pooled.mix * scale)


def weigh_pairs(alpha_m: Tensor, frequencies: int) -> PooledPairs:
    """Whole heads weighed by α, nothing to map back: rotated pairs."""
    one = torch.ones(frequencies, len(alpha_m), dtype=torch.complex128)
    return PooledPairs(one * alpha_m, one)


def weigh_block(alpha_m: Tensor, dim: int) -> PooledBlock:
    """The same for other channels."""
    eye = torch.eye(dim, dtype=torch.float64)
    return PooledBlock(alpha_m[None, :, None] * eye[:, None], eye.expand(len(alpha_m), dim, dim))
