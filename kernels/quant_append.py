"""`quant_append_`: put a token into the ring of a quantised cache, and quantise the ring when a group is full.

Whether it is full is decided in the kernel, so that one captured graph serves every position. The packing is that of
`quant_format`; keys come as they shall be kept, usually rotated.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .decode_quant import check_quantised
from .launching import jit, launch, tl
from .library import Arguments, operator
from .quant_format import halves_of, pack_keys, pack_values


@jit
def ring_rows(ring_ptr, newest, channel, tokens, WIDTH: tl.constexpr, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows of a full ring in float32; the newest from registers, for this program has only just written it."""
    old = tl.load(ring_ptr + tokens[:, None] * WIDTH + channel[None, :], mask=(tokens < TOKENS - 1)[:, None], other=0.0)
    return tl.where((tokens == TOKENS - 1)[:, None], newest[None, :], old).to(tl.float32)


@jit
def codes_of(x, scale, low, TOP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Nearest codes, against scale and low as they are stored."""
    codes = tl.floor((x - low) / tl.where(scale == 0.0, 1.0, scale) + 0.5)
    return tl.minimum(tl.maximum(codes, 0.0), TOP).to(tl.int32)


@jit
def quant_append_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    slots_ptr,
    k_words_ptr,
    k_scale_ptr,
    k_low_ptr,
    v_words_ptr,
    v_scale_ptr,
    v_low_ptr,
    k_ring_ptr,
    v_ring_ptr,
    kv_heads,
    capacity,
    stride_kb,
    stride_kk,
    stride_vb,
    stride_vk,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    PLANES: tl.constexpr = 2 if BITS == 8 else 4
    HALVES: tl.constexpr = 2 if BITS == 2 else 1
    ROWS: tl.constexpr = TOKENS // HALVES  # of words in a group
    K_PART: tl.constexpr = K_DIM // PLANES
    V_PART: tl.constexpr = V_DIM // PLANES
    TOP: tl.constexpr = (1 << BITS) - 1
    row = tl.program_id(0).to(tl.int64)
    b = row // kv_heads
    kv = row % kv_heads
    slot = tl.load(slots_ptr + b)
    place = slot % TOKENS
    full = place == TOKENS - 1
    offs_t = tl.arange(0, ROWS)
    offs_k = tl.arange(0, K_PART)
    offs_v = tl.arange(0, V_PART)
    # A full group must have a place among the words, and a ring never wraps into tokens that wait in it.
    if (slot >= 0) & (slot < capacity + TOKENS - 1):
        group = (slot // TOKENS).to(tl.int64)
        k_ring = k_ring_ptr + row * TOKENS * K_DIM
        v_ring = v_ring_ptr + row * TOKENS * V_DIM
        k_row = k_ptr + b * stride_kb + kv * stride_kk
        v_row = v_ptr + b * stride_vb + kv * stride_vk
        line = (row * (capacity // TOKENS) + group) * K_DIM
        words = tl.zeros([ROWS, K_PART], dtype=tl.int32)
        for i in tl.static_range(PLANES):
            channel = i * K_PART + offs_k
            newest = tl.load(k_row + channel)
            tl.store(k_ring + place * K_DIM + channel, newest)
            if full:
                low = tl.full([K_PART], float("inf"), dtype=tl.float32)
                high = tl.full([K_PART], float("-inf"), dtype=tl.float32)
                for t in tl.static_range(HALVES):
                    x = ring_rows(k_ring, newest, channel, t * ROWS + offs_t, K_DIM, TOKENS)
                    low = tl.minimum(low, tl.min(x, 0))
                    high = tl.maximum(high, tl.max(x, 0))
                scale = ((high - low) / TOP).to(tl.float16)
                rounded = low.to(tl.float16)
                tl.store(k_scale_ptr + line + channel, scale)
                tl.store(k_low_ptr + line + channel, rounded)
                for t in tl.static_range(HALVES):
                    x = ring_rows(k_ring, newest, channel, t * ROWS + offs_t, K_DIM, TOKENS)
                    codes = codes_of(x, scale.to(tl.float32)[None, :], rounded.to(tl.float32)[None, :], TOP)
                    words = words | (codes << (8 * t + BITS * i))
        if full:
            word = (row * (capacity // TOKENS) + group) * ROWS + offs_t
            tl.store(k_words_ptr + word[:, None] * K_PART + offs_k[None, :], words.to(tl.int16))
        for i in tl.static_range(PLANES):
            channel = i * V_PART + offs_v
            tl.store(v_ring + place * V_DIM + channel, tl.load(v_row + channel))
        if full:
            words = tl.zeros([ROWS, V_PART], dtype=tl.int32)
            for t in tl.static_range(HALVES):
                low = tl.full([ROWS], float("inf"), dtype=tl.float32)
                high = tl.full([ROWS], float("-inf"), dtype=tl.float32)
                for i in tl.static_range(PLANES):
                    channel = i * V_PART + offs_v
                    x = ring_rows(v_ring, tl.load(v_row + channel), channel, t * ROWS + offs_t, V_DIM, TOKENS)
                    low = tl.minimum(low, tl.min(x, 1))
                    high = tl.maximum(high, tl.max(x, 1))
                scale = ((high - low) / TOP).to(tl.float16)
                rounded = low.to(tl.float16)
                token = row * capacity + group * TOKENS + t * ROWS + offs_t
                tl.store(v_scale_ptr + token, scale)
                tl.store(v_low_ptr + token, rounded)
                for i in tl.static_range(PLANES):
                    channel = i * V_PART + offs_v
                    x = ring_rows(v_ring, tl.load(v_row + channel), channel, t * ROWS + offs_t, V_DIM, TOKENS)
                    codes = codes_of(x, scale.to(tl.float32)[:, None], rounded.to(tl.float32)[:, None], TOP)
                    words = words | (codes << (8 * t + BITS * i))
            word = (row * (capacity // TOKENS) + group) * ROWS + offs_t
            tl.store(v_words_ptr + word[:, None] * V_PART + offs_v[None, :], words.to(tl.int16))


def quant_append__triton(
    k_BKH: Tensor, v_BKV: Tensor, slots_B: Tensor, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor,
    v_scale: Tensor, v_low: Tensor, k_ring: Tensor, v_ring: Tensor, bits: int,
) -> None:  # fmt: skip
    """The operator on a GPU."""
    cache = (k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring)
    _fake(k_BKH, v_BKV, slots_B, *cache, bits)
    B, K, H = k_BKH.shape
    if B == 0:
        return
    launch(
        quant_append_kernel,
        (B * K,),
        k_BKH,
        v_BKV,
        slots_B,
        *cache,
        K,
        v_scale.shape[2],
        *k_BKH.stride()[:2],
        *v_BKV.stride()[:2],
        K_DIM=H,
        V_DIM=v_BKV.shape[2],
        BITS=bits,
        TOKENS=k_ring.shape[2],
        num_warps=8,
    )


def quant_append__cpu(
    k_BKH: Tensor, v_BKV: Tensor, slots_B: Tensor, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor,
    v_scale: Tensor, v_low: Tensor, k_ring: Tensor, v_ring: Tensor, bits: int,
) -> None:  # fmt: skip
    """The operator on a CPU."""
    _fake(k_BKH, v_BKV, slots_B, k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring, bits)
    tokens, capacity = k_ring.shape[2], v_scale.shape[2]
    Arguments("quant_append_", k_BKH.device).within("slots", slots_B, -1, capacity + tokens - 2)
    for b, slot in enumerate(slots_B.tolist()):
        if slot < 0:
            continue
        k_ring[b, :, slot % tokens], v_ring[b, :, slot % tokens] = k_BKH[b], v_BKV[b]
        if slot % tokens == tokens - 1:
            one, group, members = slice(b, b + 1), slot // tokens, slice(slot + 1 - tokens, slot + 1)
            lines = slice(members.start // halves_of(bits), members.stop // halves_of(bits))
            keys, values = pack_keys(k_ring[one], bits, tokens), pack_values(v_ring[one], bits, tokens)
            k_words[one, :, lines], v_words[one, :, lines] = keys.words, values.words
            k_scale[one, :, group], k_low[one, :, group] = keys.scale[:, :, 0], keys.low[:, :, 0]
            v_scale[one, :, members], v_low[one, :, members] = values.scale, values.low


def _fake(
    k_BKH: Tensor, v_BKV: Tensor, slots_B: Tensor, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor,
    v_scale: Tensor, v_low: Tensor, k_ring: Tensor, v_ring: Tensor, bits: int,
) -> None:  # fmt: skip
    given = Arguments("quant_append_", k_BKH.device)
    given.tensor("k", k_BKH, "B K H")
    given.tensor("v", v_BKV, "B K V")
    given.tensor("slots", slots_B, "B", (torch.int32,), dense=True)
    check_quantised(given, k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring, bits)
    given.same_dtype(k=k_BKH, v=v_BKV, k_ring=k_ring, v_ring=v_ring)


quant_append_ = operator(
    "quant_append_(Tensor k, Tensor v, Tensor slots, Tensor(a!) k_words, Tensor(b!) k_scale, Tensor(c!) k_low, "
    "Tensor(d!) v_words, Tensor(e!) v_scale, Tensor(f!) v_low, Tensor(g!) k_ring, Tensor(h!) v_ring, int bits) -> ()",
    cpu=quant_append__cpu,
    cuda=quant_append__triton,
    fake=_fake,
)
