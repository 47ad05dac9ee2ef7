"""Cache of a layer whose tokens are held as packed codes (`Codec`), with the first and the newest ones in full.

Column s of the cache is that of the s-th token that came, padding included. The first `sinks` tokens of each sequence
lie in `first`, the next columns are packed in whole groups, and the newest, at least `recent` of them, wait in `ring`.
What is packed is never encoded again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .codecs import Form, Parts, groups_of
from .coded_layer import CodedLayer, require_finite
from .masks import real_of_new
from .quantised_attention import Seen

BLOCK = 2048
"""Tokens that are decoded at once where one token attends to many."""


def in_blocks(
    both: tuple[Parts, ...], packed: int, group: int, start: int, block: int
) -> Iterator[tuple[int, int, Parts, Parts]]:
    """Stretches of about `block` of `packed` tokens, as `Seen` has them; the first column is `start`."""
    total, each = packed // group, max(1, block // group)
    for at in range(0, total, each):
        count = min(each, total - at)
        keys, values = (groups_of(parts, at, count, total) for parts in both)
        yield start + at * group, count * group, keys, values


class Stream:
    """Keys, or values, of one layer; without a `form` they are held as they are."""

    def __init__(self, form: Form | None, like_BKTW: Tensor) -> None:
        self.form, self.width, self.dtype = form, like_BKTW.shape[-1], like_BKTW.dtype
        self.first_BKsW: Tensor = like_BKTW[:, :, :0]
        self.parts: Parts = ()
        self.ring_BKrW: Tensor = like_BKTW[:, :, :0]
        self.packed = 0
        """Tokens in `parts`."""

    def append(self, new_BKTW: Tensor) -> None:
        """Put tokens behind the newest."""
        self.ring_BKrW = torch.cat((self.ring_BKrW, new_BKTW), 2) if self.ring_BKrW.shape[2] else new_BKTW

    def everything(self) -> Tensor:
        """[B, K, S, W] in the dtype that came; the first columns of padded sequences are not in their places."""
        if not self.packed:
            return torch.cat((self.first_BKsW, self.ring_BKrW), 2) if self.first_BKsW.shape[2] else self.ring_BKrW
        assert self.form is not None
        decoded = self.form.decode(self.parts, self.width).to(self.dtype)
        return torch.cat((self.first_BKsW, decoded, self.ring_BKrW), 2)

    def pack(self, count: int, skip_BT: Tensor | None) -> None:
        """Encode the oldest `count` tokens of the ring."""
        if self.form is None:
            return
        made = self.form.encode(self.ring_BKrW[:, :, :count].detach(), skip_BT)
        self.parts = made if not self.packed else tuple(torch.cat(p, 2) for p in zip(self.parts, made, strict=True))
        self.packed += count
        self.ring_BKrW = self.ring_BKrW[:, :, count:].clone()  # a slice would keep all of it

    def crop(self, count: int) -> None:
        """Forget the newest `count` tokens, all in the ring."""
        self.ring_BKrW = self.ring_BKrW[:, :, : self.ring_BKrW.shape[2] - count].clone()

    def select(self, rows_B: Tensor) -> None:
        """Go on with these sequences."""
        self.first_BKsW, self.ring_BKrW, *parts = (
            t.index_select(0, rows_B) for t in (self.first_BKsW, self.ring_BKrW, *self.parts)
        )
        self.parts = tuple(parts)

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [self.first_BKsW, self.ring_BKrW, *self.parts]


class QuantisedLayer(CodedLayer):
    """A layer of a dynamic cache."""

    is_compileable = False

    def _clear(self) -> None:
        self.streams: tuple[Stream, ...] = ()
        self.seen = 0
        self.hidden_BS: Tensor | None = None
        """True at padding, of all columns; None where there was none."""
        self.begin_B: Tensor | None = None
        """Column of each sequence's first token; None where that is 0 in all."""
        self.before: list[int | None] = []
        """Columns of each sequence before position 0, where positions are asked for; None while it has no token."""
        self.is_initialized = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, len(key_states)
        forms = self.store.forms(self.tables)
        given = (key_states, value_states)
        # Without numbers there is nothing to encode: keys alone are cached where values are read elsewhere.
        self.streams = tuple(Stream(f if x.shape[-1] else None, x) for f, x in zip(forms, given, strict=True))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._append(key_states, value_states)
        key, value = (self._in_place(stream.everything(), stream) for stream in self.streams)
        self._pack()
        return key, value

    def step(self, key_states: Tensor, value_states: Tensor) -> Seen:
        keys, values = self.streams
        assert keys.form is not None and values.form is not None
        self._append(key_states, value_states)
        # What was there is never changed, and readers may look later, when more is packed.
        both, packed, group = (keys.parts, values.parts), keys.packed, self.store.group
        start = self.seen - keys.ring_BKrW.shape[2] - packed
        seen = Seen(
            first=(keys.first_BKsW, values.first_BKsW), begin_B=self.begin_B,
            blocks=lambda: in_blocks(both, packed, group, start, BLOCK), forms=(keys.form, values.form),
            ring=(keys.ring_BKrW, values.ring_BKrW), tokens=self.seen,
        )  # fmt: skip
        self._pack()
        return seen

    @property
    def can_step(self) -> bool:
        return self.is_initialized and all(stream.packed for stream in self.streams)

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check_batch(key_states)
        self._note_padding(key_states.shape[2])
        for stream, new in zip(self.streams, (key_states, value_states), strict=True):
            stream.append(new)
        self.seen += key_states.shape[2]

    def _note_padding(self, tokens: int) -> None:
        real_BT = None if self.mask is None else real_of_new(self.mask, self.seen, tokens, self.batch_size)
        if real_BT is None and self.hidden_BS is None:
            return
        if real_BT is None:
            real_BT = torch.ones(self.batch_size, tokens, dtype=torch.bool, device=self.device)
        before = self.hidden_BS
        if before is None:
            before = torch.zeros(self.batch_size, self.seen, dtype=torch.bool, device=self.device)
        self.hidden_BS = torch.cat((before, ~real_BT.to(self.device)), 1)

    def _pack(self) -> None:
        store, ring = self.store, self.streams[0].ring_BKrW.shape[2]
        held = self.streams[0].first_BKsW.shape[2]
        count = store.packed(ring + held) if not held else (ring - store.recent) // store.group * store.group
        if count <= 0 or (not held and store.sinks and not self._set_first()):
            return
        start = self.seen - self.streams[0].ring_BKrW.shape[2]
        skip = self._skipped(start, count)
        for name, stream in zip(("keys", "values"), self.streams, strict=True):
            if stream.form is not None:
                require_finite(self.layer, name, self.store, stream.ring_BKrW[:, :, :count].isfinite().all())
            stream.pack(count, skip)

    def _set_first(self) -> bool:
        """Put the first tokens of each sequence apart; False while one has fewer than that."""
        sinks = self.store.sinks
        if self.hidden_BS is not None:
            begin = self.hidden_BS.int().argmin(1)
            if bool((begin + sinks > self.seen).any()) or bool(self.hidden_BS.all(1).any()):
                return False
            self.begin_B = begin if bool(begin.any()) else None
        for stream in self.streams:
            if stream.form is None:
                continue
            ring = stream.ring_BKrW
            if self.begin_B is None:
                stream.first_BKsW = ring[:, :, :sinks].clone()
            else:
                stream.first_BKsW = ring.gather(2, self._first_columns(ring))
            stream.ring_BKrW = ring[:, :, sinks:]
        return True

    def _first_columns(self, like_BKTW: Tensor) -> Tensor:
        """[B, K, sinks, W]: indices of the columns that `first` holds."""
        assert self.begin_B is not None
        columns = self.begin_B[:, None] + torch.arange(self.store.sinks, device=self.device)
        return columns[:, None, :, None].expand(-1, like_BKTW.shape[1], -1, like_BKTW.shape[3])

    def _in_place(self, x_BKSW: Tensor, stream: Stream) -> Tensor:
        """The first tokens of padded sequences in their own columns."""
        if self.begin_B is None or not stream.first_BKsW.shape[2]:
            return x_BKSW
        return x_BKSW.scatter(2, self._first_columns(x_BKSW), stream.first_BKsW)

    def _skipped(self, start: int, count: int) -> Tensor | None:
        """True at columns that are hidden, or that `first` holds."""
        if self.hidden_BS is None:
            return None
        skip = self.hidden_BS[:, start : start + count]
        if self.begin_B is not None:
            place = torch.arange(start, start + count, device=self.device) - self.begin_B[:, None]
            skip = skip | ((place >= 0) & (place < self.store.sinks))
        return skip if bool(skip.any()) else None

    def positions(self, tokens: int, given_BT: Tensor | None) -> Tensor:
        columns = torch.arange(self.seen, device=self.device)[None].expand(self.batch_size, -1)
        new = columns[:, self.seen - tokens :]
        before_BT = new - (new if given_BT is None else given_BT)
        real_BT = torch.ones_like(new, dtype=torch.bool)
        if self.hidden_BS is not None:
            real_BT = ~self.hidden_BS[:, self.seen - tokens :]
        first = before_BT.gather(1, real_BT.int().argmax(1, keepdim=True))[:, 0].tolist()
        there = real_BT.any(1).tolist()
        self.before = [
            old if old is not None else (at if is_there else None)
            for old, at, is_there in zip(self.before or [None] * self.batch_size, first, there, strict=True)
        ]
        offset = torch.tensor([at or 0 for at in self.before], device=self.device)[:, None]
        if bool(((before_BT != offset) & real_BT).any()):
            raise ValueError(self._not_in_order())
        return (columns - offset).clamp_min(0)

    def tensors(self) -> list[Tensor]:
        beside = [t for t in (self.hidden_BS, self.begin_B) if t is not None]
        return [t for stream in self.streams for t in stream.tensors()] + beside

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def crop(self, tokens_to_remove: int) -> None:
        # Releases before 5.18 take a length to keep where the number is positive.
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, self.seen - tokens_to_remove)
        if not count or not self.is_initialized:
            return
        held = self.streams[0].ring_BKrW.shape[2]
        self._check_crop(count, held)
        for stream in self.streams:
            stream.crop(count)
        self.seen -= count
        if self.hidden_BS is not None:
            self.hidden_BS = self.hidden_BS[:, : self.seen]

    def reset(self) -> None:
        self._clear()

    def _select(self, rows_B: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows_B.to(self.device)
        self.batch_size = len(rows)
        self.before = [self.before[row] for row in rows_B.tolist()] if self.before else []
        for stream in self.streams:
            stream.select(rows)
        self.hidden_BS, self.begin_B = (
            None if t is None else t.index_select(0, rows) for t in (self.hidden_BS, self.begin_B)
        )
