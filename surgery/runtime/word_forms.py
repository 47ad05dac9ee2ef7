"""`kivi` in the words of `surgery.kernels.quant_format`, which one operator reads: the same codes in other places.

Where that package is absent, as it may be beside an exported model, nothing is held so.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops
from .packed_forms import Form, Parts, PerChannel, PerToken
from .packing import fitted


@dataclass(frozen=True, kw_only=True)
class WordsPerChannel(PerChannel):
    """Keys: parts are what the operator takes."""

    def _packed(self, codes_BKgTW: Tensor) -> Tensor:
        return ops.quant_format.pack(codes_BKgTW, self.bits).flatten(2, 3)

    def _codes(self, words: Tensor, width: int) -> Tensor:
        return ops.quant_format.unpack(words, self.bits, self.group)


@dataclass(frozen=True, kw_only=True)
class WordsPerToken(PerToken):
    """Values: parts are what the operator takes."""

    tokens: int
    """Of a group."""

    def scores(self, q_BKGW: Tensor, parts: Parts) -> Tensor:
        return q_BKGW @ self.decode(parts, q_BKGW.shape[-1]).mT

    def mean(self, weight_BKGT: Tensor, parts: Parts, width: int) -> Tensor:
        return weight_BKGT @ self.decode(parts, width)

    def _packed(self, codes_BKTW: Tensor) -> Tensor:
        return ops.quant_format.pack(codes_BKTW.unflatten(2, (-1, self.tokens)), self.bits).flatten(2, 3)

    def _codes(self, words: Tensor, width: int) -> Tensor:
        return ops.quant_format.unpack(words, self.bits, self.tokens).flatten(2, 3)


def held_as_words(device: torch.device) -> bool:
    """Whether caches there are worth it: the operator is a kernel of GPUs."""
    return ops.AVAILABLE and device.type == "cuda"


def in_words(forms: tuple[Form, Form | None], widths: tuple[int, int]) -> tuple[Form, Form | None]:
    """The same forms in words, where the operator can read them; otherwise as they are.

    It wants as many bits for K as for V, 2, 4 or 8, planes of a power of two of at least 16 channels, each under one
    scale, and groups of a power of two of at least 16 tokens.
    """
    keys, values = forms
    if type(keys) is not PerChannel or type(values) is not PerToken or values.rotated or values.clip < 1:
        return forms
    bits, group = keys.bits, keys.group
    if bits not in ops.quant_format.BITS or values.bits != bits or group < 16 or group & (group - 1):
        return forms
    parts = [width // ops.quant_format.planes_of(bits) for width in widths]
    if any(w % ops.quant_format.planes_of(bits) or p < 16 or p & (p - 1) for w, p in zip(widths, parts, strict=True)):
        return forms
    if fitted(widths[1], values.group) % parts[1]:
        return forms
    return WordsPerChannel(bits=bits, group=group), WordsPerToken(bits=bits, group=values.group, tokens=group)
