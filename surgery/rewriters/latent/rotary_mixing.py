"""Complex components of the keys: mixed across heads at each frequency, chosen to stay rotated, or given a mean phase.

Under rotary embedding K heads may be mixed by any invertible complex matrix per frequency if queries undo it: the
score Re Σ_j conj(q_j) k_j e^{iθ_j(n-m)} does not change. A component is one row of such a mixture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...attention.linalg import eigh_descending, to_double
from ...attention.weights import AttentionWeights
from ...errors import PlanError
from . import Rotation, Selector
from .moments import LatentMoments


@dataclass(frozen=True, kw_only=True)
class Components:
    """k_{a,j} = Σ_c read[a, j, c] · (down_c x), every component turning with a frequency of its own. float64."""

    down_CD: Tensor
    """[C, D(+1)] complex."""
    read_KFC: Tensor
    """[K, F, C] complex; zero outside the frequency (or the fold) of the component."""
    inv_freq_C: Tensor
    energy_C: Tensor
    """E|k_c|² · Σ_h E|q_c|²: squared score that the component carries."""
    gain_C: Tensor
    """The same, each head's part times 1 - |mean phase|²: what losing the rotation costs."""
    order_C: Tensor
    """Index of the component within its frequency, strongest first."""


def key_rows(weights: AttentionWeights) -> Tensor:
    """[K, F, D(+1)] complex: channel j plus i times channel j + F of each key head."""
    first, second = weights.rotated()
    k = weights.with_bias("k")
    return torch.complex(k[:, first], k[:, second])


def query_energy(weights: AttentionWeights, moments: LatentMoments) -> Tensor:
    """λ [K, F]: Σ over the queries of a KV head of E|q_j|²."""
    first, second = weights.rotated()
    diagonal = moments.q_NHH.diagonal(0, 1, 2)
    energy_NF = diagonal[:, first] + diagonal[:, second]
    return torch.stack([energy_NF[list(g)].sum(0) for g in weights.groups])


def mean_phase(weights: AttentionWeights, moments: LatentMoments) -> Tensor:
    """ρ [K, F] complex: mean of e^{iθ(n-m)} over what the queries of a KV head look at, weighted by their energy."""
    first, second = weights.rotated()
    diagonal = moments.q_NHH.diagonal(0, 1, 2)
    energy_NF = (diagonal[:, first] + diagonal[:, second]).clamp_min(1e-300)
    rho = []
    for group in weights.groups:
        g = list(group)
        rho.append((moments.rho_NF[g] * energy_NF[g]).sum(0) / energy_NF[g].sum(0))
    return torch.stack(rho)


