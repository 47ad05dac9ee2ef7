"""Callbacks of the trainer: scores of held-out text, and an optimizer that forgets between stages."""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import TrainerCallback

from surgery.calibration.text import Windows

from .schedule import Schedule
from .trainer import Uptrainer


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


class FreshOptimizer(TrainerCallback):
    """Forgets the moments of the gradients where a stage begins: they are another loss's."""

    def __init__(self, schedule: Schedule) -> None:
        self.begins = {stage.begin for stage in schedule.stages[1:]}

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step in self.begins:
            getattr(optimizer, "optimizer", optimizer).state.clear()
