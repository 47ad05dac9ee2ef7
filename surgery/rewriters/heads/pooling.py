"""Pool K key/value heads into K' (GQA, MQA and their relatives): every init of the literature, and one better.

Everything here is: move along the exact symmetries of attention, then truncate. For a group g of KV heads a the result
is one head k' = mix_g [k_a; a in g], and per old head a small map back, k_a ≈ read_a k', which the queries absorb
(q ← read_aᵀ q). Rotary embedding allows one complex factor per frequency in `read`, channels without position any
matrix; values allow any matrix too, absorbed by `o`. The inits differ in `mix` and `read` only.

Pure functions: tensors in, tensors out, float64 inside.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from ...attention.linalg import to_double
from ...attention.weights import AttentionWeights
from ...errors import PlanError, RecipeError
from ..common.moments import Block, Moments, rotated_block, unrotated_block, value_block
from . import Init
from .folding import fold_queries, foldable, permute_queries
from .grouping import Groups
from .head_weights import weigh_heads
from .shared_head import (
    Fold,
    PooledBlock,
    PooledPairs,
    keep_energy,
    pool_block,
    pool_pairs,
    renorm_block,
    renorm_pairs,
    weigh_block,
    weigh_pairs,
)


def pool_heads(
    weights: AttentionWeights,
    moments: Moments,
    groups: Groups,
    init: Init = "rank1",
    *,
    renorm: bool = False,
    seed: int = 0,
    query_groups: Groups | None = None,
) -> AttentionWeights:
    """One KV head per group of source KV heads, with the queries of a group next to each other.

    Args:
        groups: source KV heads of each new one; any sizes, each head once.
        init: `key_norm`, `asym` and `qcqa` differ from `mean` in their groups only.
        renorm: after `aligned`, scale keys and values to the mean energy of the heads they replace.
        seed: for `random`.
        query_groups: query heads of each new KV head, where not those of the heads in its group (`key_norm`).

    Returns:
        The weights in the input's dtype. A group of one head keeps its numbers, bit for bit.

    `rank1` and `aligned` fold what q/k norms leave (`foldable`). The k norm's own rms is matched on average. Where the
    norm spans all heads, fewer of them change its statistics: the gain is rescaled by the mean ratio, which is exact
    only if the rms per token moves in proportion. With a gated output or a v norm nothing folds into `o`: both then
    take the plain mean of values under the output metric. Clamped projections (`clip_qkv`) are not modelled.

    Raises:
        RecipeError: groups that are not a partition of the KV heads, or an unknown init.
        PlanError: query heads would move and cannot (`permutable`).
    """
    _check_groups(weights, groups, init)
    if query_groups is None:
        if all(len(g) == 1 for g in groups) and groups == tuple(sorted(groups)):
            return weights
        query_groups = tuple(tuple(source_queries(weights, (g,))) for g in groups)
    _check_order(weights, groups, query_groups)
    limit = foldable(weights)
    layer = _Layer(weights, moments, init, renorm, limit, seed)
    heads = [layer.pool(list(group)) for group in groups]
    source_of = [a for group in groups for a in group]
    read_KHH = torch.cat([head.k_read_mHH for head in heads])[_inverse(source_of)]
    read_KVV = torch.cat([head.v_read_mVV for head in heads])[_inverse(source_of)]
    kv_of = weights.kv_of()
    k_KHD, k_bias = _split_bias(torch.stack([head.k_HD for head in heads]), weights, weights.k_bias_KH)
    v_KVD, v_bias = _split_bias(torch.stack([head.v_VD for head in heads]), weights, weights.v_bias_KV)
    for new, group in enumerate(groups):  # untouched heads keep their very bits
        if len(group) == 1:
            k_KHD[new], v_KVD[new] = weights.k_KHD[group[0]], weights.v_KVD[group[0]]
    pooled = replace(
        fold_queries(weights, read_KHH[kv_of], limit),
        k_KHD=k_KHD,
        k_bias_KH=k_bias,
        v_KVD=v_KVD,
        v_bias_KV=v_bias,
        o_DNV=torch.einsum("dnv,nvw->dnw", weights.o_DNV.double(), read_KVV[kv_of]).to(weights.o_DNV.dtype),
        groups=query_groups,
    )
    return permute_queries(_with_key_gains(pooled, heads, groups))


def source_queries(parent: AttentionWeights, groups: Groups) -> list[int]:
    """Query heads of the parent in the order that `pool_heads` gives them."""
    return [h for g in groups for a in g for h in parent.groups[a]]


def _check_groups(weights: AttentionWeights, groups: Groups, init: Init) -> None:
    if init not in get_args(Init):
        raise RecipeError(f"unknown init {init!r}. Use one of {', '.join(get_args(Init))}.")
    if sorted(a for g in groups for a in g) != list(range(weights.kv_heads)) or not all(groups):
        raise RecipeError(f"groups {groups} must name each of the {weights.kv_heads} KV heads once, none empty.")


def _check_order(weights: AttentionWeights, groups: Groups, query_groups: Groups) -> None:
    order = [h for g in query_groups for h in g]
    if order != list(range(weights.heads)) and not weights.permutable:
        reason = "a gate follows it" if weights.gated_output else "it computes its ALiBi slopes"
        raise PlanError(
            f"groups {groups} move query heads, and this attention fixes their order ({reason}). Use neighbour groups."
        )


class _SharedHead(NamedTuple):
    """One new KV head of m old ones."""

    k_HD: Tensor
    """Its rows, bias last if there is one."""
    v_VD: Tensor
    k_gain_H: Tensor | None
    """Gain of its k norm."""
    k_energy: Tensor
    """Mean square of its channels before that gain; 1 without a k norm."""
    k_read_mHH: Tensor
    v_read_mVV: Tensor


class _Layer:
    """Everything that the groups of one layer share."""

    def __init__(
        self, weights: AttentionWeights, moments: Moments, init: Init, renorm: bool, limit: Fold, seed: int
    ) -> None:
        self.weights, self.moments, self.init, self.renorm, self.limit = weights, moments, init, renorm, limit
        self.pairs = rotated_block(weights, moments)
        self.nope = unrotated_block(weights, moments)
        self.values = value_block(weights, moments)
        self.k_rows, self.v_rows = _key_rows(weights, moments), weights.with_bias("v")
        self.rng = random.Random(seed)

    def pool(self, g: list[int]) -> _SharedHead:
        weights = self.weights
        pairs, nope, values = self._maps(g)
        mix = _whole_head(weights, pairs.mix, nope.mix.permute(1, 0, 2)).permute(1, 0, 2).contiguous()
        read = _whole_head(weights, pairs.read, nope.read)
        gain = None if weights.k_norm_KH is None else _group_gain(weights, g)
        energy = torch.ones((), dtype=torch.float64)
        if weights.k_norm is not None:
            energy = (_energy_of(mix, self.moments.k_KHKH, g) / (1.0 if gain is None else gain.square())).mean()
            if weights.k_norm.span == "head" and len(g) > 1:  # what the norm will do anyway: let the queries know
                size = energy.sqrt().clamp_min(1e-150)
                mix = mix / size
                if self.limit in ("complex", "real"):
                    read = read * size
        k = torch.einsum("iaj,ajd->id", mix, self.k_rows[g])
        v = torch.einsum("iaj,ajd->id", values.mix, self.v_rows[g])
        return _SharedHead(k if gain is None else k / gain[:, None], v, gain, energy, read, values.read)

    def _maps(self, g: list[int]) -> tuple[PooledPairs, PooledBlock, PooledBlock]:
        """How the group's rotated pairs, its other key channels and its values become one head, and back."""
        if len(g) > 1 and self.init in ("rank1", "aligned"):
            behind_norm = self.limit if self.weights.q_norm is not None else None
            return (
                _pool_rotated(self.pairs, g, self.init, self.limit, self.renorm),
                _pool_unrotated(self.nope, g, self.init, behind_norm, self.renorm),
                _pool_values(self.values, g, self.init, self.weights.v_foldable, self.renorm),
            )
        k_alpha = v_alpha = torch.ones(1, dtype=torch.float64)
        if len(g) > 1:
            k_alpha, v_alpha = weigh_heads(self.init, ((self.pairs, self.nope), (self.values,)), g, self.rng)
        return (
            weigh_pairs(k_alpha, self.weights.frequencies),
            weigh_block(k_alpha, len(self.weights.unrotated())),
            weigh_block(v_alpha, self.weights.value_dim),
        )


