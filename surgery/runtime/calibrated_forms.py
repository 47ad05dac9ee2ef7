"""Forms of packed keys and values whose constants calibration text decides, for each KV head."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .packed_forms import SCALE_BYTES, Decoded, Form, Parts, Tables, stored
from .packing import bits_of_bytes, pack, packed_width, unpack

TABLES = ("turn", "back", "step", "mean", "widths")
"""Tables of `Directions`, per KV head: [W, W] to directions and back, [W] of each direction its step, of each channel
what is subtracted, and of each direction its bits."""
FROM_TABLE = 1024
"""Vectors of a head from which on a CPU decodes them by a table of bytes: a third of the time that products of bits
take."""
_GAIN_STEPS = 8
"""Gains are powers of two in steps of an eighth, from 2^-16 on."""
_TRIED = range(-8, 24, 2)
"""Gains that are tried, in these steps from where a vector starts: half of that to seven times."""
_BLOCK, _BLOCK_CPU = 1 << 22, 1 << 16
"""Numbers whose gains are looked for at a time, in eight tokens or more."""


class Directions(Decoded):
    """Directions of calibration text, each with bits of its own and a fixed step, and a gain of each vector.

    Vectors less their mean are turned to the principal directions under the metric in which their errors are felt.
    The gain, a byte, is the one with the least squared error there: with it the steps reach as far as a vector goes
    that the text had none of, and of many gains one falls well. Codes of a vector lie bit behind bit. Decoded numbers
    are linear in them: one product with [bits, W] decodes.

    Args:
        bits: of one number, the gain included; those of a vector fill whole bytes.
        normed: whether steps are those of vectors divided by their norms under the metric; gains are looked for
            around the norm of each, otherwise around 1.
        tables: None where bytes are asked for and nothing else.
    """

    def __init__(self, bits: float, normed: bool, tables: Tables | None) -> None:
        self.bits, self.normed = bits, normed
        if tables is None:
            return
        self.turn, self.back, self.step, self.middle = (tables[name].view(torch.float32) for name in TABLES[:4])
        widths = tables["widths"].long()
        count = int(widths[0].sum())
        if bool((widths.sum(-1) != count).any()) or count != self.code_bits(widths.shape[-1]):
            raise ValueError(
                f"the bits of the directions of a head add up to {widths.sum(-1).tolist()}; "
                f"{self.code_bits(widths.shape[-1])} were planned. The checkpoint is damaged, or an earlier version of "
                "surgery made it: convert the parent again."
            )
        self.half = 2.0 ** (widths - 1)[:, None]
        pairs = [[(d, j) for d, w in enumerate(row) for j in range(w)] for row in widths.tolist()]
        places = torch.tensor(pairs, device=widths.device)
        self.direction, self.shift = places[..., 0], places[..., 1]
        scaled_back = self.step[..., None] * self.back
        # Code c stands for c + 1/2 - half; directions without bits stand for nothing.
        middle = torch.where(widths > 0, 0.5 - self.half[:, 0], 0.0)
        self.base = torch.einsum("kd,kdw->kw", middle, scaled_back)[:, None]
        rows = self.direction[..., None].expand(-1, -1, scaled_back.shape[-1])
        self.weights = 2.0 ** self.shift[..., None] * scaled_back.gather(1, rows)
        self.there = widths[:, None] > 0
        self.felt = torch.where(self.there, self.step[:, None].square(), 0.0)
        self.moved = torch.tensor(_TRIED, device=widths.device)[:, None, None, None]

    def code_bits(self, width: int) -> int:
        """Bits of the codes of one vector."""
        return 8 * (self._bytes(width) - 1)

    def _bytes(self, width: int) -> int:
        return max(int(self.bits * width) // 8, 2)

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        z = (x_BKTW.float() - self.middle[:, None]) @ self.turn
        start = _level(z.norm(dim=-1)) if self.normed else torch.full_like(z[..., 0], 16.0 * _GAIN_STEPS)
        z = z / self.step[:, None]
        level = self._best(z, start)
        codes = self._nearest(z / _gain(level)[..., None]) + self.half
        codes = torch.where(self.there, codes, 0.0).to(torch.uint8)
        index = self.direction[None, :, None].expand(*codes.shape[:3], -1)
        bits = (codes.gather(-1, index) >> self.shift[:, None].to(torch.uint8)) & 1
        places = torch.arange(8, dtype=torch.uint8, device=bits.device)
        return (bits.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8), level.to(torch.uint8)

    def _nearest(self, z_BKTW: Tensor) -> Tensor:
        """Codes, in steps, from -half on."""
        return torch.minimum(torch.maximum(z_BKTW.floor(), -self.half), self.half - 1)

    def _best(self, z_BKTW: Tensor, start_BKT: Tensor) -> Tensor:
        """[B, K, T]: of the gains around `start`, in levels, the one with the least squared error.

        Args:
            z_BKTW: in steps.
        """
        B, K, T, W = z_BKTW.shape
        block = _BLOCK_CPU if z_BKTW.is_cpu else _BLOCK
        tokens = T if torch.compiler.is_compiling() else max(block // (len(_TRIED) * B * K * W), 8)
        best = []
        for z, start in zip(z_BKTW.split(tokens, 2), start_BKT.split(tokens, 2), strict=True):
            levels = (start + self.moved).clamp_(0, 255)
            gains = _gain(levels)[..., None]
            lost = (self._nearest(z / gains).add_(0.5).mul_(gains) - z).square_().mul_(self.felt).sum(-1)
            best.append(levels.gather(0, lost.argmin(0, keepdim=True))[0])
        return torch.cat(best, 2)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        packed, level = parts
        by_table = packed.is_cpu and packed[:, 0, :, 0].numel() >= FROM_TABLE and not torch.compiler.is_compiling()
        x = self._looked_up(packed) if by_table else _bits(packed) @ self.weights + self.base
        return x * _gain(level.float())[..., None] + self.middle[:, None]

    def _looked_up(self, packed_BKTb: Tensor) -> Tensor:
        """[B, K, T, W]: `base` and what each byte stands for in its place, from a table of all 256 values."""
        B, K, T, places = packed_BKTb.shape
        starts = torch.arange(0, 256 * K * places, 256, dtype=torch.int32).view(K, 1, places)
        table = _table_of_bytes(self.weights, self.base)
        return F.embedding_bag((packed_BKTb.int() + starts).view(-1, places), table, mode="sum").view(B, K, T, -1)

    def mean(self, weight_BKGT: Tensor, parts: Parts, width: int) -> Tensor:
        weight = weight_BKGT * _gain(parts[1].float())[:, :, None]
        x = (weight @ _bits(parts[0])) @ self.weights + weight.sum(-1, keepdim=True) * self.base
        return x + weight_BKGT.sum(-1, keepdim=True) * self.middle[:, None]

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return None

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        return tokens * heads * self._bytes(width)


@functools.lru_cache(maxsize=1)
@torch.inference_mode(False)
@torch.no_grad()
def _table_of_bytes(weights_KbW: Tensor, base_K1W: Tensor) -> Tensor:
    """[K * bytes * 256, W]: what each value of each byte of a vector stands for, and in the first one `base`.

    One is kept, for the blocks of a step: it takes as much memory as the packed keys of some ten thousand tokens.
    """
    parts = weights_KbW.unflatten(1, (-1, 2, 4))
    low, high = (bits_of_bytes(weights_KbW.device)[:16, :4] @ parts).unbind(2)  # [K, bytes, 16, W]: of four bits each
    low[:, 0] += base_K1W
    return (high[:, :, :, None] + low[:, :, None]).flatten(0, 3)


def _bits(packed: Tensor) -> Tensor:
    """float32 [..., 8 * bytes], 0 or 1."""
    found = bits_of_bytes(packed.device).index_select(0, packed.flatten().int())
    return found.view(*packed.shape[:-1], 8 * packed.shape[-1])


def _gain(level: Tensor) -> Tensor:
    return torch.exp2(level / _GAIN_STEPS - 16)


def _level(gain: Tensor) -> Tensor:
    return ((gain.clamp_min(2.0**-16).log2() + 16) * _GAIN_STEPS).round_().clamp_(0, 255)


class Turned:
    """Vectors of each KV head multiplied by orthonormal columns of its own, then in the form `inner`.

    What is orthogonal to the columns is left out, and comes back as 0.

    Args:
        turn_KWn: None where bytes are asked for and nothing else.
        channels: n, where that is less than W.
    """

    def __init__(self, inner: Form, turn_KWn: Tensor | None, channels: int | None = None) -> None:
        self.inner, self.channels = inner, channels
        if turn_KWn is not None:
            self.turn_KWn = turn_KWn
            own = inner.basis(turn_KWn.shape[-1], turn_KWn.device)
            self.basis_KWn = turn_KWn if own is None else turn_KWn @ own

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        return self.inner.encode(x_BKTW.float() @ self.turn_KWn, skip_BT)

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        x = self.inner.decode(parts, self._held(width), turned=True)
        return x if turned else x @ self.basis_KWn.mT

    def scores(self, q_BKGn: Tensor, parts: Parts) -> Tensor:
        return self.inner.scores(q_BKGn, parts)

    def mean(self, weight_BKGT: Tensor, parts: Parts, width: int) -> Tensor:
        return self.inner.mean(weight_BKGT, parts, self._held(width))

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return self.basis_KWn

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        return self.inner.bytes_of(tokens, heads, self._held(width))

    def _held(self, width: int) -> int:
        return width if self.channels is None else self.channels


def columns_of_mask(mask_KW: Tensor, count: int) -> Tensor:
    """[K, W, n] float32: of each KV head the columns of the unit matrix whose channels the mask keeps, in their order.

    Raises:
        ValueError: a head keeps more or fewer than `count`.
    """
    kept = mask_KW.bool().sum(-1)
    if bool((kept != count).any()):
        raise ValueError(
            f"the channels that a head keeps add up to {kept.tolist()}; {count} were planned. The checkpoint is "
            "damaged: convert the parent again."
        )
    index = mask_KW.bool().int().argsort(dim=-1, descending=True, stable=True)[:, :count]
    return F.one_hot(index, mask_KW.shape[-1]).mT.float()


OUTLIERS = 0.01
"""Part of the numbers of a group of tokens that `Levels` keeps apart."""
NEAR_EQUAL = 0.01
"""Numbers whose distances differ by a smaller part may take each other's place among those."""


