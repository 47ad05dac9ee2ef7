"""The packing of quantised caches: keys per channel over groups of tokens, values per token (after KIVI).

A number is `scale * code + low`; scale and low are float16, and codes are rounded against those rounded values. Words
are 16 bits. With 8 bits they hold 2 codes, with 4 bits 4: code i of word d is that of channel d + i * (H / planes), so
that each plane of a row of words is a contiguous part of the channels. With 2 bits a row of words holds two tokens: of
the g tokens of a group, row r holds r in its lower bytes and r + g / 2 in its upper ones, each as 4 planes.
Keys have scale and low [S / group, H], values [S], or [S, parts] where each of so many parts of the channels has its
own: a plane or several.
The newest tokens, fewer than a group, wait unquantised in a ring [group, H].
Source: arXiv:2402.02750; the residual there holds a fixed number of tokens, here what a group lacks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = (2, 4, 8)


def planes_of(bits: int) -> int:
    """Parts of the channels that lie above each other in one word."""
    return 2 if bits == 8 else 4


def halves_of(bits: int) -> int:
    """Tokens that share a row of words."""
    return 2 if bits == 2 else 1


@dataclass(frozen=True, kw_only=True)
class Packed:
    """A quantised cache: words int16 [B, K, S / halves, H / planes], scale and low float16."""

    words: Tensor
    scale: Tensor
    low: Tensor


def pack_keys(k_BKSH: Tensor, bits: int, group: int) -> Packed:
    """Scale and low [B, K, S / group, H]."""
    k = k_BKSH.float().unflatten(2, (-1, group))
    codes, scale, low = _codes(k, bits, 3)
    return Packed(words=pack(codes, bits).flatten(2, 3), scale=scale.squeeze(3), low=low.squeeze(3))


def pack_values(v_BKSV: Tensor, bits: int, group: int) -> Packed:
    """Scale and low [B, K, S]."""
    codes, scale, low = _codes(v_BKSV.float(), bits, 3)
    return Packed(
        words=pack(codes.unflatten(2, (-1, group)), bits).flatten(2, 3), scale=scale.squeeze(3), low=low.squeeze(3)
    )


def unpack_keys(
    words: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, K, S, H] of what `pack_keys` made."""
    codes = unpack(words, bits, group).to(dtype)
    return (codes * scale.to(dtype)[:, :, :, None] + low.to(dtype)[:, :, :, None]).flatten(2, 3)


def unpack_values(
    words: Tensor, scale: Tensor, low: Tensor, bits: int, group: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """[B, K, S, V] of what `pack_values` made, or with scale and low [B, K, S, parts]."""
    codes = unpack(words, bits, group).flatten(2, 3).to(dtype)
    scale, low = (t.to(dtype) if t.ndim == 4 else t.to(dtype)[..., None] for t in (scale, low))
    codes = codes.unflatten(-1, (scale.shape[-1], -1))
    return (codes * scale[..., None] + low[..., None]).flatten(-2)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes [..., group, H] as int16 words [..., group / halves, H / planes]."""
    words = torch.zeros((), dtype=torch.int32, device=codes.device)
    for t, tokens in enumerate(codes.to(torch.int32).chunk(halves_of(bits), -2)):
        for i, plane in enumerate(tokens.chunk(planes_of(bits), -1)):
            words = words | (plane << (8 * t + bits * i))
    return torch.where(words >= 2**15, words - 2**16, words).to(torch.int16)


def unpack(words: Tensor, bits: int, group: int) -> Tensor:
    """Codes int32 [B, K, S / group, group, H] of int16 words."""
    wide = words.to(torch.int32).unflatten(2, (-1, group // halves_of(bits)))
    halves = [
        torch.cat([(wide >> (8 * t + bits * i)) & (2**bits - 1) for i in range(planes_of(bits))], -1)
        for t in range(halves_of(bits))
    ]
    return torch.cat(halves, -2)


def _codes(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    low = x.amin(dim, keepdim=True)
    scale = ((x.amax(dim, keepdim=True) - low) / (2**bits - 1)).half()
    low = low.half()
    step = torch.where(scale == 0, 1.0, scale.float())
    codes = torch.floor((x - low.float()) / step + 0.5).clamp(0, 2**bits - 1)
    return codes, scale, low
