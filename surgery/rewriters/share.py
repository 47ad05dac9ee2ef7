"""The `share` step: layers read the cache of an earlier layer, and learn to by closed forms on calibration text.

Readers are converted in order, each on the converted prefix. What is fitted on one part of the text is kept only where
another part confirms it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from ..anatomy import Anatomy
from ..attention.weights import AttentionWeights
from ..calibration.text import Windows
from ..calibration.visit import Visit
from ..calibration.working_copy import WorkingCopy
from ..errors import PlanError, RecipeError
from ..planning.latent_size import input_columns, kept_numbers
from ..planning.parent_class import why_not_handed_down
from ..planning.share_layouts import SEARCHED, SVFORMER, check_layout, check_map, kept_layers, owners_of, sharable
from ..recipe import Text
from ..runtime.layout import AttentionSite, Heads, Latent, LayerPlan, Project
from ..runtime.project import latent_refusal
from . import Method
from .common.gains import GainFit, fit_gains, tune_gains
from .common.options import RefinedStep, why_queries_stay
from .common.query_fit import QueryFit, stride_of
from .common.refine import refine
from .common.refit import Fit, fit_output, keep_what_helps, output_fits
from .layers.latent import share_latents
from .layers.maps import least_squares, map_values, mean_weights, pair_moments
from .layers.search import kvsharer_pairs, search_pairs


@dataclass(frozen=True, kw_only=True)
class ShareStep(RefinedStep):
    """Let layers read the cache of an earlier layer and keep none of their own; `layers` selects those that may."""

    rewriter: Literal["share"] = "share"
    layout: str | dict[int, int] = "cla2"
    """`cla2`, `cla(3)`, `mlkv(layers=4)`, `yoco`; `mlkv`, `pizza-bottom`, `sandwich-bottom`, `lasagna-bottom` with
    `kv_layers`; `search` and `kvsharer`, which the text decides; `svformer`, where only V is shared, that of the first
    layer; or a map of readers to owners: `{1: 0, 3: 2}`."""
    kv_layers: int | float | None = None
    """Layers that keep a cache: how many, or what part of those selected."""
    init: Literal["best", "latent", "replace", "mean", "least_squares"] = "best"
    """How a reader learns to read: `replace` (as it is), `least_squares` (maps folded into q and o) or for each reader
    the `best` of these two; `mean` (the owner gets the mean of all its readers' weights); or `latent`: the owner caches
    a latent of its input, made for all its readers."""
    keep: float = 1.0
    """`latent` only: numbers of an owner's cache as part of those it had."""
    refit_queries: bool = True
    """Refit the readers' `q_proj` by least squares to the parent's attention scores."""
    refit_output: bool = True
    """Refit `o_proj` by ridge regression to the parent's attention output."""
    gain_fit: GainFit = False
    """Fit one factor per query head on q and on o, then fold: `true` in closed form, layer by layer, which does not
    help most readers; `global` by the loss of the whole model, which has to be in memory and does. Both need
    calibration text."""

    @property
    def text(self) -> Text:
        has_none = self.init not in ("replace", "mean") or self.is_searched or self.fits_on_text
        return "needed" if has_none else "better"

    @property
    def is_searched(self) -> bool:
        """Whether calibration text decides which layers read which."""
        return self.layout in SEARCHED

    def unread(self) -> dict[str, str]:
        keep = f"{self.init} shares whole heads. Set init: latent, or leave it out."
        return {} if self.init == "latent" else {"keep": keep}

    def validate(self, where: str) -> None:
        super().validate(where)
        if isinstance(self.layout, str):
            check_layout(self.layout, self.kv_layers is not None, where)
        elif self.kv_layers is not None:
            raise RecipeError(f"{where}: a map fixes how many layers keep a cache. Leave out kv_layers.")
        elif not self.layout:
            raise RecipeError(f"{where}.layout: the map is empty. Write for example {{1: 0, 3: 2}}, reader: owner.")
        if self.kv_layers is not None and (
            self.kv_layers < 1 if isinstance(self.kv_layers, int) else not 0 < self.kv_layers <= 1
        ):
            raise RecipeError(
                f"{where}.kv_layers: {self.kv_layers} must be a number of layers (4) or a part of them (0.5)."
            )
        if not 0 < self.keep <= 1:
            raise RecipeError(f"{where}.keep: {self.keep:g} must be above 0 and at most 1.")
        if self.layout == SVFORMER and self.init in ("latent", "mean"):
            raise RecipeError(
                f"{where}.init: {self.init!r} has no svformer layout. Use best, least_squares or replace."
            )


class Share(Method):
    """Gives readers their owners, by a layout or by a search, and fits them."""

    Options = ShareStep
    axis = "share"
    step: ShareStep

    def __init__(self, options: ShareStep, seed: int = 0) -> None:
        super().__init__(options, seed)  # nothing here is random
        self.orders: dict[int, list[int]] = {}
        """The query head, before, of each of a reader's."""

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """Readers, and with `init: latent` the latents of their owners.

        Layouts that the text decides are planned with the last layers as readers: their number stays.
        """
        step = self.step
        sites = {site.layer: site for site in anatomy.sites}
        plans = {layer.layer: layer for layer in layers}
        reason = why_not_handed_down(anatomy)
        if reason is not None:
            raise PlanError(f"{where}: {reason}, so that no layer can be given the cache of another. Use gqa.")
        owners = self._planned_owners(sites, plans, where)
        together = sorted({*owners, *owners.values()})
        for layer in together:
            if layer in plans and plans[layer].project.kind != "heads" and step.init != "latent":
                raise PlanError(
                    f"layer {layer}: {where} lets caches of heads be read, and an earlier step has given this one a "
                    "latent of its own. Select other layers, or take share with init: latent and `keep`, which makes "
                    "one latent for all its readers."
                )
        if not owners:
            raise PlanError(
                f"{where}: layout {step.layout} lets none of the layers read the cache of another here: nothing would "
                f"change. Select more layers{'' if step.kv_layers is None else ', or use a smaller kv_layers'}."
            )
        check_map(owners, sites, plans)
        for layer in together:
            reason = self._refusal(sites[layer], where)
            if reason is not None:
                raise PlanError(f"layer {layer}: {reason}")
            if step.init == "latent":
                plans[layer] = replace(plans[layer], project=_shared_latent(step, sites[layer]))
        for layer, owner in owners.items():
            plan = plans[layer]
            plans[layer] = replace(plan, value_owner=owner) if step.layout == SVFORMER else replace(plan, owner=owner)
        return tuple(plans[layer.layer] for layer in layers)

    def _planned_owners(
        self, sites: Mapping[int, AttentionSite], plans: Mapping[int, LayerPlan], where: str
    ) -> dict[int, int]:
        """Reader -> owner, of V alone for `svformer`; where the text decides, the last layers that can read."""
        step = self.step
        chosen = [layer for layer in sorted(sites) if step.selects(layer)]
        if not isinstance(step.layout, str):
            outside = sorted(set(step.layout) - set(chosen))
            if outside and outside[0] in sites:
                raise PlanError(f"{where}: layer {outside[0]} is in the map, and not among layers: {step.layers}.")
            return dict(step.layout)
        owners = owners_of(step.layout, chosen, step.kv_layers, where)
        if not step.is_searched:
            return owners
        free = [layer for layer in chosen if self._may_share(plans[layer].project, sites[layer])]
        possible = {reader: found for reader, found in sharable(free, sites, plans).items() if found}
        if len(possible) < len(owners):
            raise PlanError(
                f"{where}: {len(owners)} layers are to read the cache of an earlier one, and only {len(possible)} find "
                f"one like their own. Use kv_layers: {len(chosen) - len(possible)} or more."
            )
        readers = sorted(possible)[-len(owners) :] if owners else []
        return {reader: max(set(possible[reader]) - set(readers)) for reader in readers}

    def _refusal(self, site: AttentionSite, where: str) -> str | None:
        """Why the attention can neither read a cache nor lend its own; None where it can."""
        for fault, is_there in (
            (f"clamps keys and values to {site.clip_qkv}", site.clip_qkv is not None),
            ("gates its head outputs", site.gated_output),
        ):
            if is_there:
                return f"{where} fits what readers read, and this attention {fault}. Use gqa."
        reason = latent_refusal(site) if self.step.init == "latent" else None
        return reason and f"{where} makes a latent, but {reason}"

    def _may_share(self, project: Project, site: AttentionSite) -> bool:
        """Whether a search may take the layer: latents of earlier steps are not shared, nor heads replaced by one."""
        return project == Heads.of(site) if self.step.init == "latent" else project.kind == "heads"

    def conflict(self, other: Any) -> str | None:
        """Steps that would have to know which layers keep a cache before the text has decided it."""
        if other.axis == "share":
            return "who reads whose cache is one map. Write one share step, with the layout as a map: {1: 0, 3: 2}."
        if self.step.is_searched and other.axis != "project" and other.step.layers is not None:
            return (
                f"text decides which layers read which, so that {other.step.rewriter} cannot be for layers "
                f"{other.step.layers} alone. Leave out its layers, or write the layout of share as a map."
            )
        return None

    def notes(self, plan: Any) -> list[str]:
        """What is left to the text."""
        note = "the text decides which layers read which; bytes above are for the last ones that can"
        return [note] * self.step.is_searched

    def convert(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> None:
        """Convert all readers, and in latent form their owners. In place; None asks for the data-free form."""
        self.merged = set(copy.converted)
        owners = self.owners(copy, plans, windows)
        values = {plan.layer: plan.value_owner for plan in plans if plan.value_owner is not None}
        if windows is None:
            self._without_text(copy, owners, values)
        elif self.step.init == "latent":
            ranks = {owner: _shared_latent(self.step, copy.sites[owner]).rank for owner in owners.values()}
            share_latents(copy, owners, ranks, windows, self._refit)
        else:
            lenders = {*owners.values(), *values.values()}
            means = lenders if self.step.init == "mean" else set()
            for visit in copy.visits(windows, {*owners, *values, *means}, lenders, kept=self.orders):
                layer = visit.layer
                if layer in means:
                    self._take_mean(copy, layer, owners)
                elif layer in owners:
                    self._share_heads(visit, owners[layer])
                else:
                    self._share_values(visit, values[layer])
        if windows is not None and self.step.gain_fit == "global":
            tune_gains(copy, copy.computed, windows)

    def _without_text(self, copy: WorkingCopy, owners: Mapping[int, int], values: Mapping[int, int]) -> None:
        """Readers as they are; with `init: mean`, owners with the mean of all that read them."""
        if self.step.init == "mean":
            for owner in sorted(set(owners.values())):
                self._take_mean(copy, owner, owners)
        for reader, owner in owners.items():
            copy.read_from(reader, owner)
        for reader, owner in values.items():
            copy.read_from(reader, owner, values_only=True)

    def _take_mean(self, copy: WorkingCopy, owner: int, owners: Mapping[int, int]) -> None:
        members = [owner, *(reader for reader, o in owners.items() if o == owner)]
        copy.write(owner, mean_weights(copy, {layer: copy.read(layer) for layer in members}, owner))

    def owners(self, copy: WorkingCopy, plans: Sequence[LayerPlan], windows: Windows | None) -> dict[int, int]:
        """Reader -> owner: the plan's, or what the text says is cheapest."""
        planned = {plan.layer: plan.owner for plan in plans if plan.owner != plan.layer}
        if self.step.layout not in SEARCHED:
            return planned
        assert windows is not None
        chosen = [layer for layer in sorted(copy.sites) if self.step.selects(layer)]
        alone = {
            layer: LayerPlan(layer=layer, project=copy.project(layer), owner=layer, window=copy.sites[layer].window)
            for layer in chosen
        }
        readers = len(chosen) - kept_layers(self.step.kv_layers, len(chosen), "kv_layers")
        free = [layer for layer in chosen if self._may_share(alone[layer].project, copy.sites[layer])]
        possible = sharable(free, copy.sites, alone)
        if self.step.layout == "kvsharer":
            found = kvsharer_pairs(copy, possible, readers, windows)
        else:
            found = search_pairs(copy, possible, readers, windows, latent=self.step.init == "latent")
        if len(found) < readers:
            warnings.warn(
                f"share: {len(chosen) - len(found)} layers keep a cache in the place of {len(chosen) - readers}: no "
                f"further layer found an owner near enough that is like it ({self.step.layout}). Use a larger "
                "kv_layers, or write the layout as a map.",
                stacklevel=2,
            )
        return found

    def _share_heads(self, visit: Visit, owner: int) -> None:
        copy, reader = visit.copy, visit.layer
        before = copy.read(reader)
        copy.read_from(reader, owner)
        if self.step.init in ("best", "least_squares"):
            made, order = least_squares(before, pair_moments(visit, owner))
            if self.step.init == "least_squares" or self._best(visit, (before, made)):
                copy.write(reader, made)
                self.orders[reader] = order
        self._refit(visit, before)

    def _best(self, visit: Visit, forms: Sequence[AttentionWeights]) -> int:
        """Which of the forms is the best, each with its W_o refitted; the first is what the layer has afterwards."""
        errors = []
        for form in forms:
            visit.copy.write(visit.layer, form)
            if self.step.refit_output:
                visit.copy.write(visit.layer, fit_output(visit, form))
            errors.append(visit.error())
        visit.copy.write(visit.layer, forms[0])
        return errors.index(min(errors))

    def _share_values(self, visit: Visit, owner: int) -> None:
        """Own K, another layer's V (SVFormer, arXiv:2410.17897, here from pretrained weights)."""
        copy, reader = visit.copy, visit.layer
        before = copy.read(reader)
        copy.read_from(reader, owner, values_only=True)
        if self.step.init in ("best", "least_squares"):
            made = map_values(before, pair_moments(visit, owner))
            if self.step.init == "least_squares" or self._best(visit, (before, made)):
                copy.write(reader, made)
        self._refit(visit, before)

    def _refit(self, visit: Visit, target: AttentionWeights) -> None:
        """W_q by the scores of `target`, then W_o by the parent's output, on what the layer now reads; kept if better.

        Args:
            target: the layer before it was to read others' K and V.
        """
        fits: list[Fit] = []
        if self.step.refit_queries and why_queries_stay(visit.site) is None:
            fits.append(partial(self._fit_queries, target=target))
        if self.step.gain_fit is True:
            fits.append(fit_gains)
        keep_what_helps(visit, [*fits, *output_fits()] if self.step.refit_output else fits)
        refine(visit, self.step.refine)

    def _fit_queries(self, visit: Visit, student: AttentionWeights, target: AttentionWeights) -> AttentionWeights:
        layer = visit.layer
        found = QueryFit(target, student, self.orders.get(layer, range(student.heads)))
        for a in visit.activations():
            k, _ = visit.copy.keys_values(layer, a.inputs)
            # Merged heads have no scores of the parent's to meet: theirs are those of the layer after merging.
            x_target = a.x_student_BTD if layer in self.merged else a.x_parent_BTD
            found.add(x_target, a.x_student_BTD, a.mask_BT, stride_of(visit), k)
        return found.solve()


def _shared_latent(step: ShareStep, site: AttentionSite) -> Latent:
    """K of all readers is rotated at read: its mean over layers has no rotated part that suits them all."""
    numbers = min(kept_numbers(step.keep, site), input_columns(site))
    return Latent.of(site, numbers, 0, rotate_on_read=True)
