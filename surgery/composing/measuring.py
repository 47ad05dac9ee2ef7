"""Measures what settings cost, method by method, and keeps it; methods that a few layers rule out are left out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import exp, inf, log
from pathlib import Path
from typing import Any

from torch import nn

from ..console import progress, spans, time_left
from .costs import Costs, Felt, Found, Measure, Method, key_of, method_of, to_measure
from .screening import FROM, Screen, spread
from .settings import Setting

_log = logging.getLogger(__name__)

GAUGED = 6
"""Layers, spread over the depth, in which the KL of a method is measured where another method's is known in all."""
LOOKED_AT = 1024
"""Numbers of each parameter by which models are told apart."""


def measure_costs(
    settings: Sequence[Setting],
    measure: Measure,
    layers: Sequence[int],
    kept: Path | None,
    told: Any,
    screen: Screen | None = None,
) -> Costs:
    """Measure step by step; what is measured is in the file `kept` before the next begins.

    Args:
        told: what the numbers depend on beside the step, as JSON; numbers of other circumstances are not used.
        screen: leaves methods out; None: everything is measured in all layers.
    """
    digest = hashlib.sha256(json.dumps(["gauged", told], sort_keys=True).encode()).hexdigest()[:16]
    ledger = _Ledger.opened(kept, digest, layers)
    methods: dict[Method, list[Setting]] = {}
    for setting in to_measure(settings):
        methods.setdefault(method_of(setting), []).append(setting)
    missing = [s for own in methods.values() for s in own if not ledger.has_all(s)]
    left_out = dict[str, tuple[int, ...]]()
    begun = time.monotonic()
    with progress("measuring settings", len(missing), lines=False) as advance:
        for method, own in methods.items():
            todo = [s for s in own if s in missing]
            ruled_out = _ruled_out(method, own, measure, ledger, screen) if todo and screen is not None else ()
            if ruled_out:
                word = next(part for part in reversed(method) if part)
                left_out[word] = ruled_out
                _log.info("%s is left out: of no use at this budget in layers %s", word, spans(list(ruled_out)))
                advance(len(todo))
                continue
            for setting in todo:
                # All layers anew: what comes on top of a setting is made from what was fitted in all of them.
                ledger.note(setting, _felt(setting, own[0], measure, ledger, layers))
                advance(1)
                number = missing.index(setting) + 1
                left = time_left((time.monotonic() - begun) / number * (len(missing) - number))
                _log.info(
                    "setting %d of %d, %s: %.3g nats over all layers, %s",
                    number, len(missing), setting.label, sum(kl for kl, _ in ledger.of(setting).values()), left,
                )  # fmt: skip
    return replace(ledger.costs(), left_out=left_out)


def weights_digest(model: nn.Module) -> str:
    """Names the parameters of a model by samples throughout each: one that was trained further has another name."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        numbers = parameter.detach().flatten()
        some = numbers[:: max(1, len(numbers) // LOOKED_AT) | 1]  # odd: not always from the same columns
        found.update(f"{name} {tuple(parameter.shape)}".encode() + some.float().cpu().numpy().tobytes())
    return found.hexdigest()


def _ruled_out(
    method: Method, own: Sequence[Setting], measure: Measure, ledger: _Ledger, screen: Screen
) -> tuple[int, ...]:
    """Layers in which a method was measured to show that it is of no use; none where it may be."""
    sampled = screen.sample(method, ledger.costs())
    alone = [s for s in own if len(s.steps) == 1] if sampled else []
    for setting in alone:
        rest = [layer for layer in sampled if layer not in ledger.of(setting)]
        if rest:
            ledger.note(setting, _felt(setting, own[0], measure, ledger, rest))
    found = {key_of(s.steps): {layer: ledger.of(s)[layer][0] for layer in sampled} for s in alone}
    return tuple(sampled) if found and screen.is_beaten(method, ledger.costs(), found) else ()


@dataclass(frozen=True)
class _Ledger:
    """What has been measured, and the file that it lies in."""

    kept: Path | None
    digest: str
    layers: Sequence[int]
    felt: dict[str, dict[int, Felt]]

    @staticmethod
    def opened(kept: Path | None, digest: str, layers: Sequence[int]) -> _Ledger:
        """With what the file holds, where it was measured under the same circumstances."""
        felt: dict[str, dict[int, Felt]] = {}
        if kept is not None and kept.is_file():
            stored = json.loads(kept.read_text())
            if stored["digest"] == digest:
                felt = {key: {int(k): tuple(v) for k, v in by.items()} for key, by in stored["costs"].items()}
                _log.info("%d of the settings were measured before: %s", len(felt), kept)
        return _Ledger(kept, digest, layers, felt)

    def of(self, setting: Setting) -> dict[int, Felt]:
        return self.felt.get(key_of(setting.steps), {})

    def has_all(self, setting: Setting) -> bool:
        return len(self.of(setting)) == len(self.layers)

    def first(self) -> dict[int, Felt]:
        """What was measured first in all layers."""
        return next((by for by in self.felt.values() if len(by) == len(self.layers)), {})

    def note(self, setting: Setting, found: Mapping[int, Felt]) -> None:
        self.felt[key_of(setting.steps)] = self.of(setting) | dict(found)
        if self.kept is not None:
            partial = self.kept.with_name(self.kept.name + ".part")
            partial.write_text(json.dumps({"digest": self.digest, "costs": self.felt}))
            partial.replace(self.kept)

    def costs(self) -> Costs:
        """Of the settings that are measured in all layers."""
        whole = {key: by for key, by in self.felt.items() if len(by) == len(self.layers)}
        return Costs({key: {layer: kl for layer, (kl, _) in by.items()} for key, by in whole.items()})


def _felt(
    setting: Setting, first: Setting, measure: Measure, ledger: _Ledger, layers: Sequence[int]
) -> dict[int, Felt]:
    """Measure a setting in some layers; `first` is the first setting of its method."""
    # Of a first setting that was measured in a few layers alone, all layers are to be told by more of them.
    gains = _gains(ledger.of(first)) if ledger.has_all(first) or len(layers) < len(ledger.layers) else {}
    profile = {} if gains or len(layers) < FROM else _gains(ledger.first())
    known = gains or profile
    # The profile has layers that its own setting changes; others, such as those with windows, may tell nothing.
    asked = spread(list(profile), GAUGED) if len(profile) >= FROM else list(profile)
    found = measure(setting, layers, [*asked, *(layer for layer in layers if layer not in known)])
    if profile:
        times = _times(profile, {layer: found[layer] for layer in asked})
        known = {layer: times * gain for layer, gain in profile.items()}
    felt = dict[int, Felt]()
    for layer, (kl, error) in found.items():
        if kl is None:
            assert error is not None
            kl = known[layer] * error
        felt[layer] = kl, error
    return felt


def _gains(first: Mapping[int, Felt]) -> dict[int, float]:
    """KL over squared error by layer, where there is such a number, from what a method's first setting costs."""
    return {layer: kl / error for layer, (kl, error) in first.items() if error and 0 < kl < inf}


def _times(profile: Mapping[int, float], found: Mapping[int, Found]) -> float:
    """What errors of a method cost over what `profile` says: the geometric mean over the layers that tell."""
    logs = [
        log(kl / (profile[layer] * error))
        for layer, (kl, error) in found.items()
        if layer in profile and kl and error and kl < inf
    ]
    return exp(sum(logs) / len(logs)) if logs else 1.0
