"""The registry of methods: weights in, weights out; one file per method, one line here.

A method is a class with the attributes and functions of `Rewriter`. Modules are imported when a recipe names them.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any, ClassVar, Literal, Protocol

Axis = Literal["project", "share", "retain", "store"]
AXES: tuple[Axis, ...] = ("project", "share", "retain", "store")
"""The axes in the order in which steps of a recipe work on them."""

REWRITERS: dict[str, str | type] = {
    "dmc": "surgery.rewriters.dmc:Dmc",
    "dms": "surgery.rewriters.dms:Dms",
    "evict": "surgery.rewriters.evict:Evicting",
    "gqa": "surgery.rewriters.gqa:Gqa",
    "identity": "surgery.rewriters.identity:Identity",
    "lowrank": "surgery.rewriters.lowrank:Lowrank",
    "mla": "surgery.rewriters.mla:Mla",
    "quantise": "surgery.rewriters.quantise:Quantise",
    "share": "surgery.rewriters.share:Share",
}
"""Name in recipes -> class, or `module:Class`."""


class Rewriter(Protocol):
    """One method. An instance carries out one step of a recipe."""

    Options: ClassVar[type]
    """A `recipe.Step`: the schema of the step, its checks and its help."""
    axis: ClassVar[Axis]
    """What the method decides. A layer is given one value per axis."""
    decides: ClassVar[bool]
    """Whether the step gives each layer that it selects a value of its axis."""

    def __init__(self, options: Any, seed: int = 0) -> None: ...

    @property
    def needs_own_class(self) -> bool:
        """Whether the result is a `Surgery<Parent>` even where the plan could be said in the parent's own class."""

    def plan(self, anatomy: Any, layers: tuple[Any, ...], where: str) -> tuple[Any, ...]:
        """`layers` (one `LayerPlan` for each attention) with the values that this step gives them.

        Args:
            anatomy: an `Anatomy`.
            where: the step, for messages.

        Raises:
            PlanError: a layer cannot be rewritten so; said before a weight is touched.
        """

    @classmethod
    def offers(cls, anatomy: Any, context: int) -> list[list[dict[str, Any]]]:
        """What the planner may choose from for a layer: options of a step, without `layers`.

        Each entry has alternatives, of which the first that a plan accepts is taken.

        Args:
            anatomy: an `Anatomy`.
            context: tokens of the sequences that the cache is planned for.
        """

    def conflict(self, other: Rewriter) -> str | None:
        """Why the step cannot stand in a recipe with `other`, on whatever layers; None where it can."""

    def notes(self, plan: Any) -> list[str]:
        """Lines for the printed plan."""

    def convert(self, copy: Any, layers: Sequence[Any], windows: Any) -> None:
        """Rewrite the weights of the working copy, in place.

        A method whose form without text needs nothing but a layer's own weights may also have
        `rewrite(weights, project) -> AttentionWeights`: checkpoints are then converted from disk to disk by layers. One
        with `goes_with(other) -> bool`, true of the step before it, leaves its layers to that step's `convert`.

        Args:
            copy: a `WorkingCopy`.
            layers: plans of the layers that the step changes.
            windows: calibration text; None asks for the form without it.
        """


class Method:
    """What most methods have in common; deriving from it is a convenience, not a condition."""

    def __init__(self, options: Any, seed: int = 0) -> None:
        self.step, self.seed = options, seed

    decides = True
    """Whether the step gives each layer that it selects a value of its axis; `identity` gives none."""

    @property
    def needs_own_class(self) -> bool:
        """No: the parent's class is good enough wherever it can say the plan."""
        return False

    @classmethod
    def offers(cls, anatomy: Any, context: int) -> list[list[dict[str, Any]]]:
        """Nothing: the planner leaves the method alone."""
        return []

    def conflict(self, other: Any) -> str | None:
        """None: values meet on layers, where the plan compares them."""
        return None

    def notes(self, plan: Any) -> list[str]:
        """Nothing to add."""
        return []


def rewriter_class(name: str) -> Any:
    """The class of the method that recipes call `name`."""
    found = REWRITERS[name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        found = getattr(import_module(module), attribute)
    return found


def options_of(name: str) -> Any:
    """The class of the options of the method that recipes call `name`."""
    return rewriter_class(name).Options


def rewriter_for(step: Any, seed: int = 0) -> Any:
    """The method that a recipe's step names, with its options."""
    return rewriter_class(step.rewriter)(step, seed)
