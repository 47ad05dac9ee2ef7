"""What each setting costs in each layer: few are measured, the others follow from those.

The error of what a layer gives asks for no other layer, and KL is nearly proportional to the squared error: over the
settings of a method, from 1e-8 nats to 1e-2. So KL is measured for one setting of each method, and tells what errors of
the others cost. How much errors of one layer cost beside those of another depends on the layers far more than on the
method: of all methods but the first, KL is measured in a few layers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf, log
from typing import Any

from .settings import Setting

FEW = 4
"""Settings that differ in their bits, up to which the fewest and the most say what lies between."""
LEAST = 1e-9
"""Nats per token: what is below is noise."""

Felt = tuple[float, float | None]
"""KL in nats per token where a layer alone has a setting, and the squared error of what the layer gives; None where
that is not known."""
Found = tuple[float | None, float | None]
"""The same as it was measured: one of the two may be missing."""
Method = tuple[str | None, ...]
"""See `method_of`."""
Measure = Callable[[Setting, Collection[int], Collection[int]], dict[int, Found]]
"""(setting, layers, those of them whose KL is wanted) -> by layer. KL is also there where no error can be had."""


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
            self.of(setting, next(iter(layers), 0))
        except KeyError:
            return False
        return True

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


def without_bits(step: dict[str, Any]) -> dict[str, Any]:
    """A step whose bits are left open."""
    return {name: value for name, value in step.items() if name not in ("k_bits", "v_bits")}


def _but_bits(step: dict[str, Any]) -> dict[str, Any]:
    """What steps have in common that differ in their bits: also by how many keys have more than values."""
    return without_bits(step) | ({"apart": step["k_bits"] - step["v_bits"]} if "v_bits" in step else {})


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
