"""One layer while it is converted: what it reads in both models, what it should give, and how far it is from that."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..runtime.layout import AttentionSite
from . import processes
from .layers import Call, DecoderLayers
from .statistics import Variety, module_of, residual_factor
from .streams import Stream

if TYPE_CHECKING:
    from .pipeline import Pipeline


class Activations(NamedTuple):
    """One calibration batch at one layer, in the parent's stream and in the converted prefix's; on the CPU."""

    x_parent_BTD: Tensor
    """Input of the projections, after the norm."""
    x_student_BTD: Tensor
    wanted_BTD: Tensor
    """What `o` of the layer should give, without its bias: the parent's attention output, and what the residual stream
    has lost in the layers before, in units of attention output."""
    mask_BT: Tensor
    """True at real tokens; padding on the right."""
    inputs: Mapping[int, Tensor] = MappingProxyType({})
    """By layer: input of the projections in the student's stream, [B, T, D], of the layers that the form reads."""
    lost_BTD: Tensor | None = None
    """What of `wanted_BTD` makes up for the layers before; None: nothing."""


class Part(NamedTuple):
    """Some windows of one batch."""

    batch: int
    rows: slice


class Visit:
    """One layer while it is converted; both streams stand before it.

    Read its statistics (`activations`), write its weights through the working copy, and compare (`error`).
    """

    def __init__(self, pipeline: Pipeline, site: AttentionSite, index: int, parent: nn.Module) -> None:
        self._pipeline, self._index = pipeline, index
        self.copy, self.site, self.layer = pipeline.copy, site, site.layer
        self.windows = pipeline.windows
        self._parent = parent
        self._run_parent()

    @property
    def tokens(self) -> int:
        """Tokens of the windows that are fitted on, those of all processes."""
        return self._pipeline.tokens

    def activations(self, tokens: int | None = None, sources: Iterable[int] = ()) -> Iterator[Activations]:
        """The windows to fit on, batch by batch.

        Args:
            tokens: stop once so many have been given, in all processes together.
            sources: earlier layers whose inputs are wanted beside those that the layer's form reads.
        """
        variety = Variety(self.layer)
        for batch in range(self._pipeline.fits):
            if tokens is not None and self._pipeline.before[batch] >= tokens:
                break
            found = self._read(batch, sources)
            variety.see(found.x_student_BTD, found.mask_BT)
            yield found
        variety.warn()

    def inputs(self, tokens: int | None = None) -> Iterator[Tensor]:
        """[tokens, D] per batch: what q, k and v of the copy's layer are projected from, padding excluded."""
        for a in self.activations(tokens):
            yield a.x_student_BTD[a.mask_BT]

    @torch.no_grad()
    def ahead(self, layers: Iterable[int]) -> Iterator[tuple[int, Stream]]:
        """What the projections of later layers read in the parent, in order, on the windows to fit on."""
        pipe = self._pipeline
        wanted = {pipe.layers.place[layer]: layer for layer in layers}
        h, own = pipe.next_parent, False
        for index in range(self._index + 1, max(wanted, default=-1) + 1):
            module = pipe.layers.build(index)
            if index in wanted:
                site = self.copy.sites[wanted[index]]
                q = module.get_submodule(pipe.inside(module_of(site.q), index))
                x = Stream(f"ahead-{index}", pipe.folder, pipe.dtype)
                for batch in range(pipe.fits):
                    found = _projected(module, q, pipe.layers, h[batch].to(pipe.device), pipe.call(batch, index))
                    x[batch] = found.reshape(*pipe.batches[batch][1].shape, -1)
                yield wanted[index], x
                x.drop()
            after = Stream(f"further-{index}", pipe.folder, pipe.dtype)
            for batch in range(pipe.fits if index < max(wanted) else 0):
                after[batch] = pipe.layers.run(module, h[batch].to(pipe.device), pipe.call(batch, index))
            if own:
                h.drop()
            h, own = after, True
        if own:
            h.drop()

    @torch.no_grad()
    def error(self, batches: int | None = None) -> float:
        """How far the copy's layer, as it is now, leads from the parent's on windows that nothing was fitted on.

        The squared distance of the hidden states after the whole layer, in parts of the parent's, mean over tokens:
        the norms of later layers undo the size of a token's hidden state.

        Args:
            batches: only so many batches of windows.
        """
        pipe = self._pipeline
        checks = range(pipe.fits, len(pipe.batches))[: None if batches is None else -(-batches // processes.count())]
        return pipe.mean_error(lambda batch: pipe.student_step(self._index, batch), pipe.next_parent, checks)

    def error_of(self, part: Part, attention: Callable[[Mapping[int, Tensor]], Tensor]) -> Tensor:
        """`error` on some windows to fit on, with a gradient.

        Args:
            attention: the attention's output [B, T, D] from the inputs of the layer's sources.
        """
        pipe, built = self._pipeline, self._pipeline.built
        ids, mask = (x[part.rows] for x in pipe.batches[part.batch])
        h, wanted = (stream[part.batch][..., part.rows, :, :] for stream in (pipe.student, pipe.next_parent))
        inputs = {layer: stream[part.batch][part.rows].to(pipe.device) for layer, stream in pipe.noted.items()}
        call = pipe.layers.entering(ids)[1][self._index]
        q, o = (built.get_submodule(pipe.inside(module_of(p), self._index)) for p in (self.site.q, self.site.o))

        def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[self.layer] = args[0].reshape(*mask.shape, -1)

        def exchange(_: nn.Module, args: Any, output: Tensor) -> Tensor:
            return attention(inputs).reshape(output.shape)

        handles = [q.register_forward_pre_hook(note), o.register_forward_hook(exchange)]
        try:
            with self.copy.parents_attention():
                found = pipe.layers.run(built, h.to(pipe.device), call)
        finally:
            for handle in handles:
                handle.remove()
        return relative_error(found.cpu(), wanted, mask).mean().float()

    def parts(self, tokens: int) -> list[Part | None]:
        """The windows to fit on in parts of about so many tokens; None where another process has them."""
        return self._pipeline.parts(tokens)

    @torch.no_grad()
    def _run_parent(self) -> None:
        """Bring the parent through the layer, and note what its attention gives."""
        pipe, layer = self._pipeline, self.site
        self._residual = factor = self._factor()
        self._wanted = Stream(f"wanted-{self._index}", pipe.folder, pipe.dtype)
        o = self._parent.get_submodule(pipe.inside(module_of(layer.o), self._index))
        bias = None if layer.o.bias is None else self._parent.get_parameter(pipe.inside(layer.o.bias, self._index))
        for batch in range(len(pipe.batches)):
            h, h_s = pipe.parent[batch], pipe.student[batch]
            with noted(o, output=True) as given:
                after = pipe.layers.run(self._parent, h.to(pipe.device), pipe.call(batch, self._index))
            pipe.next_parent[batch] = after
            if batch < pipe.fits:
                y = given[0].reshape(*pipe.batches[batch][0].shape, -1)
                y = (y if bias is None else y - bias).cpu()
                self._wanted[batch] = y if factor is None else y + (h - h_s) / factor

    def _factor(self) -> float | None:
        """`residual_factor` of the parent's layer, on the start of one window."""
        pipe = self._pipeline
        ids, mask = pipe.batches[0]
        short = min(32, int(mask[0].sum()))
        h = pipe.parent[0][..., :1, :short, :].to(pipe.device)
        _, calls = pipe.layers.entering(ids[:1, :short])
        o = self._parent.get_submodule(pipe.inside(module_of(self.site.o), self._index))
        found = residual_factor(self._parent, o, lambda: pipe.layers.run(self._parent, h, calls[self._index]), h)
        return processes.of_first(found)

    @torch.no_grad()
    def _read(self, batch: int, more: Iterable[int]) -> Activations:
        pipe = self._pipeline
        _, mask = pipe.batches[batch]
        call = pipe.call(batch, self._index)
        q = pipe.inside(module_of(self.site.q), self._index)
        x, x_s = (
            _projected(model, model.get_submodule(q), pipe.layers, h[batch].to(pipe.device), call).cpu()
            for model, h in ((self._parent, pipe.parent), (pipe.built, pipe.student))
        )
        x, x_s = (y.reshape(*mask.shape, -1) for y in (x, x_s))
        sources = {*self.copy.form(self.layer).sources(self.layer), *more}
        inputs = {s: x_s if s == self.layer else pipe.noted[s][batch] for s in sources}
        lost = None
        if self._residual is not None and pipe.student is not pipe.parent:
            lost = ((pipe.parent[batch] - pipe.student[batch]) / self._residual).reshape(self._wanted[batch].shape)
        return Activations(x, x_s, self._wanted[batch], mask, inputs, lost)

    def close(self) -> None:
        """Let go of what belongs to this visit alone."""
        self._wanted.drop()


def relative_error(found: Tensor, wanted: Tensor, mask_BT: Tensor) -> Tensor:
    """Squared distance of hidden states in parts of the wanted ones', for each real token."""
    width = found.shape[-1]
    a, b = (h.reshape(-1, *mask_BT.shape, width)[:, mask_BT] for h in (found, wanted))
    return ((a - b).square().sum((0, -1)) / b.square().sum((0, -1)).clamp_min(1e-30)).double()


class _Reached(Exception):
    """Ends the run of a layer that has delivered what it was run for."""


@contextmanager
def noted(module: nn.Module, *, output: bool) -> Iterator[list[Tensor]]:
    """What the module reads, or gives, inside."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Any, ...], given: Any) -> None:
        found.append(given if output else args[0])

    handle = module.register_forward_hook(note)
    try:
        yield found
    finally:
        handle.remove()


def _projected(layer: nn.Module, q: nn.Module, layers: DecoderLayers, h: Tensor, call: Call) -> Tensor:
    """What `q` reads; the layer is run no further than that."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    # First: a hook that a form has put there would see the input as well, and nothing else is wanted of it.
    handle = q.register_forward_pre_hook(note, prepend=True)
    try:
        layers.run(layer, h, call)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]
