"""Callbacks of the trainer: scores of held-out text, and an optimizer that forgets between stages."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import Any

from transformers import TrainerCallback

from surgery.calibration.text import Windows
from surgery.console import progress

from .gates import choose_heads
from .schedule import Schedule
from .trainer import Uptrainer, core

_TOLD = ("loss", "nats_per_token", "held_out_kl")
"""Endings of the names of what lines tell of the log."""
_log = logging.getLogger(__name__)


class HeldOut(TrainerCallback):
    """Scores held-out text before training, every so many steps, and at the end; the log keeps the results."""

    def __init__(self, windows: Windows, every: int | None = None) -> None:
        self.windows, self.every = windows, every
        self.trainer: Uptrainer | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self._score()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps or (self.every and state.global_step % self.every == 0):
            self._score()

    def _score(self) -> None:
        assert self.trainer is not None
        found = dataclasses.asdict(self.trainer.score(self.windows))
        names = ["nats_per_token"] + ["ratio"] * (found["ratio"] is not None)
        names += ["kl", "parent_nats_per_token"] * (self.trainer.parent is not None)
        self.trainer.log({f"held_out_{name}": found[name] for name in names})


class HeadsChosen(TrainerCallback):
    """Behind the last step, before anything is scored or saved: the gates of heads become hard. The log keeps what they
    had learned.

    Args:
        length: tokens per sequence.
    """

    def __init__(self, length: int) -> None:
        self.length = length

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            alphas = choose_heads(core(model), self.length)
            if alphas:
                state.log_history.append({"step": state.global_step, "alphas": alphas})


class Told(TrainerCallback):
    """Lines with losses and the time left, where there is no terminal for the trainer's own bar."""

    def __init__(self) -> None:
        self.shown = contextlib.ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = state.max_steps - state.global_step
        self.advance = self.shown.enter_context(progress("training, in steps", steps, shown=False))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.advance(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        told = [f"{name.replace('_', ' ')} {value:.4g}" for name, value in (logs or {}).items() if name.endswith(_TOLD)]
        if told:
            _log.info("step %d of %d: %s", state.global_step, state.max_steps, ", ".join(told))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown.close()


class FreshOptimizer(TrainerCallback):
    """Forgets the moments of the gradients where a stage begins: they are another loss's."""

    def __init__(self, schedule: Schedule) -> None:
        self.begins = {stage.begin for stage in schedule.stages[1:]}

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.begins:
            getattr(optimizer, "optimizer", optimizer).state.clear()
