# mypy: disable-error-code="assignment"
# ruff: noqa: RUF005
"""`decode_quant`: one new token against a quantised cache and its unquantised newest tokens, in one pass.

No number of the cache is multiplied by a scale: scales of keys go into the query once per tile, those of values into
the weights, and what is added to codes becomes one sum per row. Codes become floats by setting exponent bits.
The packing is that of `quant_format`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .combine import launch_combine
from .cpu import attend, slices
from .decode_gqa import SMALLEST_SPLIT, decode_gqa_reference, splits_for
from .launching import ceil_div, device_of, jit, launch, power_of_two, tl
from .library import Arguments, operator
from .quant_format import BITS, halves_of, planes_of, unpack_keys, unpack_values
from .tuned import bucket, config_for


def decode_quant_reference(
    q_BNH: Tensor, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor, v_scale: Tensor, v_low: Tensor,
    k_ring: Tensor, v_ring: Tensor, lengths_B: Tensor, bits: int, scale: float, visible_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The mean of V [B, N, V] and the log-sum-exp of the scores [B, N] over the same quantised values, in float64."""
    group, capacity = k_ring.shape[2], v_scale.shape[2]
    k = torch.cat((unpack_keys(k_words, k_scale, k_low, bits, group, torch.float64), k_ring.double()), 2)
    v = torch.cat((unpack_values(v_words, v_scale, v_low, bits, group, torch.float64), v_ring.double()), 2)
    packed, rest = lengths_B // group * group, lengths_B % group
    place = torch.arange(capacity + group, device=k.device)
    visible = (place < packed[:, None]) | ((place >= capacity) & (place < capacity + rest[:, None]))
    if visible_BS is not None:
        visible[:, :capacity] &= visible_BS
    return decode_gqa_reference(q_BNH, k, v, None, scale, visible)


