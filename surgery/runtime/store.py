"""Store axis: in which format the cache holds its numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

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


STORES: dict[str, Any] = {"dense": Dense}
"""`kind` -> class of the value."""


def itemsize_of(dtype: str) -> int:
    """Bytes of one number of a float type by its name."""
    return _BYTES[dtype]
