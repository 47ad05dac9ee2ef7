"""Packed training sequences, the same on any number of devices, and resumable to the token.

A step's batch has as many lanes as sequences. Lane v reads documents v, v + lanes, v + 2 * lanes, ... of one endless
shuffled order (every epoch its own permutation of all documents) and packs them end to end. A device works on a
contiguous block of lanes. So what step n reads depends on seed, data, batch size and length only, never on the number
of devices; and where a lane stands is two numbers.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.calibration.text import check_known_ids, encode, special_tokens
from surgery.console import progress
from surgery.errors import CheckpointError

from .documents import Documents
from .losses import IGNORE

STATE = "data-{rank}.json"
State = dict[int, tuple[int, int]]
"""By lane: the next document's place in the endless order, and how many of its tokens are used."""


@dataclass
class _Lane:
    place: int
    used: int
    tokens: list[int] | None = None
    """Of the document at `place`, once read."""


class PackedText(torch.utils.data.IterableDataset[dict[str, Tensor]]):
    """Micro-batches of this device's lanes, endlessly.

    Args:
        documents: the corpus.
        tokenizer: callable of transformers. Each document ends with its EOS, where it has one. What it starts a text
            with (BOS) stands in front of every sequence, also of one that goes on within a document.
        batch: sequences per optimizer step over all devices: the number of lanes.
        length: tokens per sequence.
        rank, world: this device among all.
        micro_batch: sequences per forward pass on one device.
        repeat: every epoch has the same sequences, in the same order. The rest of a lane's last sequence is filled
            from the next epoch's documents.
        separate: positions start again at each document, which transformers reads as "no attention across".
        vocab_size: rows of the model's embedding; documents with larger ids are refused.

    Yields:
        `input_ids`, `labels`, and `position_ids` where `separate`; all [micro_batch, length] int64. Labels stand at
        their own position and are `IGNORE` at the first token of each document and of each piece of one.

    Raises:
        CheckpointError: `batch` is no multiple of devices times micro-batch, the tokenizer knows no such text, or a
        document has ids that the model does not know.
    """

    def __init__(
        self,
        documents: Documents,
        tokenizer: Any,
        *,
        batch: int,
        length: int,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        micro_batch: int | None = None,
        separate: bool = True,
        repeat: bool = False,
        vocab_size: int | None = None,
    ) -> None:
        self.documents, self.tokenizer, self.vocab_size = documents, tokenizer, vocab_size
        self.start, _ = special_tokens(tokenizer, (documents[i] for i in range(len(documents))))
        if len(self.start) >= length:
            raise CheckpointError(
                f"sequences of {length} tokens are filled by the tokens that the tokenizer puts before every "
                "text. Use a greater uptrain.length."
            )
        self.batch, self.length, self.seed, self.separate, self.repeat = batch, length, seed, separate, repeat
        self.micro_batch, self.accumulation = split_batch(batch, world, micro_batch)
        share = batch // world
        self._lanes = {v: _Lane(v, 0) for v in range(rank * share, (rank + 1) * share)}
        self.step = 0
        # Trainer reads one step ahead of no one, but the state to save is that of a step, not of the generator.
        self._past: deque[tuple[int, State]] = deque(maxlen=4)
        self._remember()

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        while True:
            lanes = list(self._lanes.items())
            for m in range(self.accumulation):
                rows = [self._row(v, lane) for v, lane in lanes[m * self.micro_batch : (m + 1) * self.micro_batch]]
                if m == self.accumulation - 1:
                    self.step += 1
                    self._remember()
                yield {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def check(self, steps: int) -> None:
        """Read what `steps` steps read, or all documents where those are fewer, as it would be read.

        Raises:
            CheckpointError: as iterating.
        """
        batches = iter(self)
        with progress("looking for ids that the model does not know", steps * self.accumulation) as advance:
            for _ in range(steps * self.accumulation):
                if all(lane.place >= len(self.documents) for lane in self._lanes.values()):
                    break
                next(batches)
                advance(1)

    def state_at(self, step: int) -> State:
        """Where this device's lanes stood after `step` steps, one of the last few."""
        return next(state for at, state in self._past if at == step)

    def save(self, folder: Path, step: int, rank: int) -> None:
        """Write this device's part of the state into a checkpoint."""
        data = {"step": step, "lanes": self.state_at(step)}
        (folder / STATE.format(rank=rank)).write_text(json.dumps(data) + "\n")

    def load(self, folder: Path) -> None:
        """Go on where a checkpoint stopped, whatever the number of devices that wrote it.

        Raises:
            CheckpointError: the checkpoint does not know every lane of this device.
        """
        found: dict[int, tuple[int, int]] = {}
        for file in sorted(folder.glob(STATE.format(rank="*"))):
            data = json.loads(file.read_text())
            self.step = data["step"]
            found |= {int(lane): (place, used) for lane, (place, used) in data["lanes"].items()}
        missing = [lane for lane in self._lanes if lane not in found]
        if missing:
            raise CheckpointError(
                f"{folder}: does not say how far part {missing[0]} of the text was read. Resume from another "
                "checkpoint."
            )
        self._lanes = {lane: _Lane(*found[lane]) for lane in self._lanes}
        self._past.clear()
        self._remember()

    def _remember(self) -> None:
        self._past.append((self.step, {v: (lane.place, lane.used) for v, lane in self._lanes.items()}))

    def _row(self, number: int, lane: _Lane) -> dict[str, Tensor]:
        ids: list[int] = []
        labels: list[int] = []
        positions: list[int] = []
        empty = 0
        if self.repeat and lane.place >= max(len(self.documents), number + 1):  # behind its last document
            lane.place, lane.used, lane.tokens = number, 0, None
        front: list[int] = []
        if 0 < lane.used <= len(self.start):
            lane.used = 0  # the last sequence has no more of it than what it starts with
        elif lane.used:
            front = self.start
        while len(ids) < self.length:
            if lane.tokens is None:
                lane.tokens = self._tokens(lane.place)
            taken = lane.tokens[lane.used : lane.used + self.length - len(ids) - len(front)]
            empty = 0 if taken else empty + 1
            if empty > len(self.documents):
                raise CheckpointError(
                    f"text, part {number}: {empty} documents in a row have no tokens. Give text, in the field `text`."
                )
            first = not ids or (self.separate and lane.used == 0)
            labels += [IGNORE] * len(front) + ([IGNORE, *taken[1:]] if first and taken else taken)
            positions += range(len(front) + len(taken))
            ids += front + taken
            front = []
            lane.used += len(taken)
            if lane.used >= len(lane.tokens):
                lane.place, lane.used, lane.tokens = lane.place + self.batch, 0, None
        row = {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}
        return row | ({"position_ids": torch.tensor(positions)} if self.separate else {})

    def _tokens(self, place: int) -> list[int]:
        epoch, index = divmod(place, len(self.documents))
        number = int(permutation(len(self.documents), self.seed, epoch)[index])
        text = self.documents[number]
        if not text.strip():
            return []
        ids = encode(self.tokenizer, text)
        end = self.tokenizer.eos_token_id
        ids = ids if end is None or (ids and ids[-1] == end) else [*ids, end]
        if self.vocab_size is not None:
            check_known_ids(ids, self.vocab_size, f"training text, document {number + 1}", self.tokenizer)
        return ids


@lru_cache(maxsize=4)
def permutation(size: int, seed: int, epoch: int) -> Tensor:
    """The order of `size` documents in one epoch."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator)


def split_batch(batch: int, world: int, micro_batch: int | None) -> tuple[int, int]:
    """(sequences per forward pass, forward passes per step) of one device.

    Raises:
        CheckpointError: it does not come out even.
    """
    if batch % world:
        raise CheckpointError(f"a batch of {batch} sequences cannot be split over {world} devices. Set uptrain.batch.")
    share = batch // world
    micro = share if micro_batch is None else min(micro_batch, share)
    if share % micro:
        raise CheckpointError(
            f"{share} sequences per device do not split into passes of {micro}. Set --micro-batch to a divisor."
        )
    return micro, share // micro
