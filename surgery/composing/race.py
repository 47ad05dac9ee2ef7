"""The winner against the best recipe of a single axis, on text that neither has seen, decoded through the cache."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..convert import convert
from ..measure.memory import cache_bytes
from ..measure.scoring import decode, divergence
from ..measure.statistics import Estimate, bootstrap
from ..recipe import Recipe
from .sensitivity import Bench

_log = logging.getLogger(__name__)

DECODED = 64
"""Tokens at the end of each window that are decoded one by one."""


@dataclass(frozen=True, kw_only=True)
class Runner:
    """One recipe of the race, converted and measured."""

    name: str
    bytes: int
    """Measured, of one window."""
    kl: Estimate
    """KL(parent || model) in nats per token."""
    same: Estimate
    """Share of tokens at which both find the same next token likeliest."""
    judged: float
    """KL on the text that settings were measured on, to be compared with what these measurements predict."""


@dataclass(frozen=True, kw_only=True)
class Race:
    """What came of it."""

    runners: tuple[Runner, ...]
    """The composition first."""
    tokens: int
    """Of one window."""
    windows: int
    lead: Estimate | None
    """KL of the best other recipe less that of the composition, on the same tokens; None without another."""

    @property
    def is_won(self) -> bool:
        """Whether the composition is better than every other, and the interval of the difference says so."""
        return self.lead is None or self.lead.low > 0


def race(
    parent: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    fit: Windows,
    held_out: Windows,
    *,
    bench: Bench,
    dtype: torch.dtype,
    seed: int,
) -> Race:
    """Convert and measure.

    Args:
        parent: in float32; its answers are aimed at.
        recipes: by name, the composition first.
        fit: text to calibrate on.
        held_out: text to compare on.
        bench: where settings were measured.
        dtype: of the real parent, in which bytes are counted.
    """
    wanted = _log_probabilities(parent, held_out)
    found, sums = [], []
    for name, recipe in recipes.items():
        child = convert(parent, recipe, calibration=fit, seed=seed).eval()
        kl, same, counted = _compared(wanted, _log_probabilities(child, held_out), held_out)
        judged = bench.kl({layer: child.get_submodule(module) for layer, module in bench.names.items()})
        runner = Runner(
            name=name,
            kl=bootstrap(kl, counted, seed),
            same=bootstrap(same, counted, seed),
            judged=judged,
            bytes=cache_bytes(child.to(dtype), held_out.ids_BT[:1]),
        )
        found.append(runner)
        sums.append((kl, counted))
        _log.info("race: %s, %.3g nats per token at %d bytes", name, runner.kl.value, runner.bytes)
        del child
    lead = None
    if len(found) > 1:
        other = min(range(1, len(found)), key=lambda i: found[i].kl.value)
        lead = bootstrap(sums[other][0] - sums[0][0], sums[0][1], seed)
    W, T = held_out.ids_BT.shape
    return Race(runners=tuple(found), tokens=T, windows=W, lead=lead)


@torch.inference_mode()
def _log_probabilities(model: PreTrainedModel, windows: Windows) -> Tensor:
    """[W, DECODED, vocabulary]"""
    ids = windows.ids_BT.to(model.device)
    return torch.cat([logp for _, logp in decode(model.eval(), ids, prefill=ids.shape[1] - DECODED + 1)], 1)


def _compared(wanted: Tensor, logp: Tensor, windows: Windows) -> tuple[Tensor, Tensor, Tensor]:
    """Sums by window, [W, 1]: KL, equal likeliest tokens, tokens."""
    counted = windows.mask_BT[:, -DECODED:].double()
    kl, same = (values.double() * counted for values in divergence(wanted, logp))
    return kl.sum(1, keepdim=True), same.sum(1, keepdim=True), counted.sum(1, keepdim=True)
