"""`rope_append_`: turn q and k of one new token per sequence, and write k and v into the cache, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .launching import jit, launch, power_of_two, tl
from .library import Arguments, operator


def rope_reference(x_BNH: Tensor, cos_BF: Tensor, sin_BF: Tensor, start: int, interleaved: bool) -> Tensor:
    """x in float64 with channels [start, start + 2F) turned: pair (a, b), read as a + ib, times cos + i sin."""
    x, cos, sin = x_BNH.double().clone(), cos_BF.double()[:, None], sin_BF.double()[:, None]
    turning = x[..., start : start + 2 * cos.shape[-1]]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.chunk(2, -1)
    turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1)
    turning.copy_((turned if interleaved else turned.transpose(-1, -2)).flatten(-2))
    return x


@jit
def rope_append_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    pages_ptr,
    k_cache_ptr,
    v_cache_ptr,
    out_ptr,
    capacity,
    page_count,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kk,
    stride_vb,
    stride_vk,
    stride_cb,
    stride_sb,
    stride_pb,
    stride_kcb,
    stride_kck,
    stride_kcs,
    stride_vcb,
    stride_vck,
    stride_vcs,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    START: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,  # 0: dense
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_K)
    inside = dims < K_DIM
    is_query = head < HEADS
    kv = tl.maximum(head - HEADS, 0)
    x_ptr = q_ptr + b * stride_qb + head * stride_qn
    if not is_query:
        x_ptr = k_ptr + b * stride_kb + kv * stride_kk
    x = tl.load(x_ptr + dims, mask=inside, other=0.0)
    if PAIRS > 0:
        turning = (dims >= START) & (dims < START + 2 * PAIRS)
        if INTERLEAVED:
            pair = (dims - START) // 2
            second = (dims - START) % 2 == 1
            partner = tl.where(second, dims - 1, dims + 1)
        else:
            pair = (dims - START) % PAIRS
            second = dims >= START + PAIRS
            partner = tl.where(second, dims - PAIRS, dims + PAIRS)
        cos = tl.load(cos_ptr + b * stride_cb + pair, mask=turning, other=1.0).to(tl.float32)
        sin = tl.load(sin_ptr + b * stride_sb + pair, mask=turning, other=0.0).to(tl.float32)
        other = tl.load(x_ptr + partner, mask=turning, other=0.0).to(tl.float32)
        turned = x.to(tl.float32) * cos + tl.where(second, other, -other) * sin
        x = tl.where(turning, turned.to(x.dtype), x)
    if is_query:
        tl.store(out_ptr + (b * HEADS + head) * K_DIM + dims, x, mask=inside)
    else:
        slot = tl.load(slots_ptr + b)
        # A row without a place is not written: padding rows of a batch say -1, and nothing is ever written outside.
        if (slot >= 0) & (slot < capacity):
            if PAGE == 0:
                line = b
                place = slot
            else:
                line = tl.load(pages_ptr + b * stride_pb + slot // PAGE).to(tl.int64)
                line = tl.minimum(tl.maximum(line, 0), page_count - 1)
                place = slot % PAGE
            k_out = k_cache_ptr + line * stride_kcb + kv.to(tl.int64) * stride_kck + place.to(tl.int64) * stride_kcs
            tl.store(k_out + dims, x, mask=inside)
            if V_DIM > 0:
                v_dims = tl.arange(0, BLOCK_V)
                v = tl.load(v_ptr + b * stride_vb + kv * stride_vk + v_dims, mask=v_dims < V_DIM)
                v_out = v_cache_ptr + line * stride_vcb + kv.to(tl.int64) * stride_vck + place.to(tl.int64) * stride_vcs
                tl.store(v_out + v_dims, v, mask=v_dims < V_DIM)


def rope_append__triton(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKV: Tensor | None,
    cos_BF: Tensor,
    sin_BF: Tensor,
    slots_B: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    interleaved: bool = False,
    start: int = 0,
    pages: Tensor | None = None,
) -> Tensor:
    """The operator on a GPU."""
    out = _fake(q_BNH, k_BKH, v_BKV, cos_BF, sin_BF, slots_B, k_cache, v_cache, interleaved, start, pages)
    B, N, H = q_BNH.shape
    width = 0 if v_BKV is None else v_BKV.shape[-1]
    page = 0 if pages is None else k_cache.shape[2]
    v, v_store = (k_BKH, k_cache) if v_BKV is None or v_cache is None else (v_BKV, v_cache)
    if B == 0:
        return out
    launch(
        rope_append_kernel,
        (B, N + k_BKH.shape[1]),
        q_BNH,
        k_BKH,
        v,
        cos_BF,
        sin_BF,
        slots_B,
        slots_B if pages is None else pages,
        k_cache,
        v_store,
        out,
        k_cache.shape[2] if pages is None else pages.shape[1] * page,
        k_cache.shape[0],
        *q_BNH.stride()[:2],
        *k_BKH.stride()[:2],
        *v.stride()[:2],
        cos_BF.stride(0),
        sin_BF.stride(0),
        0 if pages is None else pages.stride(0),
        *k_cache.stride()[:3],
        *v_store.stride()[:3],
        HEADS=N,
        K_DIM=H,
        V_DIM=width,
        PAIRS=cos_BF.shape[1],
        START=start,
        INTERLEAVED=interleaved,
        PAGE=page,
        BLOCK_K=power_of_two(H),
        BLOCK_V=power_of_two(max(width, 1)),
        num_warps=1 if H <= 256 else 4,
    )
    return out


def rope_append__cpu(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKV: Tensor | None,
    cos_BF: Tensor,
    sin_BF: Tensor,
    slots_B: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    interleaved: bool = False,
    start: int = 0,
    pages: Tensor | None = None,
) -> Tensor:
    """The operator on a CPU."""
    out = _fake(q_BNH, k_BKH, v_BKV, cos_BF, sin_BF, slots_B, k_cache, v_cache, interleaved, start, pages)
    page = k_cache.shape[2]
    capacity = page if pages is None else pages.shape[1] * page
    _arguments(q_BNH).within("slots", slots_B, -1, capacity - 1)
    written = slots_B >= 0
    slots = slots_B[written].long()
    lines = written.nonzero().flatten()
    if pages is not None:
        lines, slots = pages[lines, slots // page].long(), slots % page
    k_cache[lines, :, slots] = _turn(k_BKH, cos_BF, sin_BF, start, interleaved)[written]
    if v_BKV is not None and v_cache is not None:
        v_cache[lines, :, slots] = v_BKV[written]
    return out.copy_(_turn(q_BNH, cos_BF, sin_BF, start, interleaved))


def _turn(x_BNH: Tensor, cos_BF: Tensor, sin_BF: Tensor, start: int, interleaved: bool) -> Tensor:
    pairs = cos_BF.shape[1]
    if pairs == 0:
        return x_BNH
    out, cos, sin = x_BNH.clone(), cos_BF.float()[:, None], sin_BF.float()[:, None]
    turning = out[..., start : start + 2 * pairs]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else turning.split(pairs, -1)
    new_a, new_b = a * cos - b * sin, b * cos + a * sin
    a.copy_(new_a)
    b.copy_(new_b)
    return out


def _arguments(q_BNH: Tensor) -> Arguments:
    return Arguments("rope_append_", q_BNH.device)


def _fake(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKV: Tensor | None,
    cos_BF: Tensor,
    sin_BF: Tensor,
    slots_B: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    interleaved: bool = False,
    start: int = 0,
    pages: Tensor | None = None,
) -> Tensor:
    given = _arguments(q_BNH)
    given.tensor("q", q_BNH, "B N H")
    given.tensor("k", k_BKH, "B K H")
    given.tensor("cos", cos_BF, "B F")
    given.tensor("sin", sin_BF, "B F")
    given.tensor("slots", slots_B, "B", (torch.int32,), dense=True)
    dense = "B K S" if pages is None else "P K S"
    given.tensor("k_cache", k_cache, f"{dense} H")
    given.same_dtype(q=q_BNH, k=k_BKH, k_cache=k_cache)
    if (v_BKV is None) != (v_cache is None):
        given.fail("v and v_cache go together, and one of them is None")
    if v_BKV is not None and v_cache is not None:
        given.tensor("v", v_BKV, "B K V")
        given.tensor("v_cache", v_cache, f"{dense} V")
        given.same_dtype(q=q_BNH, v=v_BKV, v_cache=v_cache)
    if pages is not None:
        given.tensor("pages", pages, "B pages", (torch.int32,))
    if not 0 <= start <= given["H"] - 2 * given["F"]:
        given.fail(f"start = {start} and F = {given['F']} pairs do not lie within H = {given['H']} channels")
    return torch.empty_like(q_BNH, memory_format=torch.contiguous_format)


rope_append_ = operator(
    "rope_append_(Tensor q, Tensor k, Tensor? v, Tensor cos, Tensor sin, Tensor slots, Tensor(a!) k_cache, "
    "Tensor(b!)? v_cache, bool interleaved=False, int start=0, Tensor? pages=None) -> Tensor",
    cpu=rope_append__cpu,
    cuda=rope_append__triton,
    fake=_fake,
)
