"""Forms of packed keys and values: whole groups of tokens as bytes, scales beside them, and back.

What a form makes of a stretch of tokens is a few tensors that all have time, or groups of it, in dimension 2: stretches
are put behind each other, and read in parts, without being encoded again. Statistics are of one KV head, and of one
group or one token, never of the batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .packing import (
    fitted,
    gaussian_codebook,
    groups_as_floats,
    hadamard,
    pack,
    packed_width,
    random_rotation,
    unpack,
)

Parts = tuple[Tensor, ...]
Tables = Mapping[str, Tensor]
"""What calibration text has decided for one stream of one layer, by name; int32, floats seen as their bits."""
SCALE_BYTES = 2
"""Of one scale or offset: float16, of which codes are rounded against the rounded value."""
_LARGEST = 65504.0


class Form(Protocol):
    """How keys, or values, are encoded. `Decoded` has what scores and means are where nothing better is known."""

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        """Encode whole groups of tokens; every part has T, or T over a constant, entries in dimension 2.

        Args:
            skip_BT: True at tokens that are never read, padding among them: they may not set a scale.
        """

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        """float32 [B, K, T, W] of what `encode` made.

        Args:
            turned: leave the numbers in the basis of `basis`, where queries can be taken to instead.
        """

    def scores(self, q_BKGW: Tensor, parts: Parts) -> Tensor:
        """float32 [B, K, G, T]: products of queries, in the basis, with all vectors."""

    def mean(self, weight_BKGT: Tensor, parts: Parts, width: int) -> Tensor:
        """float32 [B, K, G, W]: sums of all vectors with these weights, in the basis."""

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        """[W, n] or [K, W, n] float32, orthonormal columns by which vectors are multiplied before they are rounded; n
        is W where all of a vector is held. None where by none."""

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        """Bytes of all parts of one sequence."""


class Decoded:
    """Scores and means by way of the decoded vectors."""

    def scores(self, q_BKGW: Tensor, parts: Parts) -> Tensor:
        x: Tensor = self.decode(parts, q_BKGW.shape[-1], turned=True)  # type: ignore[attr-defined]
        return q_BKGW @ x.mT

    def mean(self, weight_BKGT: Tensor, parts: Parts, width: int) -> Tensor:
        x: Tensor = self.decode(parts, width, turned=True)  # type: ignore[attr-defined]
        return weight_BKGT @ x


def stored(x: Tensor) -> Tensor:
    """float32 as float16, to the nearest.

    The rounding is done on the bits: inductor leaves out a cast to float16 and back, and codes would be rounded against
    another number than the one that is stored.
    """
    x = x.clamp(-_LARGEST, _LARGEST)
    bits = x.view(torch.int32)
    near = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    small = (x + 0.75) - 0.75  # below 2^-14 the numbers of float16 are 2^-24 apart, as those of float32 near 0.75
    return torch.where(x.abs() < 2.0**-14, small, near).half()


def affine(x: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8, and the float16 scale and offset that they are rounded against."""
    scale, low = stored((high - low) / (2**bits - 1)), stored(low)
    step = torch.where(scale == 0, 1.0, scale.float())
    codes = ((x - low.float()) / step).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    return codes, scale, low


