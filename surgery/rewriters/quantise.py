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
from ..planning.schema import check_name
from ..recipe import Step, Text
from ..runtime.calibrated_forms import Turned
from ..runtime.codecs import CODECS
from ..runtime.layout import Codec, Latent, LayerPlan
from ..runtime.packed_forms import PerToken
from ..runtime.packing import fitted
from . import Method
from .stored import fits_of
from .stored.samples import Fitted, tables_of
from .stored.sensitivity import bits_by_layer, equal_bits

OFFERED_BITS = (1.5, 1.75, 2.0, 2.25, 2.5, 2.75, 3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)
"""Of one number, codes and scales: what the planner chooses from."""
APART = 1.0
"""Bits that keys may be given more than values: they cost most models more, and errors fall by four with each bit."""


@dataclass(frozen=True, kw_only=True)
class QuantiseStep(Step):
    """Hold K and V as packed codes, but for the first tokens of a sequence and its newest ones.

    Layers with a sliding window hold few tokens, and are left as they are; so are positions beside latents.
    """

    rewriter: Literal["quantise"] = "quantise"
    codec: str = "int4"
    """`int8`, `fp8`: one scale per token and head. `int4`: Hadamard rotation, then groups of channels of each token.
    `kivi`: keys by channel over groups of tokens. `gear`: what `kivi` loses beside it, in low rank. `turbo`: random
    rotation, levels that suit a Gaussian. `metric`: principal directions of calibration text, each with bits of its
    own. `kvquant`, `oscar`: published forms that read text."""
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
    think: float | None = None
    """Part of the channels of keys, between 0 and 1, that packed tokens are without (ThinK): those whose queries and
    keys are smallest in calibration text. With codecs that read no text; `fp16` rounds nothing else away. Text
    needed."""
    bits: Literal["equal", "sensitivity"] = "equal"
    """`sensitivity`: keys and values of the layers share `bits_per_number`, by what codes of each cost on the text."""
    bits_per_number: float | None = None
    """`sensitivity` only: bits of a packed number on average, scales counted; of channels that are left out as well."""

    @property
    def text(self) -> Text:
        reads = CODECS[self.codec].calibrated or self.bits == "sensitivity" or self.think is not None
        return "needed" if reads else "none"

    def unread(self) -> dict[str, str]:
        if self.bits == "sensitivity":
            reason = "bits: sensitivity chooses it, and asks for bits_per_number. Leave one of the two out."
            return dict.fromkeys(("k_bits", "v_bits"), reason)
        return {"bits_per_number": "is for bits: sensitivity. Otherwise give k_bits and v_bits."}

    def validate(self, where: str) -> None:
        super().validate(where)
        check_name(f"{where}.codec", "codec", self.codec, CODECS)
        kind = CODECS[self.codec]
        known = f"{kind.bits[0]:g} to {kind.bits[-1]:g}" if kind.any_bits else ", ".join(f"{b:g}" for b in kind.bits)
        for name in ("k_bits", "v_bits"):
            bits = getattr(self, name)
            if bits is not None and not kind.knows(bits):
                raise RecipeError(f"{where}.{name}: {self.codec} knows {known} bits, not {bits:g}.")
        if self.bits == "sensitivity":
            self._check_shared(where, len(kind.bits) == 1)
        for name, least in (("sinks", 0), ("recent", 0), ("group", 1)):
            if getattr(self, name) < least:
                raise RecipeError(f"{where}.{name}: {getattr(self, name)} must be at least {least}.")
        if self.think is not None and not 0 < self.think < 1:
            raise RecipeError(f"{where}.think: {self.think:g} is a part of the channels of keys, between 0 and 1.")
        if self.think is not None and kind.calibrated:
            able = ", ".join(name for name, kind in CODECS.items() if not kind.calibrated)
            raise RecipeError(
                f"{where}.think: {self.codec} learns from the text how to hold all channels of keys. Leave think out, "
                f"or use one of {able}."
            )

    def _check_shared(self, where: str, has_one: bool) -> None:
        if has_one:
            raise RecipeError(f"{where}.bits: {self.codec} has one number of bits. Use int4, kivi, turbo or metric.")
        if self.bits_per_number is None:
            raise RecipeError(f"{where}.bits: sensitivity asks for bits_per_number.")


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
        if CODECS[step.codec].reads_heads and latent:
            raise PlanError(
                f"layer {latent[0]}: {where}: {step.codec} reads keys and values of heads, and the layer caches a "
                "latent. Use the codec metric, kivi or int4."
            )
        if step.think is not None and latent:
            raise PlanError(
                f"layer {latent[0]}: {where}: think leaves channels of keys out, and the layer caches a latent, of "
                "which values are made as well. Leave think out, and ask for a smaller latent."
            )
        if step.v_bits is not None and all(layer in latent for layer in able if step.selects(layer)):
            raise PlanError(
                f"{where}.v_bits: the selected layers cache latents, from which keys and values are made, and their "
                "bits are k_bits. Leave v_bits out."
            )
        if step.bits == "sensitivity":
            self._check_measurable(layers, able, where)
        return tuple(
            replace(layer, store=self._value(layer)) if layer.layer in able and step.selects(layer.layer) else layer
            for layer in layers
        )

    @classmethod
    def offers(cls, anatomy: Anatomy, context: int) -> list[list[dict[str, Any]]]:
        """`int8`, `int4` (pages hold both), and `metric` at many bits, of values as many or `APART` fewer."""
        apart = [bits for bits in OFFERED_BITS if bits - APART in OFFERED_BITS]
        return [
            [{"codec": "int8"}],
            [{"codec": "int4"}],
            *([{"codec": "metric", "k_bits": bits}] for bits in OFFERED_BITS),
            *([{"codec": "metric", "k_bits": bits, "v_bits": bits - APART}] for bits in apart),
        ]

    def conflict(self, other: Any) -> str | None:
        """Bits are measured layer by layer, on caches that nobody else reads."""
        if self.step.bits == "sensitivity" and other.axis == "share":
            return (
                "quantise asks for bits: sensitivity, which is measured on layers that keep caches of their own. "
                "Beside share, write a quantise step for each number of bits, with its `layers`."
            )
        return None

    def _check_measurable(self, layers: Sequence[LayerPlan], able: Sequence[int], where: str) -> None:
        """Refuse budgets below the fewest bits, and layers whose codes are not those of heads."""
        step = self.step
        for layer in layers:
            if layer.layer not in able or not step.selects(layer.layer):
                continue
            if isinstance(layer.project, Latent):
                raise PlanError(
                    f"layer {layer.layer}: {where} asks for bits: sensitivity, which is measured on keys and values of "
                    "heads, and the layer caches a latent. Give k_bits."
                )
            if self._equal_bits(layer) is None:
                least = min(b for b in CODECS[step.codec].bits)
                raise PlanError(
                    f"layer {layer.layer}: {where}.bits_per_number: {step.bits_per_number:g} is less than {step.codec} "
                    f"takes with {least:g} bits and scales. Give more, or a larger `group`."
                )

    def _equal_bits(self, layer: LayerPlan) -> float | None:
        assert self.step.bits_per_number is not None
        return equal_bits(self._store(layer, 0), self.step.bits_per_number, layer.entry())

    def notes(self, plan: Any) -> list[str]:
        """What is packed how, and where groups became smaller."""
        step, lines = self.step, []
        layers = [layer for layer in plan.after if isinstance(layer.store, Codec) and step.selects(layer.layer)]
        packed = [
            (layer.entry()[0], form, width)
            for layer in layers
            if isinstance(layer.store, Codec)
            for form, width in zip(layer.store.forms(), layer.entry()[1:], strict=True)
            if form is not None and width
        ]
        numbers = sum(step.group * heads * width for heads, _, width in packed)
        bits = 8 * sum(form.bytes_of(step.group, heads, width) for heads, form, width in packed) / numbers
        paged = [layer.layer for layer in layers if layer.retain is not None]
        newest = f"{step.recent} to {step.recent + step.group - 1} tokens"
        if len(paged) == len(layers):
            newest = f"{step.recent} slots of each head"
        lines.append(
            f"quantise: {step.codec}, {bits:.2f} bits per number with scales; the first {step.sinks} and the newest "
            f"{newest} stay as they are"
        )
        if paged and len(paged) < len(layers):
            lines.append(f"quantise: of layers {spans(paged)}, whose slots leave, the newest {step.recent} slots do")
        if step.bits == "sensitivity":
            lines.append(f"quantise: text shares out {step.bits_per_number:g} bits per number; layers may get others")
        channels = {
            (layer.store.k_channels, layer.entry()[1])
            for layer in layers
            if isinstance(layer.store, Codec) and layer.store.k_channels is not None
        }
        for kept, width in sorted(channels):
            lines.append(f"quantise: think leaves {width - kept} of {width} channels out of each packed key")
        masked = [(f.inner, f.channels) for _, f, _ in packed if isinstance(f, Turned) and f.channels is not None]
        smaller = {
            (width, fitted(width, form.group))
            for form, width in [*masked, *((form, width) for _, form, width in packed)]
            if isinstance(form, PerToken) and fitted(width, form.group) < min(form.group, width)
        }
        for width, size in sorted(smaller):
            lines.append(f"quantise: {step.group} does not divide {width} channels, which share scales by {size}")
        left = [layer.layer for layer in plan.after if layer.owns_cache and layer.window and step.selects(layer.layer)]
        if left:
            lines.append(f"quantise: layers {spans(left)} keep their windows as they are")
        return lines

    def goes_with(self, other: Any) -> bool:
        """The plan has all that steps of equal bits say of a layer: one way through the layers serves them all."""
        return isinstance(other, Quantise) and {self.step.bits, other.step.bits} == {"equal"}

    def convert(self, copy: WorkingCopy, layers: Sequence[LayerPlan], windows: Windows | None) -> None:
        """The weights stay; a codec that is calibrated gets its tables, and streams may get bits of their own."""
        shared = self.step.bits == "sensitivity"
        plan_of = {plan.layer: plan for plan in layers}
        calibrated = [layer for layer, plan in plan_of.items() if _reads_text(plan)]
        if not calibrated and not shared:
            return
        assert windows is not None
        found: dict[int, Sequence[Fitted]] = {}
        for visit in copy.visits(windows, calibrated, kept=None if shared else {}):
            store = self.stored(plan_of[visit.layer])
            found[visit.layer] = fits_of(visit, store)
            copy.codecs[visit.layer] = tables_of(found[visit.layer], store)
        if copy.fits is not None:
            copy.fits |= found
        if shared:
            settled = [copy.settle(plan) for plan in layers]
            copy.bits_of |= bits_by_layer(copy, settled, windows, self.step.bits_per_number or 0.0, found)
        for layer, directions in found.items() if shared else ():
            settled_store = copy.settle(plan_of[layer]).store
            assert isinstance(settled_store, Codec)
            copy.codecs[layer] = tables_of(directions, settled_store)

    @staticmethod
    def stored(plan: LayerPlan) -> Codec:
        """The codec of a layer that has one, as far as there is something to hold."""
        assert isinstance(plan.store, Codec)
        return replace(plan.store, v_bits=None) if plan.entry()[2] == 0 else plan.store

    def _value(self, layer: LayerPlan) -> Codec:
        k_bits = CODECS[self.step.codec].default if self.step.k_bits is None else self.step.k_bits
        if self.step.bits == "sensitivity":
            k_bits = self._equal_bits(layer) or k_bits
        return self._store(layer, k_bits)

    def _store(self, layer: LayerPlan, k_bits: float) -> Codec:
        step = self.step
        v_bits: float = k_bits if step.v_bits is None else step.v_bits
        return Codec(
            codec=step.codec, k_bits=k_bits, v_bits=None if isinstance(layer.project, Latent) else v_bits,
            group=step.group, sinks=step.sinks, recent=step.recent, k_channels=self._channels(layer), dtype=layer.dtype,
        )  # fmt: skip

    def _channels(self, layer: LayerPlan) -> int | None:
        """Channels of a packed key: a multiple of about an eighth of a head, a power of two, so that codecs which mix
        channels, or give groups of them a scale, have whole ones."""
        width = layer.entry()[1]
        if self.step.think is None or not width:
            return None
        unit = max(2, 1 << max(0, (width // 8).bit_length() - 1))
        kept = round(width * (1 - self.step.think) / unit) * unit
        if not 0 < kept < width:
            raise PlanError(
                f"layer {layer.layer}: think: {self.step.think:g} of {width} channels leaves {min(kept, width)}, for "
                f"{unit} of them leave at a time. Give one between {unit / width:g} and {1 - unit / width:g}."
            )
        return kept


def _reads_text(plan: LayerPlan) -> bool:
    """Whether the codec of a layer has tables that text decides."""
    assert isinstance(plan.store, Codec)
    return CODECS[plan.store.codec].calibrated or plan.store.k_channels is not None
