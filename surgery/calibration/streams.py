"""Both models' residual streams before one decoder layer, kept: moving on costs one layer, not the model up to it.

Decoder layers are called alone with the arguments that the whole model once gave them. Where that does not give back
what the whole model computed (layers that talk past the residual stream), `streams_of` says so by returning None, and
callers run the whole model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.layout import AttentionSite
from .outputs import answers
from .statistics import BATCH, Activations, Pair, Variety, module_of, residual_factor
from .text import Windows

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments of a decoder layer after the hidden states."""


class Streams:
    """Starts before decoder layer 0; `move` goes forward only. Use `streams_of`."""

    def __init__(self, copy: Pair, windows: Windows, stack: str) -> None:
        self.copy, self.windows = copy, windows
        self.parent_layers, self.student_layers = (_members(model, stack) for model in (copy.teacher, copy.model))
        self.layer = 0
        self.batches = list(windows.batches(BATCH))
        self.calls: list[list[Call]] = []
        self.parent: list[Tensor] = []
        self.sound = True
        with torch.no_grad():
            for ids, _ in self.batches:
                seen = _record(copy.teacher, self.parent_layers, ids)
                if seen is None or (not self.calls and not self._chains(seen)):
                    self.sound = False
                    return
                self.parent.append(seen[0][0])
                self.calls.append([call for _, call in seen])
        self.student = list(self.parent)

    def move(self, layer: int) -> None:
        """Bring both streams to before decoder layer `layer`, through the student as it is now."""
        with torch.no_grad():
            for i in range(self.layer, layer):
                for b, calls in enumerate(self.calls):
                    self.parent[b] = _run(self.parent_layers[i], self.parent[b], calls[i])
                    self.student[b] = _run(self.student_layers[i], self.student[b], calls[i])
        self.layer = layer

    def activations(self, site: AttentionSite) -> Iterator[Activations]:
        """What `layer_activations` gives, of the layer that the streams stand before."""
        factor = residual_factor(self.copy.teacher, site, self.windows)
        variety = Variety(site.layer)
        for b, (_, mask) in enumerate(self.batches):
            h, h_s, call = self.parent[b], self.student[b], self.calls[b][self.layer]
            x = _projected(self.copy.teacher, self.parent_layers[self.layer], site, h, call)
            x_s = _projected(self.copy.model, self.student_layers[self.layer], site, h_s, call)
            variety.see(x_s, mask)
            gap = torch.zeros_like(h) if factor is None else (h - h_s) / factor
            yield Activations(x.cpu(), x_s.cpu(), gap.cpu(), mask)
        variety.warn()

    def answers(self) -> Iterator[Tensor]:
        """The student's answers at real tokens, batch by batch, computed from the stored stream on."""
        for b, (ids, mask) in enumerate(self.batches):
            with _from_layer(self.student_layers, self.layer, self.student[b]):
                yield answers(self.copy.model, ids, mask)

    def _chains(self, seen: Sequence[tuple[Tensor, Call]]) -> bool:
        """Whether layers called alone, and the model resumed at its last one, compute what the whole model does."""
        for i, (h, call) in enumerate(seen[:-1]):
            out = _run(self.parent_layers[i], h, call)
            if not isinstance(out, Tensor) or not torch.allclose(out, seen[i + 1][0], rtol=1e-4, atol=1e-4):
                return False
        ids, mask = self.batches[0]
        last = len(self.student_layers) - 1
        whole = _record(self.copy.model, self.student_layers, ids)
        if whole is None:
            return False
        want = answers(self.copy.model, ids, mask)
        with _from_layer(self.student_layers, last, whole[last][0]):
            got = answers(self.copy.model, ids, mask)
        return torch.allclose(got, want, rtol=1e-4, atol=1e-4)


def streams_of(copy: Pair, windows: Windows, limit: int) -> Streams | None:
    """Streams of both models on `windows`; None where they hold more than `limit` numbers or do not stand alone."""
    sites = list(copy.sites.values())
    stacks = {site.module.rpartition(".")[0].rpartition(".")[0] for site in sites}
    if len(stacks) != 1 or 2 * windows.ids_BT.numel() * sites[0].hidden_size > limit:
        return None
    stack = stacks.pop()
    layers = copy.model.get_submodule(stack)
    inside = all(site.module.startswith(f"{stack}.{site.layer}.") for site in sites)
    if not isinstance(layers, nn.ModuleList) or not inside:
        return None
    streams = Streams(copy, windows, stack)
    return streams if streams.sound else None


def _members(model: nn.Module, stack: str) -> list[nn.Module]:
    found = model.get_submodule(stack)
    assert isinstance(found, nn.ModuleList)
    return list(found)


class _Reached(Exception):
    """Ends a forward pass that has delivered what it was run for."""


def _record(model: nn.Module, layers: Sequence[nn.Module], ids_BT: Tensor) -> list[tuple[Tensor, Call]] | None:
    """Hidden states and other arguments that each layer gets; None where a layer is not called exactly once."""
    seen: list[tuple[Tensor, Call]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        h = args[0] if args else kwargs["hidden_states"]
        rest = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        seen.append((h.detach(), (args[1:], rest)))

    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(note, with_kwargs=True)
            stack.callback(handle.remove)
        device = next(model.parameters()).device
        getattr(model, "base_model", model)(input_ids=ids_BT.to(device), use_cache=False)
    return seen if len(seen) == len(layers) else None


def _run(layer: nn.Module, h_BTD: Tensor, call: Call) -> Tensor:
    found: Tensor = layer(h_BTD, *call[0], **call[1])
    return found


def _projected(model: nn.Module, layer: nn.Module, site: AttentionSite, h_BTD: Tensor, call: Call) -> Tensor:
    """What q of `site` reads; the layer is run no further than that."""
    found: list[Tensor] = []

    def note(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        found.append(args[0])
        raise _Reached

    handle = model.get_submodule(module_of(site.q)).register_forward_pre_hook(note)
    try:
        with torch.no_grad():
            _run(layer, h_BTD, call)
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0].reshape(h_BTD.shape)


@contextmanager
def _from_layer(layers: Sequence[nn.Module], start: int, h_BTD: Tensor) -> Iterator[None]:
    """Inside, layers before `start` hand on what they get, and layer `start` gets `h_BTD`. Of our own copy only."""

    def resume(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (h_BTD, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": h_BTD}

    handle = layers[start].register_forward_pre_hook(resume, with_kwargs=True)
    skipped = layers[:start]
    try:
        for layer in skipped:
            layer.forward = _hand_on
        yield
    finally:
        handle.remove()
        for layer in skipped:
            del layer.forward


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
