"""`compact_`: evict tokens from paged caches by moving the kept ones to the front, in place; whole pages fall free.

Off the critical path of a step. After it, the pages behind the new length of a row hold nothing that is read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launching import jit, launch, power_of_two, tl
from .library import Arguments, operator
from .ragged_schedule import check_page


def compact_reference(
    k: Tensor, v: Tensor, pages_BKM: Tensor, keep_BKS: Tensor, lengths_BK: Tensor
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Kept keys and values of each row in order, and the new lengths [B, K]."""
    keys, values, counts = [], [], []
    for table, keep, length in zip(
        pages_BKM.flatten(0, 1), keep_BKS.flatten(0, 1), lengths_BK.flatten().tolist(), strict=True
    ):
        chosen = keep[:length].nonzero().flatten()
        keys.append(k[table.long()].flatten(0, 1)[chosen])
        values.append(v[table.long()].flatten(0, 1)[chosen])
        counts.append(len(chosen))
    return keys, values, torch.tensor(counts, dtype=torch.int32).view_as(lengths_BK)


@jit
def compact_kernel(  # type: ignore[no-untyped-def]
    k_ptr,
    v_ptr,
    pages_ptr,
    keep_ptr,
    lengths_ptr,
    page_count,
    stride_pr,
    stride_kp,
    stride_ks,
    stride_vp,
    stride_vs,
    K_DIM: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAGE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K)
    offs_v = tl.arange(0, BLOCK_V)
    table = pages_ptr + row * stride_pr
    length = tl.minimum(tl.load(lengths_ptr + row), stride_pr * PAGE)
    kept = length * 0
    for start in range(0, length, BLOCK_N):
        source = start + offs_n
        keep = tl.load(keep_ptr + row * stride_pr * PAGE + source, mask=source < length, other=0).to(tl.int32)
        keep = (keep != 0).to(tl.int32)
        moving = keep != 0
        target = kept + tl.cumsum(keep, 0) - 1
        page = tl.load(table + source // PAGE, mask=moving, other=0)
        page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
        k = tl.load(
            k_ptr + (page * stride_kp + (source % PAGE) * stride_ks)[:, None] + offs_k[None, :],
            mask=moving[:, None] & (offs_k < K_DIM)[None, :],
        )
        v = tl.load(
            v_ptr + (page * stride_vp + (source % PAGE) * stride_vs)[:, None] + offs_v[None, :],
            mask=moving[:, None] & (offs_v < V_DIM)[None, :],
        )
        # Targets lie at or before their sources: all of a tile must be read before any of it is written.
        tl.debug_barrier()
        page = tl.load(table + target // PAGE, mask=moving, other=0)
        page = tl.minimum(tl.maximum(page, 0), page_count - 1).to(tl.int64)
        tl.store(
            k_ptr + (page * stride_kp + (target % PAGE) * stride_ks)[:, None] + offs_k[None, :],
            k,
            mask=moving[:, None] & (offs_k < K_DIM)[None, :],
        )
        tl.store(
            v_ptr + (page * stride_vp + (target % PAGE) * stride_vs)[:, None] + offs_v[None, :],
            v,
            mask=moving[:, None] & (offs_v < V_DIM)[None, :],
        )
        kept += tl.sum(keep, 0)
    tl.store(lengths_ptr + row, kept)


def compact__triton(k: Tensor, v: Tensor, pages_BKM: Tensor, keep_BKS: Tensor, lengths_BK: Tensor) -> None:
    """The operator on a GPU."""
    _fake(k, v, pages_BKM, keep_BKS, lengths_BK)
    rows = lengths_BK.numel()
    if rows == 0:
        return
    launch(
        compact_kernel,
        (rows,),
        k,
        v,
        pages_BKM,
        keep_BKS.view(torch.int8),
        lengths_BK,
        k.shape[0],
        pages_BKM.shape[2],
        *k.stride()[:2],
        *v.stride()[:2],
        K_DIM=k.shape[2],
        V_DIM=v.shape[2],
        BLOCK_K=power_of_two(k.shape[2]),
        BLOCK_V=power_of_two(v.shape[2]),
        BLOCK_N=32,
        PAGE=k.shape[1],
        num_warps=4,
        num_stages=1,
    )


def compact__cpu(k: Tensor, v: Tensor, pages_BKM: Tensor, keep_BKS: Tensor, lengths_BK: Tensor) -> None:
    """The operator on a CPU."""
    _fake(k, v, pages_BKM, keep_BKS, lengths_BK)
    page = k.shape[1]
    given = Arguments("compact_", k.device)
    given.within("lengths", lengths_BK, 0, keep_BKS.shape[2])
    lengths = lengths_BK.view(-1)
    for row, (table, keep) in enumerate(zip(pages_BKM.flatten(0, 1), keep_BKS.flatten(0, 1), strict=True)):
        source = keep[: int(lengths[row])].nonzero().flatten()
        target = torch.arange(len(source))
        for cache in (k, v):
            cache[table[target // page].long(), target % page] = cache[table[source // page].long(), source % page]
        lengths[row] = len(source)


def _fake(k: Tensor, v: Tensor, pages_BKM: Tensor, keep_BKS: Tensor, lengths_BK: Tensor) -> None:
    given = Arguments("compact_", k.device)
    given.tensor("k", k, "P page H")
    given.tensor("v", v, "P page V")
    given.same_dtype(k=k, v=v)
    given.tensor("pages", pages_BKM, "B K M", (torch.int32,), dense=True)
    given.tensor("keep", keep_BKS, "B K S", (torch.bool,), dense=True)
    given.tensor("lengths", lengths_BK, "B K", (torch.int32,), dense=True)
    check_page(given, given["page"])
    if given["S"] != given["M"] * given["page"]:
        given.fail(f"keep has S = {given['S']} places, expected {given['M']} pages of {given['page']}")


compact_ = operator(
    "compact_(Tensor(a!) k, Tensor(b!) v, Tensor pages, Tensor keep, Tensor(c!) lengths) -> ()",
    cpu=compact__cpu,
    cuda=compact__triton,
    fake=_fake,
)
