"""Pool K key/value heads into K' (GQA, MQA and their relatives): every init of the literature, and one better.

Everything here is: move along the exact symmetries of attention, then truncate. For a group g of KV heads a the result
is one head k' = mix_g [k_a; a in g], and per old head a small map back, k_a ≈ read_a k', which the queries absorb
(q ← read_aᵀ q). Rotary embedding allows one complex factor per frequency in `read`, channels without position any
matrix; values allow any matrix too, absorbed by `o`. The inits differ in `mix` and `read` only.

All functions are pure: tensors in, tensors out, float64 inside.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from surgery.calibrate import Activations
from surgery.errors import PlanError, RecipeError
from surgery.linalg import (
    blockdiag,
    damp,
    factorise,
    hermitian,
    procrustes,
    ridge_regression,
    to_double,
    top_eigenvector,
)
from surgery.rewriters.attention_weights import AttentionWeights, attend, rotation, turn
from surgery.runtime.layout import AttentionSite

Init = Literal[
    "mean", "sqrt_g", "first", "medoid", "random", "weighted", "key_norm", "asym", "qcqa", "dha", "aligned", "rank1"
]
Grouping = Literal["neighbour", "search"]
Fold = Literal["complex", "phase", "real", "sign", "none"]
Groups = tuple[tuple[int, ...], ...]
"""Source KV heads of each new KV head."""


# --------------------------------------------------------------------------------------------------------------------
# Statistics


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Second moments where the score reads them: after q/k norms, before rotation, biases included, uncentred."""

    k_KHKH: Tensor
    """E[k_a k_bᵀ], [K, H, K, H]."""
    q_NHH: Tensor
    """E[q_h q_hᵀ]"""
    v_KVKV: Tensor
    """E[v_a v_bᵀ], before a v norm."""
    k_rms_K: Tensor | None = None
    """Root mean square of each head's keys *before* its k norm; needed only there."""

    @classmethod
    def of_weights(cls, weights: AttentionWeights, cov_DD: Tensor | None = None) -> Moments:
        """Moments from those of the projections' input, exact where there is no q/k norm.

        Args:
            cov_DD: E[x xᵀ], or E[x~ x~ᵀ] with x~ = [x; 1] where q, k or v has a bias. None: the identity.

        With a q/k norm this is what the norm would give if every head's rms were its mean over tokens; stream the
        normed moments instead where you can (`GroupHeads.needs`).
        """
        q, k, v = (weights.with_bias(name) for name in "qkv")
        if cov_DD is not None and cov_DD.shape[0] != q.shape[-1]:
            bias = " plus one for the bias coordinate" if weights.has_bias else ""
            raise ValueError(f"moments of the input are {tuple(cov_DD.shape)}, need {q.shape[-1]} (model dim{bias})")
        cov = torch.eye(q.shape[-1], dtype=torch.float64) if cov_DD is None else hermitian(to_double(cov_DD))
        k_PP, v_PP = (w.flatten(0, 1) @ cov @ w.flatten(0, 1).T for w in (k, v))
        (K, H, _), V = k.shape, v.shape[1]
        k_KHKH, q_NHH = k_PP.reshape(K, H, K, H), q @ cov @ q.mT
        k_rms = k_PP.diagonal().reshape(K, H).mean(-1).sqrt()
        if weights.k_norm is not None:
            gain = _mean_norm(k_KHKH.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1), weights.k_norm.span)
            gain = gain * (1 if weights.k_norm_KH is None else weights.k_norm_KH.double())
            k_KHKH = k_KHKH * gain[:, :, None, None] * gain
        if weights.q_norm is not None:
            gain = _mean_norm(q_NHH.diagonal(dim1=1, dim2=2), weights.q_norm.span)
            gain = gain * (1 if weights.q_norm_NH is None else weights.q_norm_NH.double())
            q_NHH = q_NHH * gain[:, :, None] * gain[:, None, :]
        return cls(k_KHKH=k_KHKH, q_NHH=q_NHH, v_KVKV=v_PP.reshape(K, V, K, V), k_rms_K=k_rms)


def _mean_norm(energy_KH: Tensor, span: str) -> Tensor:
    """[K, 1] (or [1, 1]) factor 1/rms that a norm applies on average."""
    mean = energy_KH.mean(-1, keepdim=True) if span == "head" else energy_KH.mean().reshape(1, 1)
    return mean.clamp_min(1e-30).rsqrt()


class Block(NamedTuple):
    """Moments and output metrics of one kind of channels of all heads, before heads are chosen."""

    gram: Tensor
    """Rotated pairs: complex [F, K, K]. Others: [K, H', K, H']."""
    metric: Tensor
    """Rotated pairs: [K, F] energies of the reading queries. Others: [K, H', H']."""


def rotated_block(weights: AttentionWeights, moments: Moments) -> Block:
    """Gram_j[a, b] = E[k_a,j conj(k_b,j)] of the complex pairs, and λ_a,j = Σ_h E|q_h,j|² of the queries of a."""
    first, second = weights.rotated()
    k = to_double(moments.k_KHKH).permute(1, 3, 0, 2)  # [H, H, K, K]
    gram = torch.complex(
        k[first, first] + k[second, second],
        k[second, first] - k[first, second],
    )
    energy_NH = to_double(moments.q_NHH).diagonal(dim1=1, dim2=2)
    energy_NF = energy_NH[:, first] + energy_NH[:, second]
    return Block(gram, torch.stack([energy_NF[list(g)].sum(0) for g in weights.groups]))


def unrotated_block(weights: AttentionWeights, moments: Moments) -> Block:
    """The channels of keys without position: moments, and Σ_h E[q_h q_hᵀ] as the metric."""
    channels = weights.unrotated()
    k = to_double(moments.k_KHKH)[:, channels][:, :, :, channels]
    q = to_double(moments.q_NHH)[:, channels][:, :, channels]
    return Block(k, torch.stack([q[list(g)].sum(0) for g in weights.groups]))


def value_block(weights: AttentionWeights, moments: Moments) -> Block:
    """Values: moments, and Σ_h W_o,hᵀ W_o,h as the metric."""
    o = weights.o_DNV.double().transpose(0, 1)  # [N, D, V]
    metric = o.mT @ o
    return Block(to_double(moments.v_KVKV), torch.stack([metric[list(g)].sum(0) for g in weights.groups]))


# --------------------------------------------------------------------------------------------------------------------
# One group: the optimal shared head under each kind of fold


class PooledPairs(NamedTuple):
    """k' = Σ_a mix_a k_a per frequency, k_a ≈ read_a k'."""

    mix: Tensor
    """complex [F, m]"""
    read: Tensor
    """complex [F, m]"""


class PooledBlock(NamedTuple):
    """The same for channels that turn together with nothing."""

    mix: Tensor
    """[H', m, H']"""
    read: Tensor
    """[m, H', H']"""