@dataclass(frozen=True, kw_only=True)
class Levels(Decoded):
    """Codes of levels that text has placed; the furthest numbers of each group of tokens apart, in float16.

    Keys (`by_channel`) are seen less the middle of each channel, in parts of its reach, both of the text; values
    between the least and the largest number of each token. In all groups as many numbers stand apart.

    Source: KVQuant, arXiv:2401.18079. Sensitivities there are gradients of the whole model; see `rewriters.stored`.

    Args:
        tables: `levels` [K, 2^bits] in rising order, and for keys `middle` and `reach` [K, W].
    """

    bits: int
    group: int
    by_channel: bool
    tables: Tables | None = field(repr=False, compare=False)

    def outliers(self, width: int) -> int:
        """Numbers of a group that stand apart."""
        return max(1, round(OUTLIERS * self.group * width))

    def encode(self, x_BKTW: Tensor, skip_BT: Tensor | None = None) -> Parts:
        x, width = x_BKTW.float(), x_BKTW.shape[-1]
        if self.by_channel:
            z = (x - self._table("middle")[:, None]) / self._table("reach")[:, None]
            far = z.abs()
        else:
            centred = x - x.mean(-1, keepdim=True)
            far = centred.abs() / centred.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
        if skip_BT is not None:
            far = far.masked_fill(skip_BT[:, None, :, None], -1.0)
        # Of about equal ones (a word that comes again) the first: rounding, and with it the size of a batch, is not to
        # decide.
        grouped = self._grouped(far)
        later = torch.linspace(0, NEAR_EQUAL, grouped.shape[-1], device=x.device)
        index = torch.where(grouped < 0, grouped, grouped * (1 - later)).topk(self.outliers(width), -1).indices
        values = self._grouped(x).gather(-1, index)
        apart: Parts = (stored(values).flatten(2), index.to(self._index_type(width)).flatten(2))
        scales: Parts = ()
        if not self.by_channel:
            there = torch.ones_like(self._grouped(x), dtype=torch.bool).scatter(-1, index, False).view(x.shape)
            low = stored(torch.where(there, x, torch.inf).amin(-1, keepdim=True).clamp(-1e30, 1e30))
            span = torch.where(there, x, -torch.inf).amax(-1, keepdim=True).clamp(-1e30, 1e30) - low.float()
            span = stored(span.clamp_min(0.0))
            z = (x - low.float()) / torch.where(span == 0, 1.0, span.float())
            scales = (low.squeeze(-1), span.squeeze(-1))
        levels = self._table("levels")
        codes = torch.zeros_like(z, dtype=torch.uint8)
        for edge in ((levels[:, 1:] + levels[:, :-1]) / 2).unbind(-1):
            codes += z > edge[:, None, None]
        return pack(codes, self.bits), *apart, *scales

    def decode(self, parts: Parts, width: int, *, turned: bool = False) -> Tensor:
        words, values, index, *scales = parts
        levels = self._table("levels")
        codes = unpack(words, self.bits, width).long()
        heads = torch.arange(len(levels), device=codes.device)[:, None, None] * levels.shape[1]
        z = levels.flatten().index_select(0, (codes + heads).flatten()).view(codes.shape)
        if self.by_channel:
            x = z * self._table("reach")[:, None] + self._table("middle")[:, None]
        else:
            low, span = (s.float()[..., None] for s in scales)
            x = z * span + low
        each = self.outliers(width)
        at, found = (t.unflatten(2, (-1, each)) for t in (index.long(), values.float()))
        return self._grouped(x).scatter(-1, at, found).view(x.shape)

    def _grouped(self, x_BKTW: Tensor) -> Tensor:
        """[B, K, groups, group * W]"""
        return x_BKTW.unflatten(2, (-1, self.group)).flatten(3)

    def _index_type(self, width: int) -> torch.dtype:
        return torch.int16 if self.group * width <= 2**15 else torch.int32

    def basis(self, width: int, device: torch.device | None = None) -> Tensor | None:
        return None

    def bytes_of(self, tokens: int, heads: int, width: int) -> int:
        apart = tokens // self.group * self.outliers(width) * (SCALE_BYTES + self._index_type(width).itemsize)
        scales = 0 if self.by_channel else tokens * 2 * SCALE_BYTES
        return heads * (tokens * packed_width(width, self.bits) + apart + scales)

    def _table(self, name: str) -> Tensor:
        assert self.tables is not None
        return self.tables[name].view(torch.float32)
