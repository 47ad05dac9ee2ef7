"""What each setting costs in each layer: few are measured, the others follow from those.

KL is measured for one setting of each method. Of others the error of what the layer gives is measured, which asks for
no other layer, and the method's KL in that layer says what such errors cost: over a layer's settings KL is nearly
proportional to the squared error, from 1e-8 nats to 1e-2. Methods that lose to others in a few layers already are not
measured in the rest (`screening`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import exp, inf, log
from pathlib import Path
from typing import Any, Protocol

from ..console import progress, time_left
from .settings import Setting

_log = logging.getLogger(__name__)
FEW = 4
"""Settings that differ in their bits, up to which the fewest and the most say what lies between."""
LEAST = 1e-9
"""Nats per token: what is below is noise."""

Felt = tuple[float, float | None]
"""KL in nats per token where a layer alone has a setting, and the squared error of what the layer gives; None where
that is not known."""
Method = tuple[str | None, ...]
"""See `method_of`."""
Measure = Callable[[Setting, Mapping[int, float], Collection[int]], dict[int, Felt]]
"""(setting, KL over squared error of layers where that is known, layers) -> by layer."""


class Screening(Protocol):
    """Says which methods are not worth measuring in all layers; see `screening.Screen`."""

    def sample(self, method: Method, costs: Costs) -> list[int]:
        """Layers to measure it in first; none: all at once."""

    def is_beaten(self, method: Method, costs: Costs, found: Mapping[str, Mapping[int, float]]) -> bool:
        """Whether it loses in these."""


@dataclass(frozen=True)
class Costs:
    """KL in nats per token of settings in one layer alone.

    A step costs beside others what it costs alone, but for formats of latents: these are measured on one latent of each
    method, and what they add there is taken for all its latents.
    """

    measured: Mapping[str, Mapping[int, float]]
    """By `key_of` the steps, and by layer."""
    left_out: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Methods that were measured in some layers alone, and were of no use there."""

    def of(self, setting: Setting, layer: int) -> float:
        """What a setting costs in a layer.

        Raises:
            KeyError: one of its steps was not measured, nor any between which it lies.
        """
        found, before = 0.0, ""
        for step in setting.steps:
            found += self._added(step, before, layer)
            before = before or step["rewriter"]
        return found

    def knows(self, setting: Setting) -> bool:
        """Whether `of` has an answer."""
        layers = next(iter(self.measured.values()), {})
        try:
            return not setting.steps or self.of(setting, next(iter(layers), 0)) >= 0
        except KeyError:
            return False

    def _added(self, step: dict[str, Any], before: str, layer: int) -> float:
        """What a step adds beside a step of the method `before`."""
        for other in (before, "") if before else ("",):
            points = sorted(self._points(step, other, layer))
            exact = [cost for bits, cost in points if bits == step.get("k_bits")]
            if exact:
                return exact[0]
            if points:
                return _between(points, step["k_bits"])
        raise KeyError(key_of([step]))

    def _points(self, step: dict[str, Any], before: str, layer: int) -> Iterator[tuple[float | None, float]]:
        """(bits, what it adds) of the steps that differ from `step` in their bits at most."""
        for key, by in self.measured.items():
            *first, last = json.loads(key)
            if _but_bits(step) == _but_bits(last) and (first[0]["rewriter"] if first else "") == before:
                alone = self.measured[key_of(first)][layer] if first else 0.0
                yield last.get("k_bits"), max(by[layer] - alone, 0.0)


def key_of(steps: Sequence[dict[str, Any]]) -> str:
    """The name of steps in files."""
    return json.dumps(list(steps), sort_keys=True)


def to_measure(settings: Sequence[Setting]) -> list[Setting]:
    """Those that have to be measured: of each method the smallest first, and each before those that it adds a step to.

    Of settings that differ in their number of bits alone: the fewest, the most, and of many a middle one. Formats of
    latents are measured on the largest of each method.
    """
    singles = [s for s in settings if len(s.steps) == 1]
    methods = list(dict.fromkeys(method_of(s) for s in singles))
    found = []
    for method in methods:
        own = sorted(_spread([s for s in singles if method_of(s) == method]), key=lambda s: sum(s.bytes_of))
        for single in own:
            found.append(single)
            if single is own[-1] and single.axes == ("project",):
                pairs = [s for s in settings if len(s.steps) == 2 and s.steps[0] == single.steps[0]]
                found += _spread(
                    [s for s in pairs if s.axes[-1] == "store" and (s.has_latents or s.last_needs_no_text)]
                )
    return found


def method_of(setting: Setting) -> Method:
    """What settings have in common of which one stands for the others' errors: the method of their first step."""
    return tuple(setting.steps[0].get(name) for name in ("rewriter", "codec", "scorer"))


