"""The `evict` step: tokens leave by a score that nothing is trained for, once they have left a window."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..anatomy import Anatomy
from ..errors import RecipeError
from ..planning.schema import nearest
from ..runtime.layout import Evict, LayerPlan
from ..runtime.scorers import SCORERS
from .tokens.gates import GatedMethod
from .tokens.options import RetainStep, plan_retained


@dataclass(frozen=True, kw_only=True)
class EvictStep(RetainStep):
    """Drop tokens once they are `window` old, by a score that nothing is trained for.

    `ratio` is not read where the score is `window`: every token goes at its end (StreamingLLM).
    """

    rewriter: Literal["evict"] = "evict"
    scorer: str = "window"
    """`window`: every token goes. `key_norm`: long keys go, above a threshold from calibration text."""
    window: int = 256
    """Newest tokens that are never dropped."""
    windows: Literal["uniform", "sensitivity"] = "uniform"
    """`sensitivity`: `window` is the mean, and layers that miss older tokens more get a longer one, by what short
    windows cost the model on calibration text."""

    @property
    def text(self) -> Literal["none", "needed"]:
        return "needed" if self.windows == "sensitivity" or SCORERS[self.scorer].has_threshold else "none"

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.scorer not in SCORERS:
            near = nearest(self.scorer, SCORERS)
            raise RecipeError(f"{where}.scorer: no scorer {self.scorer!r}.{near} Known: {', '.join(SCORERS)}.")


class Evicting(GatedMethod):
    """The method of `EvictStep`."""

    Options = EvictStep
    step: EvictStep

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """A score in each selected layer that keeps a cache."""
        step = self.step
        value = Evict(ratio=step.ratio, window=step.window, scorer=step.scorer, sinks=step.sinks, page=step.page)
        return plan_retained(step, value, anatomy, layers, where)

    def notes(self, plan: Any) -> list[str]:
        """What decides."""
        return [f"evict: tokens go by {self.step.scorer}, for which nothing is trained"]
