"""Weighted factors: of keys or values alone, and of both in one latent with metrics and moments of their own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.linalg import Factors, blockdiag, damp, factorise, hermitian

RIDGE = 1e-6
"""Damping of both moments of `alternate`, in parts of their mean diagonal."""
STEPS = 20
"""Of `alternate`, at most."""
ENOUGH = 1e-3
"""A step of `alternate` that gains less than such a part of the error is its last."""


def joint_latent(
    k_KHD: Tensor,
    v_KVD: Tensor,
    rank: int,
    *,
    k_metric_KHH: Tensor | None = None,
    v_metric_KVV: Tensor | None = None,
    cov_DD: Tensor | None = None,
    balance: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """(down_RD, k_up_KHR, v_up_KVR) by one weighted `factorise` of [K; V] with metric blockdiag(M_k, balance² M_v)."""
    K, H, D = k_KHD.shape
    V = v_KVD.shape[1]
    stacked = torch.cat([k_KHD.reshape(-1, D), v_KVD.reshape(-1, D)])
    if k_metric_KHH is None or v_metric_KVV is None:
        metric = torch.cat([k_KHD.new_ones(K * H), k_KHD.new_full((K * V,), balance**2)])
    else:
        # Damped apart: one may be many orders below the other.
        metric = torch.block_diag(*(damp(m, 1e-7) for m in k_metric_KHH))
        metric = torch.block_diag(metric, *(damp(m, 1e-7) * balance**2 for m in v_metric_KVV))
    factors = factorise(stacked, cov_DD, rank, metric, ridge=0.0)
    up = factors.up
    return factors.down, up[: K * H].reshape(K, H, -1), up[K * H :].reshape(K, V, -1)


def single_latent(
    w_KHD: Tensor, cov_DD: Tensor | None, metric_KHH: Tensor | None, rank: int, members: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """(down [r, D], up [K, H, r]) of keys or values alone, one latent per group of heads in `members`.

    The rank is shared out by what the next number of each group saves.
    """
    K, H, _ = w_KHD.shape
    found: list[Factors] = []
    for g in members:
        metric = None if metric_KHH is None else damp(blockdiag(metric_KHH[g]), 1e-7)
        found.append(factorise(w_KHD[g].flatten(0, 1), cov_DD, None, metric, ridge=0.0))
    energy = [(float(e), i, r) for i, f in enumerate(found) for r, e in enumerate(f.spectrum[: len(f.down)])]
    best = sorted(energy, key=lambda item: (-item[0], item[2], item[1]))[:rank]
    ranks = [sum(1 for _, j, _ in best if j == i) for i in range(len(found))]
    down = torch.cat([f.down[:r] for f, r in zip(found, ranks, strict=True)])
    up = torch.block_diag(*(f.up[:, :r] for f, r in zip(found, ranks, strict=True)))
    return down, up.reshape(K, H, -1)


@dataclass(frozen=True, kw_only=True)
class CommonBasis:
    """A basis of the inputs in which two moments a, b are diagonal and their sum is the identity.

    a + b = L Lᵀ and L⁻¹ a L⁻ᵀ = Q diag(λ) Qᵀ: a map W of the inputs is W' = W L Q there, W a Wᵀ = W' diag(λ) W'ᵀ and
    W b Wᵀ = W' diag(1 - λ) W'ᵀ.
    """

    root_DD: Tensor
    """L, lower triangular."""
    turn_DD: Tensor
    """Q, orthogonal."""
    share_D: Tensor
    """λ, from 0 to 1."""

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> CommonBasis:
        """Of two symmetric matrices whose sum is positive definite."""
        root = torch.linalg.cholesky(a + b)
        half = torch.linalg.solve_triangular(root, a, upper=False)
        inner = torch.linalg.solve_triangular(root, half.mT, upper=False)
        share, turn = torch.linalg.eigh(hermitian(inner))
        return cls(root_DD=root, turn_DD=turn, share_D=share.clamp(0, 1))

    def enter(self, w_PD: Tensor) -> Tensor:
        """W' of W."""
        return w_PD @ self.root_DD @ self.turn_DD

    def leave(self, w_PD: Tensor) -> Tensor:
        """W of W'."""
        return torch.linalg.solve_triangular(self.root_DD, w_PD @ self.turn_DD.mT, upper=False, left=False)


