"""From settings and their costs to a choice for each layer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..console import human_bytes
from ..errors import PlanError
from .allocation import allocate
from .budget import Budget
from .costs import Costs
from .settings import Setting

STEPS = 24
"""Budgets on the way from the least to the parent's bytes at which the front is known."""


@dataclass(frozen=True)
class Choice:
    """One setting for each layer."""

    settings: tuple[Setting, ...]
    cost: float
    """KL in nats per token that is predicted: the sum of what each layer costs alone."""
    bytes: int
    """Of one sequence at the context of the budget."""


@dataclass(frozen=True)
class Chooser:
    """Chooses among settings; `layers` names the layers by their places.

    Args:
        settings: the first changes nothing.
        kept: layers that stay as they are.
    """

    settings: Sequence[Setting]
    costs: Costs
    layers: Sequence[int]
    kept: Collection[int] = ()

    def best(self, budget: int) -> Choice | None:
        """The choice of least cost within so many bytes; None where none fits."""
        offered = [self._of(place) for place in range(len(self.layers))]
        found = allocate(
            [[self.costs.of(s, layer) for s in some] for layer, some in zip(self.layers, offered, strict=True)],
            [[s.bytes_of[place] for s in some] for place, some in enumerate(offered)],
            budget,
        )
        return None if found is None else self._choice([some[at] for some, at in zip(offered, found, strict=True)])

    def best_uniform(self, budget: int, axes: Collection[str] | None = None) -> Choice | None:
        """The best single setting that all layers take; those of one axis alone, where `axes` says so."""
        places = range(len(self.layers))
        found = [
            self._choice([setting if setting in self._of(place) else self.settings[0] for place in places])
            for setting in self.settings[1:]
            if axes is None or set(setting.axes) == set(axes)
        ]
        return min((c for c in found if c.bytes <= budget), key=lambda c: c.cost, default=None)

    def front(self, axes: Collection[str] | None = None) -> list[Choice]:
        """Choices from the least bytes to nearly the parent's, each better than all with fewer.

        Args:
            axes: None: any setting in any layer; else one setting of these axes in all layers.
        """
        parent = self._choice([self.settings[0]] * len(self.layers)).bytes
        least = least_bytes(self.settings, self.layers, self.kept)
        found: list[Choice] = []
        for step in range(STEPS):
            budget = int(least * (parent / least) ** (step / STEPS))
            choice = self.best(budget) if axes is None else self.best_uniform(budget, axes)
            if choice is not None and (not found or choice.cost < found[-1].cost):
                found.append(choice)
        return found

    def _of(self, place: int) -> Sequence[Setting]:
        """The settings that change the layer at a place: formats leave sliding windows as they are."""
        plain = self.settings[0]
        if self.layers[place] in self.kept:
            return [plain]
        return [plain, *(s for s in self.settings[1:] if s.bytes_of[place] != plain.bytes_of[place])]

    def _choice(self, chosen: Sequence[Setting]) -> Choice:
        cost = sum(self.costs.of(s, layer) for s, layer in zip(chosen, self.layers, strict=True))
        return Choice(tuple(chosen), cost, sum(s.bytes_of[place] for place, s in enumerate(chosen)))


def least_bytes(settings: Sequence[Setting], layers: Sequence[int], kept: Collection[int]) -> int:
    """The fewest bytes that any choice has."""
    return sum(
        settings[0].bytes_of[place] if layer in kept else min(s.bytes_of[place] for s in settings)
        for place, layer in enumerate(layers)
    )


def check_reach(settings: Sequence[Setting], budget: Budget, layers: Sequence[int], kept: Collection[int]) -> None:
    """Refuse budgets that nothing fits.

    Raises:
        PlanError: says the least, and the setting that has it.
    """
    least = least_bytes(settings, layers, kept)
    if least <= budget.bytes:
        return
    smallest = min(settings, key=lambda s: sum(s.bytes_of))
    beside = f", with layers {', '.join(map(str, sorted(kept)))} as they are" if kept else ""
    raise PlanError(
        f"budget: {budget} is below what any composition reaches: {human_bytes(least / budget.context)} per token, by "
        f"`{smallest.label}`{beside}. Raise the budget, allow more axes, or name a longer context: first and newest "
        "tokens are kept in full."
    )
