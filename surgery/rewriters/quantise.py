"""The `quantise` step: the cache holds packed codes of a few bits in the place of numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..anatomy import Anatomy
from ..calibration.text import Windows
from ..calibration.working_copy import WorkingCopy
from ..console import spans
from ..errors import PlanError, RecipeError
from ..planning.schema import nearest
from ..recipe import Step, Text
from ..runtime.codecs import CODECS, PerToken
from ..runtime.layout import Codec, Latent, LayerPlan
from ..runtime.packing import fitted
from . import Method
from .stored.directions import codec_tables

OFFERED_BITS = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
"""Of one number, codes and scales: what the planner chooses from."""


@dataclass(frozen=True, kw_only=True)
class QuantiseStep(Step):
    """Hold K and V as packed codes, but for the first tokens of a sequence and its newest ones.

    Layers with a sliding window hold few tokens, and are left as they are; so are positions beside latents.
    """

    rewriter: Literal["quantise"] = "quantise"
    codec: str = "int4"
    """`int8`, `fp8`: one scale per token and head. `int4`: Hadamard rotation, then groups of channels of each token.
    `kivi`: keys by channel over groups of tokens. `turbo`: random rotation, levels that suit a Gaussian. `metric`:
    principal directions of calibration text, each with bits of its own."""
    k_bits: float | None = None
    """Bits of one number of a key or a latent, scales left out (`metric`: any number, all that is packed); the codec's
    own by default."""
    v_bits: float | None = None
    """The same of values; as `k_bits` by default."""
    sinks: int = 4
    """First tokens of a sequence that stay as they are: they are outliers, and most attention goes there."""
    recent: int = 32
    """Newest tokens that stay as they are, at least. As many can be taken back (assisted decoding)."""
    group: int = 32
    """Numbers that share a scale, and tokens that are packed at a time."""

    @property
    def text(self) -> Text:
        return "needed" if CODECS[self.codec].calibrated else "none"

    def validate(self, where: str) -> None:
        super().validate(where)
        if self.codec not in CODECS:
            near = nearest(self.codec, CODECS)
            raise RecipeError(f"{where}.codec: no codec {self.codec!r}.{near} Known: {', '.join(CODECS)}.")
        kind = CODECS[self.codec]
        known = f"{kind.bits[0]:g} to {kind.bits[-1]:g}" if kind.calibrated else ", ".join(f"{b:g}" for b in kind.bits)
        for name in ("k_bits", "v_bits"):
            bits = getattr(self, name)
            if bits is not None and not kind.knows(bits):
                raise RecipeError(f"{where}.{name}: {self.codec} knows {known} bits, not {bits:g}.")
        for name, least in (("sinks", 0), ("recent", 0), ("group", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{where}.{name}: {getattr(self, name)} must be at least {least}.")


class Quantise(Method):
    """The method of `QuantiseStep`: weights stay as they are."""

    Options = QuantiseStep
    axis = "store"
    step: QuantiseStep

    def plan(self, anatomy: Anatomy, layers: tuple[LayerPlan, ...], where: str) -> tuple[LayerPlan, ...]:
        """Codes in each selected layer that keeps a cache without a window.

        Raises:
            PlanError: no selected layer does, or one that is named has a window or tokens that leave.
        """
        step = self.step
        able = [layer.layer for layer in layers if layer.owns_cache and layer.window is None]
        for layer in layers if step.layers is not None else ():
            if step.selects(layer.layer) and layer.owns_cache and layer.window is not None:
                can = f" Layers that can: {spans(able)}." if able else ""
                raise PlanError(
                    f"layer {layer.layer}: {where}.layers names it, but it keeps its newest {layer.window} tokens in a "
                    f"sliding cache, which is not packed.{can}"
                )
        if not any(step.selects(layer) for layer in able):
            raise PlanError(
                f"{where}: none of the selected layers keeps a cache of its own without a window: readers read what "
                f"their owners have packed, and sliding caches hold few tokens."
                + (f" Select these: {spans(able)}." if able else "")
            )
        latent = [layer.layer for layer in layers if isinstance(layer.project, Latent) and step.selects(layer.layer)]
        if CODECS[step.codec].calibrated and latent:
            raise PlanError(
                f"layer {latent[0]}: {where}: {step.codec} reads keys and values of heads, and the layer caches a "
                "latent. Use the codec int4 or kivi."
            )
        return tuple(
            replace(layer, store=self._value(layer)) if layer.layer in able and step.selects(layer.layer) else layer
            for layer in layers
        )

    @classmethod
    def offers(cls, anatomy: Anatomy, context: int) -> list[list[dict[str, Any]]]:
        """`int8`, and `metric` at many numbers of bits; `kivi` for latents, which `metric` refuses."""
        offers: list[list[dict[str, Any]]] = [[{"codec": "int8"}]]
        for bits in OFFERED_BITS:
            latent = [{"codec": "kivi", "k_bits": bits}] if bits in (2, 3, 4) else []
            offers.append([{"codec": "metric", "k_bits": bits}, *latent])
        return offers

    def notes(self, plan: Any) -> list[str]:
        """What is packed how, and where groups became smaller."""
        step, lines = self.step, []
        layers = [layer for layer in plan.after if isinstance(layer.store, Codec) and step.selects(layer.layer)]
        packed = [
            (layer.entry()[0], form, width)
            for layer in layers
            for form, width in zip(layer.store.forms(), layer.entry()[1:], strict=True)
            if form is not None and width
        ]
        numbers = sum(step.group * heads * width for heads, _, width in packed)
        bits = 8 * sum(form.bytes_of(step.group, heads, width) for heads, form, width in packed) / numbers
        lines.append(
            f"quantise: {step.codec}, {bits:.2f} bits per number with scales; the first {step.sinks} and the newest "
            f"{step.recent} to {step.recent + step.group - 1} tokens stay as they are"
        )
        smaller = {
            (width, fitted(width, form.group))
            for _, form, width in packed
            if isinstance(form, PerToken) and fitted(width, form.group) < min(form.group, width)
        }
        for width, size in sorted(smaller):
            lines.append(f"quantise: {step.group} does not divide {width} channels, which share scales by {size}")
        left = [layer.layer for layer in plan.after if layer.owns_cache and layer.window and step.selects(layer.layer)]
        if left:
            lines.append(f"quantise: layers {spans(left)} keep their windows as they are")
        return lines

    def convert(self, copy: WorkingCopy, layers: Sequence[LayerPlan], windows: Windows | None) -> None:
        """The weights stay; a codec that is calibrated gets its tables."""
        if not CODECS[self.step.codec].calibrated:
            return
        assert windows is not None
        plan_of = {plan.layer: plan for plan in layers}
        for visit in copy.visits(windows, plan_of, kept={}):
            store = plan_of[visit.layer].store
            assert isinstance(store, Codec)
            if plan_of[visit.layer].entry()[2] == 0:
                store = replace(store, v_bits=None)
            copy.codecs[visit.layer] = codec_tables(visit, store)

    def _value(self, layer: LayerPlan) -> Codec:
        step = self.step
        k_bits = CODECS[step.codec].default if step.k_bits is None else step.k_bits
        v_bits: float = k_bits if step.v_bits is None else step.v_bits
        return Codec(
            codec=step.codec, k_bits=k_bits, v_bits=None if isinstance(layer.project, Latent) else v_bits,
            group=step.group, sinks=step.sinks, recent=step.recent, dtype=layer.dtype,
        )  # fmt: skip
