"""Which config of the parent's own class has fewer KV heads, if any: then stock libraries load the result."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .anatomy import Anatomy
from .runtime.attention import SHARED_STATES
from .runtime.layout import AttentionSite


def native_config(config: Any, sites: tuple[AttentionSite, ...], kv_heads: int) -> Any | None:
    """A copy of `config` whose model has `kv_heads` KV heads in every attention; None where the class has no such form.

    No table of families: every integer setting whose name speaks of KV heads and whose value is the parent's count is
    tried, and the parameter shapes of the model that it builds decide.
    """
    old = sites[0].kv_heads
    if any(site.kv_heads != old for site in sites):
        return None
    for name in _kv_settings(config, old):
        candidate = copy.deepcopy(config)
        setattr(candidate, name, kv_heads)
        if getattr(candidate, "head_dim", None) is None and "head_dim" in dir(candidate):
            candidate.head_dim = sites[0].head_dim  # engines that derive it from other fields must not have to guess
        try:
            twin = meta_model(candidate)
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError):
            continue
        if _has_shapes(twin, sites, kv_heads):
            return candidate
    return None


def meta_model(config: Any) -> PreTrainedModel:
    """The causal LM of `config` without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def hands_down_keywords(anatomy: Anatomy) -> bool:
    """Whether an unknown keyword argument of the model reaches its first attention, through all layers between."""
    model = meta_model(anatomy.config)
    found: list[bool] = []

    class Reached(Exception):
        pass

    def look(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(SHARED_STATES in kwargs)
        raise Reached

    model.get_submodule(anatomy.sites[0].module).register_forward_pre_hook(look, with_kwargs=True)
    ids = torch.zeros(1, 2, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 2, 2, device="meta")  # a finished mask: making one would read values, and there are none
    # TypeError: an argument that nobody takes. The others: models that want values before their first attention.
    with torch.no_grad(), contextlib.suppress(Reached, TypeError, ValueError, RuntimeError):
        model.base_model(input_ids=ids, attention_mask=mask, use_cache=False, **{SHARED_STATES: {}})
    return found == [True]


def _kv_settings(config: Any, value: int) -> list[str]:
    names = [name for name in config.to_dict() if "kv" in name or "key_value" in name]
    return [name for name in names if "head" in name and getattr(config, name, None) == value]


def _has_shapes(twin: PreTrainedModel, sites: tuple[AttentionSite, ...], kv_heads: int) -> bool:
    """Whether each k and v parameter of `twin` lost exactly the rows of the dropped heads, and q and o none."""
    shapes = {name: tuple(p.shape) for name, p in twin.state_dict().items()}
    for site in sites:
        rows: dict[str, int] = {}
        for projection, dim, count in (
            (site.q, site.head_dim, site.heads),
            (site.k, site.head_dim, kv_heads),
            (site.v, site.value_dim, kv_heads),
        ):
            if projection.weight not in shapes:
                return False
            rows[projection.weight] = rows.get(projection.weight, 0) + dim * count
        for projection in (site.q, site.k, site.v):
            shape = shapes[projection.weight]
            # An output gate may ride on the parameter of q (Qwen3-Next): then it has more rows than q, k and v.
            if shape[1 if projection.transposed else 0] != rows[projection.weight] and not site.gated_output:
                return False
        if site.heads * site.value_dim not in shapes.get(site.o.weight, ()):
            return False
    return True
