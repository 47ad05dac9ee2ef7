"""Attention of a few query rows on a CPU, for the operators that decode."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .launching import ceil_div

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # found once: it is called for every row


def attend(
    q_BKGH: Tensor, k_BKSH: Tensor, v_BKSV: Tensor, scale: float, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of G query rows per KV head on a CPU, nothing repeated: [B, K, G, V] and log-sum-exp [B, K, G]."""
    B, K, G, _ = q_BKGH.shape
    S = k_BKSH.shape[2]
    mask = None
    if hidden is not None:
        mask = torch.zeros(hidden.shape, dtype=q_BKGH.dtype).masked_fill_(hidden, -torch.inf)
    if S == 0 or k_BKSH.shape[-1] != v_BKSV.shape[-1] or (hidden is not None and bool(hidden.all(-1).any())):
        return attend_plainly(q_BKGH, k_BKSH, v_BKSV, scale, hidden)
    chunks = _chunks(B * K, S)
    if chunks == 1 or mask is not None:
        shape = None if mask is None else mask.expand(B, 1, G, S)
        return _flash(q_BKGH, k_BKSH, v_BKSV, attn_mask=shape, scale=scale)
    # Too few sequences for the cores, which share out batch and heads: parts of each sequence stand in the batch.
    size = S // chunks
    whole = chunks * size
    rows = q_BKGH.repeat_interleave(chunks, dim=1)
    parts, part_lse = _flash(
        rows,
        k_BKSH[:, :, :whole].unflatten(2, (chunks, size)).flatten(1, 2),
        v_BKSV[:, :, :whole].unflatten(2, (chunks, size)).flatten(1, 2),
        scale=scale,
    )
    parts, part_lse = parts.unflatten(1, (K, chunks)), part_lse.unflatten(1, (K, chunks))
    if whole < S:
        rest, rest_lse = attend_plainly(q_BKGH, k_BKSH[:, :, whole:], v_BKSV[:, :, whole:], scale, None)
        parts, part_lse = torch.cat((parts, rest[:, :, None]), 2), torch.cat((part_lse, rest_lse[:, :, None]), 2)
    lse = torch.logsumexp(part_lse, dim=2)
    weight = torch.exp(part_lse - lse[:, :, None])
    return (weight[..., None] * parts).sum(2).to(q_BKGH.dtype), lse


def attend_plainly(
    q_BKGH: Tensor, k_BKSH: Tensor, v_BKSV: Tensor, scale: float, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    scores = torch.matmul(q_BKGH.float(), k_BKSH.transpose(2, 3).float()) * scale
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None])
    return torch.matmul(weights, v_BKSV.float()).to(v_BKSV.dtype), lse


def _chunks(rows: int, length: int) -> int:
    threads = torch.get_num_threads()
    return 1 if rows >= threads else max(1, min(ceil_div(threads, rows), length // 512))


def slices(
    lengths: Tensor | None, visible: Tensor | None, batch: int, capacity: int
) -> Iterator[tuple[slice, slice, int, int]]:
    """(sequences, KV heads, first token, end) that cover everything: one where all are equal."""
    everything = slice(None)
    if lengths is not None and lengths.ndim == 2 and bool((lengths != lengths[:, :1]).any()):
        for b, row in enumerate(lengths.tolist()):
            yield from ((slice(b, b + 1), slice(kv, kv + 1), 0, end) for kv, end in enumerate(row))
        return
    ends = [capacity] * batch if lengths is None else (lengths if lengths.ndim == 1 else lengths[:, 0]).tolist()
    begins = [0] * batch if visible is None else visible.byte().argmax(1).tolist()
    bounds = [(min(begin, end), end) for begin, end in zip(begins, ends, strict=True)]
    if len(set(bounds)) == 1:
        yield everything, everything, *bounds[0]
    else:
        yield from ((slice(b, b + 1), everything, begin, end) for b, (begin, end) in enumerate(bounds))