def alternate(
    down_RD: Tensor,
    k_PD: Tensor,
    v_QD: Tensor,
    k_metric_PP: Tensor,
    v_metric_QQ: Tensor,
    share_D: Tensor,
    steps: int = STEPS,
    ridge: float = RIDGE,
) -> tuple[Tensor, Tensor, Tensor]:
    """(down, k_up [P, R], v_up [Q, R]) that locally minimise the sum of both weighted errors, each under its moments.

    tr(M_k ΔK C_k ΔKᵀ) + tr(M_v ΔV C_v ΔVᵀ) has no closed form in both factors where C_k ≠ C_v; in each alone it has:
    `up` is a regression on the latent, `down` a Sylvester equation that two simultaneous diagonalisations solve. It
    ends after `steps`, or where a step gains less than a part `ENOUGH` of the error.

    Args:
        down_RD: start; like K, V and the result in the `CommonBasis` of the moments of keys and values, so that no
            step needs a product with a matrix of [D, D].
        share_D: of that basis: the moment of keys. The rest, to 1, is that of values.
    """
    k_seen, v_seen = k_PD * share_D, v_QD * (1 - share_D)
    k_left, v_left = k_metric_PP @ k_seen, v_metric_QQ @ v_seen
    energy = float((k_left * k_PD).sum() + (v_left * v_QD).sum())
    down, error = orthonormal(down_RD), math.inf
    for step in range(steps + 1):
        down_k, down_v = down * share_D, down * (1 - share_D)
        k_back, v_back = k_seen @ down.mT, v_seen @ down.mT
        k_up, v_up = _regress(down_k @ down.mT, k_back), _regress(down_v @ down.mT, v_back)
        k_read, v_read = k_metric_PP @ k_up, v_metric_QQ @ v_up
        before, error = error, energy - float((k_read * k_back).sum() + (v_read * v_back).sum())
        if step == steps or before - error <= ENOUGH * max(error, 0.0):
            break
        g_k, g_v = k_up.mT @ k_read, v_up.mT @ v_read
        wide_k, wide_v = definite(g_k, g_v, ridge)
        small = CommonBasis.of(wide_k, wide_v)
        # What damping adds is added on both sides: a step shrinks towards where it stood, and exact factors stay.
        stay = (wide_k - g_k) @ down_k + (wide_v - g_v) @ down_v
        vectors = small.leave(torch.eye(len(down), dtype=down.dtype))
        rhs = vectors @ (k_up.mT @ k_left + v_up.mT @ v_left + stay)
        share = small.share_D[:, None]
        weight = share * share_D + (1 - share) * (1 - share_D)
        down = orthonormal(vectors.mT @ (rhs / weight.clamp_min(1e-12)))
    return down, k_up, v_up


def _regress(gram_RR: Tensor, back_PR: Tensor) -> Tensor:
    """argmin over up [P, R] of E‖W x - up down x‖², whatever the metric, from down C downᵀ and W C downᵀ."""
    return torch.linalg.solve(damp(gram_RR, 1e-12), back_PR.mT).mT


def orthonormal(down_RD: Tensor) -> Tensor:
    """The same latent with rows of unit length at right angles: any basis of it will do, but for digits and codes."""
    return torch.linalg.qr(down_RD.mT)[0].mT


def definite(a: Tensor, b: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Both damped so far that their sum is positive definite.

    `ridge` does, but for moments of little text: rank deficient, and known to the float32 rounding of a difference.
    """
    while True:
        damped = damp(a, ridge), damp(b, ridge)
        if ridge >= 1 or not int(torch.linalg.cholesky_ex(damped[0] + damped[1])[1]):
            return damped
        ridge *= 10