def pool_pairs(gram_Fmm: Tensor, weight_mF: Tensor, fold: Fold = "complex", rounds: int = 20) -> PooledPairs:
    """Minimise Σ_a λ_a E|k_a - read_a k'|² per frequency over the shared k' and the factors that `fold` allows.

    complex: any factor: the top eigenvector of diag(√λ) Gram diag(√λ), the optimum. phase: |read| = 1. real; sign: ±1;
    none: 1 (the weighted mean). All but the first two alternate between k' and read, starting at the optimum.

    The free scale between mix and read is set so that E|k'|² is the mean over the heads, where `fold` leaves it free.
    """
    gram = hermitian(to_double(gram_Fmm))
    lam = to_double(weight_mF).T
    lam = lam.maximum(1e-6 * lam.mean()).clamp_min(1e-300)  # [F, m]; a head that no query weighs still needs a value
    root = lam.sqrt().to(gram.dtype)
    u = top_eigenvector(root[:, :, None] * gram * root[:, None, :])
    read = u / root
    if fold != "complex":
        read = _project(read, fold)
        for _ in range(rounds if fold != "none" else 0):
            mix = _best_mix(read, lam)
            energy = _energy(mix, gram)
            cross = torch.einsum("fab,fb->fa", gram, mix.conj())  # E[k_a conj(k')]
            read = _project(cross / energy.clamp_min(1e-300)[:, None], fold)
    mix = _best_mix(read, lam)
    if fold in ("complex", "real"):
        energy, target = _energy(mix, gram), gram.diagonal(dim1=1, dim2=2).real.mean(-1)
        known = (energy > 0) & (target > 0)
        t = torch.where(known, (target / energy.clamp_min(1e-300)).sqrt(), torch.ones_like(target))
        mix, read = mix * t[:, None], read / t[:, None]
    return PooledPairs(mix, read)


def _best_mix(read: Tensor, lam: Tensor) -> Tensor:
    """argmin over k' of Σ_a λ_a |k_a - read_a k'|², as coefficients of the k_a."""
    norm = (lam * read.abs().square()).sum(-1, keepdim=True).clamp_min(1e-300)
    return lam * read.conj() / norm


def _energy(mix: Tensor, gram: Tensor) -> Tensor:
    return torch.einsum("fa,fab,fb->f", mix, gram, mix.conj()).real


def _project(c: Tensor, fold: Fold) -> Tensor:
    """The nearest factor that can be folded."""
    if fold == "phase":
        return torch.where(c.abs() > 0, c / c.abs().clamp_min(1e-300), torch.ones_like(c))
    if fold == "real":
        return c.real.to(c.dtype)
    if fold == "sign":
        return torch.where(c.real < 0, -torch.ones_like(c), torch.ones_like(c))
    return torch.ones_like(c) if fold == "none" else c


def pool_block(
    moment_mHmH: Tensor,
    metric_mHH: Tensor,
    fold: Literal["general", "orthogonal", "none"] = "general",
    rounds: int = 20,
) -> PooledBlock:
    """The shared head of channels without position, or of values: k_a ≈ read_a k'.

    general: `factorise` under the metrics, the optimum. orthogonal: read_a orthogonal, alternating Procrustes and mean
    (unweighted). none: read_a = 1, the mean under the metrics.
    """
    moment = to_double(moment_mHmH)
    m, H = moment.shape[:2]
    eye = torch.eye(H, dtype=torch.float64)
    if fold == "general":
        total = moment.reshape(m * H, m * H)
        metric = blockdiag(to_double(metric_mHH))
        up, down, _, _ = factorise(torch.eye(m * H, dtype=torch.float64), total, H, metric)
        energy, target = torch.trace(down @ total @ down.T), torch.trace(total) / m
        t = float((target / energy).sqrt()) if energy > 0 and target > 0 else 1.0
        return PooledBlock(down.reshape(H, m, H) * t, up.reshape(m, H, H) / t)
    if fold == "none":
        total = damp(to_double(metric_mHH).sum(0), 1e-6)
        return PooledBlock(
            torch.linalg.solve(total, damp(to_double(metric_mHH), 1e-6)).permute(1, 0, 2), eye.expand(m, H, H)
        )
    if fold == "orthogonal":
        read = torch.stack([procrustes(moment[a, :, 0]) for a in range(m)])
        for _ in range(rounds):
            shared = torch.einsum("aij,aibk->bkj", read, moment) / m  # E[k_b k'ᵀ], k' the mean of read_aᵀ k_a
            read = procrustes(shared)
    return PooledBlock(read.permute(2, 0, 1) / m, read)


def pairs_error(pooled: PooledPairs, gram_Fmm: Tensor, weight_mF: Tensor) -> Tensor:
    """Σ_j Σ_a λ_a E|k_a - read_a k'|²"""
    gram = to_double(gram_Fmm)
    own = gram.diagonal(dim1=1, dim2=2).real
    cross = torch.einsum("fab,fb->fa", gram, pooled.mix.conj())
    energy = _energy(pooled.mix, gram)
    error = own - 2 * (pooled.read.conj() * cross).real + pooled.read.abs().square() * energy[:, None]
    return (error * weight_mF.T).sum()


def block_error(pooled: PooledBlock, moment_mHmH: Tensor, metric_mHH: Tensor) -> Tensor:
    """Σ_a tr(M_a E[(k_a - read_a k')(...)ᵀ])"""
    m, H = pooled.read.shape[:2]
    left = torch.eye(m * H, dtype=torch.float64) - pooled.read.reshape(m * H, H) @ pooled.mix.reshape(H, m * H)
    error = left @ moment_mHmH.reshape(m * H, m * H) @ left.T
    return (blockdiag(metric_mHH) * error).sum()


# --------------------------------------------------------------------------------------------------------------------
# Which heads go together


def neighbour_groups(heads: int, kv_heads: int) -> Groups:
    """Head i joins group i // (heads / kv_heads), the grouping that transformers' repeat_kv undoes."""
    check_divides(heads, kv_heads)
    size = heads // kv_heads
    return tuple(tuple(range(g * size, (g + 1) * size)) for g in range(kv_heads))


def check_divides(heads: int, kv_heads: int, where: str = "") -> None:
    """Refuse a number of KV heads that equal groups cannot have."""
    if kv_heads < 1 or heads % kv_heads:
        divisors = ", ".join(str(d) for d in range(1, heads + 1) if heads % d == 0)
        rest = f"{heads} % {kv_heads} != 0" if kv_heads > 0 else "it must be positive"
        raise RecipeError(f"{where}cannot group {heads} KV heads into {kv_heads} ({rest}). Use one of {divisors}.")


def partitions(heads: int, size: int) -> Iterator[Groups]:
    """Every way to split range(heads) into unordered groups of `size`."""

    def split(left: tuple[int, ...]) -> Iterator[Groups]:
        if not left:
            yield ()
            return
        for rest in itertools.combinations(left[1:], size - 1):
            group = (left[0], *rest)
            for tail in split(tuple(h for h in left if h not in group)):
                yield (group, *tail)

    return split(tuple(range(heads)))


def count_partitions(heads: int, size: int) -> int:
    """Their number: heads! / (size!^n n!) with n = heads / size."""
    n = heads // size
    return math.factorial(heads) // (math.factorial(size) ** n * math.factorial(n))


