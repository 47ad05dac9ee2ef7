"""What a form of one layer, or of several, costs the model: KL to the parent on tokens that are read through the cache.

Most of each window is given to the model at once; the tokens after it come as a second chunk, which reads what the
cache has kept of the first. So codes, windows and evictions count as they do in decoding, at the price of two calls.
Layers before the first one that is changed give what they give in the parent, which is kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf, isfinite
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ..anatomy import Anatomy
from ..calibration.text import Windows
from ..console import progress
from ..errors import UnsupportedModel
from ..measure.scoring import divergence, last_logits
from ..runtime.attention import SurgeryAttention
from ..runtime.calling import cache_of, going_on
from .costs import Found, Measure
from .settings import Setting

SCORED = 4
"""The last of so many parts of a window are the tokens that are compared."""
SAME = 1e-5
"""Relative difference up to which what a layer gives counts as what the parent's gives; of log-probabilities the
difference itself, ten times that."""
FORGOTTEN = 1e-3
"""KL in nats per token, between the parent behind its cache and in one pass, that no rounding in float32 explains."""


class Bench:
    """A model of the parent's class whose attentions can be exchanged, and text on which that is judged.

    Args:
        parent: in float32; its attentions are exchanged while something is measured, and put back.
        windows: text that nothing is fitted on.
    """

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy, windows: Windows) -> None:
        self.model, self.windows = parent.eval(), windows
        self.names = {site.layer: site.module for site in anatomy.sites}
        self.own = {layer: self.model.get_submodule(name) for layer, name in self.names.items()}
        stem = anatomy.sites[0].module
        prefix, self.stack = next(
            (name, module)
            for name, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList) and stem.startswith(f"{name}.")
        )
        self.place = {site.layer: int(site.module.removeprefix(f"{prefix}.").split(".")[0]) for site in anatomy.sites}
        length = windows.ids_BT.shape[1]
        self.prefill = length - max(1, length // SCORED)
        self.given: list[list[Any]] = [[None] * len(self.stack) for _ in range(2)]
        """By call: what each decoder layer gives in the parent."""
        self.cached: list[Any] = []
        """Layers of the parent's cache after the first call."""
        self.spared: tuple[int, ...] = ()
        """Layers that the first call left out although the second one asks for their part of the cache."""
        self.at_once = True
        """Whether the tokens that are compared come in one call."""
        self.wanted = self._record()
        if not self._goes_on():
            self.at_once, self.cached = False, []
            self.wanted = self._record()
        self.skips = self.at_once and self._can_skip()

    @torch.inference_mode()
    def kl(self, attentions: Mapping[int, nn.Module]) -> float:
        """KL(parent || model) in nats per token with these attentions in the place of the parent's, by layer.

        Infinite where the model gives what is no number.
        """
        if not attentions:
            return 0.0
        places = [self.place[layer] for layer in attentions]
        with self._exchanged(attentions), self._sparing(places if self.skips else []):
            log_q = self._logits().float().log_softmax(-1)
        kl = float(divergence(self.wanted, log_q)[0][self.windows.mask_BT[:, self.prefill :]].mean())
        return max(kl, 0.0) if isfinite(kl) else inf  # rounding may fall below 0

    @torch.inference_mode()
    def error(self, layer: int, attention: nn.Module) -> float | None:
        """Mean squared error of what the decoder layer gives with this attention, on the tokens that are compared.

        No other layer runs. None where layers cannot be left out.
        """
        if not self.skips:
            return None
        place, given = self.place[layer], {}
        forward = self.stack[place].forward

        def kept(*args: Any, **kwargs: Any) -> Any:
            given[self.call] = found = forward(*args, **kwargs)
            return found

        others = {p: self._as_in_parent(p) for p in range(len(self.stack)) if p != place}
        with self._exchanged({layer: attention}), self._replaced({**others, place: kept}, place):
            self._logits(few=True)
        a, b = (_hidden(x) for x in (given[1], self.given[1][place]))
        there = self.windows.mask_BT[:, self.prefill :].to(a.device)
        return float((a - b).float().square().mean(-1)[there].mean())

    def _logits(self, few: bool = False) -> Tensor:
        """[B, T - prefill, vocabulary]; of `few` the last ones alone."""
        ids = self.windows.ids_BT.to(self.model.device)
        self.call, self.is_same = 0, False
        out = self.model(input_ids=ids[:, : self.prefill], use_cache=True, **last_logits(self.model))
        cache = cache_of(out)
        if cache is None:
            raise UnsupportedModel(f"{type(self.model).__name__}: returns no cache, so nothing can be read through it.")
        if not self.cached:
            self.cached = [copy.copy(layer) for layer in cache.layers]
        for place in self.spared:
            # Whoever goes on with such a layer puts new tensors in it: those of the parent stay.
            cache.layers[place] = copy.copy(self.cached[place])
        self.call, past, logits = 1, self.prefill, []
        last = last_logits(self.model) if few else {}
        for part in ids[:, past:].split(ids.shape[1] if self.at_once else 1, dim=1):
            out = self.model(**going_on(self.model, part, cache, past), **last)
            cache, past = cache_of(out), past + part.shape[1]
            logits.append(out.logits.cpu())
        return torch.cat(logits, 1)

    @torch.inference_mode()
    def _record(self) -> Tensor:
        def note(place: int) -> Any:
            def hook(_: nn.Module, args: Any, output: Any) -> None:
                self.given[self.call][place] = output

            return hook

        handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(self.stack)]
        try:
            return self._logits().float().log_softmax(-1)
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def _goes_on(self) -> bool:
        """Whether several tokens behind the cache are answered as in one pass: layers of Mamba forget the text before
        them, but not before single ones."""
        whole = self.model(input_ids=self.windows.ids_BT.to(self.model.device), use_cache=False)
        log_p = whole.logits[:, self.prefill :].cpu().float().log_softmax(-1)
        kl = divergence(log_p, self.wanted)[0][self.windows.mask_BT[:, self.prefill :]].mean()
        return float(kl) < FORGOTTEN

    @torch.inference_mode()
    def _can_skip(self) -> bool:
        """Whether a model without some of its layers gives the same: layers may hand state past each other."""
        if len(self.cached) != len(self.stack) or not all(type(layer) is DynamicLayer for layer in self.cached):
            return False
        try:
            with self._sparing([len(self.stack) // 2]):
                found = self._logits().float().log_softmax(-1)
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
        return bool((found - self.wanted).abs().amax() < 10 * SAME)

    @contextmanager
    def _sparing(self, changed: Sequence[int]) -> Iterator[None]:
        """Inside, layers do not run that would give what they gave in the parent.

        Those before the first changed one never do. Those after a single changed one do not in the first call, where
        that gave the same: formats change nothing until the cache is read.

        Args:
            changed: places of the changed layers; none: every layer runs.
        """
        first = min(changed, default=0)
        given, layers = self.given, self.stack
        forwards = {place: layers[place].forward for place in range(len(layers))}

        def alone(*args: Any, **kwargs: Any) -> Any:
            found = forwards[first](*args, **kwargs)
            self.is_same = self.call == 0 and _close(found, given[0][first])
            self.spared = tuple(p for p in range(len(layers)) if p != first) if self.is_same else self.spared
            return found

        def after(place: int) -> Any:
            def forward(*args: Any, **kwargs: Any) -> Any:
                spare = self.call == 0 and self.is_same
                return given[0][place] if spare else forwards[place](*args, **kwargs)

            return forward

        replaced: dict[int, Any] = {place: self._as_in_parent(place) for place in range(first)}
        if len(changed) == 1:
            replaced[first] = alone
            replaced |= {place: after(place) for place in range(first + 1, len(layers))}
        with self._replaced(replaced, first):
            yield

    def _as_in_parent(self, place: int) -> Callable[..., Any]:
        """A forward that gives what the decoder layer gave in the parent."""
        return lambda *args, **kwargs: self.given[self.call][place]

    @contextmanager
    def _replaced(self, forwards: Mapping[int, Callable[..., Any]], first: int) -> Iterator[None]:
        """Inside, decoder layers have these forwards, by place; `first` is the first that runs.

        Where one before it is left out, the second call takes the first layer's part of the parent's cache: that tells
        how many tokens there are.
        """
        self.spared = (0,) if first else ()
        for place, forward in forwards.items():
            self.stack[place].forward = forward
        try:
            yield
        finally:
            self.spared = ()
            for place in forwards:
                del self.stack[place].forward

    @contextmanager
    def _exchanged(self, attentions: Mapping[int, nn.Module]) -> Iterator[None]:
        plans = tuple(a.plan for a in attentions.values() if isinstance(a, SurgeryAttention))
        try:
            for layer, attention in attentions.items():
                if isinstance(attention, SurgeryAttention):
                    attention.all_plans = plans
                self._put(layer, attention)
            yield
        finally:
            for layer in attentions:
                self._put(layer, self.own[layer])

    def _put(self, layer: int, attention: nn.Module) -> None:
        owner, _, name = self.names[layer].rpartition(".")
        setattr(self.model.get_submodule(owner), name, attention)


def measure_by(bench: Bench, make: Callable[[Setting, Collection[int]], Mapping[int, nn.Module]]) -> Measure:
    """What `measure_costs` asks of a model: attentions are made once for each setting, and exchanged one by one.

    Args:
        make: the attentions of a setting in some layers, by layer.
    """

    def measure(setting: Setting, layers: Collection[int], asked: Collection[int]) -> dict[int, Found]:
        modules, found = make(setting, layers), dict[int, Found]()
        with progress(f"{setting.label}, layers measured", len(modules), shown=False) as advance:  # in the log alone
            for layer, module in modules.items():
                error = bench.error(layer, module)
                is_known = error is not None and isfinite(error)
                found[layer] = None if is_known and layer not in asked else bench.kl({layer: module}), error
                advance(1)
        return found

    return measure


def _hidden(given: Any) -> Tensor:
    """The hidden states of what a decoder layer gives."""
    found: Tensor = given[0] if isinstance(given, tuple) else given
    return found


def _close(found: Any, wanted: Any) -> bool:
    a, b = _hidden(found), _hidden(wanted)
    return bool((a - b).abs().amax() <= SAME * b.abs().amax())
