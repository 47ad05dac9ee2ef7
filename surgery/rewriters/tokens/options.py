"""What the options and plans of `dms`, `dmc` and `evict` have in common."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from ...anatomy import Anatomy
from ...console import spans
from ...errors import PlanError, RecipeError
from ...recipe import Step, Text
from ...runtime.layout import LayerPlan, Retain
from ...runtime.modeling import GATED

PAGES = (16, 32, 64, 128, 256)
"""Slots per page that the kernels read."""


@dataclass(frozen=True, kw_only=True)
class RetainStep(Step):
    """Per token and KV head, or latent, it is decided who keeps a slot of the cache."""

    ratio: float = 4.0
    """Tokens seen per slot kept, at the length that is trained on or calibrated for; over all layers and heads
    together."""
    sinks: int = 4
    """First tokens of every sequence that always stay."""
    page: int = 16
    """Slots per page of the cache."""

    def validate(self, where: str) -> None:
        super().validate(where)
        if not 1 <= self.ratio < float("inf"):
            raise RecipeError(
                f"{where}.ratio: {self.ratio:g} must be at least 1: it counts tokens per slot. For a quarter of the "
                "cache write 4."
            )
        window: int | None = getattr(self, "window", None)
        if window is not None and window < 1:
            raise RecipeError(f"{where}.window: {window} must be at least 1: the query's own token is counted.")
        if self.sinks < 0:
            raise RecipeError(f"{where}.sinks: {self.sinks} must not be negative.")
        if self.page not in PAGES:
            raise RecipeError(
                f"{where}.page: {self.page} slots; use {', '.join(map(str, PAGES[:-1]))} or {PAGES[-1]}, which the "
                "kernels read."
            )


@dataclass(frozen=True, kw_only=True)
class WindowStep(RetainStep):
    """Tokens leave once they are out of a window."""

    window: int = 256
    """Newest tokens that are never dropped."""
    windows: Literal["uniform", "sensitivity"] = "uniform"
    """`sensitivity`: `window` is the mean, and layers that miss older tokens more get a longer one, by what short
    windows cost the model on calibration text."""

    @property
    def text(self) -> Text:
        return "needed" if self.windows == "sensitivity" else "none"


def plan_retained(
    step: RetainStep,
    value: Retain,
    anatomy: Anatomy,
    layers: tuple[LayerPlan, ...],
    where: str,
    *,
    leave_windows: bool = False,
) -> tuple[LayerPlan, ...]:
    """`value` for the layers that `step` selects; readers follow the slots of their owner, whether selected or not.

    Args:
        leave_windows: layers whose attention sees a window stay as they are, where there are others.

    Raises:
        PlanError: the ratio is out of reach in the model's context, or an attention cannot do without tokens.
    """
    context = anatomy.max_positions
    if value.is_fixed:
        value = replace(value, ratio=max(1.0, (context or 0) / max(1.0, value.slots_at(context or 0))))
    elif context is not None and value.drop_rate(context, value.ratio) > 1:
        most = context / value.always_kept
        kept = "" if value.averages else f"{value.window} newest tokens and "
        raise PlanError(
            f"{where}.ratio: {value.ratio:g} is out of reach: {kept}the first {value.protected} of the model's context "
            f"of {context} tokens always stay, so that {most:.1f} is the most. Use a smaller "
            f"{'' if value.averages else 'window or '}ratio."
        )
    if not any(step.selects(layer.layer) and layer.owns_cache for layer in layers):
        raise PlanError(
            f"{where}: none of layers {step.layers} keeps a cache of its own, and readers follow the slots of their "
            f"owners. Select these: {spans(sorted({layer.owner for layer in layers}))}."
        )
    free = [site.layer for site in anatomy.sites if value.supports(site) is None]
    leave_windows = leave_windows and bool(free)
    done: dict[int, LayerPlan] = {}
    given: list[int] = []
    for site, layer in zip(anatomy.sites, layers, strict=True):
        done[site.layer] = layer
        if not layer.owns_cache:
            done[site.layer] = replace(layer, retain=done[layer.owner].retain)
            continue
        if not step.selects(site.layer) or (leave_windows and site.window is not None):
            continue
        at = f"layer {site.layer}: {where}"
        reason = value.supports(site)
        if reason is not None:
            can = f" Layers that can: {spans(free)}." if free else ""
            raise PlanError(f"{at} asks for {step.rewriter}, but {reason}{can}")
        if layer.project.kind not in GATED:
            raise PlanError(
                f"{at} asks for {step.rewriter}, but layers of kind {layer.project.kind!r} keep all of their tokens: "
                "the kind is not registered in modeling.GATED."
            )
        reason = value.supports_project(layer.project)
        if reason is not None:
            raise PlanError(f"{at} asks for {step.rewriter}, but {reason}")
        if layer.value_owner is not None:
            raise PlanError(
                f"{at} asks for {step.rewriter}, but the layer reads V of layer {layer.value_owner}, whose slots are "
                "not those of its own K. Use another layout of share."
            )
        if site.layer in {other.value_owner for other in layers}:
            raise PlanError(f"{at} asks for {step.rewriter}, but other layers read its V beside keys of their own.")
        done[site.layer] = replace(layer, retain=value)
        given.append(layer.project.dims)
    if isinstance(step, WindowStep) and step.windows == "sensitivity" and len(set(given)) == len(given):
        raise PlanError(
            f"{where}.windows: sensitivity shares windows out between layers whose tokens are as large, and "
            + ("one layer is selected" if len(given) == 1 else "no two of those selected are alike")
            + ". Select more, or leave it out."
        )
    return tuple(done[layer.layer] for layer in layers)
