"""The layers of parent and copy, visited once, in order: what calibration costs does not grow with the depth squared.

Two streams of hidden states over the calibration windows are kept, the parent's and that of the converted prefix. A
layer is read, run alone on both, rewritten by whoever visits it, and both streams are brought through it before the
next layer is read. Memory holds one layer of each model, the streams and the statistics.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..runtime.layout import AttentionSite
from ..torch_state import give_memory_back
from . import processes
from .journal import Way
from .layers import Call, DecoderLayers
from .outputs import distance
from .statistics import module_of
from .streams import Stream
from .telling import told_layers
from .text import Windows
from .visit import Part, Visit, noted, relative_error

if TYPE_CHECKING:
    from .working_copy import WorkingCopy

BATCH = 8
"""Windows that go through a layer together, at most."""
BATCH_TOKENS = 2048
"""Tokens that go through a layer together, where a window is not longer: intermediate results grow with them."""
TOKENS_PER_CHANNEL = 10
"""Tokens to fit on, for each channel that a layer reads, from which moments are good."""
ANSWERED = 128
"""Tokens whose distributions over the vocabulary are in memory together."""


class Pipeline:
    """One way through all layers. Use `WorkingCopy.visits`.

    Args:
        folder: where streams are kept in files; None keeps them in memory.
        dtype: of the streams: float32, or bfloat16 for half the memory.
    """

    def __init__(
        self,
        copy: WorkingCopy,
        windows: Windows,
        folder: Any = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.copy, self.windows, self.folder, self.dtype = copy, windows, folder, dtype
        self.layers: DecoderLayers = copy.layers
        self.device = self.layers.device
        fit, check = windows.split()
        size = batch_size(windows)
        fitted = list(fit.batches(size))
        processes.check_enough(len(fitted))
        self.tokens = fit.tokens
        self.before = processes.mine([0, *itertools.accumulate(int(mask.sum()) for _, mask in fitted)][:-1])
        """By batch that is fitted on: tokens of those before it."""
        self.batches = [*processes.mine(fitted), *processes.mine(list(check.batches(size)))]
        self.fits = len(self.before)
        """Batches that are fitted on; the others are compared on."""
        self.parent = Stream("parent-0", folder, dtype)
        self.student = self.parent
        self.next_parent = Stream("parent-1", folder, dtype)
        self.noted: dict[int, Stream] = {}
        """By layer: what its projections read in the copy, of layers whose cache later ones read."""
        self.built: nn.Module
        self._calls: dict[int, list[Call]] = {}

    def visits(self, layers: Iterable[int], lenders: Iterable[int], way: Way) -> Iterator[Visit]:
        """The attentions of `layers`, in order; what is done to one between two visits is there for the next.

        Args:
            lenders: layers whose inputs later ones ask for.
            way: is told of each layer that is passed, and knows where to begin.
        """
        wanted, lending, self.way = set(layers), set(lenders), way
        self._check_text(wanted)
        sites = {self.layers.place[site.layer]: site for site in self.copy.sites.values()}
        start = way.begin(self)
        with torch.no_grad():
            for batch, (ids, _) in enumerate(self.batches if not start else ()):
                self.parent[batch] = self.layers.entering(ids)[0]
        told = told_layers(self.copy.doing, len(self.layers), start)
        with told as self.tell:
            yield from self._from(start, wanted, lending, sites)

    def _from(
        self, start: int, wanted: set[int], lending: set[int], sites: Mapping[int, AttentionSite]
    ) -> Iterator[Visit]:
        for index in range(start, len(self.layers)):
            parent = self.layers.build(index)
            site = sites.get(index)
            self.next_parent = Stream(f"parent-{index + 1}", self.folder, self.dtype)
            if site is not None and site.layer in wanted:
                with self._standing(index, site, parent):
                    visit = Visit(self, site, index, parent)
                    yield visit
                    visit.close()
                    lends = site.layer in lending
                    untouched = self.student is self.parent and site.layer not in self.copy.rewritten and not lends
                    if self.copy.has_prefix and not untouched:
                        self._advance(index, site if lends else None)
                    else:
                        self._take(index, self.next_parent)
                continue
            with torch.no_grad():
                for batch in range(len(self.batches)):
                    h = self.parent[batch].to(self.device)
                    self.next_parent[batch] = self.layers.run(parent, h, self.call(batch, index))
            touched = site is not None and site.layer in self.copy.rewritten
            if self.student is self.parent and not touched and (site is None or site.layer not in lending):
                self._take(index, self.next_parent)
                continue
            with self._standing(index, site, parent):
                self._advance(index, site if site is not None and site.layer in lending else None)

    def _check_text(self, layers: Iterable[int]) -> None:
        """Warn where there are fewer tokens to fit on than a layer has channels."""
        channels = max((self.copy.sites[layer].hidden_size for layer in layers), default=0)
        if self.tokens < channels:
            warnings.warn(
                f"{self.tokens} calibration tokens to fit {channels} channels: moments are singular and damped. "
                f"Give {TOKENS_PER_CHANNEL * channels} tokens or more.",
                stacklevel=2,
            )

    @contextmanager
    def _standing(self, index: int, site: AttentionSite | None, parent: nn.Module) -> Iterator[None]:
        """Inside, the copy's layer `index` is built, and what is written to it goes there too."""
        self.built = self.copy.build(index, parent)
        try:
            yield
        finally:
            self.copy.leave()
            del self.built

    @torch.no_grad()
    def _advance(self, index: int, lender: AttentionSite | None) -> None:
        """Bring the student through the layer, and both streams on."""
        after = Stream(f"student-{index + 1}", self.folder, self.dtype)
        if lender is not None:
            lent = Stream(f"input-{lender.layer}", self.folder, self.dtype)
            q = self.built.get_submodule(self.inside(module_of(lender.q), index))
        for batch in range(len(self.batches)):
            with ExitStack() as stack:
                seen = stack.enter_context(noted(q, output=False)) if lender is not None else []
                after[batch] = self.student_step(index, batch)
            if lender is not None:
                lent[batch] = seen[0].reshape(*self.batches[batch][0].shape, -1)
        if lender is not None:
            self.noted[lender.layer] = lent
        self._take(index, self.next_parent, after)

    def _take(self, index: int, parent: Stream, student: Stream | None = None) -> None:
        left = {id(s): s for s in (self.parent, self.student)}
        self.parent = parent
        self.student = parent if student is None else student
        self.way.passed(self, index)
        checks = range(self.fits, len(self.batches)) if self.student is not self.parent else ()
        self.tell(index, self.mean_error(self.student.__getitem__, self.parent, checks))
        for old in left.values():  # only now: what was interrupted before starts from there
            old.drop()
        give_memory_back()

    def mean_error(self, found: Callable[[int], Tensor], wanted: Stream, batches: Iterable[int]) -> float:
        """`relative_error` of the hidden states of some batches, mean over the tokens of all processes."""
        total, tokens = 0.0, 0
        for batch in batches:
            mask = self.batches[batch][1]
            total += float(relative_error(found(batch).cpu(), wanted[batch], mask).sum())
            tokens += int(mask.sum())
        return processes.mean(total, tokens)

    @torch.no_grad()
    def student_step(self, index: int, batch: int) -> Tensor:
        """One batch of the student's stream after layer `index`, as the copy is now."""
        self.copy.reading = {layer: stream[batch].to(self.device) for layer, stream in self.noted.items()}
        return self.layers.run(self.built, self.student[batch].to(self.device), self.call(batch, index))

    def parts(self, tokens: int) -> list[Part | None]:
        """See `Visit.parts`."""
        found: list[Part | None] = []
        for number, (ids, _) in enumerate(self.windows.split()[0].batches(batch_size(self.windows))):
            windows = max(1, tokens // ids.shape[1])
            mine = number % processes.count() == processes.rank()
            for start in range(0, len(ids), windows):
                rows = slice(start, min(start + windows, len(ids)))
                found.append(Part(number // processes.count(), rows) if mine else None)
        return found

    @torch.no_grad()
    def divergence(self) -> float:
        """KL(parent || copy) in nats per token on windows that nothing was fitted on, once all layers are passed."""
        if self.student is self.parent:
            return 0.0
        total, tokens = 0.0, 0
        for batch in range(self.fits, len(self.batches)):
            hidden = [stream[batch] for stream in (self.parent, self.student)]
            for at, ids, mask in self.pieces(batch):
                wanted, found = (self.layers.answers(h[at].to(self.device), ids, mask) for h in hidden)
                total += float(distance(self.layers.shell, found, wanted))
                tokens += len(found)
        return processes.mean(total, tokens)

    def pieces(self, batch: int) -> Iterator[tuple[Any, Tensor, Tensor]]:
        """A few tokens of a batch at a time: where they stand in hidden states, their ids and mask.

        Distributions over a vocabulary are large, and no token's depends on another's.
        """
        ids_BT, mask_BT = self.batches[batch]
        for row, start in itertools.product(range(len(ids_BT)), range(0, ids_BT.shape[1], ANSWERED)):
            at = (slice(row, row + 1), slice(start, start + ANSWERED))
            if mask_BT[at].any():
                yield (..., *at, slice(None)), ids_BT[at], mask_BT[at]

    def call(self, batch: int, index: int) -> Call:
        """What layer `index` is called with beside the hidden states of a batch."""
        if batch not in self._calls:
            self._calls[batch] = self.layers.entering(self.batches[batch][0])[1]
        return self._calls[batch][index]

    def inside(self, name: str, index: int) -> str:
        """The name of a part of the model inside its decoder layer."""
        return name.removeprefix(f"{self.layers.name}.{index}.")


def batch_size(windows: Windows) -> int:
    """Windows of a batch."""
    return max(1, min(BATCH, BATCH_TOKENS // windows.ids_BT.shape[1]))
