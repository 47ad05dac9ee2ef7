"""Quantised caches without a conversion: for `generate` of a stock model, or as a model that makes its own."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from .convert import convert
from .errors import PlanError
from .plan import plan
from .recipe import Recipe
from .runtime.calling import take_cache
from .runtime.coded_layer import prepare
from .runtime.layout import Codec
from .runtime.modeling import SurgeryMixin
from .runtime.quantised_cache import QuantisedLayer
from .runtime.static_quantised_cache import StaticQuantisedLayer

_TELLING: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that tell their caches which tokens are padding."""


def cache(
    model: PreTrainedModel, codec: str = "int4", *, max_cache_len: int | None = None, **options: Any
) -> DynamicCache | StaticCache:
    """An empty quantised cache for a stock model; pass it to `generate` as `past_key_values` (`cache` from 5.24 on).

    Layers with a sliding window keep it as it is. K and V are decoded for each layer in turn: it saves memory, and
    `quantise_cache` is faster. The model gets one hook, which tells its quantised caches what is padding.

    Args:
        model: of a class of transformers, whose anatomy is read; its weights are not.
        codec: see `surgery.rewriters.quantise.QuantiseStep`, as for `options`.
        max_cache_len: tokens that a static cache is for, the prompt included; None: a dynamic one, which grows.

    Raises:
        RecipeError, PlanError, UnsupportedModel: before anything is made.
    """
    if isinstance(model, SurgeryMixin):
        raise PlanError(
            f"{type(model).__name__}: was converted, and the form of its cache stands in its recipe. Add the step "
            "quantise there, and convert its parent."
        )
    recipe = Recipe.load(_recipe(codec, options))
    if any(step.text == "needed" for step in recipe.steps):
        raise PlanError(
            f"codec {codec!r} reads tables from calibration text: convert the model with the step quantise."
        )
    planned = plan(model, recipe)
    made: DynamicCache | StaticCache = DynamicCache(config=model.config)
    if max_cache_len is not None:
        made = StaticCache(config=model.config, max_cache_len=max_cache_len)
    plain = DynamicLayer if max_cache_len is None else StaticLayer
    for layer in planned.after:
        if not isinstance(layer.store, Codec):
            continue
        if layer.layer >= len(made.layers) or type(made.layers[layer.layer]) is not plain:
            raise PlanError(
                f"layer {layer.layer}: {type(model).__name__} keeps its cache in a form of its own. Leave the layer "
                "out: layers='...'."
            )
        made.layers[layer.layer] = (
            QuantisedLayer(layer) if max_cache_len is None else StaticQuantisedLayer(layer, max_cache_len, whole=True)
        )
    if model not in _TELLING:
        model.register_forward_pre_hook(_tell, with_kwargs=True)
        _TELLING.add(model)
    return made


def quantise_cache(model: PreTrainedModel, codec: str = "int4", **options: Any) -> PreTrainedModel:
    """A model that holds its cache as packed codes, without calibration; the given one stays as it is.

    It is what `convert` makes of the step `quantise`, to be saved and exported. Arguments and errors as of `cache`.
    """
    return convert(model, _recipe(codec, options))


def _recipe(codec: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"kv-{codec}", "steps": [{"rewriter": "quantise", "codec": codec, **options}]}


def _tell(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    mask = kwargs.get("attention_mask")
    if isinstance(mask, dict):
        mask = next((m for m in mask.values() if m is not None), None)
    for layer in getattr(take_cache(dict(kwargs)), "layers", ()):
        prepare(layer, mask)
