"""Latent KV: exact where nothing is cut, absorbed equals expanded, nearer to the parent than published forms."""

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import families
import pytest
import torch
from closeness import assert_close
from layerwise import LoneVisit

import surgery
from surgery.anatomy import examine
from surgery.attention.forward import attend, probabilities
from surgery.attention.latent import (
    LatentWeights,
    cached_entries,
    check_latent,
    expanded_weights,
    in_site_order,
    latent_angles,
    latent_queries,
    score_sides,
    shared_rotary,
)
from surgery.attention.linalg import damp
from surgery.attention.maths import rotate_pairs
from surgery.attention.weights import AttentionWeights, read_attention
from surgery.calibration.text import Windows, load_tokenizer, load_windows
from surgery.calibration.working_copy import WorkingCopy
from surgery.errors import PlanError, UnsupportedModel
from surgery.planning.latent_size import aligned_rank, kept_numbers, latent_budget, rope_splits
from surgery.rewriters.common.gains import tune_gains
from surgery.rewriters.common.refit import fit_output
from surgery.rewriters.latent.factors import CommonBasis, alternate, definite, joint_latent
from surgery.rewriters.latent.fit import FitOptions, fit_layer, lowrank_candidates, mla_candidates, visit_moments
from surgery.rewriters.latent.low_rank import LOWRANK_INITS, lowrank
from surgery.rewriters.latent.moments import LatentMoments, MomentSums, _of_means
from surgery.rewriters.latent.refit import fit_queries
from surgery.rewriters.latent.rotary_mixing import mean_phase, mix_components, rotated_part, select_components
from surgery.rewriters.latent.rotary_split import MLA_INITS, mla, mla_freq
from surgery.runtime.layout import HeadNorm, Rotary

