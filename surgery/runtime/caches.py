"""Which caches of transformers become ragged, and how large a static one is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import Any

from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .evicting_cache import EvictingLayer
from .layout import AHEAD, Heads, LayerPlan
from .page_pool import PagePool
from .paged_cache import RaggedLayer, table_of
from .pooling_cache import MergingLayer

_FORMS: dict[str, type[RaggedLayer]] = {"dmc": MergingLayer, "dms": EvictingLayer}
MARGIN = 0.1
"""Slots beyond those of the planned ratio that a static cache has room for."""


def make_ragged(cache: Cache, plans: Sequence[LayerPlan], ratio: float | None = None) -> None:
    """Give an empty dynamic or static cache of transformers ragged layers where `plans` ask for them; once.

    transformers picks layers of a cache by `config.layer_types`, which parents read as well to pick masks: a type of
    our own there would break them. So layers are put into each cache instead, before anything is written to it.
    A static cache has one pool of pages for all layers of a shape, so that layers which keep more may live on those
    which keep less.

    Args:
        plans: all layers of the model.
        ratio: size the pool of a static cache for this many tokens per slot; None: for the plans' own.

    Raises:
        ValueError: the cache has been written to, or its layers have a form that pages cannot replace.
    """
    merged = [plan for plan in plans if plan.retain is not None and plan.owner == plan.layer]
    if all(is_ragged(cache, plan.layer) for plan in merged):
        return
    if getattr(cache, "offloading", False):
        raise ValueError("a cache of pages cannot be offloaded: use cache_implementation 'dynamic' or 'static'")
    while len(cache.layers) <= max(plan.layer for plan in merged) and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    pools: dict[tuple[int, ...], PagePool] = {}
    for plan in merged:
        old = cache.layers[plan.layer]
        check_replaceable(old, plan)
        assert plan.retain is not None
        if isinstance(old, StaticLayer):
            shape = pool_shape(plan)
            pages = sum(static_pages(p, old.max_cache_len, ratio) for p in merged if pool_shape(p) == shape)
            pool = pools.setdefault(shape, PagePool(plan.retain.page, pages, ratio or plan.retain.ratio))
            new = _FORMS[plan.retain.method](plan.retain, plan.layer, pool, old.max_cache_len)
        else:
            new = _FORMS[plan.retain.method](plan.retain, plan.layer)
        cache.layers[plan.layer] = new


def check_replaceable(layer: Any, plan: LayerPlan) -> None:
    """Refuse a layer of a cache that is neither ragged nor one whose place pages can take.

    Raises:
        ValueError: it has been written to, or has a form that pages cannot replace.
    """
    plain = type(layer) in (DynamicLayer, StaticLayer)
    if isinstance(layer, RaggedLayer) or (plain and not layer.is_initialized):
        return
    raise ValueError(
        f"layer {plan.layer}: its tokens merge or leave, so it needs an empty dynamic or static cache, not "
        f"{'one written to as ' if plain else ''}{type(layer).__name__}. Caches that another model has filled, and "
        "prefixes (prefix tuning), say nothing of what its gates decide; tune prompts or low-rank adapters instead."
    )


def is_ragged(cache: Cache, layer: int) -> bool:
    """Whether `make_ragged` has been here."""
    return layer < len(cache.layers) and isinstance(cache.layers[layer], RaggedLayer)


def pool_shape(plan: LayerPlan) -> tuple[int, ...]:
    """Layers whose pages are alike share a pool."""
    assert plan.retain is not None and isinstance(plan.project, Heads)
    return plan.retain.page, plan.project.head_dim, plan.project.value_dim


def static_pages(plan: LayerPlan, tokens: int, ratio: float | None = None) -> int:
    """Pages of one sequence of a layer in a static cache for `tokens` tokens."""
    assert plan.retain is not None and isinstance(plan.project, Heads)
    merge = plan.retain if ratio is None else replace(plan.retain, ratio=ratio)
    slots = min(merge.slots_at(tokens) * (1 + MARGIN), tokens) + AHEAD
    return plan.project.kv_heads * (ceil(slots / merge.page) + 1)


def static_bytes(plans: Sequence[LayerPlan], tokens: int, ratio: float | None = None) -> int:
    """Bytes per sequence of the ragged layers of a static cache for `tokens` tokens, as `make_ragged` makes them."""
    merged = [plan for plan in plans if plan.retain is not None and plan.owner == plan.layer]
    pages = {p.layer: static_pages(p, tokens, ratio) for p in merged}
    order = 4 * sum(pages.values())
    return order + sum(p.bytes_of_pages(pages[p.layer], table_of(p.retain, tokens)) for p in merged if p.retain)
