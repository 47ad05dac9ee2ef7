"""The `dms` step: a trained gate per KV head, or latent, drops tokens once they have left a window (DMS), or settles
which heads drop all of them (DuoAttention)."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor
from typing import Any, Literal

from ..anatomy import Anatomy
from ..errors import PlanError
from ..runtime.layout import Gate, LayerPlan
from . import options_of
from .tokens.gates import GatedMethod, training_note
from .tokens.options import WindowStep, plan_retained


@dataclass(frozen=True, kw_only=True)
class DmsStep(WindowStep):
    """Drop tokens once they are `window` old, if their gate said so when they came (DMS).

    Conversion adds the gate and changes nothing else: the model is as it was until the gate is trained
    (`surgery train`).

    With `gate: head` (DuoAttention, arXiv:2410.10819) the gate is one number for each KV head, whatever its tokens are.
    While it is trained, the head makes alpha of what it makes of all tokens, and the rest of what it makes of `sinks`
    and `window`. At the end the heads of the largest alphas, of all layers, keep everything, as many as `ratio` leaves
    at the length trained on, and the others `sinks` and `window`. Different from the paper: the loss is that of the
    `uptrain` section (by default the KL on the logits of any text; the paper has the squared error of last hidden
    states, on answers to pass keys: train on text that asks for what came long before), and the mean alpha is weighed
    as far as it is above what the ratio leaves (`gate_budget`), so that no weight has to be found that ends there;
    `gate_l1` weighs it always, as the paper does. The ratio is that of slots, those of `sinks` and `window` among them.

    `gate: mlp` is what of Attention-Gate (arXiv:2410.12876) needs no cache of its own: a small network on hidden states
    decides. In the paper that network is an attention over all tokens of the context. Here it reads the layer's input
    of the token alone, in which the layers before have put what it has to do with earlier ones, so that nothing is kept
    beside the slots and decisions are the same in prompts and while decoding.
    """

    rewriter: Literal["dms"] = "dms"
    gate: Literal["adapter", "mlp", "borrowed", "head"] = "adapter"
    """`adapter`: a linear map of the layer's input, zero at first. `mlp`: two of them, with 64 numbers between.
    `borrowed`: the last channel of q and k, which training takes from attention first. `head`: one number for each KV
    head, which then keeps everything or drops everything that is old."""

    @property
    def gates(self) -> Literal["own", "borrowed", "heads"]:
        if self.gate == "head":
            return "heads"
        return "borrowed" if self.gate == "borrowed" else "own"

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
        planned = plan_retained(step, value, anatomy, layers, where)
        context = anatomy.max_positions
        if step.gate == "head" and context is not None:
            changed = [new for old, new in zip(layers, planned, strict=True) if new.owns_cache and new != old]
            heads = sum(layer.decisions for layer in changed)
            if value.heads_left(context, heads) < 1:
                most = context / (value.always_kept + (context - value.always_kept) / heads)
                raise PlanError(
                    f"{where}.ratio: {step.ratio:g} leaves none of {heads} KV heads room for all of the model's "
                    f"context of {context} tokens, beside {value.always_kept} of each in the others. Use a ratio of at "
                    f"most {floor(100 * most) / 100:g}, a smaller window, or evict, where all heads drop what is old."
                )
        return planned

    def notes(self, plan: Any) -> list[str]:
        """What the bytes stand for."""
        return [training_note(self.step)]
