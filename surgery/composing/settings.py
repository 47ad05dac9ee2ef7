"""What the planner chooses from: forms that the cache of one layer may have, as steps of a recipe without layers."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from ..anatomy import Anatomy
from ..errors import PlanError, SurgeryError
from ..plan import Plan, plan
from ..planning.targets import Refusal, Subject, engines, ways
from ..recipe import Recipe
from ..rewriters import AXES, REWRITERS, rewriter_class
from ..runtime.layout import Latent

_log = logging.getLogger(__name__)

Steps = tuple[dict[str, Any], ...]
Offer = list[dict[str, Any]]
"""Steps of which the first that a plan accepts is taken."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One form, and what it takes in each layer."""

    steps: Steps
    """In the order of the axes; none for the layer as it is."""
    bytes_of: tuple[int, ...]
    """Of one sequence at the context of the budget, by place of the layer."""
    axes: tuple[str, ...]
    """Of the steps."""
    has_latents: bool = False
    """Whether caches hold latents."""

    def recipe(self, layers: str | None = None) -> dict[str, Any]:
        """As a recipe, on all layers or on some."""
        where = {} if layers is None else {"layers": layers}
        return {"name": self.label, "steps": [step | where for step in self.steps] or [{"rewriter": "identity"}]}

    @property
    def last_needs_no_text(self) -> bool:
        """Whether the last step leaves weights and tables alone, so that a layer without it is half of the work."""
        return Recipe.load(self.recipe()).steps[-1].text == "none"

    @property
    def label(self) -> str:
        """A few words for tables."""
        return " + ".join(map(step_label, self.steps)) or "as it is"


def step_label(step: dict[str, Any]) -> str:
    """`mla keep 0.5`, `metric 3 bits`, `metric 3/2 bits` of keys and values, `window 256`."""
    rest = {name: value for name, value in step.items() if name not in ("rewriter", "layers", "codec", "scorer")}
    v_bits = rest.pop("v_bits", None)
    words = [str(step.get("codec") or step.get("scorer") or step["rewriter"])]
    if words == list(rest)[:1]:  # the scorer `window` and its window
        words = []
    for name, value in rest.items():
        text = f"{value:g}" if isinstance(value, float) else str(value)
        text += "" if name != "k_bits" or v_bits is None else f"/{v_bits:g}"
        words.append(f"{text} bits" if name == "k_bits" else f"{name.replace('_', ' ')} {text}")
    return " ".join(words)


def settings_for(
    anatomy: Anatomy,
    context: int,
    *,
    axes: Collection[str] = AXES,
    allowed: Callable[[Plan], str | None] = lambda _: None,
) -> list[Setting]:
    """Every setting that can stand in all layers, the one that changes nothing first.

    Args:
        context: tokens at which bytes are counted.
        axes: those that may be changed.
        allowed: why a plan in which all layers have a setting is of no use; None where it is.

    Raises:
        PlanError: an unknown axis, or nothing is left.
    """
    unknown = sorted(set(axes) - set(AXES))
    if unknown:
        raise PlanError(f"axes: no axis {', '.join(unknown)}. Known: {', '.join(AXES)}.")
    offered: dict[str, list[Offer]] = {axis: [] for axis in AXES}
    for name in REWRITERS:
        method = rewriter_class(name)
        for offer in method.offers(anatomy, context) if method.axis in axes else ():
            offered[method.axis].append([{"rewriter": name} | options for options in offer])
    found, reasons = [], dict[str, str]()
    choices: list[list[Offer]] = [[[{}], *offered[axis]] for axis in AXES]
    for picked in itertools.product(*choices):
        for alternative in itertools.product(*picked):
            steps = tuple(step for step in alternative if step)
            try:
                made = plan(anatomy, {"steps": list(steps) or [{"rewriter": "identity"}]})
                reason = allowed(made) if steps else None
            except SurgeryError as error:
                reason = str(error)
            if reason is None:
                bytes_of = tuple(layer.bytes_at(context) for layer in made.after)
                used = tuple(axis for axis, step in zip(AXES, alternative, strict=True) if step)
                latents = any(isinstance(layer.project, Latent) for layer in made.after)
                found.append(Setting(steps=steps, axes=used, bytes_of=bytes_of, has_latents=latents))
                break
            reasons[" + ".join(map(step_label, steps))] = reason
    for label, reason in reasons.items():
        _log.debug("not offered: %s: %s", label, reason)
    parent = found[0]
    smaller = [s for s in found[1:] if sum(s.bytes_of) < sum(parent.bytes_of)]
    if not smaller:
        why = next(iter(reasons.values()), "no method offers a setting for it")
        raise PlanError(f"no form of the cache is left to choose from. For example: {why}")
    return [parent, *smaller]


def constraint(native_only: bool, engine: str | None) -> Callable[[Plan], str | None]:
    """What a plan must satisfy, for `settings_for` and for the composition itself.

    Raises:
        PlanError: no such engine.
    """
    if engine is not None and engine not in engines():
        raise PlanError(f"engine: no engine {engine!r}. Known: {', '.join(engines())}.")

    def check(made: Plan) -> str | None:
        if native_only and not made.native:
            return f"{made.recipe.name}: is not of the parent's own class"
        if engine is not None:
            found = ways(Subject.of_plan(made))[engine]
            if isinstance(found, Refusal):
                return str(found)
        return None

    return check
