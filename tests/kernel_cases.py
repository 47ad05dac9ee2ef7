"""What every operator must compute: small cases that run on a CPU, under Triton's interpreter, and on a GPU.

`python tests/kernel_cases.py NAME ...` runs them on the Triton kernels, with TRITON_INTERPRET=1 on CPU tensors, and
otherwise on the GPU; it prints one JSON line per case. Fresh memory is filled with NaN, and so is what lies behind the
live length of every cache.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 5e-3}
LENGTHS = (0, 1, 63, 64, 65, 300)

Operators = Callable[[str], Callable[..., Any]]
CASES: dict[str, Callable[[Operators, torch.dtype, str], None]] = {}


def case(name: str, **arguments: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register `function(op, dtype, device, **arguments)` under `name`; `op` maps an operator's name to a callable."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        assert name not in CASES
        CASES[name] = lambda op, dtype, device: function(op, dtype, device, **arguments)
        return function

    return add


def random(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def module(name: str) -> Any:
    return importlib.import_module(f"surgery.kernels.{name}")


def assert_near(got: Tensor, want: Tensor, tolerance: float | None = None) -> None:
    """Relative Frobenius error against float64."""
    assert got.shape == want.shape and not got.isnan().any(), (got.shape, want.shape)
    error = float((got.double() - want.double()).norm() / want.double().norm().clamp_min(1e-30))
    limit = TOLERANCE[got.dtype] if tolerance is None else tolerance
    assert error <= limit, f"relative error {error:.2e}, allowed {limit:.0e}"


def assert_same_lse(got: Tensor, want: Tensor) -> None:
    empty = want == -torch.inf
    assert torch.equal(got == -torch.inf, empty)
    assert (got.double() - want).masked_fill(empty, 0.0).abs().max() <= 1e-3


def poison(cache_BKS_: Tensor, lengths: Tensor) -> Tensor:
    """NaN behind the live length; [B, K, S, .] with lengths [B] or [B, K]."""
    limit = lengths if lengths.ndim == 2 else lengths[:, None]
    behind = torch.arange(cache_BKS_.shape[2], device=cache_BKS_.device) >= limit[..., None]
    return cache_BKS_.masked_fill(behind[..., None], torch.nan)


@case("decode_gqa_group_4", heads=8, kv_heads=2)
@case("decode_gqa_mha", heads=2, kv_heads=2)
@case("decode_gqa_mqa_of_20_heads", heads=20, kv_heads=1)
@case("decode_gqa_more_heads_than_one_block", heads=72, kv_heads=1)
@case("decode_gqa_width_64", heads=4, kv_heads=1, width=64)
@case("decode_gqa_odd_widths", heads=4, kv_heads=2, width=48, value_width=80)
@case("decode_gqa_lengths_by_head", heads=4, kv_heads=2, by_head=True)
def decode_gqa_dense(
    op: Operators,
    dtype: torch.dtype,
    device: str,
    *,
    heads: int,
    kv_heads: int,
    width: int = 32,
    value_width: int | None = None,
    by_head: bool = False,
) -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    if by_head:
        lengths = torch.stack((lengths, lengths.flip(0)), 1).contiguous()
    B, S = lengths.shape[0], 300
    q = random(B, heads, width, dtype=dtype, device=device)
    k = poison(random(B, kv_heads, S, width, dtype=dtype, device=device, seed=1), lengths)
    v = poison(random(B, kv_heads, S, value_width or width, dtype=dtype, device=device, seed=2), lengths)
    out, lse = op("decode_gqa")(q, k, v, lengths, 0.2)
    want, want_lse = module("decode_gqa").decode_gqa_reference(q, k.nan_to_num(), v.nan_to_num(), lengths, 0.2)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)
    assert out.dtype == dtype and lse.dtype == torch.float32


@case("decode_gqa_in_any_number_of_parts")
def decode_gqa_parts(op: Operators, dtype: torch.dtype, device: str) -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    q = random(len(LENGTHS), 4, 32, dtype=dtype, device=device)
    k, v = (poison(random(len(LENGTHS), 1, 300, 32, dtype=dtype, device=device, seed=i), lengths) for i in (1, 2))
    file = module("decode_gqa")
    want, want_lse = file.decode_gqa_reference(q, k.nan_to_num(), v.nan_to_num(), lengths, 0.2)
    usual = file.SMALLEST_SPLIT
    try:
        for smallest in (32, 64, 512):
            file.SMALLEST_SPLIT = smallest
            out, lse = op("decode_gqa")(q, k, v, lengths, 0.2)
            assert_near(out, want)
            assert_same_lse(lse, want_lse)
    finally:
        file.SMALLEST_SPLIT = usual


@case("decode_gqa_reads_what_a_mask_shows")
def decode_gqa_visible(op: Operators, dtype: torch.dtype, device: str) -> None:
    B, N, K, S, H = 3, 4, 2, 130, 32
    q = random(B, N, H, dtype=dtype, device=device)
    k, v = (random(B, K, S, H, dtype=dtype, device=device, seed=i) for i in (1, 2))
    visible = torch.ones(B, S, dtype=torch.bool, device=device)
    visible[0, :70] = False  # left padding: the first tile shows nothing
    visible[1, 5:9] = False
    visible[2] = False
    lengths = torch.tensor([130, 100, 90], dtype=torch.int32, device=device)
    out, lse = op("decode_gqa")(q, k, v, lengths, 0.2, visible)
    want, want_lse = module("decode_gqa").decode_gqa_reference(q, k, v, lengths, 0.2, visible)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)


@case("decode_gqa_without_lengths_and_with_strides")
def decode_gqa_strided(op: Operators, dtype: torch.dtype, device: str) -> None:
    B, N, K, S, H = 2, 4, 2, 65, 32
    q = random(B, N, 2 * H, dtype=dtype, device=device)[..., :H]
    k, v = (random(B, S, K, H, dtype=dtype, device=device, seed=i).transpose(1, 2) for i in (1, 2))
    out, lse = op("decode_gqa")(q, k, v, None, 0.2)
    want, want_lse = module("decode_gqa").decode_gqa_reference(q, k, v, None, 0.2)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)


@case("decode_gqa_paged")
def decode_gqa_paged(op: Operators, dtype: torch.dtype, device: str) -> None:
    B, N, K, H, page = 3, 4, 2, 32, 64
    k, v = (random(20, K, page, H, dtype=dtype, device=device, seed=i) for i in (1, 2))
    pages = torch.randperm(20, generator=torch.Generator().manual_seed(3))[:15].view(B, 5)
    pages = pages.to(device, torch.int32)
    q = random(B, N, H, dtype=dtype, device=device)
    lengths = torch.tensor([0, 65, 300], dtype=torch.int32, device=device)
    out, lse = op("decode_gqa")(q, k, v, lengths, 0.2, None, pages)
    want, want_lse = module("decode_gqa").decode_gqa_reference(q, k, v, lengths, 0.2, None, pages)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)


@case("decode_latent_512_like", heads=16, rank=64, rope=16)
@case("decode_latent_all_of_it_is_value", heads=3, rank=32, rope=0)
@case("decode_latent_20_heads_odd_rank", heads=20, rank=48, rope=32)
def decode_latent(op: Operators, dtype: torch.dtype, device: str, *, heads: int, rank: int, rope: int) -> None:
    lengths = torch.tensor(LENGTHS, dtype=torch.int32, device=device)
    B, S = len(LENGTHS), 300
    q = random(B, heads, rank + rope, dtype=dtype, device=device)
    cache = poison(random(B, 1, S, rank + rope, dtype=dtype, device=device, seed=1), lengths)
    out, lse = op("decode_latent")(q, cache, lengths, 0.15, rank)
    want, want_lse = module("decode_latent").decode_latent_reference(q, cache.nan_to_num(), lengths, 0.15, rank)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)


@case("decode_latent_reads_what_a_mask_shows")
def decode_latent_visible(op: Operators, dtype: torch.dtype, device: str) -> None:
    q = random(2, 4, 48, dtype=dtype, device=device)
    cache = random(2, 1, 90, 48, dtype=dtype, device=device, seed=1)
    visible = torch.ones(2, 90, dtype=torch.bool, device=device)
    visible[0, :40] = False
    visible[1, 7] = False
    out, lse = op("decode_latent")(q, cache, None, 0.15, 32, visible)
    want, want_lse = module("decode_latent").decode_latent_reference(q, cache, None, 0.15, 32, visible)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)


@case("rope_append_halves", pairs=8, start=0)
@case("rope_append_all_channels", pairs=16, start=0)
@case("rope_append_interleaved_in_the_middle", pairs=6, start=10, interleaved=True)
@case("rope_append_without_rotation", pairs=0, start=0)
@case("rope_append_latent", pairs=8, start=16, kv_heads=1, values=False)
@case("rope_append_paged", pairs=16, start=0, paged=True)
def rope_append(
    op: Operators,
    dtype: torch.dtype,
    device: str,
    *,
    pairs: int,
    start: int,
    kv_heads: int = 2,
    interleaved: bool = False,
    values: bool = True,
    paged: bool = False,
) -> None:
    B, N, K, H, V, S, page = 4, 6, kv_heads, 32, 48, 32, 16
    q, k = random(B, N, H, dtype=dtype, device=device), random(B, K, H, dtype=dtype, device=device, seed=1)
    v = random(B, K, V, dtype=dtype, device=device, seed=2) if values else None
    angles = 9 * random(B, pairs, dtype=torch.float32, device=device, seed=3)
    cos, sin = angles.cos(), angles.sin()
    slots = torch.tensor([0, 31, -1, 17], dtype=torch.int32, device=device)
    lines, places = (7, K, page) if paged else (B, K, S), slots.tolist()
    pages = torch.tensor([[4, 0], [6, 2], [1, 1], [3, 5]], dtype=torch.int32, device=device) if paged else None
    k_cache = random(*lines, H, dtype=dtype, device=device, seed=4)
    v_cache = random(*lines, V, dtype=dtype, device=device, seed=5) if values else None
    turn = module("rope_append").rope_reference
    want_k, want_v = k_cache.double(), None if v_cache is None else v_cache.double()
    for b, slot in enumerate(places):
        if slot < 0:
            continue
        line, place = (b, slot) if pages is None else (int(pages[b, slot // page]), slot % page)
        want_k[line, :, place] = turn(k, cos, sin, start, interleaved)[b]
        if want_v is not None:
            want_v[line, :, place] = v[b].double()
    turned = op("rope_append_")(q, k, v, cos, sin, slots, k_cache, v_cache, interleaved, start, pages)
    assert_near(turned, turn(q, cos, sin, start, interleaved))
    assert_near(k_cache, want_k)
    if want_v is not None:
        assert torch.equal(v_cache.double(), want_v)


def paged(lengths_BK: Tensor, page: int, *widths: int, dtype: torch.dtype, device: str) -> tuple[Tensor, list[Tensor]]:
    """A page table for `lengths`, with pages in random order, and caches [pages, page, width] full of numbers."""
    B, K = lengths_BK.shape
    count = -(-int(lengths_BK.max()) // page) + 1
    order = torch.randperm(B * K * count + 3, generator=torch.Generator().manual_seed(9))[: B * K * count]
    caches = [random(B * K * count + 3, page, w, dtype=dtype, device=device, seed=i) for i, w in enumerate(widths)]
    return order.view(B, K, count).to(device, torch.int32), caches


@case("ragged_schedule", programs=7)
@case("ragged_schedule_more_programs_than_work", programs=100)
def ragged_schedule(op: Operators, dtype: torch.dtype, device: str, *, programs: int) -> None:
    lengths = torch.tensor([[[0, 1, 64], [65, 3000, 0]], [[0, 0, 0], [0, 0, 0]], [[9, 9, 9], [9, 9, 9000]]])
    lengths = lengths.to(device, torch.int32)
    plan = op("ragged_schedule")(lengths, programs, 64)
    want = module("ragged_schedule").ragged_schedule_reference(lengths.flatten(1), programs, 64)
    assert torch.equal(plan, want)


@case("decode_ragged_group_4", heads=8, kv_heads=2)
@case("decode_ragged_mha_few_programs", heads=2, kv_heads=2, programs=2)
@case("decode_ragged_pages_of_16", heads=2, kv_heads=1, page=16, programs=5)
@case("decode_ragged_neighbouring_pages", heads=4, kv_heads=2, page=16, neighbours=24)
@case("decode_ragged_odd_widths", heads=4, kv_heads=2, width=48, value_width=80)
@case("decode_ragged_latents", heads=4, kv_heads=1, page=16, width=48, rank=36)
def decode_ragged(
    op: Operators,
    dtype: torch.dtype,
    device: str,
    *,
    heads: int,
    kv_heads: int,
    page: int = 64,
    programs: int = 11,
    width: int = 32,
    value_width: int = 32,
    neighbours: int = 0,
    rank: int | None = None,
) -> None:
    """`neighbours`: pages of a row from its first on that follow each other in memory.

    `rank`: keys are latents, and their first numbers the values.
    """
    lengths = torch.tensor([[0, 300], [1, 65], [64, 63], [600, 0]], dtype=torch.int32, device=device)
    lengths = lengths[:, :kv_heads].contiguous()
    q = random(4, heads, width, dtype=dtype, device=device)
    pages, (k, v) = paged(lengths, page, width, value_width, dtype=dtype, device=device)
    if neighbours:
        pages = pages.flatten().sort().values.view(pages.shape)
        pages = torch.cat((pages[..., :neighbours], pages[..., neighbours:].flip(-1)), dim=-1).contiguous()
    if rank is not None:
        v = k[..., :rank]
    want, want_lse = module("decode_ragged").decode_ragged_reference(q, k, v, pages, lengths, 0.2)
    behind = torch.arange(pages.shape[2] * page, device=device) >= lengths[..., None]
    for cache in (k, v):
        cache[pages.long()] = cache[pages.long()].masked_fill(behind.unflatten(-1, (-1, page))[..., None], torch.nan)
    plan = op("ragged_schedule")(lengths[None], programs, page)[0]
    out, lse = op("decode_ragged")(q, k, v, pages, lengths, plan, 0.2)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)


@case("compact")
def compact(op: Operators, dtype: torch.dtype, device: str) -> None:
    lengths = torch.tensor([[70, 0], [33, 128], [1, 100]], dtype=torch.int32, device=device)
    pages, (k, v) = paged(lengths, 32, 32, 48, dtype=dtype, device=device)
    keep = torch.rand(3, 2, pages.shape[2] * 32, generator=torch.Generator().manual_seed(1)).to(device) > 0.4
    keep[1, 1], keep[2, 1] = True, False
    keys, values, counts = module("compact").compact_reference(k, v, pages, keep, lengths)
    before = k.clone()
    op("compact_")(k, v, pages, keep, lengths)
    assert torch.equal(lengths.cpu(), counts)
    for row, table in enumerate(pages.flatten(0, 1).long()):
        assert torch.equal(k[table].flatten(0, 1)[: len(keys[row])], keys[row])
        assert torch.equal(v[table].flatten(0, 1)[: len(values[row])], values[row])
    unused = [page for page in range(len(k)) if page not in pages.flatten().tolist()]
    assert torch.equal(k[unused], before[unused])


@case("merge_append_halves")
@case("merge_append_interleaved_in_the_middle", pairs=6, start=10, interleaved=True)
@case("merge_append_without_rotation", pairs=0)
def merge_append(
    op: Operators, dtype: torch.dtype, device: str, *, pairs: int = 16, start: int = 0, interleaved: bool = False
) -> None:
    B, N, K, H, V, page = 3, 4, 2, 32, 48, 16
    lengths = torch.tensor([[0, 5], [16, 31], [1, 17]], dtype=torch.int32, device=device)
    pages, (k_cache, v_cache) = paged(lengths, page, H, V, dtype=dtype, device=device)
    q, k, v = (random(B, n, w, dtype=dtype, device=device, seed=i) for i, (n, w) in enumerate(((N, H), (K, H), (K, V))))
    merge = torch.tensor([[True, True], [False, False], [True, False]], device=device)
    weight = torch.rand(B, K, generator=torch.Generator().manual_seed(5)).to(device) + 0.1
    angles = 9 * random(B, pairs, dtype=torch.float32, device=device, seed=3)
    cos, sin = angles.cos(), angles.sin()
    open_run = (merge & (lengths > 0))[..., None]
    sums_k = random(B, K, H, dtype=torch.float32, device=device, seed=6).masked_fill(~open_run, torch.nan)
    sums_v = random(B, K, V, dtype=torch.float32, device=device, seed=7).masked_fill(~open_run, torch.nan)
    z = torch.full((B, K), 1.5, device=device).masked_fill(~open_run[..., 0], torch.nan)
    rope = module("rope_append").rope_reference
    key, value, *want = module("merge_append").merge_append_reference(
        k, v, merge, weight, cos, sin, sums_k, sums_v, z, lengths, start, interleaved
    )
    caches, state = [k_cache.clone(), v_cache.clone()], [sums_k, sums_v, z, lengths]
    turned = op("merge_append_")(q, k, v, merge, weight, cos, sin, pages, *caches, *state, interleaved, start)
    assert_near(turned, rope(q, cos, sin, start, interleaved))
    for got, wanted in zip(state[:3], want[:3], strict=True):
        assert_near(got, wanted)
    assert torch.equal(lengths, want[3])
    slots = (lengths - 1).long()
    lines = pages.gather(2, (slots // page)[..., None])[..., 0].long()
    for cache, before, new in zip(caches, (k_cache, v_cache), (key, value), strict=True):
        assert_near(cache[lines, slots % page], new)
        before[lines, slots % page] = cache[lines, slots % page]
        assert torch.equal(cache, before)


def quantised(
    lengths: Tensor, kv_heads: int, width: int, value_width: int, bits: int, group: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Words, scales, lows of keys and of values, and both rings, of a cache with room for 192 tokens."""
    pack, B = module("quant_format"), len(lengths)
    k = pack.pack_keys(3 * random(B, kv_heads, 192, width, dtype=dtype, device=device, seed=1), bits, group)
    v = pack.pack_values(3 * random(B, kv_heads, 192, value_width, dtype=dtype, device=device, seed=2) + 1, bits, group)
    rings = [
        random(B, kv_heads, group, w, dtype=dtype, device=device, seed=s) for s, w in ((3, width), (4, value_width))
    ]
    return [k.words, k.scale, k.low, v.words, v.scale, v.low, *rings]


