"""Static form of a cache of packed codes: all is allocated at once, written in place, and counted on the device.

A compiled step of one token asks the device nothing, so that all steps are one program. Column s is that of the s-th
token that came, padding included. The first `sinks` tokens of each sequence, padding left out, lie in `first` whatever
their columns are. A column s behind the first `sinks` waits at place (s - sinks) % R of a ring of R columns, at least
until its group is full and is packed.

Where a sequence of a batch has had fewer than `sinks` tokens, groups are packed all the same; the dynamic form waits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .coded_layer import CodedLayer, require_finite
from .layout import Codec, LayerPlan
from .masks import real_of_new
from .ops import packed_attention_forward
from .packed_forms import Form, Parts
from .quantised_attention import Seen
from .quantised_cache import BLOCK, in_blocks
from .word_forms import WordsPerChannel, held_as_words, in_words

_MOST_BLOCKS = 8
"""Of a compiled step, whose program holds each of them."""


class StaticStream:
    """Keys, or values, of one layer; without a `form` they are held as they are.

    Args:
        length: columns that there is room for.
    """

    def __init__(self, form: Form | None, store: Codec, like_BKTW: Tensor, length: int) -> None:
        B, K, _, W = like_BKTW.shape
        self.form, self.group, self.length, self.width = form, store.group, length, W
        sinks, self.room, ring = store.rooms(length)
        sizes = (sinks, ring, 0) if form is not None else (0, 0, length)
        self.first_BKsW, self.ring_BKRW, self.whole_BKLW = (like_BKTW.new_zeros(B, K, n, W) for n in sizes)
        self.parts: Parts = ()
        if form is not None and self.room:
            one = form.encode(like_BKTW.new_zeros(B, K, store.group, W))
            self.parts = tuple(p.new_zeros(B, K, p.shape[2] * (self.room // store.group), *p.shape[3:]) for p in one)

    def append_one(self, new_BK1W: Tensor, seen: Tensor, slot: Tensor, begin_B: Tensor) -> None:
        """Write the token of the column `seen`.

        Args:
            slot: its place in the ring; a column of the first ones leaves there what the next ones overwrite.
        """
        new = new_BK1W.detach()
        if self.form is None:
            self.whole_BKLW.index_copy_(2, seen[None], new)
            return
        self.ring_BKRW.index_copy_(2, slot[None], new)
        sinks = self.first_BKsW.shape[2]
        if sinks:
            place = seen - begin_B
            first = ((place >= 0) & (place < sinks))[:, None, None, None]
            at = place.clamp(0, sinks - 1)[:, None, None, None].expand_as(new)
            self.first_BKsW.scatter_(2, at, torch.where(first, new, self.first_BKsW.gather(2, at)))

    def everything(self, ring_R: Tensor, packed: Tensor, begin_B: Tensor, seen: Tensor, live: int) -> Tensor:
        """[B, K, L, W] in the order of columns; what lies in columns that have not come is of no meaning.

        Args:
            ring_R: column of each place of the ring.
            live: tokens of `parts` that may be packed.
        """
        if self.form is None:
            return self.whole_BKLW
        first, ring, sinks = self.first_BKsW, self.ring_BKRW, self.first_BKsW.shape[2]
        found = first.new_zeros(*first.shape[:2], self.length, self.width)
        if live:
            parts = tuple(p.narrow(2, 0, p.shape[2] * live // self.room) for p in self.parts)
            found[:, :, sinks : sinks + live] = self.form.decode(parts, self.width).to(first.dtype)
        waits = (ring_R >= sinks + packed)[:, None]
        found.index_copy_(2, ring_R, torch.where(waits, ring, found.index_select(2, ring_R)))
        if sinks:
            columns = begin_B[:, None] + torch.arange(sinks, device=first.device)
            at = (columns % self.length)[:, None, :, None].expand_as(first)
            there = (columns < seen)[:, None, :, None]
            found.scatter_(2, at, torch.where(there, first, found.gather(2, at)))
        return found

    def pack_one(self, full: Tensor, slots_G: Tensor, group: Tensor, skip_BG: Tensor) -> None:
        """Encode the tokens at `slots_G` of the ring, and keep them as the given group where they are `full`."""
        assert self.form is not None
        made = self.form.encode(self.ring_BKRW.index_select(2, slots_G), skip_BG)
        for part, new in zip(self.parts, made, strict=True):
            part, new = (t.view(torch.uint8) if t.itemsize == 1 else t for t in (part, new))  # fp8 has no index_copy
            at = group * new.shape[2] + torch.arange(new.shape[2], device=new.device)
            part.index_copy_(2, at, torch.where(full, new, part.index_select(2, at)))

    def append_many(
        self, all_BKSW: Tensor, past: int, packed: int, count: int, begin_B: Tensor, skip_BT: Tensor | None
    ) -> None:
        """Write the columns from `past` on, and pack `count` tokens behind the `packed` ones.

        Args:
            all_BKSW: all columns, as they were decoded and as they came.
            skip_BT: of the tokens to pack, those that may not set a scale.
        """
        columns, total = all_BKSW.detach(), all_BKSW.shape[2]
        if self.form is None:
            self.whole_BKLW[:, :, past:total] = columns[:, :, past:]
            return
        sinks, ring = self.first_BKsW.shape[2], self.ring_BKRW.shape[2]
        if sinks:
            places = begin_B[:, None] + torch.arange(sinks, device=columns.device)
            came = ((places >= past) & (places < total))[:, None, :, None]
            at = places.clamp_max(total - 1)[:, None, :, None].expand_as(self.first_BKsW)
            self.first_BKsW.copy_(torch.where(came, columns.gather(2, at), self.first_BKsW))
        start = sinks + packed
        if count:
            made = self.form.encode(columns[:, :, start : start + count], skip_BT)
            for part, new in zip(self.parts, made, strict=True):
                part.narrow(2, part.shape[2] * packed // self.room, new.shape[2]).copy_(new)
        left = torch.arange(min(start + count, total), total, device=columns.device)
        self.ring_BKRW.index_copy_(2, (left - sinks) % ring, columns.index_select(2, left))

    def tensors(self) -> list[Tensor]:
        """All that is held."""
        return [self.first_BKsW, self.ring_BKRW, self.whole_BKLW, *self.parts]

    def each(self, function: Callable[[Tensor], Tensor]) -> None:
        """Put the result for each tensor in its place."""
        self.first_BKsW, self.ring_BKRW, self.whole_BKLW, *parts = map(function, self.tensors())
        self.parts = tuple(parts)


class StaticQuantisedLayer(CodedLayer):
    """A layer of a static cache; what fits into the ring is never packed.

    Args:
        max_length: columns that may come.
        whole: several tokens at once are given all columns that there is room for, as stock attention wants them; ours
            reads those that have come.
    """

    is_compileable = True

    def __init__(self, plan: LayerPlan, max_length: int, *, whole: bool = False) -> None:
        super().__init__(plan)
        self.whole = whole
        self.max_length = max_length
        self.sinks, self.room, self.ring = self.store.rooms(max_length)

    def _clear(self) -> None:
        self.streams: tuple[StaticStream, ...] = ()
        self.state: dict[str, Tensor] = {}
        self.real_BT: Tensor | None = None
        """Of the newest call, where positions will be asked for; None where all tokens are real."""
        self.is_initialized = False

    # What `state` holds: `seen` and `packed`, tokens; `hidden` [B, R], True at padding in the ring; `begin` [B], column
    # of each sequence's first token, that of the next one while there is none; `before` [B], columns before position 0.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.batch_size = key_states.dtype, key_states.device, len(key_states)
        forms, given = self.store.forms(self.tables), (key_states, value_states)
        if held_as_words(self.device):
            forms = in_words(forms, (key_states.shape[-1], value_states.shape[-1]))
        self.streams = tuple(
            StaticStream(form if x.shape[-1] else None, self.store, x, self.max_length)
            for form, x in zip(forms, given, strict=True)
        )
        count = torch.zeros((), dtype=torch.int64, device=self.device)
        self.state = {
            "seen": count, "packed": count.clone(), "begin": count.repeat(self.batch_size),
            "hidden": torch.zeros(self.batch_size, self.ring, dtype=torch.bool, device=self.device),
        }  # fmt: skip
        if self.store.unrotated:
            self.state["before"] = count.repeat(self.batch_size)
        self.is_initialized = True
        self._mark()

    def _mark(self) -> None:
        if not torch.compiler.is_compiling():
            for tensor in (*self.state.values(), *(t for stream in self.streams for t in stream.tensors())):
                torch._dynamo.mark_static_address(tensor)  # CUDA graphs change it in place

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if key_states.shape[2] != 1:
            return self._chunk(key_states, value_states)
        self._append(key_states, value_states)
        key, value = self._everything()
        self._pack()
        return key, value

    def step(self, key_states: Tensor, value_states: Tensor) -> Seen:
        keys, values = self.streams
        assert keys.form is not None and values.form is not None
        self._append(key_states, value_states)
        # A group that is packed now is written behind `packed`, and stays in the ring until the next token comes.
        both, live = (keys.parts, values.parts), self._live()
        parts = tuple(tuple(p.narrow(2, 0, p.shape[2] * live // self.room) for p in own) for own in both)
        operator = None
        if isinstance(keys.form, WordsPerChannel):
            packed, bits, group = self.state["packed"].clone(), keys.form.bits, self.store.group
            operator = functools.partial(packed_attention_forward, *both, packed, bits, group)
        block = max(BLOCK, -(-self.room // _MOST_BLOCKS)) if torch.compiler.is_compiling() else BLOCK
        seen = Seen(
            first=(keys.first_BKsW, values.first_BKsW), begin_B=self.state["begin"],
            blocks=lambda: in_blocks(parts, live, self.store.group, self.sinks, block), forms=(keys.form, values.form),
            ring=(keys.ring_BKRW, values.ring_BKRW), tokens=self.max_length, ring_R=self._ring_columns(),
            packed=self.state["packed"].clone(), arrived=self.state["seen"].clone(),
            operator=operator, room=self.room,
        )  # fmt: skip
        self._pack()
        return seen

    @property
    def can_step(self) -> bool:
        # Not by their truth: torch 2.11 does not trace that of a tuple.
        return len(self.streams) > 0 and all(len(stream.parts) > 0 for stream in self.streams)

    def _live(self) -> int:
        """Tokens that may be packed; a compiled step takes all that there is room for."""
        return self.room if torch.compiler.is_compiling() else int(self.state["packed"])

    def _ring_columns(self) -> Tensor:
        """[R]: column of each place of the ring, or one that will stand there first."""
        newest = self.state["seen"] - 1
        places = torch.arange(self.ring, device=self.device)
        columns = newest - (newest - self.sinks - places) % self.ring
        return torch.where(columns < self.sinks, columns + self.ring, columns)

    def _everything(self) -> list[Tensor]:
        state, ring_R, live = self.state, self._ring_columns(), self._live()
        return [s.everything(ring_R, state["packed"], state["begin"], state["seen"], live) for s in self.streams]

    def _append(self, key_states: Tensor, value_states: Tensor) -> None:
        self._check_batch(key_states)
        seen = self.state["seen"]
        self._require_room(seen, 1, self.max_length)
        real_BT = self._note_real(1)
        slot = (seen - self.sinks) % self.ring
        hidden = torch.zeros_like(self.state["hidden"][:, :1]) if real_BT is None else ~real_BT
        self.state["hidden"].index_copy_(1, slot[None], hidden)
        for stream, new in zip(self.streams, (key_states, value_states), strict=True):
            stream.append_one(new, seen, slot, self.state["begin"])
        seen.add_(1)

    def _note_real(self, tokens: int) -> Tensor | None:
        """[B, T] of the new tokens, False at padding, None where the call has no mask; sequences begin."""
        mask, self.mask = self.mask, None
        seen, begin_B = self.state["seen"], self.state["begin"]
        real_BT = None if mask is None else real_of_new(mask, seen, tokens, self.batch_size)
        first = seen
        if real_BT is not None:
            first = seen + torch.where(real_BT.any(1), real_BT.int().argmax(1), tokens)
        begin_B.copy_(torch.where(begin_B < seen, begin_B, first))
        self.real_BT = real_BT if self.store.unrotated else None
        return real_BT

    def _pack(self) -> None:
        if not self.room:
            return
        state, group = self.state, self.store.group
        packed = state["packed"]
        full = state["seen"] - self.sinks - packed >= self.store.recent + group
        if not torch.compiler.is_compiling() and not bool(full):
            return
        columns = packed + torch.arange(group, device=self.device)
        slots = columns % self.ring
        skip = state["hidden"].index_select(1, slots) | self._in_first(columns + self.sinks)
        at = (packed // group).clamp_max(self.room // group - 1)
        for name, stream in zip(("keys", "values"), self.streams, strict=True):
            if stream.form is None:
                continue
            finite = stream.ring_BKRW.index_select(2, slots).isfinite().all()
            require_finite(self.layer, name, self.store, finite | ~full)
            stream.pack_one(full, slots, at, skip)
        packed.add_(full * group)

    def _in_first(self, columns_n: Tensor) -> Tensor:
        """[B, n]: which columns `first` holds."""
        place = columns_n - self.state["begin"][:, None]
        return (place >= 0) & (place < self.sinks)

    @torch.compiler.disable(reason="how many groups a chunk fills decides about shapes")
    def _chunk(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        self._check_batch(key_states)
        state, store, tokens = self.state, self.store, key_states.shape[2]
        past, packed = int(state["seen"]), int(state["packed"])
        total = past + tokens
        self._require_room(past, tokens, self.max_length)
        given: Sequence[Tensor] = (key_states, value_states)
        if past:
            given = [torch.cat((old[:, :, :past], new), 2) for old, new in zip(self._everything(), given, strict=True)]
        ring_R = self._ring_columns()
        real_BT = self._note_real(tokens)
        hidden = torch.zeros(self.batch_size, max(total, self.max_length), dtype=torch.bool, device=self.device)
        hidden[:, ring_R] = state["hidden"]
        hidden[:, past:] = False
        if real_BT is not None:
            hidden[:, past:total] = ~real_BT
        count, start = max(0, store.packed(total) - packed), self.sinks + packed
        columns = torch.arange(start, start + count, device=self.device)
        skip = hidden[:, columns] | self._in_first(columns)
        for name, stream, new in zip(("keys", "values"), self.streams, given, strict=True):
            if stream.form is not None and count:
                require_finite(self.layer, name, self.store, new[:, :, start : start + count].isfinite().all())
            stream.append_many(new, past, packed, count, state["begin"], skip if bool(skip.any()) else None)
        left = torch.arange(min(start + count, total), total, device=self.device)
        state["hidden"][:, (left - self.sinks) % self.ring] = hidden[:, left]
        state["packed"].add_(count)
        state["seen"].fill_(total)
        key, value = (
            torch.nn.functional.pad(x, (0, 0, 0, self.max_length - total)) if self.whole else x for x in given
        )
        return key, value

    def positions(self, tokens: int, given_BT: Tensor | None) -> Tensor:
        seen, before_B, begin_B = (self.state[name] for name in ("seen", "before", "begin"))
        columns = torch.arange(self.max_length, device=self.device)[None].expand(self.batch_size, -1)
        new = (seen - tokens + torch.arange(tokens, device=self.device))[None]
        before_BT = (new - (new if given_BT is None else given_BT)).expand(self.batch_size, -1)
        real_BT, self.real_BT = self.real_BT, None
        if real_BT is None:
            real_BT = torch.ones_like(before_BT, dtype=torch.bool)
        first = before_BT.gather(1, real_BT.int().argmax(1, keepdim=True))[:, 0]
        # A sequence that has begun in this call brings its first position.
        before_B.copy_(torch.where(begin_B >= seen - tokens, first, before_B))
        in_order = ((before_BT == before_B[:, None]) | ~real_BT).all()
        if torch.compiler.is_compiling():
            torch._assert_async(in_order, self._not_in_order())
        elif not bool(in_order):
            raise ValueError(self._not_in_order())
        return (columns - before_B[:, None]).clamp_min(0)

    def tensors(self) -> list[Tensor]:
        return [t for stream in self.streams for t in stream.tensors()] + list(self.state.values())

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen, padding included: a tensor, which later steps leave as it is."""
        return self.state["seen"].clone() if self.is_initialized else 0  # type: ignore[return-value]

    def get_max_length(self) -> int:
        return self.max_length

    def crop(self, tokens_to_remove: int) -> None:
        # Releases before 5.18 take a length to keep where the number is positive.
        if not self.is_initialized:
            return
        state = self.state
        seen = int(state["seen"])
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(0, seen - tokens_to_remove)
        packed = int(state["packed"])
        self._check_crop(count, seen - self.sinks - packed if packed else seen)
        state["seen"].sub_(count)
        state["begin"].clamp_(max=seen - count)

    def reset(self) -> None:
        for tensor in self.state.values():
            tensor.zero_()

    def _select(self, rows_B: Tensor) -> None:
        if not self.is_initialized:
            return
        rows = rows_B.to(self.device)
        same = len(rows) == self.batch_size

        def select(t: Tensor) -> Tensor:
            if not t.ndim:
                return t
            found = t.index_select(0, rows)
            return t.copy_(found) if same else found

        for stream in self.streams:
            stream.each(select)
        self.state = {name: select(t) for name, t in self.state.items()}
        self.batch_size = len(rows)
        self._mark()
