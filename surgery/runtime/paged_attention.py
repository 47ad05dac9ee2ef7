"""Queries of a gated attention against its paged cache: one token through the pages, several through a `Chunk`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import SurgeryAttention
from .functions import eager_attention_forward, weights_of
from .ops import AVAILABLE, ragged_attention_forward
from .paged_cache import PagedLayer
from .reading import Few
from .slots import Chunk, Shift, Slots

_BLOCK = 256
"""Queries at once: slots that they have outlived are left out for the next ones."""
Read = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class _Reading(NamedTuple):
    """How queries read slots; see `attend`."""

    attention: SurgeryAttention
    scale: float
    plain: bool
    kv_of_query: Tensor | None
    view: Read | None
    expand: Read | None
    cap: Cap | None


class Cap(NamedTuple):
    """Slots further away than that are seen at that distance: their keys, or queries, are turned for it."""

    distance: int
    shift: Shift


def attend(
    attention: SurgeryAttention,
    query_BNTH: Tensor,
    seen: PagedLayer | Chunk,
    scale: float,
    plain: bool,
    *,
    kv_of_query: Tensor | None = None,
    view: Read | None = None,
    expand: Read | None = None,
    cap: Cap | None = None,
) -> Tensor:
    """Head outputs [B, T, N, V].

    Args:
        attention: whose soft cap and sinks count where `plain` is False.
        query_BNTH: rotated. Groups of one size, side by side, read the KV heads in order.
        seen: what the owner of the cache has left for this pass.
        plain: a softmax over scores and nothing else.
        kv_of_query: the KV head that each query head reads, where groups are of another form.
        view: from what slots hold as keys and as values, [..., .] each, the channels that are K and V.
        expand: from what slots hold, [B, 1, S, .] each, K and V of several KV heads.
        cap: of slots that know the order of their tokens.
    """
    reading = _Reading(attention, scale, plain, kv_of_query, view, expand, cap)
    if isinstance(seen, PagedLayer):
        if cap is not None:
            slots = seen.slots()
            visible = _visible(slots, (slots.expires_BKS > 0)[:, :, None], query_BNTH.dtype)
            return _capped(reading, query_BNTH, slots, visible, seen.tokens[:, None] - 1)
        few = seen.chosen(query_BNTH, kv_of_query, scale)
        if isinstance(few, Few):
            out = _blend(reading, query_BNTH, few.key_BKSH, few.value_BKSV, few.there_BKS[:, :, None])
            index = torch.arange(query_BNTH.shape[1], device=out.device) * few.rest_BKV.shape[1] // query_BNTH.shape[1]
            rest = few.rest_BKV.index_select(1, index if kv_of_query is None else kv_of_query)
            part = few.part_BN[..., None]
            return (out[:, 0] * part + rest * (1 - part)).to(out.dtype)[:, None]
        seen = few
        if plain and AVAILABLE and expand is None and seen.has_plain_pages:
            return _through_pages(reading, query_BNTH, seen)
        key, value, there = seen.side_by_side()
        visible, heavy = there[:, :, None], seen.heavy()
        if heavy is not None:
            at = torch.arange(there.shape[2], device=there.device) == heavy[0]
            visible = _counted(visible, heavy[1][..., None] * at, query_BNTH.dtype)
        return _blend(reading, query_BNTH, key, value, visible)
    return _attend_chunk(reading, query_BNTH, seen)


@torch.compiler.disable(reason="what is left of a chunk decides about shapes")
def _attend_chunk(reading: _Reading, query_BNTH: Tensor, seen: Chunk) -> Tensor:
    near = reading.cap is None or query_BNTH.shape[2] <= reading.cap.distance
    if reading.plain and near and _is_causal(seen):
        return _blend(reading, query_BNTH, seen.new.key_BKSH, seen.new.value_BKSV, None)
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
        visible, query = _visible(slots, visible, query_BNTH.dtype), query_BNTH[:, :, begin:end]
        if reading.cap is not None:
            parts.append(_capped(reading, query, slots, visible, seen.order_BT[:, begin:end]))
        else:
            parts.append(_blend(reading, query, slots.key_BKSH, slots.value_BKSV, visible))
        if end < T:
            slots = slots.live(seen.order_BT[:, end - 1])
    return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]


def _is_causal(chunk: Chunk) -> bool:
    """Nothing came before, and nothing is hidden: the first tokens of a sequence in which none merges or leaves."""
    if len(chunk.old) or chunk.real_BT is not None:
        return False
    return not bool((chunk.new.expires_BKS <= chunk.order_BT[:, None, -1:]).any())


def _through_pages(reading: _Reading, query_BN1H: Tensor, layer: PagedLayer) -> Tensor:
    tables, lengths = layer.tables, layer.lengths
    if reading.kv_of_query is not None:
        tables, lengths = (t.index_select(1, reading.kv_of_query) for t in (tables, lengths))
    keys, values = layer.pool.keys, layer.pool.values
    if reading.view is not None:
        keys, values = reading.view(keys, values)
    q, heavy = query_BN1H.detach()[:, :, 0], layer.heavy()
    out, sums = ragged_attention_forward(q, keys, values, tables, lengths, reading.scale)
    if heavy is not None:
        place, more = heavy
        more = more if reading.kv_of_query is None else more.index_select(1, reading.kv_of_query)
        page = tables[..., place // keys.shape[1]].long()
        key, value = (t[page, place % t.shape[1]] for t in (keys, values))  # [B, K, .]
        group = q.shape[1] // key.shape[1]
        key, value, more = (t.repeat_interleave(group, dim=1) for t in (key, value, more))
        # Of the slot it has counted one token: what the others add to the sum of the softmax, as a part of all.
        logit = (q.float() * key.float()).sum(-1) * reading.scale
        part = torch.sigmoid(logit + more.log() - sums)[..., None]
        blended = (out.float() * (1 - part) + value.float() * part).to(out.dtype)
        out = torch.where(more[..., None] > 0, blended, out)  # where nothing has left, the slot may not be there
    return out[:, None]


def _counted(visible_BKTS: Tensor, more_BKS: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores where slots stand for more tokens than one."""
    weight = more_BKS.log1p().to(dtype)[:, :, None]
    return torch.where(visible_BKTS, weight, torch.finfo(dtype).min)


