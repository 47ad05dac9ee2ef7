"""Caches that are quantised, or evict, without a conversion: for `generate` of a stock model, or as a model that
makes its own."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from .calibration.text import tokenizer_of
from .calibration.working_copy import WorkingCopy
from .convert import convert
from .errors import PlanError
from .plan import plan
from .planning.schema import nearest
from .quick_evict import StockRankedLayer, put_layers
from .recipe import Recipe
from .rewriters.evict import EvictStep
from .rewriters.quantise import QuantiseStep
from .rewriters.tokens.retrieval import looking_up
from .runtime.budgets import BUDGETS
from .runtime.calling import by_name, take_cache
from .runtime.coded_layer import prepare
from .runtime.layout import Codec
from .runtime.modeling import SurgeryMixin
from .runtime.quantised_cache import QuantisedLayer
from .runtime.rankers import RANKERS
from .runtime.static_quantised_cache import StaticQuantisedLayer


def cache(
    model: PreTrainedModel,
    codec: str | None = None,
    *,
    evict: str | None = None,
    max_cache_len: int | None = None,
    **options: Any,
) -> DynamicCache | StaticCache:
    """An empty cache for a stock model that packs its tokens, or lets some go; pass it to `generate` as
    `past_key_values` (`cache` from 5.24 on).

    Layers with a sliding window keep it as it is. The model gets one hook, which tells such caches what is padding.

    With a codec, K and V are decoded for each layer in turn: it saves memory, and `quantise_cache` is faster. With
    `evict`, hooks let a function in the place of sdpa hand queries to the cache, in passes with such a cache alone, and
    refuse models whose attention does not call it. With both, what stays is packed.

    Args:
        model: of a class of transformers, whose anatomy is read; its weights are not.
        codec: see `surgery.rewriters.quantise.QuantiseStep`, as for `options`; `int4` where neither is given.
        evict: a score that orders slots, see `surgery.rewriters.evict.EvictStep`, as for `options`. Beside a codec,
            options that both steps have (`sinks`, `recent`) are those of `evict`.
        max_cache_len: of a codec: tokens that a static cache is for, the prompt included; None: a dynamic one.

    Raises:
        RecipeError, PlanError, UnsupportedModel: before anything is made.

    Examples:
        >>> import surgery, torch
        >>> from surgery.bundled import SMALL
        >>> model = surgery.load(SMALL)
        >>> prompt_BT = torch.arange(100)[None] + 3
        >>> tokens_BT = model.generate(prompt_BT, past_key_values=surgery.cache(model, "int4"), max_new_tokens=4,
        ...                            min_new_tokens=4, do_sample=False)
        >>> tuple(tokens_BT.shape)
        (1, 104)
    """
    if isinstance(model, SurgeryMixin):
        raise PlanError(
            f"{type(model).__name__}: was converted, and the form of its cache stands in its recipe. Add the step "
            "quantise there, and convert its parent."
        )
    named = sorted({"rewriter", "scorer"} & options.keys())
    if named:
        raise PlanError(f"{named[0]}: the arguments `codec` and `evict` say that. Leave it out.")
    if evict is not None and evict not in RANKERS:
        near = nearest(evict, RANKERS)
        raise PlanError(
            f"evict: no score {evict!r} that orders slots.{near} Known: {', '.join(RANKERS)}. Others judge tokens by "
            "weights of their own: convert the model with the step evict."
        )
    if evict is not None and max_cache_len is not None:
        raise PlanError("evict: stock models let tokens go in dynamic caches alone. Leave max_cache_len out.")
    recipe = Recipe.load(_steps(codec, evict, options))
    recipe = recipe.told(lambda: tokenizer_of(model.config))
    if evict is not None and BUDGETS[options.get("budget") or "uniform"].finds != "nothing":
        raise PlanError(
            f"budget {options['budget']!r} finds out about heads when a model is converted: convert it with the step "
            "evict, or give whole=surgery.retrieval_heads(model) and no budget."
        )
    if any(step.text == "needed" for step in recipe.steps):
        raise PlanError(
            f"{'think' if 'think' in options else f'codec {codec!r}'} reads calibration text: convert the model with "
            "the step quantise."
        )
    planned = plan(model, recipe)
    made: DynamicCache | StaticCache = DynamicCache(config=model.config)
    if max_cache_len is not None:
        made = StaticCache(config=model.config, max_cache_len=max_cache_len)
    for layer in planned.after:
        if isinstance(layer.store, Codec) and layer.retain is None:
            made.layers[layer.layer] = (
                QuantisedLayer(layer)
                if max_cache_len is None
                else StaticQuantisedLayer(layer, max_cache_len, whole=True)
            )
    if evict is not None:
        assert isinstance(made, DynamicCache)
        put_layers(made, model, planned)
    if _tell not in model._forward_pre_hooks.values():  # copies of a model have its hooks
        model.register_forward_pre_hook(_tell, with_kwargs=True)
    return made


def quantise_cache(model: PreTrainedModel, codec: str = "int4", **options: Any) -> PreTrainedModel:
    """A model that holds its cache as packed codes, without calibration; the given one stays as it is.

    It is what `convert` makes of the step `quantise`, to be saved and exported. Arguments and errors as of `cache`.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> packed = surgery.quantise_cache(surgery.load(SMALL), "int4")
        >>> type(packed).__name__
        'SurgeryLlamaForCausalLM'
    """
    return convert(model, _recipe(codec, options))


def retrieval_heads(model: PreTrainedModel, part: float = 0.15, *, seed: int = 0) -> dict[int, tuple[int, ...]]:
    """Layer -> KV heads that look up what came before: for `whole` of the step `evict`, and of `cache(evict=...)`.

    As `budget: razor` finds them when a model is converted, see `surgery.runtime.budgets.Razor`.

    Args:
        model: of a class of transformers; its layers run once over some thousand random tokens.
        part: of the KV heads of all layers without a window.
        seed: of the tokens.

    Raises:
        RecipeError: `part` is not above 0 and at most 1. PlanError, UnsupportedModel: as `cache`.

    Examples:
        >>> import surgery
        >>> from surgery.bundled import SMALL
        >>> heads = surgery.retrieval_heads(surgery.load(SMALL), part=0.25)
        >>> sum(map(len, heads.values()))  # of 6 layers of 8 heads
        12
    """
    step = {"rewriter": "evict", "scorer": "streaming", "budget": "razor", "ratio": 1, "part": part}
    planned = plan(model, {"steps": [step]})
    return looking_up(WorkingCopy(model, planned.anatomy), [layer for _, layer in planned.changed()], part, seed)


def _recipe(codec: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"kv-{codec}", "steps": [{"rewriter": "quantise", "codec": codec, **options}]}


def _steps(codec: str | None, evict: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """The recipe of a cache; options that only codecs know are the codec's, `layers` those of both."""
    if evict is None:
        return _recipe(codec or "int4", options)
    of_codec = {f.name for f in fields(QuantiseStep)} - {f.name for f in fields(EvictStep)} if codec else set()
    step = {"rewriter": "evict", "scorer": evict, **{k: v for k, v in options.items() if k not in of_codec}}
    if codec is None:
        return {"name": f"evict-{evict}", "steps": [step]}
    packed = {k: v for k, v in options.items() if k in of_codec | {"layers"}}
    return {"name": f"evict-{evict}-{codec}", "steps": [step, *_recipe(codec, packed)["steps"]]}


def _tell(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    came = by_name(model, args, kwargs)
    mask = came.get("attention_mask")
    if isinstance(mask, dict):  # by type of layer, in any order; those of windows may be narrower than the text
        masks = [m for m in mask.values() if m is not None]
        mask = mask.get("full_attention", max(masks, key=lambda m: m.shape[-1], default=None))
    for layer in getattr(take_cache(came), "layers", ()):
        prepare(layer, mask)
        if isinstance(layer, StockRankedLayer):
            layer.mask = mask
