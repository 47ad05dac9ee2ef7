"""Which steps go together: the order of the axes, declared conflicts, and one value per axis and layer."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from ..console import spans
from ..errors import PlanError
from ..recipe import Recipe, Step, parse_layers
from ..rewriters import AXES
from ..runtime.layout import AttentionSite, Dense, LayerPlan

_QUESTION = {
    "project": "how K and V are made",
    "share": "whose cache is read",
    "retain": "which tokens stay",
    "store": "in which format they are held",
}


def check_steps(recipe: Recipe, methods: Sequence[Any]) -> None:
    """Refuse recipes whose steps cannot work on one copy of the model, whatever the model is.

    Args:
        methods: the `Rewriter` of each step.

    Raises:
        PlanError: names both steps and what to do.
    """
    for (i, earlier), (j, later) in itertools.combinations(enumerate(methods), 2):
        first, second = recipe.steps[i].rewriter, recipe.steps[j].rewriter
        if AXES.index(earlier.axis) > AXES.index(later.axis):
            raise PlanError(
                f"{recipe.name}: steps[{j}] is {second}, which decides {_QUESTION[later.axis]}, after {first}, which "
                f"decides {_QUESTION[earlier.axis]}. Steps work in the order {', '.join(AXES)}: put {second} before "
                f"{first}."
            )
        reason = later.conflict(earlier) or earlier.conflict(later)
        if reason:
            raise PlanError(f"{recipe.name}: steps[{i}] is {first}, steps[{j}] is {second}: {reason}")


def check_layers(step: Step, present: Sequence[int], where: str) -> None:
    """Refuse a step that names layers which have no attention.

    Raises:
        PlanError: names the first of them, and those that there are.
    """
    if step.layers is None:
        return
    absent = sorted(parse_layers(step.layers, where) - set(present))
    has = spans(sorted(present))
    if absent:
        raise PlanError(f"{where}.layers: the model has no attention layer {absent[0]}; it has {has}.")


def changed_axes(before: LayerPlan, after: LayerPlan) -> set[str]:
    """The axes on which two plans of one layer differ; a reader's `retain` is its owner's, and no value of its own."""
    found = set()
    if before.project != after.project:
        found.add("project")
    if (before.owner, before.value_owner) != (after.owner, after.value_owner):
        found.add("share")
    if before.retain != after.retain and after.owns_cache:
        found.add("retain")
    if before.store != after.store:
        found.add("store")
    return found


def check_one_value(
    decided: dict[tuple[int, str], str],
    before: Sequence[LayerPlan],
    after: Sequence[LayerPlan],
    method: Any,
    step: Step,
    where: str,
) -> None:
    """Refuse a step that decides of a layer what an earlier one has decided; else note what it decides in `decided`.

    A step that asks for the value that a layer has already is refused too: its other options would be ignored.

    Args:
        decided: (layer, axis) -> the step that decided it.
        method: the `Rewriter` of the step.

    Raises:
        PlanError: names the layer and both steps.
    """
    by_layer = method.decides and method.axis in ("project", "retain")  # share gives values to readers and owners alone
    for old, new in zip(before, after, strict=True):
        axes = changed_axes(old, new)
        if by_layer and step.selects(old.layer) and (old.layer, method.axis) in decided:
            axes.add(method.axis)
        for axis in sorted(axes, key=AXES.index):
            if (earlier := decided.get((old.layer, axis))) is not None:
                raise PlanError(
                    f"layer {old.layer}: {where} ({step.rewriter}) decides {_QUESTION[axis]}, and {earlier} did "
                    "already. A layer has one value per axis. Select other layers, or leave out one of the two steps."
                )
            decided[old.layer, axis] = f"{where} ({step.rewriter})"


def check_values(sites: Sequence[AttentionSite], layers: Sequence[LayerPlan], where: str) -> None:
    """Refuse values that an attention cannot run under, or that no cache layer holds together.

    Raises:
        PlanError: names the layer and the reason.
    """
    for site, layer in zip(sites, layers, strict=True):
        values = [value for value in (layer.project, layer.retain, layer.store) if value is not None]
        reasons = [reason for value in values if (reason := value.supports(site)) is not None]
        if not isinstance(layer.store, Dense):
            if layer.retain is not None:
                reasons += [r for r in [layer.retain.supports_store(layer.store)] if r is not None]
            if layer.window is not None:
                reasons.append(
                    f"it keeps its newest {layer.window} tokens in a cache layer of transformers, which holds plain "
                    f"numbers, not {_name(layer)}. Select the other layers."
                )
        if reasons:
            raise PlanError(f"layer {layer.layer}: {where}: {reasons[0]}")


def _name(layer: LayerPlan) -> str:
    return layer.store.label() or layer.store.kind
