"""`decode_gqa`: one new token per sequence against a cache of K and V heads (MHA, GQA, MQA).

Reads nothing beyond the live length of a sequence, and each cached number once: the query heads of a group are the rows
of one matrix product. Long sequences are split over programs whose number depends on the capacity alone; where the
splits lie is worked out from the lengths on the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .combine import launch_combine
from .cpu import attend, slices
from .launching import Device, ceil_div, device_of, jit, launch, power_of_two, tl
from .library import Arguments, operator
from .tuned import Config, bucket, config_for

SMALLEST_SPLIT = 256
"""Tokens; below that the partial results cost more than the parallelism gives."""


def decode_gqa_reference(
    q_BNH: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    visible_BS: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of V [B, N, V] and the log-sum-exp of the scores [B, N], in float64."""
    k, v = (_dense(t, pages).double() for t in (k, v))
    B, N, _ = q_BNH.shape
    K, S = k.shape[1:3]
    seen = torch.ones(B, K, S, dtype=torch.bool, device=k.device)
    if lengths is not None:
        limit = lengths if lengths.ndim == 2 else lengths[:, None]
        seen = seen & (torch.arange(S, device=k.device) < limit[..., None])
    if visible_BS is not None:
        seen = seen & visible_BS[:, None]
    scores = torch.einsum("bkgh,bksh->bkgs", q_BNH.double().unflatten(1, (K, -1)), k) * scale
    scores = scores.masked_fill(~seen[:, :, None], -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.where(lse[..., None] == -torch.inf, 0.0, torch.exp(scores - lse[..., None]))
    live = torch.where(seen[..., None], v, 0.0)
    return torch.einsum("bkgs,bksv->bkgv", weights, live).flatten(1, 2), lse.reshape(B, N)


@jit
def decode_gqa_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    lengths_ptr,
    visible_ptr,
    pages_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,  # softmax scale times log2(e)
    kv_heads,
    splits,
    capacity,
    page_count,
    stride_qb,
    stride_qn,
    stride_kb,
    stride_kk,
    stride_ks,
    stride_vb,
    stride_vk,
    stride_vs,
    stride_lb,
    stride_lk,
    stride_mb,
    stride_pb,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SMALLEST_SPLIT: tl.constexpr,
    PAGE: tl.constexpr,  # 0: dense
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    M_BLOCKS: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    row = tl.program_id(0) // M_BLOCKS
    split = tl.program_id(1)
    b = (row // kv_heads).to(tl.int64)
    kv = (row % kv_heads).to(tl.int64)
    offs_g = (tl.program_id(0) % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_V)
    offs_n = tl.arange(0, BLOCK_N)

    length = capacity
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + b * stride_lb + kv * stride_lk)
        length = tl.minimum(tl.maximum(length, 0), capacity)
    per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    per_split = tl.maximum(per_split, SMALLEST_SPLIT)
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)

    q = tl.load(
        q_ptr + b * stride_qb + (kv * GROUP + offs_g)[:, None] * stride_qn + offs_k[None, :],
        mask=(offs_g < GROUP)[:, None] & (offs_k < K_DIM)[None, :],
        other=0.0,
    )
    k_base = k_ptr + kv * stride_kk
    v_base = v_ptr + kv * stride_vk
    if PAGE == 0:
        k_base += b * stride_kb
        v_base += b * stride_vb
    # 64-bit arithmetic on scalars only: offsets inside a tile are small.
    k_tile = offs_n[:, None] * stride_ks + offs_k[None, :]
    v_tile = offs_n[:, None] * stride_vs + offs_v[None, :]

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        live = start + offs_n < end
        if PAGE == 0:
            k_rows = k_base + tl.cast(start, tl.int64) * stride_ks
            v_rows = v_base + tl.cast(start, tl.int64) * stride_vs
        else:
            page = tl.load(pages_ptr + b * stride_pb + start // PAGE)
            page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
            k_rows = k_base + page * stride_kb + (start % PAGE) * stride_ks
            v_rows = v_base + page * stride_vb + (start % PAGE) * stride_vs
        k = tl.load(k_rows + k_tile, mask=live[:, None] & (offs_k < K_DIM)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
        if HAS_VISIBLE:
            seen = live & (tl.load(visible_ptr + b * stride_mb + start + offs_n, mask=live, other=0) != 0)
        else:
            seen = live
        scores = tl.where(seen[None, :], scores, float("-inf"))
        high = tl.maximum(m, tl.max(scores, 1))
        # -inf minus -inf is NaN: rows that have seen nothing yet.
        base = tl.where(high == float("-inf"), 0.0, high)
        p = tl.exp2(scores - base[:, None])
        rescale = tl.exp2(m - base)
        total = total * rescale + tl.sum(p, 1)
        v = tl.load(v_rows + v_tile, mask=live[:, None] & (offs_v < V_DIM)[None, :], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
        m = high

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_rows = (row.to(tl.int64) * splits + split) * GROUP + offs_g
    tl.store(
        out_ptr + out_rows[:, None] * V_DIM + offs_v[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=(offs_g < GROUP)[:, None] & (offs_v < V_DIM)[None, :],
    )
    lse = tl.where(empty, float("-inf"), (m + tl.log2(total)) / LOG2E)
    tl.store(lse_ptr + out_rows, lse, mask=offs_g < GROUP)


def splits_for(rows: int, capacity: int, config: Config, device: Device) -> int:
    """Programs per sequence and KV head: enough to fill the device, from the capacity and never from lengths.

    The smallest number within 85 % of the best occupancy of the last wave (the rule of FlashAttention-2).
    """
    slots = device.multiprocessors * config.ctas_per_sm
    most = max(1, min(ceil_div(capacity, SMALLEST_SPLIT), ceil_div(slots, rows)))
    if rows * most <= slots:
        return most
    efficiency = [rows * n / (ceil_div(rows * n, slots) * slots) for n in range(1, most + 1)]
    return next(n for n, value in enumerate(efficiency, 1) if value >= 0.85 * max(efficiency))


def decode_gqa_triton(
    q_BNH: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    visible: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator on a GPU."""
    out, lse = _fake(q_BNH, k, v, lengths, scale, visible, pages)
    B, N, H = q_BNH.shape
    K, V = k.shape[1], v.shape[-1]
    if B == 0:
        return out, lse
    page = 0 if pages is None else k.shape[2]
    capacity = k.shape[2] if pages is None else pages.shape[1] * page
    group = N // K
    block_m = min(64, max(16, power_of_two(group)))
    device = device_of(q_BNH)
    config = config_for(
        "decode_gqa",
        device.arch,
        dtype=str(k.dtype).removeprefix("torch."),
        width=power_of_two(H),
        block_m=block_m,
        rows=bucket(B * K),
        paged=page > 0,
    )
    block_n = min(config.block_n, page) if page else config.block_n
    blocks = B * K * ceil_div(group, block_m)
    splits = splits_for(blocks, capacity, config, device)
    if splits == 1:
        target, target_lse = out, lse
    else:
        target = q_BNH.new_empty(B * K, splits, group, V, dtype=torch.float32)
        target_lse = q_BNH.new_empty(B * K, splits, group, dtype=torch.float32)
    launch(
        decode_gqa_kernel,
        (blocks, splits),
        q_BNH,
        k,
        v,
        q_BNH if lengths is None else lengths,
        q_BNH if visible is None else visible.view(torch.int8),
        q_BNH if pages is None else pages,
        target,
        target_lse,
        scale * math.log2(math.e),
        K,
        splits,
        capacity,
        k.shape[0],
        q_BNH.stride(0),
        q_BNH.stride(1),
        *k.stride()[:3],
        *v.stride()[:3],
        0 if lengths is None else lengths.stride(0),
        0 if lengths is None or lengths.ndim == 1 else lengths.stride(1),
        0 if visible is None else visible.stride(0),
        0 if pages is None else pages.stride(0),
        GROUP=group,
        K_DIM=H,
        V_DIM=V,
        BLOCK_K=power_of_two(H),
        BLOCK_V=power_of_two(V),
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        SMALLEST_SPLIT=SMALLEST_SPLIT,
        PAGE=page,
        HAS_LENGTHS=lengths is not None,
        HAS_VISIBLE=visible is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        launch_combine(target, target_lse, out, lse, rows=B * K, group=group, parts=splits)
    return out, lse


def decode_gqa_cpu(
    q_BNH: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    visible: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator on a CPU: groups stand as query rows, live lengths are slices, equal ones in one call."""
    out, lse = _fake(q_BNH, k, v, lengths, scale, visible, pages)
    k, v = _dense(k, pages), _dense(v, pages)
    K, S = k.shape[1:3]
    if lengths is not None:
        _arguments(q_BNH).within("lengths", lengths, 0, S)
    q_BKGH = q_BNH.unflatten(1, (K, -1))
    out_BKGV, lse_BKG = out.unflatten(1, (K, -1)), lse.unflatten(1, (K, -1))
    for rows, heads, begin, end in slices(lengths, visible, q_BNH.shape[0], S):
        hidden = None
        if visible is not None and not bool(visible[rows, begin:end].all()):
            hidden = ~visible[rows, None, None, begin:end]
        part, part_lse = attend(
            q_BKGH[rows, heads], k[rows, heads, begin:end], v[rows, heads, begin:end], scale, hidden
        )
        if part.shape == out_BKGV.shape:
            return part.contiguous().view(out.shape), part_lse.contiguous().view(lse.shape)
        out_BKGV[rows, heads], lse_BKG[rows, heads] = part, part_lse
    return out, lse


def _dense(cache: Tensor, pages: Tensor | None) -> Tensor:
    """[B, K, S, .] of a paged cache [pages, K, page, .]."""
    return cache if pages is None else cache[pages.long()].transpose(1, 2).flatten(2, 3)


def _arguments(q_BNH: Tensor) -> Arguments:
    return Arguments("decode_gqa", q_BNH.device)


def _fake(
    q_BNH: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor | None,
    scale: float,
    visible: Tensor | None = None,
    pages: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    given = _arguments(q_BNH)
    given.tensor("q", q_BNH, "B N H")
    if pages is None:
        given.tensor("k", k, "B K S H")
        given.tensor("v", v, "B K S V")
    else:
        given.tensor("k", k, "P K page H")
        given.tensor("v", v, "P K page V")
        given.tensor("pages", pages, "B pages", (torch.int32,))
        if given["page"] % 16 or given["page"] & (given["page"] - 1):
            given.fail(f"k has pages of {given['page']} tokens, expected a power of two from 16")
        if given["P"] == 0:
            given.fail("k has no pages")
        if visible is not None:
            given.fail("visible goes with a dense cache, not with pages")
    given.same_dtype(q=q_BNH, k=k, v=v)
    if given["K"] == 0 or given["N"] % given["K"]:
        given.fail(f"q has N = {given['N']} heads, expected a multiple of the K = {given['K']} heads of k")
    if lengths is not None:
        given.tensor("lengths", lengths, "B K" if lengths.ndim == 2 else "B", (torch.int32,))
    if visible is not None:
        given.tensor("visible", visible, "B S", (torch.bool,))
    return q_BNH.new_empty(given["B"], given["N"], given["V"]), q_BNH.new_empty(
        given["B"], given["N"], dtype=torch.float32
    )


decode_gqa = operator(
    "decode_gqa(Tensor q, Tensor k, Tensor v, Tensor? lengths, float scale, "
    "Tensor? visible=None, Tensor? pages=None) -> (Tensor, Tensor)",
    cpu=decode_gqa_cpu,
    cuda=decode_gqa_triton,
    fake=_fake,
)
