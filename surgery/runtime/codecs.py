"""Codecs of quantised caches by name: each a pair of forms, one for keys and one for values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .calibrated_forms import TABLES, Directions, Levels, Turned
from .packed_forms import Decoded, Form, Half, Parts, PerChannel, PerToken, Residual, Spherical, Symmetric, Tables

__all__ = ["CODECS", "CodecKind", "Decoded", "Form", "Parts", "Tables", "groups_of"]

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class CodecKind:
    """A codec by its name: the bits that it knows, and its forms."""

    bits: tuple[float, ...]
    """Bits of one number that can be asked for, in rising order; the least and the most where `any_bits`."""
    default: float
    keys: Callable[[float, int, Tables | None], Form]
    """(bits, group, tables) -> form of keys."""
    values: Callable[[float, int, Tables | None], Form]
    describes: str
    """For help and tables."""
    any_bits: bool = False
    """Whether bits need not be whole; they count all that is packed then."""
    tables: Callable[[str, int, int, float], Shapes] | None = None
    """(`k` or `v`, heads, width, bits) -> shapes by name of what calibration text decides; None where it decides
    nothing."""
    unrotated: bool = False
    """Whether keys are held before their rotation."""
    reads_heads: bool = False
    """Whether calibration looks at keys and values of heads, so that latents have no tables."""

    def knows(self, bits: float) -> bool:
        """Whether so many can be asked for."""
        return self.bits[0] <= bits <= self.bits[-1] if self.any_bits else bits in self.bits

    @property
    def calibrated(self) -> bool:
        """Whether it reads tables from calibration text."""
        return self.tables is not None


def _directions(letter: str, heads: int, width: int, bits: float) -> Shapes:
    return {name: (heads, width, *([width] if name in ("turn", "back") else [])) for name in TABLES}


def _turns(letter: str, heads: int, width: int, bits: float) -> Shapes:
    return {"turn": (heads, width, width)}


def _turned(bits: float, group: int, clip: float, tables: Tables | None) -> Form:
    """Source: OSCAR (FutureMLS-Lab): eigenvectors of Q'Q, or of score-weighted V'V, then Hadamard."""
    turn = None if tables is None else tables["turn"].view(torch.float32)
    return Turned(PerToken(bits=int(bits), group=group, clip=clip), turn)


def _levels(letter: str, heads: int, width: int, bits: float) -> Shapes:
    channels = {"middle": (heads, width), "reach": (heads, width)} if letter == "k" else {}
    return {"levels": (heads, 2 ** int(bits)), **channels}


CODECS: dict[str, CodecKind] = {
    "int8": CodecKind(
        bits=(8,), default=8, keys=lambda *_: Symmetric(), values=lambda *_: Symmetric(),
        describes="one scale per token and head",
    ),
    "fp8": CodecKind(
        bits=(8,), default=8, keys=lambda *_: Symmetric(floats=True), values=lambda *_: Symmetric(floats=True),
        describes="e4m3, one scale per token and head",
    ),
    "fp16": CodecKind(
        bits=(16,), default=16, keys=lambda *_: Half(), values=lambda *_: Half(), describes="float16, no scale",
    ),
    "int4": CodecKind(
        bits=(2, 3, 4, 5, 6, 7, 8), default=4,
        keys=lambda bits, group, _: PerToken(bits=int(bits), group=group, rotated=True),
        values=lambda bits, group, _: PerToken(bits=int(bits), group=group, rotated=True),
        describes="Hadamard, then groups of channels of each token",
    ),
    "kivi": CodecKind(
        bits=(2, 3, 4, 5, 6, 7, 8), default=2, keys=lambda bits, group, _: PerChannel(bits=int(bits), group=group),
        values=lambda bits, group, _: PerToken(bits=int(bits), group=group),
        describes="keys by channel over groups of tokens, values by token over groups of channels",
    ),
    "gear": CodecKind(
        bits=(2, 3, 4), default=2,
        keys=lambda bits, group, _: Residual(inner=PerChannel(bits=int(bits), group=group), group=group),
        values=lambda bits, group, _: Residual(inner=PerToken(bits=int(bits), group=group), group=group),
        describes="as kivi, and what that loses in a group of tokens as one product of a column and a row",
    ),
    "turbo": CodecKind(
        bits=(1, 2, 3, 4, 5), default=4, keys=lambda bits, *_: Spherical(bits=int(bits)),
        values=lambda bits, *_: Spherical(bits=int(bits)), describes="norms apart, random rotation, Gaussian levels",
    ),
    "metric": CodecKind(
        bits=(1, 8), default=3, keys=lambda bits, _, tables: Directions(bits, False, tables),
        values=lambda bits, _, tables: Directions(bits, True, tables), any_bits=True, tables=_directions,
        unrotated=True, describes="principal directions of calibration text, each with bits of its own",
    ),
    "kvquant": CodecKind(
        bits=(2, 3, 4), default=3,
        keys=lambda bits, group, tables: Levels(bits=int(bits), group=group, by_channel=True, tables=tables),
        values=lambda bits, group, tables: Levels(bits=int(bits), group=group, by_channel=False, tables=tables),
        tables=_levels, unrotated=True, reads_heads=True,
        describes="keys by channel, values by token, levels of calibration text, one number of a hundred apart",
    ),
    "oscar": CodecKind(
        bits=(2, 3, 4), default=2,
        keys=lambda bits, group, tables: _turned(bits, group, 0.96, tables),
        values=lambda bits, group, tables: _turned(bits, group, 0.92, tables),
        tables=_turns, reads_heads=True,
        describes="turned to what attention looks for in calibration text, then groups of each token",
    ),
}  # fmt: skip
"""Name in recipes -> codec."""


def groups_of(parts: Sequence[Tensor], first: int, count: int, total: int) -> Parts:
    """`count` of `total` groups of tokens, from the `first` on."""
    return tuple(part.narrow(2, first * (part.shape[2] // total), count * (part.shape[2] // total)) for part in parts)
