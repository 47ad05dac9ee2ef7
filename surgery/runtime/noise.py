"""Random numbers that are a function of where they are asked for: not of a batch, its padding, or a generator."""

from __future__ import annotations

import torch
from torch import Tensor

_BITS = 23
"""Of a number: all of them are exact in float32, and none is 0 or 1."""
_STEPS = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)
"""Odd constants of SplitMix64 (Steele, Lea, Flood 2014), as signed numbers."""


def uniform(*places: Tensor) -> Tensor:
    """Numbers between 0 and 1, float32, one for each combination of whole numbers in `places`, which broadcast."""
    x = torch.zeros((), dtype=torch.int64, device=places[0].device)
    for place in places:
        x = _mixed(x + (place.long() + 1) * _STEPS[0])
    return (((x >> 20) & (2**_BITS - 1)).float() + 0.5) / 2**_BITS


def gumbel(*places: Tensor) -> Tensor:
    """Standard Gumbel noise, likewise."""
    return -torch.log(-torch.log(uniform(*places)))


def _mixed(x: Tensor) -> Tensor:
    for shift, factor in ((30, _STEPS[1]), (27, _STEPS[2])):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return x ^ ((x >> 31) & (2**33 - 1))
