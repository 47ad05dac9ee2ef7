"""Store axis: in which format the cache holds its numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from torch import Tensor

from .calibrated_forms import Turned, columns_of_mask
from .codecs import CODECS, Form
from .site import AttentionSite

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PLACE_BYTES = 8
"""Of a column or position that a static cache keeps for a sequence: int64."""


class Store(Protocol):
    """A value of the axis. `STORES` names its class by `kind`, `caches.CACHE_LAYERS` the cache layer that holds it."""

    @property
    def kind(self) -> str:
        """Name of the format."""

    @property
    def dtype(self) -> str:
        """Format in which attention computes, and in which numbers are held that are not encoded."""

    def label(self) -> str:
        """A few words for tables; empty for the parent's own format."""

    def supports(self, site: AttentionSite) -> str | None:
        """Why this attention's cache cannot be held so; None where it can."""

    def bytes_at(self, tokens: int, entry: tuple[int, int, int]) -> int:
        """Bytes of `tokens` cached tokens of one sequence, all that persists included.

        Args:
            entry: heads, width of keys and width of values of one token.
        """

    def static_bytes(self, tokens: int, entry: tuple[int, int, int]) -> int:
        """Bytes that a static cache for one sequence of `tokens` tokens allocates at once; `entry` as above."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Plain numbers of one float type."""

    dtype: str = "bfloat16"
    kind: Literal["dense"] = "dense"

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return _BYTES[self.dtype]

    def label(self) -> str:
        """Nothing: it is what the parent has."""
        return ""

    def supports(self, site: AttentionSite) -> str | None:
        """Every attention."""
        return None

    def bytes_at(self, tokens: int, entry: tuple[int, int, int]) -> int:
        """All numbers, and nothing beside them."""
        heads, key, value = entry
        return tokens * heads * (key + value) * self.itemsize

    def static_bytes(self, tokens: int, entry: tuple[int, int, int]) -> int:
        """As of the dynamic one."""
        return self.bytes_at(tokens, entry)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Packed codes of `codecs.CODECS`, but for the first tokens of a sequence and its newest ones."""

    codec: str
    k_bits: float
    """Of one number of a key, or of a latent that keys and values are made from; scales are beside it."""
    v_bits: float | None
    """None where what lies in the place of values is kept as it is: positions beside latents."""
    group: int = 32
    """Numbers that share a scale, and tokens that are packed at a time."""
    sinks: int = 4
    """First tokens of a sequence that stay as they are."""
    recent: int = 32
    """Newest tokens that stay as they are, at least; at most a group less one more."""
    k_channels: int | None = None
    """Channels of each KV head that packed keys have; None: all of them."""
    dtype: str = "bfloat16"
    kind: Literal["codec"] = "codec"

    def label(self) -> str:
        """Name and bits."""
        same = self.v_bits in (None, self.k_bits)
        bits = f"{self.k_bits:g} bits" if same else f"K {self.k_bits:g} V {self.v_bits:g} bits"
        return f"{self.codec} {bits}" + ("" if self.k_channels is None else f", {self.k_channels} channels of K")

    def supports(self, site: AttentionSite) -> str | None:
        """Why keys cannot be rotated at read, where the codec holds them before; `legality` refuses windows."""
        if not self.unrotated or site.rotary is None:
            return None
        what = f"{self.codec} holds keys before their rotation"
        if site.rotary.length_dependent:
            return f"{what}, and the rotary frequencies vary with the length. Use kivi or int4."
        if site.rotary.axes is not None:
            return f"{what}, and tokens of an image have several positions each. Use kivi or int4."
        if site.k_norm is not None and site.k_norm.after_rotary:
            return f"{what}, and keys are normed after it. Use kivi or int4."
        return None

    @property
    def unrotated(self) -> bool:
        """Whether keys are held before their rotation."""
        return CODECS[self.codec].unrotated

    @property
    def calibrated(self) -> bool:
        """Whether there are tables of calibration text."""
        return CODECS[self.codec].calibrated or self.k_channels is not None

    def table_shapes(self, entry: tuple[int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shape by name of what calibration text has decided for a layer; int32, floats seen as their bits.

        Args:
            entry: as for `bytes_at`.
        """
        heads, *widths = entry
        made = CODECS[self.codec].tables
        shapes: dict[str, tuple[int, ...]] = {}
        for letter, width, bits in zip("kv", widths, (self.k_bits, self.v_bits), strict=True):
            if made is not None and width and bits is not None:
                found = made(letter, heads, width, bits)
                shapes |= {f"{letter}_{name}_bits": shape for name, shape in found.items()}
        return shapes if self.k_channels is None else {**shapes, "k_mask_bits": (heads, widths[0])}

    def forms(self, tables: Mapping[str, Tensor] | None = None) -> tuple[Form, Form | None]:
        """How keys and values are encoded.

        Args:
            tables: by the names of `table_shapes`; without them, calibrated forms tell their bytes and nothing else.
        """
        kind, group = CODECS[self.codec], self.group
        own: dict[str, dict[str, Tensor]] = {}
        for name, table in (tables or {}).items():
            own.setdefault(name[0], {})[name[2:].removesuffix("_bits")] = table
        values = None if self.v_bits is None else kind.values(self.v_bits, group, own.get("v"))
        keys = kind.keys(self.k_bits, group, own.get("k"))
        if self.k_channels is not None:
            columns = columns_of_mask(own["k"]["mask"], self.k_channels) if "k" in own else None
            keys = Turned(keys, columns, self.k_channels)
        return keys, values

    def packed(self, tokens: int) -> int:
        """Tokens that are packed when so many have come."""
        return max(0, (tokens - self.sinks - self.recent) // self.group * self.group)

    def bytes_at(self, tokens: int, entry: tuple[int, int, int]) -> int:
        """Codes, scales and offsets, and the tokens that stay as they are."""
        heads, *widths = entry
        packed, total = self.packed(tokens), 0
        for form, width in zip(self.forms(), widths, strict=True):
            coded = packed if form is not None and width else 0
            total += (tokens - coded) * heads * width * itemsize_of(self.dtype)
            total += form.bytes_of(coded, heads, width) if form is not None and coded else 0
        return total

    def bytes_of_slot(self, key: int, value: int) -> int:
        """Bytes of the codes of one key and one value of these widths, where pages hold them one by one."""
        forms = zip(self.forms(), (key, value), strict=True)
        return sum(width * itemsize_of(self.dtype) if f is None else f.bytes_of(1, 1, width) for f, width in forms)

    def rooms(self, tokens: int) -> tuple[int, int, int]:
        """Tokens that a static cache of `tokens` tokens has room for: the first ones, packed ones, and the newest."""
        first = min(self.sinks, tokens - 1)
        return first, self.packed(tokens), min(self.recent + self.group, tokens - first)

    def static_bytes(self, tokens: int, entry: tuple[int, int, int]) -> int:
        """All rooms, which of the newest tokens are padding, and where the sequence begins."""
        heads, *widths = entry
        if not heads:
            return 0
        first, packed, newest = self.rooms(tokens)
        total = newest + _PLACE_BYTES * (1 + self.unrotated)
        for form, width in zip(self.forms(), widths, strict=True):
            coded = form is not None and width > 0
            total += (first + newest if coded else tokens) * heads * width * itemsize_of(self.dtype)
            total += form.bytes_of(packed, heads, width) if form is not None and coded and packed else 0
        return total


STORES: dict[str, Any] = {"dense": Dense, "codec": Codec}
"""`kind` -> class of the value."""


def itemsize_of(dtype: str) -> int:
    """Bytes of one number of a float type by its name."""
    return _BYTES[dtype]
