"""`combine`: softmax means over parts of a sequence become the mean over the whole, by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from .launching import jit, launch, power_of_two, tl
from .library import FLOATS, Arguments, operator


def combine_reference(partial_RPGV: Tensor, lse_RPG: Tensor) -> tuple[Tensor, Tensor]:
    """Means [R, G, V] and log-sum-exp [R, G] in float64; a row without any part that saw tokens is 0 and -inf."""
    lse = lse_RPG.double()
    total = torch.logsumexp(lse, dim=1)
    weight = torch.where(lse == -torch.inf, 0.0, torch.exp(lse - total[:, None]))
    parts = torch.where(weight[..., None] == 0, 0.0, partial_RPGV.double())
    return (weight[..., None] * parts).sum(1), total


@jit
def combine_kernel(  # type: ignore[no-untyped-def]
    partial_ptr,
    partial_lse_ptr,
    out_ptr,
    lse_ptr,
    plan_ptr,  # ragged: running number of pages by row [rows + 1], pages per program
    parts,
    GROUP: tl.constexpr,
    V_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    RAGGED: tl.constexpr,
):
    LOG2E: tl.constexpr = 1.4426950408889634
    row = tl.program_id(0)
    g = tl.program_id(1)
    if RAGGED:
        begin = tl.load(plan_ptr + row)
        end = tl.load(plan_ptr + row + 1)
        per_program = tl.load(plan_ptr + tl.num_programs(0) + 1)
        first = begin // per_program + row
        count = tl.where(end > begin, (end - 1) // per_program - begin // per_program + 1, 0)
    else:
        first = row * parts
        count = parts
    offs_p = tl.arange(0, BLOCK_P)
    offs_v = tl.arange(0, BLOCK_V)
    m = float("-inf")
    total = 0.0
    acc = tl.zeros([BLOCK_V], dtype=tl.float32)
    for start in range(0, count, BLOCK_P):
        valid = start + offs_p < count
        part = (first + start + offs_p).to(tl.int64) * GROUP + g
        lse = tl.load(partial_lse_ptr + part, mask=valid, other=float("-inf")) * LOG2E
        high = tl.maximum(m, tl.max(lse, 0))
        # -inf minus -inf is NaN: parts that saw no token.
        base = tl.where(high == float("-inf"), 0.0, high)
        weight = tl.exp2(lse - base)
        seen = valid & (lse > float("-inf"))
        o = tl.load(
            partial_ptr + part[:, None] * V_DIM + offs_v[None, :],
            mask=seen[:, None] & (offs_v < V_DIM)[None, :],
            other=0.0,
        )
        rescale = tl.exp2(m - base)
        acc = acc * rescale + tl.sum(weight[:, None] * o, 0)
        total = total * rescale + tl.sum(weight, 0)
        m = high
    empty = total == 0.0
    total = tl.where(empty, 1.0, total)
    out_row = row.to(tl.int64) * GROUP + g
    tl.store(out_ptr + out_row * V_DIM + offs_v, (acc / total).to(out_ptr.dtype.element_ty), mask=offs_v < V_DIM)
    tl.store(lse_ptr + out_row, tl.where(empty, float("-inf"), (m + tl.log2(total)) / LOG2E))


def launch_combine(
    partial_RPGV: Tensor,
    partial_lse: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    rows: int,
    group: int,
    parts: int,
    plan: Tensor | None = None,
) -> None:
    """Fill `out` and `lse`; with `plan`, the parts of a row lie where `decode_ragged` puts them."""
    width = out.shape[-1]
    launch(
        combine_kernel,
        (rows, group),
        partial_RPGV,
        partial_lse,
        out,
        lse,
        partial_lse if plan is None else plan,
        parts,
        GROUP=group,
        V_DIM=width,
        BLOCK_V=power_of_two(width),
        BLOCK_P=16,
        RAGGED=plan is not None,
        num_warps=4,
    )


def combine_triton(partial_RPGV: Tensor, lse_RPG: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The operator on a GPU."""
    out, lse = _combine_fake(partial_RPGV, lse_RPG, dtype)
    R, P, G, _ = partial_RPGV.shape
    if R:
        launch_combine(partial_RPGV, lse_RPG, out, lse, rows=R, group=G, parts=P)
    return out, lse


def combine_cpu(partial_RPGV: Tensor, lse_RPG: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The operator on a CPU."""
    _check(partial_RPGV, lse_RPG, dtype)
    total = torch.logsumexp(lse_RPG, dim=1)
    weight = torch.exp(lse_RPG - total[:, None]).masked_fill_(lse_RPG == -torch.inf, 0.0)
    parts = partial_RPGV.masked_fill(weight[..., None] == 0, 0.0)
    return (weight[..., None] * parts).sum(1).to(dtype), total


def _combine_fake(partial_RPGV: Tensor, lse_RPG: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    _check(partial_RPGV, lse_RPG, dtype)
    R, _, G, V = partial_RPGV.shape
    return partial_RPGV.new_empty(R, G, V, dtype=dtype), partial_RPGV.new_empty(R, G)


def _check(partial_RPGV: Tensor, lse_RPG: Tensor, dtype: torch.dtype) -> None:
    given = Arguments("combine", partial_RPGV.device)
    given.tensor("partial", partial_RPGV, "R P G V", (torch.float32,), dense=True)
    given.tensor("lse", lse_RPG, "R P G", (torch.float32,), dense=True)
    if dtype not in FLOATS:
        given.fail(f"dtype is {dtype}, expected bfloat16, float16 or float32")


combine = operator(
    "combine(Tensor partial, Tensor lse, ScalarType dtype) -> (Tensor, Tensor)",
    cpu=combine_cpu,
    cuda=combine_triton,
    fake=_combine_fake,
)
