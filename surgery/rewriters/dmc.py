"""The `dmc` step: a trained gate per KV head, or latent, averages tokens into the slot before them (DMC)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..anatomy import Anatomy
from ..runtime.layout import LayerPlan, Pool
from .tokens.gates import GatedMethod, training_note
from .tokens.options import RetainStep, plan_retained


@dataclass(frozen=True, kw_only=True)
class DmcStep(RetainStep):
    """Average tokens into the slot before them where their gate says so (DMC).

    Conversion adds the gate and changes nothing else: the model is as it was until the gate is trained
    (`surgery train`).
    """

    rewriter: Literal["dmc"] = "dmc"
    gate: Literal["adapter", "borrowed"] = "adapter"
    """`adapter`: a linear map of the layer's input, zero at first. `borrowed`: the last channel of q and k, which
    training takes from attention first."""
    window: int | None = 12
    """Newest tokens of a run that its slot is the mean of; null: all."""

    @property
    def gates(self) -> Literal["own", "borrowed"]:
        return "own" if self.gate == "adapter" else "borrowed"


class Dmc(GatedMethod):
    """The method of `DmcStep`."""

    Options = DmcStep
    step: DmcStep

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """A gate in each selected layer that keeps a cache."""
        step = self.step
        value = Pool(ratio=step.ratio, window=step.window, gate=step.gate, sinks=step.sinks, page=step.page)
        return plan_retained(step, value, anatomy, layers, where)

    def notes(self, plan: Any) -> list[str]:
        """What the bytes stand for."""
        return [training_note(self.step)]
