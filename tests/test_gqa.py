"""Pooling KV heads: exact where theory says so, never worse than the plainer init, refusals where a fold cannot be."""

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from layerwise import LoneVisit

from surgery.attention.forward import attend
from surgery.attention.linalg import blockdiag, to_double
from surgery.attention.weights import AttentionWeights, read_attention, write_attention
from surgery.errors import PlanError, RecipeError
from surgery.rewriters.common.gains import descend_gains
from surgery.rewriters.common.moments import Moments, rotated_block, scalar_gram, value_block
from surgery.rewriters.gqa import Gqa, GqaStep
from surgery.rewriters.heads import Init
from surgery.rewriters.heads.folding import permute_queries
from surgery.rewriters.heads.grouping import (
    Groups,
    allocate_queries,
    cluster_heads,
    evolve_groups,
    neighbour_groups,
    partitions,
    rank1_cost,
    search_groups,
)
from surgery.rewriters.heads.head_weights import fit_head_weights, fuse_heads
from surgery.rewriters.heads.pooling import pool_heads, source_queries
from surgery.rewriters.heads.shared_head import PooledBlock, PooledPairs, pool_block, pool_pairs
from surgery.runtime.layout import AttentionSite, HeadNorm, Projection, Rotary

D, H = 24, 8
INITS = get_args(Init)


def pairs_error(pooled: PooledPairs, gram_Fmm: torch.Tensor, weight_mF: torch.Tensor) -> torch.Tensor:
    """Σ_j Σ_a λ_a E|k_a - read_a k'|²"""
    gram = to_double(gram_Fmm)
    own = gram.diagonal(dim1=1, dim2=2).real
    cross = torch.einsum("fab,fb->fa", gram, pooled.mix.conj())
    energy = torch.einsum("fa,fab,fb->f", pooled.mix, gram, pooled.mix.conj()).real
    error = own - 2 * (pooled.read.conj() * cross).real + pooled.read.abs().square() * energy[:, None]
    return (error * weight_mF.T).sum()


def block_error(pooled: PooledBlock, moment_mHmH: torch.Tensor, metric_mHH: torch.Tensor) -> torch.Tensor:
    """Σ_a tr(M_a E[(k_a - read_a k')(...)ᵀ])"""
    m, H = pooled.read.shape[:2]
    left = torch.eye(m * H, dtype=torch.float64) - pooled.read.reshape(m * H, H) @ pooled.mix.reshape(H, m * H)
    error = left @ moment_mHmH.reshape(m * H, m * H) @ left.T
    return (blockdiag(metric_mHH) * error).sum()


