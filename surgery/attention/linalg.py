"""The few decompositions that every rewriter shares: real or complex, float64 inside, fixed signs and phases."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """W ≈ up @ down; `residual` is the weighted squared error, `spectrum` what each rank adds, descending."""

    up: Tensor
    """[P, r]"""
    down: Tensor
    """[r, D]"""
    residual: Tensor
    """tr(M (W - up down) C (W - up down)^H): the discarded tail of `spectrum`."""
    spectrum: Tensor
    """[P]"""


def to_double(x: Tensor) -> Tensor:
    """The same numbers in float64 or complex128."""
    return x.to(torch.complex128 if x.is_complex() else torch.float64)


def hermitian(x: Tensor) -> Tensor:
    """The Hermitian part: what rounding left of a matrix that should equal its conjugate transpose."""
    return (x + x.mH).div_(2)


def phases(u: Tensor) -> Tensor:
    """Unit numbers, one per column, whose product with `u` makes each column's largest entry real and positive."""
    # Rounding must not decide between entries of equal size: the first within 1e-9 of the largest wins.
    size = u.abs()
    first = (size >= size.amax(-2, keepdim=True) * (1 - 1e-9)).to(torch.int8).argmax(-2, keepdim=True)
    pivot = u.gather(-2, first)
    return torch.where(pivot == 0, torch.ones_like(pivot), pivot.conj() / pivot.abs().clamp_min(1e-300))


def eigh_descending(x: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues (clamped at 0) and eigenvectors of a positive semidefinite matrix, largest first, phases fixed."""
    values, vectors = torch.linalg.eigh(hermitian(to_double(x)))
    vectors = vectors.flip(-1)
    return values.flip(-1).clamp_min(0), vectors * phases(vectors)


def top_eigenvector(x: Tensor) -> Tensor:
    """Unit eigenvector [..., n] of the largest eigenvalue of Hermitian `x` [..., n, n], largest entry real positive."""
    return eigh_descending(x)[1][..., 0]


def damp(x: Tensor, ridge: float) -> Tensor:
    """`x` plus `ridge` times its mean diagonal (an absolute `ridge` where that is zero) on the diagonal."""
    x = hermitian(to_double(x))
    x.diagonal(dim1=-2, dim2=-1).add_(_level(x, ridge)[..., 0])  # in place: at 4096 channels each matrix is 134 MB
    return x


def _level(x: Tensor, ridge: float) -> Tensor:
    """[..., 1, 1]: what `damp` puts on the diagonal."""
    mean = x.diagonal(dim1=-2, dim2=-1).real.mean(-1)
    return (ridge * torch.where(mean > 0, mean, torch.ones_like(mean)))[..., None, None]


def damped_cholesky(x: Tensor, ridge: float = 1e-6) -> Tensor:
    """Lower triangular S with S S^H = x + ridge · mean(diag x) · I, for positive semidefinite `x`.

    Moments of few tokens are singular, and rounding makes them indefinite: the ridge then grows until there is a root.

    Raises:
        ValueError: `x` has values that are not finite, or is far from positive semidefinite.
    """
    while True:
        root, failed = torch.linalg.cholesky_ex(damp(x, ridge))
        if not failed.any() and root.isfinite().all():
            return root
        if ridge >= 1 or not x.isfinite().all():
            raise ValueError("a metric that is not positive semidefinite, even when it is damped by its own mean")
        ridge = max(100 * ridge, 1e-9)


def ridge_regression(cov_YX: Tensor, cov_XX: Tensor, ridge: float, prior_YX: Tensor | None = None) -> Tensor:
    """(E[y xᵀ] + μ prior)(E[x xᵀ] + μ I)⁻¹ with μ = ridge · mean(diag E[x xᵀ]): shrinks to `prior`, or to 0."""
    cov_XX = to_double(cov_XX)
    rhs = to_double(cov_YX)
    if prior_YX is not None:
        rhs = rhs + _level(cov_XX, ridge) * to_double(prior_YX)
    return torch.linalg.solve(damp(cov_XX, ridge), rhs.mH).mH


def procrustes(cross: Tensor) -> Tensor:
    """Unitary Q that maximises Re tr(Q^H cross): the nearest unitary matrix to `cross`."""
    u, _, vh = torch.linalg.svd(to_double(cross))
    return u @ vh


def factorise(
    W: Tensor,
    C: Tensor | None = None,
    rank: int | None = None,
    metric: Tensor | None = None,
    *,
    ridge: float = 1e-6,
    split: Literal["right", "sqrt"] = "right",
    balance: bool = False,
) -> Factors:
    """Best rank-r `up @ down` for W under input moments C and output metric M.

    Minimises tr(M (W - up down) C (W - up down)^H). The latent c = down x is decorrelated and sorted by energy, so a
    prefix of the factors is the solution of every smaller rank.

    Args:
        W: [P, D], real or complex.
        C: [D, D] second moments of the input; None is the identity (a plain SVD).
        rank: r; None or anything above min(P, D) keeps min(P, D).
        metric: [P, P] positive semidefinite output metric M (for a query metric E[q qᵀ], for values W_oᵀ W_o), or [P]
            its diagonal; None is the identity.
        ridge: relative damping of M. The metric must be inverted; C never is.
        split: `right` leaves `up` orthonormal in the metric and the energy in `down`; `sqrt` shares it evenly, which
            trains better.
        balance: scale the latents to unit variance under C (before quantisation); comes after `split`.

    Returns:
        float64 or complex128 factors. Equal eigenvalues give an arbitrary basis: compare products, not factors.
    """
    W = to_double(W)
    P, D = W.shape
    rank = min(P, D) if rank is None else min(rank, P, D)
    A, B = W, None
    if metric is not None:
        metric = torch.diag(to_double(metric)) if metric.ndim == 1 else to_double(metric)
        metric = metric.to(torch.promote_types(metric.dtype, W.dtype))
        B = damped_cholesky(metric, ridge)
        A = B.mH @ W.to(B.dtype)
    if C is None:
        moment = A @ A.mH
    else:
        C = hermitian(to_double(C)).to(torch.promote_types(C.dtype, A.dtype))
        A = A.to(C.dtype)
        moment = A @ C @ A.mH
    energies, U = eigh_descending(moment)
    U_r = U[:, :rank]
    down = U_r.mH @ A
    up = U_r if B is None else torch.linalg.solve_triangular(B.mH, U_r.to(B.dtype), upper=True)
    if split == "sqrt":
        size = energies[:rank].clamp_min(torch.finfo(torch.float64).tiny) ** 0.25
        up, down = up * size, down / size[:, None]
    elif split != "right":
        raise ValueError(f"split must be 'right' or 'sqrt', not {split!r}")
    if balance:
        latent = (down.conj() * (down if C is None else down @ C)).sum(-1).real
        std = torch.where(latent > latent.max() * 1e-14, latent, torch.ones_like(latent)).sqrt()
        up, down = up * std, down / std[:, None]
    return Factors(up, down, energies[rank:].sum(), energies)


def blockdiag(x_KHH: Tensor) -> Tensor:
    """[K, H, H] -> [K*H, K*H] with the blocks on the diagonal."""
    return torch.block_diag(*x_KHH)