def _pool_rotated(block: Block, g: list[int], init: Init, limit: Fold, renorm: bool) -> PooledPairs:
    gram = block.gram[:, g][:, :, g]
    if init == "rank1":
        pooled = pool_pairs(gram, block.metric[g], limit)
        return pooled if limit in ("complex", "real") else keep_energy(pooled, gram)
    fold: Fold = {"complex": "phase", "real": "sign"}.get(limit, limit)  # type: ignore[assignment]
    pooled = pool_pairs(gram, torch.ones_like(block.metric[g]), fold)
    return renorm_pairs(pooled, gram) if renorm else pooled


def _pool_unrotated(block: Block, g: list[int], init: Init, limit: Fold | None, renorm: bool) -> PooledBlock:
    gram, metric = block.gram[g][:, :, g], block.metric[g]
    m, H = metric.shape[:2]
    if H == 0:
        return PooledBlock(torch.zeros(0, m, 0, dtype=torch.float64), torch.zeros(m, 0, 0, dtype=torch.float64))
    if limit is None:
        pooled = pool_block(gram, metric, "general" if init == "rank1" else "orthogonal")
        return renorm_block(pooled, gram) if renorm and init == "aligned" else pooled
    # Before a q norm no two channels may mix: each is a pair of its own with a real factor.
    fold: Fold = "real" if limit in ("complex", "real") else "none" if limit == "none" else "sign"
    own = gram.diagonal(dim1=1, dim2=3).permute(2, 0, 1).to(torch.complex128)  # [H, m, m]
    weight = metric.diagonal(dim1=1, dim2=2)
    pairs = pool_pairs(own, weight if init == "rank1" else torch.ones_like(weight), fold)
    pairs = pairs if fold == "real" else keep_energy(pairs, own)
    return PooledBlock(torch.diag_embed(pairs.mix.real.T).permute(1, 0, 2), torch.diag_embed(pairs.read.real.T))


