"""`decode_ragged`: one new token against caches whose length differs by KV head (DMC, DMS, eviction, head budgets).

Storage is pages of one head, [pages, page, H], with a table per sequence and head. Programs are as many as fill the
device and share the live pages evenly (`ragged_schedule`): what a long head costs, all of them carry.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .combine import launch_combine
from .cpu import attend, attend_plainly
from .decode_gqa import decode_gqa_reference
from .launching import ceil_div, device_of, jit, launch, power_of_two, tl
from .library import Arguments, operator
from .ragged_schedule import check_page
from .tuned import bucket, config_for

WORTH_A_CALL = 128
"""Slots of a row that a CPU reads by a call of its own rather than copying them together with others."""


def decode_ragged_reference(
    q_BNH: Tensor, k: Tensor, v: Tensor, pages_BKM: Tensor, lengths_BK: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The mean of V [B, N, V] and the log-sum-exp of the scores [B, N], in float64."""
    dense_k, dense_v = (t[pages_BKM.long()].flatten(2, 3) for t in (k, v))
    return decode_gqa_reference(q_BNH, dense_k, dense_v, lengths_BK, scale)


@jit
def decode_ragged_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    pages_ptr,
    lengths_ptr,
    plan_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,  # softmax scale times log2(e)
    kv_heads,
    rows,
    page_count,
    capacity,
    stride_qb,
    stride_qn,
    stride_kp,
    stride_ks,
    stride_vp,
    stride_vs,
    stride_pr,
    GROUP: tl.constexpr,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    program = tl.program_id(0)
    offs_g = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_V)
    offs_n = tl.arange(0, BLOCK_N)
    k_tile = offs_n[:, None] * stride_ks + offs_k[None, :]
    v_tile = offs_n[:, None] * stride_vs + offs_v[None, :]

    share = tl.load(plan_ptr + rows + 1)
    at = program * share
    stop = tl.minimum(at + share, tl.load(plan_ptr + rows))
    row = tl.load(plan_ptr + rows + 2 + program)
    while at < stop:
        row_begin = tl.load(plan_ptr + row)
        piece_end = tl.minimum(stop, tl.load(plan_ptr + row + 1))
        length = tl.minimum(tl.load(lengths_ptr + row), capacity)
        begin = (at - row_begin) * PAGE
        end = tl.minimum((piece_end - row_begin) * PAGE, length)
        b = (row // kv_heads).to(tl.int64)
        q = tl.load(
            q_ptr + b * stride_qb + ((row % kv_heads) * GROUP + offs_g)[:, None] * stride_qn + offs_k[None, :],
            mask=(offs_g < GROUP)[:, None] & (offs_k < K_DIM)[None, :],
            other=0.0,
        )
        table = pages_ptr + row.to(tl.int64) * stride_pr
        m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
        total = tl.zeros([BLOCK_M], dtype=tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_V], dtype=tl.float32)
        for start in range(begin, end, BLOCK_N):
            live = start + offs_n < end
            page = tl.load(table + start // PAGE)
            page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
            k_rows = k_ptr + page * stride_kp + (start % PAGE) * stride_ks
            v_rows = v_ptr + page * stride_vp + (start % PAGE) * stride_vs
            k = tl.load(k_rows + k_tile, mask=live[:, None] & (offs_k < K_DIM)[None, :], other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * qk_scale
            scores = tl.where(live[None, :], scores, float("-inf"))
            high = tl.maximum(m, tl.max(scores, 1))
            p = tl.exp2(scores - high[:, None])
            rescale = tl.exp2(m - high)
            total = total * rescale + tl.sum(p, 1)
            v = tl.load(v_rows + v_tile, mask=live[:, None] & (offs_v < V_DIM)[None, :], other=0.0)
            acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
            m = high
        # Pieces are numbered as they lie in the line: each step raises the program, the row, or both.
        part = (program + row).to(tl.int64) * GROUP + offs_g
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        tl.store(
            out_ptr + part[:, None] * V_DIM + offs_v[None, :],
            acc / total[:, None],
            mask=(offs_g < GROUP)[:, None] & (offs_v < V_DIM)[None, :],
        )
        tl.store(lse_ptr + part, tl.where(empty, float("-inf"), (m + tl.log2(total)) / LOG2E), mask=offs_g < GROUP)
        at = piece_end
        row += 1


def decode_ragged_triton(
    q_BNH: Tensor, k: Tensor, v: Tensor, pages_BKM: Tensor, lengths_BK: Tensor, plan: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator on a GPU."""
    out, lse = _fake(q_BNH, k, v, pages_BKM, lengths_BK, plan, scale)
    B, N, H = q_BNH.shape
    K, V, page = lengths_BK.shape[1], v.shape[-1], k.shape[1]
    if B == 0:
        return out, lse
    group, rows = N // K, B * K
    programs = plan.shape[0] - rows - 2
    block_m = min(64, max(16, power_of_two(group)))
    config = config_for(
        "decode_ragged",
        device_of(q_BNH).arch,
        dtype=str(k.dtype).removeprefix("torch."),
        width=power_of_two(H),
        block_m=block_m,
        rows=bucket(rows),
    )
    parts = q_BNH.new_empty(programs + rows, group, V, dtype=torch.float32)
    parts_lse = q_BNH.new_empty(programs + rows, group, dtype=torch.float32)
    launch(
        decode_ragged_kernel,
        (programs, ceil_div(group, block_m)),
        q_BNH,
        k,
        v,
        pages_BKM,
        lengths_BK,
        plan,
        parts,
        parts_lse,
        scale * math.log2(math.e),
        K,
        rows,
        k.shape[0],
        pages_BKM.shape[2] * page,
        *q_BNH.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        pages_BKM.shape[2],
        GROUP=group,
        K_DIM=H,
        V_DIM=V,
        BLOCK_K=power_of_two(H),
        BLOCK_V=power_of_two(V),
        BLOCK_M=block_m,
        BLOCK_N=min(config.block_n, page),
        PAGE=page,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    launch_combine(parts, parts_lse, out, lse, rows=rows, group=group, parts=0, plan=plan)
    return out, lse


def decode_ragged_cpu(
    q_BNH: Tensor, k: Tensor, v: Tensor, pages_BKM: Tensor, lengths_BK: Tensor, plan: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The operator on a CPU; the plan is not needed.

    Long rows get a call each, which reads pages where they lie if they follow each other in memory, and copies them
    otherwise. Short rows are copied together, for one call.
    """
    out, lse = _fake(q_BNH, k, v, pages_BKM, lengths_BK, plan, scale)
    K, page, capacity = lengths_BK.shape[1], k.shape[1], pages_BKM.shape[2] * k.shape[1]
    _arguments(q_BNH).within("lengths", lengths_BK, 0, capacity)
    lengths, tables = lengths_BK.flatten(), pages_BKM.flatten(0, 1)
    if len(lengths) == 0:
        return out, lse
    q_RGH = q_BNH.unflatten(1, (K, -1)).flatten(0, 1)
    queries, counts, numbers = q_RGH[:, None, None].unbind(), lengths.tolist(), tables.tolist()
    long = [row for row, count in enumerate(counts) if count >= WORTH_A_CALL]
    short = [row for row, count in enumerate(counts) if count < WORTH_A_CALL]
    is_line = all(t.stride(0) == page * t.stride(1) for t in (k, v))
    lines = [t.flatten(0, 1)[None, None] for t in (k, v)] if is_line else []
    found = []
    for row in long:
        count, pages = counts[row], numbers[row][: ceil_div(counts[row], page)]
        if is_line and pages == list(range(pages[0], pages[0] + len(pages))):
            keys, values = (t.narrow(2, pages[0] * page, count) for t in lines)
        else:
            used = torch.tensor(pages)
            keys, values = (t.index_select(0, used).flatten(0, 1)[None, None, :count] for t in (k, v))
        part, part_lse = attend(queries[row], keys, values, scale)
        found.append((part[0], part_lse[0]))
    if short:
        rows = torch.tensor(short)
        used = tables.index_select(0, rows)[:, : ceil_div(max(counts[row] for row in short), page)]
        keys, values = (t.index_select(0, used.flatten()).view(len(rows), 1, -1, t.shape[-1]) for t in (k, v))
        for i, row in enumerate(short):
            # What lies behind a length may be anything; NaN stays NaN whatever it is multiplied by.
            values[i, 0, counts[row] :].zero_()
        behind = torch.arange(keys.shape[2]) >= lengths.index_select(0, rows)[:, None]
        part, part_lse = attend_plainly(
            q_RGH.index_select(0, rows)[:, None], keys, values, scale, behind[:, None, None]
        )
        found.append((part[:, 0], part_lse[:, 0]))
    order = torch.tensor(long + short)
    for whole, parts in zip((out, lse), zip(*found, strict=True), strict=True):
        whole.unflatten(1, (K, -1)).flatten(0, 1).index_copy_(0, order, torch.cat(parts))
    return out, lse


def _arguments(q_BNH: Tensor) -> Arguments:
    return Arguments("decode_ragged", q_BNH.device)


def _fake(
    q_BNH: Tensor, k: Tensor, v: Tensor, pages_BKM: Tensor, lengths_BK: Tensor, plan: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    given = _arguments(q_BNH)
    given.tensor("q", q_BNH, "B N H")
    given.tensor("k", k, "P page H")
    given.tensor("v", v, "P page V")
    given.same_dtype(q=q_BNH, k=k, v=v)
    given.tensor("pages", pages_BKM, "B K M", (torch.int32,), dense=True)
    given.tensor("lengths", lengths_BK, "B K", (torch.int32,), dense=True)
    given.tensor("plan", plan, "C", (torch.int32,), dense=True)
    check_page(given, given["page"])
    if given["K"] == 0 or given["N"] % given["K"]:
        given.fail(f"q has N = {given['N']} heads, expected a multiple of the K = {given['K']} heads of lengths")
    if given["C"] < given["B"] * given["K"] + 3:
        given.fail(f"plan has {given['C']} numbers, expected B * K + 2 and one per program (see ragged_schedule)")
    if given["P"] == 0:
        given.fail("k has no pages")
    B, N, V = given["B"], given["N"], given["V"]
    return q_BNH.new_empty(B, N, V), q_BNH.new_empty(B, N, dtype=torch.float32)


decode_ragged = operator(
    "decode_ragged(Tensor q, Tensor k, Tensor v, Tensor pages, Tensor lengths, Tensor plan, float scale) "
    "-> (Tensor, Tensor)",
    cpu=decode_ragged_cpu,
    cuda=decode_ragged_triton,
    fake=_fake,
)
