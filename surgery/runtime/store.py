"""Store axis: in which format the cache holds its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

from .codecs import CODECS, Form
from .site import AttentionSite

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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


@dataclass(frozen=True, kw_only=True)
class Codec:
    """Packed codes of `codecs.CODECS`, but for the first tokens of a sequence and its newest ones."""

    codec: str
    k_bits: int
    """Of one number of a key, or of a latent that keys and values are made from; scales are beside it."""
    v_bits: int | None
    """None where what lies in the place of values is kept as it is: positions beside latents."""
    group: int = 32
    """Numbers that share a scale, and tokens that are packed at a time."""
    sinks: int = 4
    """First tokens of a sequence that stay as they are."""
    recent: int = 32
    """Newest tokens that stay as they are, at least; at most a group less one more."""
    dtype: str = "bfloat16"
    kind: Literal["codec"] = "codec"

    def label(self) -> str:
        """Name and bits."""
        same = self.v_bits in (None, self.k_bits)
        return f"{self.codec} {f'{self.k_bits} bits' if same else f'K {self.k_bits} V {self.v_bits} bits'}"

    def supports(self, site: AttentionSite) -> str | None:
        """Every attention that keeps all its tokens; `legality` refuses windows."""
        return None

    def forms(self) -> tuple[Form, Form | None]:
        """How keys and values are encoded."""
        kind = CODECS[self.codec]
        values = None if self.v_bits is None else kind.values(self.v_bits, self.group)
        return kind.keys(self.k_bits, self.group), values

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


STORES: dict[str, Any] = {"dense": Dense, "codec": Codec}
"""`kind` -> class of the value."""


def itemsize_of(dtype: str) -> int:
    """Bytes of one number of a float type by its name."""
    return _BYTES[dtype]
