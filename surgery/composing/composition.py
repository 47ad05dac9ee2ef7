"""What the planner found: a recipe with the reasons for it, the front, and how the race went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from ..checkpoints.files import read_json
from ..console import human_bytes, render, spans
from ..errors import CheckpointError
from ..plan import Plan
from ..recipe import Recipe
from ..rewriters import AXES
from .budget import Budget
from .choosing import Choice
from .costs import Costs
from .race import Race
from .settings import Setting, step_label


@dataclass(frozen=True, kw_only=True)
class Composition:
    """The best composition within a budget. `print` shows it, `to_yaml` is the recipe with comments."""

    budget: Budget
    plan: Plan
    """Of the recipe."""
    choice: Choice
    front: tuple[Choice, ...]
    """The best choices of other budgets, fewest bytes first."""
    singles: Mapping[str, Choice]
    """By axis: the best setting of that axis alone that all layers can take within the budget."""
    single_fronts: Mapping[str, tuple[Choice, ...]]
    """By axis: single settings for all layers, fewest bytes first."""
    costs: Costs
    layers: tuple[int, ...]
    race: Race | None = None

    @property
    def recipe(self) -> Recipe:
        """What `convert` takes."""
        return self.plan.recipe

    @property
    def is_recommended(self) -> bool:
        """Whether it has won its race."""
        return self.race is not None and self.race.is_won

    @property
    def verdict(self) -> str:
        """One sentence."""
        race = self.race
        if race is None:
            return "Not raced against recipes of a single axis: nothing is recommended."
        own, other = race.runners[0], race.best_other
        if other is None or race.lead is None:
            return (
                f"No recipe of a single axis fits the budget; the composition costs {own.kl.value:.3g} nats per token."
            )
        against = (
            f"{own.kl.value:.3g} nats per token against {other.kl.value:.3g} of `{other.name}`, "
            f"the best recipe of a single axis"
        )
        if not race.is_better:
            return f"Not recommended: {against}; the interval of the lead {_interval(race.lead)} does not exclude 0."
        recalled = "" if own.recall is None or other.recall is None else f"{own.recall:.0%} against {other.recall:.0%}"
        if race.recalls_less:
            return f"Not recommended: {against}, but it recalls less, {recalled} of the questions."
        beside = recalled and f"; of the questions it recalls {recalled}"
        return f"Recommended: {against} (lead {_interval(race.lead)}){beside}."

    def to_yaml(self) -> str:
        """The recipe, and as comments why each layer got what."""
        lines = [
            f"# Budget: {self.budget}, {human_bytes(self.budget.bytes)} in all.",
            f"# The cache takes {human_bytes(self.choice.bytes)}; the parent's {human_bytes(self._parent_bytes)}.",
            f"# Predicted {self.choice.cost:.3g} nats per token{self._judged}.",
            f"# {self.verdict}",
            "#",
            "# layer: what it has, KL that this costs alone, and with the next smaller setting that was not taken",
        ]
        for place, (layer, setting) in enumerate(zip(self.layers, self.choice.settings, strict=True)):
            lines.append(f"# {layer:>5}: {setting.label}, {self._reason(place, layer, setting)}")
        return "\n".join(lines) + "\n" + self.recipe.to_yaml()

    def __str__(self) -> str:
        return render(self.tables())

    def tables(self) -> list[Any]:
        """What `print` shows, as rich renderables."""
        chosen = Table(box=SIMPLE_HEAD, pad_edge=False)
        for name, side in (("layers", "left"), ("setting", "left"), ("bytes/token", "right"), ("KL alone", "right")):
            chosen.add_column(name, justify=side)  # type: ignore[arg-type]
        for setting, places in _grouped(self.choice.settings):
            held = sum(setting.bytes_of[p] for p in places) / self.budget.context
            cost = sum(self.costs.of(setting, self.layers[p]) for p in places)
            chosen.add_row(spans([self.layers[p] for p in places]), setting.label, human_bytes(held), f"{cost:.3g}")
        parts: list[Any] = [
            f"[bold]Budget: {self.budget}[/bold] (parent: {human_bytes(self._parent_bytes / self.budget.context)})",
            chosen,
            f"The composition: {human_bytes(self.choice.bytes / self.budget.context)} per token, predicted "
            f"{self.choice.cost:.3g} nats per token{self._judged}.",
            *(
                f"Left out: {method}, of no use at this budget in layers {spans(list(layers))}, where it was measured."
                for method, layers in self.costs.left_out.items()
            ),
        ]
        if self.race is not None:
            table = Table(box=SIMPLE_HEAD, pad_edge=False)
            for name, side in (
                ("race", "left"),
                ("bytes/token", "right"),
                ("KL, nats/token", "right"),
                ("same", "right"),
                ("recall", "right"),
            ):
                table.add_column(name, justify=side)  # type: ignore[arg-type]
            for runner in self.race.runners:
                size = human_bytes(runner.bytes / self.race.tokens)
                recall = "not asked" if runner.recall is None else f"{runner.recall:.0%}"
                table.add_row(runner.name, size, _interval(runner.kl), f"{runner.same.value:.1%}", recall)
            parts += [
                f"On {self.race.windows} windows of {self.race.tokens} tokens that nothing was made with:",
                table,
                *(
                    f"Not raced: {choice.settings[-1].label}, predicted to cost {choice.cost:.3g} nats per token."
                    for choice in self._unraced(self.race)
                ),
                self._recall,
            ]
        return [*parts, f"[bold]{self.verdict}[/bold]"]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        context = self.budget.context

        def of(choice: Choice) -> dict[str, Any]:
            return {
                "bytes_per_token": choice.bytes / context,
                "predicted_kl": choice.cost,
                "settings": [s.label for s in choice.settings],
            }

        return {
            "budget": asdict(self.budget),
            "recipe": self.recipe.to_dict(),
            "parent_bytes_per_token": self._parent_bytes / context,
            "choice": of(self.choice),
            "front": [of(choice) for choice in self.front],
            "singles": {axis: of(choice) for axis, choice in self.singles.items()},
            "single_fronts": {axis: [of(c) for c in front] for axis, front in self.single_fronts.items()},
            "left_out": {method: list(layers) for method, layers in self.costs.left_out.items()},
            "sensitivities": {key: dict(by) for key, by in self.costs.measured.items()},
            "race": None if self.race is None else asdict(self.race) | {"won": self.race.is_won},
            "verdict": self.verdict,
        }

    @property
    def _judged(self) -> str:
        return "" if self.race is None else f", {self.race.runners[0].judged:.3g} once all are converted"

    @property
    def _recall(self) -> str:
        """What was asked, or why nothing was."""
        assert self.race is not None
        recall = self.race.recall
        if isinstance(recall, str):
            return f"Recall is not compared: {recall}."
        return (
            f"Recall: {recall.questions} questions ({', '.join(recall.tasks)}) of {recall.length} tokens, of which the "
            f"parent answers {recall.parent:.0%}."
        )

    def _unraced(self, race: Race) -> list[Choice]:
        """Recipes of a single axis that cost far more than the best of them, as far as is known."""
        raced = {runner.name for runner in race.runners}
        return [choice for choice in self.singles.values() if choice.settings[-1].label not in raced]

    @property
    def _parent_bytes(self) -> int:
        return sum(layer.bytes_at(self.budget.context) for layer in self.plan.before)

    def _reason(self, place: int, layer: int, setting: Setting) -> str:
        cost, size = self.costs.of(setting, layer), setting.bytes_of[place]
        smaller = [s for s in {id(s): s for s in self._all()}.values() if s.bytes_of[place] < size]
        if not smaller:
            return f"{cost:.2g} nats"
        other = min(smaller, key=lambda s: self.costs.of(s, layer))
        return f"{cost:.2g} nats; {self.costs.of(other, layer):.2g} with {other.label}"

    def _all(self) -> list[Setting]:
        return [s for choice in (self.choice, *self.front) for s in choice.settings]


def saved_sensitivities(file: str | Path) -> dict[str, dict[int, float]]:
    """What `surgery plan --budget ... --json` wrote of each setting: KL by layer where that layer alone has it.

    Returns:
        By the setting in words.

    Raises:
        CheckpointError: the file is absent, or another one.
    """
    found = read_json(Path(file))
    try:
        return {
            " + ".join(map(step_label, json.loads(key))): {int(layer): kl for layer, kl in by.items()}
            for key, by in found["sensitivities"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(
            f"{file}: holds no costs of layers. Make it with: surgery plan MODEL --budget ... --json FILE"
        ) from None


def recipe_of(layers: Sequence[int], chosen: Sequence[Setting], name: str, description: str) -> Recipe:
    """The recipe that gives each layer its setting: one step for all layers that share it, in the order of the axes."""
    steps: dict[str, dict[str, tuple[dict[str, Any], list[int]]]] = {axis: {} for axis in AXES}
    for layer, setting in zip(layers, chosen, strict=True):
        for axis, step in zip(setting.axes, setting.steps, strict=True):
            steps[axis].setdefault(step_label(step), (step, []))[1].append(layer)
    found = [
        step | ({} if len(selected) == len(layers) else {"layers": spans(selected)})
        for axis in AXES
        for step, selected in steps[axis].values()
    ]
    return Recipe.load({"name": name, "description": description, "steps": found or [{"rewriter": "identity"}]})


def _grouped(chosen: Sequence[Setting]) -> list[tuple[Setting, list[int]]]:
    found: dict[str, tuple[Setting, list[int]]] = {}
    for place, setting in enumerate(chosen):
        found.setdefault(setting.label, (setting, []))[1].append(place)
    return list(found.values())


def _interval(estimate: Any) -> str:
    low, high = estimate.low, estimate.high
    return f"{estimate.value:.3g}" if low != low else f"{estimate.value:.3g} ({low:.3g} to {high:.3g})"