def _pool_values(block: Block, g: list[int], init: Init, foldable: bool, renorm: bool) -> PooledBlock:
    gram, metric = block.gram[g][:, :, g], block.metric[g]
    if not foldable:
        return pool_block(gram, metric, "none")
    if init == "rank1":
        return pool_block(gram, metric, "general")
    pooled = pool_block(gram, metric, "orthogonal")
    return renorm_block(pooled, gram) if renorm else pooled


def _whole_head(weights: AttentionWeights, pairs_Fm: Tensor, block_mHH: Tensor) -> Tensor:
    """[m, H, H] of complex factors, as [[a, -b], [b, a]], on the rotated pairs and of `block` on the other channels."""
    first, second = weights.rotated()
    rest = weights.unrotated()
    real, imag = pairs_Fm.real.T, pairs_Fm.imag.T
    out = torch.zeros(len(block_mHH), weights.head_dim, weights.head_dim, dtype=torch.float64)
    out[:, first, first], out[:, second, second] = real, real
    out[:, first, second], out[:, second, first] = -imag, imag
    for i, channel in enumerate(rest):
        out[:, channel, rest] = block_mHH[:, i]
    return out


def _key_rows(weights: AttentionWeights, moments: Moments) -> Tensor:
    """[K, H, D or D+1] rows that make, on average, the keys that the score reads: the gain and the norm folded in."""
    rows = weights.with_bias("k")
    if weights.k_norm is None:
        return rows
    if weights.k_norm.span == "head":
        rms = rows.square().sum(-1).mean(-1).sqrt() if moments.k_rms_K is None else to_double(moments.k_rms_K)
        rows = rows / rms.clamp_min(1e-150)[:, None, None]
    return rows if weights.k_norm_KH is None else rows * weights.k_norm_KH.double()[..., None]


def _group_gain(weights: AttentionWeights, g: list[int]) -> Tensor:
    """[H] gain of the new key head: the shared one, or the root mean square of its heads' gains."""
    assert weights.k_norm_KH is not None
    gain = weights.k_norm_KH[g].double()
    if len(g) == 1:
        return gain[0]
    gain = gain[0] if weights.k_norm_shared else gain.square().mean(0).sqrt()
    floor = 1e-4 * gain.abs().max().clamp_min(1e-150)  # a dead channel must not become an infinite row
    return torch.where(gain.abs() < floor, floor, gain)


def _energy_of(mix_HmH: Tensor, k_KHKH: Tensor, g: list[int]) -> Tensor:
    """[H] E[k'_i²] of k' = Σ_a mix_a k_a."""
    k = to_double(k_KHKH)[g][:, :, g]
    return torch.einsum("iaj,ajbk,ibk->i", mix_HmH, k, mix_HmH)


def _split_bias(w: Tensor, weights: AttentionWeights, old: Tensor | None) -> tuple[Tensor, Tensor | None]:
    dtype = weights.k_KHD.dtype
    if not weights.has_bias:
        return w.to(dtype), None
    return w[..., :-1].to(dtype), None if old is None else w[..., -1].to(old.dtype)


def _with_key_gains(weights: AttentionWeights, heads: list[_SharedHead], groups: Groups) -> AttentionWeights:
    """The k norm's parameters for the new heads."""
    if weights.k_norm is None or weights.k_norm_KH is None:
        return weights
    gain_KH = torch.stack([head.k_gain_H for head in heads if head.k_gain_H is not None])
    if weights.k_norm.span == "all":
        gain_KH = gain_KH * torch.stack([head.k_energy for head in heads]).mean().sqrt()
    weights = replace(weights, k_norm_KH=gain_KH.to(weights.k_norm_KH.dtype))
    if weights.k_norm_bias_KH is None:
        return weights
    shift = torch.stack([weights.k_norm_bias_KH[list(g)].double().mean(0) for g in groups])
    return replace(weights, k_norm_bias_KH=shift.to(weights.k_norm_bias_KH.dtype))


def _inverse(order: list[int]) -> list[int]:
    """Where each of 0, 1, 2, ... stands in `order`."""
    return sorted(range(len(order)), key=order.__getitem__)
