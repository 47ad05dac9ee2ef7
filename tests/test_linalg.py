"""factorise() and its small companions: optimality, nesting, determinism."""

import pytest
import torch

from surgery.attention.linalg import (
    damped_cholesky,
    eigh_descending,
    factorise,
    procrustes,
    ridge_regression,
    top_eigenvector,
)


def problem(complex_: bool, P: int = 6, D: int = 9, seed: int = 0):
    torch.manual_seed(seed)
    dtype = torch.complex128 if complex_ else torch.float64
    W, S, B = (torch.randn(n, m, dtype=dtype) for n, m in ((P, D), (D, D), (P, P)))
    S = S * torch.logspace(0, -2, D, dtype=torch.float64)
    return W, S @ S.mH, B @ B.mH


def error(W, C, M, approx):
    left = W - approx
    return torch.trace(M @ left @ C @ left.mH).real


@pytest.mark.parametrize("complex_", [False, True])
@pytest.mark.parametrize("split", ["right", "sqrt"])
@pytest.mark.parametrize("balance", [False, True])
def test_full_rank_gives_the_matrix_back(complex_, split, balance):
    W, C, M = problem(complex_)
    up, down, _, _ = factorise(W, C, W.shape[0], M, split=split, balance=balance)
    torch.testing.assert_close(up @ down, W, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("complex_", [False, True])
def test_residual_is_the_measured_error_and_falls_with_rank(complex_):
    W, C, M = problem(complex_)
    last = float("inf")
    for rank in range(1, 7):
        up, down, residual, _ = factorise(W, C, rank, M, ridge=1e-12)
        assert float(residual) == pytest.approx(float(error(W, C, M, up @ down)), rel=1e-5, abs=1e-6)
        assert float(residual) <= last
        last = float(residual)


@pytest.mark.parametrize("complex_", [False, True])
def test_ranks_are_nested_and_latents_decorrelated(complex_):
    W, C, M = problem(complex_)
    whole = factorise(W, C, 6, M)
    small = factorise(W, C, 2, M)
    torch.testing.assert_close(small.up @ small.down, whole.up[:, :2] @ whole.down[:2])
    moment = whole.down @ C @ whole.down.mH
    torch.testing.assert_close(moment, torch.diag(whole.spectrum).to(moment.dtype), atol=1e-8, rtol=1e-8)


def test_metric_and_covariance_each_win_in_their_own_norm():
    W, C, M = problem(False)
    eye_P, eye_D = torch.eye(6, dtype=torch.float64), torch.eye(9, dtype=torch.float64)
    for rank in (1, 3, 5):
        own = {}
        for c in (None, C):
            for m in (None, M):
                f = factorise(W, c, rank, m, ridge=1e-12)
                own[c is not None, m is not None] = f.up @ f.down
        for (cov, metric), approx in own.items():
            norm = C if cov else eye_D, M if metric else eye_P
            assert all(error(W, *norm, approx) <= error(W, *norm, other) * (1 + 1e-9) for other in own.values())


def test_without_covariance_it_is_a_plain_svd():
    W, _, _ = problem(False)
    s = torch.linalg.svdvals(W)
    assert float(factorise(W, None, 2).residual) == pytest.approx(float(s[2:].square().sum()))


def test_diagonal_metric_equals_its_matrix():
    W, C, _ = problem(False)
    d = torch.rand(6, dtype=torch.float64) + 0.1
    a, b = factorise(W, C, 3, d), factorise(W, C, 3, torch.diag(d))
    torch.testing.assert_close(a.up @ a.down, b.up @ b.down)


def test_balanced_latents_have_unit_variance():
    W, C, M = problem(True)
    f = factorise(W, C, 4, M, balance=True)
    torch.testing.assert_close(
        (f.down @ C @ f.down.mH).diagonal().real, torch.ones(4, dtype=torch.float64), atol=1e-8, rtol=1e-8
    )


def test_phases_are_fixed():
    _, C, _ = problem(True)
    _, vectors = eigh_descending(C)
    pivot = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    torch.testing.assert_close(pivot.imag, torch.zeros_like(pivot.imag), atol=1e-12, rtol=0)
    assert (pivot.real > 0).all()
    top = top_eigenvector(C)
    torch.testing.assert_close(C @ top, top * torch.linalg.eigvalsh(C)[-1])


def test_singular_metric_and_zero_moments_stay_finite():
    W, C, _ = problem(False)
    M = torch.zeros(6, 6, dtype=torch.float64)
    M[0, 0] = 1
    for c, m in ((C, M), (torch.zeros_like(C), M), (C, torch.zeros_like(M))):
        f = factorise(W, c, 3, m, balance=True)
        assert f.up.isfinite().all()
        assert f.down.isfinite().all()


def test_ridge_shrinks_to_its_prior():
    torch.manual_seed(0)
    x, W = torch.randn(500, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    cross, moment = W @ x.T @ x / 500, x.T @ x / 500
    prior = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(ridge_regression(cross, moment, 1e-9), W, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(ridge_regression(cross, moment, 1e9, prior), prior, atol=1e-6, rtol=1e-6)


def test_procrustes_finds_a_rotation():
    torch.manual_seed(0)
    Q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.complex128))
    P = torch.diag(torch.rand(5, dtype=torch.float64) + 0.1).to(Q.dtype)
    torch.testing.assert_close(procrustes(Q @ P), Q)


def test_damped_cholesky_squares_to_the_damped_matrix():
    _, C, _ = problem(True)
    S = damped_cholesky(C, 1e-2)
    want = C + 1e-2 * C.diagonal().real.mean() * torch.eye(9)
    torch.testing.assert_close(S @ S.mH, want)


def test_singular_moments_that_rounding_made_indefinite_have_a_damped_root():
    x = torch.randn(1, 12, generator=torch.Generator().manual_seed(0)).expand(64, -1)
    moments = (x.T @ x).double() - 1e-5 * torch.eye(12, dtype=torch.float64)
    assert torch.linalg.eigvalsh(moments).min() < 0
    root = damped_cholesky(moments, 1e-9)
    assert (root @ root.T - moments).abs().max() < 1e-3 * moments.abs().max()
    assert damped_cholesky(torch.zeros(3, 3)).isfinite().all()
    with pytest.raises(ValueError, match="not positive semidefinite"):
        damped_cholesky(torch.full((2, 2), float("nan")))