def search_groups(
    cost: Callable[[tuple[int, ...]], float],
    heads: int,
    kv_heads: int,
    *,
    limit: int = 20_000,
    starts: int = 20,
    seed: int = 0,
) -> Groups:
    """The equal-sized groups with the smallest summed cost.

    Exhaustive where there are at most `limit` partitions, else pair swaps to a local minimum from the neighbour
    grouping and `starts` random ones. Neighbours win ties.
    """
    check_divides(heads, kv_heads)
    size = heads // kv_heads
    cached = cache(cost)

    def total(groups: Groups) -> float:
        return sum(cached(g) for g in groups)

    best: Groups = neighbour_groups(heads, kv_heads)
    best_cost = total(best)
    if count_partitions(heads, size) <= limit:
        for groups in partitions(heads, size):
            value = total(groups)
            if value < best_cost - 1e-12 * abs(best_cost):
                best, best_cost = groups, value
        return best
    rng = random.Random(seed)
    for start in range(starts + 1):
        order = list(range(heads))
        if start:
            rng.shuffle(order)
        trial = [tuple(sorted(order[g * size : (g + 1) * size])) for g in range(kv_heads)]
        improved = True
        while improved:
            improved = False
            for g, h in itertools.combinations(range(kv_heads), 2):
                before = cached(trial[g]) + cached(trial[h])
                for a, b in itertools.product(trial[g], trial[h]):
                    one = tuple(sorted({*trial[g], b} - {a}))
                    two = tuple(sorted({*trial[h], a} - {b}))
                    if cached(one) + cached(two) < before - 1e-12 * abs(before):
                        trial[g], trial[h], improved = one, two, True
                        break
        value = total(tuple(trial))
        if value < best_cost - 1e-12 * abs(best_cost):
            best, best_cost = tuple(sorted(trial)), value
    return best


def rank1_cost(weights: AttentionWeights, moments: Moments) -> Callable[[tuple[int, ...]], float]:
    """Cost of a group: its rank-1 key and value errors, each relative to the layer's total energy of that kind."""
    pairs, nope, value = (f(weights, moments) for f in (rotated_block, unrotated_block, value_block))
    k_total = (pairs.gram.diagonal(dim1=1, dim2=2).real * pairs.metric.T).sum() + _block_energy(nope)
    v_total = _block_energy(value)

    def cost(group: tuple[int, ...]) -> float:
        if len(group) == 1:
            return 0.0
        g = list(group)
        lam = pairs.metric[g]
        lam = lam.maximum(1e-6 * lam.mean())
        root = lam.T.sqrt().to(pairs.gram.dtype)
        scaled = root[:, :, None] * pairs.gram[:, g][:, :, g] * root[:, None, :]
        k_error = _tail(scaled, 1).sum() + _block_tail(nope, g)
        return float(k_error / k_total.clamp_min(1e-300) + _block_tail(value, g) / v_total.clamp_min(1e-300))

    return cost


def _block_energy(block: Block) -> Tensor:
    return torch.stack([(block.metric[a] * block.gram[a, :, a]).sum() for a in range(block.metric.shape[0])]).sum()


def _tail(x: Tensor, rank: int) -> Tensor:
    """Sum of all but the `rank` largest eigenvalues."""
    if x.shape[0] == 0:
        return x.new_zeros((), dtype=torch.float64)
    return torch.linalg.eigvalsh(hermitian(x))[..., : x.shape[-1] - rank].clamp_min(0).sum(-1)


def _block_tail(block: Block, g: list[int]) -> Tensor:
    m, H = len(g), block.metric.shape[-1]
    if H == 0:
        return torch.zeros((), dtype=torch.float64)
    values, vectors = torch.linalg.eigh(block.metric[g])
    root = blockdiag(vectors * values.clamp_min(0).sqrt()[:, None, :])
    return _tail(root.T @ block.gram[g][:, :, g].reshape(m * H, m * H) @ root, H)


# --------------------------------------------------------------------------------------------------------------------
# Conversion