def mix_components(
    weights: AttentionWeights,
    moments: LatentMoments,
    cov_DD: Tensor,
    rotation: Rotation = "complex",
    fold: int = 1,
    rho_KF: Tensor | None = None,
) -> Components:
    """Rotate the K heads against each other at each frequency, so that few components carry most of the score.

    Args:
        cov_DD: moments of the input, [D(+1), D(+1)].
        rotation: `complex`: unitary PCA of √w_a k_a with w_a = λ_a (1 - |ρ_a|²), the score that needs its rotation.
            `real`: orthogonal PCA of the keys alone, as RoRoPE has it (TransMLA, arXiv:2502.07864). `none`: the
            channels as they are.
        fold: so many neighbouring frequencies count as one, with their energy-weighted mean angle. Exact for 1 only.
        rho_KF: mean phases; None: those of `moments`.

    Departs from TransMLA in the complex group, the query weights, and their share that is sensitive to position.
    """
    w = key_rows(weights)
    K, F, D = w.shape
    if F % fold:
        raise PlanError(f"fold {fold} does not divide {F} rotary frequencies. Use one of 1, 2, 4.")
    if weights.rotary is None or not F:
        empty = torch.zeros(0, dtype=torch.float64)
        none = torch.zeros(0, D, dtype=torch.complex128)
        return Components(
            down_CD=none, read_KFC=none.new_zeros(K, 0, 0), inv_freq_C=empty, energy_C=empty, gain_C=empty,
            order_C=torch.zeros(0, dtype=torch.long),
        )  # fmt: skip
    lam = query_energy(weights, moments) * weights.rotary.scaling**4
    rho = mean_phase(weights, moments) if rho_KF is None else rho_KF
    lost = lam * (1 - rho.abs().square()).clamp_min(1e-6)
    freq = torch.tensor(weights.rotary.inv_freq, dtype=torch.float64)
    cov = to_double(cov_DD)
    seen = torch.complex(w.real @ cov, w.imag @ cov)  # once for all frequencies: reading `cov` is what takes time
    P = K * fold
    down, read, inv, energy, gain = [], [], [], [], []
    for j in range(0, F, fold):
        rows = w[:, j : j + fold].reshape(P, D)
        lam_P, lost_P = lam[:, j : j + fold].reshape(P), lost[:, j : j + fold].reshape(P)
        gram = seen[:, j : j + fold].reshape(P, D) @ rows.mH
        if rotation == "complex":
            size = (lost_P + 1e-9 * lost_P.mean() + 1e-300).sqrt()
            U = eigh_descending(size[:, None] * gram * size)[1]
            A, inverse = U / size[:, None], U.mH * size
        elif rotation == "real":
            U = eigh_descending(gram.real)[1].to(gram.dtype)
            A, inverse = U, U.mH
        else:
            A = inverse = torch.eye(P, dtype=gram.dtype)
        k_energy = ((inverse @ gram) * inverse.conj()).sum(-1).real
        share = A.abs().square()
        part = torch.zeros(K, F, P, dtype=torch.complex128)
        part[:, j : j + fold] = A.reshape(K, fold, P)
        down.append(inverse @ rows)
        read.append(part)
        energy.append(k_energy * (lam_P[:, None] * share).sum(0))
        gain.append(k_energy * (lost_P[:, None] * share).sum(0))
        weight = (gram.diagonal().real * lam_P).reshape(K, fold).sum(0)
        inv.append(((weight * freq[j : j + fold]).sum() / weight.sum().clamp_min(1e-300)).expand(P))
    return Components(
        down_CD=torch.cat(down),
        read_KFC=torch.cat(read, -1),
        inv_freq_C=torch.cat(inv),
        energy_C=torch.cat(energy),
        gain_C=torch.cat(gain),
        order_C=torch.arange(P).repeat(F // fold),
    )


def select_components(components: Components, count: int, selector: Selector = "gain") -> list[int]:
    """Which `count` components stay rotated, in the order of their frequencies.

    `gain`: what costs most without rotation. `energy`: what carries most. `2norm`: largest E|q_c| E|k_c| (with
    rotation `none`: MHA2MLA, arXiv:2502.14837, whose `high`, `low` and `uniform` pick by frequency alone). `top`: the
    strongest component of each frequency, highest first, then the second of each (TransMLA's heads of rotary dims).
    """
    total = len(components.inv_freq_C)
    if count > total:
        raise PlanError(f"rope_dims {2 * count}: the keys have {2 * total} rotated numbers. Ask for less.")
    place = torch.arange(total)
    by_frequency = sorted(place.tolist(), key=lambda i: (-float(components.inv_freq_C[i]), i))
    if selector in ("gain", "energy", "2norm"):
        score = components.gain_C if selector == "gain" else components.energy_C
        chosen = score.argsort(descending=True, stable=True)[:count].tolist()
    elif selector == "high":
        chosen = by_frequency[:count]
    elif selector == "low":
        chosen = by_frequency[total - count :]
    elif selector == "uniform":
        chosen = [by_frequency[i * total // count] for i in range(count)]
    elif selector == "top":
        chosen = sorted(by_frequency, key=lambda i: int(components.order_C[i]))[:count]
    else:
        raise PlanError(f"selector {selector!r} is not known. Use gain, energy, 2norm, high, low, uniform or top.")
    return sorted(chosen)


def rotated_part(
    weights: AttentionWeights, components: Components, kept: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(rope_FD, inv_freq_F, q_rope_KFH) of the kept components, and what is left of the key rows [K, F, D(+1)]."""
    first, second = weights.rotated()
    down, read = components.down_CD[kept], components.read_KFC[:, :, kept]
    rope = torch.cat([down.real, down.imag])
    n = len(kept)
    scaling = 1.0 if weights.rotary is None else weights.rotary.scaling
    q_rope = torch.zeros(weights.kv_heads, 2 * n, weights.head_dim, dtype=torch.float64)
    # q_c = conj(A) q as a real matrix on (q_first, q_second).
    a, b = read.real.mT * scaling**2, read.imag.mT * scaling**2
    q_rope[:, :n, first], q_rope[:, :n, second] = a, b
    q_rope[:, n:, first], q_rope[:, n:, second] = -b, a
    rest = key_rows(weights) - torch.einsum("afc,cd->afd", read, down)
    return rope, components.inv_freq_C[kept], q_rope, rest


def unrotated_keys(weights: AttentionWeights, rest_KFD: Tensor, rho_KF: Tensor) -> Tensor:
    """[K, H, D(+1)] real: the keys to read without rotation; pairs times their mean phase, other channels as they are.

    |e^{iθΔ} - ρ|² is least in the mean for ρ = E e^{iθΔ}; published converters use 1.
    """
    first, second = weights.rotated()
    k = weights.with_bias("k").clone()
    scaling = 1.0 if weights.rotary is None else weights.rotary.scaling
    turned = rho_KF[..., None] * rest_KFD * scaling**2
    k[:, first], k[:, second] = turned.real, turned.imag
    return k
