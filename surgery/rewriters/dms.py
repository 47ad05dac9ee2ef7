"""The `dms` step: a trained gate per KV head, or latent, drops tokens once they have left a window (DMS)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from ..anatomy import Anatomy
from ..runtime.layout import Gate, LayerPlan
from . import options_of
from .tokens.gates import GatedMethod, training_note
from .tokens.options import WindowStep, plan_retained


@dataclass(frozen=True, kw_only=True)
class DmsStep(WindowStep):
    """Drop tokens once they are `window` old, if their gate said so when they came (DMS).

    Conversion adds the gate and changes nothing else: the model is as it was until the gate is trained
    (`surgery train`).
    """

    rewriter: Literal["dms"] = "dms"
    gate: Literal["adapter", "borrowed"] = "adapter"
    """`adapter`: a linear map of the layer's input, zero at first. `borrowed`: the last channel of q and k, which
    training takes from attention first."""

    @property
    def gates(self) -> Literal["own", "borrowed"]:
        return "own" if self.gate == "adapter" else "borrowed"

    @classmethod
    def upgraded(cls, data: dict[str, Any]) -> tuple[dict[str, Any], str]:
        """Scores that nothing is trained for were gates of `dms` once; today they are the method `evict`."""
        gate = str(data.get("gate", ""))
        if not gate.startswith("score:"):
            return data, ""
        scorer = gate.removeprefix("score:")
        rest = {name: value for name, value in data.items() if name not in ("rewriter", "gate")}
        notice = f"`rewriter: dms` with `gate: {gate}` is spelled `rewriter: evict` with `scorer: {scorer}` now."
        made = {"rewriter": "evict", "scorer": scorer, **rest}
        if "ratio" in (never := options_of("evict")(scorer=scorer).unread()) and made.pop("ratio", None) is not None:
            notice += f" Its ratio is left out: {never['ratio']}"
        return made, notice


class Dms(GatedMethod):
    """The method of `DmsStep`."""

    Options = DmsStep
    step: DmsStep

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """A gate in each selected layer that keeps a cache."""
        step = self.step
        value = Gate(ratio=step.ratio, window=step.window, gate=step.gate, sinks=step.sinks, page=step.page)
        return plan_retained(step, value, anatomy, layers, where)

    def notes(self, plan: Any) -> list[str]:
        """What the bytes stand for."""
        return [training_note(self.step)]
