"""Pages of cache slots, which rows (sequence, KV head) of unequal length take and give back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_GROWTH = 64
"""A growing pool gets this part of its pages more at once: 1.6 % of slack, and few copies."""


class PagePool:
    """`keys` [P, page, H] and `values` [P, page, V], and which of the P pages are free.

    Args:
        page: slots per page, a power of two from 16 (the operators that read pages want tiles inside one).
        per_sequence: pages of a fixed pool for each sequence of the batch; None: the pool grows.
        ratio: tokens per slot that it was sized for, for messages.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, page: int, per_sequence: int | None = None, ratio: float = 1.0) -> None:
        self.page, self.per_sequence, self.ratio = page, per_sequence, ratio
        self._free: list[int] = []
        self._allocated = False

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Make the tensors, with the widths, dtype and device of `key` [B, ..., H] and `value` [B, ..., V]; once."""
        if self._allocated:
            return
        pages = len(key) * (self.per_sequence or 0)
        # Zeros: what lies behind a row's length is hidden, and 0 times NaN would show all the same.
        self.keys = key.new_zeros(pages, self.page, key.shape[-1])
        self.values = value.new_zeros(pages, self.page, value.shape[-1])
        self._free = list(range(pages))[::-1]
        self._allocated = True

    @property
    def pages(self) -> int:
        """Pages there are, free ones included."""
        return len(self.keys) if self._allocated else 0

    def take(self, count: int) -> list[int]:
        """Indices of `count` pages; contents are undefined.

        Raises:
            PoolFull: a fixed pool has fewer.
        """
        if len(self._free) < count:
            old = self.pages
            if self.per_sequence is not None:
                raise PoolFull(count, len(self._free), old)
            new = max(count - len(self._free), old // _GROWTH)
            self.keys = torch.cat((self.keys, self.keys.new_zeros(new, *self.keys.shape[1:])))
            self.values = torch.cat((self.values, self.values.new_zeros(new, *self.values.shape[1:])))
            self._free[:0] = range(old + new - 1, old - 1, -1)
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        self._free.extend(reversed(pages))


class PoolFull(RuntimeError):
    """A fixed pool has fewer free pages than are needed."""

    def __init__(self, wanted: int, free: int, pages: int) -> None:
        super().__init__(f"{wanted} pages are needed, {free} of {pages} are free")
        self.pages = pages
