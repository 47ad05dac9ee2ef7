"""`merge_append_`: Dynamic Memory Compression's step: merge a new token into the last slot of a head, or append it.

The open run of each head keeps its weighted sums n of unrotated keys and of values and its weight z, in float32; its
slot holds n / z, the key turned to the newest position. Queries are turned in the same launch.
Source: arXiv:2403.09636, equations 3-6, with runs of unlimited length (the paper's window W is not built).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launching import jit, launch, power_of_two, tl
from .library import Arguments, operator
from .ragged_schedule import check_page
from .rope_append import rope_reference


def merge_append_reference(
    k_BKH: Tensor,
    v_BKV: Tensor,
    merge_BK: Tensor,
    weight_BK: Tensor,
    cos_BF: Tensor,
    sin_BF: Tensor,
    sums_k_BKH: Tensor,
    sums_v_BKV: Tensor,
    z_BK: Tensor,
    lengths_BK: Tensor,
    start: int,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The new slot's key and value, and the new sums of k, of v, of weights, and lengths, in float64."""
    merges = (merge_BK & (lengths_BK > 0))[..., None]
    weight = weight_BK.double()[..., None]
    sums_k = torch.where(merges, sums_k_BKH.double(), 0.0) + weight * k_BKH.double()
    sums_v = torch.where(merges, sums_v_BKV.double(), 0.0) + weight * v_BKV.double()
    z = torch.where(merges[..., 0], z_BK.double(), 0.0) + weight[..., 0]
    key = rope_reference(sums_k / z[..., None], cos_BF, sin_BF, start, interleaved)
    return key, sums_v / z[..., None], sums_k, sums_v, z, lengths_BK + (~merges[..., 0]).int()


