"""The `gqa` step: pool KV heads layer by layer, and refit what closed forms can.

A refit is kept only where it brings the layer's result nearer to the parent's on calibration text that it was not
fitted on: least squares on scores can win there and still lose after the softmax.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from ..anatomy import Anatomy
from ..attention.weights import AttentionWeights, is_permutable
from ..calibration.text import Windows
from ..calibration.visit import Visit
from ..calibration.working_copy import WorkingCopy
from ..errors import PlanError, RecipeError
from ..recipe import Text
from ..runtime.layout import AttentionSite, Heads, LayerPlan
from . import Method
from .common.gains import GainFit, fit_gains, tune_gains
from .common.layerwise import Layerwise
from .common.moments import Moments, visit_moments
from .common.options import RefinedStep, why_queries_stay
from .common.query_fit import QueryFit, stride_of
from .common.refine import refine
from .common.refit import Fit, keep_what_helps, output_fits
from .heads import Init
from .heads.grouping import (
    Groups,
    check_divides,
    cluster_heads,
    evolve_groups,
    neighbour_groups,
    rank1_cost,
    search_groups,
    share_queries,
)
from .heads.pooling import pool_heads, source_queries

UNEVEN: tuple[Init, ...] = ("asym", "qcqa", "key_norm")
"""Inits that can make groups of unequal size."""


@dataclass(frozen=True, kw_only=True)
class GqaStep(RefinedStep):
    """Pool KV heads into fewer, each shared by a group of query heads."""

    rewriter: Literal["gqa"] = "gqa"
    kv_heads: int | str | None = None
    """KV heads to keep: a number, or a fraction of the parent's such as `1/2`. Not needed beside `groups`."""
    init: Init = "rank1"
    """How the merged heads are made. `rank1` minimises the error of scores and outputs under the calibration text."""
    grouping: Literal["search", "neighbour"] = "search"
    """Which heads merge: chosen per layer by the error that merging them costs, or simply neighbours."""
    groups: tuple[tuple[int, ...], ...] | None = None
    """Explicit groups of the parent's KV heads, sizes may differ: `[[0, 3], [1], [2]]`."""
    renorm: bool = True
    """`aligned` only: restore the norm that averaging takes from the keys."""
    equal_groups: bool = True
    """False lets `asym`, `qcqa` and `key_norm` make groups of unequal size, which only our own runtime can run; no
    other init does."""
    refit_queries: bool = True
    """Refit `q_proj` by least squares to the parent's attention scores. Needs calibration text."""
    refit_output: bool = True
    """Refit `o_proj` by ridge regression to the parent's attention output. Needs calibration text."""
    gain_fit: GainFit = True
    """Fit one factor per query head on q and on o, then fold: `true` in closed form, layer by layer; `global` by the
    loss of the whole model, which has to be in memory. Needs calibration text."""

    @property
    def text(self) -> Text:
        if self.fits_on_text:
            return "needed"
        fits = self.refit_queries or self.refit_output or self.gain_fit
        return "better" if fits or self.init not in ("mean", "sqrt_g", "first", "random") else "none"

    @property
    def is_uneven(self) -> bool:
        """Whether groups of unequal size are decided by the text, or by the weights."""
        return not self.equal_groups and self.init in UNEVEN

    def unread(self) -> dict[str, str]:
        found = {} if self.init == "aligned" else {"renorm": "only init: aligned reads it. Set that, or leave it out."}
        if self.groups is not None:
            reason = "groups says which heads are pooled. Leave one of the two out."
            return found | {"grouping": reason, "equal_groups": reason}
        if self.is_uneven and self.init != "key_norm":
            found["grouping"] = f"with equal_groups: false, {self.init} makes the groups itself. Leave one of them out."
        elif self.init == "key_norm":
            found["grouping"] = "key_norm pools neighbours. Leave it out, or use another init."
        if not self.equal_groups and not self.is_uneven:
            found["equal_groups"] = (
                f"{', '.join(UNEVEN)} alone make groups of unequal size, not {self.init}. Use one of these, or write "
                "the groups out: groups: [[0, 1], [2], ...]."
            )
        return found

    def skipped(self, site: AttentionSite) -> dict[str, str]:
        reason = why_nothing_is_fitted(site)
        if reason is not None:
            asked = {"refit_queries": self.refit_queries, "refit_output": self.refit_output}
            asked["gain_fit"] = self.gain_fit is True
            return {name: reason for name, is_asked in asked.items() if is_asked}
        keyed = {"refit_queries": "init: key_norm leaves queries as they are"} if self.init == "key_norm" else {}
        return super().skipped(site) | (keyed if self.refit_queries else {})

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.groups is not None:
            heads = [head for group in self.groups for head in group]
            if not heads or not all(self.groups) or sorted(heads) != list(range(len(heads))):
                raise RecipeError(
                    f"{where}.groups: {[list(g) for g in self.groups]} must hold every KV head of the parent exactly "
                    "once and no empty group, for example [[0, 3], [1], [2]]."
                )
            if self.kv_heads is not None and self.kv_heads != len(self.groups):
                raise RecipeError(f"{where}: kv_heads {self.kv_heads} beside {len(self.groups)} groups. Leave one out.")
        elif self.kv_heads is None:
            raise RecipeError(f"{where}: needs `kv_heads` (a number, or a fraction such as 1/2) or `groups`.")
        else:
            self._fraction(where)

    def _fraction(self, where: str) -> Fraction | int:
        message = (
            f"{where}.kv_heads: {self.kv_heads!r} must be a whole number >= 1 or a fraction of the parent's heads "
            "between 0 and 1, such as 1/2."
        )
        if isinstance(self.kv_heads, int):
            if self.kv_heads < 1:
                raise RecipeError(message)
            return self.kv_heads
        try:
            fraction = Fraction(str(self.kv_heads))
        except (ValueError, ZeroDivisionError):
            raise RecipeError(message) from None
        if not 0 < fraction <= 1:
            raise RecipeError(message)
        return fraction

    def kv_heads_of(self, parent_kv_heads: int) -> int | None:
        """KV heads to keep of `parent_kv_heads`; None where the fraction does not give a whole number."""
        if self.groups is not None:
            return len(self.groups)
        wanted = self._fraction("kv_heads")
        if isinstance(wanted, int):
            return wanted
        kept = wanted * parent_kv_heads
        return int(kept) if kept.denominator == 1 else None


