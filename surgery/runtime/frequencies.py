"""Rotary modules of transformers whose frequencies follow the length of the text (dynamic NTK, LongRoPE)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_NAME = "inv_freq"


def length_dependent(rope_type: Any) -> bool:
    """Whether rotary modules of this type change their frequencies in long sequences."""
    return isinstance(rope_type, str) and ("dynamic" in rope_type or rope_type == "longrope")


def at_rest(module: nn.Module, name: str, buffer: Tensor) -> Tensor:
    """A buffer of a module as it was before any text.

    After a long text these modules hold the frequencies of that, until the next one comes.
    """
    prefix, kind = name.removesuffix(_NAME), getattr(module, "rope_type", None)
    if isinstance(kind, dict):  # by type of layer, which is the prefix of its buffers
        kind = kind.get(prefix.removesuffix("_"))
    if name.endswith(_NAME) and length_dependent(kind):
        original = getattr(module, f"{prefix}original_{_NAME}", None)
        return original if isinstance(original, Tensor) else buffer
    return buffer
