"""Bytes that a cache holds, measured and predicted, and what fits into a given memory."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import RecipeError, SurgeryError
from ..runtime.calling import cache_of
from ..runtime.coded_layer import CodedLayer
from ..runtime.layout import LayerPlan
from ..runtime.paged_cache import PagedLayer


@dataclass(frozen=True, kw_only=True)
class CacheSize:
    """The cache of one sequence after `tokens` tokens."""

    tokens: int
    bytes: int
    """Measured: every tensor that the cache keeps."""
    predicted_bytes: int | None
    """Predicted by the plan; None where the model cannot be planned."""
    achieved_ratio: float | None = None
    """Tokens per slot, mean over layers that merge or drop tokens; None where none does."""

    @property
    def bytes_per_token(self) -> float:
        return self.bytes / self.tokens


def cache_size(model: PreTrainedModel, ids_BT: Tensor) -> CacheSize:
    """Fill the cache with one sequence and count."""
    tokens = ids_BT.shape[1]
    cache = _filled(model, ids_BT[:1])
    slots = [
        float(part.lengths.float().mean()) for part in getattr(cache, "layers", ()) if isinstance(part, PagedLayer)
    ]
    return CacheSize(
        tokens=tokens,
        bytes=0 if cache is None else tensor_bytes(cache),
        predicted_bytes=predicted(model, tokens),
        achieved_ratio=tokens * len(slots) / sum(slots) if slots else None,
    )


def cache_bytes(model: PreTrainedModel, ids_BT: Tensor) -> int:
    """Bytes of every tensor that the cache holds after `ids_BT`; 0 for a model without a cache."""
    cache = _filled(model, ids_BT)
    return 0 if cache is None else tensor_bytes(cache)


def _filled(model: PreTrainedModel, ids_BT: Tensor) -> Any:
    with torch.inference_mode():
        return cache_of(model(input_ids=ids_BT.to(model.device), use_cache=True))


def tensor_bytes(cache: Any) -> int:
    """Bytes of all tensors of a transformers cache and its layers, each counted once."""
    held = [t for part in (cache, *cache.layers) for t in _tensors(part)]
    tensors = {id(t): t for t in held if t.dim()}  # scalars are counters, not cache
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _tensors(part: Any) -> list[Tensor]:
    if isinstance(part, (PagedLayer, CodedLayer)):
        return part.tensors()
    return [t for t in vars(part).values() if isinstance(t, Tensor)]


def predicted(model: PreTrainedModel, tokens: int) -> int | None:
    """Bytes of the cache of one sequence by the model's plan; None where its attention cannot be described."""
    surgery = getattr(model.config, "surgery", None) or {}
    layers = [layer["plan"] for layer in surgery.get("layers", ())] or surgery.get("plan", {}).get("layers")
    if layers:
        return sum(LayerPlan.from_dict(layer).bytes_at(tokens) for layer in layers)
    from ..plan import plan

    try:
        return plan(model, "identity").cache_bytes(tokens)
    except SurgeryError:
        return None


def bytes_at(model: PreTrainedModel, size: CacheSize, tokens: int) -> float:
    """Bytes of the cache of one sequence of `tokens` tokens, from what one of `size.tokens` takes.

    Caches do not grow in proportion to the text: windows end, slots leave, first and newest tokens are kept in full.
    So the plan says how much more it is, where the model can be planned.
    """
    planned = predicted(model, tokens)
    if planned is None or not size.predicted_bytes:
        return size.bytes_per_token * tokens
    return planned * size.bytes / size.predicted_bytes


def max_batch(memory: int, parameter_bytes: int, cache_bytes_per_sequence: float) -> int:
    """Sequences whose caches fit beside the weights; activations are not counted."""
    return max(0, int((memory - parameter_bytes) // max(cache_bytes_per_sequence, 1)))


def parse_bytes(text: str | int) -> int:
    """`80GiB`, `24GB`, `512MiB` or a number of bytes."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([KMGT]?)(i?)B?\s*", str(text), re.IGNORECASE)
    if match is None:
        raise RecipeError(f"memory: {text!r} is no size. Write it as 80GiB, 24GB, 512MiB.")
    number, unit, binary = match.groups()
    base = 1024 if binary else 1000
    return int(float(number) * base ** (" KMGT".index(unit.upper()) if unit else 0))
