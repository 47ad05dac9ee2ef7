"""How near a tensor is to the one that is wanted: the meanings of "close" that tests share."""

from __future__ import annotations

from torch import Tensor


def relative_error(got: Tensor, want: Tensor) -> float:
    """The largest difference over the largest magnitude that is wanted; NaN where either holds one."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    return float((got - want).abs().max() / want.abs().max())


def assert_close(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    error = relative_error(got, want)
    assert error <= tolerance, f"relative error {error:.2e}, above {tolerance:.0e}"


def assert_close_in_norm(got: Tensor, want: Tensor, tolerance: float = 1e-4) -> None:
    """The norm of the difference over the norm of what is wanted: single numbers may lie further off."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    error = float((got - want).norm() / want.norm())
    assert error <= tolerance, f"relative error {error:.2e} in norm, above {tolerance:.0e}"