D, H, V = 32, 8, 8
REFERENCE = Path(os.environ.get("SURGERY_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
STORIES = REFERENCE / "checkpoints" / "stories940K-tok105-hf"


def make(
    heads: int = 4, kv_heads: int = 2, rotary: str | None = "full", bias: bool = False, scaling: float = 1.0, **more
) -> AttentionWeights:
    """Random attention in float64; `rotary`: full, partial (half of the channels, from 2), or None."""
    gen = torch.Generator().manual_seed(heads * 100 + kv_heads)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64) / shape[-1] ** 0.5

    dims = {"full": H, "partial": H // 2, None: 0}[rotary]
    inv = tuple((10.0 ** -torch.arange(dims // 2, dtype=torch.float64)).tolist())
    group = heads // kv_heads
    start = 2 if rotary == "partial" else 0
    return AttentionWeights(
        q_NHD=rand(heads, H, D) * 3,
        k_KHD=rand(kv_heads, H, D) * 3,
        v_KVD=rand(kv_heads, V, D),
        o_DNV=rand(D, heads, V),
        q_bias_NH=rand(heads, H) if bias else None,
        k_bias_KH=rand(kv_heads, H) if bias else None,
        v_bias_KV=rand(kv_heads, V) if bias else None,
        groups=tuple(tuple(range(a * group, (a + 1) * group)) for a in range(kv_heads)),
        rotary=Rotary(dims=dims, inv_freq=inv, start=start, scaling=scaling) if dims else None,
        scale=H**-0.5,
        **more,
    )


def inputs(batch: int = 3, tokens: int = 20) -> torch.Tensor:
    gen = torch.Generator().manual_seed(1)
    return torch.randn(batch, tokens, D, generator=gen, dtype=torch.float64) * torch.linspace(0.3, 2, D)


def moments_of(w: AttentionWeights, x: torch.Tensor) -> LatentMoments:
    sums = MomentSums(w)
    sums.add(x, x, torch.ones(x.shape[:2], dtype=torch.bool))
    return sums.finish()


class Attended(NamedTuple):
    """What a latent attention does with whole sequences."""

    c_BTR: torch.Tensor
    k_rope_BTF: torch.Tensor
    scores_BNTT: torch.Tensor
    out_BTNV: torch.Tensor


def attend_latent(w: AttentionWeights, latent: LatentWeights, x: torch.Tensor, form="absorbed") -> Attended:
    """Absorbed: queries are mapped into the latent space and latents averaged, as in decoding (see `latent_outputs`).

    Where K is rotated at read only the values can be absorbed.
    """
    kv_of = w.kv_of()
    c, k_r = cached_entries(latent, x)
    left, right = score_sides(w, latent, x, c, k_r)
    if form == "absorbed" and not latent.rotate_on_read:
        q = latent_queries(w, x)
        q_r = torch.einsum("bnth,nfh->bntf", q, latent.q_rope_KFH.to(x)[kv_of])
        q_r = rotate_pairs(shared_rotary(latent), q_r, *latent_angles(latent, x))
        left = torch.cat([torch.einsum("bnth,nhr->bntr", q, latent.k_up_KHR.to(x)[kv_of]), q_r], -1)
        right = torch.cat([c, k_r], -1)[:, None].expand(-1, len(kv_of), -1, -1)
    scores, probs = probabilities(w, left, right)
    v_up = latent.v_up_KVR.to(x)[kv_of]
    if form == "absorbed":
        out = torch.einsum("bntr,nvr->btnv", probs @ c[:, None], v_up)
    else:
        out = torch.einsum("bnts,bsr,nvr->btnv", probs, c, v_up)
    mean = 0.0 if latent.v_mean_KV is None else latent.v_mean_KV.to(x)[kv_of]
    return Attended(c, k_r, scores, out + mean)


def error(w: AttentionWeights, latent: LatentWeights, x: torch.Tensor, form="absorbed") -> float:
    want, got = attend(w, x).out_BTNV, attend_latent(w, latent, x, form).out_BTNV
    return float((got - want).norm() / want.norm())


PARENTS = {
    "mha": {"heads": 4, "kv_heads": 4},
    "gqa": {},
    "mqa": {"kv_heads": 1},
    "bias": {"bias": True},
    "partial rotary": {"rotary": "partial"},
    "partial rotary, scaled, bias": {"rotary": "partial", "scaling": 1.3, "bias": True},
    "no rotary": {"rotary": None},
    "window, sinks": {"window": 5, "sinks_N": torch.tensor([0.1, 1.0, -1.0, 0.3], dtype=torch.float64)},
    "q norm": {
        "q_norm": HeadNorm(kind="rms", span="head", eps=1e-6),
        "q_norm_NH": torch.linspace(0.5, 2, H, dtype=torch.float64).expand(4, H),
    },
    "soft cap": {"softcap": 5.0},
}


# ------------------------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("bias", [False, True])
def test_means_kept_apart_take_no_number_of_a_latent(bias: bool) -> None:
    w = make(heads=4, kv_heads=2, bias=bias)
    varying = inputs()[..., :3] @ torch.randn(3, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = varying + torch.linspace(-2, 3, D, dtype=torch.float64)  # three dims vary around one mean
    moments, want = moments_of(w, x), attend(w, x).out_BTNV
    split, plain = (
        lowrank(w, moments, 3, 3, options=replace(LOWRANK_INITS["qw"], mean_split=m)) for m in (True, False)
    )
    freq = mla_freq(w, moments, 3, 2 * H, mean_split=True)
    for latent in (split, freq):
        assert torch.allclose(attend_latent(w, latent, x).out_BTNV, want, atol=1e-6)
    assert torch.allclose(attend(expanded_weights(w, split), x).out_BTNV, want, atol=1e-6)
    assert (attend_latent(w, plain, x).out_BTNV - want).abs().max() > 1e-3


@pytest.mark.parametrize("init", MLA_INITS)
@pytest.mark.parametrize("parent", PARENTS)
def test_full_rank_with_all_components_rotated_is_the_parent(parent, init):
    w, x = make(**PARENTS[parent]), inputs()
    turning = 2 * w.kv_heads * w.frequencies
    latent = mla(w, moments_of(w, x), D + 1, turning, options=init)
    assert latent.rope_dims == turning
    assert error(w, latent, x) < 1e-9
    assert error(w, latent, x, "expanded") < 1e-9


@pytest.mark.parametrize("parent", ["mha", "gqa", "mqa"])
def test_all_components_rotated_leave_only_the_values_to_the_latent(parent):
    w, x = make(**PARENTS[parent]), inputs()
    rank = w.kv_heads * V
    latent = mla(w, moments_of(w, x), rank, 2 * w.kv_heads * w.frequencies)
    assert latent.rank == rank
    assert error(w, latent, x) < 1e-6
    assert error(w, mla_freq(w, moments_of(w, x), rank, w.kv_heads * H), x) < 1e-9


@pytest.mark.parametrize("parent", [p for p in PARENTS if p != "no rotary"])
@pytest.mark.parametrize("rotation", ["complex", "real", "none"])
def test_mixing_alone_changes_no_key(parent, rotation):
    w, x = make(**PARENTS[parent]), inputs()
    m = moments_of(w, x)
    components = mix_components(w, m, m.input_DD, rotation)
    *_, rest = rotated_part(w, components, list(range(len(components.inv_freq_C))))
    assert float(rest.abs().max()) < 1e-10


@pytest.mark.parametrize("layout", ["joint", "grouped", "head"])
@pytest.mark.parametrize("init", ["qw", "whitened", "plain"])
@pytest.mark.parametrize("parent", PARENTS)
def test_lowrank_at_full_rank_is_the_parent(parent, init, layout):
    w, x = make(**PARENTS[parent]), inputs()
    latent = lowrank(w, moments_of(w, x), w.kv_heads * H, w.kv_heads * V, options=init, layout=layout, group=1)
    assert error(w, latent, x) < 1e-9
    assert error(w, latent, x, "expanded") < 1e-9


@pytest.mark.parametrize("parent", PARENTS)
def test_absorbed_and_expanded_forms_agree_when_cut(parent):
    w, x = make(**PARENTS[parent]), inputs()
    m = moments_of(w, x)
    for latent in (mla(w, m, 9, 4 if w.frequencies else 0), lowrank(w, m, 5, 6)):
        absorbed, expanded = attend_latent(w, latent, x), attend_latent(w, latent, x, "expanded")
        torch.testing.assert_close(absorbed.out_BTNV, expanded.out_BTNV, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(absorbed.scores_BNTT, expanded.scores_BNTT, rtol=1e-10, atol=1e-10)
        assert absorbed.c_BTR.shape[-1] + absorbed.k_rope_BTF.shape[-1] == latent.numbers


def test_lowrank_in_the_parents_form_is_the_same_function():
    w, x = make(bias=True, rotary="partial"), inputs()
    latent = lowrank(w, moments_of(w, x), 5, 6)
    want = attend_latent(w, latent, x).out_BTNV
    torch.testing.assert_close(attend(expanded_weights(w, latent), x).out_BTNV, want, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "name",
    [
        *("llama", "llama_yarn", "llama_bias_wide", "qwen2", "phi", "gpt_neox", "gptj", "gpt2", "mistral", "opt"),
        *("qwen3", "olmo2", "gemma3"),  # norm their keys
    ],
)
def test_families_keep_their_logits_at_full_rank(name):
    model = families.tiny_model(name)
    anatomy = examine(model)
    ids = torch.randint(3, 120, (2, 24), generator=torch.Generator().manual_seed(0))
    want = model(input_ids=ids).logits
    for kind in ("mla", "lowrank")[anatomy.sites[0].k_norm is not None :]:
        copy = WorkingCopy(model, anatomy)
        for site in anatomy.sites:
            w = copy.parent(site.layer)
            m, kv = LatentMoments.of_weights(w), w.kv_heads
            full = 2 * kv * w.frequencies
            made = mla(w, m, 65, full) if kind == "mla" else lowrank(w, m, kv * w.head_dim, kv * w.value_dim)
            copy.write_latent(site.layer, made)
        got = copy.model(input_ids=ids).logits
        assert_close(got, want, 1e-4)


def test_interleaved_channels_are_brought_to_where_the_parent_has_them():
    model = families.tiny_model("gptj")
    site = examine(model).sites[0]
    w = read_attention(site, model.state_dict().__getitem__)
    latent = mla(w, LatentMoments.of_weights(w), 12, 4)
    moved = in_site_order(latent, site)
    x = torch.randn(5, 64)
    ours = torch.einsum("td,hd,hr->tr", x, w.q_NHD[0], latent.k_up_KHR[0].float())
    stored = model.state_dict()[site.q.weight][: site.head_dim]
    theirs = x @ stored.T @ moved.k_up_KHR[0].float()
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert not torch.equal(moved.q_rope_KFH, latent.q_rope_KFH)


# ------------------------------------------------------------------------------------------------ optimality


def joint_error(
    down_RD: torch.Tensor,
    k_PD: torch.Tensor,
    v_QD: torch.Tensor,
    k_metric_PP: torch.Tensor,
    v_metric_QQ: torch.Tensor,
    key_DD: torch.Tensor,
    value_DD: torch.Tensor,
) -> float:
    """What `alternate` minimises, with the best `up` for `down_RD`."""
    total = 0.0
    for W, M, C in ((k_PD, k_metric_PP, key_DD), (v_QD, v_metric_QQ, value_DD)):
        seen = down_RD @ damp(C, 1e-6)
        up = torch.linalg.solve(damp(seen @ down_RD.mT, 1e-12), seen @ W.mT).mT
        rest = W - up @ down_RD
        total += float((M * (rest @ C @ rest.mT)).sum())
    return total


def alternated(
    down_RD: torch.Tensor,
    k_PD: torch.Tensor,
    v_QD: torch.Tensor,
    key_DD: torch.Tensor,
    value_DD: torch.Tensor,
    steps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`alternate` with all channels alike, from and to the inputs' own basis."""
    basis, eye = CommonBasis.of(*definite(key_DD, value_DD)), torch.eye(len(k_PD), dtype=torch.float64)
    start, k, v = (basis.enter(w) for w in (down_RD, k_PD, v_QD))
    down, k_up, v_up = alternate(start, k, v, eye, eye, basis.share_D, steps)
    return basis.leave(down), k_up, v_up


def test_both_moments_are_diagonal_in_their_common_basis():
    m = moments_of(make(heads=4, kv_heads=4), inputs())
    a, b = definite(m.key_DD, m.value_DD)
    basis, w = CommonBasis.of(a, b), torch.randn(7, D, dtype=torch.float64)
    there = basis.enter(w)
    torch.testing.assert_close(basis.leave(there), w)
    torch.testing.assert_close(there * basis.share_D @ there.T, w @ a @ w.T)
    torch.testing.assert_close(there * (1 - basis.share_D) @ there.T, w @ b @ w.T)


def test_joint_error_equals_the_discarded_tail():
    w, x = make(), inputs()
    m = moments_of(w, x)
    k, v = w.with_bias("k"), w.with_bias("v")
    down, k_up, v_up = joint_latent(k, v, 10, cov_DD=m.input_DD)
    stacked = torch.cat([k.reshape(-1, D), v.reshape(-1, D)])
    rest = stacked - torch.cat([k_up.reshape(-1, 10), v_up.reshape(-1, 10)]) @ down
    tail = torch.linalg.eigvalsh(stacked @ m.input_DD @ stacked.T).flip(0)[10:].sum()
    torch.testing.assert_close((rest @ m.input_DD * rest).sum(), tail)


def test_alternation_never_loses_and_stays_where_nothing_is_to_gain():
    w, x = make(heads=4, kv_heads=4), inputs()
    m = moments_of(w, x)
    k, v = w.k_KHD.flatten(0, 1), w.v_KVD.flatten(0, 1)
    eye = torch.eye(len(k), dtype=torch.float64)
    start = joint_latent(w.k_KHD, w.v_KVD, 12, cov_DD=m.input_DD)[0]

    def value(down, key, val):
        return joint_error(down, k, v, eye, eye, key, val)

    losses = [value(alternated(start, k, v, m.key_DD, m.value_DD, n)[0], m.key_DD, m.value_DD) for n in range(6)]
    assert all(b <= a * (1 + 1e-6) for a, b in itertools.pairwise(losses))
    assert losses[-1] < 0.999 * losses[0]
    stay = alternated(start, k, v, m.input_DD, m.input_DD, 5)[0]
    assert value(stay, m.input_DD, m.input_DD) == pytest.approx(value(start, m.input_DD, m.input_DD), rel=1e-3)


def test_a_fitted_latent_has_rows_of_unit_length_at_right_angles():
    """Codes of latents whose numbers all had the same variance lose twice as much."""
    w, x = make(heads=4, kv_heads=4), inputs()
    down = mla(w, moments_of(w, x), 12, 4).down_RD
    torch.testing.assert_close(down @ down.T, torch.eye(12, dtype=down.dtype))


def test_alternation_ends_where_steps_gain_little():
    w, x = make(heads=4, kv_heads=4), inputs()
    m = moments_of(w, x)
    k, v = w.k_KHD.flatten(0, 1), w.v_KVD.flatten(0, 1)
    start = joint_latent(w.k_KHD, w.v_KVD, 12, cov_DD=m.input_DD)[0]
    far, further = (alternated(start, k, v, m.key_DD, m.value_DD, n) for n in (100, 200))
    assert all(torch.equal(a, b) for a, b in zip(far, further, strict=True))


def test_alternation_takes_moments_that_rounding_made_indefinite():
    w, x = make(heads=4, kv_heads=4), inputs(1, 6)  # 6 tokens for 32 channels
    m = moments_of(w, x)
    rounded = m.key_DD - 1e-3 * torch.eye(D, dtype=torch.float64) * m.key_DD.diagonal().mean()
    k, v = w.k_KHD.flatten(0, 1), w.v_KVD.flatten(0, 1)
    start = joint_latent(w.k_KHD, w.v_KVD, 12, cov_DD=m.input_DD)[0]
    assert all(part.isfinite().all() for part in alternated(start, k, v, rounded, m.value_DD, 20))


def test_complex_mixing_gathers_more_of_the_score_than_real_or_none():
    w, x = make(heads=8, kv_heads=4), inputs()
    m = moments_of(w, x)
    zero = torch.zeros(4, w.frequencies, dtype=torch.complex128)
    kept = {}
    for rotation in ("complex", "real", "none"):
        c = mix_components(w, m, m.input_DD, rotation, rho_KF=zero)
        kept[rotation] = float(c.energy_C[select_components(c, w.frequencies, "energy")].sum())
    assert kept["complex"] > kept["real"]
    assert kept["complex"] > kept["none"]


def test_mean_phase_is_the_mean_over_what_the_queries_look_at():
    w, x = make(heads=2, kv_heads=2), inputs()
    p = attend(w, x).probs_BNTT
    behind = torch.arange(20)[:, None] - torch.arange(20)
    angle = -behind * torch.tensor(w.rotary.inv_freq, dtype=torch.float64)[:, None, None]
    want = torch.einsum("bnts,fts->nf", p.to(torch.complex128), torch.polar(torch.ones_like(angle), angle)) / 60
    torch.testing.assert_close(mean_phase(w, moments_of(w, x)), want)


def test_moments_of_keys_and_values_add_up_to_what_attention_sees():
    w, x = make(), inputs()
    m, p = moments_of(w, x), attend(w, x).probs_BNTT
    want = torch.einsum("bnts,bsd,bse->de", p, x, x) / 60 / w.heads
    torch.testing.assert_close(m.key_DD + m.value_DD, want)
    torch.testing.assert_close(m.input_DD, torch.einsum("btd,bte->de", x, x) / 60)
    torch.testing.assert_close(m.q_NHH, torch.einsum("btd,bte,nhd,nje->nhj", x, x, w.q_NHD, w.q_NHD) / 60)
    assert float(torch.linalg.eigvalsh(m.key_DD)[0]) > -1e-12


@pytest.mark.parametrize(("tokens", "channels"), [(12, 40), (60, 8)])
def test_moments_of_attended_means_are_those_of_the_means_written_out(tokens, channels):
    random = torch.Generator().manual_seed(0)
    p = torch.rand(2, 3, 7, tokens, generator=random).double()
    x = torch.randn(2, tokens, channels, generator=random).double()
    means = torch.einsum("bnmt,btd->bnmd", p, x).flatten(0, 2)
    torch.testing.assert_close(_of_means(p, x), means.mT @ means)


def test_padding_does_not_reach_the_moments():
    w, x = make(bias=True), inputs()
    mask = torch.ones(3, 20, dtype=torch.bool)
    sums, padded = MomentSums(w), MomentSums(w)
    sums.add(x[:, :12], x[:, :12], mask[:, :12])
    padded.add(x, x, mask & (torch.arange(20) < 12))
    for name in ("input_DD", "key_DD", "value_DD", "q_NHH", "q_read_NHH", "rho_NF"):
        torch.testing.assert_close(getattr(padded.finish(), name), getattr(sums.finish(), name))


def test_windows_count_alike_whatever_batches_they_come_in():
    """A large batch is asked by fewer queries of each window than a small one."""
    w, random = make(), torch.Generator().manual_seed(0)
    x = torch.cat([scale * torch.randn(1, 300, D, generator=random).double() for scale in (1, 1, 1, 1, 3)])
    batched, alone = MomentSums(w), MomentSums(w)
    for sums, sizes in ((batched, (4, 1)), (alone, (1, 1, 1, 1, 1))):
        for part in x.split(sizes):
            sums.add(part, part, torch.ones(part.shape[:2], dtype=torch.bool))
    for name in ("key_DD", "value_DD", "q_read_NHH", "rho_NF"):
        found, wanted = (getattr(sums.finish(), name) for sums in (batched, alone))
        assert float((found - wanted).norm() / wanted.norm()) < 0.1, name


def test_ranks_of_one_call_are_never_worse_with_more_numbers():
    w, x = make(heads=4, kv_heads=4), inputs()
    m = moments_of(w, x)
    errors = [error(w, lowrank(w, m, r, r), x) for r in (4, 8, 16, 24, 32)]
    assert all(b <= a for a, b in itertools.pairwise(errors))


def test_refits_bring_a_cut_latent_nearer_to_its_parent():
    w, x = make(), inputs(8, 24)
    m, mask = moments_of(w, x), torch.ones(8, 24, dtype=torch.bool)
    for latent in (mla(w, m, 8, 4), lowrank(w, m, 5, 7)):
        visit = LoneVisit(w, [(x, mask)], latent)
        want = torch.einsum("btnv,dnv->btd", attend(w, x).out_BTNV, w.o_DNV)

        def loss(s, latent=latent, want=want):
            return float((torch.einsum("btnv,dnv->btd", attend_latent(s, latent, x).out_BTNV, s.o_DNV) - want).norm())

        queries = fit_queries(w, latent)(visit, w)
        visit.write(0, queries)
        both = fit_output(visit, queries)
        parent, before, after = (attend(w, x), attend_latent(w, latent, x), attend_latent(queries, latent, x))

        def spread(s, parent=parent):
            e = s.scores_BNTT - parent.scores_BNTT
            mean = (parent.probs_BNTT * e).sum(-1, keepdim=True)
            return float((parent.probs_BNTT * (e - mean).square()).sum())

        assert spread(after) < spread(before)
        assert loss(both) < loss(queries)


# ------------------------------------------------------------------------------------------ budget and refusals


def test_budget_never_exceeds_what_is_kept_and_rotates_pairs():
    site = examine(families.tiny_model("llama")).sites[0]
    wide = replace(site, head_dim=64)
    for keep in (0.125, 0.25, 0.3, 0.5, 0.75, 1.0):
        for of in (site, wide):
            numbers = kept_numbers(keep, of)
            assert keep * of.kv_dims - 8 < numbers <= keep * of.kv_dims
            for rank, rope in (latent_budget(numbers, of), *rope_splits(numbers, of)):
                assert rank + rope <= numbers
                assert rope % 2 == 0 and rank >= 1
    assert latent_budget(kept_numbers(0.5, site), site, 8) == (24, 8)
    assert latent_budget(32, examine(families.tiny_model("gpt2")).sites[0])[1] == 0


def test_large_entries_fill_whole_aligned_loads():
    site = replace(examine(families.tiny_model("llama")).sites[0], kv_heads=8, head_dim=64, value_dim=64)
    assert site.kv_dims == 1024
    assert kept_numbers(0.3, site) == 304  # 307 rounded down
    assert [aligned_rank(r, 64, 900) for r in (100, 104, 899)] == [104, 104, 900]
    assert aligned_rank(50, 3, 900) == 50  # small: as it is


@pytest.mark.parametrize(("keep", "rope"), [(0.0, None), (1.5, None), (0.5, 3), (0.5, 64), (0.01, None)])
def test_impossible_budgets_are_refused(keep, rope):
    site = examine(families.tiny_model("llama")).sites[0]
    with pytest.raises(PlanError, match="layer 0"):
        latent_budget(kept_numbers(keep, site), site, rope)


def test_what_a_latent_cannot_hold_is_refused_with_its_reason():
    w, x = make(), inputs()
    m, norm = moments_of(w, x), HeadNorm(kind="rms", span="head", eps=1e-6)
    for broken, reason in (
        (replace(w, k_norm=norm), "keys are normed"),
        (replace(w, v_norm=norm), "values are normed"),
        (replace(w, q_norm=replace(norm, after_rotary=True)), "after their rotation"),
        (replace(w, rotary=replace(w.rotary, length_dependent=True)), "vary with the length"),
    ):
        with pytest.raises(UnsupportedModel, match=reason):
            mla(broken, m, 8, 4)
    with pytest.raises(UnsupportedModel, match="keys are normed"):
        lowrank(replace(w, k_norm=replace(norm, after_rotary=True)), m, 4, 4)
    lowrank(replace(w, rotary=replace(w.rotary, length_dependent=True)), m, 4, 4)
    for rank, rope, reason in (
        (8, 3, "rope_dims 3 must be even"),
        (8, 100, "from 0 to"),
        (0, 4, "rank 0: the values need"),
    ):
        with pytest.raises(PlanError, match=reason):
            mla(w, m, rank, rope)
    with pytest.raises(PlanError, match="do not turn"):
        mla_freq(make(rotary="partial"), moments_of(make(rotary="partial"), x), 4, 4)
    with pytest.raises(PlanError, match="fold 4"):
        mix_components(make(rotary="partial"), moments_of(make(rotary="partial"), x), m.input_DD, fold=4)
    model = families.tiny_model("olmo")
    site = examine(model).sites[0]
    with pytest.raises(UnsupportedModel, match="clamped"):
        check_latent(read_attention(site, model.state_dict().__getitem__), site)


@pytest.mark.parametrize("fold", [1, 2, 4])
def test_folded_frequencies_lose_nothing_before_the_rotation(fold):
    w, x = make(heads=4, kv_heads=4), inputs()
    m = moments_of(w, x)
    c = mix_components(w, m, m.input_DD, fold=fold)
    assert len(set(c.inv_freq_C.tolist())) == w.frequencies // fold
    *_, rest = rotated_part(w, c, list(range(len(c.inv_freq_C))))
    assert float(rest.abs().max()) < 1e-10


# -------------------------------------------------------------------------------------------- real checkpoint


@pytest.fixture(scope="module")
def stories() -> Iterator[tuple[WorkingCopy, Windows, Windows, dict[int, LatentMoments]]]:
    text = REFERENCE / "text" / "tinystories-917.jsonl"
    if not STORIES.exists() or not text.exists():
        pytest.skip("needs the reference checkpoints (SURGERY_REFERENCE)")
    parent = surgery.load(STORIES).float()
    texts = [json.loads(line)["text"].lower() for line in text.read_text().splitlines()]
    tokenizer = load_tokenizer(STORIES)
    fit, held = (
        load_windows(part, tokenizer, vocab_size=parent.config.vocab_size, length=128)
        for part in (texts[:16], texts[400:408])
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many small matrices: more threads only wait for each other
    copy = WorkingCopy(parent, examine(parent))
    moments = {visit.layer: visit_moments(visit, copy.parent(visit.layer)) for visit in copy.visits(fit, copy.sites)}
    yield copy, fit, held, moments
    torch.set_num_threads(threads)


def test_default_is_nearer_to_a_real_parent_than_published_forms(stories):
    copy, _, held, moments = stories

    def divergence(build) -> float:
        for layer in copy.sites:
            copy.write_latent(layer, build(copy.parent(layer), moments[layer]))
        return copy.divergence(held)

    assert divergence(lambda w, m: mla(w, m, 64, 64)) < 1e-5
    for ranks in ((48, 16), (16, 16)):
        found = {init: divergence(partial(_mla, ranks=ranks, init=init)) for init in MLA_INITS}
        assert all(2 * found["default"] < kl for init, kl in found.items() if init != "default"), found
    for ranks in ((27, 37), (16, 22)):
        low = {init: divergence(partial(_lowrank, ranks=ranks, init=init)) for init in LOWRANK_INITS}
        assert low["qw"] < low["whitened"] < low["plain"], low


def _mla(w, m, ranks, init):
    return mla(w, m, *ranks, options=init)


def _lowrank(w, m, ranks, init):
    return lowrank(w, m, *ranks, options=init)


@pytest.mark.parametrize("kind", ["mla", "lowrank"])
def test_fit_chooses_refits_and_keeps_only_what_helps(kind):
    model = families.tiny_model("llama")
    copy = WorkingCopy(model, examine(model))
    ids = torch.randint(3, 120, (16, 24), generator=torch.Generator().manual_seed(0))
    windows = Windows(ids, torch.ones_like(ids, dtype=torch.bool), "random")
    candidates = mla_candidates([(20, 4), (16, 8)], (1.0, 2.0)) if kind == "mla" else lowrank_candidates(24)
    for visit in copy.visits(windows, copy.sites):
        parent = copy.parent(visit.layer)
        place = fit_layer(visit, candidates, FitOptions(queries=False, output=False))
        assert copy.choice == place < len(candidates)
        assert copy.project(visit.layer).dims == 24
        assert torch.equal(copy.read(visit.layer).q_NHD, parent.q_NHD)
        chosen, choice = visit.error(), copy.choice
        fit_layer(visit, candidates, FitOptions(gains=True))
        assert copy.choice == choice
        assert visit.error() <= chosen
    before = copy.divergence(windows.split()[1])
    assert before == pytest.approx(copy.held_out, rel=1e-3)
    assert tune_gains(copy, copy.computed, windows, steps=4) <= before


def test_prompts_of_latents_need_no_more_than_flash_attention():
    model = families.tiny_model("llama")
    ids = torch.randint(3, 120, (8, 48), generator=torch.Generator().manual_seed(0))
    step = {"rewriter": "mla", "keep": 0.5, "rope_dims": 4}
    child = surgery.convert(model, {"steps": [step]}, calibration=ids).eval()
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = child(input_ids=ids[:2]).logits  # raises where keys and values differ in width
    child.set_attn_implementation("eager")
    with torch.no_grad():
        assert_close(found, child(input_ids=ids[:2]).logits)
