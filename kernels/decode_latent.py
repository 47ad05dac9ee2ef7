"""`decode_latent`: one new token per sequence against a cache of latents (absorbed MLA).

Each tile of the cache is loaded once and serves as keys, all of it, and as values, its first `rank` numbers: a cached
token costs its own bytes, whatever the number of heads.
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
from .tuned import bucket, config_for


def decode_latent_reference(
    q_BNW: Tensor,
    cache_B1SW: Tensor,
    lengths_B: Tensor | None,
    scale: float,
    rank: int,
    visible_BS: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The mean of the first `rank` numbers [B, N, R] and the log-sum-exp of the scores [B, N], in float64."""
    return decode_gqa_reference(q_BNW, cache_B1SW, cache_B1SW[..., :rank], lengths_B, scale, visible_BS)


@jit
def decode_latent_kernel(  # type: ignore[no-untyped-def]
    q_ptr,
    cache_ptr,
    lengths_ptr,
    visible_ptr,
    out_ptr,
    lse_ptr,
    qk_scale,  # softmax scale times log2(e)
    splits,
    capacity,
    stride_qb,
    stride_qn,
    stride_cb,
    stride_cs,
    stride_lb,
    stride_mb,
    HEADS: tl.constexpr,
    RANK: tl.constexpr,
    ROPE: tl.constexpr,  # numbers behind the latent that only keys read
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SMALLEST_SPLIT: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    HAS_VISIBLE: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    M_BLOCKS: tl.constexpr = (HEADS + BLOCK_M - 1) // BLOCK_M
    b = (tl.program_id(0) // M_BLOCKS).to(tl.int64)
    split = tl.program_id(1)
    heads = (tl.program_id(0) % M_BLOCKS) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_r = tl.arange(0, BLOCK_R)
    offs_p = tl.arange(0, BLOCK_P)
    offs_n = tl.arange(0, BLOCK_N)

    length = capacity
    if HAS_LENGTHS:
        length = tl.load(lengths_ptr + b * stride_lb)
        length = tl.minimum(tl.maximum(length, 0), capacity)
    per_split = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    per_split = tl.maximum(per_split, SMALLEST_SPLIT)
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)

    q_rows = q_ptr + b * stride_qb + heads[:, None] * stride_qn
    in_heads = (heads < HEADS)[:, None]
    q = tl.load(q_rows + offs_r[None, :], mask=in_heads & (offs_r < RANK)[None, :], other=0.0)
    if ROPE > 0:
        q_rope = tl.load(q_rows + RANK + offs_p[None, :], mask=in_heads & (offs_p < ROPE)[None, :], other=0.0)
    c_tile = offs_n[:, None] * stride_cs + offs_r[None, :]
    r_tile = offs_n[:, None] * stride_cs + RANK + offs_p[None, :]
    base_ptr = cache_ptr + b * stride_cb

    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_R], dtype=tl.float32)
    for start in range(begin, end, BLOCK_N):
        live = start + offs_n < end
        rows = base_ptr + tl.cast(start, tl.int64) * stride_cs
        c = tl.load(rows + c_tile, mask=live[:, None] & (offs_r < RANK)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(c), input_precision="ieee")
        if ROPE > 0:
            c_rope = tl.load(rows + r_tile, mask=live[:, None] & (offs_p < ROPE)[None, :], other=0.0)
            scores = tl.dot(q_rope, tl.trans(c_rope), scores, input_precision="ieee")
        scores = scores * qk_scale
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
        acc = tl.dot(p.to(c.dtype), c, acc * rescale[:, None], input_precision="ieee")
        m = high

    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_rows = (b * splits + split) * HEADS + heads
    tl.store(
        out_ptr + out_rows[:, None] * RANK + offs_r[None, :],
        (acc / total[:, None]).to(out_ptr.dtype.element_ty),
        mask=in_heads & (offs_r < RANK)[None, :],
    )
    tl.store(lse_ptr + out_rows, tl.where(empty, float("-inf"), (m + tl.log2(total)) / LOG2E), mask=heads < HEADS)