def _visible(slots: Slots, visible_BKTS: Tensor, dtype: torch.dtype) -> Tensor:
    return visible_BKTS if slots.more_BKS is None else _counted(visible_BKTS, slots.more_BKS, dtype)


def _capped(reading: _Reading, query: Tensor, slots: Slots, visible_BKTS: Tensor, order_BT: Tensor) -> Tensor:
    """[B, T, N, V], where no slot is seen further away than `reading.cap` says.

    Of far slots, queries are turned back to the first one's position, and keys to the distance before that: scores
    depend on differences of positions alone.

    Source: LM-Infinite, arXiv:2308.16137.
    """
    assert reading.cap is not None
    distance, shift = reading.cap
    N, first_B1 = query.shape[1], order_BT[:, :1]
    heads = torch.arange(N, device=query.device) * slots.key_BKSH.shape[1] // N
    heads = heads if reading.kv_of_query is None else reading.kv_of_query
    far_key = shift(slots.key_BKSH, first_B1[..., None] - distance - slots.born_BKS)
    far_query = shift(query, (first_B1 - order_BT)[:, None].expand(-1, N, -1))
    far = order_BT[:, None, :, None] - slots.born_BKS[:, :, None] > distance
    far, key, far_key, value, visible = (
        x.index_select(1, heads) for x in (far, slots.key_BKSH, far_key, slots.value_BKSV, visible_BKTS)
    )
    scores = torch.where(far, far_query @ far_key.mT, query @ key.mT) * reading.scale
    softcap, sinks_N = (None, None) if reading.plain else (reading.attention.site.softcap, reading.attention.sinks)
    sinks = None if sinks_N is None else sinks_N.view(1, -1, 1, 1)
    return (weights_of(scores, visible, softcap, sinks) @ value).transpose(1, 2)


def _blend(reading: _Reading, query: Tensor, key: Tensor, value: Tensor, visible_BKTS: Tensor | None) -> Tensor:
    """[B, T, N, V]; `visible_BKTS`: which slots are seen, or what is added to scores; None for causality alone."""
    attention, N = reading.attention, query.shape[1]
    if reading.kv_of_query is not None:
        index = reading.kv_of_query
        key, value = key.index_select(1, index), value.index_select(1, index)
        visible_BKTS = None if visible_BKTS is None else visible_BKTS.index_select(1, index)
    for read in (reading.view, reading.expand):
        key, value = (key, value) if read is None else read(key, value)
    if not reading.plain:
        assert visible_BKTS is not None
        group = N // visible_BKTS.shape[1]
        mask = visible_BKTS.expand(-1, -1, query.shape[2], -1).repeat_interleave(group, dim=1)
        softcap, sinks = attention.site.softcap, attention.sinks
        # One head may stand for all of those that the attention repeats.
        key, value = (t.expand(-1, N // attention.num_key_value_groups, -1, -1) for t in (key, value))
        return eager_attention_forward(attention, query, key, value, mask, reading.scale, softcap=softcap, s_aux=sinks)[
            0
        ]
    # Heads that read one KV head stand side by side, and the mask is made for all of them once.
    kv_heads = key.shape[1]
    group = N // kv_heads
    q = query.unflatten(1, (kv_heads, group)).flatten(0, 1)
    k, v = (t.flatten(0, 1)[:, None].expand(-1, group, -1, -1) for t in (key, value))
    seen = None
    if visible_BKTS is not None:
        seen = visible_BKTS.expand(-1, kv_heads, -1, -1).flatten(0, 1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, is_causal=seen is None, scale=reading.scale)
    return out.unflatten(0, (-1, kv_heads)).flatten(1, 2).transpose(1, 2)
