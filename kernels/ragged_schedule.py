"""`ragged_schedule`: share out sequences and heads of unequal length evenly among a fixed number of programs.

The pages of all rows (sequence, KV head) stand in one line, and each program takes an equal stretch of it. One launch,
on the device, serves all layers of a step. A plan is int32 [R + 2 + C]: pages before each row and their total [R + 1],
pages per program, and the row in which each program begins [C].
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launching import Device, jit, launch, power_of_two, tl
from .library import Arguments, operator

SMALLEST_SHARE = 256
"""Tokens per program; below that the partial results cost more than the parallelism gives."""


def programs_for(device: Device, per_multiprocessor: int = 2) -> int:
    """Programs that fill a device."""
    return device.multiprocessors * per_multiprocessor


def ragged_schedule_reference(lengths_LR: Tensor, programs: int, page: int) -> Tensor:
    """Plans [L, R + 2 + C], row by row."""
    plans = []
    for lengths in lengths_LR.tolist():
        before = [0]
        for length in lengths:
            before.append(before[-1] + -(-max(length, 0) // page))
        share = max(-(-before[-1] // programs), -(-SMALLEST_SHARE // page))
        first = [sum(end <= c * share for end in before[1:]) for c in range(programs)]
        plans.append([*before, share, *first])
    return torch.tensor(plans, dtype=torch.int32, device=lengths_LR.device)


@jit
def ragged_schedule_kernel(  # type: ignore[no-untyped-def]
    lengths_ptr,
    plan_ptr,
    rows,
    programs,
    PAGE: tl.constexpr,
    LEAST: tl.constexpr,  # pages per program
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    offs_r = tl.arange(0, BLOCK_R)
    length = tl.load(lengths_ptr + layer * rows + offs_r, mask=offs_r < rows, other=0)
    ends = tl.cumsum(tl.cdiv(tl.maximum(length, 0), PAGE), 0)
    total = tl.max(ends, 0)
    share = tl.maximum(tl.cdiv(total, programs), LEAST)
    plan = plan_ptr + layer * (rows + 2 + programs)
    tl.store(plan, 0)
    tl.store(plan + 1 + offs_r, ends, mask=offs_r < rows)
    tl.store(plan + rows + 1, share)
    for start in range(0, programs, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        passed = (ends[None, :] <= (c * share)[:, None]) & (offs_r < rows)[None, :]
        tl.store(plan + rows + 2 + c, tl.sum(passed.to(tl.int32), 1), mask=c < programs)


def ragged_schedule_triton(lengths: Tensor, programs: int, page: int) -> Tensor:
    """The operator on a GPU."""
    plan = _fake(lengths, programs, page)
    L, rows = lengths.shape[0], lengths.shape[1] * lengths.shape[2]
    if L:
        launch(
            ragged_schedule_kernel,
            (L,),
            lengths,
            plan,
            rows,
            programs,
            PAGE=page,
            LEAST=-(-SMALLEST_SHARE // page),
            BLOCK_R=power_of_two(max(rows, 2)),
            BLOCK_C=16,
            num_warps=8,
        )
    return plan


def ragged_schedule_cpu(lengths: Tensor, programs: int, page: int) -> Tensor:
    """The operator on a CPU."""
    plan = _fake(lengths, programs, page)
    rows = lengths.shape[1] * lengths.shape[2]
    pages = (lengths.flatten(1).clamp(min=0) + page - 1) // page
    ends = pages.cumsum(1, dtype=torch.int32)
    total = ends[:, -1:] if rows else ends.new_zeros(len(ends), 1)
    share = ((total + programs - 1) // programs).clamp(min=-(-SMALLEST_SHARE // page))
    starts = torch.arange(programs, dtype=torch.int32) * share
    plan[:, 0] = 0
    plan[:, 1 : rows + 1] = ends
    plan[:, rows + 1 : rows + 2] = share
    plan[:, rows + 2 :] = torch.searchsorted(ends, starts, right=True)
    return plan


def _fake(lengths: Tensor, programs: int, page: int) -> Tensor:
    given = Arguments("ragged_schedule", lengths.device)
    given.tensor("lengths", lengths, "L B K", (torch.int32,), dense=True)
    if programs < 1:
        given.fail(f"programs is {programs}, expected at least 1")
    check_page(given, page)
    rows = given["B"] * given["K"]
    if rows > 8192:
        given.fail(f"lengths has B * K = {rows} rows, expected at most 8192")
    return lengths.new_empty(given["L"], rows + 2 + programs)


def check_page(given: Arguments, page: int) -> None:
    """Pages are a power of two of tokens, so that a tile lies in one."""
    if page < 16 or page & (page - 1):
        given.fail(f"pages have {page} tokens, expected a power of two from 16")


ragged_schedule = operator(
    "ragged_schedule(Tensor lengths, int programs, int page) -> Tensor",
    cpu=ragged_schedule_cpu,
    cuda=ragged_schedule_triton,
    fake=_fake,
)
