"""Proof that a decoder hands its cache to the attentions found: one token, then one more through the cache."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UnsupportedModel
from ..runtime.calling import cache_argument, cache_of, take_cache
from ..runtime.layout import AttentionSite
from .twin import hold_frequencies_still, make_twin


def prove_cache_step(source: PreTrainedModel | PretrainedConfig, sites: Sequence[AttentionSite]) -> None:
    """Run the architecture on tensors without memory: a token with a cache, then a second one through that cache.

    A release of transformers that hands the cache over in another way than this library knows would leave the caches of
    converted layers empty; such a model is refused here, before any work. Models that use no cache are not judged, nor
    are those that cannot run without values (some routers read them).

    Raises:
        UnsupportedModel: the model generates and takes no cache, or keeps one of another kind than a decoder's; an
            attention is handed no cache, or its layer of the cache does not hold both tokens.
    """
    twin = make_twin(source, "eager")
    hold_frequencies_still(twin)
    calls: dict[str, tuple[str, ...]] = {}
    reached: set[str] = set()

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {f"argument {i}": value for i, value in enumerate(args)} | kwargs
        calls[names[module]] = tuple(named)
        if take_cache(named) is not None:
            reached.add(names[module])

    if twin.can_generate():
        try:
            cache_argument(twin)
        except ValueError:
            raise UnsupportedModel(
                f"{type(twin).__name__}: its forward takes no cache, so that there is none to make smaller. It reads "
                "the whole text anew for each token."
            ) from None
    names = {twin.get_submodule(site.module): site.module for site in sites}
    for module in names:
        module.register_forward_pre_hook(look, with_kwargs=True)
    cache: Any = None
    second = False
    # Without values, a stranger's code may raise whatever it likes.
    with contextlib.suppress(Exception), torch.no_grad():
        token = torch.zeros(1, 1, dtype=torch.long, device="meta")
        cache = cache_of(twin(input_ids=token, use_cache=True))
        twin(input_ids=token, use_cache=True, **{cache_argument(twin): cache})
        second = True
    if cache is None:
        return
    if not hasattr(cache, "layers"):
        raise UnsupportedModel(
            f"{type(twin).__name__}: its cache is a {type(cache).__name__}, which is not one layer of K and V for each "
            "attention; only caches of decoders can be rewritten."
        )
    missing = next((name for name in calls if name not in reached), None)
    if missing is not None:
        raise UnsupportedModel(
            f"module {missing}: asked to use a cache, the model hands this attention none; transformers "
            f"{transformers.__version__} calls it with {', '.join(calls[missing])}. This release is newer than this "
            "library knows: install an older one."
        )
    for site in sites if second else ():
        keys = getattr(cache.layers[site.layer], "keys", None) if site.layer < len(cache.layers) else None
        if isinstance(keys, Tensor) and keys.ndim == 4 and keys.shape[2] != min(2, site.window or 2):
            raise UnsupportedModel(
                f"module {site.module}: after a token and one more through the cache, its layer of the cache holds "
                f"{keys.shape[2]} tokens. transformers {transformers.__version__} caches in a way that this library "
                "does not know: install an older one."
            )
