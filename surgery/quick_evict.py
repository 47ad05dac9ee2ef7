"""Eviction in stock models: a cache layer that sees queries, by an attention function that hands them to it."""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from .errors import PlanError
from .plan import Plan
from .runtime.calling import by_name, take_cache
from .runtime.coded_pages import CodedRankedLayer
from .runtime.layout import Codec, Ranked
from .runtime.masks import real_of_new
from .runtime.paged_attention import attend
from .runtime.queries import Queries
from .runtime.ranked_cache import RankedLayer, join
from .runtime.rankers import RANKERS
from .runtime.rehearsal import rehearse
from .runtime.separators import separators_among
from .runtime.slots import New

NAME = "surgery_evict"
_MARK = "surgery_layer"
_passes: WeakKeyDictionary[nn.Module, set[int]] = WeakKeyDictionary()
"""Model -> ids of the caches, by their first layer, of passes that run now: those of several threads."""
_lock = Lock()


class StockRankedLayer(RankedLayer):
    """A `RankedLayer` under attention of transformers: `update` keeps keys and values until their queries come.

    The keys that it returns are marked, and `evicting_attention` knows them by that mark.
    """

    mask: Tensor | None = None
    """Of the next call: [B, S], 0 at padding, or of four dimensions; None without padding."""
    separators_BT: Tensor | None = None
    """Of the next call: which of its tokens separate parts of the text, where the score asks for that."""
    waits = False
    """Whether keys came, and no queries yet."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.waits:
            raise RuntimeError(
                f"layer {self.layer}: nobody asked for the keys that came last: this cache belongs to another model. "
                "Make one for each: surgery.cache(model, evict=...)."
            )
        self.waits = True
        marked = key_states.view_as(key_states)
        setattr(marked, _MARK, self)
        return marked, value_states

    def attend(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Head outputs [B, T, N, V] of new tokens, whose keys and values are stored."""
        B, T, past = len(key), key.shape[2], int(self.seen)
        real = None if self.mask is None else real_of_new(self.mask, past, T, B)
        if self.mask is None and self.has_padding:
            raise ValueError(
                f"layer {self.layer}: no attention mask came, but the cache was given padding before. Pass the "
                "attention mask of all tokens so far."
            )
        new = New(
            key_BKTH=key,
            value_BKTV=value,
            logits_BKT=key.new_full(key.shape[:3], -1.0, dtype=torch.float32),
            weight_BKT=None,
            real_BT=real,
            turn=lambda x: x,
            queries=Queries(query_BNTH=query.detach(), real_BT=real, scale=scale, separators_BT=self.separators_BT),
        )
        self.waits = False
        return attend(module, query, self.add(new), scale, True)  # type: ignore[arg-type]


class CodedStockLayer(StockRankedLayer, CodedRankedLayer):
    """The same with pages of codes."""


def evicting_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """sdpa, but for keys that a `StockRankedLayer` has marked: those are stored with their queries, and slots leave."""
    layer = getattr(key, _MARK, None)
    if layer is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return layer.attend(module, query, key, value, scale), None


AttentionInterface.register(NAME, evicting_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)


def put_layers(cache: DynamicCache, model: PreTrainedModel, plan: Plan) -> None:
    """Give `cache` the layers of `plan`, and `model` hooks that let its attention hand queries to them.

    Raises:
        PlanError: the score needs what the attention function is not told, or the model has no such function.
    """
    planned = [layer for layer in plan.after if isinstance(layer.retain, Ranked)]
    for site, layer in zip(plan.anatomy.sites, plan.after, strict=True):
        if not isinstance(layer.retain, Ranked):
            continue
        ranker = RANKERS[layer.retain.scorer]
        if ranker.plain_queries or ranker.output_norms:
            what = "queries before their rotation" if ranker.plain_queries else "W_o"
            raise PlanError(
                f"{layer.retain.scorer} reads {what}, which attention functions of transformers are not given. Convert "
                "the model with the step evict."
            )
        if layer.retain.turns_keys:
            raise PlanError(
                f"positions: {layer.retain.positions} turns keys further, which attention functions of transformers do "
                "not. Convert the model with the step evict."
            )
        if site.softcap is not None or site.sinks is not None:
            raise PlanError(
                f"layer {layer.layer}: its scores are capped or have sinks, which sdpa does not compute. Convert the "
                "model with the step evict."
            )
    implementation = _text_config(model)._attn_implementation
    if implementation not in ("sdpa", NAME):  # ours while another thread is in a pass
        raise PlanError(
            f"{type(model).__name__} runs with attn_implementation {implementation!r}: queries reach the cache through "
            "a function in the place of 'sdpa'. Load the model with that, or convert it with the step evict."
        )
    for layer in planned:
        assert isinstance(layer.retain, Ranked)
        cache.layers[layer.layer] = (
            CodedStockLayer(layer.retain, layer.layer, store=layer.store)
            if isinstance(layer.store, Codec)
            else StockRankedLayer(layer.retain, layer.layer)
        )
    join(cache.layers)
    if _begin not in model._forward_pre_hooks.values():  # copies of a model have its hooks
        model.register_forward_pre_hook(_begin, with_kwargs=True)
        model.register_forward_hook(_end, with_kwargs=True, always_call=True)


def _text_config(model: Any) -> Any:
    return model.config.get_text_config(decoder=True)


def _evicting(cache: Any) -> Sequence[StockRankedLayer]:
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, StockRankedLayer)]


def _begin(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass with a cache that evicts: attention hands its queries to it, while such passes run."""
    layers = _evicting(take_cache(by_name(model, args, kwargs)))
    for layer in layers:
        layer.waits = False  # of a pass that was broken off
        if layer.retain.reads_separators:
            layer.separators_BT = separators_among(layer.retain.separators, args, kwargs)
    if layers:
        with _lock:
            _passes.setdefault(model, set()).add(id(layers[0]))
            _text_config(model)._attn_implementation = NAME


def _end(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """After it, also where it failed: as before; refuse a model whose attention did not come for keys that it stored.

    Raises:
        RuntimeError: names the layer.
    """
    layers = _evicting(take_cache(by_name(model, args, kwargs)))
    if layers:
        with _lock:
            running = _passes.get(model, set())
            running.discard(id(layers[0]))
            if not running:
                _text_config(model)._attn_implementation = "sdpa"
    for layer in layers if output is not None else ():
        if layer.waits:
            raise RuntimeError(
                f"layer {layer.layer}: {type(model).__name__} stored keys in a cache that evicts, and its attention "
                "handed it no queries: it does not run by `attn_implementation`. Convert the model with the step evict."
            )
    if layers and output is not None:
        rehearse(model, args, kwargs, output)
