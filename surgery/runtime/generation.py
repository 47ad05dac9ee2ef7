"""Which of transformers' ways to generate a converted model takes, and what a cache must hold for it.

What cannot work is refused before it starts: engines of transformers that swallow an error of the attention would hand
back empty answers, and backends would fail on shapes that they do not name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import Cache, PreTrainedConfig, StaticCache
from transformers.generation import GenerationMode

from .attention import SurgeryAttention
from .caches import check_replaceable, has_own_layer, install_layers
from .calling import cache_argument, take_cache
from .layout import Latent, LayerPlan
from .paged_cache import PagedLayer

_PAGED = (
    "transformers' continuous batching keeps, for every layer, pages of the K and V heads that the parent's config "
    "names, and its attention functions write them; a converted layer writes a cache of its own form. Use generate(), "
    "or an engine: `surgery export --to vllm`, `--to native` or `--to gguf` say what each takes."
)


class SurgeryGeneration:
    """Generation of converted models; before the parent's class in the bases."""

    config: PreTrainedConfig
    device: torch.device
    plans: tuple[LayerPlan, ...] = ()
    retains = False
    """Whether tokens are averaged or leave in some layer."""

    def static_cache(self, max_cache_len: int, *, ratio: float | None = None) -> StaticCache:
        """An empty cache that is allocated at once; pass it as `cache` (`past_key_values` before transformers 5.24).

        Args:
            max_cache_len: tokens at most, the prompt included.
            ratio: tokens per slot to have room for where tokens are averaged or leave; None: what the plan aims at.
        """
        cache = StaticCache(config=self.config, max_cache_len=max_cache_len)
        if any(map(has_own_layer, self.plans)):
            install_layers(cache, self.plans, ratio)
        return cache

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses, and so do `generate_batch` and `continuous_batching_context_manager`, which begin with it.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{type(self).__name__}: {_PAGED}")

    def _check_and_adjust_attn_implementation(self, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        """As the parent's, behind `attn_implementation=` and `set_attn_implementation`.

        Raises:
            ValueError: attention over the pages of continuous batching.
        """
        if (attn_implementation or "").startswith("paged"):
            raise ValueError(f"{type(self).__name__}: attn_implementation {attn_implementation!r}: {_PAGED}")
        found: str = super()._check_and_adjust_attn_implementation(  # type: ignore[misc]
            attn_implementation, *args, **kwargs
        )
        return found

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """As the parent's; layers of ours stand in the cache before anybody asks what they can do.

        Raises:
            ValueError: assisted decoding, or drafting, where tokens are averaged or leave; a form of cache that a
                layer cannot have.
        """
        name = type(self).__name__
        if self.retains and getattr(generation_config, "is_assistant", False):
            raise ValueError(
                f"{name} averages or drops tokens, and a draft must take tokens back when its candidates are rejected. "
                "Give another assistant_model: the parent, or one converted without dms, dmc and evict."
            )
        if self.retains and generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise ValueError(
                f"{name} averages or drops tokens, which cannot be undone when candidates are rejected. Generate "
                "without an assistant: leave out assistant_model, prompt_lookup_num_tokens and assistant_early_exit."
            )
        form = getattr(generation_config, "cache_implementation", None) or ""
        if form == "quantized":
            _refuse_quantized(self.plans)
        if "offloaded" in form and self.device.type == "cpu":
            raise ValueError(
                f"cache_implementation {form!r} moves layers of the cache from an accelerator to the CPU, where "
                f"{name} is already. Use {'static' if 'static' in form else 'dynamic'!r}."
            )
        done = super()._prepare_cache_for_generation(  # type: ignore[misc]
            generation_config, model_kwargs, generation_mode, *args, **kwargs
        )
        cache = model_kwargs.get(cache_argument(self))  # type: ignore[arg-type]
        if cache is not None and any(map(has_own_layer, self.plans)):
            install_layers(cache, self.plans)
        return done

    def _get_static_cache_init_shape(self) -> None:
        """Shapes of a static cache come from its first keys and values, not from the parent's head count."""
        return None


def check_given_cache(base_model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a forward pass of the model around the attentions: refuse a cache from which they cannot go on.

    Raises:
        ValueError: names the layer, what lies in the cache for it, and what it keeps there.
    """
    cache = take_cache(dict(kwargs))
    if cache is None or torch.compiler.is_compiling():
        return
    attentions: list[SurgeryAttention] = base_model.surgery_attentions  # type: ignore[assignment]
    if not isinstance(cache, Cache):
        paged = _PAGED if "Paged" in type(cache).__name__ else "Give a DynamicCache or a StaticCache."
        raise ValueError(f"a {type(cache).__name__} came as the cache of a converted model. {paged}")
    if getattr(cache, "offloading", False) and attentions[0].q_proj.weight.device.type == "cpu":
        raise ValueError("the cache is to be offloaded from an accelerator, and the model is on the CPU")
    if any(hasattr(layer, "_quantize") for layer in cache.layers):
        _refuse_quantized([attention.plan for attention in attentions])
    for attention in attentions:
        if attention.layer_idx < len(cache.layers):
            _check_layer(cache.layers[attention.layer_idx], attention)


def _check_layer(layer: Any, attention: SurgeryAttention) -> None:
    plan, owns = attention.plan, attention.owns_cache
    if has_own_layer(plan):
        check_replaceable(layer, plan)
        return
    if isinstance(layer, PagedLayer):
        found = "slots of tokens that are averaged or leave"
    else:
        key, value = getattr(layer, "keys", None), getattr(layer, "values", None)
        if key is None or value is None or key.ndim != 4 or value.ndim != 4:  # nothing was written to it yet
            return
        shape = key.shape[1], key.shape[3], value.shape[3]
        wanted = attention.held(key.dtype) if owns else (0, 0, 0)
        if shape == wanted:
            return
        found = "{} heads of {} + {} numbers".format(*shape)
    if owns:
        keeps = "it keeps {} of {} + {} numbers there".format(*attention.held(attention.q_proj.weight.dtype))
    else:
        keeps = f"it keeps nothing there, for it reads the cache of layer {plan.owner}"
    raise ValueError(
        f"layer {plan.layer}: the given cache holds {found} in its place, and {keeps}. Another model has filled it, "
        "or prefix tuning, which gives every layer the heads that the parent's config names. Begin with an empty "
        "cache; tune prompts or low-rank adapters instead of prefixes."
    )


def _refuse_quantized(plans: Sequence[LayerPlan]) -> None:
    for plan in plans:
        if plan.retain is not None:
            reason = f"its tokens are averaged or leave ({plan.retain.kind}), and their slots lie in pages"
        elif plan.store.kind != "dense":
            reason = f"it is stored as {plan.store.label()} already"
        elif isinstance(plan.project, Latent):
            reason = "it caches one latent per token in the place of keys, and no values that a backend could quantize"
        elif plan.value_owner is not None:
            reason = f"it caches keys alone, for it reads the values of layer {plan.value_owner}"
        else:
            continue
        raise ValueError(
            f"layer {plan.layer}: a quantized cache cannot hold what it caches: {reason}. Use cache_implementation "
            "'dynamic' or 'static'."
        )
