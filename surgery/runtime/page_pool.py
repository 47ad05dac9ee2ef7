"""Pages of cache slots, which rows (sequence, KV head) of unequal length take and give back."""

from __future__ import annotations

import torch
from torch import Tensor


class PagePool:
    """`keys` [P, page, H] and `values` [P, page, V], and which of the P pages are free.

    A pool that grows belongs to one layer, which moves all of its pages. A fixed one is shared by layers, and hands
    pages out without asking the device how many: a compiled step may take some. Its pages stand in `order` [P] int32,
    of which the first `used` (int64, no dimensions) are taken.

    Args:
        page: slots per page, a power of two from 16 (the operators that read pages want tiles inside one).
        per_sequence: pages of a fixed pool for each sequence of the batch; None: the pool grows.
        ratio: tokens per slot that it was sized for, for messages.
    """

    keys: Tensor
    values: Tensor
    order: Tensor
    used: Tensor

    def __init__(self, page: int, per_sequence: int | None = None, ratio: float = 1.0) -> None:
        self.page, self.per_sequence, self.ratio = page, per_sequence, ratio
        self._allocated = False

    def allocate(self, key: Tensor, value: Tensor) -> None:
        """Make the tensors, with the widths, dtype and device of `key` [B, ..., H] and `value` [B, ..., V]; once."""
        if self._allocated:
            return
        pages = len(key) * (self.per_sequence or 0)
        # Zeros: what lies after a row's length is hidden, and 0 times NaN would show all the same.
        self.keys = key.new_zeros(pages, self.page, key.shape[-1])
        self.values = value.new_zeros(pages, self.page, value.shape[-1])
        self.order = torch.arange(pages, dtype=torch.int32, device=key.device)
        self.used = torch.zeros((), dtype=torch.int64, device=key.device)
        self._allocated = True

    @property
    def grows(self) -> bool:
        """Whether one layer has the pool for itself, and may move its pages."""
        return self.per_sequence is None

    @property
    def pages(self) -> int:
        """Pages there are, free ones included."""
        return len(self.keys) if self._allocated else 0

    def tensors(self) -> list[Tensor]:
        """All that it keeps on the device."""
        if not self._allocated:
            return []
        return [self.keys, self.values, *(() if self.grows else (self.order, self.used))]

    def has(self, wanted: Tensor) -> Tensor:
        """Whether a fixed pool has a free page for each True of `wanted`; bool without dimensions."""
        return self.used + wanted.sum() <= self.pages

    def take(self, wanted: Tensor) -> Tensor:
        """Free pages of a fixed pool that `has` them, one for each True of `wanted`; int32, undefined elsewhere.

        Contents are undefined.
        """
        nth = wanted.flatten().cumsum(0)
        taken = self.order[(self.used + nth - 1).clamp(0, self.pages - 1)].view_as(wanted)
        self.used += nth[-1]
        return taken

    def give(self, pages: Tensor) -> None:
        """Take pages [n] of a fixed pool back; neighbours are handed out next."""
        free = torch.empty(self.pages, dtype=torch.bool, device=self.order.device)
        free[self.order.long()] = torch.arange(self.pages, device=free.device) >= self.used
        free[pages.long()] = True
        self.order.copy_(torch.argsort(free.byte(), stable=True))
        self.used -= len(pages)

    def rebuild(self, sources: Tensor) -> None:
        """Make page i of a growing pool what page `sources[i]` was; where there was none at all, zeros."""
        self.keys, self.values = (
            t.index_select(0, sources) if len(t) else t.new_zeros(len(sources), *t.shape[1:])
            for t in (self.keys, self.values)
        )
