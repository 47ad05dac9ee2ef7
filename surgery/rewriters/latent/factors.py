"""Weighted factors: of keys or values alone, and of both in one latent with metrics and moments of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from ...attention.linalg import Factors, blockdiag, damp, factorise, hermitian

RIDGE = 1e-6
"""Damping of both moments of `alternate`, in parts of their mean diagonal."""


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


def alternate(
    down_RD: Tensor,
    k_PD: Tensor,
    v_QD: Tensor,
    k_metric_PP: Tensor,
    v_metric_QQ: Tensor,
    key_DD: Tensor,
    value_DD: Tensor,
    steps: int = 20,
    ridge: float = RIDGE,
    diagonal: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(down, k_up [P, R], v_up [Q, R]) that locally minimise the sum of both weighted errors, each under its moments.

    tr(M_k ΔK C_k ΔKᵀ) + tr(M_v ΔV C_v ΔVᵀ) has no closed form in both factors where C_k ≠ C_v; in each alone it has:
    `up` is a regression on the latent, `down` a Sylvester equation that two simultaneous diagonalisations solve.

    Args:
        diagonal: `simultaneous` of both moments, damped, where it is known.
    """
    key, value = definite(key_DD, value_DD, ridge)
    x_basis, x_share = simultaneous(key, value) if diagonal is None else diagonal
    k_seen, v_seen = k_PD @ key, v_QD @ value
    left_k, left_v = k_metric_PP @ k_seen, v_metric_QQ @ v_seen
    down = down_RD
    for step in range(steps + 1):
        down_k, down_v = down @ key, down @ value
        k_up, v_up = _regress(k_seen, down_k, down), _regress(v_seen, down_v, down)
        if step == steps:
            break
        g_k, g_v = k_up.mT @ k_metric_PP @ k_up, v_up.mT @ v_metric_QQ @ v_up
        wide_k, wide_v = definite(g_k, g_v, ridge)
        basis, share = simultaneous(wide_k, wide_v)
        # What damping adds is added on both sides: a step shrinks towards where it stood, and exact factors stay.
        stay = (wide_k - g_k) @ down_k + (wide_v - g_v) @ down_v
        rhs = basis.mT @ (k_up.mT @ left_k + v_up.mT @ left_v + stay) @ x_basis
        weight = share[:, None] * x_share + (1 - share[:, None]) * (1 - x_share)
        down = basis @ (rhs / weight.clamp_min(1e-12)) @ x_basis.mT
        # Any basis of the latent will do: keep it orthonormal, or the columns drift apart.
        down = torch.linalg.qr(down.mT)[0].mT
    return down, k_up, v_up


def _regress(seen_PD: Tensor, down_seen_RD: Tensor, down_RD: Tensor) -> Tensor:
    """argmin over up of E‖W x - up down x‖², whatever the metric, from W C and down C with C the moments of x."""
    return torch.linalg.solve(damp(down_seen_RD @ down_RD.mT, 1e-12), down_RD @ seen_PD.mT).mT


def definite(a: Tensor, b: Tensor, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """Both damped so far that their sum is positive definite.

    `ridge` does, but for moments of little text: rank deficient, and known to the float32 rounding of a difference.
    """
    while True:
        damped = damp(a, ridge), damp(b, ridge)
        if ridge >= 1 or not int(torch.linalg.cholesky_ex(damped[0] + damped[1])[1]):
            return damped
        ridge *= 10


def simultaneous(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """X, λ with Xᵀ a X = diag(λ) and Xᵀ b X = diag(1 - λ), for positive definite a, b."""
    L = torch.linalg.cholesky(hermitian(a + b))
    inner = torch.linalg.solve_triangular(L, torch.linalg.solve_triangular(L, a, upper=False).mT, upper=False)
    share, Q = torch.linalg.eigh(hermitian(inner))
    return torch.linalg.solve_triangular(L.mT, Q, upper=True), share.clamp(0, 1)