def _spread(settings: Sequence[Setting]) -> list[Setting]:
    groups: dict[str, list[Setting]] = {}
    for setting in settings:
        *first, last = setting.steps
        groups.setdefault(key_of([*first, _but_bits(last)]), []).append(setting)
    found = []
    for members in groups.values():
        members.sort(key=lambda s: s.steps[-1].get("k_bits", 0))
        middle = {len(members) // 2} if len(members) > FEW else set()
        found += [members[place] for place in sorted({0, len(members) - 1} | middle)]
    return found


def measure_costs(
    settings: Sequence[Setting],
    measure: Measure,
    layers: Sequence[int],
    kept: Path | None,
    told: Any,
    screen: Screening | None = None,
) -> Costs:
    """Measure step by step; what is measured is in the file `kept` before the next begins.

    Args:
        told: what the numbers depend on beside the step, as JSON; numbers of other circumstances are not used.
        screen: leaves methods out; None: everything is measured in all layers.
    """
    ledger = _Ledger.opened(
        kept, hashlib.sha256(json.dumps(["errors", told], sort_keys=True).encode()).hexdigest()[:16]
    )
    methods: dict[Method, list[Setting]] = {}
    for setting in to_measure(settings):
        methods.setdefault(method_of(setting), []).append(setting)
    missing = [s for own in methods.values() for s in own if not ledger.has(s, layers)]
    left_out = dict[str, tuple[int, ...]]()
    begun = time.monotonic()

    def take(own: Sequence[Setting], where: Sequence[int]) -> None:
        for setting in own:
            rest = [layer for layer in where if layer not in ledger.of(setting)]
            if rest:
                ledger.note(setting, measure(setting, _gains(ledger.of(own[0])), rest))

    with progress("measuring settings", len(missing), lines=False) as advance:
        for method, own in methods.items():
            todo = [s for s in own if s in missing]
            sampled = screen.sample(method, ledger.costs(layers)) if screen is not None and todo else []
            if sampled:
                alone = [s for s in own if len(s.steps) == 1]
                take(alone, sampled)
                found = {key_of(s.steps): {layer: ledger.of(s)[layer][0] for layer in sampled} for s in alone}
                assert screen is not None
                if screen.is_beaten(method, ledger.costs(layers), found):
                    word = next(part for part in reversed(method) if part)
                    left_out[word] = tuple(sampled)
                    _log.info(
                        "%s is left out: it is of no use at this budget in layers %s, where it was measured",
                        word, ", ".join(map(str, sampled)),
                    )  # fmt: skip
                    advance(len(todo))
                    continue
            for setting in todo:
                # All layers anew: what comes on top of a setting is made from what was fitted in all of them.
                ledger.note(setting, measure(setting, _gains(ledger.of(own[0])), layers))
                advance(1)
                number = missing.index(setting) + 1
                left = time_left((time.monotonic() - begun) / number * (len(missing) - number))
                _log.info(
                    "setting %d of %d, %s: %.3g nats over all layers, %s",
                    number, len(missing), setting.label, sum(kl for kl, _ in ledger.of(setting).values()), left,
                )  # fmt: skip
    return replace(ledger.costs(layers), left_out=left_out)


@dataclass(frozen=True)
class _Ledger:
    """What has been measured, and the file that it lies in."""

    kept: Path | None
    digest: str
    felt: dict[str, dict[int, Felt]]

    @staticmethod
    def opened(kept: Path | None, digest: str) -> _Ledger:
        """With what the file holds, where it was measured under the same circumstances."""
        felt: dict[str, dict[int, Felt]] = {}
        if kept is not None and kept.is_file():
            stored = json.loads(kept.read_text())
            if stored["digest"] == digest:
                felt = {key: {int(k): tuple(v) for k, v in by.items()} for key, by in stored["costs"].items()}
                _log.info("%d of the settings were measured before: %s", len(felt), kept)
        return _Ledger(kept, digest, felt)

    def of(self, setting: Setting) -> dict[int, Felt]:
        return self.felt.get(key_of(setting.steps), {})

    def has(self, setting: Setting, layers: Sequence[int]) -> bool:
        return len(self.of(setting)) == len(layers)

    def note(self, setting: Setting, found: Mapping[int, Felt]) -> None:
        self.felt[key_of(setting.steps)] = self.of(setting) | dict(found)
        if self.kept is not None:
            partial = self.kept.with_name(self.kept.name + ".part")
            partial.write_text(json.dumps({"digest": self.digest, "costs": self.felt}))
            partial.replace(self.kept)

    def costs(self, layers: Sequence[int]) -> Costs:
        """Of the settings that are measured in all layers."""
        whole = {key: by for key, by in self.felt.items() if len(by) == len(layers)}
        return Costs({key: {layer: kl for layer, (kl, _) in by.items()} for key, by in whole.items()})


def _gains(first: Mapping[int, Felt]) -> dict[int, float]:
    """KL over squared error by layer, where there is such a number, from what a method's first setting costs."""
    return {layer: kl / error for layer, (kl, error) in first.items() if error and 0 < kl < inf}


def _but_bits(step: dict[str, Any]) -> dict[str, Any]:
    """What steps have in common that differ in their bits: also by how many keys have more than values."""
    rest = {name: value for name, value in step.items() if name not in ("k_bits", "v_bits")}
    return rest | ({"apart": step["k_bits"] - step["v_bits"]} if "v_bits" in step else {})


def _between(points: Sequence[Any], at: float) -> float:
    """Errors fall by a factor with each bit: a line in the logarithm, prolonged at the ends."""
    if len(points) == 1:
        return points[0][1] * 4.0 ** (points[0][0] - at)
    place = next((i for i in range(1, len(points) - 1) if at < points[i][0]), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    if inf in (y0, y1):
        return inf
    low, high = log(max(y0, LEAST)), log(max(y1, LEAST))
    return exp(low + (high - low) * (at - x0) / (x1 - x0))
