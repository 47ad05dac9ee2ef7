"""Codes as bytes, and the constants of codecs: rotations and levels that nobody stores."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

_SEED = 0


def kept(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Make each constant once, for calls that may want gradients as well; in compiled programs it is a constant.

    Arguments are numbers, and last the device, which may be left out.
    """
    cached = functools.lru_cache(maxsize=64)(torch.inference_mode(False)(make))

    def found(*args: object) -> Tensor:
        return cached(*args)

    found.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return torch.compiler.assume_constant_result(found)


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the bit planes of codes: powers of two that fill bytes, 3 bits as 2 and 1."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def packed_width(width: int, bits: int) -> int:
    """Bytes of a row of `width` codes."""
    return sum(math.ceil(width * plane / 8) for plane in planes(bits))


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., bytes] of codes uint8 [..., W]. In each plane, code i of byte d is that of channel d + i * bytes."""
    rows, shift = [], 0
    for plane in planes(bits):
        part = (codes >> shift) & (2**plane - 1)
        shift += plane
        each = 8 // plane
        part = torch.nn.functional.pad(part, (0, -part.shape[-1] % each))
        packed = torch.zeros_like(part[..., : part.shape[-1] // each])
        for i, piece in enumerate(part.chunk(each, -1)):
            packed |= piece << (plane * i)
        rows.append(packed)
    return rows[0] if len(rows) == 1 else torch.cat(rows, -1)


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """uint8 [..., W]: the codes."""
    codes, shift, start = None, 0, 0
    for plane in planes(bits):
        size = math.ceil(width * plane / 8)
        row = packed[..., start : start + size]
        start += size
        if plane < 8:
            mask = 2**plane - 1
            row = torch.cat([(row >> (plane * i)) & mask for i in range(8 // plane)], -1)[..., :width]
        codes = row if codes is None else codes | (row << shift)
        shift += plane
    assert codes is not None
    return codes


def groups_as_floats(packed: Tensor, bits: int, width: int, size: int) -> Iterator[Tensor]:
    """float32 [..., size]: the codes of one group of channels after another."""
    each = 8 // bits
    if bits not in (2, 4) or width % (each * size):
        yield from unpack(packed, bits, width).float().split(size, -1)
        return
    for i in range(each):  # planes hold whole groups: they need not be put beside each other first
        plane = packed >> (bits * i) if i else packed
        yield from (plane & (2**bits - 1) if i + 1 < each else plane).float().split(size, -1)


def fitted(width: int, group: int) -> int:
    """The largest number of channels, `group` at most, that divides `width`."""
    return next((size for size in range(min(group, width), 0, -1) if width % size == 0), 1)


@kept
def hadamard(width: int, device: torch.device | None = None) -> Tensor:
    """Orthogonal [W, W]: blocks of the largest power of two that divides `width`."""
    block, size = torch.ones(1, 1), width & -width
    while len(block) < size:
        block = torch.cat((torch.cat((block, block), 1), torch.cat((block, -block), 1)), 0)
    blocks = [block / math.sqrt(len(block))] * (width // len(block)) if width else [torch.zeros(0, 0)]
    return torch.block_diag(*blocks).to(device)


@kept
def random_rotation(width: int, device: torch.device | None = None) -> Tensor:
    """A random orthogonal [W, W], the same for everybody."""
    random = torch.Generator().manual_seed(_SEED + width)
    q, r = torch.linalg.qr(torch.randn(width, width, generator=random, dtype=torch.float64))
    return (q * r.diagonal().sign()).float().to(device)


@kept
def gaussian_codebook(bits: int, device: torch.device | None = None) -> Tensor:
    """[2^bits] levels in rising order with the least mean squared error for a standard normal (Lloyd, Max)."""
    normal = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)
    count = 2**bits
    # For many levels their density is that of a normal of three times the variance.
    levels = 3**0.5 * normal.icdf((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    for _ in range(400):
        edges = torch.cat((torch.tensor([-torch.inf]), (levels[1:] + levels[:-1]) / 2, torch.tensor([torch.inf])))
        density = torch.where(edges.isinf(), 0.0, normal.log_prob(edges.clamp(-40, 40)).exp())
        levels = (density[:-1] - density[1:]) / (normal.cdf(edges[1:]) - normal.cdf(edges[:-1]))
    return levels.float().to(device)


@kept
def bits_of_bytes(device: torch.device | None = None) -> Tensor:
    """[256, 8] float32: the bits of each byte, the lowest first."""
    places = torch.arange(8, device=device)
    return ((torch.arange(256, device=device)[:, None] >> places) & 1).float()
