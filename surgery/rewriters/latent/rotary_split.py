"""MLA from pretrained heads: mix, keep few components rotated, give the rest a mean phase, one latent for K and V."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...attention.latent import LatentWeights, check_latent
from ...attention.linalg import blockdiag, damp
from ...attention.weights import AttentionWeights
from ...errors import PlanError
from . import MlaInit, Rotation, Selector
from .factors import STEPS, alternate, joint_latent, orthonormal, single_latent
from .moments import LatentMoments
from .rotary_mixing import mean_phase, mix_components, rotated_part, select_components, unrotated_keys


@dataclass(frozen=True, kw_only=True)
class MlaOptions:
    """The choices inside `mla`; `MLA_INITS` has the named combinations."""

    rotation: Rotation = "complex"
    fold: Literal[1, 2, 4] = 1
    selector: Selector = "gain"
    phase: Literal["mean", "one"] = "mean"
    cov: Literal["attention", "uniform", "none"] = "attention"
    """Moments of the input: weighted by attention, keys and values apart; every token alike; none (plain SVD)."""
    metric: Literal["query", "none"] = "query"
    """Errors of K weighed by the queries that read them and of V by W_o, or all channels alike."""
    balance: Literal["rms", "rms_of_keys", "none"] = "rms"
    """Where `beta` 1 stands: equal energy of K and V in their metrics, of the unmetred outputs, or nothing."""
    value_weight: float = 3.0
    """V's error against K's at `beta` 1, on top of `balance`. KL line searches on the reference model end near 3 at
    every budget and split; within a factor of 2 it changes KL by less than a tenth."""
    steps: int = STEPS
    """Alternations after the closed form, where keys and values have moments of their own."""
    mean_split: bool = False
    """Keep the mean of the values apart, as a constant output."""


MLA_INITS: dict[MlaInit, MlaOptions] = {
    "default": MlaOptions(),
    "svd": MlaOptions(
        rotation="none",
        selector="2norm",
        phase="one",
        cov="none",
        metric="none",
        balance="none",
        value_weight=1.0,
        steps=0,
    ),
    "whitened": MlaOptions(
        rotation="none",
        selector="2norm",
        phase="one",
        cov="uniform",
        metric="none",
        balance="none",
        value_weight=1.0,
        steps=0,
    ),
    "transmla": MlaOptions(
        rotation="real",
        selector="top",
        phase="one",
        cov="uniform",
        metric="none",
        balance="rms_of_keys",
        value_weight=1.0,
        steps=0,
    ),
}
"""`svd`: joint SVD as MHA2MLA (arXiv:2502.14837); `whitened`: under the input's moments as SVD-LLM and CARE;
`transmla`: arXiv:2502.07864, real PCA across heads and K scaled to V's norm (a ratio of norms, as in its code)."""