def pool_heads(
    weights: AttentionWeights,
    moments: Moments,
    groups: Groups,
    init: Init = "rank1",
    *,
    renorm: bool = False,
    seed: int = 0,
    post_norm: bool = False,
    query_groups: Groups | None = None,
) -> AttentionWeights:
    """One KV head per group of source KV heads, with the queries of a group next to each other.

    Args:
        groups: source KV heads of each new one; any sizes, each head once.
        init: see the module's `Init`. `key_norm`, `asym` and `qcqa` differ from `mean` in their groups only.
        renorm: after `aligned`, scale keys and values to the mean energy of the heads they replace.
        seed: for `random`.
        post_norm: with a q norm, put what it would undo into `post_norm_scale_NF` (our own runtime applies it).
        query_groups: query heads of each new KV head, where not those of the heads in its group (`key_norm`).

    Returns:
        The weights in the input's dtype. A group of one head keeps its numbers, bit for bit.

    What q/k norms leave of the fold of `rank1` (section 5.2 of the notes): a norm per head with one gain for all heads
    undoes any magnitude, so the queries keep a phase per frequency where the gain of its two channels is equal, else a
    sign. With one gain per head, magnitudes go into the gain. A layer norm keeps neither. The k norm's own rms is
    matched on average. Where the norm spans all heads, fewer of them change its statistics: the gain is rescaled by
    the mean ratio, which is exact only if the rms per token moves in proportion.

    Raises:
        RecipeError: groups that are not a partition of the KV heads, or an unknown init.
        PlanError: query heads would move and cannot (`permutable`).

    With a gated output or a v norm nothing folds into `o`: `rank1` and `aligned` then take the plain mean of values
    under the output metric. Clamped projections (`clip_qkv`) are not modelled.
    """
    if init not in get_args(Init):
        raise RecipeError(f"unknown init {init!r}. Use one of {', '.join(get_args(Init))}.")
    if sorted(a for g in groups for a in g) != list(range(weights.kv_heads)) or not all(groups):
        raise RecipeError(f"groups {groups} must name each of the {weights.kv_heads} KV heads once, none empty.")
    if groups == tuple((a,) for a in range(weights.kv_heads)) and query_groups is None:
        return weights
    if query_groups is None:
        query_groups = tuple(tuple(h for a in g for h in weights.groups[a]) for g in groups)
    order = [h for g in query_groups for h in g]
    if order != list(range(weights.heads)) and not weights.permutable:
        reason = "a gate follows it" if weights.gated_output else "it computes its ALiBi slopes"
        raise PlanError(
            f"groups {groups} move query heads, and this attention fixes their order ({reason}). Use neighbour groups."
        )
    rotated = rotated_block(weights, moments)
    nope, value = unrotated_block(weights, moments), value_block(weights, moments)
    alpha = _Coefficients(init, rotated, nope, value, seed)
    limit = "complex" if post_norm else _foldable(weights)
    H, V, channels = weights.head_dim, weights.value_dim, weights.unrotated()
    first, second = weights.rotated()
    rows = _key_rows(weights, moments)
    new_k, new_v, gains, energies = [], [], [], []
    read_KHH = torch.eye(H, dtype=torch.float64).repeat(weights.kv_heads, 1, 1)
    read_KVV = torch.eye(V, dtype=torch.float64).repeat(weights.kv_heads, 1, 1)
    for group in groups:
        g = list(group)
        m = len(g)
        if m == 1:
            pairs = PooledPairs(*(torch.ones(len(first), 1, dtype=torch.complex128),) * 2)
            block = PooledBlock(torch.eye(len(channels), dtype=torch.float64)[:, None], torch.eye(len(channels))[None])
            values = PooledBlock(torch.eye(V, dtype=torch.float64)[:, None], torch.eye(V)[None])
        elif init in ("rank1", "aligned"):
            pairs = _pool_rotated(rotated, g, init, limit, renorm)
            block = _pool_unrotated(nope, g, init, limit if weights.q_norm is not None else None, renorm)
            values = _pool_values(value, g, init, weights.v_foldable, renorm)
        else:
            k_alpha, v_alpha = alpha(g)
            one = torch.ones(len(first), m, dtype=torch.complex128)
            pairs = PooledPairs(one * k_alpha, one)
            block, values = _scalar_block(k_alpha, len(channels)), _scalar_block(v_alpha, V)
        mix = torch.zeros(H, m, H, dtype=torch.float64)
        read = torch.zeros(m, H, H, dtype=torch.float64)
        _fill(mix.permute(1, 0, 2), pairs.mix, block.mix.permute(1, 0, 2), first, second, channels)
        _fill(read, pairs.read, block.read, first, second, channels)
        gain = None if weights.k_norm_KH is None else _group_gain(weights, g)
        if weights.k_norm is not None:
            normed = _energy_of(mix, moments.k_KHKH, g) / (1.0 if gain is None else gain.square())
            energies.append(normed.mean())
            if weights.k_norm.span == "head" and m > 1:  # what the norm will do anyway: let the queries know
                size = normed.mean().sqrt().clamp_min(1e-150)
                mix = mix / size
                if limit in ("complex", "real"):
                    read = read * size
        w = torch.einsum("iaj,ajd->id", mix, rows[g])
        new_k.append(w if gain is None else w / gain[:, None])
        gains.append(gain)
        new_v.append(torch.einsum("iaj,ajd->id", values.mix, weights.with_bias("v")[g]))
        read_KHH[g], read_KVV[g] = read, values.read.double()
    kv_of = weights.kv_of()
    read_NHH = read_KHH[kv_of]
    read_NVV = read_KVV[kv_of]
    k_KHD, k_bias = _split_bias(torch.stack(new_k), weights, weights.k_bias_KH)
    v_KVD, v_bias = _split_bias(torch.stack(new_v), weights, weights.v_bias_KV)
    result = replace(
        _fold_queries(weights, read_NHH, limit, post_norm),
        k_KHD=k_KHD,
        k_bias_KH=k_bias,
        v_KVD=v_KVD,
        v_bias_KV=v_bias,
        o_DNV=torch.einsum("dnv,nvw->dnw", weights.o_DNV.double(), read_NVV).to(weights.o_DNV.dtype),
    )
    if weights.k_norm is not None and weights.k_norm_KH is not None:
        gain_KH = torch.stack([x for x in gains if x is not None])
        if weights.k_norm.span == "all":
            gain_KH = gain_KH * torch.stack(energies).mean().sqrt()
        result = replace(result, k_norm_KH=gain_KH.to(weights.k_norm_KH.dtype))
        if weights.k_norm_bias_KH is not None:
            shift = torch.stack([weights.k_norm_bias_KH[list(g)].double().mean(0) for g in groups])
            result = replace(result, k_norm_bias_KH=shift.to(weights.k_norm_bias_KH.dtype))
    for a, group in enumerate(groups):  # untouched heads keep their very bits
        if len(group) == 1:
            result.k_KHD[a], result.v_KVD[a] = weights.k_KHD[group[0]], weights.v_KVD[group[0]]
    return permute_queries(replace(result, groups=query_groups))


