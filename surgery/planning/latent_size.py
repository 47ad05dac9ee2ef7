"""How many numbers a latent may have: what plans refuse and promise, and what rewriters then divide."""

from __future__ import annotations

from ..errors import PlanError
from ..runtime.layout import AttentionSite

ALIGNED = 8
"""Numbers of two bytes that fill 16, the width of one aligned load."""
ALIGNED_FROM = 128
"""Smaller cache entries are left as they are: rounding would cost more bytes than alignment is worth."""


def kept_numbers(keep: float, site: AttentionSite) -> int:
    """Cached numbers per token that `keep` of the parent's allows; whole 16 bytes of them, never more than allowed.

    Raises:
        PlanError: `keep` is outside (0, 1].
    """
    if not 0 < keep <= 1:
        raise PlanError(f"layer {site.layer}: keep {keep} must be above 0 and at most 1.")
    numbers = int(keep * site.kv_dims + 1e-9)
    return numbers // ALIGNED * ALIGNED if numbers >= ALIGNED_FROM else numbers


def aligned_rank(rank: int, rope_dims: int, full: int) -> int:
    """`rank` or the next above it with which cache entries fill whole 16 bytes; at most `full`."""
    numbers = rank + rope_dims
    return min(full, rank + -numbers % ALIGNED) if numbers >= ALIGNED_FROM else rank


def input_columns(site: AttentionSite) -> int:
    """Numbers that K and V are made from: a bias of q, k or v is carried through all statistics as one more."""
    return site.hidden_size + any(projection.bias is not None for projection in (site.q, site.k, site.v))


def full_rank(site: AttentionSite) -> int:
    """The rank of K and V together."""
    return min(site.kv_dims, input_columns(site))


def turning_numbers(site: AttentionSite) -> int:
    """Numbers of all keys of one token that the rotary embedding turns."""
    return 0 if site.rotary is None else site.kv_heads * site.rotary.dims


def latent_budget(numbers: int, site: AttentionSite, rope_dims: int | None = None) -> tuple[int, int]:
    """(rank, rope_dims) with rank + rope_dims <= `numbers`; rope_dims even.

    Args:
        rope_dims: the rotated part; None takes a quarter of the budget, at most what K has and at least one pair
            (`rope_splits` lists what a search on calibration text should try).

    Raises:
        PlanError: `numbers` leave no room, or `rope_dims` is odd or does not fit.
    """
    turning = turning_numbers(site)
    if rope_dims is None:
        rope_dims = min(turning, max(2, numbers // 8 * 2)) if turning else 0
    if rope_dims % 2 or rope_dims > turning:
        raise PlanError(
            f"layer {site.layer}: rope_dims {rope_dims} must be even and at most {turning}, the rotated numbers of K."
        )
    if numbers - rope_dims < 1:
        raise PlanError(
            f"layer {site.layer}: {numbers} of {site.kv_dims} numbers per token are kept, rope_dims takes "
            f"{rope_dims} of them, and none is left for the latent. Raise keep, or lower rope_dims."
        )
    return min(numbers - rope_dims, full_rank(site)), rope_dims


def rope_splits(numbers: int, site: AttentionSite) -> list[tuple[int, int]]:
    """Splits (rank, rope_dims) of the same budget worth trying: an eighth to five eighths of it rotated."""
    turning = turning_numbers(site)
    dims = sorted({min(turning, max(2, round(numbers * part / 2) * 2)) for part in (1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8)})
    fitting = [latent_budget(numbers, site, d) for d in dims if numbers - d >= 1]
    return fitting if turning else [latent_budget(numbers, site)]
