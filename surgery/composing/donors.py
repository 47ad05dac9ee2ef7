"""Layers in the forms that the planner chooses from, each fitted as if no other layer were converted."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..anatomy import Anatomy
from ..assembly import in_own_class
from ..attention.weights import parameter_names
from ..calibration.forms import HeadsForm
from ..calibration.text import Windows
from ..calibration.visit import Visit
from ..calibration.working_copy import WorkingCopy
from ..console import spans
from ..convert import carry_out_steps
from ..plan import plan as make_plan
from ..rewriters.quantise import Quantise
from ..rewriters.stored.samples import tables_of
from ..runtime.attention import SurgeryAttention
from .costs import without_bits
from .settings import Setting, Steps


class AloneCopy(WorkingCopy):
    """A working copy in which each layer is visited with all others as the parent has them."""

    has_prefix = False

    def visits(
        self,
        windows: Windows,
        layers: Iterable[int],
        lenders: Iterable[int] = (),
        kept: dict[Any, Any] | None = None,
    ) -> Iterator[Visit]:
        """See `WorkingCopy.visits`; what is done to a layer is put aside before the next one is reached."""
        done = {layer: self._put_aside(layer) for layer in list(self._forms)}
        for visit in super().visits(windows, layers, lenders, kept):
            if visit.layer in done:
                self._put_back(visit.layer, *done[visit.layer])
            yield visit
            done[visit.layer] = self._put_aside(visit.layer)
        for layer, (parameters, form) in done.items():
            self._put_back(layer, parameters, form)

    def _put_aside(self, layer: int) -> tuple[dict[str, Tensor], HeadsForm]:
        names = [name for name in parameter_names(self.sites[layer]) if name in self._changed]
        parameters = {name: self._changed[name] for name in names}
        form = self.form(layer)
        self.restore({name: self._read(name) for name in names})
        for name in names:
            del self._changed[name]
        self.drop_form(layer)
        return parameters, form

    def _put_back(self, layer: int, parameters: Mapping[str, Tensor], form: HeadsForm) -> None:
        self.restore(dict(parameters))
        self.take_form(layer, form)


class Donors:
    """Makes the attention of each layer in a form; they may stand in a model of the parent's class one by one.

    Args:
        parent: in float32.
        windows: text to fit on.
    """

    def __init__(self, parent: PreTrainedModel, anatomy: Anatomy, windows: Windows, seed: int) -> None:
        self.parent, self.anatomy, self.windows, self.seed = parent, anatomy, windows, seed
        self._base: tuple[Steps, AloneCopy, dict[int, nn.Module]] | None = None
        """What was fitted last by all of its steps: one more step on top of it needs no second fit of those."""
        self._fits: tuple[Steps, dict[int, Any]] = ((), {})
        """The steps of the calibrated codec that was fitted last, without its bits, and what text said by layer."""

    def of(self, setting: Setting, layers: Collection[int] | None = None) -> dict[int, nn.Module]:
        """By layer, in some layers or in all."""
        chosen = [site.layer for site in self.anatomy.sites if layers is None or site.layer in layers]
        if len(chosen) < len(self.anatomy.sites):
            made = self._made(setting, spans(chosen))[1]
            return {layer: made[layer] for layer in chosen}
        base = self._base if self._base is not None and setting.steps[:-1] == self._base[0] else None
        if base is not None and setting.last_needs_no_text:
            return self._stored(base[2], setting)
        working, made = self._made(setting, base=base)
        if base is None and setting.steps:
            self._base = setting.steps, working, made
        return made

    def _made(
        self,
        setting: Setting,
        layers: str | None = None,
        base: tuple[Steps, AloneCopy, dict[int, nn.Module]] | None = None,
    ) -> tuple[AloneCopy, dict[int, nn.Module]]:
        """Fit a setting on all layers or on some, on top of `base`; layers that it is not for are the parent's."""
        plan = make_plan(self.anatomy, setting.recipe(layers))
        working = AloneCopy(self.parent, self.anatomy) if base is None else base[1]
        whole, done = layers is None, 0 if base is None else len(base[0])
        open_bits = (*setting.steps[:-1], *map(without_bits, setting.steps[-1:]))
        known, fits = self._fits
        if whole and done == len(setting.steps) - 1 and known == open_bits:
            for layer_plan in (p for p in plan.after if p.layer in fits):
                working.codecs[layer_plan.layer] = tables_of(fits[layer_plan.layer], Quantise.stored(layer_plan))
        else:
            working.fits = {}
            carry_out_steps(working, plan, self.windows, self.seed, done=done)
            if whole and working.fits:
                self._fits = open_bits, working.fits
        settled = plan.settled(map(working.settle, plan.after))
        for site in self.anatomy.sites:  # also layers of which only the plan changes
            working.take_form(site.layer, working.form(site.layer))
        child = in_own_class(self.parent, settled, working, {}).eval()
        return working, {site.layer: child.get_submodule(site.module) for site in self.anatomy.sites}

    def _stored(self, fitted: Mapping[int, nn.Module], setting: Setting) -> dict[int, nn.Module]:
        """The attentions of a setting's first steps, with caches as the last one stores them: parameters stay."""
        found: dict[int, nn.Module] = {}
        for plan in make_plan(self.anatomy, setting.recipe()).after:
            made = copy.copy(fitted[plan.layer])
            assert isinstance(made, SurgeryAttention)
            made.plan = replace(made.plan, store=plan.store)
            found[plan.layer] = made
        return found
