"""The attention and the mask that a model is captured with: opaque operators, and what each was called with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

PROBE = "surgery_anatomy"
"""Name under which the recording attention is registered with transformers."""


@torch.library.custom_op("surgery_anatomy::attention", mutates_args=())
def _attention_op(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, tag: int
) -> Tensor:  # pragma: no cover - the op stands in a graph and is never run
    raise NotImplementedError


@_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sinks: Tensor | None, tag: int) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1])


@torch.library.custom_op("surgery_anatomy::mask", mutates_args=())
def _mask_op(like: Tensor, tag: int, batch: int, queries: int, keys: int) -> Tensor:  # pragma: no cover
    raise NotImplementedError


@_mask_op.register_fake
def _(like: Tensor, tag: int, batch: int, queries: int, keys: int) -> Tensor:
    return like.new_empty(batch, 1, queries, keys, dtype=torch.bool)


@torch.library.custom_op("surgery_anatomy::stub", mutates_args=())
def _stub_op(x: Tensor) -> Tensor:  # pragma: no cover
    raise NotImplementedError


@_stub_op.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


ATTENTION = torch.ops.surgery_anatomy.attention.default
MASK = torch.ops.surgery_anatomy.mask.default
STUB = torch.ops.surgery_anatomy.stub.default


@dataclasses.dataclass
class Call:
    """Arguments of one recorded attention call that are not tensors, and names of tensors that we do not know."""

    module: nn.Module
    scale: float
    softcap: float | None
    window: int | None
    causal: bool
    unknown: tuple[str, ...]


@dataclasses.dataclass
class Recording:
    """What one run of a model has called so far; nodes of the graph say which entry is theirs."""

    calls: list[Call] = dataclasses.field(default_factory=list)
    masks: list[Callable[..., Any]] = dataclasses.field(default_factory=list)


RECORDING: ContextVar[Recording] = ContextVar("surgery_anatomy_recording")


def record_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    record = RECORDING.get()
    # Integer tensors (position ids, cumulative lengths) do not enter the scores; a floating one would.
    unknown = tuple(n for n, x in others.items() if isinstance(x, Tensor) and x.is_floating_point())
    if is_causal is None:
        is_causal = bool(getattr(module, "is_causal", True))
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    record.calls.append(Call(module, scale, softcap, sliding_window, is_causal, unknown))
    out = torch.ops.surgery_anatomy.attention(query, key, value, attention_mask, s_aux, len(record.calls) - 1)
    return out, None


def record_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: Any = "cpu",
    **others: Any,
) -> Tensor:
    record = RECORDING.get()
    assert mask_function is not None
    record.masks.append(mask_function)
    like = torch.empty(0, device=device) if attention_mask is None else attention_mask
    return torch.ops.surgery_anatomy.mask(like, len(record.masks) - 1, batch_size, int(q_length), int(kv_length))
