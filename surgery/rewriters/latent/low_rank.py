"""Low rank before the rotation: latents of K and of V apart; K is expanded and rotated at read, as in the parent."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...attention.latent import LatentWeights, check_latent
from ...attention.weights import AttentionWeights
from ...errors import PlanError
from . import LowrankInit
from .factors import single_latent
from .moments import LatentMoments
from .rotary_split import lost_mean, output_metric, query_metric, splits_mean

Layout = Literal["joint", "grouped", "head"]


@dataclass(frozen=True, kw_only=True)
class LowrankOptions:
    """The choices inside `lowrank`; `LOWRANK_INITS` has the named combinations."""

    cov: Literal["attention", "uniform", "none"] = "attention"
    metric: Literal["read", "query", "none"] = "read"
    """Of K: queries turned to the keys that they look at; their energy per frequency; none. Of V: W_o unless none."""
    mean_split: bool = True
    """Keep the means of keys and values apart: no number of the latents is spent on them."""


LOWRANK_INITS: dict[LowrankInit, LowrankOptions] = {
    "qw": LowrankOptions(),
    "whitened": LowrankOptions(cov="uniform", metric="none", mean_split=False),
    "plain": LowrankOptions(cov="none", metric="none", mean_split=False),
}
"""`whitened`: Palu (arXiv:2407.21118) with SVD-LLM's whitening; `plain`: SVD of the weights, as LoRC."""


def lowrank(
    weights: AttentionWeights,
    moments: LatentMoments,
    k_rank: int,
    v_rank: int,
    *,
    layout: Layout = "joint",
    group: int = 4,
    options: LowrankOptions | LowrankInit = "qw",
) -> LatentWeights:
    """One attention whose cache holds `k_rank` + `v_rank` numbers, read by expanding K and rotating it.

    Args:
        layout: `joint`: one latent over all KV heads. `grouped`: one per `group` neighbouring KV heads, `head`: one
            per KV head; the rank is shared out by what each group's next number saves, so groups may differ.

    Raises:
        PlanError: impossible ranks or groups. UnsupportedModel: see `check_latent`.

    Source: Palu, EigenAttention (arXiv:2408.05646), ReCalKV (arXiv:2505.24357). Ours: keys weighted by the queries
    that read them, turned by the distances at which they do, and moments weighted by attention.
    """
    options = LOWRANK_INITS[options] if isinstance(options, str) else options
    check_latent(weights, rotate_on_read=True)
    k, v = weights.with_bias("k"), weights.with_bias("v")
    members = _members(len(k), layout, group)
    split = options.mean_split and splits_mean(weights)
    if split:
        moments = moments.centred
    for name, r in (("k_rank", k_rank), ("v_rank", v_rank)):
        if r < 1:
            raise PlanError(f"{name} {r} must be at least 1.")
    if options.cov == "attention":
        key, value = moments.key_DD, moments.value_DD
    else:
        key = value = moments.input_DD
    k_metric = v_metric = None
    if options.metric != "none":
        # The two kinds agree where queries turn evenly over all phases.
        k_metric = query_metric(
            weights, moments.q_read_NHH if options.metric == "read" else _per_pair(weights, moments)
        )
        if weights.k_norm is not None:
            k_metric = _before_norm(weights, k, moments.input_DD, k_metric)
        v_metric = output_metric(weights)
    plain = options.cov == "none"
    k_down, k_up = single_latent(k, None if plain else key, k_metric, k_rank, members)
    v_down, v_up = single_latent(v, None if plain else value, v_metric, v_rank, members)
    R_k, R_v = len(k_down), len(v_down)
    k_mean = lost_mean(k, k_up, k_down, moments) if split else None
    v_mean = lost_mean(v, v_up, v_down, moments) if split else None
    none = torch.zeros(0, dtype=torch.float64)
    return LatentWeights(
        down_RD=torch.cat([k_down, v_down]),
        rope_FD=k.new_zeros(0, k.shape[-1]),
        inv_freq_F=none,
        k_up_KHR=torch.cat([k_up, k_up.new_zeros(*k_up.shape[:2], R_v)], -1),
        q_rope_KFH=k.new_zeros(len(k), 0, weights.head_dim),
        v_up_KVR=torch.cat([v_up.new_zeros(*v_up.shape[:2], R_k), v_up], -1),
        rotate_on_read=True,
        k_rank=R_k,
        k_mean_KH=k_mean,
        v_mean_KV=v_mean,
    )


def _before_norm(weights: AttentionWeights, k_KHD: Tensor, cov_DD: Tensor, metric_KHH: Tensor) -> Tensor:
    """The metric of keys before their norm, to first order: each channel's gain over the root mean square of a head."""
    energy = ((k_KHD @ cov_DD) * k_KHD).sum(-1).mean(-1)  # per head
    if weights.k_norm is not None and weights.k_norm.span == "all":
        energy = energy.mean().expand_as(energy)
    scale_KH = energy.clamp_min(1e-30).rsqrt()[:, None].expand(k_KHD.shape[:2])
    if weights.k_norm_KH is not None:
        scale_KH = scale_KH * weights.k_norm_KH.to(scale_KH)
    return scale_KH[:, :, None] * metric_KHH * scale_KH[:, None, :]


def _members(heads: int, layout: Layout, group: int) -> list[list[int]]:
    size = {"joint": heads, "grouped": group, "head": 1}[layout]
    if heads % size:
        raise PlanError(f"layout {layout}: groups of {size} do not divide {heads} KV heads.")
    return [list(range(a, a + size)) for a in range(0, heads, size)]


def _per_pair(weights: AttentionWeights, moments: LatentMoments) -> Tensor:
    """[N, H, H]: queries' moments if every phase were equally likely: energy per pair, other channels as they are."""
    first, second = weights.rotated()
    q = moments.q_NHH
    out = q.clone()
    if first:
        turning = [*first, *second]
        energy = (q.diagonal(0, 1, 2)[:, first] + q.diagonal(0, 1, 2)[:, second]) / 2
        out[:, turning] = 0
        out[:, :, turning] = 0
        out[:, turning, turning] = torch.cat([energy, energy], -1)
    return out
