"""The winner against the best recipe of a single axis, through the cache: on text that neither has seen, decoded token
by token, and on questions about what was said once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..calibration.text import Windows
from ..convert import convert
from ..measure.memory import cache_bytes
from ..measure.scoring import decode, divergence
from ..measure.statistics import Estimate, bootstrap
from ..recipe import Recipe
from .recalling import Exam, Recall, exam_for
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
    recall: float | None = None
    """Share of the questions answered right; None where none are asked."""


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
    recall: Recall | str
    """Or why it is not compared."""

    @property
    def best_other(self) -> Runner | None:
        """The runner of least KL beside the composition."""
        return min(self.runners[1:], key=lambda runner: runner.kl.value, default=None)

    @property
    def is_better(self) -> bool:
        """Whether the KL of the composition is below every other, and the interval of the difference says so."""
        return self.lead is None or self.lead.low > 0

    @property
    def recalls_less(self) -> bool:
        """Whether the composition answers fewer questions than the best other, and the interval says so."""
        return isinstance(self.recall, Recall) and self.recall.lead is not None and self.recall.lead.high < 0

    @property
    def is_won(self) -> bool:
        """Whether the composition is better, and does not recall less."""
        return self.is_better and not self.recalls_less


def race(
    parent: PreTrainedModel,
    recipes: Mapping[str, Recipe],
    fit: Windows,
    held_out: Windows,
    *,
    bench: Bench,
    dtype: torch.dtype,
    tokenizer: Any,
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
        tokenizer: to ask questions in; None asks none.
    """
    wanted = _log_probabilities(parent, held_out)
    W, T = held_out.ids_BT.shape
    exam = exam_for(parent, tokenizer, T, seed)
    found, sums, answers = [], [], []
    for name, recipe in recipes.items():
        child = convert(parent, recipe, calibration=fit, seed=seed).eval()
        kl, same, counted = _compared(wanted, _log_probabilities(child, held_out), held_out)
        judged = bench.kl({layer: child.get_submodule(module) for layer, module in bench.names.items()})
        if isinstance(exam, Exam):
            answers.append(exam.right(child))
        runner = Runner(
            name=name,
            kl=bootstrap(kl, counted, seed),
            same=bootstrap(same, counted, seed),
            judged=judged,
            recall=float(answers[-1].mean()) if answers else None,
            bytes=cache_bytes(child.to(dtype), held_out.ids_BT[:1]),
        )
        found.append(runner)
        sums.append((kl, counted))
        _log.info("race: %s, %.3g nats per token at %d bytes", name, runner.kl.value, runner.bytes)
        del child
    other = min(range(1, len(found)), key=lambda i: found[i].kl.value, default=None)
    lead = None if other is None else bootstrap(sums[other][0] - sums[0][0], sums[0][1], seed)
    recall: Recall | str
    if isinstance(exam, Exam):
        recall = exam.compared(answers[0], None if other is None else answers[other], seed)
    else:
        recall = exam
    return Race(runners=tuple(found), tokens=T, windows=W, lead=lead, recall=recall)


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