def mla(
    weights: AttentionWeights,
    moments: LatentMoments,
    rank: int,
    rope_dims: int,
    *,
    options: MlaOptions | MlaInit = "default",
    beta: float = 1.0,
) -> LatentWeights:
    """One attention as a latent of `rank` numbers and a shared rotated key part of `rope_dims` numbers.

    Args:
        rank: R; more than K and V can fill is cut (see `LatentWeights.rank`).
        rope_dims: 2F', even; 0 for attentions without rotary embedding, or to drop all of it.
        beta: weight of V's error against K's around the balance that the options set.

    Returns:
        float64 weights; cost D³ for the moments plus (K(H+Hv))³ for the factors.

    Raises:
        PlanError: impossible ranks. UnsupportedModel: see `check_latent`.

    Source: algorithms of TransMLA (arXiv:2502.07864) and MHA2MLA (arXiv:2502.14837) for the shape. Ours: complex
    mixing under the queries' energy, the choice by sensitivity, the mean phase, the metrics, moments weighted by
    attention.
    """
    options = MLA_INITS[options] if isinstance(options, str) else options
    check_latent(weights)
    _check_ranks(weights, rank, rope_dims)
    seen = moments.input_DD if options.cov != "attention" else moments.key_DD + moments.value_DD
    rho = mean_phase(weights, moments) if weights.frequencies else torch.zeros(weights.kv_heads, 0)
    components = mix_components(weights, moments, seen, options.rotation, options.fold, rho)
    kept = select_components(components, rope_dims // 2, options.selector)
    rope, inv_freq, q_rope, rest = rotated_part(weights, components, kept)
    k = unrotated_keys(weights, rest, rho if options.phase == "mean" else torch.ones_like(rho))
    split = options.mean_split and splits_mean(weights)
    down, k_up, v_up = _latent(weights, moments.centred if split else moments, k, rank, options, beta)
    return LatentWeights(
        down_RD=down,
        rope_FD=rope,
        inv_freq_F=inv_freq,
        k_up_KHR=k_up,
        q_rope_KFH=q_rope,
        v_up_KVR=v_up,
        v_mean_KV=lost_mean(weights.with_bias("v"), v_up, down, moments) if split else None,
    )


def splits_mean(weights: AttentionWeights) -> bool:
    """Whether a constant in V is one in the output: not where a sink takes a part of each softmax."""
    return weights.sinks_N is None


def lost_mean(w_KHD: Tensor, up_KHR: Tensor, down_RD: Tensor, moments: LatentMoments) -> Tensor:
    """[K, H]: what `up` of the latent misses of the mean of `w`'s heads."""
    return (w_KHD - up_KHR @ down_RD) @ moments.mean_D


def mla_freq(
    weights: AttentionWeights,
    moments: LatentMoments,
    rank: int,
    rope_dims: int,
    *,
    fold: int = 1,
    mean_split: bool = False,
) -> LatentWeights:
    """The `freq` layout: all of K in rotated complex components, `rank` for V alone; no expansion, no mean phase.

    The rotation is exact for what is kept; weaker than `mla` where few components fit. Channels without rotation
    need a latent, so partial rotary is refused.

    Raises:
        PlanError: impossible ranks, or keys with channels that do not turn.
    """
    check_latent(weights)
    _check_ranks(weights, rank, rope_dims)
    if weights.unrotated():
        still = len(weights.unrotated())
        raise PlanError(f"freq: {still} of {weights.head_dim} key channels do not turn. Use mla, or layout joint.")
    seen = moments.key_DD + moments.value_DD
    none = torch.zeros(weights.kv_heads, weights.frequencies, dtype=torch.complex128)
    components = mix_components(weights, moments, seen, "complex", fold, none)
    kept = select_components(components, rope_dims // 2, "energy")
    rope, inv_freq, q_rope, _ = rotated_part(weights, components, kept)
    v, split = weights.with_bias("v"), mean_split and splits_mean(weights)
    value = moments.centred.value_DD if split else moments.value_DD
    down, v_up = single_latent(v, value, output_metric(weights), rank, [list(range(len(v)))])
    return LatentWeights(
        down_RD=down,
        rope_FD=rope,
        inv_freq_F=inv_freq,
        k_up_KHR=v.new_zeros(weights.kv_heads, weights.head_dim, len(down)),
        q_rope_KFH=q_rope,
        v_up_KVR=v_up,
        v_mean_KV=lost_mean(v, v_up, down, moments) if split else None,
    )


def query_metric(weights: AttentionWeights, q_NHH: Tensor) -> Tensor:
    """[K, H, H]: Σ over the queries that read a KV head."""
    return torch.stack([q_NHH[list(g)].sum(0) for g in weights.groups])


def output_metric(weights: AttentionWeights) -> Tensor:
    """[K, Hv, Hv]: Σ W_o,hᵀ W_o,h over the queries that read a KV head."""
    o = weights.o_DNV.double().transpose(0, 1)
    return query_metric(weights, o.mT @ o)


def _latent(
    weights: AttentionWeights, moments: LatentMoments, k_KHD: Tensor, rank: int, options: MlaOptions, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    k, own, v = k_KHD, weights.with_bias("k"), weights.with_bias("v")
    metred = options.metric == "query"
    k_metric = query_metric(weights, moments.q_NHH) * weights.scale**2 if metred else None
    v_metric = output_metric(weights) if metred else None
    basis = moments.basis if options.cov == "attention" else None
    if basis is None:
        start = moments.input_DD if options.cov == "uniform" else None
        key = value = moments.input_DD
    else:
        k, v = basis.enter(k), basis.enter(v)
        start, key, value = None, basis.share_D, 1 - basis.share_D
    beta = beta * options.value_weight
    if options.balance == "rms":
        k_energy = _energy(k, key, k_metric)
        if float(k_KHD.norm()) < 1e-5 * float(own.norm()):
            # Rotated components hold all of K, what is left is rounding: V must not be weighed against that.
            k_energy = max(k_energy, 1e-12 * _energy(own if basis is None else basis.enter(own), key, k_metric))
        beta = beta * (k_energy / max(_energy(v, value, v_metric), 1e-300)) ** 0.5
    elif options.balance == "rms_of_keys":
        beta = beta * (_energy(own, key, None) / max(_energy(v, value, None), 1e-300)) ** 0.5
    down, k_up, v_up = joint_latent(
        k, v, rank, k_metric_KHH=k_metric, v_metric_KVV=v_metric, cov_DD=start, balance=beta
    )
    if basis is None:
        return down, k_up, v_up
    full = k.shape[0] * k.shape[1] + v.shape[0] * v.shape[1]
    if options.steps and k_metric is not None and v_metric is not None and len(down) < min(full, down.shape[1]):
        k_blocks, v_blocks = damp(blockdiag(k_metric), 1e-7), damp(blockdiag(v_metric), 1e-7) * beta**2
        down, k_flat, v_flat = alternate(
            down, k.flatten(0, 1), v.flatten(0, 1), k_blocks, v_blocks, basis.share_D, options.steps
        )
        k_up, v_up = k_flat.reshape(*k.shape[:2], -1), v_flat.reshape(*v.shape[:2], -1)
        down = basis.leave(down)
        rows = orthonormal(down)  # of the common basis each number has variance 1, and codes lose what matters most
        back = down @ rows.mT
        return rows, k_up @ back, v_up @ back
    return basis.leave(down), k_up, v_up


def _energy(w_KHD: Tensor, cov: Tensor, metric_KHH: Tensor | None) -> float:
    """tr(M W C Wᵀ), with C a matrix or the diagonal of one."""
    moment = (w_KHD * cov if cov.ndim == 1 else w_KHD @ cov) @ w_KHD.mT
    return float(moment.diagonal(0, 1, 2).sum() if metric_KHH is None else (moment * metric_KHH).sum())


def _check_ranks(weights: AttentionWeights, rank: int, rope_dims: int) -> None:
    full = 2 * weights.kv_heads * weights.frequencies
    if rope_dims % 2 or not 0 <= rope_dims <= full:
        raise PlanError(f"rope_dims {rope_dims} must be even, from 0 to {full} (the rotated numbers of K).")
    if rank < 1:
        raise PlanError(f"rank {rank}: the values need a latent of at least 1.")
