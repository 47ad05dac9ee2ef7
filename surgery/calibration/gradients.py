"""How much the model's answers depend on what each attention gives: gradients, by one way back through the layers.

As on the way forward, no more than one layer has its weights in memory; hidden states and gradients are streams.
"""

from __future__ import annotations

import itertools
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..console import progress
from . import processes
from .journal import HELD_BYTES
from .outputs import speaks
from .pipeline import Pipeline
from .statistics import module_of
from .streams import Stream
from .text import Windows

if TYPE_CHECKING:
    from .working_copy import WorkingCopy


@contextmanager
def output_gradients(
    copy: WorkingCopy, windows: Windows, layers: Iterable[int], seed: int
) -> Iterator[dict[int, Stream]]:
    """Layer -> [B, T, D] by batch to fit on: what the parent's answers change by with that attention's output.

    The gradient of Σ 2 √p(y) over real places and tokens y, each with a sign that is drawn: the mean of its squared
    product with a change is Σ (dp)² / p, twice the KL in nats that a small change costs (Fisher information). Drawing
    tokens y for the gradient of log p(y) has the same mean, but where the model is sure it lives of rare draws. Models
    that give no probabilities answer with their last hidden states.

    Args:
        layers: whose attentions are asked about.
        seed: of the signs.
    """
    wanted = {copy.layers.place[layer]: layer for layer in layers}
    width = next(iter(copy.sites.values())).hidden_size
    held = (len(copy.layers) + len(wanted)) * windows.ids_BT.numel() * width * copy.stream_dtype.itemsize
    with tempfile.TemporaryDirectory(prefix="surgery-gradients-") as scratch:
        pipe = Pipeline(copy, windows, Path(scratch) if held > HELD_BYTES else None, copy.stream_dtype)
        steps = 2 * len(copy.layers) - min(wanted)
        with progress(f"{copy.doing}: through the layers and back", steps) as advance:
            found = _way_back(pipe, wanted, seed, advance)
        yield found


def _way_back(pipe: Pipeline, wanted: dict[int, int], seed: int, advance: Callable[[int], None]) -> dict[int, Stream]:
    layers, batches = pipe.layers, range(pipe.fits)

    def stream(name: str) -> Stream:
        return Stream(name, pipe.folder, pipe.dtype)

    entered = [stream(f"entered-{index}") for index in range(len(layers) + 1)]
    with torch.no_grad():
        for batch in batches:
            entered[0][batch] = layers.entering(pipe.batches[batch][0])[0]
        for index, (before, after) in enumerate(itertools.pairwise(entered)):
            module = layers.build(index)
            for batch in batches:
                after[batch] = layers.run(module, before[batch].to(pipe.device), pipe.call(batch, index))
            advance(1)
    back = stream(f"back-{len(layers)}")
    for batch in batches:
        # The same draws however many processes there are.
        random = torch.Generator().manual_seed(seed + batch * processes.count() + processes.rank())
        back[batch] = _of_answers(pipe, batch, entered[-1][batch], random)
    entered[-1].drop()
    found = {layer: stream(f"gradient-{layer}") for layer in wanted.values()}
    sites = {layers.place[site.layer]: site for site in pipe.copy.sites.values()}
    for index in reversed(range(min(wanted), len(layers))):
        module, before = layers.build(index), stream(f"back-{index}")
        o = module.get_submodule(pipe.inside(module_of(sites[index].o), index)) if index in wanted else None
        for batch in batches:
            h, at_output = _through(pipe, module, o, index, batch, entered[index][batch], back[batch])
            before[batch] = h
            if at_output is not None:
                found[wanted[index]][batch] = at_output.reshape(*pipe.batches[batch][0].shape, -1)
        entered[index].drop()
        back.drop()
        back = before
        advance(1)
    back.drop()
    for left in entered:
        left.drop()
    return found


@torch.enable_grad()
def _through(
    pipe: Pipeline, module: nn.Module, o: nn.Module | None, index: int, batch: int, h: Tensor, back: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The gradient at what a layer reads, and at what its `o` gives, from that at its output."""
    added: list[Tensor] = []

    def exchange(_: nn.Module, __: object, output: Tensor) -> Tensor:
        added.append(torch.zeros_like(output, requires_grad=True))
        return output + added[0]

    handle = None if o is None else o.register_forward_hook(exchange)
    h = h.to(pipe.device).requires_grad_()
    try:
        out = pipe.layers.run(module, h.clone(), pipe.call(batch, index))  # a copy: some layers add in place
    finally:
        if handle is not None:
            handle.remove()
    found = torch.autograd.grad(out, [h, *added], back.to(pipe.device))
    return found[0], found[1] if added else None


def _of_answers(pipe: Pipeline, batch: int, h: Tensor, random: torch.Generator) -> Tensor:
    """The gradient at the last layer's output."""
    found = torch.zeros_like(h)
    for at, ids, mask in pipe.pieces(batch):
        part = h[at].to(pipe.device).requires_grad_()
        with torch.enable_grad():
            answers = pipe.layers.answers(part, ids, mask)
        signs = torch.randint(2, answers.shape, generator=random).mul_(2).sub_(1).to(answers)
        along = signs * (answers.detach() / 2).exp() if speaks(pipe.layers.shell) else signs
        found[at] = torch.autograd.grad(answers, part, along)[0].cpu()
    return found
