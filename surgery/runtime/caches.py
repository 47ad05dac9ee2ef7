"""Which cache layers of ours stand in a cache of transformers: by the kind of a plan's `retain`, or of its `store`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from transformers import Cache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .coded_layer import CodedLayer
from .coded_pages import CodedRankedLayer
from .evicting_cache import EvictingLayer
from .layout import Codec, Dense, LayerPlan
from .page_pool import PagePool
from .paged_cache import PagedLayer
from .pooling_cache import PoolingLayer
from .quantised_cache import QuantisedLayer
from .ranked_cache import RankedLayer, join
from .static_quantised_cache import StaticQuantisedLayer


class MakeLayer(Protocol):
    """Makes the cache layer of one kind: a class, or a function."""

    def __call__(self, plan: LayerPlan, max_length: int | None = None) -> Any:
        """A layer for a dynamic cache, or for a static one of `max_length` tokens."""


PAGED: dict[str, type[PagedLayer]] = {
    "dmc": PoolingLayer,
    "dms": EvictingLayer,
    "evict": EvictingLayer,
    "ranked": RankedLayer,
}
"""`kind` of a `Retain` -> cache layer, in pages that the layers of a static cache share."""
CODED_PAGES = {"ranked": CodedRankedLayer}
"""The same of layers that are stored by a `Codec`."""


def paged_layer(plan: LayerPlan, pool: PagePool | None = None, max_length: int | None = None) -> PagedLayer:
    """The cache layer of a `Retain`."""
    assert plan.retain is not None
    if isinstance(plan.store, Codec):
        return CODED_PAGES[plan.retain.kind](plan.retain, plan.layer, pool, max_length, store=plan.store)
    return PAGED[plan.retain.kind](plan.retain, plan.layer, pool, max_length)


def quantised_layer(plan: LayerPlan, max_length: int | None = None) -> CodedLayer:
    """The cache layer of a `Codec`."""
    return QuantisedLayer(plan) if max_length is None else StaticQuantisedLayer(plan, max_length)


CACHE_LAYERS: dict[str, MakeLayer] = {"codec": quantised_layer}
"""`kind` of a `Store` -> what makes the cache layer, a `CacheLayerMixin` of transformers whose `update` gives back what
attention is to read. `dense` has none: it lies in transformers' own layers."""


def has_own_layer(plan: LayerPlan) -> bool:
    """Whether the layer's cache lies in a cache layer of ours."""
    return plan.owns_cache and (plan.retain is not None or plan.store.kind in CACHE_LAYERS)


def install_layers(cache: Cache, plans: Sequence[LayerPlan], ratio: float | None = None) -> None:
    """Give an empty dynamic or static cache of transformers layers of ours where `plans` ask for them; once.

    transformers picks layers of a cache by `config.layer_types`, which parents read as well to pick masks: a type of
    our own there would break them. So layers are put into each cache instead, before anything is written to it.
    A static cache has one pool of pages for all layers of a shape, so that layers which keep more may live on those
    which keep less.

    Args:
        plans: all layers of the model.
        ratio: size the pool of a static cache for this many tokens per slot; None: for the plans' own.

    Raises:
        ValueError: the cache has been written to, or its layers have a form that ours cannot replace.
    """
    own = [plan for plan in plans if has_own_layer(plan)]
    if all(is_installed(cache, plan) for plan in own):
        return
    if getattr(cache, "offloading", False):
        raise ValueError(
            "a cache of pages or codes cannot be offloaded: use cache_implementation 'dynamic' or 'static'"
        )
    while len(cache.layers) <= max(plan.layer for plan in own) and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    pools: dict[tuple[Any, ...], PagePool] = {}
    for plan in own:
        old = cache.layers[plan.layer]
        check_replaceable(old, plan)
        length = old.max_cache_len if isinstance(old, StaticLayer) else None
        if plan.retain is None:
            cache.layers[plan.layer] = CACHE_LAYERS[plan.store.kind](plan, length)
            continue
        pool = None
        if length is not None:
            shape = pool_shape(plan)
            pages = sum(_static_pages(p, length, ratio) for p in own if p.retain and pool_shape(p) == shape)
            pool = pools.setdefault(shape, PagePool(plan.retain.page, pages, ratio or plan.retain.ratio))
        cache.layers[plan.layer] = paged_layer(plan, pool, length)
    join(cache.layers)


def check_replaceable(layer: Any, plan: LayerPlan) -> None:
    """Refuse a layer of a cache that is neither ours nor one whose place ours can take.

    Raises:
        ValueError: it has been written to, or has a form that ours cannot replace.
    """
    plain = type(layer) in (DynamicLayer, StaticLayer)
    held = plan.store
    if isinstance(layer, CodedLayer | CodedRankedLayer):
        held = layer.store
    elif isinstance(layer, PagedLayer):
        held = Dense(dtype=plan.dtype)
    if held != plan.store:
        raise ValueError(
            f"layer {plan.layer}: the given cache stores it as {held.label() or held.dtype}, and its plan says "
            f"{plan.store.label() or plan.store.dtype}. Begin with an empty cache."
        )
    if isinstance(layer, PagedLayer) and plan.retain is not None and layer.retain != plan.retain:
        raise ValueError(
            f"layer {plan.layer}: the given cache keeps tokens by {layer.retain.label()}, and its plan says "
            f"{plan.retain.label()}, or other options of it. Begin with an empty cache."
        )
    if isinstance(layer, PagedLayer) and layer.passed_over:
        raise ValueError(
            f"layer {plan.layer}: the model was in training when tokens came with this cache, which keeps none of them "
            "then. Call model.eval() before the first ones, or pass use_cache=False and all tokens."
        )
    if _is_own(layer) or (plain and not layer.is_initialized):
        return
    why = "its tokens are averaged or leave" if plan.retain is not None else f"it is stored as {plan.store.label()}"
    raise ValueError(
        f"layer {plan.layer}: {why}, so it needs an empty dynamic or static cache, not "
        f"{'one written to as ' if plain else ''}{type(layer).__name__}. Caches that another model has filled, and "
        "prefixes (prefix tuning), were not written in that form; tune prompts or low-rank adapters instead."
    )


def is_installed(cache: Cache, plan: LayerPlan) -> bool:
    """Whether `install_layers` has been here."""
    return plan.layer < len(cache.layers) and _is_own(cache.layers[plan.layer])


def _is_own(layer: Any) -> bool:
    made = tuple(kind for kind in CACHE_LAYERS.values() if isinstance(kind, type))
    return isinstance(layer, (PagedLayer, CodedLayer, *made))


def pool_shape(plan: LayerPlan) -> tuple[Any, ...]:
    """Layers whose pages are alike share a pool."""
    assert plan.retain is not None
    return plan.retain.page, *plan.entry()[1:], plan.store


def _static_pages(plan: LayerPlan, tokens: int, ratio: float | None) -> int:
    assert plan.retain is not None
    return plan.retain.static_pages(tokens, plan.decisions, ratio)
