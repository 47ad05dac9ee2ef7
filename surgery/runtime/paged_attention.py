"""Queries of a gated attention against its paged cache: one token through the pages, several through a `Chunk`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import SurgeryAttention
from .functions import eager_attention_forward
from .layout import Heads
from .ops import AVAILABLE, ragged_attention_forward
from .paged_cache import PagedLayer
from .slots import Chunk

_BLOCK = 256
"""Queries at once: slots that they have outlived are left out for the next ones."""


def attend(
    attention: SurgeryAttention, query_BNTH: Tensor, seen: PagedLayer | Chunk, heads: Heads, scale: float, plain: bool
) -> Tensor:
    """Head outputs [B, T, N, V].

    Args:
        attention: whose soft cap and sinks count where `plain` is False.
        query_BNTH: rotated.
        seen: what the owner of the cache has left for this pass.
        plain: a softmax over scores and nothing else.
    """
    if isinstance(seen, PagedLayer):
        if plain and AVAILABLE:
            return _through_pages(query_BNTH, seen, heads, scale)
        key, value, there = seen.side_by_side()
        return _blend(attention, query_BNTH, key, value, there[:, :, None], heads, scale, plain)
    return _attend_chunk(attention, query_BNTH, seen, heads, scale, plain)


@torch.compiler.disable(reason="what is left of a chunk decides about shapes")
def _attend_chunk(
    attention: SurgeryAttention, query_BNTH: Tensor, seen: Chunk, heads: Heads, scale: float, plain: bool
) -> Tensor:
    if plain and _is_causal(seen):
        key, value = seen.new.key_BKSH, seen.new.value_BKSV
        return _blend(attention, query_BNTH, key, value, None, heads, scale, plain)
    T = query_BNTH.shape[2]
    block = _BLOCK if seen.in_step else T
    slots, parts = seen.old, []
    for begin in range(0, T, block):
        end = min(begin + block, T)
        here = seen.new.cut(begin, end)
        order = seen.order_BT[:, None, begin:end, None]
        visible = order < torch.cat((slots.expires_BKS, here.expires_BKS), dim=2)[:, :, None]
        causal = seen.new_order_BT[:, None, None, begin:end] <= order
        visible[..., len(slots) :] &= causal
        slots = slots.and_(here)
        if seen.real_BT is not None:
            # Padding before all tokens sees none of them, but it has to see something.
            visible[..., 0] |= ~visible.any(-1)
        key, value = slots.key_BKSH, slots.value_BKSV
        parts.append(_blend(attention, query_BNTH[:, :, begin:end], key, value, visible, heads, scale, plain))
        if end < T:
            slots = slots.live(seen.order_BT[:, end - 1])
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _is_causal(chunk: Chunk) -> bool:
    """Nothing came before, and nothing is hidden: the first tokens of a sequence in which none merges or leaves."""
    if len(chunk.old) or chunk.real_BT is not None:
        return False
    return not bool((chunk.new.expires_BKS <= chunk.order_BT[:, None, -1:]).any())


def _through_pages(query_BN1H: Tensor, layer: PagedLayer, heads: Heads, scale: float) -> Tensor:
    tables, lengths = layer.tables, layer.lengths
    if not heads.is_uniform:
        index = _kv_of_query(heads, tables.device)
        tables, lengths = tables.index_select(1, index), lengths.index_select(1, index)
    q = query_BN1H.detach()[:, :, 0]
    return ragged_attention_forward(q, layer.pool.keys, layer.pool.values, tables, lengths, scale)[:, None]


def _blend(
    attention: SurgeryAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible_BKTS: Tensor | None,
    heads: Heads,
    scale: float,
    plain: bool,
) -> Tensor:
    """[B, T, N, V]; `visible_BKTS`: None for causality alone."""
    kv_heads = heads.kv_heads
    if not heads.is_uniform:
        index, kv_heads = _kv_of_query(heads, key.device), query.shape[1]
        key, value = key.index_select(1, index), value.index_select(1, index)
        visible_BKTS = None if visible_BKTS is None else visible_BKTS.index_select(1, index)
    group = query.shape[1] // kv_heads
    if not plain:
        assert visible_BKTS is not None
        mask = visible_BKTS.expand(-1, -1, query.shape[2], -1).repeat_interleave(group, dim=1)
        softcap, sinks = attention.site.softcap, attention.sinks
        return eager_attention_forward(attention, query, key, value, mask, scale, softcap=softcap, s_aux=sinks)[0]
    # Heads that read one KV head stand side by side, and the mask is made for all of them once.
    q = query.unflatten(1, (kv_heads, group)).flatten(0, 1)
    k, v = (t.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for t in (key, value))
    seen = None if visible_BKTS is None else visible_BKTS.flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=scale)
    return out.unflatten(0, (-1, kv_heads)).flatten(1, 2).transpose(1, 2)


def _kv_of_query(heads: Heads, device: torch.device) -> Tensor:
    reads = {query: kv for kv, group in enumerate(heads.groups) for query in group}
    return torch.tensor([reads[query] for query in range(len(reads))], device=device)