@case("decode_quant_8_bits", bits=8)
@case("decode_quant_4_bits", bits=4)
@case("decode_quant_4_bits_mha", bits=4, heads=2, kv_heads=2)
@case("decode_quant_2_bits", bits=2)
@case("decode_quant_wider_values", bits=8, value_width=64)
@case("decode_quant_2_scales_visible", bits=4, parts=2, some=True)
@case("decode_quant_2_bits_4_scales", bits=2, parts=4)
@case("decode_quant_8_bits_visible", bits=8, parts=2, some=True)
def decode_quant(
    op: Operators, dtype: torch.dtype, device: str, *, bits: int, heads: int = 4,
    kv_heads: int = 1, value_width: int | None = None, parts: int | None = None, some: bool = False,
) -> None:  # fmt: skip
    width, group = 64 if bits < 8 else 32, 64
    lengths = torch.tensor([0, 1, 63, 64, 65, 255], dtype=torch.int32, device=device)
    q = random(len(lengths), heads, width, dtype=dtype, device=device)
    cache = quantised(lengths, kv_heads, width, value_width or width, bits, group, dtype, device)
    if parts is not None:  # scales of their own for parts of the channels
        factors = torch.linspace(0.5, 1.5, parts, device=device)
        cache[4], cache[5] = ((t[..., None] * factors).half().contiguous() for t in cache[4:6])
    visible = None
    if some:
        visible = random(len(lengths), 192, dtype=torch.float32, device=device, seed=9) > 0
        visible[3, :64] = False  # a group, and all of a sequence, that nobody sees
        visible[4, :40] = False
    want, want_lse = module("decode_quant").decode_quant_reference(q, *cache, lengths, bits, 0.05, visible)
    rest = lengths % group
    cache[6], cache[7] = poison(cache[6], rest), poison(cache[7], rest)
    out, lse = op("decode_quant")(q, *cache, lengths, bits, 0.05, visible)
    assert_near(out, want)
    assert_same_lse(lse, want_lse)