@dataclass(frozen=True, kw_only=True)
class PerToken:
    """Asymmetric integers: a scale and an offset for each token and `group` channels.

    Source: QuaRot, arXiv:2404.00456, for the rotation by a Hadamard matrix (`rotated`). QuaRot folds that of values
    into W_v and W_o. Here it is computed, once for a group of tokens and once for the mean of a step, less than
    a hundredth of its time: weights stay those of the parent to the bit, as exports need whose engines hold caches in
    full.
    """

    bits: int
    group: int
    rotated: bool = False
    clip: float = 1.0
    """Part of the range between the least and the largest number that codes cover."""

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        x = x_BKTW.float()
        matrix = self.basis(x.shape[-1], x.device)
        if matrix is not None:
            x = x @ matrix
        x = x.unflatten(-1, (-1, fitted(x.shape[-1], self.group)))
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        if self.clip < 1:
            cut = (high - low) * ((1 - self.clip) / 2)
            low, high = low + cut, high - cut
        codes, scale, low = affine(x, low, high, self.bits)
        return self._packed(codes.flatten(-2)), scale.squeeze(-1), low.squeeze(-1)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        words, scale, low = parts
        codes = self._codes(words, width).unflatten(-1, (-1, fitted(width, self.group))).float()
        x = torch.addcmul(low.float()[..., None], codes, scale.float()[..., None]).flatten(-2)
        matrix = None if turned else self.basis(width, x.device)
        return x if matrix is None else x @ matrix.t()

    def scores(self, q_BKGW: Tensor, parts: Parts) -> Tensor:
        words, scale, low = (part.float() if part.is_floating_point() else part for part in parts)
        width = q_BKGW.shape[-1]
        size = width // scale.shape[-1]
        codes = groups_as_floats(words, self.bits, width, size)
        total = q_BKGW.new_zeros(())
        # Scales multiply products of whole groups: far fewer numbers than codes.
        for i, (q, code) in enumerate(zip(q_BKGW.split(size, -1), codes, strict=True)):
            total = total + (q @ code.mT) * scale[:, :, None, :, i] + q.sum(-1, keepdim=True) * low[:, :, None, :, i]
        return total

    def mean(self, weight_BKGT: Tensor, parts: Parts, width: int) -> Tensor:
        words, scale, low = (part.float() if part.is_floating_point() else part for part in parts)
        codes = groups_as_floats(words, self.bits, width, width // scale.shape[-1])
        found = [(weight_BKGT * scale[:, :, None, :, i]) @ code for i, code in enumerate(codes)]
        shifts = (weight_BKGT @ low).unbind(-1)
        return torch.cat([x + shift[..., None] for x, shift in zip(found, shifts, strict=True)], -1)

    def _packed(self, codes_BKTW: Tensor) -> Tensor:
        return pack(codes_BKTW, self.bits)

    def _codes(self, words: Tensor, width: int) -> Tensor:
        return unpack(words, self.bits, width)

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return hadamard(width, device) if self.rotated else None

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        groups = width // fitted(width, self.group) if width else 0
        return tokens * heads * (packed_width(width, self.bits) + 2 * SCALE_BYTES * groups)


@dataclass(frozen=True, kw_only=True)
class PerChannel(Decoded):
    """Asymmetric integers: a scale and an offset for each channel and `group` tokens.

    Source: KIVI, arXiv:2402.02750, which holds keys so, as they are after their rotation.
    """

    bits: int
    group: int

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        x = x_BKTW.float().unflatten(2, (-1, self.group))
        low, high = x, x
        if skip_BT is not None:
            skip = skip_BT.unflatten(1, (-1, self.group))[:, None, ..., None]
            low, high = (x.masked_fill(skip, limit) for limit in (math.inf, -math.inf))
            nothing = skip.all(3, keepdim=True)
            low, high = low.masked_fill(nothing, 0.0), high.masked_fill(nothing, 0.0)
        codes, scale, low = affine(x, low.amin(3, keepdim=True), high.amax(3, keepdim=True), self.bits)
        return self._packed(codes), scale.squeeze(3), low.squeeze(3)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        words, scale, low = parts
        codes = self._codes(words, width).float()
        return torch.addcmul(low.float()[:, :, :, None], codes, scale.float()[:, :, :, None]).flatten(2, 3)

    def scores(self, q_BKGW: Tensor, parts: Parts) -> Tensor:
        words, scale, low = parts
        codes = self._codes(words, q_BKGW.shape[-1]).float()
        scaled = q_BKGW[:, :, None] * scale.float()[:, :, :, None]  # [B, K, groups, G, W]
        shift = (q_BKGW @ low.float().mT).mT[..., None]
        return (scaled @ codes.mT + shift).transpose(2, 3).flatten(3)

    def _packed(self, codes_BKgTW: Tensor) -> Tensor:
        return pack(codes_BKgTW.flatten(2, 3), self.bits)

    def _codes(self, words: Tensor, width: int) -> Tensor:
        return unpack(words, self.bits, width).unflatten(2, (-1, self.group))

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return None

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        return heads * (tokens * packed_width(width, self.bits) + tokens // self.group * 2 * SCALE_BYTES * width)


@dataclass(frozen=True, kw_only=True)
class Symmetric:
    """One scale for each token and head, no offset: signed integers of 8 bits, or floats of 8 bits (e4m3)."""

    floats: bool = False

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        x = x_BKTW.float()
        largest = x.abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
        top = torch.finfo(torch.float8_e4m3fn).max if self.floats else 127
        scale = stored(largest / top)
        x = (x / torch.where(scale == 0, 1.0, scale.float())).clamp(-top, top)
        return x.to(torch.float8_e4m3fn) if self.floats else x.round_().to(torch.int8), scale.squeeze(-1)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        codes, scale = parts
        return codes.float() * scale.float()[..., None]

    def scores(self, q_BKGW: Tensor, parts: Parts) -> Tensor:
        codes, scale = parts
        return (q_BKGW @ codes.float().mT) * scale.float()[:, :, None]

    def mean(self, weight_BKGT: Tensor, parts: Parts, width: int) -> Tensor:
        codes, scale = parts
        return (weight_BKGT * scale.float()[:, :, None]) @ codes.float()

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return None

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        return tokens * heads * (width + SCALE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Half(Decoded):
    """float16, and nothing beside it."""

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        return (stored(x_BKTW.float()),)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        return parts[0].float()

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return None

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        return tokens * heads * width * torch.float16.itemsize


@dataclass(frozen=True, kw_only=True)
class Spherical(Decoded):
    """The norm of each vector apart; its direction after a random rotation, in levels that suit a Gaussian.

    Source: TurboQuant, arXiv:2504.19874, without its second stage for inner products.
    """

    bits: int

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        x, width = x_BKTW.float(), x_BKTW.shape[-1]
        norm = stored(x.norm(dim=-1, keepdim=True))
        matrix = self.basis(width, x.device)
        assert matrix is not None
        unit = (x @ matrix) * (math.sqrt(width) / norm.float().clamp_min(1e-12))
        levels = gaussian_codebook(self.bits, x.device)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2).to(torch.uint8)
        return pack(codes, self.bits), norm.squeeze(-1)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        words, norm = parts
        levels = gaussian_codebook(self.bits, words.device) / math.sqrt(max(width, 1))
        x = levels[unpack(words, self.bits, width).int()] * norm.float()[..., None]
        matrix = None if turned else self.basis(width, x.device)
        return x if matrix is None else x @ matrix.t()

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return random_rotation(width, device)

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        return tokens * heads * (packed_width(width, self.bits) + SCALE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Residual(Decoded):
    """The form `inner`, and what it loses in each group of tokens as a product of `rank` columns and rows, float16.

    Columns and rows come from two rounds of power iteration. `inner` has no basis.

    Source: GEAR, arXiv:2403.05527, without its sparse part (there: GEAR-L), and with one product for each group of
    tokens from the first on, where GEAR has one for the whole prompt.
    """

    inner: Form
    group: int
    rank: int = 1

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        parts = self.inner.encode(x_BKTW, skip_BT)
        lost = x_BKTW.float() - self.inner.decode(parts, x_BKTW.shape[-1])
        if skip_BT is not None:
            lost = lost.masked_fill(skip_BT[:, None, :, None], 0.0)
        lost = lost.unflatten(2, (-1, self.group))  # [B, K, groups, tokens, W]
        columns, rows = [], []
        for _ in range(self.rank):
            # From the row of most energy, which is never orthogonal to what is sought.
            most = lost.square().sum(-1, keepdim=True).argmax(-2, keepdim=True)
            row = _unit(lost.gather(-2, most.expand(*most.shape[:-1], lost.shape[-1])))
            for _ in range(2):
                row = _unit((lost @ row.mT).mT @ lost)
            row = stored(row)
            column = stored(lost @ row.float().mT)
            lost = lost - column.float() * row.float()
            columns.append(column)
            rows.append(row)
        return *parts, torch.cat(columns, -1).flatten(2, 3), torch.cat(rows, -2).flatten(2, 3)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        *inner, columns, rows = parts
        lost = columns.float().unflatten(2, (-1, self.group)) @ rows.float().unflatten(2, (-1, self.rank))
        return self.inner.decode(tuple(inner), width) + lost.flatten(2, 3)

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return None

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        products = heads * self.rank * (tokens + tokens // self.group * width) * SCALE_BYTES
        return self.inner.bytes_of(tokens, heads, width) + products


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-20)