@jit
def merge_append_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    merge_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    pages_ptr,
    k_cache_ptr,
    v_cache_ptr,
    sums_k_ptr,
    sums_v_ptr,
    z_ptr,
    lengths_ptr,
    out_ptr,
    kv_heads,
    table_width,
    page_count,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kk,
    stride_vb,
    stride_vk,
    stride_cb,
    stride_sb,
    stride_kp,
    stride_ks,
    stride_vp,
    stride_vs,
    HEADS: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    PAIRS: tl.constexpr,
    START: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    dims = tl.arange(0, BLOCK_K)
    inside = dims < K_DIM
    turning = (dims >= START) & (dims < START + 2 * PAIRS)
    if INTERLEAVED:
        pair = (dims - START) // 2
        second = (dims - START) % 2 == 1
        partner = tl.where(second, dims - 1, dims + 1)
    else:
        pair = (dims - START) % tl.maximum(PAIRS, 1)
        second = dims >= START + PAIRS
        partner = tl.where(second, dims - PAIRS, dims + PAIRS)
    partner = tl.where(turning, partner, dims)
    cos = tl.load(cos_ptr + b * stride_cb + pair, mask=turning, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + b * stride_sb + pair, mask=turning, other=0.0).to(tl.float32)
    sin = tl.where(second, sin, -sin)
    if head < HEADS:
        row_ptr = q_ptr + b * stride_qb + head * stride_qn
        q = tl.load(row_ptr + dims, mask=inside, other=0.0)
        other = tl.load(row_ptr + partner, mask=inside, other=0.0)
        turned = q.to(tl.float32) * cos + other.to(tl.float32) * sin
        tl.store(out_ptr + (b * HEADS + head) * K_DIM + dims, tl.where(turning, turned.to(q.dtype), q), mask=inside)
    else:
        kv = head - HEADS
        row = b * kv_heads + kv
        length = tl.load(lengths_ptr + row)
        merges = tl.load(merge_ptr + row).to(tl.int32) * length > 0
        slot = tl.where(merges, length - 1, length)
        fits = (slot >= 0) & (slot < table_width * PAGE)
        weight = tl.load(weight_ptr + row).to(tl.float32)
        # Sums of a run that has ended may be anything: where nothing is merged, nothing of them is read.
        old_k = dims < tl.where(merges, K_DIM, 0)
        z = tl.load(z_ptr + row, mask=merges, other=0.0) + weight
        k_row = k_ptr + b * stride_kb + kv * stride_kk
        sums_row = sums_k_ptr + row * K_DIM
        sums_k = tl.load(sums_row + dims, mask=old_k, other=0.0)
        sums_k += weight * tl.load(k_row + dims, mask=inside, other=0.0).to(tl.float32)
        partner_k = tl.load(sums_row + partner, mask=old_k, other=0.0)
        partner_k += weight * tl.load(k_row + partner, mask=inside, other=0.0).to(tl.float32)
        v_dims = tl.arange(0, BLOCK_V)
        in_v = v_dims < V_DIM
        sums_v = tl.load(sums_v_ptr + row * V_DIM + v_dims, mask=v_dims < tl.where(merges, V_DIM, 0), other=0.0)
        sums_v += weight * tl.load(v_ptr + b * stride_vb + kv * stride_vk + v_dims, mask=in_v, other=0.0).to(tl.float32)
        # Threads read sums of their partners' channels: all must have read before any writes.
        tl.debug_barrier()
        if fits:
            page = tl.load(pages_ptr + row * table_width + slot // PAGE)
            page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
            norm = 1.0 / tl.where(z == 0.0, 1.0, z)
            key = (sums_k * cos + tl.where(turning, partner_k * sin, 0.0)) * norm
            k_out = k_cache_ptr + page * stride_kp + (slot % PAGE) * stride_ks
            v_out = v_cache_ptr + page * stride_vp + (slot % PAGE) * stride_vs
            tl.store(k_out + dims, key.to(k_cache_ptr.dtype.element_ty), mask=inside)
            tl.store(v_out + v_dims, (sums_v * norm).to(v_cache_ptr.dtype.element_ty), mask=in_v)
            tl.store(sums_row + dims, sums_k, mask=inside)
            tl.store(sums_v_ptr + row * V_DIM + v_dims, sums_v, mask=in_v)
            tl.store(z_ptr + row, z)
            tl.store(lengths_ptr + row, slot + 1)


def merge_append__triton(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKV: Tensor,
    merge_BK: Tensor,
    weight_BK: Tensor,
    cos_BF: Tensor,
    sin_BF: Tensor,
    pages_BKM: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sums_k_BKH: Tensor,
    sums_v_BKV: Tensor,
    z_BK: Tensor,
    lengths_BK: Tensor,
    interleaved: bool = False,
    start: int = 0,
) -> Tensor:
    """The operator on a GPU."""
    tensors = (q_BNH, k_BKH, v_BKV, merge_BK, weight_BK, cos_BF, sin_BF, pages_BKM, k_cache, v_cache, sums_k_BKH)
    out = _fake(*tensors, sums_v_BKV, z_BK, lengths_BK, interleaved, start)
    B, N, H = q_BNH.shape
    K, V = v_BKV.shape[1:]
    if B == 0:
        return out
    launch(
        merge_append_kernel,
        (B, N + K),
        q_BNH,
        k_BKH,
        v_BKV,
        merge_BK.view(torch.int8),
        weight_BK,
        cos_BF,
        sin_BF,
        pages_BKM,
        k_cache,
        v_cache,
        sums_k_BKH,
        sums_v_BKV,
        z_BK,
        lengths_BK,
        out,
        K,
        pages_BKM.shape[2],
        k_cache.shape[0],
        *q_BNH.stride()[:2],
        *k_BKH.stride()[:2],
        *v_BKV.stride()[:2],
        cos_BF.stride(0),
        sin_BF.stride(0),
        *k_cache.stride()[:2],
        *v_cache.stride()[:2],
        HEADS=N,
        K_DIM=H,
        V_DIM=V,
        PAIRS=cos_BF.shape[1],
        START=start,
        INTERLEAVED=interleaved,
        PAGE=k_cache.shape[1],
        BLOCK_K=power_of_two(H),
        BLOCK_V=power_of_two(V),
        num_warps=1 if max(H, V) <= 256 else 4,
    )
    return out


def merge_append__cpu(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKV: Tensor,
    merge_BK: Tensor,
    weight_BK: Tensor,
    cos_BF: Tensor,
    sin_BF: Tensor,
    pages_BKM: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sums_k_BKH: Tensor,
    sums_v_BKV: Tensor,
    z_BK: Tensor,
    lengths_BK: Tensor,
    interleaved: bool = False,
    start: int = 0,
) -> Tensor:
    """The operator on a CPU."""
    tensors = (q_BNH, k_BKH, v_BKV, merge_BK, weight_BK, cos_BF, sin_BF, pages_BKM, k_cache, v_cache, sums_k_BKH)
    out = _fake(*tensors, sums_v_BKV, z_BK, lengths_BK, interleaved, start)
    page, capacity = k_cache.shape[1], pages_BKM.shape[2] * k_cache.shape[1]
    _arguments(q_BNH).within("lengths", lengths_BK + (~merge_BK).int(), 0, capacity)
    key, value, sums_k, sums_v, z, lengths = merge_append_reference(
        k_BKH, v_BKV, merge_BK, weight_BK, cos_BF, sin_BF, sums_k_BKH, sums_v_BKV, z_BK, lengths_BK, start, interleaved
    )
    slots = (lengths - 1).long()
    lines = pages_BKM.gather(2, (slots // page)[..., None])[..., 0].long()
    k_cache[lines, slots % page] = key.to(k_cache.dtype)
    v_cache[lines, slots % page] = value.to(v_cache.dtype)
    for state, new in ((sums_k_BKH, sums_k), (sums_v_BKV, sums_v), (z_BK, z), (lengths_BK, lengths)):
        state.copy_(new)
    return out.copy_(rope_reference(q_BNH, cos_BF, sin_BF, start, interleaved))


def _arguments(q_BNH: Tensor) -> Arguments:
    return Arguments("merge_append_", q_BNH.device)


def _fake(
    q_BNH: Tensor,
    k_BKH: Tensor,
    v_BKV: Tensor,
    merge_BK: Tensor,
    weight_BK: Tensor,
    cos_BF: Tensor,
    sin_BF: Tensor,
    pages_BKM: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    sums_k_BKH: Tensor,
    sums_v_BKV: Tensor,
    z_BK: Tensor,
    lengths_BK: Tensor,
    interleaved: bool = False,
    start: int = 0,
) -> Tensor:
    given = _arguments(q_BNH)
    given.tensor("q", q_BNH, "B N H")
    given.tensor("k", k_BKH, "B K H")
    given.tensor("v", v_BKV, "B K V")
    given.tensor("merge", merge_BK, "B K", (torch.bool,), dense=True)
    given.tensor("weight", weight_BK, "B K", (torch.float32,), dense=True)
    given.tensor("cos", cos_BF, "B F")
    given.tensor("sin", sin_BF, "B F")
    given.tensor("pages", pages_BKM, "B K M", (torch.int32,), dense=True)
    given.tensor("k_cache", k_cache, "P page H")
    given.tensor("v_cache", v_cache, "P page V")
    given.tensor("sums_k", sums_k_BKH, "B K H", (torch.float32,), dense=True)
    given.tensor("sums_v", sums_v_BKV, "B K V", (torch.float32,), dense=True)
    given.tensor("z", z_BK, "B K", (torch.float32,), dense=True)
    given.tensor("lengths", lengths_BK, "B K", (torch.int32,), dense=True)
    given.same_dtype(q=q_BNH, k=k_BKH, v=v_BKV, k_cache=k_cache, v_cache=v_cache)
    check_page(given, given["page"])
    if not 0 <= start <= given["H"] - 2 * given["F"]:
        given.fail(f"start = {start} and F = {given['F']} pairs do not lie within H = {given['H']} channels")
    return torch.empty_like(q_BNH, memory_format=torch.contiguous_format)


merge_append_ = operator(
    "merge_append_(Tensor q, Tensor k, Tensor v, Tensor merge, Tensor weight, Tensor cos, Tensor sin, Tensor pages, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!) sums_k, Tensor(d!) sums_v, Tensor(e!) z, "
    "Tensor(f!) lengths, bool interleaved=False, int start=0) -> Tensor",
    cpu=merge_append__cpu,
    cuda=merge_append__triton,
    fake=_fake,
)