def decode_latent_triton(
    q_BNW: Tensor,
    cache_B1SW: Tensor,
    lengths_B: Tensor | None,
    scale: float,
    rank: int,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator on a GPU."""
    out, lse = _fake(q_BNW, cache_B1SW, lengths_B, scale, rank, visible)
    B, N, W = q_BNW.shape
    S = cache_B1SW.shape[2]
    if B == 0:
        return out, lse
    # 64 heads times 512 numbers of sums do not fit into the registers of a program.
    block_m = min(64 if rank <= 256 else 32, max(16, power_of_two(N)))
    device = device_of(q_BNW)
    config = config_for(
        "decode_latent",
        device.arch,
        dtype=str(q_BNW.dtype).removeprefix("torch."),
        width=power_of_two(rank),
        block_m=block_m,
        rows=bucket(B),
    )
    blocks = B * ceil_div(N, block_m)
    splits = splits_for(blocks, S, config, device)
    if splits == 1:
        target, target_lse = out, lse
    else:
        target = q_BNW.new_empty(B, splits, N, rank, dtype=torch.float32)
        target_lse = q_BNW.new_empty(B, splits, N, dtype=torch.float32)
    launch(
        decode_latent_kernel,
        (blocks, splits),
        q_BNW,
        cache_B1SW,
        q_BNW if lengths_B is None else lengths_B,
        q_BNW if visible is None else visible.view(torch.int8),
        target,
        target_lse,
        scale * math.log2(math.e),
        splits,
        S,
        *q_BNW.stride()[:2],
        cache_B1SW.stride(0),
        cache_B1SW.stride(2),
        0 if lengths_B is None else lengths_B.stride(0),
        0 if visible is None else visible.stride(0),
        HEADS=N,
        RANK=rank,
        ROPE=W - rank,
        BLOCK_R=power_of_two(rank),
        BLOCK_P=max(16, power_of_two(W - rank)),
        BLOCK_M=block_m,
        BLOCK_N=config.block_n,
        SMALLEST_SPLIT=SMALLEST_SPLIT,
        HAS_LENGTHS=lengths_B is not None,
        HAS_VISIBLE=visible is not None,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        launch_combine(target, target_lse, out, lse, rows=B, group=N, parts=splits)
    return out, lse


def decode_latent_cpu(
    q_BNW: Tensor,
    cache_B1SW: Tensor,
    lengths_B: Tensor | None,
    scale: float,
    rank: int,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator on a CPU: whole entries are averaged, because equal widths take the fast path, and then cut."""
    out, lse = _fake(q_BNW, cache_B1SW, lengths_B, scale, rank, visible)
    S = cache_B1SW.shape[2]
    if lengths_B is not None:
        _arguments(q_BNW).within("lengths", lengths_B, 0, S)
    for rows, _, begin, end in slices(lengths_B, visible, q_BNW.shape[0], S):
        hidden = None
        if visible is not None and not bool(visible[rows, begin:end].all()):
            hidden = ~visible[rows, None, None, begin:end]
        live = cache_B1SW[rows, :, begin:end]
        part, part_lse = attend(q_BNW[rows, None], live, live, scale, hidden)
        out[rows], lse[rows] = part[:, 0, :, :rank], part_lse[:, 0]
    return out, lse


def _arguments(q_BNW: Tensor) -> Arguments:
    return Arguments("decode_latent", q_BNW.device)


def _fake(
    q_BNW: Tensor,
    cache_B1SW: Tensor,
    lengths_B: Tensor | None,
    scale: float,
    rank: int,
    visible: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    given = _arguments(q_BNW)
    given.tensor("q", q_BNW, "B N W")
    given.tensor("cache", cache_B1SW, "B 1 S W")
    given.same_dtype(q=q_BNW, cache=cache_B1SW)
    if not 0 < rank <= given["W"]:
        given.fail(f"rank is {rank}, expected 1 to W = {given['W']}")
    if rank > 512:
        given.fail(f"rank is {rank}; ranks above 512 do not fit into registers")
    if lengths_B is not None:
        given.tensor("lengths", lengths_B, "B", (torch.int32,))
    if visible is not None:
        given.tensor("visible", visible, "B S", (torch.bool,))
    B, N = given["B"], given["N"]
    return q_BNW.new_empty(B, N, rank), q_BNW.new_empty(B, N, dtype=torch.float32)


decode_latent = operator(
    "decode_latent(Tensor q, Tensor cache, Tensor? lengths, float scale, int rank, Tensor? visible=None) "
    "-> (Tensor, Tensor)",
    cpu=decode_latent_cpu,
    cuda=decode_latent_triton,
    fake=_fake,
)
