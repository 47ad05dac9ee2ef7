"""The inits that only weigh whole heads: k' = Σ_a α_a k_a, and nothing is folded back."""

from __future__ import annotations

import math
import random

import torch
from torch import Tensor

from ...attention.linalg import damp
from ..common.moments import Block, scalar_gram
from . import Init


def weigh_heads(
    init: Init, blocks: tuple[tuple[Block, ...], tuple[Block, ...]], g: list[int], rng: random.Random
) -> tuple[Tensor, Tensor]:
    """α of the keys and of the values of group `g`, [m] each; `blocks` of keys and of values."""
    m = len(g)
    if init in ("first", "medoid", "random"):
        pick = 0
        if init == "random":
            pick = rng.randrange(m)
        elif init == "medoid":
            grams = [torch.stack([scalar_gram(b, g)[0] for b in kind]).sum(0) for kind in blocks]
            pick = medoid(torch.stack([x / torch.trace(x).clamp_min(1e-300) for x in grams]).sum(0))
        alpha = torch.zeros(m, dtype=torch.float64)
        alpha[pick] = 1
        return alpha, alpha
    if init in ("weighted", "dha"):
        fit = fit_head_weights if init == "weighted" else fuse_heads
        keys, values = (fit(torch.stack([scalar_gram(b, g)[1] for b in kind]).sum(0)) for kind in blocks)
        return keys, values
    alpha = torch.full((m,), math.sqrt(m) if init == "sqrt_g" else 1.0, dtype=torch.float64) / m
    return alpha, alpha


def medoid(gram_mm: Tensor) -> int:
    """The head with the smallest summed squared distance to the others."""
    own = gram_mm.diagonal()
    return int((own[:, None] + own[None] - 2 * gram_mm).sum(1).argmin())


def fit_head_weights(gram_mmm: Tensor) -> Tensor:
    """α of k' = Σ_a α_a k_a that minimises Σ_c E‖k_c - k'‖² under the metric of c's queries, in closed form.

    WGQA (arXiv:2407.10855) learns α by training from 1/m; this is what its scalar form reaches on the layer's own
    error, at conversion. α shrinks towards 0 where the heads disagree.
    """
    total = gram_mmm.sum(0)
    target = torch.stack([gram_mmm[c, :, c] for c in range(len(total))]).sum(0)
    return torch.linalg.solve(damp(total, 1e-9), target)


def fuse_heads(gram_mmm: Tensor, steps: int = 300, rho: float = 1.0) -> Tensor:
    """DHA's progressive linear fusion at conversion: k_c ← Σ_a ω_ca k_a, ω = 1 at the start, rows pulled together.

    Minimises Σ_c E‖k_c - Σ_a ω_ca k_a‖² with an augmented Lagrangian on the spread of ω over the rows until all rows
    agree (DHA, arXiv:2406.06567, learns ω on the language model's loss instead; its exact penalty is not published).
    The minimum is that of `fit_head_weights`: the constraint, once met, leaves one row of weights.
    """
    m = gram_mmm.shape[0]
    scale = torch.stack([torch.trace(x) for x in gram_mmm]).mean().clamp_min(1e-300)
    gram = damp(gram_mmm / scale, 1e-9)
    omega = torch.eye(m, dtype=torch.float64)
    dual = torch.zeros_like(omega)
    rhs = torch.stack([gram[c, :, c] for c in range(m)])
    for _ in range(steps):
        shared = (omega + dual).mean(0)
        omega = torch.linalg.solve(gram + rho * torch.eye(m, dtype=torch.float64), rhs + rho * (shared - dual))
        dual = dual + omega - shared
    return omega.mean(0)