@case("quant_append_8_bits", bits=8)
@case("quant_append_4_bits", bits=4)
@case("quant_append_2_bits", bits=2)
def quant_append(op: Operators, dtype: torch.dtype, device: str, *, bits: int) -> None:
    width, group, K, pack = 64 if bits < 8 else 32, 16, 2, module("quant_format")
    slots = torch.tensor([-1, 0, 14, 15, 47, 206], dtype=torch.int32, device=device)
    B = len(slots)
    cache = quantised(slots, K, width, width, bits, group, dtype, device)
    before = [t.clone() for t in cache]
    k, v = (random(B, K, width, dtype=dtype, device=device, seed=s) for s in (7, 8))
    k[3, :, 5] = cache[6][3, :, :, 5] = 2.0  # a channel without any range
    op("quant_append_")(k, v, slots, *cache, bits)
    for b, slot in enumerate(slots.tolist()):
        full = slot % group == group - 1 and slot >= 0
        for ring, new, old in ((cache[6], k, before[6]), (cache[7], v, before[7])):
            if slot >= 0:
                assert torch.equal(ring[b, :, slot % group], new[b])
                ring[b, :, slot % group] = old[b, :, slot % group]
        for t, old in zip(cache[:6], before[:6], strict=True):
            assert full or torch.equal(t[b], old[b])
        if full:
            first, halves, one = slot + 1 - group, pack.halves_of(bits), slice(b, b + 1)
            members, groups = slice(first, slot + 1), slice(slot // group, slot // group + 1)
            lines = slice(first // halves, (slot + 1) // halves)
            k_group, v_group = (torch.cat((cache[i][one, :, :-1], t[one, :, None]), 2) for i, t in ((6, k), (7, v)))
            keys = (cache[0][one, :, lines], cache[1][one, :, groups], cache[2][one, :, groups])
            keys = pack.unpack_keys(*keys, bits, group, torch.float64)
            values = (cache[3][one, :, lines], cache[4][one, :, members], cache[5][one, :, members])
            values = pack.unpack_values(*values, bits, group, torch.float64)
            for got, kept, low, dim in ((keys, k_group, 2, 2), (values, v_group, 3, 3)):
                span = (kept.double().amax(dim, True) - kept.double().amin(dim, True)) / (2**bits - 1)
                assert ((got - kept.double()).abs() <= 0.51 * span + 2e-3).all(), low


@case("combine_skips_empty_parts")
def combine(op: Operators, dtype: torch.dtype, device: str) -> None:
    R, P, G, V = 3, 21, 2, 40
    partial = random(R, P, G, V, dtype=torch.float32, device=device)
    lse = 20 * random(R, P, G, dtype=torch.float32, device=device, seed=1)
    lse[0, 3:] = -torch.inf
    lse[1] = -torch.inf
    partial = partial.masked_fill((lse == -torch.inf)[..., None], torch.nan)
    out, total = op("combine")(partial, lse, dtype)
    want, want_total = module("combine").combine_reference(partial, lse)
    assert_near(out, want)
    assert_same_lse(total, want_total)


def run(name: str, op: Operators, dtype: torch.dtype, device: str) -> None:
    torch.use_deterministic_algorithms(True)  # fills fresh memory with NaN
    try:
        CASES[name](op, dtype, device)
    finally:
        torch.use_deterministic_algorithms(False)


def on_device(name: str) -> Callable[..., Any]:
    """The operator as a model calls it."""
    module(MODULES.get(name, name))
    return getattr(torch.ops.surgery, name)


def on_triton(name: str) -> Callable[..., Any]:
    """The launcher of the Triton kernel, for CPU tensors under the interpreter."""
    return getattr(module(MODULES.get(name, name)), f"{name}_triton")


MODULES: dict[str, str] = {
    "rope_append_": "rope_append",
    "compact_": "compact",
    "merge_append_": "merge_append",
    "quant_append_": "quant_append",
}
"""File of each operator that is not alone in a file of its name."""


def main() -> None:
    import surgery.kernels.launching as launching

    device = "cpu" if launching.INTERPRETED else "cuda"
    for request in sys.argv[1:]:
        name, _, dtype = request.rpartition("-")
        start, error = time.time(), None
        try:
            run(name, on_triton if launching.INTERPRETED else on_device, getattr(torch, dtype), device)
        except Exception:
            error = traceback.format_exc(limit=-6)
        sys.stdout.write(json.dumps({"case": request, "error": error, "seconds": round(time.time() - start, 2)}) + "\n")


if __name__ == "__main__":
    main()
