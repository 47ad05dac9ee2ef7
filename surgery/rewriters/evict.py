"""The `evict` step: tokens leave by a score that nothing is trained for, once they have left a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..anatomy import Anatomy
from ..errors import RecipeError
from ..planning.schema import nearest
from ..recipe import Text
from ..runtime.layout import Evict, LayerPlan
from ..runtime.scorers import SCORERS
from .tokens.gates import GatedMethod
from .tokens.options import WindowStep, plan_retained


@dataclass(frozen=True, kw_only=True)
class EvictStep(WindowStep):
    """Drop tokens once they are `window` old, by a score that nothing is trained for.

    `ratio` is not read where the score is `window`: every token goes at its end (StreamingLLM).
    """

    rewriter: Literal["evict"] = "evict"
    scorer: str = "window"
    """`window`: every token goes. `key_norm`: long keys go, above a threshold from calibration text."""

    @property
    def text(self) -> Text:
        return "needed" if SCORERS[self.scorer].has_threshold else super().text

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.scorer not in SCORERS:
            near = nearest(self.scorer, SCORERS)
            raise RecipeError(f"{where}.scorer: no scorer {self.scorer!r}.{near} Known: {', '.join(SCORERS)}.")


class Evicting(GatedMethod):
    """The method of `EvictStep`."""

    Options = EvictStep
    step: EvictStep

    @classmethod
    def offers(cls, anatomy: Anatomy, context: int) -> list[list[dict[str, Any]]]:
        """Windows of some parts of the context."""
        windows = {context // part // 16 * 16 for part in (4, 8, 16)}
        return [[{"scorer": "window", "window": window}] for window in sorted(windows - {0}, reverse=True)]

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """A score in each selected layer that keeps a cache."""
        step = self.step
        value = Evict(ratio=step.ratio, window=step.window, scorer=step.scorer, sinks=step.sinks, page=step.page)
        return plan_retained(step, value, anatomy, layers, where)

    def notes(self, plan: Any) -> list[str]:
        """What decides."""
        return [f"evict: tokens go by {self.step.scorer}, for which nothing is trained"]
