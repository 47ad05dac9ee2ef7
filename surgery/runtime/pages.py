"""Pages of cache slots, which rows (sequence, KV head) of unequal length take and give back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


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
    def grows(self) -> bool:
        """Whether one layer has the pool for itself, and may move its pages."""
        return self.per_sequence is None

    @property
    def pages(self) -> int:
        """Pages there are, free ones included."""
        return len(self.keys) if self._allocated else 0

    def take(self, count: int) -> list[int]:
        """Indices of `count` pages of a fixed pool, in order; contents are undefined.

        Raises:
            PoolFull: there are fewer.
        """
        if len(self._free) < count:
            raise PoolFull(count, len(self._free), self.pages)
        taken = self._free[len(self._free) - count :][::-1]
        del self._free[len(self._free) - count :]
        return taken

    def give(self, pages: Sequence[int]) -> None:
        """Take pages back; neighbours are handed out next."""
        self._free = sorted((*self._free, *pages), reverse=True)

    def rebuild(self, sources: Sequence[int]) -> None:
        """Make page i of a growing pool what page `sources[i]` was; where there was none at all, zeros."""
        index = torch.tensor(sources, dtype=torch.long, device=self.keys.device)
        self.keys, self.values = (
            t.index_select(0, index) if len(t) else t.new_zeros(len(index), *t.shape[1:])
            for t in (self.keys, self.values)
        )


class PoolFull(RuntimeError):
    """A fixed pool has fewer free pages than are needed."""

    def __init__(self, wanted: int, free: int, pages: int) -> None:
        super().__init__(f"{wanted} pages are needed, {free} of {pages} are free")
        self.pages = pages