def permute_queries(weights: AttentionWeights) -> AttentionWeights:
    """Bring the query heads into the order of `groups`, with all that belongs to a head: the function is the same."""
    order = [h for g in weights.groups for h in g]
    if order == list(range(weights.heads)):
        return weights
    starts = list(itertools.accumulate((len(g) for g in weights.groups), initial=0))
    slopes = weights.alibi_slopes

    def take(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[order]

    return replace(
        weights,
        q_NHD=weights.q_NHD[order],
        q_bias_NH=take(weights.q_bias_NH),
        o_DNV=weights.o_DNV[:, order],
        q_norm_NH=take(weights.q_norm_NH),
        q_norm_bias_NH=take(weights.q_norm_bias_NH),
        post_norm_scale_NF=take(weights.post_norm_scale_NF),
        sinks_N=take(weights.sinks_N),
        alibi_slopes=None if slopes is None else tuple(slopes[h] for h in order),
        groups=tuple(tuple(range(a, b)) for a, b in itertools.pairwise(starts)),
    )


def _foldable(weights: AttentionWeights) -> Fold:
    """What of a complex factor per frequency the queries can absorb in the parameters that they have."""
    q, k = weights.q_norm, weights.k_norm
    if q is None and (k is None or not k.after_rotary):
        return "complex"
    if q is not None and q.kind == "layer":
        return "none" if weights.q_norm_shared else "real"
    gains = [weights.q_norm_NH]
    if (q is not None and q.after_rotary) or (k is not None and k.after_rotary):
        gains.append(weights.k_norm_KH)
    first, second = weights.rotated()
    equal = all(x is None or bool((x[:, first] == x[:, second]).all()) for x in gains)
    if q is None:
        return "complex" if equal else "real"
    if weights.q_norm_shared:
        return "phase" if equal else "sign"
    return "complex" if equal else "real"


def _pool_rotated(block: Block, g: list[int], init: Init, limit: Fold, renorm: bool) -> PooledPairs:
    gram = block.gram[:, g][:, :, g]
    if init == "rank1":
        return _native_scale(pool_pairs(gram, block.metric[g], limit), gram, limit)
    fold: Fold = {"complex": "phase", "real": "sign"}.get(limit, limit)  # type: ignore[assignment]
    pooled = pool_pairs(gram, torch.ones_like(block.metric[g]), fold)
    if renorm and pooled.mix.numel():
        own = gram.diagonal(dim1=1, dim2=2).real.mean(-1).sum()
        pooled = pooled._replace(mix=pooled.mix * (own / _energy(pooled.mix, gram).sum().clamp_min(1e-300)).sqrt())
    return pooled


def _native_scale(pooled: PooledPairs, gram: Tensor, limit: Fold) -> PooledPairs:
    """Where a norm fixes a head's size anyway, keep the energy of each frequency at the mean of the heads."""
    if limit in ("complex", "real") or not pooled.mix.numel():
        return pooled
    own = gram.diagonal(dim1=1, dim2=2).real.mean(-1)
    scale = (own / _energy(pooled.mix, gram).clamp_min(1e-300)).sqrt()
    return pooled._replace(mix=pooled.mix * torch.where(own > 0, scale, torch.ones_like(scale))[:, None])


def _pool_unrotated(block: Block, g: list[int], init: Init, limit: Fold | None, renorm: bool) -> PooledBlock:
    gram, metric = block.gram[g][:, :, g], block.metric[g]
    m, H = metric.shape[:2]
    if H == 0:
        return PooledBlock(torch.zeros(0, m, 0, dtype=torch.float64), torch.zeros(m, 0, 0, dtype=torch.float64))
    if limit is None:
        pooled = pool_block(gram, metric, "general" if init == "rank1" else "orthogonal")
        return _renorm(pooled, gram) if renorm and init == "aligned" else pooled
    # Behind a q norm no two channels may mix: each is a pair of its own with a real factor.
    fold: Fold = "real" if limit in ("complex", "real") else "none" if limit == "none" else "sign"
    own = gram.diagonal(dim1=1, dim2=3).permute(2, 0, 1)  # [H, m, m]
    weight = metric.diagonal(dim1=1, dim2=2)
    pairs = pool_pairs(own.to(torch.complex128), weight if init == "rank1" else torch.ones_like(weight), fold)
    pairs = _native_scale(pairs, own.to(torch.complex128), fold)
    return PooledBlock(torch.diag_embed(pairs.mix.real.T).permute(1, 0, 2), torch.diag_embed(pairs.read.real.T))


def _pool_values(block: Block, g: list[int], init: Init, foldable: bool, renorm: bool) -> PooledBlock:
    gram, metric = block.gram[g][:, :, g], block.metric[g]
    if not foldable:
        return pool_block(gram, metric, "none")
    if init == "rank1":
        return pool_block(gram, metric, "general")
    pooled = pool_block(gram, metric, "orthogonal")
    return _renorm(pooled, gram) if renorm else pooled


def _renorm(pooled: PooledBlock, moment: Tensor) -> PooledBlock:
    H, m = pooled.mix.shape[:2]
    mix, total = pooled.mix.reshape(H, m * H), moment.reshape(m * H, m * H)
    scale = (torch.trace(total) / m / torch.trace(mix @ total @ mix.T).clamp_min(1e-300)).sqrt()
    return pooled._replace(mix=pooled.mix * scale)


def _scalar_block(alpha_m: Tensor, dim: int) -> PooledBlock:
    eye = torch.eye(dim, dtype=torch.float64)
    return PooledBlock(alpha_m[None, :, None] * eye[:, None], eye.expand(len(alpha_m), dim, dim))


def _fill(
    out_mHH: Tensor, pairs_Fm: Tensor, block_mHH: Tensor, first: list[int], second: list[int], rest: list[int]
) -> None:
    """Write complex factors as [[a, -b], [b, a]] on channels (first, second), and `block` on the others."""
    real, imag = pairs_Fm.real.T.double(), pairs_Fm.imag.T.double()
    out_mHH[:, first, first], out_mHH[:, second, second] = real, real
    out_mHH[:, first, second], out_mHH[:, second, first] = -imag, imag
    for i, c in enumerate(rest):
        out_mHH[:, c, rest] = block_mHH[:, i].double()


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


def _fold_queries(weights: AttentionWeights, read_NHH: Tensor, limit: Fold, post_norm: bool) -> AttentionWeights:
    """q ← readᵀ q in the parameters that can say so."""
    q, bias = weights.q_NHD, weights.q_bias_NH
    if weights.q_norm is None:
        new_q = read_NHH.mT @ q.double()
        new_bias = None if bias is None else torch.einsum("nij,ni->nj", read_NHH, bias.double()).to(bias.dtype)
        return replace(weights, q_NHD=new_q.to(q.dtype), q_bias_NH=new_bias)
    first, second = weights.rotated()
    if post_norm:
        c = torch.complex(read_NHH[:, first, first], read_NHH[:, second, first]).conj()
        old = weights.post_norm_scale_NF
        return replace(weights, post_norm_scale_NF=c if old is None else c * old)
    if limit == "none":
        return weights
    if limit == "real":
        turn, size = torch.eye(weights.head_dim, dtype=torch.float64).expand_as(read_NHH), read_NHH.diagonal(0, 1, 2)
    else:
        size = read_NHH.square().sum(-1).sqrt()  # of a pair's rows: |c|; of a lone channel: its absolute factor
        turn = read_NHH / size.clamp_min(1e-150)[..., None]
    out = replace(weights, q_NHD=(turn.mT @ q.double()).to(q.dtype))
    if bias is not None:
        out = replace(out, q_bias_NH=torch.einsum("nij,ni->nj", turn, bias.double()).to(bias.dtype))
    if not weights.q_norm_shared and weights.q_norm_NH is not None:
        out = replace(out, q_norm_NH=(weights.q_norm_NH.double() * size).to(weights.q_norm_NH.dtype))
        if weights.q_norm_bias_NH is not None:
            out = replace(out, q_norm_bias_NH=(weights.q_norm_bias_NH.double() * size).to(weights.q_norm_bias_NH.dtype))
    return out


class _Coefficients:
    """The inits that only weigh whole heads: k' = Σ_a α_a k_a, and nothing is folded back."""

    def __init__(self, init: Init, rotated: Block, nope: Block, value: Block, seed: int) -> None:
        self.init, self.rng = init, random.Random(seed)
        self.blocks = (rotated, nope), (value,)

    def __call__(self, g: list[int]) -> tuple[Tensor, Tensor]:
        m = len(g)
        if self.init in ("first", "medoid", "random"):
            pick = 0
            if self.init == "random":
                pick = self.rng.randrange(m)
            elif self.init == "medoid":
                grams = [torch.stack([scalar_gram(b, g)[0] for b in blocks]).sum(0) for blocks in self.blocks]
                pick = medoid(torch.stack([x / torch.trace(x).clamp_min(1e-300) for x in grams]).sum(0))
            alpha = torch.zeros(m, dtype=torch.float64)
            alpha[pick] = 1
            return alpha, alpha
        if self.init in ("weighted", "dha"):
            fit = fit_head_weights if self.init == "weighted" else fuse_heads
            k_alpha, v_alpha = (
                fit(*(torch.stack(x).sum(0) for x in zip(*(scalar_gram(b, g) for b in blocks), strict=True)))
                for blocks in self.blocks
            )
            return k_alpha, v_alpha
        alpha = torch.full((m,), math.sqrt(m) if self.init == "sqrt_g" else 1.0, dtype=torch.float64) / m
        return alpha, alpha


def scalar_gram(block: Block, g: list[int]) -> tuple[Tensor, Tensor]:
    """([m, m], [m, m, m]): E<k_a, k_b> unweighted, and for each head c under the metric of c's queries."""
    if block.gram.is_complex():
        gram = block.gram[:, g][:, :, g].real
        return gram.sum(0), torch.einsum("fab,cf->cab", gram, block.metric[g])
    gram, metric = block.gram[g][:, :, g], block.metric[g]
    return torch.einsum("aibi->ab", gram), torch.einsum("aibj,cij->cab", gram, metric)


def medoid(gram_mm: Tensor) -> int:
    """The head with the smallest summed squared distance to the others."""
    own = gram_mm.diagonal()
    return int((own[:, None] + own[None] - 2 * gram_mm).sum(1).argmin())


def fit_head_weights(_: Tensor, gram_mmm: Tensor) -> Tensor:
    """α of k' = Σ_a α_a k_a that minimises Σ_c E‖k_c - k'‖² under the metric of c's queries, in closed form.

    WGQA (arXiv:2407.10855) learns α by training from 1/m; this is what its scalar form reaches on the layer's own
    error, at conversion. α shrinks towards 0 where the heads disagree.
    """
    total = gram_mmm.sum(0)
    target = torch.stack([gram_mmm[c, :, c] for c in range(len(total))]).sum(0)
    return torch.linalg.solve(damp(total, 1e-9), target)


def fuse_heads(_: Tensor, gram_mmm: Tensor, steps: int = 30, rho: float = 1.0) -> Tensor:
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
    for _step in range(steps * 10):
        shared = (omega + dual).mean(0)
        omega = torch.linalg.solve(gram + rho * torch.eye(m, dtype=torch.float64), rhs + rho * (shared - dual))
        dual = dual + omega - shared
    return omega.mean(0)


# --------------------------------------------------------------------------------------------------------------------
# Refits: closed forms on calibration activations, per layer, after the heads are pooled


def source_queries(parent: AttentionWeights, groups: Groups) -> list[int]:
    """Query heads of the parent in the order that `pool_heads` gives them."""
    return [h for g in groups for a in g for h in parent.groups[a]]


class OutputFit:
    """Streams what the ridge refit of `o` needs; add batches, then `solve`.

    The target is the parent's attention output plus whatever the residual stream has lost in the layers before, so a
    layer also repairs its predecessors: y = o_parent(x_parent) + (h_parent - h_student).
    """

    def __init__(self) -> None:
        self.cross_DP = torch.zeros((), dtype=torch.float64)
        self.moment_PP = torch.zeros((), dtype=torch.float64)
        self.tokens = 0

    def add(self, out_BTNV: Tensor, target_BTD: Tensor, mask_BT: Tensor) -> None:
        """Head outputs of the student (input of `o`), the wanted output without `o`'s bias, True at real tokens."""
        o, y = out_BTNV.flatten(2)[mask_BT], target_BTD[mask_BT]
        self.cross_DP = self.cross_DP + y.double().T @ o.double()
        self.moment_PP = self.moment_PP + o.double().T @ o.double()
        self.tokens += len(o)

    def solve(self, weights: AttentionWeights, ridge: float = 1e-3) -> AttentionWeights:
        """`weights` with `o` refitted; see `refit_output`."""
        return refit_output(weights, self.cross_DP / self.tokens, self.moment_PP / self.tokens, ridge)


def refit_output(
    weights: AttentionWeights, cross_DP: Tensor, moment_PP: Tensor, ridge: float = 1e-3
) -> AttentionWeights:
    """W_o ← (E[y oᵀ] + μ W_o)(E[o oᵀ] + μ I)⁻¹, P = N·Hv: shrinks to the folded W_o, not to 0.

    `ridge` is μ relative to the mean energy of o. Needs many more tokens than N·Hv. A gated output is fitted just as
    well, if o is taken after the gate.
    """
    prior = weights.o_DNV
    new = ridge_regression(cross_DP, moment_PP, ridge, prior.flatten(1))
    return replace(weights, o_DNV=new.reshape(prior.shape).to(prior.dtype))


class QueryFit:
    """Least squares for all rows of W_q, head by head, on the parent's attention logits; add batches, then `solve`.

    Minimises Σ_m Var_{n~p_m}(s'_mn - s_mn) over q' = W_q x, where p is the parent's attention and s its logits: to
    second order the KL between the two attentions. Rank-1 pooling assumes that queries know nothing of the keys' error
    and that all positions count alike; here both are what they are. Linear in W_q, solved by conjugate gradients with
    a Kronecker preconditioner. Keeps H·(H+1) numbers per head and calibration token: a few thousand tokens do.

    Not for attentions with a q norm (not linear).
    """

    def __init__(self, parent: AttentionWeights, student: AttentionWeights, groups: Groups) -> None:
        if student.q_norm is not None or student.softcap is not None:
            raise PlanError("queries behind a norm or a soft cap are not linear in W_q. Leave out the query refit.")
        self.parent, self.student = parent, student
        self.order = source_queries(parent, groups)
        self.x: list[Tensor] = []
        self.metric: list[Tensor] = []
        self.target: list[Tensor] = []

    def add(self, x_parent_BTD: Tensor, x_student_BTD: Tensor, mask_BT: Tensor, stride: int = 1) -> None:
        """Both streams' inputs of the projections; every `stride`-th position serves as a query."""
        parent, student = attend(self.parent, x_parent_BTD), attend(self.student, x_student_BTD)
        time = slice(None, None, stride)
        p, s = parent.probs_BNTT[:, self.order, time], parent.scores_BNTT[:, self.order, time]
        k = student.k_BKTH[:, self.student.kv_of()]
        if self.student.alibi_slopes is not None:
            steps = torch.arange(s.shape[-1])
            s = s - torch.tensor(self.student.alibi_slopes).to(s)[:, None, None] * (steps[None] - steps[time, None])
        p = p / p.sum(-1, keepdim=True).clamp_min(1e-30)  # a sink takes no part in the comparison of keys
        keep = mask_BT[:, time]
        cos, sin = (y[time, None] for y in rotation(self.student, x_student_BTD.shape[1], x_student_BTD))
        metric, target = [], []
        for n in range(self.student.heads):
            mean = p[:, n] @ k[:, n]
            outer = torch.einsum("bsi,bsj->bsij", k[:, n], k[:, n])
            M = (p[:, n] @ outer.flatten(2)).unflatten(-1, outer.shape[-2:]) - mean[..., :, None] * mean[..., None, :]
            centred = p[:, n] * (s[:, n] - (p[:, n] * s[:, n]).sum(-1, keepdim=True))
            # Keys were met where the query stands; W_q x comes before the rotation: turn back by its position.
            M = turn(self.student, turn(self.student, M, cos, -sin).mT, cos, -sin)
            v = turn(self.student, centred @ k[:, n], cos[:, 0], -sin[:, 0])
            metric.append(M[keep] * self.student.scale**2)
            target.append(v[keep] * self.student.scale)
        self.x.append(x_student_BTD[:, time][keep])
        self.metric.append(torch.stack(metric))
        self.target.append(torch.stack(target))

    def solve(self, ridge: float = 1e-3, steps: int = 60) -> AttentionWeights:
        """The student with refitted W_q; `ridge` is relative, and shrinks to the rows that it had."""
        x = torch.cat(self.x).double()
        w = self.student.with_bias("q")
        if self.student.q_bias_NH is not None:
            x = torch.cat([x, torch.ones_like(x[:, :1])], -1)
        else:
            w = w[..., : x.shape[-1]]
        C = x.T @ x / len(x)
        new = []
        for n in range(self.student.heads):
            M = torch.cat([m[n] for m in self.metric]).double()
            v = torch.cat([t[n] for t in self.target]).double()
            mean = hermitian(M.mean(0))
            mu = ridge * float(torch.trace(mean) / len(mean) * torch.trace(C) / len(C))
            new.append(_solve_rows(M, x, v, w[n], mu, damp(mean, 1e-2), damp(C, 1e-2), steps))
        return _with_queries(self.student, torch.stack(new))


def _with_queries(weights: AttentionWeights, w_NHD: Tensor) -> AttentionWeights:
    if weights.q_bias_NH is None:
        return replace(weights, q_NHD=w_NHD.to(weights.q_NHD.dtype))
    bias = w_NHD[..., -1].to(weights.q_bias_NH.dtype)
    return replace(weights, q_NHD=w_NHD[..., :-1].to(weights.q_NHD.dtype), q_bias_NH=bias)


def _solve_rows(
    M_tHH: Tensor, x_tD: Tensor, v_tH: Tensor, start_HD: Tensor, mu: float, left: Tensor, right: Tensor, steps: int
) -> Tensor:
    """Conjugate gradients for Σ_t M_t W x_t x_tᵀ / T + μ (W - W_0) = Σ_t v_t x_tᵀ / T."""
    T = len(x_tD)
    L, R = torch.linalg.cholesky(left), torch.linalg.cholesky(right)

    def apply(W: Tensor) -> Tensor:
        return torch.einsum("tij,tj->ti", M_tHH, x_tD @ W.T).T @ x_tD / T + mu * W

    def precondition(r: Tensor) -> Tensor:
        return torch.cholesky_solve(torch.cholesky_solve(r, L).T, R).T

    W = start_HD.clone()
    r = v_tH.T @ x_tD / T + mu * start_HD - apply(W)
    z = precondition(r)
    p, rz, first = z, (r * z).sum(), (r * z).sum()
    for _ in range(steps):
        if rz <= 1e-10 * first or rz <= 0:
            break
        Ap = apply(p)
        step = rz / (p * Ap).sum()
        W, r = W + step * p, r - step * Ap
        z = precondition(r)
        rz, old = (r * z).sum(), rz
        p = z + rz / old * p
    return W


# --------------------------------------------------------------------------------------------------------------------
# Groups of the named methods


def cluster_heads(weights: AttentionWeights, moments: Moments, kv_heads: int) -> Groups:
    """AsymGQA (arXiv:2406.14963): heads with similar activations together, sizes free.

    Average-link clustering on the cosine between keys plus that between values, as they are (no alignment).
    """
    blocks = ((rotated_block(weights, moments), unrotated_block(weights, moments)), (value_block(weights, moments),))
    everyone = list(range(weights.kv_heads))
    likeness = torch.zeros(len(everyone), len(everyone), dtype=torch.float64)
    for kind in blocks:
        gram = torch.stack([scalar_gram(b, everyone)[0] for b in kind]).sum(0)
        size = gram.diagonal().clamp_min(1e-300).sqrt()
        likeness += gram / size[:, None] / size
    clusters = [[a] for a in everyone]
    while len(clusters) > kv_heads:
        one, two = max(
            itertools.combinations(range(len(clusters)), 2),
            key=lambda ab: float(likeness[clusters[ab[0]]][:, clusters[ab[1]]].mean()),
        )
        clusters[one] = sorted(clusters[one] + clusters.pop(two))
    return tuple(sorted(tuple(c) for c in clusters))


def evolve_groups(
    weights: AttentionWeights, kv_heads: int, *, population: int = 100, generations: int = 60, seed: int = 0
) -> Groups:
    """QCQA (arXiv:2406.10247): a genetic search over group ids, sizes free, for the least Σ_gΣ_a‖W_a - mean_g‖² (K, V).

    The number of groups is fixed by the plan here, so the second objective of the source (cache size) drops out.
    Crossover .9, mutation 1/K, the best tenth survives.
    """
    K = weights.kv_heads
    rows = torch.cat([weights.with_bias("k").flatten(1), weights.with_bias("v").flatten(1)], 1)
    gram = rows @ rows.T
    rng = random.Random(seed)

    @cache
    def cost(ids: tuple[int, ...]) -> float:
        total = float(gram.trace())
        for g in range(kv_heads):
            members = [a for a in range(K) if ids[a] == g]
            if not members:
                return math.inf
            total -= float(gram[members][:, members].sum()) / len(members)
        return total

    people = [tuple(rng.randrange(kv_heads) for _ in range(K)) for _ in range(population)]
    people[0] = tuple(a * kv_heads // K for a in range(K))
    for _ in range(generations):
        people.sort(key=cost)
        children = people[: max(1, population // 10)]
        while len(children) < population:
            mother, father = (min(rng.sample(people, 3), key=cost) for _ in range(2))
            child = [m if rng.random() < 0.5 else f for m, f in zip(mother, father, strict=True)]
            child = child if rng.random() < 0.9 else list(mother)
            children.append(tuple(rng.randrange(kv_heads) if rng.random() < 1 / K else c for c in child))
        people = children
    best = min(people, key=cost)
    return tuple(sorted(tuple(a for a in range(K) if best[a] == g) for g in range(kv_heads)))


def allocate_queries(key_norms: Sequence[float], heads: int) -> Groups:
    """KDGQA: query heads per KV head in proportion to the keys' norm; each at least one, largest remainders first.

    The published min-max form gives the smallest group no query at all, and is 0/0 where the norms are equal.
    """
    K = len(key_norms)
    if heads < K:
        raise RecipeError(f"{heads} query heads cannot give each of {K} KV heads one.")
    total = sum(key_norms)
    share = [heads * x / total if total > 0 else heads / K for x in key_norms]
    counts = [max(1, math.floor(x)) for x in share]
    while sum(counts) < heads:
        counts[max(range(K), key=lambda a: (share[a] - counts[a], -a))] += 1
    while sum(counts) > heads:
        counts[max((a for a in range(K) if counts[a] > 1), key=lambda a: (counts[a] - share[a], a))] -= 1
    ends = list(itertools.accumulate(counts, initial=0))
    return tuple(tuple(range(a, b)) for a, b in itertools.pairwise(ends))


# --------------------------------------------------------------------------------------------------------------------
# The rewriter


class Pooled(NamedTuple):
    """A rewritten attention and where its heads came from."""

    weights: AttentionWeights
    groups: Groups
    """Source KV heads of each new one: for refits, and for the record."""


@dataclass(frozen=True, kw_only=True)
class GroupHeads:
    """Pool the KV heads of one layer to `kv_heads`, then repair what closed forms can.

    Per layer: `needs` says what to stream; `rewrite(weights, moments)` pools; `refit(parent, pooled, activations)`
    solves for W_q and W_o. After the last layer: `fit_gains` for the whole model.
    """

    kv_heads: int
    init: Init = "rank1"
    grouping: Grouping = "search"
    """Ignored by `asym`, `qcqa` (their own groups, unequal) unless `equal_groups`."""
    groups: Groups | None = None
    """Explicit groups win over everything."""
    equal_groups: bool = False
    renorm: bool = False
    seed: int = 0
    post_norm: bool = False
    query_ridge: float | None = 1e-3
    """Damping of the query refit; None leaves W_q as pooled."""
    output_ridge: float | None = 1e-3
    query_tokens: int = 10_000
    """Calibration tokens for the query refit: it keeps N·H·(H+1) numbers for each."""

    def needs(self, weights: AttentionWeights) -> Literal["input", "heads"]:
        """`input`: E[x~ x~ᵀ] for `Moments.of_weights`; `heads`: stream `Moments` themselves, behind the q/k norms."""
        return "input" if weights.q_norm is None and weights.k_norm is None else "heads"

    def choose_groups(self, weights: AttentionWeights, moments: Moments) -> Groups:
        """The source KV heads of each new one."""
        if self.groups is not None:
            return self.groups
        if self.init in ("asym", "qcqa") and not self.equal_groups and weights.permutable:
            if self.init == "asym":
                return cluster_heads(weights, moments, self.kv_heads)
            return evolve_groups(weights, self.kv_heads, seed=self.seed)
        check_divides(weights.kv_heads, self.kv_heads)
        if self.grouping == "neighbour" or self.init == "key_norm" or not weights.permutable:
            return neighbour_groups(weights.kv_heads, self.kv_heads)
        return search_groups(rank1_cost(weights, moments), weights.kv_heads, self.kv_heads, seed=self.seed)

    def rewrite(self, weights: AttentionWeights, moments: Moments | None = None) -> Pooled:
        """The pooled attention, before refits; without moments the input counts as white (data-free)."""
        moments = Moments.of_weights(weights) if moments is None else moments
        groups = self.choose_groups(weights, moments)
        queries = None
        if self.init == "key_norm" and not self.equal_groups and len(groups) < weights.kv_heads:
            norms = to_double(moments.k_KHKH).diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1).sum(-1).sqrt()
            queries = allocate_queries([float(norms[list(g)].mean()) for g in groups], weights.heads)
        pooled = pool_heads(
            weights,
            moments,
            groups,
            self.init,
            renorm=self.renorm,
            seed=self.seed,
            post_norm=self.post_norm,
            query_groups=queries,
        )
        return Pooled(pooled, groups)

    def refit(
        self, parent: AttentionWeights, pooled: Pooled, activations: Callable[[], Iterable[Activations]]
    ) -> AttentionWeights:
        """W_q by the parent's logits, then W_o by its output; two passes over `activations()`.

        Leaves a layer alone that pooling left alone, query rows behind a norm or a soft cap, and W_o of a gated output.
        """
        student = pooled.weights
        if student is parent:
            return parent
        linear = student.q_norm is None and student.softcap is None and self.init != "key_norm"
        if self.query_ridge is not None and linear:
            fit = QueryFit(parent, student, pooled.groups)
            total = sum(int(a.mask_BT.sum()) for a in activations())
            for a in activations():
                fit.add(a.x_parent_BTD, a.x_student_BTD, a.mask_BT, stride=max(1, total // self.query_tokens))
            student = fit.solve(self.query_ridge)
        if self.output_ridge is not None and not student.gated_output:
            output = OutputFit()
            for a in activations():
                y = torch.einsum("btnv,dnv->btd", attend(parent, a.x_parent_BTD).out_BTNV, parent.o_DNV)
                output.add(attend(student, a.x_student_BTD).out_BTNV, y + a.gap_BTD, a.mask_BT)
            student = output.solve(student, self.output_ridge)
        return student


def fit_gains(
    student: torch.nn.Module,
    parent: torch.nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    sites: Sequence[AttentionSite],
    *,
    steps: int = 60,
    lr: float = 0.02,
) -> list[float]:
    """Learn one factor on W_q and one on W_o per query head by KL(parent ‖ student), and fold them. In place.

    2N numbers per layer, Adam, all weights frozen: the remedy for logits that least squares shrank.

    Args:
        batches: keyword arguments of both models' forward (`input_ids`, and `attention_mask` where there is padding).
        sites: the converted attentions, as they are in `student`. Behind a q norm only W_o gets a factor: the norm
            would undo the other.

    Returns:
        The loss of each step, in nats per token.
    """
    parameters = {name: p.detach() for name, p in student.named_parameters()}
    device = next(iter(parameters.values())).device
    gains = [(torch.ones(s.heads, device=device), torch.ones(s.heads, device=device)) for s in sites]
    learned = [g for site, (q, o) in zip(sites, gains, strict=True) for g in ((o,) if site.q_norm else (q, o))]
    for g in learned:
        g.requires_grad_()

    def scaled() -> dict[str, Tensor]:
        out = dict(parameters)
        for site, (q, o) in zip(sites, gains, strict=True):
            if site.q_norm is None:
                for name in (site.q.weight, site.q.bias):
                    if name is not None:
                        axis = -1 if site.q.transposed else 0
                        out[name] = _scale_heads(out[name], site.q.head_rows, site.head_dim, q, axis)
            axis = 0 if site.o.transposed else -1
            out[site.o.weight] = _scale_heads(out[site.o.weight], site.o.head_rows, site.value_dim, o, axis)
        return out

    def logits(model: Callable[..., Any], batch: Mapping[str, Tensor]) -> Tensor:
        found = model(**batch, use_cache=False).logits.float().log_softmax(-1)
        mask = batch.get("attention_mask")
        return found.flatten(0, 1) if mask is None else found[mask.bool()]

    optimizer = torch.optim.Adam(learned, lr=lr, betas=(0.9, 0.95))
    losses: list[float] = []
    for step in range(steps):
        batch = batches[step % len(batches)]
        with torch.no_grad():
            target = logits(parent, batch)
        weights = scaled()
        found = logits(lambda _w=weights, **kw: torch.func.functional_call(student, _w, (), kw), batch)
        loss = (target.exp() * (target - found)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.step()
        losses.append(loss.item())
    with torch.no_grad():
        own = dict(student.named_parameters())
        for name, w in scaled().items():
            if w is not parameters[name]:
                own[name].copy_(w)
    return losses


def _scale_heads(w: Tensor, rows: Sequence[int], dim: int, gain_N: Tensor, axis: int) -> Tensor:
    """`w` with the rows (or columns) of head h times gain_N[h]; what belongs to no head stays."""
    axis = axis % w.ndim
    index = torch.cat([torch.arange(r, r + dim) for r in rows]).to(w.device)
    factor = torch.ones(w.shape[axis], device=w.device).index_put((index,), gain_N.repeat_interleave(dim))
    shape = [-1 if a == axis else 1 for a in range(w.ndim)]
    return w * factor.reshape(shape).to(w.dtype)