class Gqa(Layerwise, Method):
    """Pools KV heads, each layer on statistics of the already converted prefix (error compensation)."""

    Options = GqaStep
    axis = "project"
    step: GqaStep

    @property
    def needs_own_class(self) -> bool:
        """Whether groups may come out unequal, which no stock class says."""
        return self.step.is_uneven

    @classmethod
    def offers(cls, anatomy: Anatomy, context: int) -> list[list[dict[str, Any]]]:
        """Every smaller number of KV heads that divides the parent's."""
        heads = anatomy.sites[0].kv_heads
        return [[{"kv_heads": number}] for number in range(heads // 2, 0, -1) if heads % number == 0]

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """Fewer heads in each selected layer."""
        return tuple(
            replace(layer, project=planned_heads(self.step, where, site)) if self.step.selects(site.layer) else layer
            for site, layer in zip(anatomy.sites, layers, strict=True)
        )

    def convert_layer(self, visit: Visit, plan: LayerPlan) -> None:
        """Merge the heads of one layer, and refit its queries and output to the parent's."""
        copy, layer = visit.copy, visit.layer
        parent = copy.read(layer)
        moments = visit_moments(visit, parent)
        groups = self.choose_groups(parent, moments, plan.project.kv_heads)
        pooled = self.pool(parent, moments, groups)
        copy.write(layer, pooled)
        if pooled is not parent:
            keep_what_helps(visit, self._fits(visit.site, parent, groups))
            refine(visit, self.step.refine)

    def without_text(self, copy: WorkingCopy, plan: LayerPlan) -> None:
        """The data-free form."""
        assert isinstance(plan.project, Heads)
        copy.write(plan.layer, self.rewrite(copy.read(plan.layer), plan.project))

    def rewrite(self, parent: AttentionWeights, heads: Heads) -> AttentionWeights:
        """The data-free form: as if the input of the projections were white."""
        moments = Moments.of_weights(parent)
        return self.pool(parent, moments, self.choose_groups(parent, moments, heads.kv_heads))

    def finish(self, copy: WorkingCopy, windows: Windows) -> None:
        """With `gain_fit: global`, the factors of all converted layers together."""
        if self.step.gain_fit == "global":
            tune_gains(copy, copy.converted, windows)

    def choose_groups(self, weights: AttentionWeights, moments: Moments, kv_heads: int) -> Groups:
        """The source KV heads of each new one."""
        step = self.step
        if step.groups is not None:
            return step.groups
        if step.init in ("asym", "qcqa") and not step.equal_groups and weights.permutable:
            if step.init == "asym":
                return cluster_heads(weights, moments, kv_heads)
            return evolve_groups(weights, kv_heads, seed=self.seed)
        check_divides(weights.kv_heads, kv_heads)
        if step.grouping == "neighbour" or step.init == "key_norm" or not weights.permutable:
            return neighbour_groups(weights.kv_heads, kv_heads)
        return search_groups(rank1_cost(weights, moments), weights.kv_heads, kv_heads, seed=self.seed)

    def pool(self, weights: AttentionWeights, moments: Moments, groups: Groups) -> AttentionWeights:
        """One KV head per group, before refits."""
        step, queries = self.step, None
        if step.init == "key_norm" and not step.equal_groups and len(groups) < weights.kv_heads:
            queries = share_queries(moments, groups, weights.heads)
        renorm = step.renorm and step.init == "aligned"
        return pool_heads(weights, moments, groups, step.init, renorm=renorm, seed=self.seed, query_groups=queries)

    def _fits(self, site: AttentionSite, parent: AttentionWeights, groups: Groups) -> list[Fit]:
        """The refits that the recipe asks for, where `attend` computes what the site does.

        What is left out `GqaStep.skipped` names.
        """
        if why_nothing_is_fitted(site) is not None:
            return []
        fits: list[Fit] = []
        if self.step.refit_queries and why_queries_stay(site) is None and self.step.init != "key_norm":
            order = source_queries(parent, groups)

            def fit_queries(visit: Visit, student: AttentionWeights) -> AttentionWeights:
                found = QueryFit(parent, student, order)
                for a in visit.activations():
                    found.add(a.x_parent_BTD, a.x_student_BTD, a.mask_BT, stride_of(visit))
                return found.solve()

            fits.append(fit_queries)
        if self.step.gain_fit is True:
            fits.append(fit_gains)
        if self.step.refit_output:
            fits += output_fits()
        return fits


def why_nothing_is_fitted(site: AttentionSite) -> str | None:
    """Why no closed form is fitted to what the attention gives; None where they are."""
    for reason, is_there in (
        (f"queries, keys and values are clamped to {site.clip_qkv}", site.clip_qkv is not None),
        ("head outputs are gated", site.gated_output),
        ("values are normed", site.v_norm is not None),
    ):
        if is_there:
            return reason
    return None


def planned_heads(step: GqaStep, where: str, site: AttentionSite) -> Heads:
    """The heads that a layer keeps.

    Raises:
        PlanError: names the layer and the numbers that would do.
    """
    old = site.kv_heads
    if site.gated_output and (step.refine or step.gain_fit == "global"):
        name = "refine" if step.refine else "gain_fit"
        raise PlanError(
            f"layer {site.layer}: {where}.{name}: this attention gates its head outputs, and nothing is fitted beside "
            "a gate. Leave it out, or select other layers."
        )
    divisors = ", ".join(str(d) for d in range(1, old + 1) if old % d == 0)
    kv_heads = step.kv_heads_of(old)
    if kv_heads is None:
        raise PlanError(
            f"layer {site.layer}: {step.kv_heads} of {old} KV heads is no whole number. Set kv_heads to "
            f"one of {divisors}."
        )
    if kv_heads > old:
        raise PlanError(
            f"layer {site.layer}: the recipe asks for {kv_heads} KV heads, the parent has {old}. Use one of {divisors}."
        )
    if step.groups is not None:
        members = sum(len(group) for group in step.groups)
        if members != old:
            raise PlanError(f"layer {site.layer}: {where}.groups place {members} KV heads, the parent has {old}.")
        sizes = [len(group) * site.heads // old for group in step.groups]
        return Heads.of(site, kv_heads, tuple(sizes))
    if step.is_uneven:
        if step.init != "key_norm" and not is_permutable(site):
            raise PlanError(
                f"layer {site.layer}: {where}: {step.init} moves query heads between groups, and ALiBi or a gate of "
                "the output fixes their places. Set equal_groups: true."
            )
        if step.init == "key_norm" and site.heads != old:
            raise PlanError(
                f"layer {site.layer}: {where}: `key_norm` shares queries out one by one, and the KV heads here have "
                f"{site.heads // old} each already. Set equal_groups: true."
            )
        return Heads.of(site, kv_heads)
    if old % kv_heads:
        raise PlanError(
            f"layer {site.layer}: cannot group {old} KV heads into {kv_heads} ({old} % {kv_heads} != 0). "
            f"Use one of {divisors}, or write the groups out: groups: [[0, 1], [2], ...]."
        )
    return Heads.of(site, kv_heads)