def make(
    heads: int = 8, kv_heads: int = 4, rotary: str | None = "full", bias: bool = False, value_dim: int = H, **more
):
    """Random attention; `rotary`: full, partial (half of the channels, from 2), or None."""
    gen = torch.Generator().manual_seed(heads * 100 + kv_heads)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64) / shape[-1] ** 0.5

    dims = {"full": H, "partial": H // 2, None: 0}[rotary]
    inv = tuple((10.0 ** -torch.arange(dims // 2, dtype=torch.float64)).tolist())
    group = heads // kv_heads
    return AttentionWeights(
        q_NHD=rand(heads, H, D) * 3,
        k_KHD=rand(kv_heads, H, D) * 3,
        v_KVD=rand(kv_heads, value_dim, D),
        o_DNV=rand(D, heads, value_dim),
        q_bias_NH=rand(heads, H) if bias else None,
        k_bias_KH=rand(kv_heads, H) if bias else None,
        v_bias_KV=rand(kv_heads, value_dim) if bias else None,
        groups=tuple(tuple(range(a * group, (a + 1) * group)) for a in range(kv_heads)),
        rotary=Rotary(dims=dims, inv_freq=inv, start=2 if rotary == "partial" else 0) if dims else None,
        scale=H**-0.5,
        **more,
    )


def output(w: AttentionWeights, x: torch.Tensor) -> torch.Tensor:
    y = torch.einsum("btnv,dnv->btd", attend(w, x).out_BTNV, w.o_DNV)
    return y if w.o_bias_D is None else y + w.o_bias_D


def inputs(batch: int = 2, tokens: int = 12) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, D, generator=gen, dtype=torch.float64) * torch.linspace(0.3, 2, D)


def cov_of(w: AttentionWeights, x: torch.Tensor) -> torch.Tensor:
    x = x.flatten(0, 1)
    x = torch.cat([x, torch.ones_like(x[:, :1])], -1) if w.has_bias else x
    return x.T @ x / len(x)


def merge(
    w: AttentionWeights, moments: Moments | None = None, kv_heads: int = 2, **options
) -> tuple[AttentionWeights, Groups]:
    """The step without refits: pooled weights and the source KV heads of each new one."""
    rewriter = Gqa(GqaStep(kv_heads=kv_heads, **options))
    moments = moments or Moments.of_weights(w)
    groups = rewriter.choose_groups(w, moments, kv_heads)
    return rewriter.pool(w, moments, groups), groups


def gauge_copies(w: AttentionWeights, unit: bool = False, pairing=((0, 2), (1, 3))) -> AttentionWeights:
    """Overwrite the second KV head of each pair by an exact gauge copy of the first; its queries and o stay free."""
    gen = torch.Generator().manual_seed(5)
    k, v = w.k_KHD.clone(), w.v_KVD.clone()
    kb = None if w.k_bias_KH is None else w.k_bias_KH.clone()
    vb = None if w.v_bias_KV is None else w.v_bias_KV.clone()
    first, second = w.rotated()
    rest = w.unrotated()
    for a, b in pairing:
        P = torch.zeros(H, H, dtype=torch.float64)
        z = torch.randn(len(first), generator=gen, dtype=torch.complex128)
        z = z / z.abs() if unit else z
        P[first, first], P[second, second], P[first, second], P[second, first] = z.real, z.real, -z.imag, z.imag
        free = torch.randn(len(rest), len(rest), generator=gen, dtype=torch.float64)
        P[torch.tensor(rest, dtype=torch.long)[:, None], torch.tensor(rest, dtype=torch.long)] = (
            torch.linalg.qr(free)[0] if unit and len(rest) else free
        )
        R = torch.randn(w.value_dim, w.value_dim, generator=gen, dtype=torch.float64)
        R = torch.linalg.qr(R)[0] if unit else R
        k[b], v[b] = P @ k[a], R @ v[a]
        if kb is not None and vb is not None:
            kb[b], vb[b] = P @ kb[a], R @ vb[a]
    return replace(w, k_KHD=k, v_KVD=v, k_bias_KH=kb, v_bias_KV=vb)


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("init", INITS)
def test_one_head_per_group_is_bit_equal(init):
    w = make()
    assert pool_heads(w, Moments.of_weights(w), neighbour_groups(4, 4), init) is w


def test_lone_heads_keep_their_bits_beside_pooled_ones():
    w = make(rotary="partial")
    out = pool_heads(w, Moments.of_weights(w), ((0, 3), (1,), (2,)))
    assert torch.equal(out.k_KHD[1:], w.k_KHD[1:3])
    assert torch.equal(out.v_KVD[1:], w.v_KVD[1:3])
    assert torch.equal(out.q_NHD[4:6], w.q_NHD[2:4])


@pytest.mark.parametrize("heads", [4, 8])
@pytest.mark.parametrize("rotary", ["full", "partial", None])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("calibrated", [False, True])
def test_rank1_with_search_restores_gauge_copies(heads, rotary, bias, calibrated):
    w, x = gauge_copies(make(heads, 4, rotary, bias, value_dim=6)), inputs()
    moments = Moments.of_weights(w, cov_of(w, x) if calibrated else None)
    pooled, groups = merge(w, moments)
    assert groups == ((0, 2), (1, 3))
    assert pooled.groups == tuple(tuple(range(g * heads // 2, (g + 1) * heads // 2)) for g in range(2))
    torch.testing.assert_close(output(pooled, x), output(w, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("rotary", ["full", "partial", None])
def test_aligned_restores_norm_preserving_copies_only_and_mean_none(rotary):
    x = inputs()
    for unit in (True, False):
        w = gauge_copies(make(rotary=rotary), unit=unit)
        moments = Moments.of_weights(w, cov_of(w, x))
        error = {
            init: float((output(pool_heads(w, moments, ((0, 2), (1, 3)), init), x) - output(w, x)).abs().max())
            for init in ("mean", "aligned", "rank1")
        }
        assert error["rank1"] < 1e-4
        assert (error["aligned"] < 1e-4) == unit
        assert error["mean"] > 1e-2


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("bias", [False, True])
def test_equal_heads_pool_to_themselves(init, bias):
    w, x = make(bias=bias), inputs()
    w = replace(w, k_KHD=w.k_KHD[[0, 0, 1, 1]], v_KVD=w.v_KVD[[0, 0, 1, 1]])
    if bias:
        w = replace(w, k_bias_KH=w.k_bias_KH[[0, 0, 1, 1]], v_bias_KV=w.v_bias_KV[[0, 0, 1, 1]])
    if init == "sqrt_g":
        pytest.skip("sqrt_g keeps the norm of uncorrelated heads, not of equal ones")
    out = pool_heads(w, Moments.of_weights(w, cov_of(w, x)), ((0, 1), (2, 3)), init)
    torch.testing.assert_close(output(out, x), output(w, x), atol=1e-4, rtol=1e-4)


def test_permuting_queries_changes_nothing():
    x = inputs()
    w = make(alibi_slopes=tuple(0.5**h for h in range(8)), sinks_N=torch.randn(8, dtype=torch.float64), rotary=None)
    shuffled = replace(
        w,
        k_KHD=w.k_KHD[[2, 0, 3, 1]],
        v_KVD=w.v_KVD[[2, 0, 3, 1]],
        groups=tuple(w.groups[a] for a in (2, 0, 3, 1)),
    )
    moved = permute_queries(shuffled)
    assert moved.groups == w.groups
    assert moved.alibi_slopes[0] == w.alibi_slopes[4]
    torch.testing.assert_close(output(moved, x), output(w, x))


@pytest.mark.parametrize("init", INITS)
def test_every_init_keeps_dtype_shape_and_finiteness(init):
    w = make(bias=True, rotary="partial")
    w = replace(w, **{n: getattr(w, n).bfloat16() for n in ("q_NHD", "k_KHD", "v_KVD", "o_DNV", "k_bias_KH")})
    out, _ = merge(w, init=init, equal_groups=False)
    assert out.kv_heads == 2
    for name in ("q_NHD", "k_KHD", "v_KVD", "o_DNV", "k_bias_KH"):
        assert getattr(out, name).dtype == torch.bfloat16
        assert getattr(out, name).isfinite().all()
    assert sorted(h for g in out.groups for h in g) == list(range(8))


# ------------------------------------------------------------------------------------------------- optimality


@pytest.mark.parametrize("kv_heads", [2, 1])
def test_rank1_is_no_worse_than_any_other_fold(kv_heads):
    w, x = make(), inputs()
    moments = Moments.of_weights(w, cov_of(w, x))
    rotated, value = rotated_block(w, moments), value_block(w, moments)
    for group in neighbour_groups(4, kv_heads):
        g = list(group)
        gram, lam = rotated.gram[:, g][:, :, g], rotated.metric[g]
        errors = {f: float(pairs_error(pool_pairs(gram, lam, f), gram, lam)) for f in ("phase", "real", "sign", "none")}
        errors["aligned"] = float(pairs_error(pool_pairs(gram, torch.ones_like(lam), "phase"), gram, lam))
        best = float(pairs_error(pool_pairs(gram, lam), gram, lam))
        assert all(best <= e * (1 + 1e-9) for e in errors.values())
        moment, metric = value.gram[g][:, :, g], value.metric[g]
        v = {
            f: float(block_error(pool_block(moment, metric, f), moment, metric))
            for f in ("general", "orthogonal", "none")
        }
        assert v["general"] <= min(v.values()) * (1 + 1e-4)


def test_group_cost_is_the_relative_error_of_rank1():
    w, x = make(rotary="full"), inputs()
    moments = Moments.of_weights(w, cov_of(w, x))
    rotated, value = rotated_block(w, moments), value_block(w, moments)
    g = [0, 2]
    gram, lam, moment, metric = rotated.gram[:, g][:, :, g], rotated.metric[g], value.gram[g][:, :, g], value.metric[g]
    k_total = (rotated.gram.diagonal(dim1=1, dim2=2).real * rotated.metric.T).sum()
    v_total = sum((value.metric[a] * value.gram[a, :, a]).sum() for a in range(4))
    want = pairs_error(pool_pairs(gram, lam), gram, lam) / k_total
    want = want + block_error(pool_block(moment, metric), moment, metric) / v_total
    assert rank1_cost(w, moments)((0, 2)) == pytest.approx(float(want), rel=1e-4)


def test_moments_are_those_of_the_projections_outputs():
    w, x = make(bias=True), inputs()
    moments = Moments.of_weights(w, cov_of(w, x))
    k = (torch.einsum("btd,khd->btkh", x, w.k_KHD) + w.k_bias_KH).flatten(0, 1).flatten(1)
    torch.testing.assert_close(moments.k_KHKH.reshape(4 * H, 4 * H), k.T @ k / len(k))
    with pytest.raises(ValueError, match="bias coordinate"):
        Moments.of_weights(w, torch.eye(D))


def test_fused_heads_reach_the_closed_form():
    w, x = make(), inputs()
    moments = Moments.of_weights(w, cov_of(w, x))
    _, gram = scalar_gram(value_block(w, moments), [0, 1, 2])
    torch.testing.assert_close(fuse_heads(gram), fit_head_weights(gram), atol=1e-5, rtol=1e-5)


# ------------------------------------------------------------------------------------------------- groups


def test_search_is_exhaustive_where_affordable():
    cost = {g: torch.rand((), generator=torch.Generator().manual_seed(hash(g) % 2**31)).item()
            for part in partitions(8, 2) for g in part}  # fmt: skip
    best = min(partitions(8, 2), key=lambda gs: sum(cost[g] for g in gs))
    assert search_groups(cost.__getitem__, 8, 4) == best
    assert len(list(partitions(8, 2))) == 105


def test_pair_swaps_find_planted_groups():
    gen = torch.Generator().manual_seed(0)
    order = torch.randperm(16, generator=gen).tolist()
    of = {h: i // 2 for i, h in enumerate(order)}

    def cost(g: tuple[int, ...]) -> float:
        return float(len({of[h] for h in g}) - 1)

    found = search_groups(cost, 16, 8)
    assert sum(cost(g) for g in found) == 0


def test_groups_that_do_not_divide_are_refused_with_the_divisors():
    with pytest.raises(RecipeError, match=r"cannot group 4 KV heads into 3 \(4 % 3 != 0\). Use one of 1, 2, 4."):
        merge(make(), kv_heads=3)
    with pytest.raises(RecipeError, match="must name each"):
        pool_heads(make(), Moments.of_weights(make()), ((0, 1), (2,)))
    with pytest.raises(RecipeError, match="unknown init"):
        pool_heads(make(), Moments.of_weights(make()), ((0, 1), (2, 3)), "rank-1")


@pytest.mark.parametrize(
    ("norms", "heads", "sizes"),
    [
        ([1.0, 1.0], 8, [4, 4]),  # equal norms: the published min-max form is 0/0
        ([0.0, 1.0], 8, [1, 7]),  # the smallest group still gets a query
        ([0.0, 0.0, 0.0], 3, [1, 1, 1]),
        ([3.0, 1.0], 8, [6, 2]),
        ([1.0, 1.0, 1.0], 8, [3, 3, 2]),
        ([100.0, 0.1, 0.1], 4, [2, 1, 1]),
    ],
)
def test_query_allocation_is_proportional_and_never_zero(norms, heads, sizes):
    groups = allocate_queries(norms, heads)
    assert [len(g) for g in groups] == sizes
    assert [h for g in groups for h in g] == list(range(heads))


def test_genetic_search_charges_every_group():
    """A known reproduction multiplied by the group's index, so that group 0 cost nothing."""
    w = make(8, 8)
    twins = [0, 1, 2, 3, 0, 1, 2, 3]
    w = replace(w, k_KHD=w.k_KHD[twins], v_KVD=w.v_KVD[twins])
    assert evolve_groups(w, 4) == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert cluster_heads(w, Moments.of_weights(w), 4) == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_source_groups_count_kv_heads_not_query_heads():
    """Swapped counts are invisible on MHA: here 8 query heads read 4 KV heads."""
    out, _ = merge(make(8, 4), kv_heads=1, grouping="neighbour")
    assert (out.heads, out.kv_heads, out.groups) == (8, 1, (tuple(range(8)),))


def test_fixed_query_order_allows_neighbours_only():
    w = make(permutable=False, rotary=None, alibi_slopes=tuple(0.5**h for h in range(8)))
    assert merge(w)[1] == ((0, 1), (2, 3))
    with pytest.raises(PlanError, match="fixes their order"):
        pool_heads(w, Moments.of_weights(w), ((0, 2), (1, 3)))


def test_gated_outputs_are_left_unfolded():
    w = make(gated_output=True, permutable=False)
    for init in ("rank1", "aligned"):
        assert torch.equal(pool_heads(w, Moments.of_weights(w), ((0, 1), (2, 3)), init).o_DNV, w.o_DNV)


# ------------------------------------------------------------------------------------------------- norms


def normed(kind: str = "rms", span: str = "head", equal_pairs: bool = True, per_head: bool = False) -> AttentionWeights:
    w = make()
    gen = torch.Generator().manual_seed(3)
    gains = []
    for heads in (8, 4):
        gain = torch.rand(heads if per_head else 1, H, generator=gen, dtype=torch.float64) + 0.5
        if equal_pairs:
            gain = torch.cat([gain[:, : H // 2]] * 2, -1)
        gains.append(gain.expand(heads, -1).contiguous())
    norm = HeadNorm(kind=kind, span=span, eps=1e-12, weight="g")
    return replace(
        w,
        q_norm=norm,
        k_norm=norm,
        q_norm_NH=gains[0],
        k_norm_KH=gains[1],
        q_norm_shared=not per_head,
        k_norm_shared=not per_head,
    )


def streamed(w: AttentionWeights, x: torch.Tensor) -> Moments:
    """The normed moments, as the calibration would stream them (no rotation: all tokens at position 0)."""
    flat = x.flatten(0, 1)[:, None]
    seen = attend(w, flat)
    q, k = seen.q_BNTH[:, :, 0], seen.k_BKTH[:, :, 0]
    raw = torch.einsum("td,khd->tkh", flat[:, 0], w.k_KHD)
    v = torch.einsum("td,khd->tkh", flat[:, 0], w.v_KVD)
    T = len(flat)
    return Moments(
        k_KHKH=torch.einsum("tai,tbj->aibj", k, k) / T,
        q_NHH=torch.einsum("tni,tnj->nij", q, q) / T,
        v_KVKV=torch.einsum("tai,tbj->aibj", v, v) / T,
        k_rms_K=raw.square().mean((0, 2)).sqrt(),
    )


@pytest.mark.parametrize("per_head", [False, True])
def test_phases_fold_through_an_rms_norm_with_equal_gain_pairs(per_head):
    w, x = gauge_copies(normed(per_head=per_head), unit=True), inputs()
    if per_head:  # a copy in the score needs equal gains
        w = replace(w, k_norm_KH=w.k_norm_KH[[0, 1, 0, 1]])
    out = pool_heads(w, streamed(w, x), ((0, 2), (1, 3)))
    torch.testing.assert_close(output(out, x), output(w, x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("kind", "span"), [("rms", "head"), ("layer", "head"), ("rms", "all")])
@pytest.mark.parametrize("per_head", [False, True])
def test_norms_that_cannot_fold_stay_finite_and_in_scale(kind, span, per_head):
    x = inputs()
    w = normed(kind, span, equal_pairs=False, per_head=per_head)
    moments = streamed(w, x)
    out = pool_heads(w, moments, ((0, 1), (2, 3)))
    assert out.k_norm_KH.isfinite().all()
    if span == "head" and not per_head:
        assert (out.k_norm_KH == out.k_norm_KH[:1]).all()
    before, after = (attend(y, x).k_BKTH.square().mean() for y in (w, out))
    assert 0.3 < float(after / before) < 1.5


def test_a_norm_over_all_heads_keeps_the_energy_of_keys():
    w, x = normed("rms", "all", equal_pairs=False, per_head=True), inputs()
    out = pool_heads(w, streamed(w, x), ((0, 1), (2, 3)))
    a, b = (attend(y, x).k_BKTH.square().mean() for y in (w, out))
    assert float(b / a) == pytest.approx(1, rel=0.15)


# ------------------------------------------------------------------------------------------------- read and write


def site(style: str, heads: int = 8, kv_heads: int = 4, rotary: Rotary | None = None, **more) -> AttentionSite:
    def rows(n: int, start: int = 0, step: int = H) -> tuple[int, ...]:
        return tuple(start + i * step for i in range(n))

    if style == "separate":
        q, k, v = (Projection(weight=f"{n}.w", bias=f"{n}.b", head_rows=rows(m)) for n, m in
                   (("q", heads), ("k", kv_heads), ("v", kv_heads)))  # fmt: skip
    elif style == "fused":
        starts = (0, heads * H, (heads + kv_heads) * H)
        q, k, v = (Projection(weight="qkv.w", bias="qkv.b", head_rows=rows(m, s)) for m, s in
                   zip((heads, kv_heads, kv_heads), starts, strict=True))  # fmt: skip
    elif style == "transposed":
        starts = (0, heads * H, (heads + kv_heads) * H)
        q, k, v = (Projection(weight="qkv.w", bias="qkv.b", head_rows=rows(m, s), transposed=True) for m, s in
                   zip((heads, kv_heads, kv_heads), starts, strict=True))  # fmt: skip
    else:  # per head: [N, 3, H, D] seen as rows
        q, k, v = (Projection(weight="qkv.w", bias="qkv.b", head_rows=rows(heads, i * H, 3 * H)) for i in range(3))
        kv_heads = heads
    return AttentionSite(
        layer=0, module="attn", hidden_size=D, heads=heads, kv_heads=kv_heads, head_dim=H, value_dim=H, q=q, k=k, v=v,
        o=Projection(weight="o.w", bias="o.b", head_rows=rows(heads), transposed=style == "transposed"),
        rotary=rotary, scale=H**-0.5, **more,
    )  # fmt: skip


def parameters(s: AttentionSite) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(0)
    out: dict[str, torch.Tensor] = {}
    for p in (s.q, s.k, s.v):
        rows = max(max(x.head_rows) for x in (s.q, s.k, s.v) if x.weight == p.weight) + H
        out[p.weight] = torch.randn(*((D, rows) if p.transposed else (rows, D)), generator=gen)
        out[p.bias] = torch.randn(rows, generator=gen)
    shape = (D, s.heads * H)
    out["o.w"] = torch.randn(*(shape[::-1] if s.o.transposed else shape), generator=gen)
    out["o.b"] = torch.randn(D, generator=gen)
    for n in (s.q_norm, s.k_norm):
        if n is not None:
            out[n.weight] = torch.randn(H, generator=gen)
    return out


@pytest.mark.parametrize("style", ["separate", "fused", "transposed", "per_head"])
@pytest.mark.parametrize("interleaved", [False, True])
def test_reading_and_writing_is_lossless(style, interleaved):
    norms = {
        n: HeadNorm(kind="rms", span="head", eps=1e-6, weight=f"{n}.w", weight_offset=1.0) for n in ("q_norm", "k_norm")
    }
    rotary = Rotary(dims=4, inv_freq=(1.0, 0.1), interleaved=interleaved, start=2)
    s = site(style, rotary=rotary, **norms)
    state = parameters(s)
    back = write_attention(read_attention(s, state.__getitem__), s)
    assert back.keys() == state.keys()
    for name, w in back.items():
        assert w.is_contiguous()
        if name in ("q_norm.w", "k_norm.w"):  # an offset of 1 is added and taken away again
            torch.testing.assert_close(w, state[name], rtol=0, atol=1e-6)
        else:
            assert torch.equal(w, state[name]), name


def test_interleaved_pairs_score_like_the_naive_formula():
    s = site("separate", rotary=Rotary(dims=6, inv_freq=(1.0, 0.3, 0.1), interleaved=True))
    state = parameters(s)
    x = inputs().float()
    got = attend(read_attention(s, state.__getitem__), x).scores_BNTT

    def naive(name: str, heads: int) -> torch.Tensor:
        y = (x @ state[f"{name}.w"].T + state[f"{name}.b"]).unflatten(-1, (heads, H)).transpose(1, 2)
        angle = torch.arange(x.shape[1])[:, None] * torch.tensor(s.rotary.inv_freq)
        z = torch.view_as_complex(y[..., :6].unflatten(-1, (3, 2)).contiguous()) * torch.polar(
            torch.ones_like(angle), angle
        )
        return torch.cat([torch.view_as_real(z).flatten(-2), y[..., 6:]], -1)

    want = naive("q", 8) @ naive("k", 4).repeat_interleave(2, 1).mT * s.scale
    torch.testing.assert_close(got, want, atol=1e-3, rtol=1e-4)


def test_a_lone_heads_gain_is_written_in_the_shape_that_the_model_has():
    names = ("norms.0.w", "norms.1.w")
    s = site("separate", kv_heads=2, k_norm=HeadNorm(kind="layer", span="head", eps=1e-6, weight=names))
    state = parameters(replace(s, k_norm=None)) | {name: torch.rand(H) for name in names}
    pooled, _ = merge(read_attention(s, state.__getitem__), kv_heads=1)
    target = site("separate", kv_heads=1, k_norm=replace(s.k_norm, weight=names[0]))
    for old in (torch.rand(H), torch.rand(2, H)):  # StableLM, Cohere
        written = write_attention(pooled, target, {**state, names[0]: old}.__getitem__)[names[0]]
        assert written.shape == (old.shape if old.ndim == 1 else (1, H))


@pytest.mark.parametrize("style", ["separate", "fused", "transposed"])
def test_biases_survive_pooling_into_every_layout(style):
    s = site(style, rotary=Rotary(dims=H, inv_freq=(1.0, 0.5, 0.2, 0.1)))
    state = parameters(s)
    w = gauge_copies(read_attention(s, {n: t.double() for n, t in state.items()}.__getitem__))
    out, _ = merge(w)
    target = site(style, kv_heads=2, rotary=s.rotary)
    written = write_attention(out, target)
    assert set(written) == set(state)
    again = read_attention(target, written.__getitem__)
    x = inputs()
    torch.testing.assert_close(output(again, x), output(w, x), atol=1e-3, rtol=1e-4)
    with pytest.raises(PlanError, match="no place for one"):
        write_attention(out, replace(target, k=replace(target.k, bias=None)))


def test_what_a_plain_checkpoint_cannot_say_is_refused():
    w = make()
    s = site("separate", rotary=w.rotary)
    target = replace(s, kv_heads=2, k=replace(s.k, head_rows=(0, H)), v=replace(s.v, head_rows=(0, H)))
    uneven = pool_heads(w, Moments.of_weights(w), ((0, 1, 2), (3,)))
    with pytest.raises(PlanError, match="not 2 equal runs of 4"):
        write_attention(uneven, target)
    with pytest.raises(PlanError, match="the site has"):
        write_attention(uneven, s)


# ------------------------------------------------------------------------------------------------- refits


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = inputs(16, 24)
    mask = torch.ones(16, 24, dtype=torch.bool)
    mask[3, 20:] = False
    return [(x[i : i + 8], mask[i : i + 8]) for i in (0, 8)]


def refit(w: AttentionWeights, pooled: AttentionWeights, groups: Groups, **options) -> AttentionWeights:
    """One refit after the other, whether it helps or not."""
    visit = LoneVisit(w, batches())
    method = Gqa(GqaStep(kv_heads=len(groups), gain_fit=False, **options))
    visit.write(0, pooled)
    for fit in method._fits(visit.site, w, groups):
        visit.write(0, fit(visit, visit.weights))
    return visit.weights


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rotary", ["full", "partial", None])
def test_each_refit_lowers_the_error_that_it_fits(bias, rotary):
    w = make(rotary=rotary, bias=bias)
    x = torch.cat([x for x, _ in batches()])
    pooled, groups = merge(w, Moments.of_weights(w, cov_of(w, x)))
    order = source_queries(w, groups)

    def score_error(student: AttentionWeights) -> float:
        before = attend(w, x)
        p = before.probs_BNTT[:, order]
        d = attend(student, x).scores_BNTT - before.scores_BNTT[:, order]
        return float(((p * d.square()).sum(-1) - (p * d).sum(-1).square()).mean())

    def output_error(student: AttentionWeights) -> float:
        return float((output(student, x) - output(w, x)).square().mean())

    queries = refit(w, pooled, groups, refit_output=False)
    outputs = refit(w, pooled, groups, refit_queries=False)
    assert score_error(queries) < 0.5 * score_error(pooled)
    assert output_error(outputs) < output_error(pooled)


def test_an_exact_student_is_a_fixed_point_of_the_refits():
    w = gauge_copies(make())
    x = inputs(16, 24)
    student = refit(w, *merge(w, Moments.of_weights(w, cov_of(w, x))))
    torch.testing.assert_close(output(student, x), output(w, x), atol=1e-3, rtol=1e-3)


def test_an_untouched_layer_is_not_refitted():
    w = make()
    visit = LoneVisit(w, batches())
    Gqa(GqaStep(kv_heads=4)).convert_layer(visit, SimpleNamespace(project=SimpleNamespace(kv_heads=4)))
    assert visit.weights is w
    assert visit.asked == 1  # for the moments that heads are grouped by


def test_gain_fit_recovers_scaled_heads_and_folds_them():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=40, head_dim=8, initializer_range=0.3,
    )  # fmt: skip
    parent = LlamaForCausalLM(config).eval()
    student = copy.deepcopy(parent)
    rows = tuple(range(0, 32, 8))
    sites = [
        AttentionSite(
            layer=i, module=name, hidden_size=32, heads=4, kv_heads=2, head_dim=8, value_dim=8,
            scale=8**-0.5,
            **{n: Projection(weight=f"{name}.{n}_proj.weight", head_rows=rows[:m])
               for n, m in {"q": 4, "k": 2, "v": 2, "o": 4}.items()},
        )
        for i, name in enumerate(f"model.layers.{j}.self_attn" for j in range(2))
    ]  # fmt: skip
    with torch.no_grad():
        for layer in student.model.layers:
            layer.self_attn.q_proj.weight *= 0.6
            layer.self_attn.o_proj.weight[:, :8] *= 0.7
    batch = [{"input_ids": torch.randint(0, 40, (8, 16)), "attention_mask": torch.ones(8, 16, dtype=torch.long)}]
    kept = student.model.layers[0].self_attn.k_proj.weight.clone()
    losses, made = descend_gains(student, parent, batch, sites, steps=60, lr=0.05)
    assert losses[-1] < 0.1 * losses[0]
    assert {name.split(".")[-2] for name in made} == {"q_proj", "o_proj"}
    with torch.no_grad():
        for name, value in made.items():
            student.get_parameter(name).copy_(value)
        a, b = (m(**batch[0]).logits.log_softmax(-1) for m in (parent, student))
    assert float((a.exp() * (a - b)).sum(-1).mean()) < 0.1 * losses[0]
    assert torch.equal(kept, student.model.layers[0].self_attn.k_proj.weight)