@jit
def codes_as_floats(words, SHIFT: tl.constexpr, BITS: tl.constexpr, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """Codes of one plane plus a bias: 1024 in float16, 128 in bfloat16 up to 4 bits, otherwise 0."""
    codes = (words >> SHIFT) & ((1 << BITS) - 1)
    if dtype == tl.float16:
        return (codes | 0x6400).to(tl.float16, bitcast=True)
    elif dtype == tl.bfloat16 and BITS < 8:
        return (codes | 0x4300).to(tl.bfloat16, bitcast=True)
    else:
        return codes.to(dtype)


@jit
def decode_quant_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_words_ptr,
    k_scale_ptr,
    k_low_ptr,
    v_words_ptr,
    v_scale_ptr,
    v_low_ptr,
    k_ring_ptr,
    v_ring_ptr,
    lengths_ptr,
    visible_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,  # softmax scale times log2(e)
    kv_heads,
    splits,
    capacity,
    stride_qb,
    stride_qn,
    stride_mb,
    GROUP: tl.constexpr,  # query heads per KV head
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BITS: tl.constexpr,
    TOKENS: tl.constexpr,  # of a quantisation group
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SMALLEST_SPLIT: tl.constexpr,
    V_GROUPS: tl.constexpr,  # scales per token; planes lie in one each
    HAS_VISIBLE: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    M_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    PLANES: tl.constexpr = 2 if BITS == 8 else 4
    HALVES: tl.constexpr = 2 if BITS == 2 else 1
    ROWS: tl.constexpr = BLOCK_N // HALVES  # of words in a tile
    K_PART: tl.constexpr = K_DIM // PLANES
    V_PART: tl.constexpr = V_DIM // PLANES
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    BIAS: tl.constexpr = 1024.0 if dtype == tl.float16 else (128.0 if dtype == tl.bfloat16 and BITS < 8 else 0.0)
    # Rounded queries and weights multiply codes around zero only: the middle of the codes goes with the exact ones.
    MIDDLE: tl.constexpr = 2.0 ** (BITS - 1)
    row = (tl.program_id(0) // M_BLOCKS).to(tl.int64)
    split = tl.program_id(1)
    b = row // kv_heads
    kv = row % kv_heads
    offs_g = (tl.program_id(0) % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, K_PART)
    offs_v = tl.arange(0, V_PART)
    offs_n = tl.arange(0, ROWS)
    in_group = (offs_g < GROUP)[:, None]

    length = tl.minimum(tl.maximum(tl.load(lengths_ptr + b), 0), capacity + TOKENS - 1)
    packed = tl.minimum(length // TOKENS * TOKENS, capacity)
    per_split = tl.cdiv(tl.cdiv(packed, splits), TOKENS) * TOKENS
    per_split = tl.maximum(per_split, SMALLEST_SPLIT)
    begin = split * per_split
    end = tl.minimum(begin + per_split, packed)

    q_rows = q_ptr + b * stride_qb + (kv * GROUP + offs_g)[:, None] * stride_qn + offs_k[None, :]
    q = ()
    acc = ()
    for i in tl.static_range(PLANES):
        q = q + (tl.load(q_rows + i * K_PART, mask=in_group, other=0.0).to(tl.float32),)
        acc = acc + (tl.zeros([BLOCK_M, V_PART], dtype=tl.float32),)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    shift = ()
    for _g in tl.static_range(V_GROUPS):
        shift = shift + (tl.zeros([BLOCK_M], dtype=tl.float32),)
    k_tile = k_words_ptr + row * (capacity // HALVES) * K_PART + offs_n[:, None] * K_PART + offs_k[None, :]
    v_tile = v_words_ptr + row * (capacity // HALVES) * V_PART + offs_n[:, None] * V_PART + offs_v[None, :]
    channels = row * (capacity // TOKENS) * K_DIM

    # Groups are whole: no token of a tile is masked.
    for start in range(begin, end, BLOCK_N):
        words = tl.load(k_tile + tl.cast(start // HALVES, tl.int64) * K_PART)
        v_words = tl.load(v_tile + tl.cast(start // HALVES, tl.int64) * V_PART)
        line = channels + tl.cast(start // TOKENS, tl.int64) * K_DIM
        spread = tl.zeros([BLOCK_M, K_PART], dtype=tl.float32)
        scaled = ()
        for i in tl.static_range(PLANES):
            k_scale = tl.load(k_scale_ptr + line + i * K_PART + offs_k).to(tl.float32)
            k_middle = tl.load(k_low_ptr + line + i * K_PART + offs_k).to(tl.float32) + MIDDLE * k_scale
            part = (q[i] * k_scale[None, :]).to(dtype)
            spread += q[i] * k_middle[None, :] - (BIAS + MIDDLE) * part.to(tl.float32)
            scaled = scaled + (part,)
        constant = tl.sum(spread, 1)
        token = row * capacity + start // TOKENS * TOKENS + start % TOKENS // HALVES + offs_n
        for t in tl.static_range(HALVES):
            scores = tl.zeros([BLOCK_M, ROWS], dtype=tl.float32)
            for i in tl.static_range(PLANES):
                codes = codes_as_floats(words, 8 * t + BITS * i, BITS, dtype)
                scores = tl.dot(scaled[i], tl.trans(codes), scores, input_precision="ieee")
            scores = (scores + constant[:, None]) * qk_scale
            at = token + t * (TOKENS // 2)
            if HAS_VISIBLE:
                seen = tl.load(visible_ptr + b * stride_mb + (at - row * capacity)) != 0
                scores = tl.where(seen[None, :], scores, float("-inf"))
            high = tl.maximum(m, tl.max(scores, 1))
            # -inf minus -inf is NaN: rows that have seen nothing yet.
            base = tl.where(high == float("-inf"), 0.0, high) if HAS_VISIBLE else high
            p = tl.exp2(scores - base[:, None])
            rescale = tl.exp2(m - base)
            total = total * rescale + tl.sum(p, 1)
            weights = ()
            moved = ()
            for g in tl.static_range(V_GROUPS):
                v_scale = tl.load(v_scale_ptr + at * V_GROUPS + g).to(tl.float32)
                v_middle = tl.load(v_low_ptr + at * V_GROUPS + g).to(tl.float32) + MIDDLE * v_scale
                weight = (p * v_scale[None, :]).to(dtype)
                weights = weights + (weight,)
                spread = p * v_middle[None, :] - (BIAS + MIDDLE) * weight.to(tl.float32)
                moved = moved + (shift[g] * rescale + tl.sum(spread, 1),)
            shift = moved
            new = ()
            for i in tl.static_range(PLANES):
                codes = codes_as_floats(v_words, 8 * t + BITS * i, BITS, dtype)
                weight = weights[i * V_GROUPS // PLANES]
                new = new + (tl.dot(weight, codes, acc[i] * rescale[:, None], input_precision="ieee"),)
            acc = new
            m = high

    if split == 0:
        # Short: buffers for it would take the shared memory that the loop above needs.
        for start in tl.range(0, length - packed, ROWS, num_stages=1):
            live = start + offs_n < length - packed
            k_rows = k_ring_ptr + (row * TOKENS + start + offs_n)[:, None] * K_DIM + offs_k[None, :]
            v_rows = v_ring_ptr + (row * TOKENS + start + offs_n)[:, None] * V_DIM + offs_v[None, :]
            scores = tl.zeros([BLOCK_M, ROWS], dtype=tl.float32)
            for i in tl.static_range(PLANES):
                k = tl.load(k_rows + i * K_PART, mask=live[:, None], other=0.0)
                scores = tl.dot(q[i].to(dtype), tl.trans(k), scores, input_precision="ieee")
            scores = tl.where(live[None, :], scores * qk_scale, float("-inf"))
            high = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - high[:, None])
            rescale = tl.exp2(m - high)
            total = total * rescale + tl.sum(p, 1)
            moved = ()
            for g in tl.static_range(V_GROUPS):
                moved = moved + (shift[g] * rescale,)
            shift = moved
            new = ()
            for i in tl.static_range(PLANES):
                v = tl.load(v_rows + i * V_PART, mask=live[:, None], other=0.0)
                new = new + (tl.dot(p.to(dtype), v, acc[i] * rescale[:, None], input_precision="ieee"),)
            acc = new
            m = high

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_rows = (row * splits + split) * GROUP + offs_g
    for i in tl.static_range(PLANES):
        tl.store(
            out_ptr + out_rows[:, None] * V_DIM + i * V_PART + offs_v[None, :],
            ((acc[i] + shift[i * V_GROUPS // PLANES][:, None]) / total[:, None]).to(out_ptr.dtype.element_ty),
            mask=in_group,
        )
    tl.store(lse_ptr + out_rows, tl.where(empty, float("-inf"), (m + tl.log2(total)) / LOG2E), mask=offs_g < GROUP)


def decode_quant_triton(
    q_BNH: Tensor, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor, v_scale: Tensor, v_low: Tensor,
    k_ring: Tensor, v_ring: Tensor, lengths_B: Tensor, bits: int, scale: float, visible_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator on a GPU."""
    tensors = (q_BNH, k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring, lengths_B)
    out, lse = _fake(*tensors, bits, scale, visible_BS)
    B, N, H = q_BNH.shape
    K, V, tokens, capacity = k_ring.shape[1], v_ring.shape[3], k_ring.shape[2], v_scale.shape[2]
    if B == 0:
        return out, lse
    group = N // K
    block_m = min(64, max(16, power_of_two(group)))
    device = device_of(q_BNH)
    config = config_for(
        "decode_quant",
        device.arch,
        dtype=str(q_BNH.dtype).removeprefix("torch."),
        bits=bits,
        width=H,
        block_m=block_m,
        rows=bucket(B * K),
    )
    blocks = B * K * ceil_div(group, block_m)
    splits = splits_for(blocks, capacity, config, device)
    parts = 1 if v_scale.ndim == 3 else v_scale.shape[3]
    if splits == 1:
        target, target_lse = out, lse
    else:
        target = q_BNH.new_empty(B * K, splits, group, V, dtype=torch.float32)
        target_lse = q_BNH.new_empty(B * K, splits, group, dtype=torch.float32)
    launch(
        decode_quant_kernel,
        (blocks, splits),
        *tensors,
        q_BNH if visible_BS is None else visible_BS.view(torch.int8),
        target,
        target_lse,
        scale * math.log2(math.e),
        K,
        splits,
        capacity,
        *q_BNH.stride()[:2],
        0 if visible_BS is None else visible_BS.stride(0),
        GROUP=group,
        K_DIM=H,
        V_DIM=V,
        BITS=bits,
        TOKENS=tokens,
        BLOCK_M=block_m,
        BLOCK_N=min(config.block_n, tokens),
        SMALLEST_SPLIT=max(SMALLEST_SPLIT, tokens),
        V_GROUPS=parts,
        HAS_VISIBLE=visible_BS is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        launch_combine(target, target_lse, out, lse, rows=B * K, group=group, parts=splits)
    return out, lse


def decode_quant_cpu(
    q_BNH: Tensor, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor, v_scale: Tensor, v_low: Tensor,
    k_ring: Tensor, v_ring: Tensor, lengths_B: Tensor, bits: int, scale: float, visible_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operator on a CPU: live words are expanded, then read as any cache; it saves memory, not time."""
    tensors = (q_BNH, k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring, lengths_B)
    out, lse = _fake(*tensors, bits, scale, visible_BS)
    K, tokens, capacity = k_ring.shape[1], k_ring.shape[2], v_scale.shape[2]
    _arguments(q_BNH).within("lengths", lengths_B, 0, capacity + tokens - 1)
    q_BKGH = q_BNH.unflatten(1, (K, -1)).float()
    out_BKGV, lse_BKG = out.unflatten(1, (K, -1)), lse.unflatten(1, (K, -1))
    for rows, _, _, end in slices(lengths_B, None, len(q_BNH), capacity + tokens):
        packed, rest = end // tokens * tokens, end % tokens
        groups, live, lines = slice(packed // tokens), slice(packed), slice(packed // halves_of(bits))
        k = unpack_keys(k_words[rows, :, lines], k_scale[rows, :, groups], k_low[rows, :, groups], bits, tokens)
        v = unpack_values(v_words[rows, :, lines], v_scale[rows, :, live], v_low[rows, :, live], bits, tokens)
        k = torch.cat((k, k_ring[rows, :, :rest].float()), 2)
        v = torch.cat((v, v_ring[rows, :, :rest].float()), 2)
        hidden = None
        if visible_BS is not None:
            hidden = torch.nn.functional.pad(~visible_BS[rows, None, None, :packed], (0, rest))
        part, part_lse = attend(q_BKGH[rows], k, v, scale, hidden)
        out_BKGV[rows], lse_BKG[rows] = part.to(out.dtype), part_lse
    return out, lse


def _arguments(q_BNH: Tensor) -> Arguments:
    return Arguments("decode_quant", q_BNH.device)


def _fake(
    q_BNH: Tensor, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor, v_scale: Tensor, v_low: Tensor,
    k_ring: Tensor, v_ring: Tensor, lengths_B: Tensor, bits: int, scale: float, visible_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    given = _arguments(q_BNH)
    given.tensor("q", q_BNH, "B N H")
    check_quantised(given, k_words, k_scale, k_low, v_words, v_scale, v_low, k_ring, v_ring, bits, most_parts=4)
    given.same_dtype(q=q_BNH, k_ring=k_ring, v_ring=v_ring)
    given.tensor("lengths", lengths_B, "B", (torch.int32,), dense=True)
    if visible_BS is not None:
        given.tensor("visible", visible_BS, f"B {v_scale.shape[2]}", (torch.bool,))
    if given["K"] == 0 or given["N"] % given["K"]:
        given.fail(f"q has N = {given['N']} heads, expected a multiple of the K = {given['K']} heads of k_words")
    B, N, V = given["B"], given["N"], given["V"]
    return q_BNH.new_empty(B, N, V), q_BNH.new_empty(B, N, dtype=torch.float32)


def check_quantised(
    given: Arguments, k_words: Tensor, k_scale: Tensor, k_low: Tensor, v_words: Tensor, v_scale: Tensor, v_low: Tensor,
    k_ring: Tensor, v_ring: Tensor, bits: int, most_parts: int = 1,
) -> None:  # fmt: skip
    """Refuse what is not a cache of `quant_format`, with at most `most_parts` scales per token."""
    if bits not in BITS:
        given.fail(f"bits is {bits}, expected 2, 4 or 8")
    given.tensor("k_ring", k_ring, "B K group H", dense=True)
    given.tensor("v_ring", v_ring, "B K group V", dense=True)
    planes, halves = planes_of(bits), halves_of(bits)
    for letter, name in (("H", "keys"), ("V", "values")):
        part = given[letter] // planes
        # The kernel multiplies matrices plane by plane, and 16 is the least depth of a product.
        if given[letter] % planes or part < 16 or part & (part - 1):
            given.fail(
                f"{name} of width {letter} = {given[letter]} in {bits} bits: expected a power of two from {16 * planes}"
            )
    if given["group"] < 16 or given["group"] & (given["group"] - 1):
        given.fail(f"k_ring holds groups of {given['group']} tokens, expected a power of two from 16")
    given.tensor("k_words", k_words, f"B K L {given['H'] // planes}", (torch.int16,), dense=True)
    given.tensor("v_words", v_words, f"B K L {given['V'] // planes}", (torch.int16,), dense=True)
    tokens = given["L"] * halves
    if tokens % given["group"]:
        given.fail(f"k_words holds {tokens} tokens, expected a multiple of the group of {given['group']}")
    groups = tokens // given["group"]
    given.tensor("k_scale", k_scale, f"B K {groups} H", (torch.float16,), dense=True)
    given.tensor("k_low", k_low, f"B K {groups} H", (torch.float16,), dense=True)
    parts = 1 if v_scale.ndim == 3 else v_scale.shape[3]
    if parts > most_parts:
        given.fail(f"v_scale has {parts} scales per token, expected 1")
    if parts == 0 or planes % parts:
        given.fail(f"v_scale has {parts} scales per token: {planes} planes of channels cannot lie in one each")
    shape = f"B K {tokens}" if v_scale.ndim == 3 else f"B K {tokens} {parts}"
    given.tensor("v_scale", v_scale, shape, (torch.float16,), dense=True)
    given.tensor("v_low", v_low, shape, (torch.float16,), dense=True)


decode_quant = operator(
    "decode_quant(Tensor q, Tensor k_words, Tensor k_scale, Tensor k_low, Tensor v_words, Tensor v_scale, "
    "Tensor v_low, Tensor k_ring, Tensor v_ring, Tensor lengths, int bits, float scale, Tensor? visible=None) "
    "-> (Tensor, Tensor)",
    cpu=decode_quant_cpu,
    cuda=decode_quant_triton,
    fake=_fake,
)
